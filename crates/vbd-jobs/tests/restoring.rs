//! Disks that are used while they are being restored.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vbd_core::track::Tracked;
use vbd_core::{Client, Disk, ErrorKind};
use vbd_image::raw::{Raw, RawOptions};
use vbd_jobs::backup::{Backup, Manifest, Restoring, Store, Use, backup};
use vbd_jobs::{Error, Progress, Silent};
use vbd_ring::{Reactor, Settings};
use vbd_testing::{Random, seeds};

const MIB: u64 = 1 << 20;
/// The last chunk is a short one, and the third has nothing in it.
const SIZE: u64 = 7 * MIB + 8192;

struct Bench {
    dir: tempfile::TempDir,
    reactor: Reactor,
    content: Vec<u8>,
}

impl Bench {
    /// A store with a backup of a disk that has content in every chunk but the third.
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut content = vec![0; usize::try_from(SIZE).unwrap()];
        let mut random = Random::new(3);
        for (index, chunk) in content.chunks_mut(1 << 20).enumerate().filter(|(index, _)| *index != 2) {
            let byte = u8::try_from(1 + index).unwrap();
            chunk[..5000].fill(byte);
            let at = random.index(chunk.len());
            chunk[at] = byte;
        }
        let disk = dir.path().join("disk");
        fs::write(&disk, &content).unwrap();
        let reactor = Reactor::spawn("test", Settings::default()).unwrap();
        let session = Tracked::new(Raw::new(RawOptions::new(&disk)), None).open().unwrap();
        let store = Store::open_or_create(&dir.path().join("store")).unwrap();
        backup(&session, &store, &Backup { name: Some("one".into()), ..Backup::new("disk") }, &Silent)
            .unwrap();
        Bench { dir, reactor, content }
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("new")
    }

    fn store(&self) -> Store {
        Store::open(&self.dir.path().join("store"), Use::Shared).unwrap()
    }

    fn manifest(&self) -> Manifest {
        self.store().manifest("disk", "one").unwrap()
    }

    fn chunk(&self, index: usize) -> PathBuf {
        let name = self.manifest().chunks[index].hex();
        self.store().path().join("chunks").join(&name[..2]).join(&name[2..])
    }

    fn begin(&self) -> Result<Arc<Restoring>, Error> {
        Restoring::begin(self.store(), self.manifest(), &self.target(), "new", false, false)
    }

    fn client(&self, disk: &Restoring) -> Client {
        Client::new(&self.reactor.handle(), disk.open().unwrap()).unwrap()
    }
}

fn all(client: &Client) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
    client.read_at(0, &mut bytes).unwrap();
    bytes
}

fn names(path: &Path) -> Vec<String> {
    let names = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| !name.ends_with(".lease")).collect();
    names.sort();
    names
}

#[test]
fn a_disk_is_read_and_written_at_once_and_whole_in_the_end() {
    let bench = Bench::new();
    let disk = bench.begin().unwrap();
    let client = bench.client(&disk);
    let mut wanted = bench.content.clone();
    // Parts of chunks, across two, and of one that was empty.
    for (at, len, byte) in [(4096, 512, 9), (5 * MIB - 1000, 3000, 10), (2 * MIB + 5, 70_000, 11)] {
        client.write_at(at, &vec![byte; len]).unwrap();
        wanted[usize::try_from(at).unwrap()..][..len].fill(byte);
    }
    client.zero(3 * MIB + 100, 2000, true).unwrap();
    wanted[3 * 1048576 + 100..][..2000].fill(0);
    client.discard(6 * MIB, MIB).unwrap();
    let mut part = vec![0; 5000];
    client.read_at(MIB + 100, &mut part).unwrap();
    assert!(part == wanted[1048676..1053676]);
    let mut told = 0;
    client
        .parts::<vbd_core::Error>(0, SIZE, |at, len, kind| {
            let bytes = &wanted[usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap()];
            assert!(kind == vbd_core::ExtentKind::Data || bytes.iter().all(|byte| *byte == 0), "{at} {len}");
            told += len;
            Ok(())
        })
        .unwrap();
    assert_eq!(told, SIZE);
    assert!(!disk.is_complete() && !bench.target().exists());
    let restored = disk.fill(&Silent).unwrap();
    assert!(restored.damaged.is_empty() && restored.bytes > 0 && disk.is_complete());
    // The store is of no more use, and nobody holds it.
    drop(Store::open(&bench.dir.path().join("store"), Use::Alone).unwrap());
    fs::remove_dir_all(bench.dir.path().join("store")).unwrap();
    client.write_at(0, &[12; 512]).unwrap();
    wanted[..512].fill(12);
    assert!(all(&client) == wanted);
    client.flush().unwrap();
    assert_eq!(names(bench.dir.path()), ["disk", "new"]);
    assert!(fs::read(bench.target()).unwrap() == wanted);
    assert_eq!(client.session().grow(2 * SIZE).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn a_damaged_or_missing_chunk_is_an_error_where_it_is_read_and_mended_by_writing() {
    let bench = Bench::new();
    let disk = bench.begin().unwrap();
    let client = bench.client(&disk);
    fs::remove_file(bench.chunk(1)).unwrap();
    fs::write(bench.chunk(4), "something else").unwrap();
    let mut part = vec![0; 4096];
    for chunk in [1, 4] {
        let error = client.read_at(chunk * MIB + 8192, &mut part).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io, "{error}");
        client.write_at(chunk * MIB, &[1; 512]).unwrap_err();
    }
    let restored = disk.fill(&Silent).unwrap();
    assert_eq!(restored.damaged.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [MIB, 4 * MIB]);
    assert!(restored.damaged[0].1.contains(&bench.manifest().chunks[1].hex()[2..]), "{:?}", restored.damaged);
    assert!(!disk.is_complete() && !bench.target().exists());
    let mut wanted = bench.content.clone();
    client.read_at(5 * MIB, &mut part).unwrap();
    assert!(part == wanted[5 << 20..][..4096], "the rest is served");
    // All of it is written: what was in it is not needed any more.
    let whole = vec![7; 1 << 20];
    let mut buffer = vbd_core::client::Buffer::new(1 << 20);
    buffer.copy_from_slice(&whole);
    client.write(MIB, &mut buffer, 1 << 20).unwrap();
    client.zero(4 * MIB, MIB, false).unwrap();
    wanted[1 << 20..2 << 20].fill(7);
    wanted[4 << 20..5 << 20].fill(0);
    assert!(all(&client) == wanted);
    assert!(disk.fill(&Silent).unwrap().damaged.is_empty() && disk.is_complete());
    assert!(fs::read(bench.target()).unwrap() == wanted);
}

/// Stops when it is asked for the given time.
struct Stop(AtomicU64);

impl Progress for Stop {
    fn step(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn is_cancelled(&self) -> bool {
        self.0.fetch_sub(1, Ordering::SeqCst) == 0
    }
}

/// The files are taken as they are at any moment, as after a kill, and restored from there.
#[test]
fn an_interrupted_restore_goes_on_and_keeps_what_guests_wrote() {
    for seed in seeds(6) {
        let mut random = Random::new(seed);
        let bench = Bench::new();
        let mut wanted = bench.content.clone();
        for round in 0..4 {
            let disk = bench.begin().unwrap();
            let client = bench.client(&disk);
            for _ in 0..random.below(8) {
                let at = random.below(SIZE - 9000);
                let len = usize::try_from(1 + random.below(9000)).unwrap();
                match random.below(4) {
                    0 => {
                        let mut part = vec![0; len];
                        client.read_at(at, &mut part).unwrap();
                        assert!(part == wanted[usize::try_from(at).unwrap()..][..len], "seed {seed}");
                    }
                    1 => {
                        let stop = Stop(AtomicU64::new(random.below(4)));
                        // Where it has come to the end, the next round restores nothing.
                        let _ = disk.fill(&stop);
                        if disk.is_complete() {
                            break;
                        }
                    }
                    _ => {
                        let byte = u8::try_from(100 + random.below(100)).unwrap();
                        client.write_at(at, &vec![byte; len]).unwrap();
                        wanted[usize::try_from(at).unwrap()..][..len].fill(byte);
                    }
                }
            }
            // Killed: whatever it would have done in the end is not done.
            let kept: Vec<_> = [".vbd-new.restoring", ".vbd-new.restored", "new"]
                .map(|name| bench.dir.path().join(name))
                .into_iter()
                .filter(|path| path.exists())
                .map(|path| (fs::read(&path).unwrap(), path))
                .collect();
            drop((client, disk));
            for (bytes, path) in kept {
                fs::write(path, bytes).unwrap();
            }
            if bench.target().exists() {
                assert!(fs::read(bench.target()).unwrap() == wanted, "seed {seed} round {round}");
                break;
            }
        }
        if !bench.target().exists() {
            let disk = bench.begin().unwrap();
            disk.fill(&Silent).unwrap();
            drop(disk);
            assert!(fs::read(bench.target()).unwrap() == wanted, "seed {seed}");
        }
    }
}

#[test]
fn what_cannot_be_gone_on_with_is_refused() {
    let bench = Bench::new();
    let disk = bench.begin().unwrap();
    let client = bench.client(&disk);
    client.write_at(0, &[9; 512]).unwrap();
    drop((client, disk));
    let journal = bench.dir.path().join(".vbd-new.restored");
    let good = fs::read(&journal).unwrap();
    let mut other = bench.manifest();
    other.chunks[1] = other.chunks[0];
    let begin = |manifest, restart| {
        Restoring::begin(bench.store(), manifest, &bench.target(), "new", false, restart).map(|_| ())
    };
    let refused = begin(other, false).unwrap_err().to_string();
    assert!(refused.contains("--restart"), "{refused}");
    for wrong in [&good[..good.len() - 1], &[&good[..], &[0]].concat(), &vec![b'x'; good.len()], b""] {
        fs::write(&journal, wrong).unwrap();
        let refused = begin(bench.manifest(), false).unwrap_err().to_string();
        assert!(refused.contains("--restart"), "{refused}");
    }
    fs::write(&journal, &good).unwrap();
    begin(bench.manifest(), true).unwrap();
    let disk = bench.begin().unwrap();
    assert!(all(&bench.client(&disk)) == bench.content, "begun anew");
    drop(disk);
    fs::remove_file(bench.dir.path().join(".vbd-new.restoring")).unwrap();
    assert!(bench.begin().is_err());
    fs::write(bench.target(), "there").unwrap();
    assert!(begin(bench.manifest(), true).is_err());
}
