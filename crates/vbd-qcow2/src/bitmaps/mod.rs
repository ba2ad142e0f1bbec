//! Persistent bitmaps: which blocks of the disk were written to since each of them began.
//!
//! While nobody serves the image, they are listed, loaded and changed here, each change as a whole: new tables are written
//! and made durable, then the header leads to them, then the old ones are given back. A power cut in between leaves the old
//! bitmaps or the new ones, and at worst clusters that leak.
//!
//! While the image is served, [`Kept`] holds them: they are marked as in use before the first write, which makes everyone
//! distrust them after a crash, and stored when the image is closed.

mod kept;
pub(crate) mod space;

use std::io;

use vbd_core::bitmap::{Bitmap, BitmapError};

use crate::format::{
    self, BitmapEntry, BitmapFlags, BitmapTableEntry, BitmapsExtension, Extension, Header, Layout, autoclear,
    encode_bitmaps, incompatible, limit, read_bitmap_table, read_bitmaps,
};
use crate::rewrite::replace_header;
use crate::storage::{Source, Storage, read_exact_at};
pub use kept::Kept;
use space::{Space, grow_table};

/// Results of changing bitmaps.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why bitmaps were not read or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image or its bitmaps are malformed.
    #[error(transparent)]
    Format(#[from] format::Error),
    /// There can be no such bitmap.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    /// It cannot be done, and why.
    #[error("{0}")]
    Refused(String),
    /// The file could not be read or written.
    #[error("cannot {doing}: {error}")]
    Io {
        /// What failed.
        doing: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// The refcount table has no room for another block.
    #[error("the refcount table is full")]
    NoTable,
}

impl Error {
    pub(crate) fn io(doing: &'static str) -> impl Fn(io::Error) -> Error {
        move |error| Error::Io { doing, error }
    }
}

/// A bitmap of an image.
#[derive(Debug)]
pub struct Held {
    /// Its name, for people.
    pub name: String,
    /// Bytes of the disk that a bit stands for.
    pub granularity: u64,
    /// Whether writers keep it.
    pub enabled: bool,
    /// Its bits; none where they cannot be believed: it was not saved, or is of a kind that is not known here.
    pub bits: Option<Bitmap>,
    /// Its entry, if it is in the file.
    entry: Option<BitmapEntry>,
}

impl Held {
    fn usable(&self) -> Result<&Bitmap> {
        self.bits.as_ref().ok_or_else(|| {
            Error::Refused(format!(
                "bitmap \"{}\" was not saved, so it does not say what was written; remove it, and make another",
                self.name
            ))
        })
    }
}

/// The bitmaps of an image. There are none where a program that does not know bitmaps has written to it.
///
/// # Errors
///
/// They cannot be read or are malformed.
pub fn list<S: Source + ?Sized>(source: &S) -> Result<Vec<Held>> {
    load_all(source, &open(source)?)
}

fn open<S: Source + ?Sized>(source: &S) -> Result<Header> {
    let header = Header::read(source)?;
    header.refuse_unknown()?;
    Ok(header)
}

pub(crate) fn are_valid(header: &Header) -> bool {
    header.autoclear & autoclear::BITMAPS != 0
}

fn load_all<S: Source + ?Sized>(source: &S, header: &Header) -> Result<Vec<Held>> {
    if !are_valid(header) {
        return Ok(Vec::new());
    }
    let mut room = limit::BITMAP_BYTES;
    let held = |entry: BitmapEntry| -> Result<Held> {
        // A few bytes of a file can ask for all of the memory there is.
        let bytes = entry.bits(header.size).div_ceil(8);
        room = room.checked_sub(bytes).ok_or_else(|| {
            let message = format!(
                "the image's bitmaps take more than {} bytes together; remove some, or use coarser ones",
                limit::BITMAP_BYTES
            );
            Error::Refused(message)
        })?;
        let bits = if entry.is_usable() { Some(load(source, header, &entry)?) } else { None };
        Ok(Held {
            name: entry.text(),
            granularity: 1 << entry.granularity_bits,
            enabled: entry.flags.auto,
            bits,
            entry: Some(entry),
        })
    };
    read_bitmaps(header, source)?.into_iter().map(held).collect()
}

/// The bits of a bitmap.
fn load<S: Source + ?Sized>(source: &S, header: &Header, entry: &BitmapEntry) -> Result<Bitmap> {
    let layout = header.layout();
    let bitmap = Bitmap::new(header.size, 1 << entry.granularity_bits)?;
    let wanted = entry.clusters(&layout, header.size);
    if u64::from(entry.table_entries) != wanted {
        return Err(Error::Refused(format!(
            "the table of bitmap \"{}\" has {} entries, and the disk's size needs {wanted}; remove the bitmap",
            entry.text(),
            entry.table_entries
        )));
    }
    let mut bytes = vec![0; layout.cluster_len()];
    for (index, table) in read_bitmap_table(&layout, entry, source)?.into_iter().enumerate() {
        let malformed = |error: &dyn std::fmt::Display| {
            let message = format!("entry {index} of the table of bitmap \"{}\": {error}", entry.text());
            Error::Refused(message)
        };
        if table.reserved() != 0 {
            return Err(malformed(&format!("reserved bits {:#x} are set", table.reserved())));
        }
        match table.decode(&layout).map_err(|error| malformed(&error))? {
            Some(offset) => {
                read_exact_at(source, offset, &mut bytes).map_err(Error::io("read the bits of a bitmap"))?;
            }
            None if table.ones() => bytes.fill(0xff),
            None => continue,
        }
        bitmap.load_bytes((index as u64) << layout.cluster_bits, &bytes);
    }
    Ok(bitmap)
}

/// Changes the bitmaps of an image: `change` gets all there are, and what it leaves is stored. Nobody else may use the image
/// meanwhile: whoever calls this holds its lease.
///
/// # Errors
///
/// What `change` says; the image cannot have bitmaps, is marked as corrupt or not closed, or cannot be written. Then its
/// bitmaps are as they were.
pub fn change<S: Storage + ?Sized>(
    storage: &S,
    change: impl FnOnce(&Header, &mut Vec<Held>) -> Result<()>,
) -> Result<()> {
    let header = open(storage)?;
    let refuse = |reason: &str| Err(Error::Refused(reason.to_owned()));
    if header.version < 3 {
        return refuse("version 2 of qcow2 has no bitmaps; convert the image, or amend it to version 3");
    }
    if header.has(incompatible::CORRUPT | incompatible::DIRTY) {
        return refuse("the image was not closed, or is marked as corrupt; repair it first");
    }
    let mut held = load_all(storage, &header)?;
    change(&header, &mut held)?;
    store(storage, &held)
}

/// Adds a bitmap without marks.
///
/// # Errors
///
/// The name is taken or is none, the granularity is none; those of [`change`].
pub fn add<S: Storage + ?Sized>(storage: &S, name: &str, granularity: u64, enabled: bool) -> Result<()> {
    change(storage, |header, held| {
        if held.iter().any(|other| other.name == name) {
            return Err(Error::Refused(format!("there is a bitmap \"{name}\" already; choose another name")));
        }
        let bits = Some(Bitmap::new(header.size, granularity)?);
        held.push(Held { name: name.to_owned(), granularity, enabled, bits, entry: None });
        Ok(())
    })
}

/// Removes a bitmap, also one that was not saved.
///
/// # Errors
///
/// There is none of that name; those of [`change`].
pub fn remove<S: Storage + ?Sized>(storage: &S, name: &str) -> Result<()> {
    change(storage, |_, held| {
        let index = find(held, name)?;
        held.remove(index);
        Ok(())
    })
}

/// Marks writes in a bitmap from now on, or leaves it as it is.
///
/// # Errors
///
/// There is none of that name, or it was not saved; those of [`change`].
pub fn enable<S: Storage + ?Sized>(storage: &S, name: &str, enabled: bool) -> Result<()> {
    change(storage, |_, held| {
        let index = find(held, name)?;
        held[index].usable()?;
        held[index].enabled = enabled;
        Ok(())
    })
}

/// Takes every mark of a bitmap away.
///
/// # Errors
///
/// There is none of that name, or it was not saved; those of [`change`].
pub fn clear<S: Storage + ?Sized>(storage: &S, name: &str) -> Result<()> {
    change(storage, |header, held| {
        let index = find(held, name)?;
        held[index].usable()?;
        held[index].bits = Some(Bitmap::new(header.size, held[index].granularity)?);
        Ok(())
    })
}

/// Marks in `into` what is marked in each of `from`.
///
/// # Errors
///
/// There is none of such a name, or one was not saved; those of [`change`].
pub fn merge<S: Storage + ?Sized>(storage: &S, into: &str, from: &[&str]) -> Result<()> {
    change(storage, |_, held| {
        let target = find(held, into)?;
        for name in from {
            let other = find(held, name)?;
            held[target].usable()?.merge(held[other].usable()?);
        }
        Ok(())
    })
}

fn find(held: &[Held], name: &str) -> Result<usize> {
    let place = held.iter().position(|held| held.name == name);
    place.ok_or_else(|| Error::Refused(format!("there is no bitmap \"{name}\"")))
}

/// Stores these bitmaps in place of those that the image has.
fn store<S: Storage + ?Sized>(storage: &S, held: &[Held]) -> Result<()> {
    match try_store(storage, held) {
        Err(Error::NoTable) => {
            grow_table(storage)?;
            try_store(storage, held)
        }
        other => other,
    }
}

fn try_store<S: Storage + ?Sized>(storage: &S, held: &[Held]) -> Result<()> {
    let header = open(storage)?;
    let layout = header.layout();
    let sync = || storage.sync().map_err(Error::io("make the bitmaps durable"));
    let mut space = Space::new(storage, &header)?;
    // What cannot be believed stays where it is; everything else is written anew.
    let (mut entries, mut taken) = (Vec::new(), Vec::new());
    let stored = (|| {
        for held in held {
            entries.push(match (&held.bits, &held.entry) {
                (Some(bits), entry) => {
                    write_bitmap(storage, &mut space, &layout, held, bits, entry.as_ref(), &mut taken)?
                }
                (None, Some(entry)) => entry.clone(),
                (None, None) => continue,
            });
        }
        write_directory(storage, &mut space, &layout, &entries, &mut taken)
    })();
    let new = match stored.and_then(|extension| new_header(&header, extension)) {
        Ok(new) => new,
        Err(error) => {
            // Nothing leads to what was taken.
            for (offset, length) in taken {
                space.give_back(offset, length)?;
            }
            sync()?;
            return Err(error);
        }
    };
    sync()?;
    if new != header {
        replace_header(storage, &header, &new).map_err(Error::io("write the header"))?;
    }
    give_back_old(storage, &header, &entries, &mut space)?;
    sync()
}

/// The same header with another bitmap directory, or with none.
fn new_header(header: &Header, extension: Option<BitmapsExtension>) -> Result<Header> {
    let mut new = header.clone();
    new.remove_bitmaps();
    if let Some(extension) = extension {
        new.set_extension(Extension::Bitmaps(extension));
        new.autoclear |= autoclear::BITMAPS;
    }
    // The smallest clusters have no room for the names of features, which only people read.
    if new.encode().is_err() {
        new.extensions.retain(|extension| !matches!(extension, Extension::FeatureNames(_)));
        new.encode()?;
    }
    Ok(new)
}

/// Writes the bitmaps of an image anew as they are once its disk has `size` bytes. Gives the header with another directory,
/// and the entries that are in it. What was taken is added to `taken`.
pub(crate) fn write_cut<S: Storage + ?Sized>(
    storage: &S,
    header: &Header,
    size: u64,
    space: &mut Space<'_, S>,
    taken: &mut Vec<(u64, u64)>,
) -> Result<(Header, Vec<BitmapEntry>)> {
    let layout = header.layout();
    let mut entries = Vec::new();
    for held in load_all(storage, header)? {
        entries.push(match (&held.bits, &held.entry) {
            (Some(bits), entry) => {
                let bits = bits.resized(size)?;
                write_bitmap(storage, space, &layout, &held, &bits, entry.as_ref(), taken)?
            }
            (None, Some(entry)) => entry.clone(),
            (None, None) => continue,
        });
    }
    let extension = write_directory(storage, space, &layout, &entries, taken)?;
    Ok((new_header(header, extension)?, entries))
}

/// Gives back what the bitmaps before took: their directory, and tables and bits of those that were written anew.
pub(crate) fn give_back_old<S: Storage + ?Sized>(
    storage: &S,
    header: &Header,
    entries: &[BitmapEntry],
    space: &mut Space<'_, S>,
) -> Result<()> {
    let layout = header.layout();
    let Some(extension) = header.bitmaps().filter(|_| are_valid(header)) else { return Ok(()) };
    for old in read_bitmaps(header, storage)? {
        if entries.iter().any(|entry| entry.table_offset == old.table_offset) {
            continue;
        }
        // One whose table cannot be read leaks, which a check finds.
        let Ok(table) = read_bitmap_table(&layout, &old, storage) else { continue };
        for entry in table {
            if let Ok(Some(offset)) = entry.decode(&layout) {
                space.give_back(offset, layout.cluster_size())?;
            }
        }
        space.give_back(old.table_offset, u64::from(old.table_entries) * 8)?;
    }
    space.give_back(extension.directory_offset, extension.directory_size)
}

/// Writes the bits and the table of a bitmap, and gives its entry.
fn write_bitmap<S: Storage + ?Sized>(
    storage: &S,
    space: &mut Space<'_, S>,
    layout: &Layout,
    held: &Held,
    bits: &Bitmap,
    entry: Option<&BitmapEntry>,
    taken: &mut Vec<(u64, u64)>,
) -> Result<BitmapEntry> {
    if held.name.is_empty() || held.name.len() > usize::from(limit::BITMAP_NAME) {
        return Err(Error::Refused(format!("the name of a bitmap has 1 to {} bytes", limit::BITMAP_NAME)));
    }
    let cluster = layout.cluster_size();
    let mut take = |space: &mut Space<'_, S>, length: u64| {
        let offset = space.take(layout.clusters(length))?;
        taken.push((offset, length));
        Ok::<_, Error>(offset)
    };
    let entries = layout.clusters(bits.byte_len());
    if entries << layout.cluster_bits > limit::BITMAP_BYTES {
        return Err(Error::Refused(format!(
            "bitmap \"{}\" has {} bytes of bits, more than {}; use a coarser granularity",
            held.name,
            bits.byte_len(),
            limit::BITMAP_BYTES
        )));
    }
    let mut table = Vec::new();
    let mut bytes = vec![0; layout.cluster_len()];
    for index in 0..entries {
        bits.read_bytes(index << layout.cluster_bits, &mut bytes);
        table.push(if bytes.iter().all(|byte| *byte == 0) {
            BitmapTableEntry::ZEROS
        } else if bytes.iter().all(|byte| *byte == 0xff) {
            BitmapTableEntry::ONES
        } else {
            let offset = take(space, cluster)?;
            storage.write_all_at(offset, &bytes).map_err(Error::io("write the bits of a bitmap"))?;
            BitmapTableEntry(offset)
        });
    }
    let mut bytes: Vec<u8> = table.iter().flat_map(|entry| entry.0.to_be_bytes()).collect();
    let table_offset = take(space, bytes.len() as u64)?;
    let table_entries = u32::try_from(table.len()).unwrap_or(u32::MAX);
    bytes.resize(bytes.len().next_multiple_of(layout.cluster_len()), 0);
    storage.write_all_at(table_offset, &bytes).map_err(Error::io("write the table of a bitmap"))?;
    let before = entry.map(|entry| (entry.name.clone(), entry.extra.clone(), entry.flags.extra_compatible));
    let (name, extra, extra_compatible) =
        before.unwrap_or_else(|| (held.name.clone().into_bytes(), Vec::new(), false));
    let flags = BitmapFlags { in_use: false, auto: held.enabled, extra_compatible, reserved: 0 };
    let granularity_bits = u8::try_from(held.granularity.trailing_zeros()).unwrap_or(u8::MAX);
    Ok(BitmapEntry { table_offset, table_entries, flags, granularity_bits, name, extra })
}

/// Writes the directory, if there is anything in it.
fn write_directory<S: Storage + ?Sized>(
    storage: &S,
    space: &mut Space<'_, S>,
    layout: &Layout,
    entries: &[BitmapEntry],
    taken: &mut Vec<(u64, u64)>,
) -> Result<Option<BitmapsExtension>> {
    if entries.is_empty() {
        return Ok(None);
    }
    let mut directory = encode_bitmaps(entries);
    let directory_size = directory.len() as u64;
    let count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
    if count > limit::BITMAPS || directory_size > limit::BITMAP_DIRECTORY_BYTES {
        return Err(Error::Refused(format!("an image has at most {} bitmaps", limit::BITMAPS)));
    }
    let directory_offset = space.take(layout.clusters(directory_size))?;
    taken.push((directory_offset, directory_size));
    directory.resize(directory.len().next_multiple_of(layout.cluster_len()), 0);
    storage.write_all_at(directory_offset, &directory).map_err(Error::io("write the bitmap directory"))?;
    Ok(Some(BitmapsExtension { count, directory_size, directory_offset }))
}

/// Marks all bitmaps as in use, in place: before the first write to the image.
fn mark_in_use<S: Storage + ?Sized>(storage: &S, header: &Header) -> Result<()> {
    let Some(extension) = header.bitmaps() else { return Ok(()) };
    let mut at = extension.directory_offset;
    for mut entry in read_bitmaps(header, storage)? {
        let length = entry.length() as u64;
        if !entry.flags.in_use {
            entry.flags.in_use = true;
            let flags = &encode_bitmaps(std::slice::from_ref(&entry))[12..16];
            storage.write_all_at(at + 12, flags).map_err(Error::io("mark a bitmap as in use"))?;
        }
        at += length;
    }
    storage.sync().map_err(Error::io("make the bitmaps durable"))
}
