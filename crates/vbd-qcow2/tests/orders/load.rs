//! What guests and operators do.

use std::sync::{Arc, PoisonError};

use vbd_core::client::{Ask, Buffer, Client};
use vbd_core::{Flags, Operation, Session};
use vbd_ring::sync::thread;
use vbd_ring::{Handle, Reactor, Settings};
use vbd_testing::Random;
use vbd_testing::power::{SECTOR, fill, stamp_of};

use crate::case::{Case, Made};

/// A request that is out.
struct Out {
    pending: vbd_core::client::Pending,
    operation: Operation,
    first: u64,
    begun: usize,
    number: Option<usize>,
}

impl Case {
    /// So many guests on two reactors.
    pub(crate) fn load(self: &Arc<Self>, session: &Arc<dyn Session>, random: &mut Random, guests: u64) {
        let threads: Vec<_> = (0..guests)
            .map(|guest| {
                let (case, session, seed) = (self.clone(), session.clone(), random.next_u64());
                let handle = self.reactors[guest as usize % 2].handle();
                thread::spawn(move || case.guest(&handle, &session, &mut Random::new(seed), 7))
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    }

    /// A guest on a reactor of its own.
    pub(crate) fn drive(&self, session: &Arc<dyn Session>, random: &mut Random, rounds: usize) {
        self.guest(&reactor().handle(), session, random, rounds);
    }

    fn guest(&self, reactor: &Handle, session: &Arc<dyn Session>, random: &mut Random, rounds: usize) {
        let client = Client::new(reactor, session.clone()).expect("a channel");
        for _ in 0..rounds {
            let out: Vec<Out> = (0..1 + random.below(3)).map(|_| self.send(&client, random)).collect();
            out.into_iter().for_each(|out| self.returned(out));
        }
    }

    /// A few clusters at the start of each table, so that guests meet.
    fn range(&self, sectors: u64, random: &mut Random) -> std::ops::Range<u64> {
        let table = 64;
        let unit = (self.cluster() / SECTOR as u64).min(8);
        let tables = if self.shape.churn { 2 } else { 5 };
        let base = random.below(sectors.div_ceil(table).min(tables)) * table;
        let first = base + random.below(if self.shape.churn { 3 } else { 6 }) * unit;
        let (first, len) = if random.once_in(3) {
            (first + random.below(unit), 1 + random.below(unit))
        } else {
            (first, unit * (1 + random.below(4)))
        };
        let first = first.min(sectors - 1);
        first..(first + len).min(sectors)
    }

    fn send(&self, client: &Client, random: &mut Random) -> Out {
        const OPERATIONS: [Operation; 10] = [
            Operation::Write,
            Operation::Write,
            Operation::Write,
            Operation::Write,
            Operation::Read,
            Operation::Read,
            Operation::Discard,
            Operation::Discard,
            Operation::WriteZeroes,
            Operation::Flush,
        ];
        let operation = match *random.one_of(&OPERATIONS) {
            Operation::Read | Operation::Write if self.shape.churn && random.once_in(3) => Operation::Discard,
            Operation::Read | Operation::Write if self.shape.churn && random.once_in(4) => Operation::Flush,
            Operation::WriteZeroes if !self.shape.zeroes => Operation::Discard,
            operation => operation,
        };
        let sectors = self.range(client.size() / SECTOR as u64, random);
        self.start(client, operation, sectors, random)
    }

    fn start(
        &self,
        client: &Client,
        operation: Operation,
        sectors: std::ops::Range<u64>,
        random: &mut Random,
    ) -> Out {
        let (first, len) = (sectors.start, sectors.end - sectors.start);
        let mut ask = Ask::new(operation, first * SECTOR as u64, len * SECTOR as u64);
        let begun = self.recording.tick();
        let mut buffer = Buffer::new(ask.len as usize);
        let fua = random.once_in(6);
        let number = match operation {
            Operation::Write => {
                let stamp = (begun as u64 + 1) << 8 | 0x57;
                fill(stamp, first, &mut buffer);
                ask.flags.fua = fua;
                Some(self.expected().write(sectors, stamp, fua, begun))
            }
            Operation::WriteZeroes => {
                ask.flags = Flags { fua, may_unmap: random.once_in(2), fast_only: false };
                Some(self.expected().write(sectors, 0, fua, begun))
            }
            Operation::Discard => Some(self.expected().discard(sectors, begun)),
            Operation::Flush => {
                (ask.offset, ask.len) = (0, 0);
                None
            }
            _ => None,
        };
        let moves = matches!(operation, Operation::Read | Operation::Write);
        let pending = client.start(ask, moves.then_some(buffer));
        Out { pending, operation, first, begun, number }
    }

    fn returned(&self, out: Out) {
        let (buffer, result) = out.pending.wait();
        let now = self.recording.tick();
        result.expect("done");
        match (out.operation, out.number) {
            (Operation::Read, _) => {
                let content = buffer.expect("given back");
                let read = self.expected().check_read(out.first, &content, out.begun, now);
                read.unwrap_or_else(|wrong| panic!("a read from {} to {now} is wrong: {wrong}", out.begun));
            }
            (Operation::Flush, _) => self.expected().flushed(out.begun, now),
            (_, Some(number)) => self.expected().ended(number, now),
            _ => {}
        }
    }

    /// One guest has a request to a cluster under way, again and again, while another gives the cluster up, makes that
    /// durable, and writes where nothing was yet.
    pub(crate) fn late(self: &Arc<Self>, session: &Arc<dyn Session>, random: &mut Random) {
        let unit = self.cluster() / SECTOR as u64;
        let place = move |cluster: u64| cluster * unit..(cluster + 1) * unit;
        let client = Client::new(&self.reactors[0].handle(), session.clone()).expect("a channel");
        let last = (client.size() / self.cluster()).min(7);
        for _ in 0..3 {
            let cluster = random.below(3);
            for operation in [Operation::Write, Operation::Flush] {
                let out = self.start(&client, operation, place(cluster), random);
                self.returned(out);
            }
            let other = {
                let (case, session, mut random) =
                    (self.clone(), session.clone(), Random::new(random.next_u64()));
                thread::spawn(move || {
                    let client = Client::new(&case.reactors[1].handle(), session).expect("a channel");
                    let mut run = |operation, cluster| {
                        let out = case.start(&client, operation, place(cluster), &mut random);
                        case.returned(out);
                    };
                    run(Operation::Discard, cluster);
                    run(Operation::Flush, 0);
                    for cluster in 3..last {
                        run(Operation::Write, cluster);
                    }
                    for cluster in 3..last {
                        run(Operation::Read, cluster);
                        run(Operation::Discard, cluster);
                    }
                    run(Operation::Flush, 0);
                })
            };
            let operation = *random.one_of(&[Operation::Write, Operation::Write, Operation::Read]);
            let out = self.start(&client, operation, place(cluster), random);
            self.returned(out);
            other.join().expect("no panic");
        }
    }

    /// Some content, and a snapshot of it.
    pub(crate) fn begin(&self, session: &Arc<dyn Session>, random: &mut Random) {
        self.guest(&self.reactors[0].handle(), session, random, 2);
        self.make_snapshot(session);
    }

    fn make_snapshot(&self, session: &Arc<dyn Session>) {
        let begun = self.recording.tick();
        let name = format!("snapshot {begun}");
        session.live().expect("qcow2 has it").create_snapshot(&name).expect("made");
        let ended = self.recording.tick();
        let made = Made { name, begun, ended };
        self.snapshots.lock().unwrap_or_else(PoisonError::into_inner).push(made);
    }

    /// An operator makes, applies and deletes snapshots and grows the disk.
    pub(crate) fn change(&self, session: &Arc<dyn Session>, random: &mut Random) {
        let live = session.live().expect("qcow2 has it");
        for _ in 0..3 {
            let snapshots = live.snapshots().expect("a list");
            match random.below(4) {
                0 => self.make_snapshot(session),
                1 if !snapshots.is_empty() => {
                    live.delete_snapshot(&random.one_of(&snapshots).name).expect("deleted");
                }
                2 if snapshots.iter().any(|snapshot| snapshot.size == session.geometry().size) => {
                    self.go_back(session, random);
                }
                _ => {
                    let size = session.geometry().size + 512 * (1 + random.below(80));
                    self.expected().grow(size as usize / SECTOR);
                    session.grow(size).expect("grown");
                }
            }
        }
    }

    /// Goes back to a snapshot. What it holds is known when it was done, and may be seen from the beginning on.
    fn go_back(&self, session: &Arc<dyn Session>, random: &mut Random) {
        let live = session.live().expect("qcow2 has it");
        let all: Vec<_> = live.snapshots().expect("a list");
        let fitting: Vec<_> = all.iter().filter(|one| one.size == session.geometry().size).collect();
        let name = random.one_of(&fitting).name.clone();
        let begun = self.recording.tick();
        // Looked up in the image's own file: the snapshot does not change any more.
        let numbers: Vec<usize> = {
            let content = self.content_of(&name);
            let mut expected = self.expected();
            (0..)
                .zip(content.chunks(SECTOR))
                .map(|(sector, content)| {
                    let stamp = stamp_of(sector, content).expect("a whole sector of its own");
                    expected.write(sector..sector + 1, stamp, true, begun)
                })
                .collect()
        };
        live.apply_snapshot(&name).expect("applied");
        let ended = self.recording.tick();
        let mut expected = self.expected();
        numbers.into_iter().for_each(|number| expected.ended(number, ended));
    }
}

pub(crate) fn reactor() -> Reactor {
    Reactor::spawn("guest", Settings::default()).expect("a reactor")
}
