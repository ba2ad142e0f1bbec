//! The engine against a vector of bytes: images of every shape, several queues on several reactors, a small cache, and
//! what qemu-img says of the image in the end.
#![allow(clippy::cast_possible_truncation, reason = "sizes of tests are small")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vbd_core::{Disk, ExtentKind, Flags, Operation, Session};
use vbd_image::raw::{Raw, RawOptions};
use vbd_qcow2::{Qcow2, Qcow2Options};
use vbd_ring::EngineKind;
use vbd_testing::client::{Ask, Client};
use vbd_testing::qemu::{self, Shape};
use vbd_testing::{Random, seeds};

/// A disk, what it should hold, and the image behind it.
struct Case {
    path: PathBuf,
    shape: Shape,
    backing: Option<(PathBuf, &'static str)>,
    model: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    _dir: tempfile::TempDir,
}

impl Case {
    fn new(random: &mut Random, on_disk: bool) -> Self {
        let dir = if on_disk {
            tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        } else {
            tempfile::tempdir_in("/dev/shm")
        };
        let dir = dir.expect("a directory");
        let path = dir.path().join("image.qcow2");
        let shape = Shape::random(random);
        let mut model = vec![0; shape.size as usize];
        let backing = (!shape.data_file && random.once_in(2)).then(|| {
            let raw = random.once_in(2);
            let size = (shape.size / 512 / 2 + random.below(shape.size / 512)) * 512 + 512;
            let behind = dir.path().join("behind");
            let bytes: Vec<u8> = (0..size).map(|at| (at / 512 % 255) as u8 + 1).collect();
            std::fs::write(&behind, &bytes).expect("a backing file");
            let shared = bytes.len().min(model.len());
            model[..shared].copy_from_slice(&bytes[..shared]);
            if raw {
                return (behind, "raw");
            }
            let converted = dir.path().join("behind.qcow2");
            qemu::img(&[
                "convert",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "-c",
                qemu::text(&behind),
                qemu::text(&converted),
            ]);
            (converted, "qcow2")
        });
        shape.create(&path, backing.as_ref().map(|(path, format)| (path.as_path(), *format)));
        Case { path, shape, backing, model, snapshots: Vec::new(), _dir: dir }
    }

    fn open(&self, cache_bytes: Option<u64>) -> Arc<dyn Session> {
        let mut options = Qcow2Options::new(&self.path);
        options.cache_bytes = cache_bytes;
        options.backing = self.backing.as_ref().map(|(path, format)| behind(path, format));
        options.data_file = self.shape.data_file.then(|| raw(&self.path.with_extension("data"), false));
        Qcow2::new(options).open().expect("an image that can be opened")
    }

    /// Some random requests, several of them under way at once where their ranges are apart.
    fn drive(&mut self, random: &mut Random, clients: &[Client], rounds: u64) {
        for _ in 0..rounds {
            let mut asked = Vec::new();
            for part in 0..1 + random.below(6) {
                let sectors = self.model.len() as u64 / 512;
                let (from, to) = (sectors * part / 6, sectors * (part + 1) / 6);
                if to <= from {
                    continue;
                }
                let start = from + random.below(to - from);
                let most = if random.once_in(4) { to - start } else { (to - start).min(16) };
                let (offset, len) = (start * 512, (1 + random.below(most)) * 512);
                let ask = ask(random, offset, len);
                let client = &clients[random.index(clients.len())];
                asked.push((ask.clone(), client.submit(ask)));
            }
            for (ask, answer) in asked {
                let answer = answer.recv_timeout(std::time::Duration::from_secs(60)).expect("an answer");
                answer.result.unwrap_or_else(|error| panic!("{ask:?}: {error}"));
                self.apply(&ask, &answer.data, &answer.extents, &clients[0]);
            }
        }
    }

    /// Makes, applies or deletes a snapshot.
    fn snapshot(&mut self, random: &mut Random, session: &Arc<dyn Session>) {
        let live = session.live().expect("qcow2 has it");
        let known: Vec<String> = live.snapshots().expect("a list").into_iter().map(|one| one.name).collect();
        assert!(known.iter().eq(self.snapshots.iter().map(|(name, _)| name)), "other snapshots");
        match random.below(3) {
            0 if self.snapshots.len() < 3 => {
                let name = format!("snapshot {}", random.next_u64());
                live.create_snapshot(&name).expect("a snapshot");
                self.snapshots.push((name, self.model.clone()));
            }
            1 if !self.snapshots.is_empty() => {
                let (name, content) = random.one_of(&self.snapshots).clone();
                match live.apply_snapshot(&name) {
                    Ok(()) => self.model = content,
                    Err(error) => assert!(content.len() != self.model.len(), "{error}"),
                }
            }
            2 if !self.snapshots.is_empty() => {
                let (name, _) = self.snapshots.remove(random.index(self.snapshots.len()));
                live.delete_snapshot(&name).expect("deleted");
                assert!(live.delete_snapshot(&name).is_err(), "deleted twice");
            }
            _ => {}
        }
    }

    fn apply(&mut self, ask: &Ask, data: &[u8], extents: &[vbd_core::Extent], client: &Client) {
        let (start, end) = (ask.offset as usize, (ask.offset + ask.len) as usize);
        match ask.operation {
            Operation::Read => assert!(data == &self.model[start..end], "{ask:?} differs"),
            Operation::Write => self.model[start..end].copy_from_slice(&ask.data),
            Operation::WriteZeroes => self.model[start..end].fill(0),
            Operation::Discard => {
                let now = client.read(ask.offset, ask.len);
                for (old, new) in self.model[start..end].chunks_mut(512).zip(now.chunks(512)) {
                    assert!(old == new || new.iter().all(|byte| *byte == 0), "{ask:?} has changed data");
                    old.copy_from_slice(new);
                }
            }
            Operation::Extents => {
                let mut at = start;
                for extent in extents {
                    let stop = at + extent.len as usize;
                    assert!(stop <= end, "{ask:?}: an extent beyond the range");
                    let zero = self.model[at..stop].iter().all(|byte| *byte == 0);
                    assert!(extent.kind == ExtentKind::Data || zero, "{ask:?}: data is called a hole");
                    at = stop;
                }
                assert!(at > start, "{ask:?}: no extent");
            }
            Operation::Flush => {}
        }
    }
}

fn raw(path: &Path, read_only: bool) -> Arc<dyn Disk> {
    Raw::new(RawOptions { read_only, ..RawOptions::new(path) })
}

fn behind(path: &Path, format: &str) -> Arc<dyn Disk> {
    if format == "raw" {
        return raw(path, true);
    }
    Qcow2::new(Qcow2Options { read_only: true, ..Qcow2Options::new(path) })
}

fn ask(random: &mut Random, offset: u64, len: u64) -> Ask {
    use Operation::{Discard, Extents, Flush, Read, Write, WriteZeroes};
    let operation =
        *random.one_of(&[Read, Read, Read, Write, Write, Write, Write, Discard, WriteZeroes, Extents, Flush]);
    let mut ask = match operation {
        Flush => Ask::new(Flush, 0, 0),
        _ => Ask::new(operation, offset, len),
    };
    if operation == Write {
        let seed = random.below(250) as u8;
        ask.data = (offset..offset + len).map(|at| seed.wrapping_add((at / 512 % 251) as u8) | 1).collect();
    }
    ask.flags = Flags { fua: random.once_in(10), may_unmap: random.once_in(2), fast_only: false };
    ask.piece = *random.one_of(&[usize::MAX, 512, 4096, 1536]);
    ask.skew = if random.once_in(8) { 3 } else { 0 };
    ask
}

/// What qemu-img finds in an image that was closed, and what it reads out of it.
fn verify(case: &Case, seed: u64) {
    let found = qemu::check(&case.path);
    assert!(found.errors == 0 && found.leaks == 0, "seed {seed}: {:?}: {found:?}", case.shape);
    let out = case.path.with_extension("out");
    qemu::img(&["convert", "-f", "qcow2", "-O", "raw", qemu::text(&case.path), qemu::text(&out)]);
    assert!(
        std::fs::read(&out).expect("converted") == case.model,
        "seed {seed}: {:?}: QEMU reads something else",
        case.shape
    );
}

#[test]
fn random_requests_by_several_queues() {
    for seed in seeds(40) {
        let mut random = Random::new(seed);
        let mut case = Case::new(&mut random, seed % 4 == 0);
        println!("seed {seed}: {:?} on {:?}", case.shape, case.backing);
        for _ in 0..2 {
            let cache = random.once_in(2).then_some(0);
            let session = case.open(cache);
            let engine = |index| if index % 3 == 2 { EngineKind::Threads } else { EngineKind::Auto };
            let clients: Vec<Client> = (0..3).map(|index| Client::on_disk(engine(index), &session)).collect();
            for _ in 0..5 {
                case.drive(&mut random, &clients, 5);
                if case.shape.has_snapshots() {
                    case.snapshot(&mut random, &session);
                }
            }
            assert!(
                clients[1].read(0, case.model.len() as u64) == case.model,
                "seed {seed}: the end differs"
            );
            if random.once_in(2) {
                let size = case.model.len() as u64 + random.below(64) * 512;
                session.grow(size).expect("it can grow");
                case.model.resize(size as usize, 0);
                case.shape.size = size;
                case.drive(&mut random, &clients, 5);
                assert!(clients[2].read(0, size) == case.model, "seed {seed}: the end differs after growth");
            }
            drop(clients);
            drop(session);
            verify(&case, seed);
        }
    }
}

#[test]
fn clusters_written_compressed_by_several_threads() {
    for (seed, cluster_bits) in [(1, 16), (2, 12), (3, 9), (4, 21), (5, 16)] {
        let mut random = Random::new(seed);
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let path = dir.path().join("image.qcow2");
        let size = (40 << cluster_bits) - 512;
        let zstd = seed % 2 == 0;
        let shape = Shape { cluster_bits, zstd, extended_l2: seed == 5, ..Shape::plain(size) };
        shape.create(&path, None);
        let mut model: Vec<u8> = (0..size).map(|at| ((at / 11 % 13) ^ (at >> cluster_bits)) as u8).collect();
        let session = Qcow2::new(Qcow2Options::new(&path)).open().expect("an image");
        let unit = session.live().expect("it has").compressed_unit().expect("it compresses");
        assert_eq!(unit, 1 << cluster_bits);
        let client = Client::on_disk(EngineKind::Auto, &session);
        // Some are there already, and are written anew.
        client.write(0, vec![7; unit as usize * 3]);
        let next = std::sync::atomic::AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    loop {
                        let start = next.fetch_add(1, std::sync::atomic::Ordering::SeqCst) * unit;
                        if start >= size {
                            break;
                        }
                        let part = &model[start as usize..size.min(start + unit) as usize];
                        if !session.live().expect("it has").write_compressed(start, part).expect("written") {
                            client.write(start, part.to_vec());
                        }
                    }
                });
            }
        });
        assert!(client.read(0, size) == model, "cluster bits {cluster_bits}");
        for _ in 0..20 {
            let start = random.below(size / 512) * 512;
            let len = (1 + random.below(8)).min((size - start) / 512) * 512;
            client.write(start, vec![start as u8; len as usize]);
            model[start as usize..(start + len) as usize].fill(start as u8);
        }
        assert!(client.read(0, size) == model, "cluster bits {cluster_bits}, rewritten");
        drop((client, session));
        let found = qemu::check(&path);
        assert!(found.errors == 0 && found.leaks == 0, "cluster bits {cluster_bits}: {found:?}");
        let out = path.with_extension("out");
        qemu::img(&["convert", "-f", "qcow2", "-O", "raw", qemu::text(&path), qemu::text(&out)]);
        assert!(
            std::fs::read(&out).expect("converted") == model,
            "cluster bits {cluster_bits}: QEMU reads something else"
        );
    }
}

/// What the process does that is killed: writes and says so, without a flush.
const KILLED: &str = "VBD_TEST_KILLED";

/// Programs leave free clusters at the end of a file as they were.
#[test]
fn what_lies_behind_the_last_cluster_is_not_seen_again() {
    for cluster_bits in [9, 12, 16] {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let path = dir.path().join("image.qcow2");
        let shape = Shape { cluster_bits, ..Shape::plain(1 << 20) };
        shape.create(&path, None);
        let mut file = std::fs::File::options().append(true).open(&path).expect("there");
        let end = file.metadata().expect("there").len().next_multiple_of(1 << cluster_bits);
        file.set_len(end).expect("room");
        std::io::Write::write_all(&mut file, &vec![0xaa; 3 << 20]).expect("room");
        let session = Qcow2::new(Qcow2Options::new(&path)).open().expect("an image");
        let client = Client::on_disk(EngineKind::Auto, &session);
        let mut model = vec![0; 1 << 20];
        for at in (512..1 << 20).step_by(100 << 10) {
            client.write(at as u64, vec![7; 512]);
            model[at..at + 512].fill(7);
        }
        assert!(client.read(0, 1 << 20) == model, "clusters of {} bytes", 1 << cluster_bits);
    }
}

#[test]
fn writes_that_a_killed_process_completed_are_there() {
    if let Ok(path) = std::env::var(KILLED) {
        return write_until_killed(Path::new(&path));
    }
    for seed in seeds(6) {
        let mut random = Random::new(seed);
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let path = dir.path().join("image.qcow2");
        let cluster_bits = *random.one_of(&[9, 12, 16]);
        let extended_l2 = cluster_bits == 16 && random.once_in(2);
        Shape { cluster_bits, extended_l2, ..Shape::plain(KILLED_SIZE) }.create(&path, None);
        // Once more, over what the first has left.
        for round in 0..2 {
            let mut child = std::process::Command::new(std::env::current_exe().expect("this program"))
                .args(["--exact", "writes_that_a_killed_process_completed_are_there", "--nocapture"])
                .env(KILLED, &path)
                .stdout(std::process::Stdio::piped())
                .spawn()
                .expect("a process");
            let said = std::io::BufReader::new(child.stdout.take().expect("piped"));
            let wanted = 1 + random.index(120);
            let lines = std::io::BufRead::lines(said).map_while(Result::ok);
            let done =
                lines.filter_map(|line| line.strip_prefix("done ")?.parse::<u64>().ok()).take(wanted).last();
            child.kill().expect("killed");
            child.wait().expect("ended");
            let done = done.expect("at least one");
            let session = Qcow2::new(Qcow2Options::new(&path)).open().expect("an image that can be opened");
            let client = Client::on_disk(EngineKind::Auto, &session);
            let mut model = vec![0; KILLED_SIZE as usize];
            for write in 0..=done {
                let (offset, data) = killed_write(write);
                model[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
            }
            let now = client.read(0, KILLED_SIZE);
            for (sector, (now, old)) in now.chunks(512).zip(model.chunks(512)).enumerate() {
                // Those after the last that it said may be there too.
                let later = (done + 1..done + 400).any(|write| {
                    let (offset, data) = killed_write(write);
                    let from = sector as u64 * 512;
                    offset <= from
                        && from < offset + data.len() as u64
                        && data[(from - offset) as usize..][..512] == *now
                });
                let earlier = round > 0;
                assert!(
                    now == old || later || earlier,
                    "seed {seed}, round {round}: sector {sector} is lost"
                );
            }
            drop((client, session));
            let found = qemu::check(&path);
            assert!(found.errors == 0, "seed {seed}: {found:?}");
            let names: Vec<_> = std::fs::read_dir(dir.path())
                .expect("readable")
                .flatten()
                .map(|entry| entry.file_name())
                .collect();
            assert_eq!(names, ["image.qcow2"], "left behind");
        }
    }
}

#[test]
fn notes_that_were_begun_go_when_nothing_was_written() {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let path = dir.path().join("image.qcow2");
    Shape::plain(1 << 20).create(&path, None);
    let before = std::fs::read(&path).expect("there");
    let session = Qcow2::new(Qcow2Options::new(&path)).open().expect("an image");
    assert!(session.keeps_unflushed() && dir.path().join(".image.qcow2.changes").exists());
    drop(session);
    assert!(!dir.path().join(".image.qcow2.changes").exists());
    assert!(
        std::fs::read(&path).expect("there")[..512] == before[..512],
        "the header says that there are some"
    );
}

const KILLED_SIZE: u64 = 3 << 20;

/// A write by its number.
fn killed_write(number: u64) -> (u64, Vec<u8>) {
    let mut random = Random::new(number);
    let len = (1 + random.below(16)) * 512;
    let offset = random.below((KILLED_SIZE - len) / 512) * 512;
    (offset, vec![number as u8 | 1; len as usize])
}

fn write_until_killed(path: &Path) {
    let session = Qcow2::new(Qcow2Options::new(path)).open().expect("an image");
    let clients: Vec<Client> = (0..2).map(|_| Client::on_disk(EngineKind::Auto, &session)).collect();
    for number in 0..100_000 {
        let (offset, data) = killed_write(number);
        let client = &clients[(number % 2) as usize];
        client.write(offset, data);
        if number % 37 == 36 {
            assert!(client.ask(Ask::new(Operation::Flush, 0, 0)).result.is_ok());
        }
        println!("done {number}");
    }
}
