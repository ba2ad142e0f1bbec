//! Where blocks go: the image, or a file that holds them until the image's size is known.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::blocks::{Blocks, PIECE, Piece, SIZE, each_part};
use super::verify;
use crate::entry::Content;
use crate::error::Context;
use crate::plan::{BLOCK, Contents, Data, Run, Runs, push_run};
use crate::{Error, Progress, Result};

/// Blocks that follow each other: the first one's number, and how many.
pub(crate) type Extent = (u64, u64);

/// Gives out blocks, in rising order as far as it can.
pub(crate) trait Allocate {
    /// So many blocks; nothing where there are not as many.
    fn allocate(&mut self, blocks: u64) -> Result<Option<Vec<Extent>>>;
    /// Takes blocks back.
    fn release(&mut self, extent: Extent);
    /// Whether the blocks given out last may hold what was written to them before.
    fn gives_again(&self) -> bool {
        false
    }
    /// Whether they are the image's.
    const PLACED: bool;
}

/// Blocks one after the other, without end.
#[derive(Debug, Default)]
pub(crate) struct Endless(u64);

impl Allocate for Endless {
    const PLACED: bool = false;

    fn allocate(&mut self, blocks: u64) -> Result<Option<Vec<Extent>>> {
        let start = self.0;
        self.0 += blocks;
        Ok(Some(vec![(start, blocks)]))
    }

    fn release(&mut self, (start, count): Extent) {
        if start + count == self.0 {
            self.0 = start;
        }
    }
}

/// No blocks at all, for counting what would be needed.
#[derive(Debug)]
pub(crate) struct Nowhere;

impl Allocate for Nowhere {
    const PLACED: bool = true;

    fn allocate(&mut self, _blocks: u64) -> Result<Option<Vec<Extent>>> {
        Ok(None)
    }

    fn release(&mut self, _extent: Extent) {}
}

/// A file, and who gives out its blocks.
pub(crate) struct Store<A> {
    file: File,
    /// Where block 0 is in it.
    offset: u64,
    pub(crate) allocator: A,
    /// What was written last and is still here: it starts at a block and goes on.
    pending: (u64, Vec<u8>),
    /// Blocks for which there was no room.
    pub(crate) missing: u64,
    /// Where it is to be verified: a sum of the content of each file, by its first block.
    pub(crate) sums: Option<HashMap<u64, u32>>,
    digest: Sha256,
    blocks: Blocks,
}

impl<A: Allocate> Store<A> {
    pub(crate) fn new(file: File, offset: u64, allocator: A) -> Store<A> {
        let (pending, digest, blocks) = ((0, Vec::new()), Sha256::new(), Blocks::default());
        Store { file, offset, allocator, pending, missing: 0, sums: None, digest, blocks }
    }

    /// What stands for all content that was placed, in its order: good for telling trees apart, not against forgers.
    pub(crate) fn digest(&self) -> [u8; 32] {
        self.digest.clone().finalize().into()
    }

    /// Notes that content was placed by other means.
    pub(crate) fn note(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
    }

    /// The file, for those that share blocks with it.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Where a block is in the file.
    pub(crate) fn position(&self, block: u64) -> u64 {
        self.offset + block * BLOCK
    }

    /// Writes blocks to places of their own; nothing where there is no room, for which they are counted.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub(crate) fn place(&mut self, bytes: &[u8]) -> Result<Option<Vec<Extent>>> {
        let count = (bytes.len() / SIZE) as u64;
        if count == 0 {
            return Ok(Some(Vec::new()));
        }
        let Some(extents) = self.allocate(count)? else { return Ok(None) };
        let mut rest = bytes;
        for &(start, count) in &extents {
            let (now, later) = rest.split_at(usize::try_from(count).unwrap_or(0) * SIZE);
            self.write(start, now)?;
            rest = later;
        }
        Ok(Some(extents))
    }

    /// Gives out blocks whose content is written by other means.
    ///
    /// # Errors
    ///
    /// As [`Store::place`].
    pub(crate) fn allocate(&mut self, count: u64) -> Result<Option<Vec<Extent>>> {
        let extents = if self.missing > 0 { None } else { self.allocator.allocate(count)? };
        if extents.is_none() {
            self.missing += count;
        } else if self.allocator.gives_again() {
            // What is still to be written may be for who had them before.
            self.write_pending()?;
        }
        Ok(extents)
    }

    /// Writes bytes at a block; later, where they go on from the last ones.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub(crate) fn write(&mut self, block: u64, bytes: &[u8]) -> Result<()> {
        let (start, pending) = &mut self.pending;
        let next = *start + (pending.len() / SIZE) as u64;
        if pending.is_empty() || next != block || pending.len() + bytes.len() > PIECE {
            self.write_pending()?;
            if bytes.len() >= PIECE / 4 {
                return self.write_now(block, bytes);
            }
            self.pending.0 = block;
        }
        self.pending.1.extend_from_slice(bytes);
        Ok(())
    }

    fn write_pending(&mut self) -> Result<()> {
        let (start, bytes) = (self.pending.0, std::mem::take(&mut self.pending.1));
        if !bytes.is_empty() {
            self.write_now(start, &bytes)?;
        }
        self.pending.1 = bytes;
        self.pending.1.clear();
        Ok(())
    }

    fn write_now(&self, block: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, self.position(block)).at("write to", Path::new("the image"))
    }

    /// Places a part of a file and notes its runs; false where there was no room.
    ///
    /// # Errors
    ///
    /// Those of writing.
    pub(crate) fn place_part(&mut self, part: &Blocks, runs: &mut Vec<Run>) -> Result<bool> {
        self.note_part(crc32c::crc32c(&part.bytes), &part.pieces);
        let Some(extents) = self.place(&part.bytes)? else { return Ok(false) };
        assign(&part.pieces, &mut extents.into_iter(), &mut (0, 0), runs);
        Ok(true)
    }

    /// Goes on with a file's sum, where one is wanted.
    pub(crate) fn sum(&self, so_far: u32, bytes: &[u8], pieces: &[Piece]) -> u32 {
        if self.sums.is_some() { verify::sum(so_far, bytes, pieces) } else { so_far }
    }

    /// Keeps a file's sum.
    pub(crate) fn keep_sum(&mut self, runs: &[Run], sum: u32) {
        if let (Some(sums), Some(first)) = (&mut self.sums, runs.first()) {
            sums.insert(first.block, sum);
        }
    }

    /// Takes a part of a file into the digest, by the CRC-32C of its blocks.
    pub(crate) fn note_part(&mut self, sum: u32, pieces: &[Piece]) {
        self.digest.update(sum.to_le_bytes());
        for piece in pieces {
            self.digest.update(piece.logical.to_le_bytes());
            self.digest.update(piece.count.to_le_bytes());
        }
    }

    /// The content that has these runs.
    pub(crate) fn data(&self, runs: &[Run]) -> Data {
        match (runs.is_empty(), A::PLACED) {
            (true, _) => Data::Hole,
            (false, true) => Data::Placed(Runs::from(runs)),
            (false, false) => Data::Spooled(Runs::from(runs)),
        }
    }

    /// Takes runs back.
    pub(crate) fn release_runs(&mut self, runs: &[Run]) {
        for run in runs.iter().rev() {
            self.allocator.release((run.block, run.count.into()));
        }
    }
}

/// Gives pieces of a file their blocks, from `rest` and then from `extents`, which have as many as are needed.
pub(crate) fn assign(
    pieces: &[Piece],
    extents: &mut impl Iterator<Item = Extent>,
    rest: &mut Extent,
    runs: &mut Vec<Run>,
) {
    for piece in pieces {
        let (mut logical, mut left) = (piece.logical, piece.count);
        while left > 0 {
            if rest.1 == 0 {
                let Some(next) = extents.next() else { return };
                *rest = next;
                continue;
            }
            let count = u32::try_from(rest.1).unwrap_or(u32::MAX).min(left);
            push_run(runs, Run { logical, count, block: rest.0 });
            *rest = (rest.0 + u64::from(count), rest.1 - u64::from(count));
            (logical, left) = (logical + count, left - count);
        }
    }
}

impl<A: Allocate> Contents for Store<A> {
    fn put(&mut self, content: &mut dyn Content, path: &Path, progress: &mut dyn Progress) -> Result<Data> {
        let mut blocks = std::mem::take(&mut self.blocks);
        let (mut runs, mut sum) = (Vec::new(), 0);
        let read = each_part(content, &mut blocks, |part, read| {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            sum = self.sum(sum, &part.bytes, &part.pieces);
            self.place_part(part, &mut runs)?;
            progress.advance(read);
            Ok(())
        });
        self.blocks = blocks;
        read?.at("read", path)?;
        self.keep_sum(&runs, sum);
        Ok(self.data(&runs))
    }

    fn release(&mut self, data: &Data) {
        match (data, A::PLACED) {
            (Data::Placed(runs), true) | (Data::Spooled(runs), false) => self.release_runs(runs.as_slice()),
            _ => {}
        }
    }

    fn read(&self, data: &Data, size: usize) -> io::Result<Vec<u8>> {
        let mut all = vec![0; size];
        for run in data.runs() {
            let start = usize::try_from(run.bytes().start).unwrap_or(usize::MAX).min(size);
            let end = usize::try_from(run.bytes().end).unwrap_or(usize::MAX).min(size);
            self.file.read_exact_at(&mut all[start..end], self.position(run.block))?;
        }
        Ok(all)
    }

    fn flush(&mut self) -> Result<()> {
        self.write_pending()
    }

    fn is_full(&self) -> bool {
        self.missing > 0
    }
}

/// Content that is read, and of which nothing is kept.
pub(crate) struct Discard;

impl Contents for Discard {
    fn put(&mut self, content: &mut dyn Content, path: &Path, progress: &mut dyn Progress) -> Result<Data> {
        let read = each_part(content, &mut Blocks::default(), |_, read| {
            progress.advance(read);
            if progress.cancelled() { Err(Error::Interrupted) } else { Ok(()) }
        });
        read?.at("read", path)?;
        Ok(Data::Hole)
    }

    fn release(&mut self, _data: &Data) {}

    fn read(&self, _data: &Data, _size: usize) -> io::Result<Vec<u8>> {
        Err(io::Error::other("nothing is kept here"))
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    fn is_full(&self) -> bool {
        false
    }
}

/// Content in memory, for tests.
#[cfg(test)]
pub(crate) struct Memory;

#[cfg(test)]
impl Contents for Memory {
    fn put(&mut self, content: &mut dyn Content, _path: &Path, _progress: &mut dyn Progress) -> Result<Data> {
        let mut all = Vec::new();
        let mut blocks = Blocks::default();
        let read: Result<io::Result<()>> = each_part(content, &mut blocks, |part, _| {
            all.extend_from_slice(&part.bytes);
            Ok(())
        });
        read?.at("read", Path::new("content"))?;
        Ok(Data::Bytes(all.into()))
    }

    fn release(&mut self, _data: &Data) {}

    fn read(&self, _data: &Data, _size: usize) -> io::Result<Vec<u8>> {
        Err(io::Error::other("nothing is kept here"))
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    fn is_full(&self) -> bool {
        false
    }
}
