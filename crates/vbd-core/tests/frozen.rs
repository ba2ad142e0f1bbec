//! A disk as it was, while guests write to it.

mod support;

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::{Ask, Client, file, in_memory, on_disk};
use vbd_core::file::{Backend, Fault, Faults, Options};
use vbd_core::filter::{Action, Filtered, Inject, Rule};
use vbd_core::track::{Freeze, Frozen, Tracked};
use vbd_core::{
    Capabilities, Channel, Disk, ErrorKind, Event, Flags, Geometry, Operation, Result, Session, Statistics,
};
use vbd_ring::{EngineKind, Local, Op, Reactor, Settings};
use vbd_testing::Random;

const SIZE: u64 = 8 << 20;
const BLOCK: u64 = 64 << 10;
/// The size of a write.
const UNIT: u64 = 4096;

/// A file as a disk.
struct FileDisk(Arc<Backend>, Statistics);

struct FileSession(Arc<Backend>);

impl Disk for FileDisk {
    fn name(&self) -> &str {
        "file"
    }
    fn open(&self) -> Result<Arc<dyn Session>> {
        Ok(Arc::new(FileSession(self.0.clone())))
    }
    fn inspect(&self) -> Result<(Geometry, Capabilities)> {
        Ok((self.0.geometry(), self.0.capabilities()))
    }
    fn statistics(&self) -> &Statistics {
        &self.1
    }
    fn watch(&self, _: Box<dyn Fn(Event) + Send + Sync>) -> Arc<dyn Send + Sync> {
        Arc::new(())
    }
}

impl Session for FileSession {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }
    fn channel(self: Arc<Self>, local: &Local) -> Result<Rc<dyn Channel>> {
        Ok(self.0.clone().channel(local, self))
    }
    fn grow(&self, size: u64) -> Result<()> {
        self.0.grow(size)
    }
}

fn on_file(dir: &Path, options: Options) -> Arc<dyn Disk> {
    Arc::new(FileDisk(file(dir, SIZE, options), Statistics::default()))
}

fn opened(disk: Arc<dyn Disk>) -> Arc<dyn Session> {
    Tracked::new(disk, None).open().expect("open")
}

fn store(dir: &Path, faults: Option<Arc<dyn Faults>>) -> Arc<Backend> {
    let file = tempfile::NamedTempFile::new_in(dir).expect("a file");
    file.as_file().set_len(SIZE).expect("long enough");
    let options = Options { faults, cache: vbd_core::file::Cache::Writeback, ..Options::default() };
    Backend::open(file.path(), options).expect("openable")
}

/// All of it, at a price that nobody exceeds.
fn whole(store: Arc<Backend>) -> Freeze<'static> {
    Freeze {
        since: None,
        retire: false,
        start: None,
        block: BLOCK,
        widen: 0,
        store,
        limit: u64::MAX,
        memory: 1 << 20,
        longest_delay: Duration::from_secs(30),
    }
}

fn block_of(round: u64) -> u64 {
    [BLOCK, 4096][usize::try_from(round / 2 % 2).expect("small")]
}

/// Reads what is wanted into `image`, in an order of its own, and lets go of it.
fn copy(frozen: &Arc<Frozen>, reactor: &Reactor, image: &mut [u8], seed: u64) {
    let client = vbd_core::Client::new(&reactor.handle(), frozen.clone()).expect("a client");
    let mut parts = Vec::new();
    for run in frozen.wanted().runs(0..SIZE) {
        let mut at = run.start;
        while at < run.end {
            let end = (at + 4 * BLOCK).min(run.end);
            parts.push(at..end);
            at = end;
        }
    }
    let mut random = Random::new(seed);
    while !parts.is_empty() {
        let part = parts.swap_remove(random.index(parts.len()));
        let (start, end) =
            (usize::try_from(part.start).expect("small"), usize::try_from(part.end).expect("small"));
        client.read_at(part.start, &mut image[start..end]).expect("readable");
        client.discard(part.start, part.end - part.start).expect("let go");
    }
    frozen.check().expect("good to the end");
}

/// A unit of this number.
fn unit(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(usize::try_from(UNIT / 8).expect("small"))
}

fn number(image: &[u8], unit: u64) -> u64 {
    let at = usize::try_from(unit * UNIT).expect("small");
    let number = u64::from_le_bytes(image[at..at + 8].try_into().expect("eight"));
    assert!(image[at..at + 4096].chunks(8).all(|word| word == number.to_le_bytes()), "unit {unit} is torn");
    number
}

/// Units of a disk that were written by writes 1, 2, 3... of which each began when the one before had ended: the image is
/// as after one of them, at least `least`.
fn check_prefix(image: &[u8], units: std::ops::Range<u64>, log: &[u64], least: u64) -> u64 {
    let last = units.clone().map(|unit| number(image, unit)).max().unwrap_or(0);
    assert!(last >= least, "write {least} had ended, and the last one is {last}");
    let mut model = std::collections::HashMap::new();
    for (unit, number) in log.iter().zip(1u64..).take(usize::try_from(last).expect("small")) {
        model.insert(*unit, number);
    }
    for unit in units {
        assert_eq!(
            number(image, unit),
            model.get(&unit).copied().unwrap_or(0),
            "unit {unit} after write {last}"
        );
    }
    last
}

/// One write after the other, each on another queue than the one before: a backup has all up to one of them, whatever
/// the order in which it reads. An incremental backup brings the image to a later one.
#[test]
fn full_and_incremental_backups_are_as_after_one_write_of_a_chain() {
    for dir in [in_memory(), on_disk()] {
        let session = opened(on_file(dir.path(), Options::default()));
        let clients = [0, 1].map(|_| Client::on_disk(EngineKind::Auto, &session));
        let reactor = Reactor::spawn("backup", Settings::default()).expect("a reactor");
        let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
        let mut image = vec![0; usize::try_from(SIZE).expect("small")];
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let (mut random, mut log) = (Random::new(1), Vec::new());
                while !stop.load(Ordering::SeqCst) {
                    // A quarter of the disk, so that blocks are written again and again.
                    let at = random.below(SIZE / UNIT / 4);
                    log.push(at);
                    let number = log.len() as u64;
                    clients[log.len() % 2].write(at * UNIT, unit(number));
                    done.store(number, Ordering::SeqCst);
                }
                log
            });
            let mut images = Vec::new();
            for round in 0..6u64 {
                std::thread::sleep(Duration::from_millis(20));
                let (since, start) = (format!("c{round}"), format!("c{}", round + 1));
                let least = done.load(Ordering::SeqCst);
                let freeze = Freeze {
                    since: (round > 0).then_some(&*since),
                    retire: round % 2 == 1,
                    start: Some((&start, BLOCK, false)),
                    // In blocks as small as they are, and hardly any of it in memory.
                    block: block_of(round),
                    memory: [0, 1 << 20, 64 << 20][usize::try_from(round % 3).expect("small")],
                    ..whole(store(dir.path(), None))
                };
                let (frozen, retired) = Frozen::new(&session, &freeze).expect("frozen");
                assert_eq!(retired.is_some(), round % 2 == 1);
                assert_eq!(
                    Frozen::new(&session, &whole(store(dir.path(), None)))
                        .err()
                        .expect("one at a time")
                        .kind(),
                    ErrorKind::Busy
                );
                copy(&frozen, &reactor, &mut image, round);
                images.push((image.clone(), least));
            }
            stop.store(true, Ordering::SeqCst);
            let log = writer.join().expect("wrote");
            let mut before = 0;
            for (image, least) in images {
                let last = check_prefix(&image, 0..SIZE / UNIT, &log, least);
                assert!(last >= before, "backups go forward");
                before = last;
            }
        });
    }
}

/// Many writes at once, zeroes and discards among them. Each worker's own units are as after one of its writes.
#[test]
fn writes_at_once_and_zeroes_are_each_before_or_after() {
    const WORKERS: u64 = 8;
    let dir = on_disk();
    let session = opened(on_file(dir.path(), Options::default()));
    let clients = [0, 1, 2].map(|_| Client::on_disk(EngineKind::Auto, &session));
    let reactor = Reactor::spawn("backup", Settings::default()).expect("a reactor");
    let stop = AtomicBool::new(false);
    // Interleaved by unit, so that workers share blocks.
    let mine = |worker: u64, unit: u64| unit * WORKERS + worker;
    let units = SIZE / UNIT / WORKERS;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                let (stop, client) = (&stop, &clients[usize::try_from(worker).expect("small") % 3]);
                scope.spawn(move || {
                    let (mut random, mut log) = (Random::new(worker), Vec::new());
                    while !stop.load(Ordering::SeqCst) {
                        let at = random.below(units);
                        if random.once_in(8) {
                            // Zeroes count as no write: a unit that is zeroed was not written before.
                            let zero = mine(worker, units - 1) * UNIT;
                            let ask = Ask::new(Operation::WriteZeroes, zero, UNIT);
                            let flags = Flags { may_unmap: true, ..Flags::default() };
                            assert_eq!(client.kind(Ask { flags, ..ask }), None);
                            client.kind(Ask::new(Operation::Discard, zero, UNIT));
                        }
                        let at = at.min(units - 2);
                        log.push(at);
                        client.write(mine(worker, at) * UNIT, unit(log.len() as u64));
                    }
                    log
                })
            })
            .collect();
        let mut images = Vec::new();
        for seed in 0..5 {
            std::thread::sleep(Duration::from_millis(10));
            let freeze = Freeze {
                block: block_of(seed * 2),
                memory: (seed % 2) << 20,
                ..whole(store(dir.path(), None))
            };
            let (frozen, _) = Frozen::new(&session, &freeze).expect("frozen");
            let mut image = vec![0; usize::try_from(SIZE).expect("small")];
            copy(&frozen, &reactor, &mut image, seed);
            images.push(image);
        }
        stop.store(true, Ordering::SeqCst);
        for (worker, log) in (0..).zip(workers) {
            let log = log.join().expect("wrote");
            for image in &images {
                let own: Vec<u8> = (0..units)
                    .flat_map(|unit| {
                        let at = usize::try_from(mine(worker, unit) * UNIT).expect("small");
                        image[at..at + 4096].iter().copied()
                    })
                    .collect();
                check_prefix(&own, 0..units, &log, 0);
            }
        }
    });
}

fn fails(session: &Arc<dyn Session>, freeze: &Freeze, ask: Ask) -> (ErrorKind, String) {
    let client = Client::on_disk(EngineKind::Auto, session);
    let reactor = Reactor::spawn("backup", Settings::default()).expect("a reactor");
    client.write(0, vec![7; 512]);
    let (frozen, _) = Frozen::new(session, freeze).expect("frozen");
    assert_eq!(client.kind(ask), None, "the guest goes on");
    let reader = vbd_core::Client::new(&reactor.handle(), frozen.clone()).expect("a client");
    let error = reader.read_at(0, &mut [0; 512]).expect_err("the backup has failed");
    frozen.check().expect_err("and says so");
    drop((reader, frozen));
    // And another can be made.
    let (frozen, _) = Frozen::new(session, &whole(freeze.store.clone())).expect("frozen");
    frozen.check().expect("good");
    (error.kind(), error.to_string())
}

#[test]
fn a_write_that_would_wait_too_long_goes_on_and_the_backup_fails() {
    let dir = in_memory();
    let slow = Rule::always(Operation::Read, Action::Delay(Duration::from_secs(3600)));
    let disk = Filtered::new(on_file(dir.path(), Options::default()), Inject::new(vec![slow]));
    let freeze = Freeze { longest_delay: Duration::from_millis(100), ..whole(store(dir.path(), None)) };
    let began = Instant::now();
    let (kind, message) = fails(&opened(disk), &freeze, Ask::write(0, vec![8; 512]));
    assert_eq!(kind, ErrorKind::Cancelled);
    assert!(message.contains("longer than 100 ms"), "{message}");
    assert!(began.elapsed() < Duration::from_secs(60));
}

#[test]
fn old_bytes_that_cannot_be_saved_fail_the_backup_alone() {
    let dir = in_memory();
    let limit = Freeze { limit: BLOCK, ..whole(store(dir.path(), None)) };
    let session = opened(on_file(dir.path(), Options::default()));
    let (_, message) = fails(&session, &limit, Ask::write(BLOCK, vec![8; 2 * 65536]));
    assert!(message.contains("more than 65536 bytes"), "{message}");
    let no_room = |op: &Op| matches!(op, Op::Write { .. }).then_some(Fault::Fail(libc::ENOSPC));
    let full = Freeze { memory: 0, ..whole(store(dir.path(), Some(Arc::new(no_room)))) };
    let (_, message) = fails(&session, &full, Ask::write(0, vec![8; 2 << 20]));
    assert!(message.contains("No space"), "{message}");
    let broken = Rule { times: 1, ..Rule::always(Operation::Read, Action::Fail(ErrorKind::Io)) };
    let disk = Filtered::new(on_file(dir.path(), Options::default()), Inject::new(vec![broken]));
    let (_, message) = fails(&opened(disk), &whole(store(dir.path(), None)), Ask::write(0, vec![8; 512]));
    assert!(message.contains("injected"), "{message}");
}

#[test]
fn a_frozen_disk_is_read_only_and_tells_only_of_what_was_wanted() {
    let dir = in_memory();
    let session = opened(on_file(dir.path(), Options::default()));
    let guest = Client::on_disk(EngineKind::Auto, &session);
    session.track().expect("tracked").add("since", BLOCK, false).expect("added");
    guest.write(3 * BLOCK, vec![1; 65536]);
    let freeze = Freeze { since: Some("since"), ..whole(store(dir.path(), None)) };
    let (frozen, retired) = Frozen::new(&session, &freeze).expect("frozen");
    assert!(retired.is_none());
    assert_eq!(frozen.wanted().runs(0..SIZE).collect::<Vec<_>>(), vec![3 * BLOCK..4 * BLOCK]);
    let as_session: Arc<dyn Session> = frozen.clone();
    assert!(as_session.capabilities().read_only);
    let reader = Client::on_disk(EngineKind::Auto, &as_session);
    assert_eq!(reader.kind(Ask::write(0, vec![1; 512])), Some(ErrorKind::ReadOnly));
    assert_eq!(reader.kind(Ask::new(Operation::WriteZeroes, 0, 512)), Some(ErrorKind::ReadOnly));
    assert_eq!(reader.kind(Ask::new(Operation::Flush, 0, 0)), None);
    assert_eq!(reader.kind(Ask::new(Operation::Read, 0, 512)), Some(ErrorKind::Unsupported));
    assert_eq!(reader.kind(Ask::new(Operation::Read, SIZE, 512)), Some(ErrorKind::OutOfRange));
    guest.write(3 * BLOCK + 512, vec![2; 512]);
    guest.write(0, vec![2; 512]);
    assert_eq!(frozen.kept_bytes(), BLOCK, "what is not wanted is not copied");
    session.grow(2 * SIZE).expect("grown");
    guest.write(SIZE, vec![2; 512]);
    assert_eq!(reader.read(3 * BLOCK, BLOCK), vec![1; 65536]);
    let extents = reader.ask(Ask::new(Operation::Extents, 3 * BLOCK, BLOCK)).extents;
    assert_eq!(extents.iter().map(|extent| extent.len).sum::<u64>(), BLOCK);
    assert_eq!(reader.kind(Ask::new(Operation::Discard, 3 * BLOCK, BLOCK)), None);
    assert_eq!(frozen.kept_bytes(), 0);
    assert_eq!(reader.kind(Ask::new(Operation::Read, 3 * BLOCK, 512)), Some(ErrorKind::Unsupported));
    let since = session.track().expect("tracked").bitmap("since").expect("there");
    assert!([0, 3 * BLOCK, SIZE].iter().all(|at| since.is_marked(*at)), "it went on");
}
