//! Inodes.

use super::metadata::{Cursor, Metadata, Table};
use super::superblock::{Superblock, u16_at, u32_at, u64_at};
use crate::entry::{Meta, Special, Time};

/// No fragment, and no attributes.
const NONE: u32 = u32::MAX;
/// The longest target of a link, as in the kernel.
const TARGET: u32 = 4095;

/// Where an inode is: the distance of its block from the table's start, and 16 bits of the offset in that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Reference(pub(super) u64);

impl Reference {
    pub(super) fn parts(self) -> (u64, usize) {
        (self.0 >> 16, usize::try_from(self.0 & 0xffff).unwrap_or(0))
    }
}

/// Where a directory's names are.
pub(super) struct Names {
    pub(super) block: u32,
    pub(super) offset: u16,
    /// Bytes of them.
    pub(super) size: u32,
}

/// Where a file's data is.
pub(super) struct File {
    pub(super) size: u64,
    /// Where the first block begins.
    pub(super) start: u64,
    /// The fragment with the end of it, and where in that.
    pub(super) fragment: Option<(u32, u32)>,
    /// From where on the lengths of the blocks are.
    pub(super) lengths: Cursor,
}

pub(super) enum Body {
    Directory(Names),
    File(File),
    Symlink(Vec<u8>),
    Device { kind: Special, major: u32, minor: u32 },
}

pub(super) struct Inode {
    pub(super) meta: Meta,
    pub(super) links: u32,
    pub(super) xattrs: Option<u32>,
    pub(super) body: Body,
}

impl Inode {
    pub(super) fn read(
        table: &mut Metadata<'_>,
        ids: &mut Table<'_>,
        superblock: &Superblock,
        reference: Reference,
    ) -> Result<Inode, String> {
        let (block, offset) = reference.parts();
        let mut cursor = table.cursor(block, offset)?;
        let common: [u8; 16] = table.array(&mut cursor)?;
        let kind = u16_at(&common, 0);
        let meta = Meta {
            mode: u32::from(u16_at(&common, 2)) & 0o7777,
            uid: ids.number(u16_at(&common, 4).into())?,
            gid: ids.number(u16_at(&common, 6).into())?,
            mtime: Time { seconds: u32_at(&common, 8).into(), nanoseconds: 0 },
        };
        let (mut links, mut xattrs) = (1, NONE);
        let body = match kind {
            1 => {
                let fields: [u8; 16] = table.array(&mut cursor)?;
                let size = u16_at(&fields, 8).into();
                names(u32_at(&fields, 0), u16_at(&fields, 10), size)?
            }
            8 => {
                let fields: [u8; 24] = table.array(&mut cursor)?;
                xattrs = u32_at(&fields, 20);
                names(u32_at(&fields, 8), u16_at(&fields, 18), u32_at(&fields, 4))?
            }
            2 => {
                let fields: [u8; 16] = table.array(&mut cursor)?;
                let fragment = (u32_at(&fields, 4), u32_at(&fields, 8));
                let (start, size) = (u32_at(&fields, 0).into(), u32_at(&fields, 12).into());
                file(start, size, fragment, cursor)
            }
            9 => {
                let fields: [u8; 40] = table.array(&mut cursor)?;
                (links, xattrs) = (u32_at(&fields, 24), u32_at(&fields, 36));
                let fragment = (u32_at(&fields, 28), u32_at(&fields, 32));
                file(u64_at(&fields, 0), u64_at(&fields, 8), fragment, cursor)
            }
            3 | 10 => {
                links = table.u32(&mut cursor)?;
                let length = table.u32(&mut cursor)?;
                let target = table.bytes(&mut cursor, length, TARGET)?;
                if target.is_empty() || target.contains(&0) {
                    return Err("is a link with no target, or one with a NUL".to_owned());
                }
                if kind == 10 {
                    xattrs = table.u32(&mut cursor)?;
                }
                Body::Symlink(target)
            }
            4 | 5 | 11 | 12 => {
                links = table.u32(&mut cursor)?;
                let number = table.u32(&mut cursor)?;
                if kind > 7 {
                    xattrs = table.u32(&mut cursor)?;
                }
                let kind = if matches!(kind, 4 | 11) { Special::Block } else { Special::Character };
                // As the kernel's `new_decode_dev`.
                let (major, minor) = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xfff00);
                Body::Device { kind, major, minor }
            }
            6 | 7 | 13 | 14 => {
                links = table.u32(&mut cursor)?;
                if kind > 7 {
                    xattrs = table.u32(&mut cursor)?;
                }
                let kind = if matches!(kind, 6 | 13) { Special::Fifo } else { Special::Socket };
                Body::Device { kind, major: 0, minor: 0 }
            }
            other => return Err(format!("has the unknown type {other}")),
        };
        if let Body::File(file) = &body
            && file.fragment.is_some_and(|(_, offset)| offset >= superblock.block_size)
        {
            return Err("is damaged: it ends outside of a fragment".to_owned());
        }
        Ok(Inode { meta, links, xattrs: Some(xattrs).filter(|&number| number != NONE), body })
    }
}

/// A directory, in whose size there are three bytes for `.` and `..`.
fn names(block: u32, offset: u16, size: u32) -> Result<Body, String> {
    let size = size.checked_sub(3).ok_or("is a damaged directory")?;
    Ok(Body::Directory(Names { block, offset, size }))
}

fn file(start: u64, size: u64, (number, offset): (u32, u32), lengths: Cursor) -> Body {
    Body::File(File { size, start, fragment: (number != NONE).then_some((number, offset)), lengths })
}
