//! Range locks, dirty bitmaps and copy-before-write in orders of events that a machine shows once a year.
//!
//! All threads run in turns, and whose turn is next is decided at each lock, atomic and message. Built with
//! `RUSTFLAGS="--cfg shuttle"` only: `.ci/run` says how. `VBD_SEED` repeats a failure, `VBD_ROUNDS` spends more time.
#![cfg(shuttle)]
#![allow(clippy::cast_possible_truncation, reason = "disks of tests are small")]

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use vbd_core::client::{Buffer, Client};
use vbd_core::file::{Backend, Cache, Options};
use vbd_core::range_lock::RangeLocks;
use vbd_core::track::{Freeze, Frozen, Track, Tracked};
use vbd_core::{Capabilities, Channel, Disk, Event, Geometry, Result, Session, Statistics};
use vbd_ring::sync::{mpsc, thread};
use vbd_ring::{Handle, Local, Reactor, Settings};
use vbd_testing::{Random, seeds};

/// Runs `body` once for each seed: in random turns, or with priorities that change a few times.
fn in_orders(rounds: u64, body: fn(u64)) {
    for seed in seeds(rounds) {
        let mut config = shuttle::Config::new();
        config.stack_size = 512 << 10;
        config.max_steps = shuttle::MaxSteps::FailAfter(5_000_000);
        config.failure_persistence = shuttle::FailurePersistence::None;
        let run = move || {
            let _told = Told(seed);
            body(seed);
        };
        if seed % 2 == 0 {
            let order = shuttle::scheduler::PctScheduler::new_from_seed(seed, 2 + (seed / 2 % 4) as usize, 1);
            shuttle::Runner::new(order, config).run(run);
        } else {
            let order = shuttle::scheduler::RandomScheduler::new_from_seed(seed, 1);
            shuttle::Runner::new(order, config).run(run);
        }
    }
}

/// Names the seed of a run that fails.
struct Told(u64);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failed with VBD_SEED={}", self.0);
        }
    }
}

/// Waits for a future on this thread.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Bell(mpsc::Sender<()>);
    impl std::task::Wake for Bell {
        fn wake(self: Arc<Self>) {
            let _ = self.0.send(());
        }
    }
    let (sender, receiver) = mpsc::channel();
    let waker = Waker::from(Arc::new(Bell(sender)));
    let mut future: Pin<Box<dyn Future<Output = T> + '_>> = Box::pin(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(done) => return done,
            Poll::Pending => receiver.recv().expect("woken"),
        }
    }
}

#[test]
fn ranges_exclude_each_other_and_nobody_waits_for_ever() {
    in_orders(600, |seed| {
        let locks = Arc::new(RangeLocks::default());
        let held: Arc<Mutex<BTreeSet<u64>>> = Arc::default();
        let threads: Vec<_> = (0..3)
            .map(|number| {
                let (locks, held) = (locks.clone(), held.clone());
                thread::spawn(move || {
                    let mut random = Random::new(seed << 8 | number);
                    for _ in 0..3 {
                        let start = random.below(4);
                        let range = start..start + 1 + random.below(3);
                        let mut locking = Box::pin(locks.lock(range.clone()));
                        // Some give up after they have begun to wait.
                        if random.once_in(4) {
                            let polled = locking.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                            if let Poll::Ready(guard) = polled {
                                drop(guard);
                            }
                            drop(locking);
                            continue;
                        }
                        let guard = block_on(locking);
                        let new = range.clone().filter(|at| held.lock().unwrap().insert(*at)).count();
                        assert_eq!(new, range.clone().count(), "a range is held twice");
                        thread::yield_now();
                        range.for_each(|at| {
                            held.lock().unwrap().remove(&at);
                        });
                        drop(guard);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(locks.try_lock(0..u64::MAX).is_some(), "something is left");
    });
}

const SIZE: u64 = 64 << 10;
const BLOCK: u64 = 4096;
const UNIT: usize = 512;

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

fn file() -> Arc<Backend> {
    // Not in memory: there, files are written without waiting.
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a file");
    file.as_file().set_len(SIZE.max(Frozen::store_size(SIZE, BLOCK))).expect("long enough");
    let options = Options { cache: Cache::Writeback, ..Options::default() };
    Backend::open(file.path(), options).expect("openable")
}

fn reactor() -> Reactor {
    Reactor::spawn("queue", Settings::default()).expect("a reactor")
}

/// What a guest has written: it counts up, and writes each number first in one place by one queue, then in another by
/// another queue.
struct Guest {
    places: [u64; 2],
    /// The number that is certainly there, and the one that may be.
    seen: Mutex<(u64, u64)>,
}

impl Guest {
    fn run(&self, reactors: [&Handle; 2], session: &Arc<dyn Session>, numbers: u64) {
        let clients = reactors.map(|reactor| Client::new(reactor, session.clone()).expect("a channel"));
        for number in 1..=numbers {
            self.seen.lock().unwrap().1 = number;
            for (client, place) in clients.iter().zip(self.places) {
                let mut buffer = Buffer::new(UNIT);
                buffer.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&number.to_le_bytes()));
                client.write(place, &mut buffer, UNIT).expect("written");
            }
            self.seen.lock().unwrap().0 = number;
        }
    }

    fn range(&self) -> (u64, u64) {
        *self.seen.lock().unwrap()
    }

    /// The numbers in its places on a disk.
    fn numbers(&self, content: &[u8]) -> [u64; 2] {
        self.places.map(|place| {
            let unit = &content[place as usize..place as usize + UNIT];
            let number = u64::from_le_bytes(unit[..8].try_into().unwrap());
            assert!(unit.chunks_exact(8).all(|word| word == number.to_le_bytes()), "half a write");
            number
        })
    }
}

fn whole(client: &Client) -> Vec<u8> {
    let mut buffer = Buffer::new(SIZE as usize);
    client.read(0, &mut buffer, SIZE as usize).expect("readable");
    buffer.to_vec()
}

/// Two guests on two reactors, and what is done to their disk meanwhile; then all of it.
fn with_guests(meanwhile: impl FnOnce(&Arc<dyn Session>, &Arc<Track>, &Handle, &[Arc<Guest>])) -> Vec<u8> {
    let session = Tracked::new(Arc::new(FileDisk(file(), Statistics::default())), None).open().expect("open");
    let track = session.track().expect("tracked").clone();
    let reactors = [reactor(), reactor()];
    let guests: Vec<_> = [[0, 5 * BLOCK], [BLOCK + 1024, 2 * BLOCK]]
        .map(|places| Arc::new(Guest { places, seen: Mutex::default() }))
        .into();
    let threads: Vec<_> = guests
        .iter()
        .zip(0..)
        .map(|(guest, number)| {
            let (guest, session) = (guest.clone(), session.clone());
            let handles = [reactors[number].handle(), reactors[1 - number].handle()];
            thread::spawn(move || guest.run([&handles[0], &handles[1]], &session, 4))
        })
        .collect();
    meanwhile(&session, &track, &reactors[0].handle(), &guests);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let client = Client::new(&reactors[0].handle(), session.clone()).expect("a channel");
    let content = whole(&client);
    for guest in &guests {
        assert_eq!(guest.numbers(&content), [4, 4]);
    }
    content
}

/// A bitmap that ends and one that begins at an instant: no write is in neither.
#[test]
fn every_write_is_in_one_of_two_bitmaps_that_follow_each_other() {
    in_orders(150, |_| {
        let mut marks = Vec::new();
        let mut since = Vec::new();
        with_guests(|_, track, _, guests| {
            track.add("a", BLOCK, false).expect("added");
            since = guests.iter().map(|guest| guest.range().0).collect();
            let retired = track.switch(Some("a"), Some(("b", BLOCK, false))).expect("switched");
            marks.push(retired.expect("retired").bitmap);
            // Nothing is marked in it any more.
            let before = marks[0].marked_bytes();
            let retired = track.switch(Some("b"), Some(("c", BLOCK, false))).expect("switched");
            assert_eq!(marks[0].marked_bytes(), before, "marked after its end");
            marks.push(retired.expect("retired").bitmap);
            marks.push(track.bitmap("c").expect("there"));
        });
        for (number, since) in since.iter().enumerate() {
            // What a guest began to write after the first bitmap had begun.
            if *since < 3 {
                let places = [[0, 5 * BLOCK], [BLOCK + 1024, 2 * BLOCK]][number];
                let any =
                    places.iter().all(|place| marks.iter().any(|bitmap| bitmap.any(*place, UNIT as u64)));
                assert!(any, "a write is in no bitmap");
            }
        }
    });
}

/// A backup has the disk as it was at one instant, whatever is written meanwhile, and its parts are of that instant.
#[test]
fn what_is_frozen_is_of_one_instant() {
    in_orders(120, |seed| {
        with_guests(|session, _, handle, guests| {
            for round in 0..2 {
                let before: Vec<_> = guests.iter().map(|guest| guest.range().0).collect();
                let freeze = Freeze {
                    since: None,
                    retire: false,
                    start: None,
                    block: BLOCK,
                    widen: 0,
                    store: file(),
                    limit: u64::MAX,
                    memory: 2 * BLOCK,
                    longest_delay: Duration::from_secs(3600),
                };
                let (frozen, _) = Frozen::new(session, &freeze).expect("frozen");
                let after: Vec<_> = guests.iter().map(|guest| guest.range().1).collect();
                let client = Client::new(handle, frozen.clone()).expect("a channel");
                let mut content = vec![0; SIZE as usize];
                let mut blocks: Vec<u64> = (0..SIZE / BLOCK).collect();
                let mut random = Random::new(seed << 8 | round);
                while !blocks.is_empty() {
                    let block = blocks.swap_remove(random.index(blocks.len()));
                    let at = (block * BLOCK) as usize;
                    client.read_at(block * BLOCK, &mut content[at..at + BLOCK as usize]).expect("readable");
                    if random.once_in(2) {
                        client.discard(block * BLOCK, BLOCK).expect("let go");
                    }
                }
                frozen.check().expect("no failure");
                for ((guest, before), after) in guests.iter().zip(before).zip(after) {
                    let [first, second] = guest.numbers(&content);
                    assert!(first == second || first == second + 1, "{first} and {second} at one instant");
                    assert!(before <= second && first <= after, "{first}, {second}: {before} to {after}");
                }
                drop(client);
                drop(frozen);
            }
        });
    });
}

/// What differs between two backups is marked between their instants.
#[test]
fn what_changed_since_a_backup_is_marked() {
    in_orders(120, |_| {
        with_guests(|session, _, handle, guests| {
            let mut last: Option<Vec<u8>> = None;
            for round in 0..3 {
                let names = [format!("since {round}"), format!("since {}", round + 1)];
                let freeze = Freeze {
                    since: (round > 0).then_some(&names[0]),
                    retire: round > 0,
                    start: Some((&names[1], BLOCK, false)),
                    block: BLOCK,
                    widen: 0,
                    store: file(),
                    limit: u64::MAX,
                    memory: 2 * BLOCK,
                    longest_delay: Duration::from_secs(3600),
                };
                let (frozen, _) = Frozen::new(session, &freeze).expect("frozen");
                let client = Client::new(handle, frozen.clone()).expect("a channel");
                let mut content = last.clone().unwrap_or_else(|| vec![0; SIZE as usize]);
                for run in frozen.wanted().runs(0..SIZE) {
                    client
                        .read_at(run.start, &mut content[run.start as usize..run.end as usize])
                        .expect("readable");
                }
                frozen.check().expect("no failure");
                for guest in guests {
                    let [first, second] = guest.numbers(&content);
                    assert!(first == second || first == second + 1, "{first} and {second} at one instant");
                }
                drop(client);
                drop(frozen);
                last = Some(content);
            }
        });
    });
}
