//! CPU time of processes, and where threads run.

use std::io;
use std::time::Duration;

use anyhow::Context;

/// The CPU time that a process has used, all its threads together, with those that have ended.
///
/// Read from the process's CPU clock, which counts nanoseconds, not `/proc/PID/stat`'s ticks of 10 ms.
pub(crate) fn process_time(pid: u32) -> anyhow::Result<Duration> {
    let pid_t = libc::pid_t::try_from(pid).context("process id out of range")?;
    let mut clock: libc::clockid_t = 0;
    // SAFETY: `clock` is valid for writing for the length of the call.
    let error = unsafe { libc::clock_getcpuclockid(pid_t, &mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error))
            .with_context(|| format!("CPU clock of process {pid}"));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writing for the length of the call.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("CPU time of process {pid}"));
    }
    Ok(Duration::new(time.tv_sec.try_into()?, time.tv_nsec.try_into()?))
}

/// Confines the calling thread to one CPU.
pub(crate) fn pin(cpu: u16) -> anyhow::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    anyhow::ensure!(usize::from(cpu) < rustix::thread::CpuSet::MAX_CPU, "no CPU {cpu}");
    set.set(cpu.into());
    rustix::thread::sched_setaffinity(None, &set).with_context(|| format!("run on CPU {cpu}"))
}

#[cfg(test)]
mod tests {
    use super::process_time;

    #[test]
    fn time_of_self_grows_and_of_nobody_is_an_error() {
        let pid = std::process::id();
        let before = process_time(pid).unwrap();
        let work: u64 = (0..5_000_000u64).map(std::hint::black_box).sum();
        std::hint::black_box(work);
        assert!(process_time(pid).unwrap() > before);
        assert!(process_time(0x3fff_fffe).is_err());
    }
}
