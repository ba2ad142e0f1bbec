//! System calls that fail for one thread, and for those that it starts: by a filter of calls (seccomp(2)), so that code is
//! tested as it is, whichever way it takes to the kernel.

use std::io;
use std::ops::Range;

use libc::{sock_filter, sock_fprog};

/// A call that is to fail.
#[derive(Debug, Clone, Copy)]
pub struct Failing {
    call: libc::c_long,
    /// Where that is limited: the argument, by its position from 0, and the values with which it fails: from the first one to
    /// before the second.
    values: Option<(u32, u64, u64)>,
    error: i32,
}

impl Failing {
    /// Every call of that number fails with this error.
    #[must_use]
    pub fn every(call: libc::c_long, error: i32) -> Failing {
        Failing { call, values: None, error }
    }

    /// Writes that begin in a range (pwrite64(2)) fail.
    #[must_use]
    pub fn writes(range: Range<u64>, error: i32) -> Failing {
        Failing { call: libc::SYS_pwrite64, values: Some((3, range.start, range.end)), error }
    }

    /// Writes in order (write(2)) of at least so many bytes fail: more than 8, or reactors could not be woken.
    #[must_use]
    pub fn long_writes(bytes: u64, error: i32) -> Failing {
        Failing { call: libc::SYS_write, values: Some((2, bytes, u64::MAX)), error }
    }

    /// Flushes fail (fsync(2) and fdatasync(2)).
    #[must_use]
    pub fn flushes(error: i32) -> [Failing; 2] {
        [libc::SYS_fsync, libc::SYS_fdatasync].map(|call| Failing::every(call, error))
    }

    /// The filter's part for it: on to the next part where it does not apply.
    fn program(self) -> Vec<sock_filter> {
        let call = u32::try_from(self.call).expect("the number of a call");
        let refuse =
            statement(RETURN, libc::SECCOMP_RET_ERRNO | u32::try_from(self.error).expect("an error"));
        let Some((argument, from, until)) = self.values else {
            return vec![statement(LOAD, 0), jump(EQUAL, call, 0, 1), refuse];
        };
        // `struct seccomp_data`: the arguments, of 64 bits each, behind 16 bytes.
        let at = 16 + 8 * argument;
        let (low, high) = if cfg!(target_endian = "little") { (at, at + 4) } else { (at + 4, at) };
        let ((from_low, from_high), (until_low, until_high)) = (halves(from), halves(until));
        vec![
            statement(LOAD, 0),
            jump(EQUAL, call, 0, 11),
            statement(LOAD, high),
            jump(GREATER, from_high, 3, 0),
            jump(EQUAL, from_high, 0, 8),
            statement(LOAD, low),
            jump(AT_LEAST, from_low, 0, 6),
            statement(LOAD, high),
            jump(GREATER, until_high, 4, 0),
            jump(EQUAL, until_high, 0, 2),
            statement(LOAD, low),
            jump(AT_LEAST, until_low, 1, 0),
            refuse,
        ]
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the two halves")]
fn halves(number: u64) -> (u32, u32) {
    (number as u32, (number >> 32) as u32)
}

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const GREATER: u32 = libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K;
const AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

fn statement(code: u32, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

fn jump(code: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: u16::try_from(code).expect("codes have 16 bits"), jt, jf, k }
}

/// Does `work` in a thread in which these calls fail. Programs that it starts have the filter, too.
///
/// # Panics
/// The kernel knows no filters; what `work` panics with.
pub fn with_failing<T: Send>(calls: &[Failing], work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            filter(calls).expect("a filter of system calls");
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Filters the calls of this thread until it ends.
fn filter(calls: &[Failing]) -> io::Result<()> {
    let mut program: Vec<sock_filter> = calls.iter().flat_map(|call| call.program()).collect();
    program.push(statement(RETURN, libc::SECCOMP_RET_ALLOW));
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let all = sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: it takes numbers only, and changes what this thread may become.
    let promised = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: the program is as long as it says, and the kernel copies it.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const all) };
    if promised == 0 && set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_is_to_fail_fails_and_nothing_else() {
        let file = tempfile::tempfile().unwrap();
        let (first, end) = ((3 << 32) + 10, (5 << 32) + 20);
        with_failing(&[Failing::writes(first..end, libc::EIO)], || {
            for (offset, good) in [
                (0, true),
                (11, true),
                ((2 << 32) + 11, true),
                (first - 1, true),
                (first, false),
                (first + 1, false),
                (4 << 32, false),
                ((4 << 32) + 30, false),
                (end - 1, false),
                (end, true),
                ((5 << 32) + 30, true),
                (6 << 32, true),
            ] {
                let wrote = file.write_at(b"x", offset);
                assert_eq!(wrote.is_ok(), good, "{offset}");
                if !good {
                    assert_eq!(wrote.unwrap_err().raw_os_error(), Some(libc::EIO));
                }
            }
            file.sync_all().unwrap();
        });
        with_failing(&Failing::flushes(libc::ENOSPC), || {
            assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
            assert_eq!(file.sync_data().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
            file.write_at(b"x", first).unwrap();
        });
        file.sync_all().unwrap();
    }
}
