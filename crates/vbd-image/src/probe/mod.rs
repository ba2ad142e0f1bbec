//! What is in a disk: a filesystem, a partition table with filesystems in it, or something else that is known by its
//! header.
//!
//! For information only. A guest can write anything into its disk, so nothing found here ever decides how the disk is
//! opened or served, and every number is hostile until checked.

mod ext;
mod filesystems;
mod head;
mod table;

use std::io;

use serde::Serialize;

pub use table::{Partition, Table, TableKind};

use crate::read_at::ReadAt;

use head::Head;

/// How much of a disk or partition is looked at: the farthest header, that of Btrfs, ends at 68 KiB.
const HEAD: usize = 128 * 1024;

/// What a disk contains. Both can be there: a boot sector in front of a filesystem can hold a table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Contents {
    /// What begins at the start of the disk.
    pub filesystem: Option<Filesystem>,
    /// The partition table and what is in its partitions.
    pub table: Option<Table>,
}

/// A filesystem, or another thing with a header of its own (swap, LVM, LUKS, a disk format). What its header does not
/// tell is `None`. Texts hold no control characters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Filesystem {
    /// Its type as mount(8) and blkid(8) call it.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Its label, if it has one.
    pub label: Option<String>,
    /// Its UUID, or what the type has instead.
    pub uuid: Option<String>,
    /// Its size in bytes.
    pub size: Option<u64>,
    /// Bytes free in it, as it says: current after a clean unmount only.
    pub free: Option<u64>,
    /// Whether it was unmounted cleanly and has no known errors.
    pub clean: Option<bool>,
    /// What is wrong with it, as the end of a sentence that begins with its type.
    pub trouble: Option<&'static str>,
}

impl Filesystem {
    fn new(kind: &'static str) -> Self {
        Filesystem { kind, ..Filesystem::default() }
    }

    /// Clean if there is no trouble.
    fn judged(self, trouble: Option<&'static str>) -> Self {
        Filesystem { clean: Some(trouble.is_none()), trouble, ..self }
    }

    /// What follows from the size of the disk or partition that it is in.
    fn within(mut self, room: u64) -> Self {
        if self.trouble.is_none() && self.size.is_some_and(|size| size > room) {
            self.trouble = Some("is larger than what holds it");
        }
        self.free = self.free.filter(|free| self.size.is_none_or(|size| *free <= size));
        self
    }
}

/// Look into a disk of `size` bytes, in a file that is open for reading or elsewhere. Errors: those of reading.
pub fn contents<S: ReadAt + ?Sized>(source: &S, size: u64) -> io::Result<Contents> {
    let mut buffer = vec![0; HEAD];
    let filesystem = filesystem_at(source, 0, size, &mut buffer)?;
    // The boot sector of these looks like one with a table.
    let boot_sector =
        filesystem.as_ref().is_some_and(|found| ["vfat", "ntfs", "exfat"].contains(&found.kind));
    let table = if boot_sector { None } else { table::find(source, size)? };
    let mut contents = Contents { filesystem, table };
    for partition in contents.table.iter_mut().flat_map(|table| &mut table.partitions) {
        partition.filesystem = filesystem_at(source, partition.start, partition.size, &mut buffer)?;
    }
    Ok(contents)
}

/// The filesystem in a range of the disk. `buffer` is scratch space of [`HEAD`] bytes.
fn filesystem_at<S: ReadAt + ?Sized>(
    source: &S,
    offset: u64,
    size: u64,
    buffer: &mut [u8],
) -> io::Result<Option<Filesystem>> {
    let length = usize::try_from(size).unwrap_or(HEAD).min(HEAD);
    let length = source.fill_at(offset, &mut buffer[..length])?;
    let head = Head(&buffer[..length]);
    Ok(ext::find(head).or_else(|| filesystems::find(head)).map(|found| found.within(size)))
}

/// Look into a disk whose bytes these are. Never fails and never panics, whatever they are.
pub fn filesystem_bytes(bytes: &[u8]) -> Contents {
    contents(bytes, bytes.len() as u64).unwrap_or_default()
}

/// A warning for one who is about to serve this disk: a filesystem on it was not unmounted cleanly or has errors.
/// `None` if all is well, or not known.
pub fn unclean_warning(contents: &Contents) -> Option<String> {
    let partitions = contents.table.iter().flat_map(|table| &table.partitions);
    let partitions = partitions.map(|partition| (Some(partition.number), &partition.filesystem));
    let all = std::iter::once((None, &contents.filesystem)).chain(partitions);
    let warnings: Vec<_> = all
        .filter_map(|(number, filesystem)| {
            let filesystem = filesystem.as_ref()?;
            let trouble = filesystem.trouble?;
            let place = number.map_or(String::new(), |number| format!(" in partition {number}"));
            Some(format!("the {}{place} {trouble}", filesystem.kind))
        })
        .collect();
    (!warnings.is_empty()).then(|| warnings.join("; "))
}
