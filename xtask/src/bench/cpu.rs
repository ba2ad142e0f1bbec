//! CPU time of servers.

use std::io;

use anyhow::{Context, Result};

/// Seconds of CPU that a process has used: all its threads, io_uring's workers and those that have ended among them.
pub(crate) fn seconds(pid: u32) -> Result<f64> {
    let mut clock: libc::clockid_t = 0;
    let pid = libc::pid_t::try_from(pid)?;
    // SAFETY: `clock` is valid for writing for the length of the call.
    let error = unsafe { libc::clock_getcpuclockid(pid, &mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error))
            .with_context(|| format!("CPU clock of process {pid}"));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writing for the length of the call.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("CPU time of process {pid}"));
    }
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}
