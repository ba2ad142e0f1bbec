//! CPU time of processes.

use std::io;
use std::time::Duration;

use anyhow::{Context, Result};

/// The CPU time that a process has used: all its threads, io_uring's workers and those that have ended among them.
///
/// Read from the process's CPU clock, which counts nanoseconds, not `/proc/PID/stat`'s ticks of 10 ms.
///
/// # Errors
/// There is no such process.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let of = || format!("CPU time of process {pid}");
    let mut clock: libc::clockid_t = 0;
    // SAFETY: `clock` is valid for writing for the length of the call.
    let error = unsafe { libc::clock_getcpuclockid(libc::pid_t::try_from(pid)?, &mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error)).with_context(of);
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writing for the length of the call.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(io::Error::last_os_error()).with_context(of);
    }
    Ok(Duration::new(time.tv_sec.try_into()?, time.tv_nsec.try_into()?))
}

#[cfg(test)]
mod tests {
    use super::cpu_time;

    #[test]
    fn time_of_self_grows_and_of_nobody_is_an_error() {
        let pid = std::process::id();
        let before = cpu_time(pid).unwrap();
        let work: u64 = (0..5_000_000u64).map(std::hint::black_box).sum();
        std::hint::black_box(work);
        assert!(cpu_time(pid).unwrap() > before);
        assert!(cpu_time(0x3fff_fffe).is_err());
    }
}
