//! Backups as images that stand on each other, as QEMU sees them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use vbd_core::client::Buffer;
use vbd_core::track::Tracked;
use vbd_core::{Client, Disk, Session};
use vbd_formats::Format;
use vbd_image::raw::{Raw, RawOptions};
use vbd_image::sidecar::Sidecar;
use vbd_jobs::backup::{Backup, Chain, Done, Since, backup_to_chain};
use vbd_jobs::{Error, Progress, Silent};
use vbd_ring::{Reactor, Settings};
use vbd_testing::{Failing, Random, with_failing};

const MIB: u64 = 1 << 20;
/// No whole number of clusters.
const SIZE: u64 = 5 * MIB + 4096;

struct Bench {
    dir: tempfile::TempDir,
    reactor: Reactor,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        File::create(dir.path().join("disk")).unwrap().set_len(SIZE).unwrap();
        Bench { dir, reactor: Reactor::spawn("test", Settings::default()).unwrap() }
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn chain(&self) -> Chain {
        Chain::open_or_create(&self.dir.path().join("chain")).unwrap()
    }

    /// Opens the disk for as long as this takes.
    fn with<T>(&self, work: impl FnOnce(&Client) -> T) -> T {
        let image = self.image();
        let disk = Tracked::new(Raw::new(RawOptions::new(&image)), Some(Sidecar::new(&image)));
        let client = Client::new(&self.reactor.handle(), disk.open().unwrap()).unwrap();
        work(&client)
    }

    /// What QEMU reads of a backup, whose images it finds nothing wrong with.
    fn content(&self, name: &str, format: &str) -> Vec<u8> {
        let path = self.chain().path().join("disk").join(format!("{name}.{format}"));
        if format == "qcow2" {
            qemu(&["check", "-q", "-f", "qcow2", text(&path)]);
        }
        let out = self.dir.path().join("out");
        qemu(&["convert", "-f", format, "-O", "raw", text(&path), text(&out)]);
        fs::read(out).unwrap()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn qemu(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().expect("QEMU's tools are installed");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn named(name: &str, since: Since) -> Backup {
    Backup { name: Some(name.into()), since, checkpoint: true, ..Backup::new("disk") }
}

fn take(session: &Arc<dyn Session>, chain: &Chain, format: Format, what: &Backup) -> Result<Done, Error> {
    backup_to_chain(session, chain, format, what, &Silent)
}

fn bitmaps(client: &Client) -> Vec<String> {
    client.session().track().unwrap().list().into_iter().map(|info| info.name).collect()
}

#[test]
fn qemu_reads_each_image_as_the_disk_was() {
    for (format, end) in [(Format::Qcow2, "qcow2"), (Format::Raw, "raw")] {
        let bench = Bench::new();
        let mut wanted = Vec::new();
        bench.with(|client| {
            client.write_at(MIB + 8192, &[1; 4096]).unwrap();
            client.write_at(SIZE - 4096, &[2; 4096]).unwrap();
            client.write_at(3 * MIB, &vec![3; 300 << 10]).unwrap();
            take(client.session(), &bench.chain(), format, &named("one", Since::Beginning)).unwrap();
        });
        wanted.push(fs::read(bench.image()).unwrap());
        bench.with(|client| {
            // A part becomes zeroes in three ways: written, made, and within what is written.
            client.write_at(3 * MIB, &vec![0; 64 << 10]).unwrap();
            client.zero(3 * MIB + (128 << 10), 64 << 10, true).unwrap();
            client.write_at(MIB, &[4; 512]).unwrap();
            let done = take(client.session(), &bench.chain(), format, &named("two", Since::Last)).unwrap();
            assert_eq!(done.parent.as_deref(), Some("one"));
            assert!(done.read <= 256 << 10, "{}: only what has changed", done.read);
            assert_eq!(bitmaps(client), [bench.chain().bitmap_name("two")], "the one of before has gone");
        });
        wanted.push(fs::read(bench.image()).unwrap());
        bench.with(|client| {
            client.session().grow(SIZE + 2 * MIB).unwrap();
            client.write_at(SIZE + MIB, &[5; 4096]).unwrap();
            take(client.session(), &bench.chain(), format, &named("three", Since::Last)).unwrap();
        });
        wanted.push(fs::read(bench.image()).unwrap());
        for ((name, end), wanted) in
            [("one", end), ("two", "qcow2"), ("three", "qcow2")].into_iter().zip(&wanted)
        {
            assert!(bench.content(name, end) == *wanted, "{name} over {format}");
        }
        let chain = bench.chain();
        let list = chain.list(None).unwrap();
        assert_eq!(list.iter().map(|one| &*one.about.name).collect::<Vec<_>>(), ["one", "two", "three"]);
        for one in &list {
            chain.verify(&chain.manifest("disk", &one.about.name).unwrap(), &Silent).unwrap();
        }
        // One byte of an image is another.
        let path = chain.path().join(format!("disk/one.{end}"));
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.windows(512).position(|window| window == [3; 512]).unwrap();
        bytes[at + 100] ^= 1;
        fs::write(&path, bytes).unwrap();
        let error = chain.verify(&chain.manifest("disk", "one").unwrap(), &Silent).unwrap_err().to_string();
        assert!(error.contains("damaged: byte 3145728"), "{error}");
        let again = bench.with(|client| take(client.session(), &chain, format, &named("three", Since::Last)));
        assert!(again.unwrap_err().to_string().contains("already"));
    }
}

/// Stops when it is asked for the second time.
struct Stop(AtomicU64);

impl Progress for Stop {
    fn step(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn is_cancelled(&self) -> bool {
        self.0.fetch_add(1, Ordering::SeqCst) > 0
    }
}

fn files(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_backup_that_fails_leaves_no_image_and_the_bitmap_of_before() {
    let bench = Bench::new();
    bench.with(|client| {
        let (session, chain) = (client.session(), bench.chain());
        (0..5).for_each(|at| client.write_at(at * MIB, &[1; 4096]).unwrap());
        take(session, &chain, Format::Qcow2, &named("one", Since::Beginning)).unwrap();
        let directory = chain.path().join("disk");
        let before = files(&directory);
        assert_eq!(before, [".lock", "one.backup", "one.qcow2"]);
        (0..5).for_each(|at| client.write_at(at * MIB, &[2; 4096]).unwrap());
        let what = named("two", Since::Last);
        let error = backup_to_chain(session, &chain, Format::Qcow2, &what, &Stop(AtomicU64::new(0)));
        assert!(matches!(error, Err(Error::Cancelled)));
        assert_eq!(files(&directory), before);
        assert_eq!(bitmaps(client), [chain.bitmap_name("one")]);
        for wrong in ["../two", "a:b"] {
            take(session, &chain, Format::Qcow2, &named(wrong, Since::Last)).unwrap_err();
        }
        take(session, &chain, Format::Vhd, &named("two", Since::Beginning)).unwrap_err();
        // What a crash has left.
        fs::create_dir(directory.join(".incoming")).unwrap();
        fs::write(directory.join(".incoming.image"), "half of it").unwrap();
        fs::write(directory.join("two.qcow2"), "whole, but nobody knows of it").unwrap();
        let there = take(session, &chain, Format::Qcow2, &what).unwrap_err().to_string();
        assert!(there.contains("there already"), "{there}");
        fs::remove_file(directory.join("two.qcow2")).unwrap();
        take(session, &chain, Format::Qcow2, &what).unwrap();
        assert_eq!(files(&directory), [".lock", "one.backup", "one.qcow2", "two.backup", "two.qcow2"]);
    });
    assert!(bench.content("two", "qcow2") == fs::read(bench.image()).unwrap());
    let other = bench.dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("file"), "").unwrap();
    assert!(Chain::open_or_create(&other).is_err(), "not a place for chains");
}

/// Errors of the filesystem that the images go to, on whichever way they come.
#[test]
fn storage_that_fails_leaves_the_backups_before_and_their_bitmap() {
    let bench = Bench::new();
    // Without a file for bitmaps, which would fail first.
    let disk = Tracked::new(Raw::new(RawOptions::new(bench.image())), None);
    let session = disk.open().unwrap();
    let client = Client::new(&bench.reactor.handle(), session.clone()).unwrap();
    let chain = bench.chain();
    (0..5).for_each(|at| client.write_at(at * MIB, &[1; 4096]).unwrap());
    take(&session, &chain, Format::Qcow2, &named("one", Since::Beginning)).unwrap();
    let first = fs::read(bench.image()).unwrap();
    (0..5).for_each(|at| client.write_at(at * MIB + 8192, &[2; 4096]).unwrap());
    let directory = chain.path().join("disk");
    let before = files(&directory);
    let calls: [&[Failing]; 4] = [
        &Failing::flushes(libc::EIO),
        &[Failing::every(libc::SYS_rename, libc::ENOSPC)],
        &[Failing::every(libc::SYS_ftruncate, libc::ENOSPC)],
        &[Failing::long_writes(100, libc::ENOSPC)],
    ];
    for calls in calls {
        let what = named("two", Since::Last);
        with_failing(calls, || take(&session, &chain, Format::Qcow2, &what)).unwrap_err();
        assert_eq!(files(&directory), before, "{calls:?}");
        assert_eq!(bitmaps(&client), [chain.bitmap_name("one")], "{calls:?}");
    }
    let done = take(&session, &chain, Format::Qcow2, &named("two", Since::Last)).unwrap();
    assert_eq!(done.read, 5 * (64 << 10), "the bitmap has gone on");
    assert!(bench.content("one", "qcow2") == first);
    assert!(bench.content("two", "qcow2") == fs::read(bench.image()).unwrap());
}

/// Two queues write a chain, each write after the one before has ended. Every image is as after one.
#[test]
fn every_image_is_the_disk_at_one_instant() {
    const UNIT: u64 = 4096;
    let bench = Bench::new();
    let image = bench.image();
    let disk = Tracked::new(Raw::new(RawOptions::new(&image)), Some(Sidecar::new(&image)));
    let session = disk.open().unwrap();
    let other = Reactor::spawn("other", Settings::default()).unwrap();
    let clients =
        [&bench.reactor, &other].map(|reactor| Client::new(&reactor.handle(), session.clone()).unwrap());
    let (stop, ended) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut least = Vec::new();
    let log = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let (mut random, mut log) = (Random::new(5), Vec::new());
            let mut buffer = Buffer::new(usize::try_from(UNIT).unwrap());
            while !stop.load(Ordering::SeqCst) {
                let unit = random.below(SIZE / UNIT);
                log.push(unit);
                let number = log.len() as u64;
                buffer.chunks_mut(8).for_each(|word| word.copy_from_slice(&number.to_le_bytes()));
                clients[log.len() % 2]
                    .write(unit * UNIT, &mut buffer, usize::try_from(UNIT).unwrap())
                    .unwrap();
                ended.store(number, Ordering::SeqCst);
            }
            log
        });
        for number in 0..4 {
            std::thread::sleep(Duration::from_millis(30));
            least.push(ended.load(Ordering::SeqCst));
            let since = if number == 0 { Since::Beginning } else { Since::Last };
            let result = take(&session, &bench.chain(), Format::Qcow2, &named(&number.to_string(), since));
            if result.is_err() {
                stop.store(true, Ordering::SeqCst);
            }
            result.unwrap();
        }
        stop.store(true, Ordering::SeqCst);
        writer.join().unwrap()
    });
    for (number, least) in least.iter().enumerate() {
        let image = bench.content(&number.to_string(), "qcow2");
        let numbers: Vec<u64> = image
            .chunks(usize::try_from(UNIT).unwrap())
            .map(|unit| {
                assert!(unit.chunks(8).all(|word| word == &unit[..8]), "torn");
                u64::from_le_bytes(unit[..8].try_into().unwrap())
            })
            .collect();
        let last = *numbers.iter().max().unwrap();
        assert!(last >= *least, "backup {number}: {last} of at least {least}");
        let mut model = vec![0; numbers.len()];
        for (unit, write) in log.iter().zip(1..=last) {
            model[usize::try_from(*unit).unwrap()] = write;
        }
        assert!(model == numbers, "backup {number} is not as after write {last}");
    }
}
