//! The inode tables: written in pieces, each as soon as all inodes of it are there.

use std::collections::BTreeMap;

use super::error::{Result, WriteError};
use super::layout::{INODE_SIZE, Layout};
use super::target::Target;
use crate::format::{Ino, Inode, Seed};

/// Inodes of a piece.
const PIECE: u32 = 256;
const SIZE: usize = INODE_SIZE as usize;

/// What a group says of its inodes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    pub(crate) used: u32,
    pub(crate) directories: u32,
    /// Inodes up to the last one in use.
    pub(crate) reached: u32,
}

/// The inodes on their way to the tables.
#[derive(Debug)]
pub(crate) struct Inodes {
    per_group: u32,
    count: u32,
    /// The first number not reserved yet.
    next: Ino,
    /// Which are in use, from inode 1 on.
    used: Vec<u64>,
    tallies: Vec<Tally>,
    /// Pieces that lack inodes, by group and number in the group.
    open: BTreeMap<(u32, u32), Piece>,
    seed: Seed,
}

#[derive(Debug)]
struct Piece {
    bytes: Vec<u8>,
    missing: u32,
}

impl Inodes {
    pub(crate) fn new(layout: &Layout, seed: Seed) -> Inodes {
        Inodes {
            per_group: layout.inodes_per_group,
            count: u32::try_from(layout.inodes()).expect("inode numbers have 32 bits"),
            next: layout.first_free_ino(),
            used: Vec::new(),
            tallies: vec![Tally::default(); layout.groups as usize],
            open: BTreeMap::new(),
            seed,
        }
    }

    /// The next number.
    pub(crate) fn reserve(&mut self) -> Result<Ino> {
        if self.next > self.count {
            return Err(WriteError::NoInodes(u64::from(self.count)));
        }
        self.next += 1;
        Ok(self.next - 1)
    }

    /// Whether a number is in use.
    pub(crate) fn is_used(&self, ino: Ino) -> bool {
        let (word, bit) = place(ino);
        self.used.get(word).is_some_and(|used| used & bit != 0)
    }

    /// Fails unless a number is reserved and not in use.
    pub(crate) fn is_to_come(&self, ino: Ino) -> Result<()> {
        if ino == 0 || ino >= self.next {
            return Err(WriteError::Inode { ino, why: "was not reserved" });
        }
        if self.is_used(ino) {
            return Err(WriteError::Inode { ino, why: "was written before" });
        }
        Ok(())
    }

    /// Says that a number is in use, without an inode of its own (those that are reserved are all zeros).
    pub(crate) fn mark(&mut self, ino: Ino, directory: bool) -> Result<()> {
        self.is_to_come(ino)?;
        let (word, bit) = place(ino);
        if self.used.len() <= word {
            self.used.resize(word + 1, 0);
        }
        self.used[word] |= bit;
        let tally = &mut self.tallies[((ino - 1) / self.per_group) as usize];
        tally.used += 1;
        tally.directories += u32::from(directory);
        tally.reached = tally.reached.max((ino - 1) % self.per_group + 1);
        Ok(())
    }

    /// Puts an inode, whole, into its table.
    pub(crate) fn put(
        &mut self,
        ino: Ino,
        mut bytes: [u8; SIZE],
        directory: bool,
        layout: &Layout,
        target: &mut Target,
    ) -> Result<()> {
        self.mark(ino, directory)?;
        Inode::seal(&mut bytes, ino, self.seed);
        let (group, index) = ((ino - 1) / self.per_group, (ino - 1) % self.per_group);
        let key = (group, index / PIECE);
        let length = PIECE.min(self.per_group - key.1 * PIECE);
        // Reserved ones that have no inode are missing for ever; their piece is written in the end.
        let piece = self
            .open
            .entry(key)
            .or_insert_with(|| Piece { bytes: vec![0; length as usize * SIZE], missing: length });
        let at = (index % PIECE) as usize * SIZE;
        piece.bytes[at..at + SIZE].copy_from_slice(&bytes);
        piece.missing -= 1;
        if piece.missing == 0 {
            let piece = self.open.remove(&key).expect("it was there");
            write(key, &piece.bytes, layout, target)?;
        }
        Ok(())
    }

    /// Writes all pieces not yet written.
    pub(crate) fn finish(&mut self, layout: &Layout, target: &mut Target) -> Result<()> {
        for (key, piece) in std::mem::take(&mut self.open) {
            // Blocks of zeros at the end are there already.
            let block = layout.block_size() as usize;
            let used = piece.bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            write(key, &piece.bytes[..used.next_multiple_of(block)], layout, target)?;
        }
        Ok(())
    }

    pub(crate) fn tally(&self, group: u32) -> Tally {
        self.tallies[group as usize]
    }

    /// Numbers in use.
    pub(crate) fn used(&self) -> u64 {
        self.tallies.iter().map(|tally| u64::from(tally.used)).sum()
    }

    /// A group's bitmap; bits beyond the group are set.
    pub(crate) fn bitmap(&self, group: u32, block: &mut [u8]) {
        let bytes = self.per_group as usize / 8;
        block[..bytes].fill(0);
        block[bytes..].fill(0xff);
        // A group's inodes are a multiple of 8: its bits begin at a byte.
        let from = group as usize * bytes;
        let words = self.used.get(from / 8..).unwrap_or_default().iter().flat_map(|word| word.to_le_bytes());
        let words = words.skip(from % 8);
        block.iter_mut().zip(words.take(bytes)).for_each(|(byte, bits)| *byte = bits);
    }
}

fn place(ino: Ino) -> (usize, u64) {
    let index = ino as usize - 1;
    (index / 64, 1 << (index % 64))
}

fn write(key: (u32, u32), bytes: &[u8], layout: &Layout, target: &Target) -> Result<()> {
    let in_block = layout.block_size() / INODE_SIZE;
    let block = layout.places[key.0 as usize].inode_table + u64::from(key.1 * PIECE / in_block);
    if bytes.is_empty() { Ok(()) } else { target.write_now(block, bytes) }
}
