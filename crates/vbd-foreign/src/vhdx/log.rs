//! The log of a VHDX (2.3): what a file that was not closed has to be given before its tables are read. Here that is done
//! in memory, and the file stays as it is.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use vbd_image::ReadAt;

use super::has_checksum;
use crate::FormatError;
use crate::bytes::{Fields, exactly};

/// The unit of everything in a log.
const SECTOR: u64 = 4096;
/// Where an entry's descriptors begin, and how long each is.
const ENTRY_HEADER: usize = 64;
const DESCRIPTOR: usize = 32;
/// The longest log that is read. Hyper-V and QEMU make one of 1 MiB.
const LONGEST: u32 = 64 << 20;
/// How many times the length of a log is summed up at most, while its entries are looked for: a good one once or twice.
const MOST_SUMS: u64 = 16;

/// What is changed by replaying a log: whole sectors, none of them twice.
#[derive(Debug, Default)]
pub(super) struct Changes(BTreeMap<u64, Change>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Change {
    /// Zeroes up to here.
    Zeroes(u64),
    /// The bytes of one sector.
    Sector(Box<[u8]>),
}

impl Change {
    fn end(&self, start: u64) -> u64 {
        match self {
            Change::Zeroes(end) => *end,
            Change::Sector(_) => start + SECTOR,
        }
    }
}

impl Changes {
    /// The last one that begins before `end`.
    fn last_before(&self, end: u64) -> Option<(u64, &Change)> {
        self.0.range(..end).next_back().map(|(start, change)| (*start, change))
    }

    /// Puts a later change in the place of earlier ones.
    fn put(&mut self, start: u64, change: Change) {
        let end = change.end(start);
        while let Some((at, old)) = self.last_before(end).filter(|(at, old)| old.end(*at) > start) {
            let stop = old.end(at);
            // Both are whole sectors, so that only zeroes are cut.
            self.0.remove(&at);
            if at < start {
                self.0.insert(at, Change::Zeroes(start));
            }
            if stop > end {
                self.0.insert(end, Change::Zeroes(stop));
            }
        }
        self.0.insert(start, change);
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether any byte of a range is changed.
    pub(super) fn touches(&self, range: Range<u64>) -> bool {
        self.last_before(range.end).is_some_and(|(at, change)| change.end(at) > range.start)
    }

    /// Changes bytes that were read from `offset` on.
    fn apply(&self, offset: u64, bytes: &mut [u8]) {
        let mut end = offset.saturating_add(bytes.len() as u64);
        while let Some((at, change)) = self.last_before(end).filter(|(at, change)| change.end(*at) > offset) {
            let (start, stop) = (at.max(offset), change.end(at).min(end));
            let index = |at: u64, from: u64| usize::try_from(at - from).unwrap_or(usize::MAX);
            let target = &mut bytes[index(start, offset)..index(stop, offset)];
            match change {
                Change::Zeroes(_) => target.fill(0),
                Change::Sector(content) => {
                    target.copy_from_slice(&content[index(start, at)..index(stop, at)]);
                }
            }
            end = at;
        }
    }
}

/// A file as it is after its log was replayed.
pub(super) struct Replayed<'a, S: ?Sized> {
    pub(super) source: &'a S,
    pub(super) changes: &'a Changes,
}

impl<S: ReadAt + ?Sized> ReadAt for Replayed<'_, S> {
    fn fill_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let filled = self.source.fill_at(offset, buffer)?;
        self.changes.apply(offset, &mut buffer[..filled]);
        Ok(filled)
    }
}

/// A valid entry (2.3.1), which begins at some offset of the log.
struct Entry {
    number: u64,
    /// Bytes of it.
    len: u64,
    /// Where the oldest entry is that has to be replayed with it.
    tail: u64,
    /// The file was durable up to here when it was written.
    flushed: u64,
}

struct Log {
    bytes: Vec<u8>,
    guid: [u8; 16],
    /// Bytes that may still be summed up.
    sums: u64,
}

impl Log {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Bytes of the ring, which may go on at its start.
    fn part(&self, at: u64, len: u64) -> Vec<u8> {
        let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
        let first = len.min(self.len() - at);
        let mut part = self.bytes[index(at)..index(at + first)].to_vec();
        part.extend_from_slice(&self.bytes[..index(len - first)]);
        part
    }

    /// The entry at an offset, if there is a good one. An error where looking takes too long.
    fn entry(&mut self, at: u64) -> Result<Option<Entry>, FormatError> {
        let header = self.part(at, SECTOR);
        let fields = Fields(&header);
        let (len, tail) = (u64::from(fields.u32(8)), u64::from(fields.u32(12)));
        let (number, count) = (fields.u64(16), u64::from(fields.u32(24)));
        let is_aligned = |value: u64| value.is_multiple_of(SECTOR);
        let good = header.starts_with(b"loge")
            && fields.guid(32) == self.guid
            && number != 0
            && is_aligned(len)
            && (SECTOR..=self.len()).contains(&len)
            && is_aligned(tail)
            && tail < self.len()
            && descriptors_len(count) <= len;
        if !good {
            return Ok(None);
        }
        self.sums = self.sums.checked_sub(len).ok_or_else(|| {
            FormatError::value(
                "the log",
                "a tangle of entries",
                "entries that follow each other are expected",
            )
        })?;
        let bytes = self.part(at, len);
        let flushed = fields.u64(48);
        Ok((has_checksum(&bytes) && self.is_whole(&bytes)).then_some(Entry { number, len, tail, flushed }))
    }

    /// Whether descriptors and sectors are those of this entry.
    fn is_whole(&self, entry: &[u8]) -> bool {
        let fields = Fields(entry);
        let (number, count) = (fields.u64(16), u64::from(fields.u32(24)));
        let mut sectors = 0;
        for descriptor in descriptors(entry) {
            let offset = descriptor.u64(16);
            let good = match &descriptor.0[..4] {
                b"zero" => {
                    let len = descriptor.u64(8);
                    len.is_multiple_of(SECTOR) && offset.checked_add(len).is_some()
                }
                b"desc" => {
                    sectors += 1;
                    offset.checked_add(SECTOR).is_some()
                }
                _ => false,
            };
            if !good || !offset.is_multiple_of(SECTOR) || descriptor.u64(24) != number {
                return false;
            }
        }
        let data = &entry[usize::try_from(descriptors_len(count)).unwrap_or(usize::MAX).min(entry.len())..];
        let (data, _) = data.as_chunks::<4096>();
        let is_ours = |sector: &[u8; 4096]| {
            let fields = Fields(sector);
            let its = u64::from(fields.u32(4)) << 32 | u64::from(fields.u32(4092));
            sector.starts_with(b"data") && its == number
        };
        data.len() >= sectors && data.iter().take(sectors).all(is_ours)
    }

    /// The newest sequence of entries that is complete (2.3.2): where it begins, and its last entry.
    fn active(&mut self) -> Result<Option<(u64, Entry)>, FormatError> {
        let mut newest: Option<(u64, Entry)> = None;
        let mut start = 0;
        while start < self.len() {
            // As many as follow each other, by their numbers.
            let (mut at, mut starts) = (start, Vec::new());
            let mut last: Option<Entry> = None;
            let mut taken = 0;
            while taken < self.len()
                && let Some(entry) = self.entry(at)?
                && last.as_ref().is_none_or(|last| last.number.checked_add(1) == Some(entry.number))
                && taken + entry.len <= self.len()
            {
                starts.push(at);
                taken += entry.len;
                at = (at + entry.len) % self.len();
                last = Some(entry);
            }
            let Some(last) = last else {
                start += SECTOR;
                continue;
            };
            if starts.contains(&last.tail)
                && newest.as_ref().is_none_or(|(_, newest)| last.number > newest.number)
            {
                newest = Some((last.tail, last));
            }
            start += taken;
        }
        Ok(newest)
    }
}

/// The bytes of an entry's header and descriptors: whole sectors.
fn descriptors_len(count: u64) -> u64 {
    (ENTRY_HEADER as u64 + count * DESCRIPTOR as u64).next_multiple_of(SECTOR)
}

fn descriptors(entry: &[u8]) -> impl Iterator<Item = Fields<'_>> {
    let count = usize::try_from(Fields(entry).u32(24)).unwrap_or(usize::MAX);
    entry[ENTRY_HEADER..].chunks_exact(DESCRIPTOR).take(count).map(Fields)
}

/// Reads the log that a header names, of a file of `file_len` bytes; gives what replaying it changes.
///
/// # Errors
/// There is no good log, or the file is shorter than it says; or it cannot be read.
pub(super) fn read(
    source: &(impl ReadAt + ?Sized),
    header: &Fields<'_>,
    file_len: u64,
) -> Result<Changes, FormatError> {
    let (guid, version, len, offset) = (header.guid(48), header.u16(64), header.u32(68), header.u64(72));
    if version != 0 {
        return Err(FormatError::value("the version of the log", version, "0 is known"));
    }
    let is_placed = offset >= 1 << 20 && offset.is_multiple_of(1 << 20);
    if len == 0 || !len.is_multiple_of(1 << 20) || !is_placed {
        return Err(FormatError::value(
            "the place of the log",
            offset,
            "whole MiB behind the first are expected",
        ));
    }
    if len > LONGEST {
        let message = "its log is longer than is replayed here (64 MiB): open it once with Hyper-V";
        return Err(FormatError::Unsupported(message.into()));
    }
    let bytes = exactly(source, offset, usize::try_from(len).unwrap_or(usize::MAX), "the log")?;
    replay(bytes, guid, file_len)
}

fn replay(bytes: Vec<u8>, guid: [u8; 16], file_len: u64) -> Result<Changes, FormatError> {
    let sums = bytes.len() as u64 * MOST_SUMS;
    let mut log = Log { bytes, guid, sums };
    let Some((mut at, last)) = log.active()? else {
        return Err(FormatError::value(
            "the log",
            "without a whole sequence",
            "there has to be one: the image is damaged",
        ));
    };
    if last.flushed > file_len {
        return Err(FormatError::Truncated("what its log builds on"));
    }
    let mut changes = Changes::default();
    // Each was looked at before; once more around is the most there can be.
    let mut left = log.len();
    while left > 0 {
        let len = u64::from(Fields(&log.part(at, SECTOR)).u32(8)).max(SECTOR);
        let entry = log.part(at, len.min(log.len()));
        replay_entry(&entry, &mut changes);
        if Fields(&entry).u64(16) == last.number {
            return Ok(changes);
        }
        left = left.saturating_sub(len);
        at = (at + len) % log.len();
    }
    Err(FormatError::value("the log", "without an end", "its last entry is expected"))
}

fn replay_entry(entry: &[u8], changes: &mut Changes) {
    let count = u64::from(Fields(entry).u32(24));
    let data = &entry[usize::try_from(descriptors_len(count)).unwrap_or(usize::MAX).min(entry.len())..];
    let mut sectors = data.as_chunks::<4096>().0.iter();
    for descriptor in descriptors(entry) {
        let offset = descriptor.u64(16);
        if descriptor.0.starts_with(b"zero") {
            let len = descriptor.u64(8);
            if len > 0 {
                changes.put(offset, Change::Zeroes(offset + len));
            }
        } else if let Some(sector) = sectors.next() {
            // Its first eight bytes and its last four made room for marks.
            let content = [&descriptor.0[8..16], &sector[8..4092], &descriptor.0[4..8]].concat();
            changes.put(offset, Change::Sector(content.into()));
        }
    }
}

/// Bytes as a log whose entries have good checksums, for the fuzzer, and what is made of them compared with plain bytes.
pub(super) fn fuzz(bytes: &[u8]) {
    let mut log = bytes.to_vec();
    log.resize(bytes.len().next_multiple_of(4096).clamp(4096, 1 << 20), 0);
    let guid = Fields(&log).guid(32);
    for at in (0..log.len()).step_by(4096) {
        let len = usize::try_from(Fields(&log[at..]).u32(8)).unwrap_or(usize::MAX);
        if log[at..].starts_with(b"loge") && len >= 4096 && len <= log.len() - at {
            log[at + 4..at + 8].fill(0);
            let crc = crc32c::crc32c(&log[at..at + len]);
            log[at + 4..at + 8].copy_from_slice(&crc.to_le_bytes());
        }
    }
    let Ok(changes) = replay(log, guid, 1 << 20) else { return };
    let mut before = 0;
    for (start, change) in &changes.0 {
        assert!(*start >= before && change.end(*start) > *start, "changes overlap");
        before = change.end(*start);
    }
    let plain = vec![1; 64 << 10];
    let replayed = Replayed { source: &plain[..], changes: &changes };
    let (mut all, mut parts) = (vec![0; plain.len()], vec![0; plain.len()]);
    let _ = replayed.fill_at(0, &mut all);
    for (index, part) in parts.chunks_mut(1000).enumerate() {
        let _ = replayed.fill_at(index as u64 * 1000, part);
    }
    assert_eq!(all, parts, "what is read depends on how");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GUID: [u8; 16] = [7; 16];

    /// What an entry does: a sector's bytes, or so many sectors of zeroes.
    type Step = (u64, Result<u8, u64>);

    fn entry(number: u64, tail: u64, steps: &[Step]) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(descriptors_len(steps.len() as u64)).unwrap()];
        for (index, (sector, what)) in steps.iter().enumerate() {
            let at = ENTRY_HEADER + index * DESCRIPTOR;
            bytes[at + 16..at + 24].copy_from_slice(&(sector * SECTOR).to_le_bytes());
            bytes[at + 24..at + 32].copy_from_slice(&number.to_le_bytes());
            match what {
                Err(count) => {
                    bytes[at..at + 4].copy_from_slice(b"zero");
                    bytes[at + 8..at + 16].copy_from_slice(&(count * SECTOR).to_le_bytes());
                }
                Ok(byte) => {
                    bytes[at..at + 4].copy_from_slice(b"desc");
                    bytes[at + 4..at + 16].fill(*byte);
                    let mut data = vec![*byte; 4096];
                    data[..4].copy_from_slice(b"data");
                    data[4..8].copy_from_slice(&number.to_le_bytes()[4..]);
                    data[4092..].copy_from_slice(&number.to_le_bytes()[..4]);
                    bytes.extend(data);
                }
            }
        }
        let len = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(b"loge");
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..16].copy_from_slice(&u32::try_from(tail).unwrap().to_le_bytes());
        bytes[16..24].copy_from_slice(&number.to_le_bytes());
        bytes[24..28].copy_from_slice(&u32::try_from(steps.len()).unwrap().to_le_bytes());
        bytes[32..48].copy_from_slice(&GUID);
        let crc = crc32c::crc32c(&bytes);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// A ring of `len` bytes, with these entries one after the other from an offset on.
    fn ring(len: usize, mut at: usize, entries: &[Vec<u8>]) -> Vec<u8> {
        let mut log = vec![0; len];
        for byte in entries.iter().flatten() {
            log[at % len] = *byte;
            at += 1;
        }
        log
    }

    fn content(changes: &Changes) -> Vec<u8> {
        let plain = vec![1; 32 * 4096];
        let mut all = vec![0; plain.len()];
        Replayed { source: &plain[..], changes }.fill_at(0, &mut all).unwrap();
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn entries_are_replayed_in_order_wherever_the_ring_begins(
            start in 0usize..64,
            first in 1u64..1 << 60,
            entries in prop::collection::vec(
                prop::collection::vec((0u64..32, prop_oneof![(2u8..255).prop_map(Ok), (0u64..20).prop_map(Err)]), 0..6),
                1..6,
            ),
            reads in prop::collection::vec((0usize..32 * 4096, 0usize..20_000), 1..8),
        ) {
            let len = 64 * 4096;
            let at = start * 4096;
            let written: Vec<_> = (first..).zip(&entries).map(|(n, steps)| entry(n, at as u64, steps)).collect();
            let changes = replay(ring(len, at, &written), GUID, 0).unwrap();
            let mut model = vec![1; 32 * 4096];
            for (sector, what) in entries.iter().flatten() {
                let (count, byte) = match what { Ok(byte) => (1, *byte), Err(count) => (*count, 0) };
                let end = (sector + count).min(32);
                model[usize::try_from(sector * 4096).unwrap()..usize::try_from(end * 4096).unwrap()].fill(byte);
            }
            prop_assert!(content(&changes) == model);
            let plain = vec![1; 32 * 4096];
            let replayed = Replayed { source: &plain[..], changes: &changes };
            for (at, len) in reads {
                let end = (at + len).min(model.len());
                let mut part = vec![0; end - at];
                prop_assert_eq!(replayed.fill_at(at as u64, &mut part).unwrap(), end - at);
                prop_assert!(part == model[at..end]);
                let sectors = at / 4096..end.div_ceil(4096);
                let changed = sectors.into_iter().any(|sector| {
                    entries.iter().flatten().any(|(first, what)| {
                        let count = what.err().unwrap_or(1);
                        (*first..first + count).contains(&(sector as u64))
                    })
                });
                prop_assert_eq!(end > at && changed, end > at && changes.touches(at as u64..end as u64));
            }
        }

        #[test]
        fn no_bytes_break_it(
            mut bytes in prop::collection::vec(any::<u8>(), 4096..20_000),
            entries in prop::collection::vec((0usize..5, 1u64..4, 0u64..5, 0u32..200), 0..6),
        ) {
            for (at, number, tail, count) in entries {
                let made = entry(number, tail * 4096, &[(3, Ok(9)), (5, Err(2))]);
                let at = at * 4096;
                let end = (at + made.len()).min(bytes.len());
                if at < end {
                    bytes[at..end].copy_from_slice(&made[..end - at]);
                    if count > 2 && end > at + 28 {
                        bytes[at + 24..at + 28].copy_from_slice(&count.to_le_bytes());
                    }
                }
            }
            fuzz(&bytes);
        }
    }

    #[test]
    fn the_newest_whole_sequence_counts_and_torn_entries_do_not() {
        let len = 64 * 4096;
        let old = [entry(5, 0, &[(1, Ok(5))]), entry(6, 0, &[(2, Ok(6))])];
        let new = [entry(9, 32 * 4096, &[(1, Ok(9))]), entry(10, 32 * 4096, &[(3, Ok(10))])];
        let mut log = ring(len, 0, &old);
        let both = ring(len, 32 * 4096, &new);
        log[32 * 4096..].copy_from_slice(&both[32 * 4096..]);
        let sector =
            |log: &[u8], sector: usize| content(&replay(log.to_vec(), GUID, 0).unwrap())[sector * 4096 + 100];
        assert_eq!([1, 2, 3].map(|at| sector(&log, at)), [9, 1, 10]);
        // The last entry was being written when the power went.
        let mut torn = log.clone();
        torn[32 * 4096 + new[0].len() + 5000] ^= 1;
        assert_eq!([1, 2, 3].map(|at| sector(&torn, at)), [9, 1, 1]);
        // The first of a sequence is missing: what is left is none, and the older one counts.
        let mut headless = log.clone();
        headless[32 * 4096] = 0;
        assert_eq!([1, 2, 3].map(|at| sector(&headless, at)), [5, 6, 1]);
        // Another log's.
        assert!(replay(log.clone(), [8; 16], 0).is_err());
        assert!(replay(vec![0; len], GUID, 0).is_err());
    }

    #[test]
    fn a_file_that_is_shorter_than_its_log_says_is_refused() {
        let mut made = entry(1, 0, &[(1, Ok(5))]);
        made[48..56].copy_from_slice(&(1u64 << 20).to_le_bytes());
        made[4..8].fill(0);
        let crc = crc32c::crc32c(&made);
        made[4..8].copy_from_slice(&crc.to_le_bytes());
        let log = ring(64 * 4096, 0, &[made]);
        assert!(matches!(replay(log.clone(), GUID, (1 << 20) - 1), Err(FormatError::Truncated(_))));
        replay(log, GUID, 1 << 20).unwrap();
    }

    #[test]
    fn a_log_that_takes_too_long_to_sum_up_is_given_up() {
        // Every sector begins an entry that is as long as the log, and whose checksum is wrong.
        let len = 1 << 20;
        let mut log = vec![0; len];
        for sector in log.chunks_exact_mut(4096) {
            let mut header = entry(1, 0, &[]);
            header[8..12].copy_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
            sector.copy_from_slice(&header);
        }
        let error = replay(log, GUID, 0).unwrap_err();
        assert!(error.to_string().contains("tangle"), "{error}");
    }
}
