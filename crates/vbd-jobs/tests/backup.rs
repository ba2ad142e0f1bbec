//! Backups to a store and back.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use vbd_core::client::Buffer;
use vbd_core::track::Tracked;
use vbd_core::{Client, Disk, Session};
use vbd_formats::{Format, NewImage};
use vbd_image::raw::{Raw, RawOptions};
use vbd_image::sidecar::Sidecar;
use vbd_jobs::backup::{Backup, Done, Since, Store, Use, backup, restore, verify};
use vbd_jobs::{Error, Progress, Silent};
use vbd_ring::{Reactor, Settings};
use vbd_testing::{Failing, Random, with_failing};

const MIB: u64 = 1 << 20;
/// Not a whole number of chunks.
const SIZE: u64 = 5 * MIB + 4096;

struct Bench {
    dir: tempfile::TempDir,
    reactor: Reactor,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("disk")).unwrap().set_len(SIZE).unwrap();
        Bench { dir, reactor: Reactor::spawn("test", Settings::default()).unwrap() }
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn store(&self) -> Store {
        Store::open_or_create(&self.dir.path().join("store")).unwrap()
    }

    /// Opens the disk for as long as this takes.
    fn with<T>(&self, work: impl FnOnce(&Client) -> T) -> T {
        let image = self.image();
        let disk = Tracked::new(Raw::new(RawOptions::new(&image)), Some(Sidecar::new(&image)));
        let client = Client::new(&self.reactor.handle(), disk.open().unwrap()).unwrap();
        work(&client)
    }

    fn restored(&self, name: &str) -> Vec<u8> {
        let store = Store::open(&self.dir.path().join("store"), Use::Shared).unwrap();
        let manifest = store.manifest("disk", name).unwrap();
        let target = self.dir.path().join("restored");
        let new = NewImage { replace: true, ..NewImage::new(Format::Raw, manifest.size).unwrap() };
        restore(&store, &manifest, &target, &new, 2, &Silent).unwrap();
        fs::read(&target).unwrap()
    }
}

fn named(name: &str, since: Since) -> Backup {
    Backup { name: Some(name.into()), since, checkpoint: true, ..Backup::new("disk") }
}

fn take(session: &Arc<dyn Session>, store: &Store, what: &Backup) -> Result<Done, Error> {
    backup(session, store, what, &Silent)
}

fn bitmaps(client: &Client) -> Vec<String> {
    client.session().track().unwrap().list().into_iter().map(|info| info.name).collect()
}

#[test]
fn incremental_backups_read_what_has_changed_over_sessions_and_restore_as_it_was() {
    let bench = Bench::new();
    let content = |number: u8| vec![number; 4096];
    let full = bench.with(|client| {
        client.write_at(MIB + 8192, &content(1)).unwrap();
        client.write_at(SIZE - 4096, &content(2)).unwrap();
        client.write_at(3 * MIB, &content(3)).unwrap();
        take(client.session(), &bench.store(), &named("one", Since::Beginning)).unwrap()
    });
    assert_eq!((full.size, full.read), (SIZE, 2 * MIB + 4096), "holes are not read");
    let first = fs::read(bench.image()).unwrap();
    // Closed, opened, changed, closed.
    bench.with(|client| {
        client.write_at(3 * MIB, &content(4)).unwrap();
        client.write_at(2 * MIB - 512, &content(0)).unwrap();
        client.zero(MIB, MIB, true).unwrap();
    });
    let second = fs::read(bench.image()).unwrap();
    let done = bench.with(|client| {
        assert_eq!(bitmaps(client).len(), 1);
        let done = take(client.session(), &bench.store(), &named("two", Since::Last)).unwrap();
        assert_eq!(bitmaps(client), [bench.store().bitmap_name("two")], "the one of before has gone");
        done
    });
    assert_eq!(
        (done.read, done.parent.as_deref()),
        (2 * MIB, Some("one")),
        "and zeroes that were made are not read"
    );
    // It grows within its last chunk, which is not written to otherwise.
    bench.with(|client| client.session().grow(SIZE + 2 * MIB).unwrap());
    let done =
        bench.with(|client| take(client.session(), &bench.store(), &named("three", Since::Last)).unwrap());
    assert_eq!((done.size, done.read), (SIZE + 2 * MIB, 0));
    assert!(bench.restored("one") == first);
    assert!(bench.restored("two") == second);
    assert!(bench.restored("three") == fs::read(bench.image()).unwrap());
    let store = bench.store();
    let list = store.list(None).unwrap();
    assert_eq!(list.iter().map(|one| &*one.about.name).collect::<Vec<_>>(), ["one", "two", "three"]);
    assert!(store.list(Some("other")).unwrap().is_empty());
}

#[test]
fn after_a_crash_everything_is_read_and_stored_once() {
    let bench = Bench::new();
    bench.with(|client| {
        client.write_at(0, &[1; 4096]).unwrap();
        client.write_at(4 * MIB, &[2; 4096]).unwrap();
        take(client.session(), &bench.store(), &named("one", Since::Beginning)).unwrap();
        // What the files are in the middle of a session.
        client.write_at(4 * MIB, &[3; 4096]).unwrap();
        client.flush().unwrap();
        fs::copy(bench.image().with_file_name("disk.vbd-bitmaps"), bench.dir.path().join("in use")).unwrap();
    });
    fs::rename(bench.dir.path().join("in use"), bench.image().with_file_name("disk.vbd-bitmaps")).unwrap();
    let done =
        bench.with(|client| take(client.session(), &bench.store(), &named("two", Since::Last)).unwrap());
    assert_eq!(done.read, 2 * MIB, "what is not a hole");
    assert!(done.stored < 4096, "one chunk was there: {}", done.stored);
    assert!(bench.restored("two") == fs::read(bench.image()).unwrap());
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

fn files(path: &Path) -> usize {
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { files(&path) } else { 1 }).sum()
}

#[test]
fn a_backup_that_fails_leaves_the_store_and_the_bitmap_before_as_they_were() {
    let bench = Bench::new();
    bench.with(|client| {
        (0..5).for_each(|at| client.write_at(at * MIB, &[1; 4096]).unwrap());
        let (session, store) = (client.session(), bench.store());
        let refused = take(session, &store, &named("two", Since::Last)).unwrap_err().to_string();
        assert!(refused.contains("make a full one first"), "{refused}");
        take(session, &store, &named("one", Since::Beginning)).unwrap();
        let before = files(store.path());
        (0..5).for_each(|at| client.write_at(at * MIB, &[2; 4096]).unwrap());
        let what = named("two", Since::Last);
        let error = backup(session, &store, &what, &Stop(AtomicU64::new(0))).unwrap_err();
        assert!(matches!(error, Error::Cancelled), "{error}");
        let again = take(session, &store, &named("one", Since::Beginning)).unwrap_err().to_string();
        assert!(again.contains("already"), "{again}");
        let outside = take(session, &store, &named("../one", Since::Beginning)).unwrap_err().to_string();
        assert!(outside.contains("no name"), "{outside}");
        assert_eq!(files(store.path()), before);
        assert_eq!(bitmaps(client), [store.bitmap_name("one")]);
        client.write_at(MIB / 2, &[3; 4096]).unwrap();
        take(session, &store, &named("two", Since::Last)).unwrap();
        let unmarked = Backup { checkpoint: false, ..named("three", Since::Backup("two".into())) };
        take(session, &store, &unmarked).unwrap();
        let refused = take(session, &store, &named("four", Since::Last)).unwrap_err().to_string();
        assert!(refused.contains("without a checkpoint"), "{refused}");
        let refused =
            take(session, &store, &named("four", Since::Backup("one".into()))).unwrap_err().to_string();
        assert!(refused.contains("bitmap no more"), "{refused}");
    });
    assert!(bench.restored("two") == fs::read(bench.image()).unwrap());
}

#[test]
fn damage_is_found_and_named_and_nothing_is_restored_of_it() {
    let bench = Bench::new();
    bench.with(|client| {
        client.write_at(0, &[1; 4096]).unwrap();
        client.write_at(MIB, &[2; 4096]).unwrap();
        take(client.session(), &bench.store(), &named("one", Since::Beginning)).unwrap();
    });
    let store = bench.store();
    let manifest = store.manifest("disk", "one").unwrap();
    let checked = verify(&store, std::slice::from_ref(&manifest), 2, &Silent).unwrap();
    assert_eq!((checked.chunks, checked.bytes), (2, 2 * MIB));
    let name = manifest.chunks[1].hex();
    let path = store.path().join("chunks").join(&name[..2]).join(&name[2..]);
    let good = fs::read(&path).unwrap();
    let target = bench.dir.path().join("new");
    let new = NewImage::new(Format::Raw, 0).unwrap();
    let mut other = vec![0; usize::try_from(MIB).unwrap()];
    other[0] = 7;
    let wrong = [
        good[..good.len() - 1].to_vec(),
        zstd::bulk::compress(&other, 3).unwrap(),
        zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap(),
        Vec::new(),
    ];
    for bytes in wrong {
        fs::write(&path, bytes).unwrap();
        for error in [
            verify(&store, std::slice::from_ref(&manifest), 2, &Silent).unwrap_err(),
            restore(&store, &manifest, &target, &new, 2, &Silent).unwrap_err(),
        ] {
            assert!(error.to_string().contains(&name[2..]), "{error}");
        }
        assert_eq!(fs::read_dir(bench.dir.path()).unwrap().count(), 3, "disk, its bitmaps, and the store");
    }
    fs::remove_file(&path).unwrap();
    verify(&store, &[manifest], 2, &Silent).unwrap_err();
}

#[test]
fn what_no_backup_needs_is_taken_away_and_nothing_else() {
    let bench = Bench::new();
    bench.with(|client| {
        let random = |seed| {
            let mut random = Random::new(seed);
            (0..4096).map(|_| u8::try_from(random.below(256)).unwrap()).collect::<Vec<_>>()
        };
        client.write_at(0, &random(1)).unwrap();
        client.write_at(MIB, &random(2)).unwrap();
        take(client.session(), &bench.store(), &named("one", Since::Beginning)).unwrap();
        client.write_at(0, &random(3)).unwrap();
        take(client.session(), &bench.store(), &named("two", Since::Last)).unwrap();
    });
    let path = bench.dir.path().join("store");
    fs::create_dir(path.join("incoming-dead")).unwrap();
    let shared = bench.store();
    assert!(Store::open(&path, Use::Alone).is_err(), "somebody uses it");
    drop(shared);
    let alone = Store::open(&path, Use::Alone).unwrap();
    assert!(Store::open(&path, Use::Shared).is_err(), "and nobody may then");
    let freed = alone.prune(&[("disk".into(), "one".into())]).unwrap();
    assert!((4096..5000).contains(&freed), "one chunk of two: {freed}");
    assert!(!path.join("incoming-dead").exists());
    drop(alone);
    assert!(bench.restored("two") == fs::read(bench.image()).unwrap());
    assert!(bench.store().manifest("disk", "one").is_err());
    let other = bench.dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("file"), "").unwrap();
    assert!(Store::open_or_create(&other).is_err(), "not a place for a store");
}

/// Errors of the filesystem that the store is on, at a chunk and at the manifest.
#[test]
fn a_store_that_fails_keeps_the_backups_before_and_their_bitmap() {
    let bench = Bench::new();
    // Without a file for bitmaps, which would fail first.
    let disk = Tracked::new(Raw::new(RawOptions::new(bench.image())), None);
    let session = disk.open().unwrap();
    let client = Client::new(&bench.reactor.handle(), session.clone()).unwrap();
    let store = bench.store();
    let random = |seed| {
        let mut random = Random::new(seed);
        (0..65536).map(|_| u8::try_from(random.below(256)).unwrap()).collect::<Vec<_>>()
    };
    (0..5).for_each(|at| client.write_at(at * MIB, &random(at)).unwrap());
    take(&session, &store, &named("one", Since::Beginning)).unwrap();
    let first = fs::read(bench.image()).unwrap();
    (0..5).for_each(|at| client.write_at(at * MIB, &random(10 + at)).unwrap());
    let before = files(store.path());
    let calls: [(&[Failing], &str); 5] = [
        // A chunk; a chunk's durability; its name; the manifest's durability; its name.
        (&[Failing::long_writes(65536, libc::ENOSPC)], "write it"),
        (&[Failing::every(libc::SYS_syncfs, libc::EIO)], "make it durable"),
        (&[Failing::every(libc::SYS_rename, libc::ENOSPC)], "give this chunk its name"),
        (&Failing::flushes(libc::EIO), "write it"),
        (&[Failing::every(libc::SYS_rename, libc::ENOSPC)], "write it"),
    ];
    for (calls, doing) in calls {
        let what = named("two", Since::Last);
        let error = with_failing(calls, || take(&session, &store, &what)).unwrap_err().to_string();
        assert!(error.contains(doing), "{calls:?}: {error}");
        assert_eq!(bitmaps(&client), [store.bitmap_name("one")], "{calls:?}");
        assert_eq!(store.list(None).unwrap().len(), 1, "{calls:?}");
        assert!(bench.restored("one") == first);
        // Chunks may have their names by then: they are whole, and of use to the next.
        let more = files(store.path()) - before;
        assert!(more == 0 || more == 5, "{more} files are left");
    }
    let done = take(&session, &store, &named("two", Since::Last)).unwrap();
    assert_eq!(done.read, 4 * MIB + MIB, "the bitmap has gone on");
    assert!(bench.restored("two") == fs::read(bench.image()).unwrap());
    assert!(bench.restored("one") == first);
}

/// Two guests' queues write a chain, each write after the one before has ended. Every restored image is as after one.
#[test]
fn every_restored_image_is_the_disk_at_one_instant() {
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
            let result = take(&session, &bench.store(), &named(&number.to_string(), since));
            if result.is_err() {
                stop.store(true, Ordering::SeqCst);
            }
            result.unwrap();
        }
        stop.store(true, Ordering::SeqCst);
        writer.join().unwrap()
    });
    let store = bench.store();
    let all: Vec<_> = store.list(Some("disk")).unwrap();
    let all: Vec<_> = all.iter().map(|one| store.manifest("disk", &one.about.name).unwrap()).collect();
    verify(&store, &all, 2, &Silent).unwrap();
    for (number, least) in least.iter().enumerate() {
        let image = bench.restored(&number.to_string());
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
