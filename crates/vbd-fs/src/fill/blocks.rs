//! Content cut into blocks, without those that are all zeros.

use std::io;

use crate::entry::Content;
use crate::plan::BLOCK;
use crate::zeros::is_zero;

/// Bytes in a block, as an index.
pub(crate) const SIZE: usize = 4096;
/// Bytes that are read, and written, at once.
pub(crate) const PIECE: usize = 1 << 20;

/// Blocks that follow each other in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The first one's number in the file.
    pub(crate) logical: u32,
    pub(crate) count: u32,
}

/// Blocks with data, one after another, and which of the file they are.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    pub(crate) bytes: Vec<u8>,
    pub(crate) pieces: Vec<Piece>,
}

impl Blocks {
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.pieces.clear();
    }

    /// Takes `bytes` from `start` on for the blocks of a file from `logical` on: fills the last block up with zeros, and
    /// takes out those that are nothing else.
    pub(crate) fn seal(&mut self, start: usize, logical: u64) -> io::Result<()> {
        self.bytes.resize(start + (self.bytes.len() - start).next_multiple_of(SIZE), 0);
        let mut to = start;
        for from in (start..self.bytes.len()).step_by(SIZE) {
            if is_zero(&self.bytes[from..from + SIZE]) {
                continue;
            }
            if to != from {
                self.bytes.copy_within(from..from + SIZE, to);
            }
            to += SIZE;
            self.push(logical + ((from - start) / SIZE) as u64)?;
        }
        self.bytes.truncate(to);
        Ok(())
    }

    fn push(&mut self, logical: u64) -> io::Result<()> {
        let logical = block_number(logical)?;
        match self.pieces.last_mut() {
            Some(last) if last.logical + last.count == logical => last.count += 1,
            _ => self.pieces.push(Piece { logical, count: 1 }),
        }
        Ok(())
    }
}

/// A block's number in a file, which has 32 bits (and the last number is none).
pub(crate) fn block_number(logical: u64) -> io::Result<u32> {
    u32::try_from(logical).ok().filter(|&logical| logical < u32::MAX).ok_or_else(|| {
        io::Error::new(io::ErrorKind::FileTooLarge, "a file has at most 16 TiB in this filesystem")
    })
}

/// Reads content to its end, and hands it on in parts of at most [`PIECE`] bytes.
///
/// # Errors
///
/// The first error of the content (`Ok(Err(..))`), or of `take`.
pub(crate) fn each_part<E>(
    content: &mut dyn Content,
    blocks: &mut Blocks,
    mut take: impl FnMut(&mut Blocks, u64) -> Result<(), E>,
) -> Result<io::Result<()>, E> {
    blocks.clear();
    // The run of bytes that is being gathered: where it starts in `bytes` and in the file, and what was read of it.
    let (mut start, mut logical, mut read) = (0, 0, 0u64);
    macro_rules! good {
        ($result:expr) => {
            match $result {
                Ok(value) => value,
                Err(e) => return Ok(Err(e)),
            }
        };
    }
    while let Some(extent) = good!(content.next_extent()) {
        let mut at = extent.start;
        let gathered = logical * BLOCK + (blocks.bytes.len() - start) as u64;
        if at / BLOCK > gathered / BLOCK || (at / BLOCK == gathered / BLOCK && gathered.is_multiple_of(BLOCK))
        {
            // In another block than the last byte.
            good!(blocks.seal(start, logical));
            if blocks.bytes.len() >= PIECE {
                take(blocks, read)?;
                blocks.clear();
                read = 0;
            }
            (start, logical) = (blocks.bytes.len(), at / BLOCK);
        }
        let until = usize::try_from(at - logical * BLOCK).unwrap_or(0) + start;
        blocks.bytes.resize(until, 0);
        while at < extent.end {
            if blocks.bytes.len() >= PIECE {
                good!(blocks.seal(start, logical));
                take(blocks, read)?;
                blocks.clear();
                (start, logical, read) = (0, at / BLOCK, 0);
            }
            let old = blocks.bytes.len();
            let room = (PIECE - old).min(usize::try_from(extent.end - at).unwrap_or(PIECE));
            blocks.bytes.resize(old + room, 0);
            let got = content.read_full(&mut blocks.bytes[old..]);
            let got = good!(got);
            blocks.bytes.truncate(old + got);
            if got == 0 {
                break;
            }
            at += got as u64;
            read += got as u64;
        }
    }
    good!(blocks.seal(start, logical));
    if read > 0 || !blocks.pieces.is_empty() {
        take(blocks, read)?;
    }
    Ok(Ok(()))
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use proptest::prelude::*;

    use super::*;

    /// Content from memory.
    struct Memory<'a> {
        bytes: &'a [u8],
        extents: std::vec::IntoIter<Range<u64>>,
        now: Range<u64>,
    }

    impl Content for Memory<'_> {
        fn next_extent(&mut self) -> io::Result<Option<Range<u64>>> {
            let next = self.extents.next();
            self.now = next.clone().unwrap_or(0..0);
            Ok(next)
        }

        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let left =
                &self.bytes[usize::try_from(self.now.start).unwrap()..usize::try_from(self.now.end).unwrap()];
            let got = left.len().min(buffer.len()).min(70_000);
            buffer[..got].copy_from_slice(&left[..got]);
            self.now.start += got as u64;
            Ok(got)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever the extents, the blocks that are kept hold every byte, and none of them is all zeros.
        #[test]
        fn blocks_hold_the_content(cuts in prop::collection::vec((0u64..30_000, 0u64..3_000, any::<bool>()), 0..12), large: bool) {
            let scale = if large { 100 } else { 1 };
            let (mut extents, mut at) = (Vec::new(), 0);
            let mut bytes = Vec::new();
            for (gap, length, zeros) in cuts {
                let start = at + gap;
                let end = start + length * scale;
                bytes.resize(usize::try_from(start).unwrap(), 0);
                bytes.resize(usize::try_from(end).unwrap(), u8::from(!zeros));
                extents.push(start..end);
                at = end;
            }
            let mut content = Memory { bytes: &bytes, extents: extents.into_iter(), now: 0..0 };
            let mut copy = vec![0; bytes.len().next_multiple_of(SIZE)];
            let (mut blocks, mut last) = (Blocks::default(), None);
            each_part(&mut content, &mut blocks, |part, _| {
                prop_assert!(part.bytes.len() <= PIECE);
                let mut data = part.bytes.chunks(SIZE);
                for piece in &part.pieces {
                    for block in piece.logical..piece.logical + piece.count {
                        prop_assert!(last < Some(block), "{last:?} before {block}");
                        last = Some(block);
                        let data = data.next().unwrap();
                        prop_assert!(data.iter().any(|&b| b != 0));
                        copy[block as usize * SIZE..][..SIZE].copy_from_slice(data);
                    }
                }
                prop_assert!(data.next().is_none());
                Ok(())
            })?.unwrap();
            copy.truncate(bytes.len());
            prop_assert!(copy == bytes);
        }
    }
}
