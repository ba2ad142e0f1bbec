//! The machine and the programs that the numbers belong to.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::output;

/// In words.
#[derive(Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_gib: u64,
    pub(crate) kernel: String,
    pub(crate) filesystem: String,
    pub(crate) programs: Vec<String>,
}

/// Describes this machine, with the filesystem that `dir` is on.
pub(crate) fn describe(dir: &Path) -> Result<Machine> {
    let field = |file: &str, name: &str| -> Option<String> {
        let text = fs::read_to_string(file).ok()?;
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let memory = field("/proc/meminfo", "MemTotal").and_then(|kb| kb.split(' ').next()?.parse::<u64>().ok());
    let hypervisor = fs::read_to_string("/proc/cpuinfo")?.contains(" hypervisor ");
    let model = field("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.into());
    Ok(Machine {
        cpu: if hypervisor { format!("{model} (virtual)") } else { model },
        cores: std::thread::available_parallelism()?.get(),
        memory_gib: memory.unwrap_or(0).div_ceil(1 << 20),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        filesystem: filesystem(dir)?,
        programs: programs(),
    })
}

/// `ext4 on /dev/vda`.
fn filesystem(dir: &Path) -> Result<String> {
    let text = output(Command::new("findmnt").args(["-n", "-o", "FSTYPE,SOURCE", "--target"]).arg(dir))?;
    Ok(text.split_whitespace().collect::<Vec<_>>().join(" on "))
}

/// First lines of what the peers say of their version; a peer that is absent says so later.
fn programs() -> Vec<String> {
    let commands = [["fio", "--version"], ["qemu-storage-daemon", "--version"], ["nbdkit", "--version"]];
    let lines = commands.iter().filter_map(|[program, flag]| output(Command::new(program).arg(flag)).ok());
    // mke2fs speaks of itself on standard error.
    let mke2fs = Command::new("mke2fs").arg("-V").output().ok();
    let mke2fs = mke2fs.map(|output| String::from_utf8_lossy(&output.stderr).into_owned());
    lines.chain(mke2fs).filter_map(|text| Some(text.lines().next()?.to_owned())).collect()
}
