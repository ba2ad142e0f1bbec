//! A member's data: whole, or in pieces with holes between them.

use std::io;
use std::ops::Range;

use super::input::{BLOCK, Input};
use crate::entry::Content;

/// How many pieces a sparse file may have: what the map of a larger one would cost in memory is no honest file's.
const PIECES: usize = 1 << 20;

/// Where the data of a member belongs, in rising order.
pub(super) struct Extents(Vec<Range<u64>>);

impl Extents {
    /// A file without holes.
    pub(super) fn whole(size: u64) -> Extents {
        Extents(if size == 0 { Vec::new() } else { vec![Range { start: 0, end: size }] })
    }

    /// A sparse file's pieces, whose sum must be what the archive holds of it.
    pub(super) fn sparse(pieces: &[(u64, u64)], size: u64, stored: u64) -> Result<Extents, String> {
        let mut extents = Vec::with_capacity(pieces.len());
        let (mut end, mut sum) = (0u64, 0u64);
        for &(offset, length) in pieces {
            let until = offset.checked_add(length).filter(|&until| until <= size);
            let until = until.ok_or("has a piece beyond its end")?;
            if length == 0 {
                continue;
            }
            if offset < end {
                return Err("has pieces that overlap".to_owned());
            }
            extents.push(offset..until);
            end = until;
            sum += length;
        }
        if sum != stored {
            return Err(format!("has {stored} bytes of data for pieces of {sum}"));
        }
        Ok(Extents(extents))
    }
}

/// Pairs of offset and length, as headers and records have them.
#[derive(Default)]
pub(super) struct Pieces(pub(super) Vec<(u64, u64)>);

impl Pieces {
    pub(super) fn push(&mut self, offset: u64, length: u64) -> Result<(), String> {
        if self.0.len() == PIECES {
            return Err(format!("has more than {PIECES} pieces"));
        }
        self.0.push((offset, length));
        Ok(())
    }
}

/// Reads the map that precedes the data of a sparse file in GNU's format 1.0: decimal lines, padded to a block.
pub(super) fn read_map(input: &mut Input<'_>) -> Result<Pieces, String> {
    let mut numbers = Numbers { input, block: [0; BLOCK], at: BLOCK };
    let count = numbers.next()?;
    let mut pieces = Pieces::default();
    for _ in 0..count {
        let offset = numbers.next()?;
        pieces.push(offset, numbers.next()?)?;
    }
    Ok(pieces)
}

struct Numbers<'a, 'b> {
    input: &'a mut Input<'b>,
    block: [u8; BLOCK],
    at: usize,
}

impl Numbers<'_, '_> {
    fn next(&mut self) -> Result<u64, String> {
        let mut number: Option<u64> = None;
        loop {
            if self.at == BLOCK {
                self.input.read_exact(&mut self.block).map_err(|e| e.to_string())?;
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            match (byte, number) {
                (b'\n', Some(number)) => return Ok(number),
                (b'0'..=b'9', so_far) => {
                    let next = so_far.unwrap_or(0).checked_mul(10);
                    number = next.and_then(|n| n.checked_add(u64::from(byte - b'0')));
                    if number.is_none() {
                        return Err("has a sparse map with a number too large".to_owned());
                    }
                }
                _ => return Err("has a sparse map that is no list of numbers".to_owned()),
            }
        }
    }
}

/// The data of a member while it is read.
pub(super) struct Data<'a, 'b> {
    input: &'a mut Input<'b>,
    extents: std::slice::Iter<'a, Range<u64>>,
    left: u64,
}

impl<'a, 'b> Data<'a, 'b> {
    pub(super) fn new(input: &'a mut Input<'b>, extents: &'a Extents) -> Data<'a, 'b> {
        Data { input, extents: extents.0.iter(), left: 0 }
    }
}

impl Content for Data<'_, '_> {
    fn next_extent(&mut self) -> io::Result<Option<Range<u64>>> {
        self.input.skip(self.left)?;
        let next = self.extents.next().cloned();
        self.left = next.as_ref().map_or(0, |extent| extent.end - extent.start);
        Ok(next)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left).unwrap_or(buffer.len()).min(buffer.len());
        let got = self.input.read(&mut buffer[..room])?;
        self.left -= got as u64;
        Ok(got)
    }
}
