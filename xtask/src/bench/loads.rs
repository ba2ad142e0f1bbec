//! The loads, and the two clients that make them: fio, and vbd-load for vhost-user.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbd_tests::cpu_time;

use super::{Plan, output};

/// One load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Load {
    pub(crate) rw: &'static str,
    /// Bytes of a request.
    pub(crate) block: u32,
    pub(crate) depth: u32,
}

const fn load(rw: &'static str, block: u32, depth: u32) -> Load {
    Load { rw, block, depth }
}

impl Load {
    pub(crate) const RANDOM_READ: [Load; 3] =
        [load("randread", 4096, 1), load("randread", 4096, 32), load("randread", 4096, 128)];
    pub(crate) const RANDOM_WRITE: [Load; 3] =
        [load("randwrite", 4096, 1), load("randwrite", 4096, 32), load("randwrite", 4096, 128)];
    pub(crate) const READ: Load = load("read", 1 << 20, 8);
    pub(crate) const WRITE: Load = load("write", 1 << 20, 8);
    pub(crate) const ALL: [Load; 8] = {
        let ([r1, r32, r128], [w1, w32, w128]) = (Self::RANDOM_READ, Self::RANDOM_WRITE);
        [r1, r32, r128, w1, w32, w128, Self::READ, Self::WRITE]
    };

    /// `randread-4K-32`.
    pub(crate) fn name(&self) -> String {
        let block = if self.block < 1 << 20 {
            format!("{}K", self.block >> 10)
        } else {
            format!("{}M", self.block >> 20)
        };
        format!("{}-{block}-{}", self.rw, self.depth)
    }
}

/// What a client is pointed at.
pub(crate) enum Target {
    /// A file or a block device, with O_DIRECT or without.
    File { path: PathBuf, direct: bool },
    /// An NBD server on this unix socket.
    Nbd(PathBuf),
    /// A vhost-user-blk server on this socket.
    VhostUser(PathBuf),
}

/// What one run measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Sample {
    pub(crate) iops: f64,
    /// Megabytes (10^6).
    pub(crate) mb_per_s: f64,
    /// Mean time from submission to completion, in microseconds.
    pub(crate) latency_us: f64,
    /// Requests for each second of the server's CPU time.
    pub(crate) iops_per_cpu: Option<f64>,
}

/// Runs `load` once.
pub(crate) fn measure(plan: &Plan, load: Load, target: &Target, server: Option<u32>) -> Result<Sample> {
    match target {
        Target::VhostUser(socket) => vbd_load(plan, load, socket, server),
        Target::Nbd(socket) => fio(
            plan,
            load,
            &["--ioengine=nbd".into(), format!("--uri=nbd+unix:///?socket={}", socket.display())],
            server,
        ),
        Target::File { path, direct } => {
            let how = [
                "--ioengine=io_uring".into(),
                format!("--filename={}", path.display()),
                format!("--direct={}", u8::from(*direct)),
            ];
            fio(plan, load, &how, server)
        }
    }
}

fn fio(plan: &Plan, load: Load, how: &[String], server: Option<u32>) -> Result<Sample> {
    let before = server.map(cpu_time).transpose()?;
    let text = output(
        Command::new("fio")
            .args(["--name=bench", "--thread", "--time_based", "--norandommap", "--randrepeat=0"])
            .args(["--output-format=json", "--eta=never"])
            .args(how)
            .arg(format!("--rw={}", load.rw))
            .arg(format!("--bs={}", load.block))
            .arg(format!("--iodepth={}", load.depth))
            .arg(format!("--runtime={:.0}ms", plan.seconds * 1e3)),
    )?;
    let after = server.map(cpu_time).transpose()?;

    // The nbd engine says hello before the JSON.
    let start = text.find("{\n").context("fio printed no JSON")?;
    let report: Value = serde_json::from_str(&text[start..]).context("fio's JSON")?;
    let job = &report["jobs"][0];
    ensure!(job["error"] == 0, "fio: error {}", job["error"]);
    let side = &job[if load.rw.contains("read") { "read" } else { "write" }];
    let number = |value: &Value| value.as_f64().context("fio's JSON lacks a number");
    let requests = number(&side["total_ios"])?;
    Ok(Sample {
        iops: number(&side["iops"])?,
        mb_per_s: number(&side["bw_bytes"])? / 1e6,
        latency_us: number(&side["lat_ns"]["mean"])? / 1e3,
        iops_per_cpu: after.zip(before).map(|(after, before)| requests / (after - before).as_secs_f64()),
    })
}

fn vbd_load(plan: &Plan, load: Load, socket: &Path, server: Option<u32>) -> Result<Sample> {
    let mut command = Command::new(&plan.tools.load);
    command
        .arg(socket)
        .args(["--json", "--ramp=0", "--wait", &plan.wait, "--rw", load.rw])
        .arg(format!("--bs={}", load.block))
        .arg(format!("--depth={}", load.depth))
        .arg(format!("--runtime={}", plan.seconds));
    if let Some(pid) = server {
        command.arg(format!("--server-pid={pid}"));
    }
    let report: Value = serde_json::from_str(&output(&mut command)?).context("vbd-load's JSON")?;
    let number = |value: &Value| value.as_f64().context("vbd-load's JSON lacks a number");
    Ok(Sample {
        iops: number(&report["iops"])?,
        mb_per_s: number(&report["mb_per_s"])?,
        latency_us: number(&report["latency_us"]["mean"])?,
        iops_per_cpu: report["iops_per_server_cpu"].as_f64(),
    })
}
