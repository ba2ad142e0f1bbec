//! Dirty bitmaps in front of a disk.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use support::{Ask, Client, until};
use vbd_core::filter::{Action, Filtered, Inject, Rule};
use vbd_core::track::{Keeper, Track, TrackError, Tracked};
use vbd_core::{Disk, ErrorKind, Operation, Result, Session};
use vbd_ring::EngineKind;
use vbd_testing::MemDisk;

const SIZE: usize = 1 << 20;
const BLOCK: u64 = 64 << 10;

struct Bench {
    memory: Arc<vbd_testing::Behaviour>,
    session: Arc<dyn Session>,
    clients: Vec<Client>,
}

impl Bench {
    fn new(queues: usize) -> Self {
        let disk = MemDisk::new(SIZE);
        let memory = disk.0.clone();
        Self::on(memory, Arc::new(disk), queues)
    }

    fn on(memory: Arc<vbd_testing::Behaviour>, disk: Arc<dyn Disk>, queues: usize) -> Self {
        let session = Tracked::new(disk, None).open().expect("open");
        let clients = (0..queues).map(|_| Client::on_disk(EngineKind::Auto, &session)).collect();
        Bench { memory, session, clients }
    }

    fn track(&self) -> &Arc<Track> {
        self.session.track().expect("tracked")
    }

    fn marked(&self, name: &str) -> Vec<u64> {
        marks(&self.track().bitmap(name).expect("there"))
    }
}

fn marks(bitmap: &vbd_core::bitmap::Bitmap) -> Vec<u64> {
    (0..bitmap.bits()).filter(|block| bitmap.is_marked(block * bitmap.granularity())).collect()
}

#[test]
fn what_may_change_a_block_marks_it_and_nothing_else_does() {
    let bench = Bench::new(2);
    bench.track().add("all", BLOCK, false).expect("added");
    let [first, second] = &bench.clients[..] else { panic!("two") };
    first.read(0, 512);
    first.kind(Ask::new(Operation::Flush, 0, 0));
    assert_eq!(bench.marked("all"), []);
    first.write(BLOCK - 512, vec![1; 1024]);
    second.kind(Ask::new(Operation::Discard, 4 * BLOCK, 4096));
    second.kind(Ask::new(Operation::WriteZeroes, 6 * BLOCK + 512, 2 * BLOCK));
    assert_eq!(bench.marked("all"), [0, 1, 4, 6, 7, 8]);
    *bench.memory.fail.lock().expect("unlocked") = Some(ErrorKind::Io);
    assert_eq!(first.kind(Ask::write(10 * BLOCK, vec![1; 512])), Some(ErrorKind::Io));
    *bench.memory.fail.lock().expect("unlocked") = None;
    assert_eq!(bench.marked("all"), [0, 1, 4, 6, 7, 8, 10], "it may have done a part");
    assert_eq!(first.kind(Ask::write(SIZE as u64, vec![1; 512])), Some(ErrorKind::OutOfRange));
}

#[test]
fn several_bitmaps_begin_end_and_merge_on_their_own() {
    let bench = Bench::new(1);
    let (track, client) = (bench.track(), &bench.clients[0]);
    let write = |block: u64| client.write(block * BLOCK, vec![1; 512]);
    track.add("a", BLOCK, false).expect("added");
    write(0);
    track.add("b", 4096, true).expect("added");
    write(1);
    track.enable("a", false).expect("disabled");
    write(2);
    track.enable("a", true).expect("enabled");
    write(3);
    assert_eq!(bench.marked("a"), [0, 1, 3]);
    assert_eq!(bench.marked("b"), [16, 32, 48]);
    track.clear("b").expect("cleared");
    assert_eq!(bench.marked("b"), []);
    write(5);
    track.merge("a", &["b".into()]).expect("merged");
    assert_eq!(bench.marked("a"), [0, 1, 3, 5]);
    let listed = track.list();
    assert_eq!(listed.len(), 2);
    assert_eq!((listed[1].granularity, listed[1].marked, listed[1].persistent), (4096, 4096, true));
    track.remove("b").expect("removed");
    assert!(matches!(track.remove("b"), Err(TrackError::Unknown(_))));
    assert!(matches!(track.add("a", BLOCK, false), Err(TrackError::Exists(_))));
    assert!(matches!(track.add("a\n", BLOCK, false), Err(TrackError::Name(_))));
    assert!(matches!(track.add("c", 1000, false), Err(TrackError::Bitmap(_))));
}

#[test]
fn a_switch_waits_for_the_writes_of_before_and_no_others() {
    let bench = Bench::new(2);
    let (track, memory) = (bench.track().clone(), &bench.memory);
    track.add("old", BLOCK, true).expect("added");
    memory.hold.store(true, Ordering::SeqCst);
    let late = bench.clients[0].submit(Ask::write(0, vec![1; 512]));
    until("the write", || !memory.asked.lock().expect("unlocked").is_empty());
    let done = Arc::new(AtomicBool::new(false));
    let switching = {
        let done = done.clone();
        std::thread::spawn(move || {
            let old = track.switch(Some("old"), Some(("new", BLOCK, true))).expect("switched");
            done.store(true, Ordering::SeqCst);
            old.expect("retired")
        })
    };
    until("the instant", || bench.track().bitmap("new").is_ok());
    let after = bench.clients[1].submit(Ask::write(BLOCK, vec![1; 512]));
    std::thread::sleep(Duration::from_millis(50));
    assert!(!done.load(Ordering::SeqCst), "a write of before is under way");
    memory.hold.store(false, Ordering::SeqCst);
    let old = switching.join().expect("switched");
    for answer in [late, after] {
        answer.recv_timeout(Duration::from_secs(10)).expect("an answer").result.expect("written");
    }
    assert_eq!(marks(&old.bitmap), [0]);
    assert_eq!(bench.marked("new"), [1]);
    bench.track().restore(old, Some("new")).expect("restored");
    assert_eq!(bench.marked("old"), [0, 1]);
    assert!(bench.track().bitmap("new").is_err());
}

/// A filter below that keeps a request for a while, and answers it itself, must not hide that it is under way.
#[test]
fn a_write_that_a_filter_below_keeps_is_under_way() {
    let disk = MemDisk::new(SIZE);
    let memory = disk.0.clone();
    let delay = Rule::always(Operation::Write, Action::Delay(Duration::from_millis(300)));
    let bench = Bench::on(memory.clone(), Filtered::new(Arc::new(disk), Inject::new(vec![delay])), 1);
    let answer = bench.clients[0].submit(Ask::write(0, vec![1; 512]));
    bench.clients[0].channel(|_| ());
    bench.track().add("new", BLOCK, false).expect("added");
    assert_eq!(memory.data.lock().expect("unlocked")[0], 1, "the write of before has ended");
    answer.recv_timeout(Duration::from_secs(10)).expect("an answer").result.expect("written");
    assert_eq!(bench.marked("new"), []);
}

#[test]
fn a_disk_that_grows_has_marks_for_all_of_it() {
    let bench = Bench::new(1);
    bench.track().add("all", BLOCK, false).expect("added");
    bench.clients[0].write(0, vec![1; 512]);
    bench.session.grow(2 * SIZE as u64).expect("grown");
    bench.clients[0].write(SIZE as u64 + BLOCK, vec![1; 512]);
    assert_eq!(bench.marked("all"), [0, 17]);
}

/// Every write that has ended before a switch is in the old bitmap, and every one that began after it in the new one.
#[test]
fn switches_under_load_lose_no_write() {
    const BLOCKS: u64 = SIZE as u64 / 512;
    let bench = Bench::new(2);
    let track = bench.track();
    track.add("0", 512, false).expect("added");
    let stop = AtomicBool::new(false);
    let rounds = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let logs: Vec<_> = bench
            .clients
            .iter()
            .enumerate()
            .map(|(number, client)| {
                let (stop, rounds) = (&stop, &rounds);
                scope.spawn(move || {
                    let mut log = Vec::new();
                    let mut random = number as u64 + 1;
                    while !stop.load(Ordering::SeqCst) {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let block = (random >> 33) % BLOCKS;
                        let began = rounds.load(Ordering::SeqCst);
                        client.write(block * 512, vec![1; 512]);
                        log.push((block, began, rounds.load(Ordering::SeqCst)));
                    }
                    log
                })
            })
            .collect();
        let mut old = Vec::new();
        for round in 0..200u64 {
            let (from, to) = (round.to_string(), (round + 1).to_string());
            // Odd while it switches.
            rounds.store(2 * round + 1, Ordering::SeqCst);
            old.push(track.switch(Some(&from), Some((&to, 512, false))).expect("switched").expect("retired"));
            rounds.store(2 * round + 2, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
        }
        stop.store(true, Ordering::SeqCst);
        let last = track.bitmap("200").expect("there");
        let mut checked = 0;
        for log in logs {
            for (block, began, ended) in log.join().expect("wrote") {
                let here = |old: &vbd_core::track::Named| old.bitmap.is_marked(block * 512);
                assert!(old.iter().any(here) || last.is_marked(block * 512), "block {block}");
                let between = usize::try_from(began / 2).expect("small");
                if began == ended
                    && began % 2 == 0
                    && let Some(old) = old.get(between)
                {
                    assert!(here(old), "block {block} of round {began}");
                    checked += 1;
                }
            }
        }
        assert!(checked > 0, "writes between switches");
    });
}

/// What was asked of it.
#[derive(Default)]
struct Log(Arc<Mutex<Vec<&'static str>>>);

impl Keeper for Log {
    fn opened(&self, _: &dyn Session, track: &Arc<Track>) -> Result<()> {
        self.0.lock().expect("unlocked").push("opened");
        assert!(track.list().is_empty());
        Ok(())
    }

    fn changed(&self, _: &dyn Session, _: &Track) -> Result<()> {
        self.0.lock().expect("unlocked").push("changed");
        Ok(())
    }

    fn has_work(&self, track: &Track) -> bool {
        !track.list().is_empty()
    }

    fn closed(&self, _: &dyn Session, track: &Track) {
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(track.list()[0].marked, BLOCK);
        self.0.lock().expect("unlocked").push("closed");
    }
}

#[test]
fn bitmaps_are_kept_before_the_disk_can_be_opened_again() {
    let disk = MemDisk::new(SIZE);
    let memory = disk.0.clone();
    let log = Log::default();
    let said = log.0.clone();
    let disk = Tracked::new(Arc::new(disk), Some(Box::new(log)));
    let session = disk.open().expect("open");
    assert!(Arc::ptr_eq(&session, &disk.open().expect("open")), "one session");
    session.track().expect("tracked").add("kept", BLOCK, true).expect("added");
    session.keep_bitmaps().expect("noted");
    let client = Client::on_disk(EngineKind::Auto, &session);
    client.write(0, vec![1; 512]);
    drop(session);
    assert_eq!(*said.lock().expect("unlocked"), ["opened", "changed"], "a queue is there still");
    drop(client);
    let session = disk.open().expect("open");
    assert_eq!(*said.lock().expect("unlocked"), ["opened", "changed", "closed", "opened"]);
    assert_eq!(memory.sessions.load(Ordering::SeqCst), 1);
    drop(session);
    drop(disk);
    assert_eq!(memory.sessions.load(Ordering::SeqCst), 0);
}
