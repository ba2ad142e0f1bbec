//! Calls that must go through the C library, and their counterparts that must not.
//!
//! fakeroot replaces functions of the C library: a stage that runs under it sets and sees owners, devices and attributes
//! through these. What it reads from the real tree it reads by the kernel's own answers, which `rustix` gives.

use std::ffi::{CStr, CString, OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::AtFlags;

use crate::entry::{Meta, Special, Time, Xattr};

/// The number of listxattrat(2), of Linux 6.13, on every architecture that vbd is built for.
const LISTXATTRAT: libc::c_long = 465;

/// Whose word on owners and attributes counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum View {
    /// The C library's: under fakeroot, what was pretended.
    Library,
    /// The kernel's.
    Kernel,
}

/// What an inode says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) mode: u32,
    pub(crate) links: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) rdev: u64,
    pub(crate) size: u64,
    /// Bytes that its blocks take.
    pub(crate) stored: u64,
    pub(crate) mtime: Time,
    pub(crate) ctime: Time,
}

impl Stat {
    pub(crate) fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    pub(crate) fn is_dir(&self) -> bool {
        self.kind() == libc::S_IFDIR
    }

    pub(crate) fn is_symlink(&self) -> bool {
        self.kind() == libc::S_IFLNK
    }

    pub(crate) fn is_file(&self) -> bool {
        self.kind() == libc::S_IFREG
    }

    pub(crate) fn key(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    /// Whether it is the same file, and nothing changed its content in between.
    pub(crate) fn is_as(&self, before: &Stat) -> bool {
        let of = |stat: &Stat| (stat.key(), stat.size, stat.mtime, stat.ctime);
        of(self) == of(before)
    }

    pub(crate) fn meta(&self) -> Meta {
        Meta { mode: self.mode & 0o7777, uid: self.uid, gid: self.gid, mtime: self.mtime }
    }
}

fn time(seconds: i64, nanoseconds: i64) -> Time {
    Time { seconds, nanoseconds: u32::try_from(nanoseconds).unwrap_or(0) }
}

fn c_string(name: &OsStr) -> io::Result<CString> {
    CString::new(name.as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Looks at `name` in `dir`, following no link; an empty name is `dir` itself.
pub(crate) fn stat_at(dir: BorrowedFd<'_>, name: &OsStr, view: View) -> io::Result<Stat> {
    match view {
        View::Library => library_stat(dir, name),
        View::Kernel => {
            let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH;
            Ok(kernel_stat(&rustix::fs::statat(dir, name, flags)?))
        }
    }
}

/// Looks at an open file: less work than by a name.
pub(crate) fn stat_of(file: BorrowedFd<'_>) -> io::Result<Stat> {
    Ok(kernel_stat(&rustix::fs::fstat(file)?))
}

fn kernel_stat(s: &rustix::fs::Stat) -> Stat {
    Stat {
        device: s.st_dev,
        inode: s.st_ino,
        mode: s.st_mode,
        #[allow(clippy::useless_conversion, reason = "its width depends on the architecture")]
        links: u64::from(s.st_nlink),
        uid: s.st_uid,
        gid: s.st_gid,
        rdev: s.st_rdev,
        size: u64::try_from(s.st_size).unwrap_or(0),
        stored: u64::try_from(s.st_blocks).unwrap_or(0).saturating_mul(512),
        mtime: time(s.st_mtime, i64::try_from(s.st_mtime_nsec).unwrap_or(0)),
        ctime: time(s.st_ctime, i64::try_from(s.st_ctime_nsec).unwrap_or(0)),
    }
}

fn library_stat(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<Stat> {
    let name = c_string(name)?;
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH;
    let mut stat = MaybeUninit::<libc::stat64>::uninit();
    // SAFETY: the name ends in a NUL and `stat` has room for what is written.
    check(unsafe { libc::fstatat64(dir.as_raw_fd(), name.as_ptr(), stat.as_mut_ptr(), flags) })?;
    // SAFETY: the call succeeded, so it is filled in.
    let s = unsafe { stat.assume_init() };
    Ok(Stat {
        device: s.st_dev,
        inode: s.st_ino,
        mode: s.st_mode,
        #[allow(clippy::useless_conversion, reason = "its width depends on the architecture")]
        links: u64::from(s.st_nlink),
        uid: s.st_uid,
        gid: s.st_gid,
        rdev: s.st_rdev,
        size: u64::try_from(s.st_size).unwrap_or(0),
        stored: u64::try_from(s.st_blocks).unwrap_or(0).saturating_mul(512),
        mtime: time(s.st_mtime, s.st_mtime_nsec),
        ctime: time(s.st_ctime, s.st_ctime_nsec),
    })
}

/// The effective user, as the C library says.
pub(crate) fn user() -> u32 {
    // SAFETY: it cannot fail and takes nothing.
    unsafe { libc::geteuid() }
}

/// Sets the owner of `name` itself, not of what it may point to.
pub(crate) fn chown_at(dir: BorrowedFd<'_>, name: &OsStr, uid: u32, gid: u32) -> io::Result<()> {
    let name = c_string(name)?;
    // SAFETY: the name ends in a NUL.
    check(unsafe { libc::fchownat(dir.as_raw_fd(), name.as_ptr(), uid, gid, libc::AT_SYMLINK_NOFOLLOW) })
}

/// Sets permission bits. The caller has seen that `name` is no link.
pub(crate) fn chmod_at(dir: BorrowedFd<'_>, name: &OsStr, mode: u32) -> io::Result<()> {
    let name = c_string(name)?;
    // SAFETY: the name ends in a NUL.
    check(unsafe { libc::fchmodat(dir.as_raw_fd(), name.as_ptr(), mode & 0o7777, 0) })
}

/// Makes a directory that only its maker may use.
pub(crate) fn mkdir_at(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let name = c_string(name)?;
    // SAFETY: the name ends in a NUL.
    check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), 0o700) })
}

/// Makes a device, a FIFO or a socket.
pub(crate) fn mknod_at(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    kind: Special,
    major: u32,
    minor: u32,
) -> io::Result<()> {
    let name = c_string(name)?;
    let kind = match kind {
        Special::Character => libc::S_IFCHR,
        Special::Block => libc::S_IFBLK,
        Special::Fifo => libc::S_IFIFO,
        Special::Socket => libc::S_IFSOCK,
    };
    let device = libc::makedev(major, minor);
    // SAFETY: the name ends in a NUL.
    check(unsafe { libc::mknodat(dir.as_raw_fd(), name.as_ptr(), kind | 0o600, device) })
}

/// Removes a name, of a directory where `directory` says so.
pub(crate) fn unlink_at(dir: BorrowedFd<'_>, name: &OsStr, directory: bool) -> io::Result<()> {
    let name = c_string(name)?;
    let flags = if directory { libc::AT_REMOVEDIR } else { 0 };
    // SAFETY: the name ends in a NUL.
    check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) })
}

/// The path of `name` in `dir` for calls that take no descriptor; such a call must follow no last link.
fn proc_path(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<CString> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(if name.is_empty() { b"." } else { name.as_bytes() });
    CString::new(path).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Sets an extended attribute of `name` itself.
pub(crate) fn set_xattr(dir: BorrowedFd<'_>, name: &OsStr, attribute: &Xattr) -> io::Result<()> {
    let path = proc_path(dir, name)?;
    let (key, value) = attribute;
    let c_key = c_string(key)?;
    let (data, size) = (value.as_ptr().cast(), value.len());
    // SAFETY: both names end in a NUL, and the value is as long as said.
    check(unsafe { libc::lsetxattr(path.as_ptr(), c_key.as_ptr(), data, size, 0) })
}

/// Whether `name` itself certainly has no extended attributes, by one call that takes a directory's descriptor. Older
/// kernels have no such call, and filters of calls may not know it: false then.
pub(crate) fn has_no_xattrs(dir: BorrowedFd<'_>, name: &CStr) -> bool {
    static UNKNOWN: AtomicBool = AtomicBool::new(false);
    if UNKNOWN.load(Ordering::Relaxed) {
        return false;
    }
    let nothing = std::ptr::null_mut::<u8>();
    // SAFETY: the name ends in a NUL, and a list of length 0 is not written to.
    let length = unsafe {
        libc::syscall(LISTXATTRAT, dir.as_raw_fd(), name.as_ptr(), libc::AT_SYMLINK_NOFOLLOW, nothing, 0usize)
    };
    let unknown = || matches!(io::Error::last_os_error().raw_os_error(), Some(libc::ENOSYS | libc::EPERM));
    if length < 0 && unknown() {
        UNKNOWN.store(true, Ordering::Relaxed);
    }
    length == 0
}

/// Reads all extended attributes of `name` itself, in the order of their names.
pub(crate) fn xattrs(dir: BorrowedFd<'_>, name: &OsStr, view: View) -> io::Result<Vec<Xattr>> {
    let path = proc_path(dir, name)?;
    let list = |buffer: &mut [u8]| -> io::Result<usize> {
        match view {
            View::Kernel => Ok(rustix::fs::llistxattr(path.as_c_str(), buffer)?),
            View::Library => {
                let (names, size) = (buffer.as_mut_ptr().cast(), buffer.len());
                // SAFETY: the path ends in a NUL and the buffer is as long as said.
                length(unsafe { libc::llistxattr(path.as_ptr(), names, size) })
            }
        }
    };
    let names = match sized(list) {
        Ok(names) => names,
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut all = Vec::new();
    for key in names.split(|&b| b == 0).filter(|key| !key.is_empty()) {
        let key = OsStr::from_bytes(key);
        let c_key = c_string(key)?;
        let get = |buffer: &mut [u8]| -> io::Result<usize> {
            match view {
                View::Kernel => Ok(rustix::fs::lgetxattr(path.as_c_str(), c_key.as_c_str(), buffer)?),
                View::Library => {
                    let (value, size) = (buffer.as_mut_ptr().cast(), buffer.len());
                    // SAFETY: both names end in a NUL and the buffer is as long as said.
                    length(unsafe { libc::lgetxattr(path.as_ptr(), c_key.as_ptr(), value, size) })
                }
            }
        };
        match sized(get) {
            Ok(value) => all.push((OsString::from_vec(key.as_bytes().to_vec()), value)),
            // Removed since it was listed.
            Err(e) if e.raw_os_error() == Some(libc::ENODATA) => {}
            Err(e) => return Err(e),
        }
    }
    all.sort();
    Ok(all)
}

/// Reads all extended attributes of an open file, in the order of their names.
pub(crate) fn xattrs_of(file: BorrowedFd<'_>) -> io::Result<Vec<Xattr>> {
    let names = match sized(|buffer| Ok(rustix::fs::flistxattr(file, buffer)?)) {
        Ok(names) => names,
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut all = Vec::new();
    for key in names.split(|&b| b == 0).filter(|key| !key.is_empty()) {
        match sized(|buffer| Ok(rustix::fs::fgetxattr(file, key, buffer)?)) {
            Ok(value) => all.push((OsString::from_vec(key.to_vec()), value)),
            // Removed since it was listed.
            Err(e) if e.raw_os_error() == Some(libc::ENODATA) => {}
            Err(e) => return Err(e),
        }
    }
    all.sort();
    Ok(all)
}

fn length(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Calls with a small buffer, and with one as large as an attribute can be if that is not enough.
fn sized(call: impl Fn(&mut [u8]) -> io::Result<usize>) -> io::Result<Vec<u8>> {
    // Most entries have no attributes at all: that costs no allocation.
    let mut small = [0; 256];
    match call(&mut small) {
        Err(e) if e.raw_os_error() == Some(libc::ERANGE) => {}
        other => return Ok(small[..other?].to_vec()),
    }
    let mut buffer = vec![0; 65536];
    let length = call(&mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}
