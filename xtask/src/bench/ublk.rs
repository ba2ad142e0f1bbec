//! ublk beside a loop device with direct I/O, both in one guest: the machine that builds has no such driver.
//!
//! The guest is emulated, so its numbers mean nothing by themselves; both sides pay for the emulation, and their ratio
//! says how they compare.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use vbd_tests::{Guest, Machine, Scratch};

use super::Plan;
use super::loads::Load;
use super::results::median;

const MIB: u64 = 1 << 20;
/// How long a run may take beyond its own time.
const SLACK: std::time::Duration = std::time::Duration::from_secs(120);

pub(crate) const LOADS: [Load; 3] = [Load::RANDOM_READ[0], Load::RANDOM_READ[1], Load::RANDOM_WRITE[1]];

/// Both under one load: medians of requests in a second.
#[derive(Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) load: String,
    pub(crate) looped: f64,
    pub(crate) ublk: f64,
}

impl Row {
    /// ublk against loop.
    pub(crate) fn ratio(&self) -> f64 {
        self.ublk / self.looped
    }
}

/// Boots the guest and measures.
pub(crate) fn measure(plan: &Plan) -> Result<Vec<Row>> {
    let scratch = Scratch::new()?;
    let machine = Machine::new([]).with_tools().with_vbd(&scratch, 2048 * MIB)?;
    let mut machine = machine.with_modules(&["ublk_drv", "loop"]);
    machine.program = Some(plan.tools.vbd.clone());
    let mut guest = machine.boot(&scratch)?;
    guest.sh("insmod /more/ublk_drv.ko && insmod /more/loop.ko && mount --bind /host /tools/mnt")?;
    for file in ["loop", "ublk"] {
        guest.sh(&format!("dd if=/dev/urandom of=/host/{file} bs=1M count=256 conv=fsync"))?;
    }
    guest.sh(&Guest::tool("losetup --direct-io=on /dev/loop0 /mnt/loop"))?;
    ensure!(guest.sh("cat /sys/block/loop0/loop/dio")?.trim() == "1", "loop does no direct I/O here");
    let vbd = guest.attach("/host/ublk --ublk 0")?;

    let mut rows = Vec::new();
    for load in LOADS {
        let (mut looped, mut ublk) = (Vec::new(), Vec::new());
        for _ in 0..plan.runs {
            looped.push(run(&mut guest, plan, load, "/dev/loop0")?);
            ublk.push(run(&mut guest, plan, load, "/dev/ublkb0")?);
        }
        let of = |values| median(values).context("no runs");
        rows.push(Row { load: load.name(), looped: of(looped)?, ublk: of(ublk)? });
    }
    ensure!(guest.stop(vbd)? == 0, "vbd did not end well in the guest");
    guest.power_off()?;
    Ok(rows)
}

/// Requests in a second.
fn run(guest: &mut Guest, plan: &Plan, load: Load, device: &str) -> Result<f64> {
    let seconds = plan.seconds.max(1.0);
    guest.begin(&Guest::tool(&format!(
        "fio --name=bench --filename={device} --rw={} --bs={} --iodepth={} --ioengine=io_uring --direct=1 --thread \
         --time_based --norandommap --randrepeat=0 --runtime={:.0}ms --minimal",
        load.rw,
        load.block,
        load.depth,
        seconds * 1e3
    )))?;
    let outcome = guest.finish(SLACK + std::time::Duration::from_secs_f64(seconds))?;
    ensure!(outcome.status == 0, "fio on {device}: {}", outcome.output);
    // Terse output, version 3 (fio(1)): IOPS of reads are the 8th field, those of writes the 49th.
    let line = outcome.output.lines().find(|line| line.starts_with("3;")).context("fio printed no result")?;
    let field = if load.rw.contains("read") { 7 } else { 48 };
    line.split(';').nth(field).and_then(|iops| iops.parse().ok()).context("fio's line lacks a number")
}
