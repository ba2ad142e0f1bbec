//! Servers that are killed at any moment, and successors that go on: every request is answered once.
#![allow(clippy::cast_possible_truncation, reason = "numbers of tests are small")]

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use vbd_core::Operation;

use crate::abi::{Abi, HEADER, Status};
use crate::fake::Hypervisor;
use crate::intake::{Core, Limits, Step};
use crate::memory::{Arena, Chunks, Memory, Pages, Persistent};
use crate::placement::Policy;
use crate::record::{Log, Record};
use crate::ring::Ring;
use crate::slots::Done;

const NAME: u64 = 0x1234_5678_9abc_def0;

struct World {
    hypervisor: Arc<Hypervisor>,
    ring: *mut u8,
    produced: u32,
    consumed: u32,
    next: u64,
    /// Requests that wait for an answer, each with the sector it writes and what.
    waiting: HashMap<u64, u64>,
    pages: Vec<(u32, usize)>,
    /// What the disk has in each sector that was written.
    disk: HashMap<u64, u64>,
    expected: HashMap<u64, u64>,
}

impl World {
    fn new() -> World {
        let hypervisor = Hypervisor::new().unwrap();
        let page = hypervisor.page();
        hypervisor.grant(1, 8, page, true);
        let pages = (0..64)
            .map(|index| {
                let page = hypervisor.page();
                hypervisor.grant(1, 100 + index, page, true);
                (100 + index, page)
            })
            .collect();
        World {
            ring: hypervisor.at(page),
            hypervisor,
            produced: 0,
            consumed: 0,
            next: 1,
            waiting: HashMap::new(),
            pages,
            disk: HashMap::new(),
            expected: HashMap::new(),
        }
    }

    fn serve(&self, path: &Path, successor: bool, persistent: bool) -> Core {
        let pages = Arc::<Pages>::default();
        let table = self.hypervisor.platform().grants.open(1).unwrap();
        let memory = Memory::new(table, Arena::new(64).unwrap(), pages.clone());
        let mapping = memory.map(&[8], true).unwrap();
        let record = match successor {
            true => Record::open(path, NAME, 1, 32).unwrap(),
            false => Record::create(Some(path), NAME, 1, 32).unwrap(),
        };
        let log = Log::new(record.clone(), 0);
        // SAFETY: mapped in `memory`, which the core holds.
        let mut ring = unsafe { Ring::new(mapping.start, 1, Abi::Wide, None) };
        let mut again = Vec::new();
        if successor {
            let (consumed, entries) = log.recover(ring.published()).unwrap();
            // SAFETY: as above.
            ring = unsafe { Ring::new(mapping.start, 1, Abi::Wide, Some(consumed)) };
            again = entries;
        } else {
            log.start(ring.consumed());
            record.complete();
        }
        let limits = Limits {
            indirect: 0,
            read_only: false,
            discard: true,
            most_discard: 1 << 20,
            durable: false,
            policy: Policy { persistent, direct: true },
        };
        let persistent = Persistent::new(48, 3, pages);
        let mut core = Core::new(ring, limits, memory, Chunks::new(64), persistent, log, again);
        core.paused = false;
        core
    }

    /// The front-end asks for a write of a page that has the request's own number in it, to a sector of its own.
    fn produce(&mut self) {
        if self.produced.wrapping_sub(self.consumed) == 32 {
            return;
        }
        let id = self.next;
        self.next += 1;
        let (reference, page) = self.pages[id as usize % 64];
        // SAFETY: in the hypervisor's memory.
        unsafe {
            self.hypervisor.at(page).cast::<u64>().write_volatile(id);
            let at = self.ring.add(HEADER + (self.produced % 32) as usize * 112).cast::<u32>();
            for (index, word) in
                [0x0101, 0, id as u32, 0, id as u32 * 8, 0, reference, 0x0700].into_iter().enumerate()
            {
                at.add(index).write_volatile(word);
            }
            self.produced = self.produced.wrapping_add(1);
            self.ring.cast::<u32>().write_volatile(self.produced);
        }
        self.waiting.insert(id, id * 8);
        self.expected.insert(id * 8, id);
    }

    /// It takes what was answered.
    fn consume(&mut self) {
        // SAFETY: in the ring.
        let shown = unsafe { self.ring.cast::<u32>().add(2).read_volatile() };
        while self.consumed != shown {
            let at = self.ring.wrapping_add(HEADER + (self.consumed % 32) as usize * 112);
            // SAFETY: in the ring.
            let (id, status) =
                unsafe { (at.cast::<u64>().read_volatile(), at.add(10).cast::<i16>().read_volatile()) };
            assert_eq!(status, 0);
            let sector = self.waiting.remove(&id).expect("answered once, and asked for");
            assert_eq!(self.disk.get(&sector), Some(&id), "answered before it was written");
            self.consumed = self.consumed.wrapping_add(1);
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Move {
    Produce,
    Take,
    Start,
    Complete(u8),
    Publish,
    /// The ring shows what was answered, and the record does not know.
    PublishHalf,
    Consume,
    Kill,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    prop::collection::vec(
        prop_oneof![
            6 => Just(Move::Produce),
            6 => Just(Move::Take),
            6 => Just(Move::Start),
            6 => any::<u8>().prop_map(Move::Complete),
            3 => Just(Move::Publish),
            1 => Just(Move::PublishHalf),
            3 => Just(Move::Consume),
            1 => Just(Move::Kill),
        ],
        1..400,
    )
}

fn run(moves: &[Move], persistent: bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("record");
    let mut world = World::new();
    let mut core = world.serve(&path, false, persistent);
    let mut running = Vec::new();
    let settle = [Move::Take, Move::Start, Move::Complete(0), Move::Publish, Move::Consume];
    let end = std::iter::once(Move::Kill).chain(settle.into_iter().cycle().take(5 * 80));
    for step in moves.iter().copied().chain(end) {
        match step {
            Move::Produce => world.produce(),
            Move::Take => assert!(!matches!(core.next(true), Step::Broken(_))),
            Move::Start => {
                core.advance();
                core.copy_in();
                for slot in std::mem::take(&mut core.ready) {
                    let (part, pieces) = core.part(slot).unwrap();
                    assert_eq!(part.operation, Operation::Write);
                    running.push((slot, part.offset / 512, pieces));
                }
            }
            Move::Complete(which) if !running.is_empty() => {
                let (slot, sector, pieces) = running.swap_remove(usize::from(which) % running.len());
                // SAFETY: the core keeps it valid.
                world.disk.insert(sector, unsafe { pieces[0].iov_base.cast::<u64>().read_volatile() });
                core.take_back(slot, Operation::Write, pieces);
                core.completed(Done { slot, status: Status::Ok });
            }
            Move::Complete(_) => {}
            Move::Publish => {
                core.publish();
            }
            Move::PublishHalf => {
                core.ring.publish();
                running.clear();
                drop(core);
                core = world.serve(&path, true, persistent);
            }
            Move::Consume => world.consume(),
            Move::Kill => {
                running.clear();
                drop(core);
                core = world.serve(&path, true, persistent);
            }
        }
    }
    assert!(world.waiting.is_empty(), "{} requests were lost", world.waiting.len());
    assert_eq!(world.disk, world.expected);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    #[test]
    fn every_request_is_answered_once(moves in moves(), persistent in any::<bool>()) {
        run(&moves, persistent);
    }
}

#[test]
fn killed_before_anything_and_after_everything() {
    run(&[Move::Kill, Move::Kill], false);
    let all = [Move::Produce, Move::Take, Move::Start, Move::Complete(0), Move::Publish, Move::Consume];
    run(&all.repeat(50), true);
}

#[test]
fn a_record_of_another_connection_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("record");
    assert!(Record::open(&path, NAME, 1, 32).is_err());
    let record = Record::create(Some(&path), NAME, 1, 32).unwrap();
    assert!(Record::open(&path, NAME, 1, 32).is_err(), "it is not complete");
    record.complete();
    assert!(Record::open(&path, NAME, 1, 32).is_ok());
    assert!(Record::open(&path, NAME + 1, 1, 32).is_err());
    assert!(Record::open(&path, NAME, 2, 32).is_err());
    assert!(Record::open(&path, NAME, 1, 64).is_err());
    std::fs::write(&path, b"short").unwrap();
    assert!(Record::open(&path, NAME, 1, 32).is_err());
}

#[test]
fn a_ring_that_does_not_fit_its_record_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let record = Record::create(Some(&dir.path().join("record")), NAME, 1, 32).unwrap();
    let log = Log::new(record, 0);
    log.start(10);
    assert!(log.recover(10).is_ok());
    // The domain has changed its index.
    assert!(log.recover(9).is_err());
    assert!(log.recover(11).is_err());
    assert!(log.recover(u32::MAX).is_err());
}
