//! Where threads run.

use anyhow::Context;

/// Confines the calling thread to one CPU.
pub(crate) fn pin(cpu: u16) -> anyhow::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    anyhow::ensure!(usize::from(cpu) < rustix::thread::CpuSet::MAX_CPU, "no CPU {cpu}");
    set.set(cpu.into());
    rustix::thread::sched_setaffinity(None, &set).with_context(|| format!("run on CPU {cpu}"))
}
