//! The content of files and the targets of symbolic links.

use std::iter::FusedIterator;
use std::ops::Range;

use super::inode::Inode;
use super::map::Runs;
use super::{Error, Filesystem, Place, Result};
use crate::format::FileType;
use crate::format::inode::flags;

/// Bytes that the target of a link can have, in an inode.
const FAST_LINK: u64 = 60;

impl Filesystem {
    /// Where a file has data, from a byte on: ranges of bytes in rising order, with a hole between two of them. Blocks
    /// that are allocated and were never written are holes.
    ///
    /// # Errors
    ///
    /// Those of the file's map, as they come.
    pub fn data<'a>(&'a self, inode: &'a Inode, from: u64) -> Result<Data<'a>> {
        let size = inode.size();
        if inode.has(flags::INLINE_DATA) {
            let end = (self.inline(inode)?.len() as u64).min(size);
            return Ok(Data {
                runs: None,
                ahead: (from < end).then_some(from..end),
                from,
                size,
                block_size: 1,
            });
        }
        let block_size = u64::from(self.geometry.block_size);
        let runs = self.runs(inode, from / block_size, size.div_ceil(block_size))?;
        Ok(Data { runs: Some(runs), ahead: None, from, size, block_size })
    }

    /// Reads a file from a byte on; fewer bytes than the buffer has at its end only.
    ///
    /// # Errors
    ///
    /// Those of reading, a damaged map, an encrypted file.
    pub fn read_at(&self, inode: &Inode, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        self.readable(inode)?;
        let left = inode.size().saturating_sub(offset);
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let buffer = &mut buffer[..length];
        if inode.has(flags::INLINE_DATA) {
            let content = self.inline(inode)?;
            let from = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
            let there = length.min(content.len() - from);
            buffer[..there].copy_from_slice(&content[from..from + there]);
            buffer[there..].fill(0);
            return Ok(length);
        }
        let block_size = u64::from(self.geometry.block_size);
        let end = offset + length as u64;
        let mut at = offset;
        // The part of the buffer that a range of the file goes to; both are within it.
        let place = |range: Range<u64>| {
            let within = |at: u64| usize::try_from(at - offset).unwrap_or(usize::MAX);
            within(range.start)..within(range.end)
        };
        for run in self.runs(inode, offset / block_size, end.div_ceil(block_size))? {
            let run = run?;
            let start = (run.logical * block_size).max(at);
            let stop = ((run.logical + run.length) * block_size).min(end);
            if start >= stop {
                continue;
            }
            buffer[place(at..start)].fill(0);
            let target = &mut buffer[place(start..stop)];
            if run.unwritten {
                target.fill(0);
            } else {
                self.blocks.read(run.physical * block_size + (start - run.logical * block_size), target)?;
            }
            at = stop;
        }
        buffer[place(at..end)].fill(0);
        Ok(length)
    }

    /// All of a file that has no more than `limit` bytes.
    ///
    /// # Errors
    ///
    /// Those of [`Filesystem::read_at`], and a file that has more.
    pub fn read_all(&self, inode: &Inode, limit: u64) -> Result<Vec<u8>> {
        let length = usize::try_from(inode.size()).unwrap_or(usize::MAX);
        if inode.size() > limit {
            let place = Place::Inode(inode.number());
            return Err(Error::corrupt(
                place,
                format!("it has {} bytes, {limit} at most make sense", inode.size()),
            ));
        }
        let mut content = vec![0; length];
        self.read_at(inode, 0, &mut content)?;
        Ok(content)
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    ///
    /// An inode that is no link, a target that is none, those of reading it.
    pub fn read_link(&self, inode: &Inode) -> Result<Vec<u8>> {
        let place = Place::Inode(inode.number());
        if inode.file_type() != FileType::Symlink {
            return Err(Error::corrupt(place, "it is no symbolic link"));
        }
        self.readable(inode)?;
        let xattrs = if inode.xattr_block() == 0 { 0 } else { self.cluster_size() };
        let outside = inode.has(flags::EXTENTS | flags::INLINE_DATA) || self.allocated(inode) > xattrs;
        let target = if !outside && inode.size() < FAST_LINK {
            let length = usize::try_from(inode.size()).unwrap_or(0);
            inode.fields().block[..length].to_vec()
        } else {
            self.read_all(inode, self.geometry.block_size.into())?
        };
        if target.is_empty() || target.contains(&0) {
            return Err(Error::corrupt(place, "it is a symbolic link to nothing"));
        }
        Ok(target)
    }

    /// The content that is in an inode, no longer than its size says. What is missing at its end is a hole: mke2fs keeps a
    /// file of nothing but a hole that way.
    pub(super) fn inline(&self, inode: &Inode) -> Result<Vec<u8>> {
        let mut content = inode.fields().block.to_vec();
        if inode.size() > content.len() as u64 {
            content.extend(self.inline_rest(inode)?);
        }
        content.truncate(usize::try_from(inode.size()).unwrap_or(usize::MAX));
        Ok(content)
    }

    /// Encrypted content is of no use to anybody.
    fn readable(&self, inode: &Inode) -> Result<()> {
        if inode.has(flags::ENCRYPT) {
            return Err(Error::unsupported(Place::Inode(inode.number()), "encryption"));
        }
        Ok(())
    }
}

/// The ranges of a file that hold data.
pub struct Data<'a> {
    runs: Option<Runs<'a>>,
    /// What was found and may go on.
    ahead: Option<Range<u64>>,
    from: u64,
    size: u64,
    block_size: u64,
}

impl Iterator for Data<'_> {
    type Item = Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        for run in self.runs.iter_mut().flatten() {
            let run = match run {
                Ok(run) if run.unwritten => continue,
                Ok(run) => run,
                Err(error) => {
                    self.ahead = None;
                    return Some(Err(error));
                }
            };
            let start = (run.logical * self.block_size).max(self.from);
            let end = ((run.logical + run.length) * self.block_size).min(self.size);
            if start >= end {
                continue;
            }
            match &mut self.ahead {
                Some(ahead) if ahead.end == start => ahead.end = end,
                Some(ahead) => return Some(Ok(std::mem::replace(ahead, start..end))),
                None => self.ahead = Some(start..end),
            }
        }
        self.ahead.take().map(Ok)
    }
}

impl FusedIterator for Data<'_> {}
