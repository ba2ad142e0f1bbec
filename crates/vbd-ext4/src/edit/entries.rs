//! One block of directory entries: found, added, taken away.

use zerocopy::FromBytes;

use super::{EditError, Result};
use crate::format::Ino;
use crate::format::directory::{EntryHeader, HEADER, needed, put, record_length, stored_record};
use crate::read::Place;

/// An entry in a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// Where it is in the block.
    pub(super) at: usize,
    /// Bytes to the next one.
    pub(super) record: usize,
    /// Its inode; 0 where it is not in use.
    pub(super) ino: Ino,
    pub(super) name: Vec<u8>,
    /// The number for its kind.
    pub(super) code: u8,
}

/// All entries of a block, those not in use too.
pub(super) fn entries(block: &[u8], place: Place) -> Result<Vec<Found>> {
    let size = u32::try_from(block.len()).expect("a block has at most 64 KiB");
    let mut found = Vec::new();
    let mut at = 0;
    while at < block.len() {
        let bad = || EditError::corrupt(place, format!("the entry at byte {at} is not one"));
        let header = EntryHeader::read_from_prefix(&block[at..]).map_err(|_| bad())?.0;
        let record = record_length(header.record.get(), size) as usize;
        let (ino, length) = (header.inode.get(), usize::from(header.name_length));
        let short = record < HEADER || ino != 0 && record < needed(length.max(1));
        if short || !record.is_multiple_of(4) || at + record > block.len() {
            return Err(bad());
        }
        let name = if ino == 0 { Vec::new() } else { block[at + HEADER..at + HEADER + length].to_vec() };
        found.push(Found { at, record, ino, name, code: header.file_type });
        at += record;
    }
    Ok(found)
}

fn set_record(block: &mut [u8], at: usize, record: usize) {
    let record = u32::try_from(record).expect("a block has at most 64 KiB");
    block[at + 4..at + 6].copy_from_slice(&stored_record(record).to_le_bytes());
}

/// Adds an entry to a block whose entries end at `room`, if there is a place for it.
pub(super) fn add(
    block: &mut [u8],
    room: usize,
    name: &[u8],
    ino: Ino,
    code: u8,
    place: Place,
) -> Result<bool> {
    let size = needed(name.len());
    for entry in entries(block, place)? {
        let used = if entry.ino == 0 { 0 } else { needed(entry.name.len()) };
        if entry.at >= room || entry.at + entry.record > room || entry.record - used < size {
            continue;
        }
        if used > 0 {
            set_record(block, entry.at, used);
        }
        put(block, entry.at + used, ino, entry.record - used, name, code);
        return Ok(true);
    }
    Ok(false)
}

/// Takes the entry at a place of a block away; the one before it takes its room.
pub(super) fn remove(block: &mut [u8], at: usize, place: Place) -> Result<()> {
    let all = entries(block, place)?;
    let Some(number) = all.iter().position(|entry| entry.at == at) else {
        return Err(EditError::corrupt(place, "an entry of it is not there any more"));
    };
    if number == 0 {
        block[at..at + 4].fill(0);
    } else {
        let before = &all[number - 1];
        set_record(block, before.at, before.record + all[number].record);
        block[at..at + HEADER].fill(0);
    }
    Ok(())
}

/// Has an entry lead to another inode.
pub(super) fn replace(block: &mut [u8], at: usize, ino: Ino, code: u8) {
    block[at..at + 4].copy_from_slice(&ino.to_le_bytes());
    block[at + 7] = code;
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place::Directory { inode: 2, block: 0 };

    fn names(block: &[u8]) -> Vec<String> {
        let all = entries(block, PLACE).unwrap();
        all.iter().filter(|e| e.ino != 0).map(|e| String::from_utf8(e.name.clone()).unwrap()).collect()
    }

    #[test]
    fn entries_come_and_go() {
        let mut block = vec![0; 64];
        put(&mut block, 0, 0, 52, b"", 0);
        put(&mut block, 52, 0, 12, b"", 0xde);
        for (name, fits) in [("one", true), ("two", true), ("three", true), ("f", true), ("five", false)] {
            assert_eq!(add(&mut block, 52, name.as_bytes(), 7, 1, PLACE).unwrap(), fits, "{name}");
        }
        assert_eq!(names(&block), ["one", "two", "three", "f"]);
        remove(&mut block, 12, PLACE).unwrap();
        assert_eq!(names(&block), ["one", "three", "f"]);
        assert!(add(&mut block, 52, b"four", 7, 1, PLACE).unwrap());
        remove(&mut block, 0, PLACE).unwrap();
        assert_eq!(names(&block), ["four", "three", "f"]);
        assert!(remove(&mut block, 4, PLACE).is_err());
        assert_eq!(entries(&block, PLACE).unwrap().last().unwrap().code, 0xde);
    }

    #[test]
    fn what_is_no_entry_is_refused() {
        for record in [0u16, 4, 10, 68] {
            let mut block = vec![0; 64];
            block[4..6].copy_from_slice(&record.to_le_bytes());
            assert!(entries(&block, PLACE).is_err(), "{record}");
        }
    }
}
