//! The lock bytes of QEMU (`block/file-posix.c`: `raw_apply_lock_bytes`, `raw_check_lock_bytes`).
//!
//! Every user of an image holds shared locks on single bytes: `100 + p` for each permission `p` it uses, and `200 + p`
//! for each permission it does not let others use. A shared lock never fails because of another, so the locks merely
//! say what is so; a conflict is found by asking, after taking them, whether an exclusive lock on the opposite byte
//! would be possible. The bytes need not exist in the file, and nothing is ever written to them.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::Mode;

const PERMISSION_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;
/// The last byte that QEMU's scheme can use: the highest permission bit is 3, and a few are left for growth.
const LAST: i64 = 207;

/// `BLK_PERM_CONSISTENT_READ`, `_WRITE` and `_RESIZE`, as bit numbers. Bit 2 (`_WRITE_UNCHANGED`) is for copies that
/// keep the contents, which nothing here does.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What one user of an image does, and what it does not let others do.
#[derive(Clone, Copy)]
pub(super) struct Claim {
    permissions: &'static [i64],
    unshared: &'static [i64],
}

impl Claim {
    /// The claim that QEMU makes for a reader (`qemu-img convert`) or for the only writer (a guest's disk); a shared
    /// one forbids others nothing.
    pub(super) fn new(mode: Mode, shared: bool) -> Self {
        let permissions: &[i64] = match mode {
            Mode::Read => &[CONSISTENT_READ],
            Mode::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        };
        Claim { permissions, unshared: if shared { &[] } else { &[WRITE, RESIZE] } }
    }

    /// The bytes that this claim holds.
    fn held(self) -> impl Iterator<Item = i64> {
        let permissions = self.permissions.iter().map(|bit| PERMISSION_BASE + bit);
        permissions.chain(self.unshared.iter().map(|bit| UNSHARED_BASE + bit))
    }

    /// The bytes that nobody else may hold.
    fn opposite(self) -> impl Iterator<Item = i64> {
        let permissions = self.permissions.iter().map(|bit| UNSHARED_BASE + bit);
        permissions.chain(self.unshared.iter().map(|bit| PERMISSION_BASE + bit))
    }

    /// Take the claim's locks. `Ok(false)`: another program holds an exclusive lock over them (QEMU never does).
    /// What was taken before a failure stays: [`unlock`] releases it.
    pub(super) fn lock(self, file: BorrowedFd<'_>) -> io::Result<bool> {
        for byte in self.held() {
            match set(file, libc::F_RDLCK, byte, 1) {
                Ok(()) => {}
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES | libc::EBUSY)) =>
                {
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Whether somebody else's claim forbids this one. Asked after [`Claim::lock`], so that of two that come together
    /// at least one sees the other.
    pub(super) fn conflicts(self, file: BorrowedFd<'_>) -> io::Result<bool> {
        for byte in self.opposite() {
            if blocker(file, byte)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Release every byte of the scheme that this open file description holds.
pub(super) fn unlock(file: BorrowedFd<'_>) -> io::Result<()> {
    set(file, libc::F_UNLCK, PERMISSION_BASE, LAST + 1 - PERMISSION_BASE)
}

/// The strongest use that other open file descriptions make of the file.
pub(super) fn used_by_others(file: BorrowedFd<'_>) -> io::Result<Option<Mode>> {
    let mut found = None;
    for base in [PERMISSION_BASE, UNSHARED_BASE] {
        for bit in CONSISTENT_READ..=RESIZE {
            match blocker(file, base + bit)? {
                Some(Mode::Write) => return Ok(Some(Mode::Write)),
                Some(Mode::Read) => found = Some(Mode::Read),
                None => {}
            }
        }
    }
    Ok(found)
}

/// What a lock on the bytes `first..=last` says about its holder, or `None` if it does not concern this scheme.
/// A lock beyond the scheme's bytes is another program's, of the whole file as a rule: its kind is its meaning.
pub(super) fn meaning(exclusive: bool, first: i64, last: i64) -> Option<Mode> {
    let within = first >= PERMISSION_BASE && last <= LAST;
    let covers = |byte| first <= byte && byte <= last;
    let touches = first <= LAST && last >= PERMISSION_BASE;
    if !touches {
        None
    } else if exclusive || within && (covers(PERMISSION_BASE + WRITE) || covers(PERMISSION_BASE + RESIZE)) {
        Some(Mode::Write)
    } else {
        Some(Mode::Read)
    }
}

/// The use made by whoever would be in the way of an exclusive lock on `byte`.
fn blocker(file: BorrowedFd<'_>, byte: i64) -> io::Result<Option<Mode>> {
    let mut lock = describe(libc::F_WRLCK, byte, 1);
    control(file, libc::F_OFD_GETLK, &mut lock)?;
    if i32::from(lock.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    let last = if lock.l_len == 0 { i64::MAX } else { lock.l_start.saturating_add(lock.l_len - 1) };
    Ok(meaning(i32::from(lock.l_type) == libc::F_WRLCK, lock.l_start, last))
}

fn set(file: BorrowedFd<'_>, kind: i32, start: i64, length: i64) -> io::Result<()> {
    control(file, libc::F_OFD_SETLK, &mut describe(kind, start, length))
}

/// A description of a lock; `l_pid` has to be 0 for locks of open file descriptions (fcntl(2)).
fn describe(kind: i32, start: i64, length: i64) -> libc::flock {
    let (kind, whence) = (i16::try_from(kind), i16::try_from(libc::SEEK_SET));
    libc::flock {
        l_type: kind.expect("lock kinds are small"),
        l_whence: whence.expect("SEEK_SET is 0"),
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}

fn control(file: BorrowedFd<'_>, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open for the length of the borrow, both commands take a pointer to a `flock`, and
        // the kernel keeps it no longer than the call.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
