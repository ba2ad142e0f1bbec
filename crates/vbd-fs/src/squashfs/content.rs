//! The data of files: blocks, and for the end of a file a part of a block that it shares with others.

use std::io;
use std::ops::Range;
use std::path::Component;
use std::sync::Arc;

use super::block::Compression;
use super::inode::File;
use super::superblock::{u32_at, u64_at};
use super::{Image, ReadAt, read, unpack};
use crate::entry::{Content, Entry, Node, Sink};
use crate::{Error, Progress, Silent};

/// Bytes of an entry in the table of fragments.
pub(super) const FRAGMENT: usize = 16;
/// How many fragments are kept unpacked: 8 MiB at most.
const KEPT: usize = 8;
/// That a block is not compressed.
const PLAIN: u32 = 1 << 24;

/// The latest fragments, unpacked, by their numbers.
#[derive(Default)]
pub(super) struct Fragments(Vec<(u32, Arc<[u8]>)>);

fn read_block(
    source: &dyn ReadAt,
    compression: Compression,
    at: u64,
    length: u32,
    block_size: u32,
) -> Result<Vec<u8>, String> {
    let stored = length & !PLAIN;
    if stored > block_size {
        return Err(format!("has a block of {stored} bytes, which is too large"));
    }
    let bytes = read(source, at, usize::try_from(stored).unwrap_or(0))?;
    let most = usize::try_from(block_size).unwrap_or(0);
    if length & PLAIN != 0 { Ok(bytes) } else { compression.unpack(&bytes, most) }
}

impl Fragments {
    fn get(&mut self, image: &mut Image<'_>, number: u32) -> Result<Arc<[u8]>, String> {
        if let Some((_, bytes)) = self.0.iter().find(|(kept, _)| *kept == number) {
            return Ok(Arc::clone(bytes));
        }
        let table = image.fragments.as_mut().ok_or("ends in a fragment, of which there are none")?;
        let entry = table.get(number.into())?;
        let superblock = &image.superblock;
        let (at, length) = (u64_at(&entry, 0), u32_at(&entry, 8));
        let bytes = read_block(image.source, superblock.compression, at, length, superblock.block_size)?;
        let bytes: Arc<[u8]> = Arc::from(bytes);
        if self.0.len() >= KEPT {
            self.0.remove(0);
        }
        self.0.push((number, Arc::clone(&bytes)));
        Ok(bytes)
    }
}

/// What comes next of a file.
enum Next {
    /// A block of this stored length, at this place.
    Block {
        at: u64,
        length: u32,
    },
    Fragment,
}

/// The data of a file while it is read.
pub(super) struct FileData<'a, 'b> {
    image: &'a mut Image<'b>,
    fragments: &'a mut Fragments,
    file: &'a File,
    lengths: super::metadata::Cursor,
    /// Where the next block begins in the image, and which byte of the file it starts with.
    stored: u64,
    at: u64,
    /// The block that is being read, if it was unpacked already, and what of it was given.
    next: Option<Next>,
    bytes: Vec<u8>,
    given: usize,
    /// Bytes that the block must have.
    wanted: usize,
    /// What was wrong with it.
    pub(super) failure: Option<String>,
}

impl<'a, 'b> FileData<'a, 'b> {
    pub(super) fn new(
        image: &'a mut Image<'b>,
        fragments: &'a mut Fragments,
        file: &'a File,
    ) -> FileData<'a, 'b> {
        FileData {
            image,
            fragments,
            file,
            lengths: file.lengths,
            stored: file.start,
            at: 0,
            next: None,
            bytes: Vec::new(),
            given: 0,
            wanted: 0,
            failure: None,
        }
    }

    /// Where the next block that is no hole belongs in the file.
    fn find(&mut self) -> Result<Option<Range<u64>>, String> {
        let size = self.file.size;
        let block_size = u64::from(self.image.superblock.block_size);
        while self.at < size {
            let range = self.at..size.min(self.at.saturating_add(block_size));
            self.at = range.end;
            self.wanted = usize::try_from(range.end - range.start).unwrap_or(0);
            (self.given, self.next) = (0, None);
            self.bytes.clear();
            if range.end - range.start < block_size && self.file.fragment.is_some() {
                self.next = Some(Next::Fragment);
                return Ok(Some(range));
            }
            let length = self.image.inodes.u32(&mut self.lengths)?;
            if length == 0 {
                continue;
            }
            self.next = Some(Next::Block { at: self.stored, length });
            let after = self.stored.checked_add(u64::from(length & !PLAIN));
            self.stored = after.ok_or("is damaged: it leads out of the image")?;
            return Ok(Some(range));
        }
        Ok(None)
    }

    fn load(&mut self) -> Result<(), String> {
        match self.next.take() {
            None => return Ok(()),
            Some(Next::Block { at, length }) => {
                let superblock = &self.image.superblock;
                let (compression, block_size) = (superblock.compression, superblock.block_size);
                self.bytes = read_block(self.image.source, compression, at, length, block_size)?;
                if self.bytes.len() != self.wanted {
                    return Err(format!(
                        "has a block of {} bytes that must have {}",
                        self.bytes.len(),
                        self.wanted
                    ));
                }
            }
            Some(Next::Fragment) => {
                let (number, offset) = self.file.fragment.ok_or("has no fragment")?;
                let fragment = self.fragments.get(self.image, number)?;
                let offset = usize::try_from(offset).unwrap_or(usize::MAX);
                let part = fragment.get(offset..).and_then(|rest| rest.get(..self.wanted));
                self.bytes.extend_from_slice(part.ok_or("ends outside of its fragment")?);
            }
        }
        Ok(())
    }

    fn fail<T>(&mut self, result: Result<T, String>) -> io::Result<T> {
        result.map_err(|reason| {
            self.failure = Some(reason.clone());
            io::Error::other(reason)
        })
    }
}

impl Content for FileData<'_, '_> {
    fn next_extent(&mut self) -> io::Result<Option<Range<u64>>> {
        let found = self.find();
        self.fail(found)
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let loaded = self.load();
        self.fail(loaded)?;
        let rest = self.bytes.get(self.given..).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.given += count;
        Ok(count)
    }
}

/// Takes entries until there are more than a fuzzer has time for.
struct Bounded {
    entries: u32,
    bytes: u64,
}

impl Sink for Bounded {
    fn add(&mut self, entry: Entry<'_>, _: &mut dyn Progress) -> crate::Result<()> {
        let enough = || Error::Invalid("enough".to_owned());
        self.entries = self.entries.checked_sub(1).ok_or_else(enough)?;
        assert!(entry.path.components().all(|part| matches!(part, Component::Normal(_))));
        let Node::File { size, content } = entry.node else { return Ok(()) };
        let failed = |e: io::Error| Error::io("cannot read", e);
        let mut buffer = [0; 4096];
        let mut end = 0;
        while let Some(extent) = content.next_extent().map_err(failed)? {
            assert!(end <= extent.start && extent.start < extent.end && extent.end <= size);
            end = extent.end;
            let mut read = 0;
            while read < extent.end - extent.start {
                read += content.read(&mut buffer).map_err(failed)? as u64;
            }
            assert_eq!(read, extent.end - extent.start);
            self.bytes = self.bytes.checked_sub(read).ok_or_else(enough)?;
        }
        Ok(())
    }
}

/// Reads an image, as far as there is time for it. For fuzzing: it must end without a panic whatever it reads.
pub fn fuzz(bytes: &[u8]) {
    let mut sink = Bounded { entries: 1000, bytes: 64 << 20 };
    let _ = unpack(&bytes, "image", &mut sink, &mut Silent);
}
