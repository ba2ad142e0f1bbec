//! New VHD files: fixed, dynamic, and differencing ones on a parent.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use vbd_image::create::{CreateError, Draft};

use crate::format::{
    DynamicHeader, FOOTER_LEN, Footer, HEADER_LEN, Kind, LOCATORS, Locator, MOST_BYTES, SECTOR, UNUSED,
};
use crate::format::{encode_url, encode_windows, time_stamp};

/// The parent of a new differencing disk.
#[derive(Clone, Debug)]
pub struct ParentLink {
    /// Its file, as it is to be written down: relative to the new image's directory, or absolute.
    pub path: PathBuf,
    /// Its unique id, where it is a VHD.
    pub unique_id: Option<[u8; 16]>,
    /// When it was changed last.
    pub changed: SystemTime,
}

/// What to make.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The size in bytes: a multiple of 512, at most 2040 GiB.
    pub size: u64,
    /// All of it in order, instead of blocks that come when they are written.
    pub fixed: bool,
    /// Bytes of a block: a power of two from 4 KiB to 256 MiB. Not for fixed disks.
    pub block_size: u32,
    /// The parent of a differencing disk.
    pub parent: Option<ParentLink>,
    /// Allocate a fixed disk's room at once.
    pub preallocate: bool,
    /// Replace a file that is there.
    pub replace: bool,
}

impl CreateOptions {
    /// A dynamic disk of this size with blocks of 2 MiB.
    pub fn new(size: u64) -> Self {
        CreateOptions {
            size,
            fixed: false,
            block_size: 2 << 20,
            parent: None,
            preallocate: false,
            replace: false,
        }
    }
}

/// Why no VHD was made.
#[derive(Debug, thiserror::Error)]
pub enum VhdCreateError {
    /// What was asked for cannot be.
    #[error("{}: {what}", .path.display())]
    Options {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        what: String,
    },
    /// The file cannot be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// It cannot be written.
    #[error("{}: cannot write it: {error}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
}

/// Makes a VHD at `path`. It appears whole or not at all.
///
/// # Errors
/// What was asked for cannot be, there is a file of that name, or it cannot be written.
pub fn create(path: &Path, options: &CreateOptions) -> Result<(), VhdCreateError> {
    let refuse = |what: String| VhdCreateError::Options { path: path.to_owned(), what };
    let size = options.size;
    if size == 0 || !size.is_multiple_of(SECTOR) {
        return Err(refuse(format!("{size} bytes are no size for a VHD: it is a multiple of 512")));
    }
    if size > MOST_BYTES {
        return Err(refuse(format!(
            "{size} bytes are more than a VHD can have (2040 GiB); use qcow2 or raw"
        )));
    }
    if options.fixed && options.parent.is_some() {
        return Err(refuse("a fixed disk has no parent; leave out one of the two".into()));
    }
    if options.preallocate && !options.fixed {
        return Err(refuse("only a fixed VHD can be preallocated".into()));
    }
    let block_size = options.block_size;
    if !options.fixed && (!(4096..=256 << 20).contains(&block_size) || !block_size.is_power_of_two()) {
        return Err(refuse(format!(
            "blocks of {block_size} bytes: a power of two from 4096 to 268435456 is possible"
        )));
    }
    let draft = Draft::new(path, options.replace)?;
    let failed = |error| VhdCreateError::Io { path: path.to_owned(), error };
    let unique_id = unique_id().map_err(failed)?;
    write(draft.file(), options, unique_id).map_err(failed)?;
    draft.file().sync_all().map_err(failed)?;
    Ok(draft.publish()?)
}

fn write(file: &std::fs::File, options: &CreateOptions, unique_id: [u8; 16]) -> io::Result<()> {
    let size = options.size;
    let kind = match (&options.parent, options.fixed) {
        (Some(_), _) => Kind::Differencing,
        (None, true) => Kind::Fixed,
        (None, false) => Kind::Dynamic,
    };
    let footer = Footer::new(kind, size, unique_id, SystemTime::now()).encode();
    if kind == Kind::Fixed {
        file.set_len(size + FOOTER_LEN as u64)?;
        if options.preallocate {
            rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, size + FOOTER_LEN as u64)?;
        }
        return file.write_all_at(&footer, size);
    }
    let entries = size.div_ceil(u64::from(options.block_size));
    let mut header = DynamicHeader {
        table_offset: (FOOTER_LEN + HEADER_LEN) as u64,
        entries: u32::try_from(entries).map_err(io::Error::other)?,
        block_size: options.block_size,
        parent_unique_id: [0; 16],
        parent_time_stamp: 0,
        parent_name: String::new(),
        locators: Default::default(),
    };
    let mut end = header.table_offset + header.table_len();
    if let Some(parent) = &options.parent {
        end = add_parent(file, &mut header, parent, end)?;
    }
    file.write_all_at(&footer, 0)?;
    file.write_all_at(&header.encode(), FOOTER_LEN as u64)?;
    let (mut at, table_end) = (header.table_offset, header.table_offset + header.table_len());
    let unused = vec![UNUSED.to_be_bytes()[0]; 1 << 16];
    while at < table_end {
        let len = unused.len().min(usize::try_from(table_end - at).unwrap_or(usize::MAX));
        file.write_all_at(&unused[..len], at)?;
        at += len as u64;
    }
    file.write_all_at(&footer, end)
}

/// Writes the names of the parent from `end` on: the new end.
fn add_parent(
    file: &std::fs::File,
    header: &mut DynamicHeader,
    parent: &ParentLink,
    mut end: u64,
) -> io::Result<u64> {
    let path = parent.path.to_str().ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "the parent's name is no UTF-8; a VHD cannot name it")
    })?;
    header.parent_unique_id = parent.unique_id.unwrap_or_default();
    header.parent_time_stamp = time_stamp(parent.changed);
    header.parent_name = parent.path.file_name().and_then(|name| name.to_str()).unwrap_or(path).to_owned();
    let is_relative = parent.path.is_relative();
    let dotted = if is_relative && !path.starts_with("./") && !path.starts_with("../") {
        format!("./{path}")
    } else {
        path.to_owned()
    };
    let windows = if is_relative { *b"W2ru" } else { *b"W2ku" };
    let names = [(windows, encode_windows(&dotted)), (*b"MacX", encode_url(&dotted))];
    debug_assert!(names.len() <= LOCATORS);
    for (slot, (platform, name)) in header.locators.iter_mut().zip(names) {
        let length = u32::try_from(name.len()).map_err(io::Error::other)?;
        // In bytes, as Windows and tapdisk write it; a reader that takes it for sectors still finds the name.
        let space = length.next_multiple_of(512);
        *slot = Locator { platform, space, length, offset: end };
        file.write_all_at(&name, end)?;
        end += u64::from(space);
    }
    Ok(end)
}

/// A random name for a disk: a UUID of version 4 (RFC 9562).
fn unique_id() -> io::Result<[u8; 16]> {
    let mut id = [0; 16];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut id)?;
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(id)
}
