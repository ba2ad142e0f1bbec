//! States that a power cut may leave files in.
#![allow(clippy::cast_possible_truncation, reason = "files of tests are small")]

use std::collections::HashSet;

use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE};
use vbd_core::file::Change;

use super::recording::{Entry, Instant, Recording};
use crate::Random;

/// What becomes of changes that no flush has covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// All that had begun is there.
    Everything,
    /// Nothing is there that was not flushed.
    Nothing,
    /// Some of them, each whole.
    Some,
    /// Some of them, and of writes some blocks of this many bytes: 512 or 4096.
    Torn(usize),
    /// All but one.
    AllButOne,
    /// One alone.
    OneAlone,
}

impl Cut {
    /// All ways.
    pub const ALL: [Cut; 7] = [
        Cut::Everything,
        Cut::Nothing,
        Cut::Some,
        Cut::Torn(512),
        Cut::Torn(4096),
        Cut::AllButOne,
        Cut::OneAlone,
    ];
}

impl Recording {
    /// What the files hold where the power goes at this time, in this way, as `random` has it.
    pub fn crash(&self, at: usize, cut: Cut, random: &mut Random) -> Vec<Vec<u8>> {
        let log = self.log();
        // What failed has done nothing.
        let happened = log.entries.iter().enumerate().filter(|(_, entry)| {
            entry.begun < at
                && entry.change != Change::Sync
                && entry.ended_by(at).is_none_or(|result| result >= 0)
        });
        let happened: Vec<(usize, &Entry)> = happened.collect();
        let flushes: Vec<&Entry> = log.entries.iter().filter(|entry| entry.is_flush_by(at)).collect();
        let last_flush: Vec<Option<Instant>> = (0..log.files.len())
            .map(|file| flushes.iter().filter(|flush| flush.file == file).map(|flush| flush.begun).max())
            .collect();
        let is_durable = |entry: &Entry| match entry.ended {
            Some((ended, _)) if ended < at => {
                entry.is_durable_itself() || last_flush[entry.file].is_some_and(|flush| ended < flush)
            }
            _ => false,
        };
        let open: Vec<usize> =
            happened.iter().filter(|(_, entry)| !is_durable(entry)).map(|(index, _)| *index).collect();
        let kept = choose(&open, cut, random);
        let mut order: Vec<(Instant, u64, usize)> = happened
            .iter()
            .map(|&(index, entry)| {
                // Changes that overlapped in time may have come in either order, but only in one: the same in every state.
                let end = entry.ended.map_or(at, |(ended, _)| ended.min(at));
                let mut choice = Random::new((index as u64) << 48 ^ (entry.begun as u64) << 24 ^ end as u64);
                let instant = entry.begun + choice.index(end - entry.begun + 1);
                (instant, choice.next_u64(), index)
            })
            .collect();
        order.sort_unstable();
        let mut files = log.files.clone();
        for (_, _, index) in order {
            let entry = &log.entries[index];
            let tear = match cut {
                Cut::Torn(block) if !is_durable(entry) => Some((block, &mut *random)),
                _ => None,
            };
            if is_durable(entry) || kept.contains(&index) {
                apply(&mut files[entry.file], &entry.done(), tear);
            }
        }
        files
    }
}

impl Entry {
    fn ended_by(&self, at: Instant) -> Option<i32> {
        self.ended.filter(|(ended, _)| *ended < at).map(|(_, result)| result)
    }

    fn is_flush_by(&self, at: Instant) -> bool {
        self.change == Change::Sync && self.ended_by(at).is_some_and(|result| result >= 0)
    }

    pub(super) fn is_durable_itself(&self) -> bool {
        matches!(self.change, Change::Write { durable: true, .. })
    }

    /// What was done: of a write that ended early, less than was asked for.
    fn done(&self) -> Change {
        match (&self.change, self.ended) {
            (Change::Write { offset, data, durable }, Some((_, result))) => {
                let len = usize::try_from(result).unwrap_or(0).min(data.len());
                Change::Write { offset: *offset, data: data[..len].to_vec(), durable: *durable }
            }
            (change, _) => change.clone(),
        }
    }
}

fn choose(open: &[usize], cut: Cut, random: &mut Random) -> HashSet<usize> {
    let one = (!open.is_empty()).then(|| *random.one_of(open));
    // Now few, now most.
    let odds = *random.one_of(&[10, 50, 90]);
    let all = open.iter().copied();
    match cut {
        Cut::Everything => all.collect(),
        Cut::Nothing => HashSet::new(),
        Cut::Some | Cut::Torn(_) => all.filter(|_| random.below(100) < odds).collect(),
        Cut::AllButOne => all.filter(|index| Some(*index) != one).collect(),
        Cut::OneAlone => one.into_iter().collect(),
    }
}

/// Does a change to a file; of a write only some blocks of so many bytes, where it is torn.
pub(super) fn apply(bytes: &mut Vec<u8>, change: &Change, tear: Option<(usize, &mut Random)>) {
    match change {
        Change::Write { offset, data, .. } => write(bytes, *offset as usize, data, tear),
        Change::Length(len) => bytes.resize(*len as usize, 0),
        Change::Space { mode, offset, len } => {
            let (start, end) = (*offset as usize, (*offset + *len) as usize);
            if mode & FALLOC_FL_KEEP_SIZE == 0 && bytes.len() < end {
                bytes.resize(end, 0);
            }
            if mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE) != 0 {
                let end = end.min(bytes.len());
                bytes[start.min(end)..end].fill(0);
            }
        }
        Change::Sync => {}
    }
}

fn write(bytes: &mut Vec<u8>, start: usize, data: &[u8], tear: Option<(usize, &mut Random)>) {
    let mut put = |at: usize, data: &[u8]| {
        if bytes.len() < at + data.len() {
            bytes.resize(at + data.len(), 0);
        }
        bytes[at..at + data.len()].copy_from_slice(data);
    };
    let Some((block, random)) = tear else { return put(start, data) };
    let odds = *random.one_of(&[20, 50, 100]);
    // Blocks of the storage, not of the write.
    let mut at = 0;
    while at < data.len() {
        let len = (block - (start + at) % block).min(data.len() - at);
        if random.below(100) < odds {
            put(start + at, &data[at..at + len]);
        }
        at += len;
    }
}
