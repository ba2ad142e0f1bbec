//! Loads on qcow2 images that are served over vhost-user.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vbd_tests::command;

use super::{GIB, qcow2};
use crate::bench::files::{Storage, cool};
use crate::bench::loads::Sample;
use crate::bench::peers::Serving;
use crate::bench::results::Cell;
use crate::bench::{Plan, output};

/// By load, `image/allocated-randread-4K-32`, then by peer.
pub(crate) type Loads = BTreeMap<String, BTreeMap<String, Cell>>;

/// What the image is before the load.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Image {
    /// All clusters are there.
    Allocated,
    /// None is, and each write meets a new one.
    Empty,
    /// None is, and all are in the file below.
    Overlay,
    /// The same with subclusters of 4 KiB, so that no write has to copy what lies beside it.
    Subclusters,
}

impl Image {
    fn is_overlay(self) -> bool {
        matches!(self, Image::Overlay | Image::Subclusters)
    }
}

/// A load on an image.
pub(crate) struct Load {
    pub(super) name: &'static str,
    image: Image,
    rw: &'static str,
    block: u32,
    /// Requests, where those that come later would meet other conditions; else as many as there is time for.
    requests: Option<u64>,
}

pub(crate) const READ: &str = "image/allocated-randread-4K-32";
pub(crate) const WRITE: &str = "image/allocated-randwrite-4K-32";
pub(crate) const ALLOCATE: &str = "image/allocating-randwrite-4K-32";
pub(crate) const ALLOCATE_64K: &str = "image/allocating-randwrite-64K-32";
pub(crate) const OVERLAY: &str = "image/overlay-randwrite-4K-32";

pub(crate) const SUBCLUSTERS: &str = "image/overlay-subclusters-randwrite-4K-32";

pub(super) const ALL: [Load; 6] = [
    Load { name: READ, image: Image::Allocated, rw: "randread", block: 4096, requests: None },
    Load { name: WRITE, image: Image::Allocated, rw: "randwrite", block: 4096, requests: None },
    Load { name: ALLOCATE, image: Image::Empty, rw: "randwrite", block: 4096, requests: Some(40_000) },
    Load { name: ALLOCATE_64K, image: Image::Empty, rw: "randwrite", block: 65536, requests: Some(8_000) },
    Load { name: OVERLAY, image: Image::Overlay, rw: "randwrite", block: 4096, requests: Some(8_000) },
    Load {
        name: SUBCLUSTERS,
        image: Image::Subclusters,
        rw: "randwrite",
        block: 4096,
        requests: Some(16_000),
    },
];

/// Who serves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Server {
    QsdNative,
    QsdUring,
    /// vbd on a raw file through the same front-end.
    VbdRaw,
    Vbd,
}

pub(crate) const QSD: [&str; 2] = ["qsd-native", "qsd-io_uring"];
pub(crate) const VBD_RAW: &str = "vbd-raw";
pub(crate) const VBD: &str = "vbd";

impl Server {
    const ALL: [Server; 4] = [Server::QsdNative, Server::QsdUring, Server::VbdRaw, Server::Vbd];

    fn name(self) -> &'static str {
        match self {
            Server::QsdNative => QSD[0],
            Server::QsdUring => QSD[1],
            Server::VbdRaw => VBD_RAW,
            Server::Vbd => VBD,
        }
    }
}

/// Runs the loads that are asked for.
pub(super) fn measure(plan: &Plan, dir: &Path, results: &mut Loads) -> Result<()> {
    for load in ALL.iter().filter(|load| plan.wants(load.name)) {
        let mut servers = Server::ALL.to_vec();
        // Nothing is below a raw file.
        servers.retain(|server| {
            plan.takes(server.name()) && !(*server == Server::VbdRaw && load.image.is_overlay())
        });
        eprintln!("{}: {} rounds for each of {} servers", load.name, plan.runs, servers.len());
        let cells = results.entry(load.name.to_owned()).or_default();
        cells.clear();
        let files = Files::new(plan, dir, load)?;
        for _ in 0..plan.runs {
            servers.retain(|&server| {
                let cell = cells.entry(server.name().to_owned()).or_default();
                match files.once(plan, load, server) {
                    Ok(sample) => cell.samples.push(sample),
                    Err(error) => {
                        eprintln!("{}: {}: {error:#}", load.name, server.name());
                        cell.failure = Some(format!("{error:#}"));
                    }
                }
                cell.failure.is_none()
            });
        }
        files.forget();
    }
    Ok(())
}

struct Files {
    raw: PathBuf,
    image: PathBuf,
    /// A file that is written throughout: what is below overlays, and the content of what is allocated.
    full: PathBuf,
}

impl Files {
    fn new(plan: &Plan, dir: &Path, load: &Load) -> Result<Self> {
        let full = match load.image {
            Image::Empty => PathBuf::new(),
            _ => Storage::Disk.prepare(&plan.tools.scratch)?,
        };
        let files = Files { raw: dir.join("disk.raw"), image: dir.join("disk.qcow2"), full };
        if load.image == Image::Allocated {
            // Both made now: what the storage has just got it may answer quicker than what it has had for long.
            for (format, file) in [("raw", &files.raw), ("qcow2", &files.image)] {
                let mut convert = Command::new("qemu-img");
                convert.args(["convert", "-W", "-f", "raw", "-O", format]).arg(&files.full).arg(file);
                output(&mut convert)?;
            }
        }
        Ok(files)
    }

    fn once(&self, plan: &Plan, load: &Load, server: Server) -> Result<Sample> {
        // So large that random requests seldom meet twice.
        let size = 64 * GIB;
        let file = match (load.image, server) {
            (Image::Allocated, Server::VbdRaw) => &self.raw,
            (Image::Allocated, _) => &self.image,
            (_, Server::VbdRaw) => {
                let _ = std::fs::remove_file(&self.raw);
                File::create(&self.raw)?.set_len(size)?;
                &self.raw
            }
            (Image::Empty, _) => {
                qcow2(&self.image, size, None, &[])?;
                &self.image
            }
            (Image::Overlay | Image::Subclusters, _) => {
                let options: &[&str] = match load.image {
                    Image::Subclusters => &["-o", "extended_l2=on,cluster_size=128k"],
                    _ => &[],
                };
                qcow2(&self.image, std::fs::metadata(&self.full)?.len(), Some(&self.full), options)?;
                &self.image
            }
        };
        cool(file)?;
        let serving = self.serve(plan, load, server, file)?;
        drive(plan, load, &serving)
    }

    fn serve(&self, plan: &Plan, load: &Load, server: Server, file: &Path) -> Result<Serving> {
        let dir = plan.tools.scratch.as_path();
        let socket = dir.join("bench.sock");
        let (at, name) = (socket.display(), file.display());
        let qsd = |aio: &str| {
            let direct = format!("cache.direct=on,aio={aio}");
            let mut command = command("qemu-storage-daemon");
            command.arg("--blockdev").arg(format!("driver=file,node-name=file,filename={name},{direct}"));
            let mut format = "driver=qcow2,node-name=disk,file=file".to_owned();
            if load.image.is_overlay() {
                let full = self.full.display();
                let full = format!("driver=file,node-name=full,filename={full},read-only=on,{direct}");
                command.arg("--blockdev").arg(full);
                command.arg("--blockdev").arg("driver=raw,node-name=below,file=full,read-only=on");
                format += ",backing=below";
            }
            command.arg("--blockdev").arg(format);
            let export = "type=vhost-user-blk,id=e,node-name=disk,writable=on";
            command.arg("--export").arg(format!("{export},addr.type=unix,addr.path={at}"));
            command
        };
        let vbd = |format: &str| {
            let mut command = command(&plan.tools.vbd);
            command.arg("attach").arg(file).args(["--format", format]).arg("--vhost-user").arg(&socket);
            // What is below lies beside the directory of the image.
            command.arg("--allow-dir").arg(dir);
            command
        };
        let command = match server {
            Server::QsdNative => qsd("native"),
            Server::QsdUring => qsd("io_uring"),
            Server::VbdRaw => vbd("raw"),
            Server::Vbd => vbd("qcow2"),
        };
        Serving::vhost_user(command, socket.clone(), dir)
    }

    fn forget(&self) {
        let _ = std::fs::remove_file(&self.raw);
        let _ = std::fs::remove_file(&self.image);
    }
}

fn drive(plan: &Plan, load: &Load, serving: &Serving) -> Result<Sample> {
    let mut command = Command::new(&plan.tools.load);
    command
        .arg(serving.socket().context("served over vhost-user")?)
        .args(["--json", "--depth=32", "--wait", &plan.wait, "--rw", load.rw])
        .arg(format!("--bs={}", load.block));
    match load.requests {
        Some(requests) => {
            let requests = if plan.quick { requests / 20 } else { requests };
            command.arg(format!("--ops={requests}"));
        }
        None => {
            command.arg("--ramp=0").arg(format!("--runtime={}", plan.seconds));
        }
    }
    if let Some(pid) = serving.pid() {
        command.arg(format!("--server-pid={pid}"));
    }
    let report: Value = serde_json::from_str(&output(&mut command)?).context("vbd-load's JSON")?;
    let number = |value: &Value| value.as_f64().context("vbd-load's JSON lacks a number");
    let sample = Sample {
        iops: number(&report["iops"])?,
        mb_per_s: number(&report["mb_per_s"])?,
        latency_us: number(&report["latency_us"]["mean"])?,
        iops_per_cpu: report["iops_per_server_cpu"].as_f64(),
    };
    ensure!(sample.iops > 0.0, "no request was done");
    Ok(sample)
}
