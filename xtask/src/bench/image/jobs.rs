//! Work on whole images: converting, and what has to be quick on huge ones.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{GIB, qcow2};
use crate::bench::build::{Race, Timing, Way, Works};
use crate::bench::peers::{Serving, stop};
use crate::bench::{Plan, output};

pub(super) const TO_QCOW2: &str = "image/convert-raw-to-qcow2";
pub(super) const TO_RAW: &str = "image/convert-qcow2-to-raw";
pub(super) const TO_ZSTD: &str = "image/convert-raw-to-zstd";
/// The same, with nobody seeing to it that the new image is durable.
pub(super) const TO_QCOW2_CACHED: &str = "image/convert-cached-raw-to-qcow2";
pub(super) const TO_RAW_CACHED: &str = "image/convert-cached-qcow2-to-raw";
pub(super) const TO_ZSTD_CACHED: &str = "image/convert-cached-raw-to-zstd";
pub(super) const COMPARE: &str = "image/compare-raw-with-qcow2";
pub(super) const OPEN: &str = "image/open-10T";
pub(super) const CLONE: &str = "image/clone-overlay";
pub(super) const SNAPSHOT: &str = "image/snapshot-1T";
pub(super) const SCALE: &str = "image/allocating-in-process";
pub(super) const BITMAP: &str = "image/bitmap-instructions";
pub(super) const BACKUP: &str = "image/backup-p99";
/// Options of qemu-img.
const ZSTD: &[&str] = &["-c", "-o", "compression_type=zstd"];
/// In the results of [`BACKUP`]: with a backup under way, and without. Seconds that 99 of 100 writes do not exceed.
pub(super) const ALONE: &str = "alone";
/// In the results of [`SCALE`].
pub(super) const ONE_QUEUE: &str = "one queue";
pub(super) const FOUR_QUEUES: &str = "four queues";
/// In the results of [`BITMAP`]: without what keeps bitmaps in front, with that as servers have it, and with a bitmap.
pub(super) const BARE: &str = "bare disk";
pub(super) const NO_BITMAP: &str = "no bitmap";
pub(super) const ONE_BITMAP: &str = "one bitmap";
pub(super) const BESIDE: &str = "beside-backup";

type Options = &'static [&'static str];
type Part = fn(&Jobs<'_>, &mut Works) -> Result<()>;

pub(super) fn measure(plan: &Plan, dir: &Path, works: &mut Works) -> Result<()> {
    let jobs = Jobs { plan, dir };
    let parts: [(&[&str], Part); 7] = [
        (
            &[TO_QCOW2, TO_RAW, TO_ZSTD, TO_QCOW2_CACHED, TO_RAW_CACHED, TO_ZSTD_CACHED, COMPARE],
            |jobs, works| jobs.convert(works),
        ),
        (&[OPEN], |jobs, works| jobs.open(works)),
        (&[CLONE], |jobs, works| jobs.clone(works)),
        (&[SNAPSHOT], |jobs, works| jobs.snapshot(works)),
        (&[SCALE], |jobs, works| jobs.scale(works)),
        (&[BITMAP], |jobs, works| jobs.bitmap(works)),
        (&[BACKUP], |jobs, works| jobs.backup(works)),
    ];
    for (names, part) in parts {
        if !names.iter().any(|name| plan.wants(name)) {
            continue;
        }
        if let Err(error) = part(&jobs, works) {
            eprintln!("{}: {error:#}", names[0]);
            let timing = works.entry(names[0].to_owned()).or_default().entry("vbd".to_owned()).or_default();
            timing.failure = Some(format!("{error:#}"));
        }
    }
    Ok(())
}

struct Jobs<'a> {
    plan: &'a Plan,
    dir: &'a Path,
}

impl Jobs<'_> {
    fn race(&self, name: &str, ways: Vec<Way>, works: &mut Works) -> Result<()> {
        if !self.plan.wants(name) {
            return Ok(());
        }
        Race { name, rounds: self.plan.runs, settle: true, ways }.run(self.plan, works)
    }

    /// 2 GiB, three quarters of them data, which shrinks to about a half. What comes out is compared once. Equal with equal:
    /// once with the new image durable in the end, and once with it wherever the kernel has it.
    fn convert(&self, works: &mut Works) -> Result<()> {
        let bytes = if self.plan.quick { GIB / 16 } else { 2 * GIB };
        let (raw, image) = (self.dir.join("source.raw"), self.dir.join("source.qcow2"));
        source(&raw, bytes)?;
        let mut command = Command::new("qemu-img");
        output(command.args(["convert", "-W", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(&image))?;
        // Read once, so that nobody meets a colder cache.
        std::io::copy(&mut File::open(&image)?, &mut std::io::sink())?;
        let kinds: [(&str, &str, _, _, Options, Options); 3] = [
            (TO_QCOW2, TO_QCOW2_CACHED, (raw.as_path(), "raw"), "qcow2", &[], &[]),
            (TO_RAW, TO_RAW_CACHED, (image.as_path(), "qcow2"), "raw", &[], &[]),
            (TO_ZSTD, TO_ZSTD_CACHED, (raw.as_path(), "raw"), "qcow2", ZSTD, &["--compress", "zstd"]),
        ];
        for (durable, cached, from, to, theirs, ours) in kinds {
            let out = |peer: &str| (self.dir.join(format!("{peer}.{to}")), to);
            let qemu = |durable: bool| {
                let mut ways = vec![
                    qemu_img("qemu-img", from, out("default"), theirs, &[], durable),
                    qemu_img("qemu-img -W", from, out("parallel"), theirs, &["-m", "16", "-W"], durable),
                ];
                let direct = &["-m", "16", "-W", "-t", "none", "-T", "none"];
                if durable {
                    ways.push(qemu_img("qemu-img -t none", from, out("direct"), theirs, direct, true));
                }
                ways
            };
            let mut ways = qemu(true);
            ways.push(self.vbd_convert("vbd", from, out("vbd"), ours, &[]));
            ways.push(self.vbd_convert("vbd --unordered", from, out("unordered"), ours, &["--unordered"]));
            self.race(durable, ways, works)?;
            let mut ways = qemu(false);
            ways.push(self.vbd_convert("vbd", from, out("vbd"), ours, &["--no-sync"]));
            self.race(cached, ways, works)?;
        }
        self.compare(&raw, &image, works)
    }

    /// Two images that hold the same, one of each format.
    fn compare(&self, raw: &Path, image: &Path, works: &mut Works) -> Result<()> {
        let way = |name, program: PathBuf, arguments: &'static [&'static str]| {
            let (raw, image) = (raw.to_owned(), image.to_owned());
            let command = move || {
                let mut command = Command::new(&program);
                command.arg("compare").args(arguments).arg(&raw).arg(&image);
                command
            };
            Way { name, command: Box::new(command), makes: vec![], check: None }
        };
        let ways = vec![
            way("qemu-img", "qemu-img".into(), &["-f", "raw", "-F", "qcow2"]),
            way("vbd", self.plan.tools.vbd.clone(), &["--second-format", "qcow2"]),
        ];
        self.race(COMPARE, ways, works)
    }

    fn vbd_convert(
        &self,
        name: &'static str,
        from: (&Path, &'static str),
        to: (PathBuf, &'static str),
        more: Options,
        how: Options,
    ) -> Way {
        let (vbd, source, made) = (self.plan.tools.vbd.clone(), from.0.to_owned(), to.0.clone());
        let command = move || {
            let mut command = Command::new(&vbd);
            command.arg("convert").arg(&source).arg(&made).args(["--from", from.1, "--to", to.1]);
            command.args(more).args(how);
            command
        };
        compared(name, Box::new(command), from, to)
    }

    /// From the start of the program until a client can connect.
    fn open(&self, works: &mut Works) -> Result<()> {
        let image = self.dir.join("huge.qcow2");
        qcow2(&image, 10 << 40, None, &[])?;
        // Something in every part of it.
        let writes: Vec<String> =
            (0..200u64).map(|part| format!("write -P 7 {} 4k", part * (50 << 30))).collect();
        qemu_io(&image, &writes)?;
        let socket = self.dir.join("open.sock");
        let vbd = || {
            let mut command = vbd_tests::command(&self.plan.tools.vbd);
            command
                .arg("attach")
                .arg(&image)
                .args(["--format", "qcow2", "--nbd"])
                .arg(format!("unix:{}", socket.display()));
            command
        };
        let qemu = || {
            let mut command = vbd_tests::command("qemu-nbd");
            command
                .args(["--format=qcow2", "--cache=none", "--persistent", "--socket"])
                .arg(&socket)
                .arg(&image);
            command
        };
        let ways: [(&str, &dyn Fn() -> Command); 2] = [("qemu-nbd", &qemu), ("vbd", &vbd)];
        let work = works.entry(OPEN.to_owned()).or_default();
        work.clear();
        for _ in 0..self.plan.runs {
            for (name, command) in ways.iter().filter(|(name, _)| self.plan.takes(name)) {
                let seconds = until_served(command(), &socket)?;
                let timing = work.entry((*name).to_owned()).or_default();
                timing.seconds.push(seconds);
            }
        }
        Ok(())
    }

    fn clone(&self, works: &mut Works) -> Result<()> {
        let base = self.dir.join("base.qcow2");
        qcow2(&base, 1 << 40, None, &[])?;
        let (ours, theirs) = (self.dir.join("clone-vbd.qcow2"), self.dir.join("clone-qemu.qcow2"));
        let vbd = self.plan.tools.vbd.clone();
        let vbd = {
            let (base, new) = (base.clone(), ours.clone());
            move || {
                let mut command = Command::new(&vbd);
                command
                    .arg("create")
                    .arg(&new)
                    .args(["--format", "qcow2", "--backing-format", "qcow2", "--backing"])
                    .arg(&base);
                command
            }
        };
        let qemu = {
            let new = theirs.clone();
            move || {
                let mut command = Command::new("qemu-img");
                command.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(&base).arg(&new);
                command
            }
        };
        let way = |name, command: Box<dyn Fn() -> Command>, made| Way {
            name,
            command,
            makes: vec![made],
            check: None,
        };
        self.race(
            CLONE,
            vec![way("qemu-img", Box::new(qemu), theirs), way("vbd", Box::new(vbd), ours)],
            works,
        )
    }

    /// Of an image with a cluster in each GiB. Each round adds one.
    fn snapshot(&self, works: &mut Works) -> Result<()> {
        let mut ways = Vec::new();
        for name in ["qemu-img", "vbd"] {
            let image = self.dir.join(format!("snapshot-{name}.qcow2"));
            qcow2(&image, 1 << 40, None, &[])?;
            let writes: Vec<String> = (0..1024u64).map(|part| format!("write -P 7 {part}G 64k")).collect();
            qemu_io(&image, &writes)?;
            let vbd = self.plan.tools.vbd.clone();
            let round = std::cell::Cell::new(0);
            let command = move || {
                round.set(round.get() + 1);
                let snapshot = format!("round {}", round.get());
                if name == "vbd" {
                    let mut command = Command::new(&vbd);
                    command
                        .args(["snapshot", "create"])
                        .arg(&image)
                        .arg(snapshot)
                        .args(["--format", "qcow2"]);
                    return command;
                }
                let mut command = Command::new("qemu-img");
                command.args(["snapshot", "-c", &snapshot]).arg(&image);
                command
            };
            ways.push(Way { name, command: Box::new(command), makes: vec![], check: None });
        }
        self.race(SNAPSHOT, ways, works)
    }

    /// Writes to a new image in memory, by queues in one process, without a front-end.
    fn scale(&self, works: &mut Works) -> Result<()> {
        let load = crate::test::build("disk-load", "release")?;
        let memory = tempfile::Builder::new().prefix("vbd-bench-").tempdir_in("/dev/shm")?;
        let image = memory.path().join("disk.qcow2");
        let requests = if self.plan.quick { 4_000 } else { 100_000 };
        let work = works.entry(SCALE.to_owned()).or_default();
        work.clear();
        for _ in 0..self.plan.runs {
            for (name, queues) in [(ONE_QUEUE, 1), (FOUR_QUEUES, 4)] {
                qcow2(&image, 256 * GIB, None, &[])?;
                let mut command = Command::new(&load);
                command.arg(&image).args(["--format=qcow2", "--json"]);
                command.arg(format!("--ops={requests}")).arg(format!("--queues={queues}"));
                let report: Value =
                    serde_json::from_str(&output(&mut command)?).context("disk-load's JSON")?;
                let seconds = report["seconds"].as_f64().context("disk-load's JSON lacks a number")?;
                work.entry(name.to_owned()).or_default().seconds.push(seconds);
            }
        }
        Ok(())
    }

    /// Instructions of a random write to a raw file in memory, with a bitmap that notes it and without.
    fn bitmap(&self, works: &mut Works) -> Result<()> {
        let load = crate::test::build("disk-load", "release")?;
        let memory = tempfile::Builder::new().prefix("vbd-bench-").tempdir_in("/dev/shm")?;
        let image = memory.path().join("disk.raw");
        source(&image, GIB / 16)?;
        let count = |requests: u64, options: &[&str]| -> Result<f64> {
            let out = memory.path().join("callgrind.out");
            let mut command = Command::new("valgrind");
            command.arg("--tool=callgrind").arg(format!("--callgrind-out-file={}", out.display()));
            // valgrind does not know io_uring.
            command.arg(&load).arg(&image).arg("--engine=threads");
            command.arg(format!("--ops={requests}")).args(options);
            output(&mut command)?;
            let text = std::fs::read_to_string(&out)?;
            let total = text
                .lines()
                .find_map(|line| line.strip_prefix("summary: ").or(line.strip_prefix("totals: ")));
            Ok(total.context("callgrind tells no total")?.trim().parse()?)
        };
        let work = works.entry(BITMAP.to_owned()).or_default();
        work.clear();
        for (name, options) in
            [(BARE, &[][..]), (NO_BITMAP, &["--track"]), (ONE_BITMAP, &["--track", "--bitmaps=1"])]
        {
            // The difference is free of what starting and stopping cost.
            let (few, many) = (2_000, 22_000);
            let each = (count(many, options)? - count(few, options)?) / (many - few) as f64;
            work.entry(name.to_owned()).or_default().instructions = Some(each);
        }
        Ok(())
    }

    /// The latency of a guest's writes, 4 KiB and eight at once, while a full backup runs, and without.
    fn backup(&self, works: &mut Works) -> Result<()> {
        let raw = self.dir.join("guest.raw");
        source(&raw, if self.plan.quick { GIB / 8 } else { 4 * GIB })?;
        let work = works.entry(BACKUP.to_owned()).or_default();
        work.clear();
        let (socket, control) = (self.dir.join("guest.sock"), self.dir.join("control.sock"));
        let to = self.dir.join("backup");
        for _ in 0..self.plan.runs {
            for name in [ALONE, BESIDE] {
                let _ = std::fs::remove_dir_all(&to);
                let mut command = vbd_tests::command(&self.plan.tools.vbd);
                command
                    .arg("attach")
                    .arg(&raw)
                    .args(["--name", "guest", "--vhost-user"])
                    .arg(&socket)
                    .arg("--control")
                    .arg(&control);
                let serving = Serving::vhost_user(command, socket.clone(), self.dir)?;
                let mut backup = None;
                if name == BESIDE {
                    let mut command = vbd_tests::command(&self.plan.tools.vbd);
                    command.args(["backup", "guest"]).arg(&to).arg("--control").arg(&control);
                    backup = Some(command.stdout(Stdio::null()).spawn()?);
                }
                let mut load = Command::new(&self.plan.tools.load);
                load.arg(serving.socket().context("served")?).args([
                    "--json",
                    "--rw=randwrite",
                    "--depth=8",
                    "--ramp=0",
                ]);
                load.arg(format!("--runtime={}", self.plan.seconds));
                let report: Value = serde_json::from_str(&output(&mut load)?).context("vbd-load's JSON")?;
                let p99 = report["latency_us"]["p99"].as_f64().context("vbd-load's JSON lacks a number")?;
                if let Some(mut backup) = backup {
                    let ended = backup.try_wait()?;
                    ensure!(ended.is_none_or(|status| status.success()), "the backup has failed: {ended:?}");
                    let _ = backup.kill();
                    backup.wait()?;
                }
                work.entry(name.to_owned()).or_default().seconds.push(p99 / 1e6);
            }
        }
        Ok(())
    }
}

/// Runs commands of qemu-io's.
fn qemu_io(image: &Path, commands: &[String]) -> Result<()> {
    let mut io = Command::new("qemu-io");
    io.args(["-f", "qcow2"]).arg(image).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut io = io.spawn().context("start qemu-io")?;
    io.stdin.take().context("piped")?.write_all(commands.join("\n").as_bytes())?;
    ensure!(io.wait()?.success(), "qemu-io has failed");
    Ok(())
}

/// Whether an image holds what it was made from.
fn compared(
    name: &'static str,
    command: Box<dyn Fn() -> Command>,
    from: (&Path, &'static str),
    to: (PathBuf, &'static str),
) -> Way {
    let (source, made) = (from.0.to_owned(), to.0.clone());
    let check = move || {
        let mut compare = Command::new("qemu-img");
        compare.args(["compare", "-q", "-f", from.1, "-F", to.1]).arg(&source).arg(&made);
        compare
    };
    Way { name, command, makes: vec![to.0], check: Some(Box::new(check)) }
}

/// `durable`: waits until what was made is on the storage.
fn qemu_img(
    name: &'static str,
    from: (&Path, &'static str),
    to: (PathBuf, &'static str),
    format: Options,
    how: Options,
    durable: bool,
) -> Way {
    let (source, made) = (from.0.to_owned(), to.0.clone());
    let command = move || {
        let mut command = Command::new(if durable { "sh" } else { "qemu-img" });
        if durable {
            command.args(["-ec", "made=$1; shift; qemu-img \"$@\"; exec sync \"$made\"", "sh"]).arg(&made);
        }
        command.arg("convert").args(how).args(["-f", from.1, "-O", to.1]).args(format);
        command.arg(&source).arg(&made);
        command
    };
    compared(name, Box::new(command), from, to)
}

fn until_served(mut command: Command, socket: &Path) -> Result<f64> {
    let _ = std::fs::remove_file(socket);
    let start = Instant::now();
    let mut server = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let served = loop {
        if UnixStream::connect(socket).is_ok() {
            break Ok(start.elapsed().as_secs_f64());
        }
        if let Some(status) = server.try_wait()? {
            break Err(anyhow::anyhow!("the server has ended: {status}"));
        }
        if start.elapsed() > Duration::from_secs(20) {
            break Err(anyhow::anyhow!("the server does not serve"));
        }
        std::thread::sleep(Duration::from_micros(200));
    };
    stop(&mut server);
    served
}

/// A raw image: of each MiB a quarter nothing, a quarter random, and a half that shrinks well.
fn source(path: &Path, bytes: u64) -> Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut state = 1u64;
    let mut piece = vec![0u8; 256 << 10];
    for index in 0..bytes >> 18 {
        piece.fill(0);
        for (at, word) in piece.chunks_exact_mut(8).enumerate() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            match index % 4 {
                0 => break,
                1 => word.copy_from_slice(&state.to_le_bytes()),
                // Words of a small dictionary.
                _ => word.copy_from_slice(&((state >> 60) * 0x0101_0101 + (at as u64 >> 6)).to_le_bytes()),
            }
        }
        file.write_all(&piece)?;
    }
    file.into_inner()?.sync_all()?;
    Ok(())
}

/// The quickest of some ways of a work, in seconds.
pub(super) fn best(works: &Works, work: &str, ways: &[&str]) -> Option<f64> {
    let ways = ways.iter().filter_map(|way| works.get(work)?.get(*way)?.seconds());
    ways.min_by(f64::total_cmp)
}

/// All ways of qemu-img's.
pub(super) const QEMU_IMG: [&str; 3] = ["qemu-img", "qemu-img -W", "qemu-img -t none"];

/// For tables.
pub(super) fn seconds(timing: &Timing) -> Option<f64> {
    timing.seconds()
}
