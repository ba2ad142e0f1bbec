//! A thousand disks in one process, doing nothing.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use vbd_tests::{command, cpu_time};

use super::{Tools, peers};

const DISKS: usize = 1000;
const WATCH: Duration = Duration::from_secs(5);

/// What they cost.
#[derive(Serialize, Deserialize)]
pub(crate) struct Idle {
    /// Seconds from the start of the process to the last disk's socket.
    pub(crate) attach_s: f64,
    /// Seconds that a client took to connect to all of them, one after the other, and start a queue of each.
    pub(crate) connect_s: f64,
    /// Memory of each disk: what the process's proportional share (PSS) has more than that of a process with one disk.
    pub(crate) kib_unconnected: f64,
    /// The same with a client on each.
    pub(crate) kib_connected: f64,
    /// CPU seconds over five seconds without clients.
    pub(crate) cpu_unconnected_s: f64,
    /// The same with a client on each.
    pub(crate) cpu_connected_s: f64,
}

/// Serves them and looks.
pub(crate) fn measure(tools: &Tools) -> Result<Idle> {
    eprintln!("idle: {DISKS} disks in one process");
    let dir = tools.scratch.join("idle");
    let one = Disks::serve(tools, &dir, 1)?;
    let mut client = Client::connect(tools, &one)?;
    let (base_connected, base) = (pss(one.pid())?, {
        client.leave();
        thread::sleep(Duration::from_millis(200));
        pss(one.pid())?
    });
    drop(one);

    let all = Disks::serve(tools, &dir, DISKS)?;
    let each = |now: f64, base: f64| (now - base) / (DISKS - 1) as f64;
    let cpu_unconnected_s = watch(all.pid())?;
    let kib_unconnected = each(pss(all.pid())?, base);
    let mut client = Client::connect(tools, &all)?;
    let cpu_connected_s = watch(all.pid())?;
    let kib_connected = each(pss(all.pid())?, base_connected);
    client.leave();
    Ok(Idle {
        attach_s: all.attach_s,
        connect_s: client.seconds,
        kib_unconnected,
        kib_connected,
        cpu_unconnected_s,
        cpu_connected_s,
    })
}

/// CPU seconds that a process uses in five seconds, after a moment to settle.
fn watch(pid: u32) -> Result<f64> {
    thread::sleep(Duration::from_millis(500));
    let before = cpu_time(pid)?;
    thread::sleep(WATCH);
    Ok((cpu_time(pid)? - before).as_secs_f64())
}

/// The proportional set size of a process in KiB.
fn pss(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line =
        text.lines().find_map(|line| line.strip_prefix("Pss:")).with_context(|| format!("{path}: no Pss"))?;
    line.trim().trim_end_matches("kB").trim().parse().with_context(|| format!("{path}: Pss {line}"))
}

/// A vbd that serves sparse files, in a directory that goes when it does.
struct Disks {
    server: Child,
    sockets: Vec<PathBuf>,
    attach_s: f64,
    dir: PathBuf,
}

impl Disks {
    fn serve(tools: &Tools, dir: &Path, count: usize) -> Result<Self> {
        let _ = fs::remove_dir_all(dir);
        fs::create_dir_all(dir)?;
        let mut config = format!("runtime-dir = {:?}\n", dir.join("run"));
        let mut sockets = Vec::new();
        for index in 0..count {
            File::create(dir.join(format!("{index}.img")))?.set_len(64 << 20)?;
            writeln!(config, "[[disk]]\npath = \"{index}.img\"\nvhost-user = \"{index}.sock\"")?;
            sockets.push(dir.join(format!("{index}.sock")));
        }
        let file = dir.join("vbd.toml");
        fs::write(&file, config)?;
        let log = File::create(dir.join("vbd.log"))?;
        let start = Instant::now();
        let server = command(&tools.vbd)
            .arg("up")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start vbd")?;
        let mut disks = Disks { server, sockets, attach_s: 0.0, dir: dir.to_owned() };
        let mut there = 0;
        while there < count {
            // In order or not, each is waited for once.
            if disks.sockets[there].exists() {
                there += 1;
            } else if disks.server.try_wait()?.is_some() || start.elapsed() > Duration::from_secs(60) {
                bail!("vbd up: {}", fs::read_to_string(dir.join("vbd.log"))?.trim());
            } else {
                thread::sleep(Duration::from_millis(5));
            }
        }
        disks.attach_s = start.elapsed().as_secs_f64();
        Ok(disks)
    }

    fn pid(&self) -> u32 {
        self.server.id()
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        peers::stop(&mut self.server);
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A client that holds all disks.
struct Client {
    process: Child,
    seconds: f64,
}

impl Client {
    fn connect(tools: &Tools, disks: &Disks) -> Result<Self> {
        let start = Instant::now();
        let mut process = command(&tools.load)
            .arg("--hold=600")
            .args(&disks.sockets)
            .stdout(Stdio::piped())
            .spawn()
            .context("start vbd-load")?;
        let mut line = String::new();
        BufReader::new(process.stdout.take().context("no output")?).read_line(&mut line)?;
        let mut client = Client { process, seconds: start.elapsed().as_secs_f64() };
        if !line.contains("connected") {
            client.leave();
            bail!("vbd-load did not connect to every disk");
        }
        Ok(client)
    }

    fn leave(&mut self) {
        peers::stop(&mut self.process);
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.leave();
    }
}
