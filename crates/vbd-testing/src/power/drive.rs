//! Random requests, many at once, whose effects are remembered.
#![allow(clippy::cast_possible_truncation, reason = "disks of tests are small")]

use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use vbd_core::{Flags, Operation};

use super::{Expected, Recording, SECTOR, Stamp, fill};
use crate::Random;
use crate::client::{Answer, Ask, Client};

/// What to ask of a disk.
#[derive(Clone, Debug)]
pub struct Load {
    /// How many requests.
    pub requests: usize,
    /// How many of them at once.
    pub depth: usize,
    /// The longest, in sectors.
    pub longest: u64,
    /// The part of the disk that they are for, in sectors.
    pub part: std::ops::Range<u64>,
    /// How often each operation comes, in parts of their sum: read, write, write zeroes, discard, flush.
    pub odds: [u64; 5],
    /// Requests may fail, as with faults injected.
    pub may_fail: bool,
}

impl Load {
    /// A mixture on this part of a disk.
    pub fn on(part: std::ops::Range<u64>) -> Self {
        Load { requests: 100, depth: 8, longest: 64, part, odds: [4, 8, 2, 2, 1], may_fail: false }
    }
}

/// A request that is out.
struct Out {
    receiver: Receiver<Answer>,
    operation: Operation,
    first: u64,
    begun: usize,
    /// In what is expected.
    number: Option<usize>,
}

/// Sends requests to some queues of one disk and remembers what they do. Each read is compared: a sector is old or new.
///
/// # Panics
/// A read is wrong, a request fails that may not, or none comes back within a minute.
pub fn drive(
    clients: &[Client],
    recording: &Recording,
    expected: &mut Expected,
    random: &mut Random,
    load: &Load,
) {
    let mut out: Vec<Out> = Vec::new();
    let mut sent = 0;
    let mut progress = Instant::now();
    while sent < load.requests || !out.is_empty() {
        while sent < load.requests && out.len() < load.depth {
            let client = random.index(clients.len());
            out.push(send(&clients[client], recording, expected, random, load));
            sent += 1;
        }
        let before = out.len();
        out.retain(|out| match out.receiver.try_recv() {
            Ok(answer) => {
                returned(out, &answer, recording, expected, load);
                false
            }
            Err(TryRecvError::Empty) => true,
            Err(TryRecvError::Disconnected) => panic!("a request was lost: {}", out.operation),
        });
        if out.len() < before {
            progress = Instant::now();
        } else {
            assert!(progress.elapsed() < Duration::from_secs(60), "{} requests never came back", out.len());
            std::thread::yield_now();
        }
    }
}

fn send(
    client: &Client,
    recording: &Recording,
    expected: &mut Expected,
    random: &mut Random,
    load: &Load,
) -> Out {
    const OPERATIONS: [Operation; 5] =
        [Operation::Read, Operation::Write, Operation::WriteZeroes, Operation::Discard, Operation::Flush];
    let mut chosen = random.below(load.odds.iter().sum());
    let mut kind = 0;
    while chosen >= load.odds[kind] {
        chosen -= load.odds[kind];
        kind += 1;
    }
    let operation = OPERATIONS[kind];
    // Short ones are the rule.
    let longest = if random.once_in(4) { load.longest } else { load.longest.min(8) };
    let len = (1 + random.below(longest)).min(load.part.end - load.part.start);
    let first = load.part.start + random.below(load.part.end - load.part.start - len + 1);
    let sectors = first..first + len;
    let mut ask = Ask::new(operation, first * SECTOR as u64, len * SECTOR as u64);
    let fua = random.once_in(16);
    let begun = recording.tick();
    let number = match operation {
        Operation::Write => {
            // Never the same twice, never 0.
            let stamp: Stamp = (begun as u64 + 1) << 8 | 0x57;
            ask.data = vec![0; ask.len as usize];
            fill(stamp, first, &mut ask.data);
            ask.flags.fua = fua;
            Some(expected.write(sectors, stamp, fua, begun))
        }
        Operation::WriteZeroes => {
            ask.flags = Flags { fua, may_unmap: random.once_in(2), fast_only: false };
            Some(expected.write(sectors, 0, fua, begun))
        }
        Operation::Discard => Some(expected.discard(sectors, begun)),
        Operation::Flush => {
            (ask.offset, ask.len) = (0, 0);
            None
        }
        _ => None,
    };
    Out { receiver: client.submit(ask), operation, first, begun, number }
}

fn returned(out: &Out, answer: &Answer, recording: &Recording, expected: &mut Expected, load: &Load) {
    let now = recording.tick();
    match &answer.result {
        Err(error) if !load.may_fail => panic!("{error}"),
        // What a failed one has done is not known.
        Err(_) => return,
        Ok(()) => {}
    }
    match (out.operation, out.number) {
        (Operation::Read, _) => {
            let read = expected.check_read(out.first, &answer.data, out.begun, now);
            read.unwrap_or_else(|wrong| panic!("a read from {} to {now} is wrong: {wrong}", out.begun));
        }
        (Operation::Flush, _) => expected.flushed(out.begun, now),
        (_, Some(number)) => expected.ended(number, now),
        _ => {}
    }
}
