//! Images that live: qcow2 served beside raw and qemu-storage-daemon, converted beside qemu-img, and what has to be quick.

mod jobs;
pub(crate) mod judge;
mod served;
mod tables;

use std::path::Path;

use anyhow::{Context, Result};

use super::Plan;
use super::results::Results;

pub(crate) use served::Loads;
pub(crate) use tables::tables;

const GIB: u64 = 1 << 30;

/// Does all that is asked for. What cannot be done is in the results, and the rest is done.
pub(crate) fn measure(plan: &Plan, results: &mut Results) -> Result<()> {
    let dir = plan.tools.scratch.join("images");
    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    served::measure(plan, &dir, &mut results.image_loads)?;
    let done = jobs::measure(plan, &dir, &mut results.image);
    // Gigabytes, which nobody wants to keep.
    let _ = std::fs::remove_dir_all(&dir);
    done
}

/// Whether a client that loads served disks is needed.
pub(crate) fn serves(plan: &Plan) -> bool {
    served::ALL.iter().any(|load| plan.wants(load.name)) || plan.wants(jobs::BACKUP)
}

/// Makes an empty qcow2 image with the options that both sides have by default, but for these of qemu-img, on top of another
/// file, if there is one.
fn qcow2(path: &Path, size: u64, backing: Option<&Path>, options: &[&str]) -> Result<()> {
    let _ = std::fs::remove_file(path);
    let mut command = std::process::Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2"]).args(options);
    if let Some(backing) = backing {
        command.arg("-b").arg(backing).args(["-F", "raw"]);
    }
    super::output(command.arg(path).arg(size.to_string()))?;
    Ok(())
}
