//! One block of directory entries: found, added, taken away.

use zerocopy::FromBytes;

use super::{EditError, Result};
use crate::format::Ino;
use crate::format::directory::{EntryHeader, HEADER, needed, put, record_length, stored_record};
use crate::read::Place;

/// An entry in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found<'a> {
    /// Where it is in the block.
    pub(super) at: usize,
    /// Bytes to the next one.
    pub(super) record: usize,
    /// Its inode; 0 where it is not in use.
    pub(super) ino: Ino,
    /// Nothing where it is not in use.
    pub(super) name: &'a [u8],
    /// The number for its kind.
    pub(super) code: u8,
}

/// The entries of a block, those not in use too. Ends after the first error.
pub(super) struct Entries<'a> {
    block: &'a [u8],
    place: Place,
    at: usize,
}

/// All entries of a block.
pub(super) fn entries(block: &[u8], place: Place) -> Entries<'_> {
    Entries { block, place, at: 0 }
}

impl<'a> Entries<'a> {
    fn parse(&self) -> Result<Found<'a>> {
        let (block, at) = (self.block, self.at);
        let size = u32::try_from(block.len()).expect("a block has at most 64 KiB");
        let bad = || EditError::corrupt(self.place, format!("the entry at byte {at} is not one"));
        let header = EntryHeader::read_from_prefix(&block[at..]).map_err(|_| bad())?.0;
        let record = record_length(header.record.get(), size) as usize;
        let (ino, length) = (header.inode.get(), usize::from(header.name_length));
        let short = record < HEADER || ino != 0 && record < needed(length.max(1));
        if short || !record.is_multiple_of(4) || at + record > block.len() {
            return Err(bad());
        }
        let name = if ino == 0 { &[][..] } else { &block[at + HEADER..at + HEADER + length] };
        Ok(Found { at, record, ino, name, code: header.file_type })
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Found<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.block.len() {
            return None;
        }
        let found = self.parse();
        self.at = found.as_ref().map_or(self.block.len(), |found| self.at + found.record);
        Some(found)
    }
}

/// Looks for a name in a block: where it is, and its inode.
pub(super) fn find(block: &[u8], name: &[u8], place: Place) -> Result<Option<(usize, Ino)>> {
    for entry in entries(block, place) {
        let entry = entry?;
        if entry.ino != 0 && entry.name == name {
            return Ok(Some((entry.at, entry.ino)));
        }
    }
    Ok(None)
}

fn set_record(block: &mut [u8], at: usize, record: usize) {
    let record = u32::try_from(record).expect("a block has at most 64 KiB");
    block[at + 4..at + 6].copy_from_slice(&stored_record(record).to_le_bytes());
}

/// Where an entry for a name would go in a block whose entries end at `room`: the entry that has room for it, how much of
/// that is its own, and all of it.
fn room_for(block: &[u8], room: usize, name: &[u8], place: Place) -> Result<Option<(usize, usize, usize)>> {
    let size = needed(name.len());
    for entry in entries(block, place) {
        let entry = entry?;
        let used = if entry.ino == 0 { 0 } else { needed(entry.name.len()) };
        if entry.at < room && entry.at + entry.record <= room && entry.record - used >= size {
            return Ok(Some((entry.at, used, entry.record)));
        }
    }
    Ok(None)
}

/// Whether [`add`] finds a place for a name.
pub(super) fn has_room(block: &[u8], room: usize, name: &[u8], place: Place) -> Result<bool> {
    Ok(room_for(block, room, name, place)?.is_some())
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
    let Some((at, used, record)) = room_for(block, room, name, place)? else { return Ok(false) };
    if used > 0 {
        set_record(block, at, used);
    }
    put(block, at + used, ino, record - used, name, code);
    Ok(true)
}

/// Takes the entry at a place of a block away; the one before it takes its room.
pub(super) fn remove(block: &mut [u8], at: usize, place: Place) -> Result<()> {
    let mut before: Option<(usize, usize)> = None;
    for entry in entries(block, place) {
        let entry = entry?;
        if entry.at != at {
            before = Some((entry.at, entry.record));
            continue;
        }
        let record = entry.record;
        match before {
            None => block[at..at + 4].fill(0),
            Some((first, length)) => {
                set_record(block, first, length + record);
                block[at..at + HEADER].fill(0);
            }
        }
        return Ok(());
    }
    Err(EditError::corrupt(place, "an entry of it is not there any more"))
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
        let all = entries(block, PLACE).map(Result::unwrap);
        all.filter(|e| e.ino != 0).map(|e| String::from_utf8(e.name.to_vec()).unwrap()).collect()
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
        assert_eq!(entries(&block, PLACE).last().unwrap().unwrap().code, 0xde);
        assert_eq!(find(&block, b"f", PLACE).unwrap().map(|(_, ino)| ino), Some(7));
        assert_eq!(find(&block, b"five", PLACE).unwrap(), None);
    }

    #[test]
    fn what_is_no_entry_is_refused() {
        for record in [0u16, 4, 10, 68] {
            let mut block = vec![0; 64];
            block[4..6].copy_from_slice(&record.to_le_bytes());
            assert!(entries(&block, PLACE).any(|entry| entry.is_err()), "{record}");
        }
    }
}
