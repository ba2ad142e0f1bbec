//! What makes an image another one than its base: UUIDs, names, keys.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

use vbd_ext4::edit::{Editor, Storage, Timestamp};
use vbd_ext4::read::{Source, Window};
use vbd_image::partition::{Format, Guid, Table};

use super::device::Device;
use super::names::{DIRECTORIES, FILES, Names};
use super::{Disk, Volume};
use crate::error::Context;
use crate::tailor::{Attributes, ImageRoot, Kind, Root, Tailor};
use crate::vfat::Fat;
use crate::{Error, Filesystem, Result, Time};

/// The largest file in the EFI system partition that is looked at, in bytes.
const LARGEST: u32 = 1 << 20;
/// Files in one directory of it that are looked at.
const MOST: usize = 1000;

/// The new names of an image.
pub(super) struct Identity<'a> {
    /// What is asked for in the filesystem that is the root.
    pub(super) tailor: &'a Tailor,
    /// The label of the root.
    pub(super) label: Option<&'a str>,
    /// The time that changes get.
    pub(super) now: Time,
}

/// Sixteen random bytes as a UUID of version 4 (RFC 9562, section 5.4).
fn random() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(bytes)
}

fn fresh() -> Result<[u8; 16]> {
    random().map_err(|error| Error::io("cannot read /dev/urandom", error))
}

/// A filesystem in a file that has no name yet: flushed as a whole before it gets one, and not at each step.
struct Unnamed(Window<Arc<dyn Device>>);

impl Source for Unnamed {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }
}

impl Storage for Unnamed {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Makes an image another one. It is one that nobody has a name of yet: a cut leaves nothing of it. Returns the new
/// UUIDs of its filesystems.
pub(super) fn change(disk: &mut Disk, identity: &Identity<'_>) -> Result<Vec<(Volume, String)>> {
    if disk.volumes.is_empty() {
        let what = "no ext3 or ext4 filesystem is in it, and the identity of others is not known here";
        return Err(Error::Inside(format!("{}: {what}; cp makes a plain copy", disk.path.display())));
    }
    let mut names = Names::default();
    if let Some(mut table) = disk.table.take() {
        partitions(&mut table, &mut names)?;
        let parts =
            table.encode(disk.size).map_err(|misfit| io::Error::new(io::ErrorKind::InvalidInput, misfit));
        parts
            .and_then(|parts| parts.iter().try_for_each(|(at, bytes)| disk.device.write_all_at(bytes, *at)))
            .at("write the partition table of", &disk.path)?;
        disk.table = Some(table);
    }
    let now = Timestamp { seconds: identity.now.seconds, nanoseconds: identity.now.nanoseconds };
    let mut editors = Vec::new();
    for volume in &disk.volumes {
        let failed =
            |error: vbd_ext4::edit::EditError| Error::Inside(format!("{}: {error}", disk.name(volume)));
        let editor = Editor::open(Unnamed(disk.part(volume)), now).map_err(failed)?;
        let uuid = fresh()?;
        let old = Guid(u128::from_be_bytes(editor.filesystem().superblock().uuid)).to_string();
        let new = Guid(u128::from_be_bytes(uuid)).to_string();
        names.add(&old, &new);
        editors.push((*volume, editor, uuid, new));
    }
    let mut uuids = Vec::new();
    let mut tailored = false;
    for (volume, mut editor, uuid, shown) in editors {
        let failed =
            |error: vbd_ext4::edit::EditError| Error::Inside(format!("{}: {error}", disk.name(&volume)));
        let mut root = ImageRoot::new(&mut editor, identity.now);
        // The root is the one with /etc; a boot partition or /home has none.
        let is_root = matches!(root.look("/etc")?, Some(Attributes { kind: Kind::Directory, .. }));
        let first = is_root && !tailored;
        follow(&mut root, &names)?;
        if first {
            tailored = true;
            identity.tailor.apply(&mut root, Filesystem::Ext4)?;
        }
        let label = identity.label.filter(|_| first || disk.volumes.len() == 1);
        editor.identify(uuid, label.map(str::as_bytes)).map_err(failed)?;
        editor.commit().map_err(failed)?;
        uuids.push((volume, shown));
    }
    let asked = identity.tailor.clone();
    if !tailored && asked != (Tailor { reset_identity: asked.reset_identity, ..Tailor::default() }) {
        return Err(Error::Invalid(format!(
            "{}: none of its filesystems has an /etc, so there is nothing to tailor",
            disk.path.display()
        )));
    }
    boot_partitions(disk, &names)?;
    Ok(uuids)
}

/// New names for the disk and its partitions.
fn partitions(table: &mut Table, names: &mut Names) -> Result<()> {
    let old: Vec<_> = table.partitions.iter().map(|partition| table.partuuid(partition)).collect();
    table.format = match table.format {
        Format::Gpt(_) => Format::Gpt(Guid(u128::from_be_bytes(fresh()?))),
        Format::Mbr(0) => Format::Mbr(0),
        Format::Mbr(_) => {
            let [a, b, c, d, ..] = fresh()?;
            Format::Mbr(u32::from_be_bytes([a, b, c, d]).max(1))
        }
    };
    if matches!(table.format, Format::Gpt(_)) {
        for partition in &mut table.partitions {
            partition.uuid = Some(Guid(u128::from_be_bytes(fresh()?)));
        }
    }
    for (partition, old) in table.partitions.iter().zip(old) {
        if let (Some(old), Some(new)) = (old, table.partuuid(partition)) {
            names.add(&old, &new);
        }
    }
    Ok(())
}

/// Puts new names in place of the old ones in the files that have such names.
fn follow(root: &mut dyn Root, names: &Names) -> Result<()> {
    let mut paths: Vec<String> = FILES.iter().map(|path| (*path).to_owned()).collect();
    for directory in DIRECTORIES {
        if !matches!(root.look(directory)?, Some(Attributes { kind: Kind::Directory, .. })) {
            continue;
        }
        let entries = root.list(directory)?.into_iter().filter_map(|name| name.into_string().ok());
        paths
            .extend(entries.filter(|name| name.ends_with(".conf")).map(|name| format!("{directory}/{name}")));
    }
    for path in paths {
        let Some(Attributes { kind: Kind::File, meta }) = root.look(&path)? else { continue };
        let Some(bytes) = root.read(&path)? else { continue };
        if let Some(new) = names.replace(&bytes) {
            root.write(&path, &mut &new[..], &meta)?;
        }
    }
    Ok(())
}

/// The same in FAT partitions, whose files are written over in place: they stay as long as they are.
fn boot_partitions(disk: &Disk, names: &Names) -> Result<()> {
    let Some(table) = &disk.table else { return Ok(()) };
    for partition in &table.partitions {
        let volume = disk.volumes.iter().any(|volume| volume.partition == Some(partition.number));
        if volume || partition.kind.is_extended() || !partition.fits(disk.size) {
            continue;
        }
        let (path, number) = (disk.path.display(), partition.number);
        let fat = match Fat::open(Window::new(disk.device.clone(), partition.start, partition.size)) {
            Ok(Some(fat)) => fat,
            Ok(None) => continue,
            Err(error) => {
                tracing::warn!("{path}, partition {number}: {error}; left as it is");
                continue;
            }
        };
        fat_files(&fat, names)
            .map_err(|error| Error::io(format!("cannot change partition {number} of {path}"), error))?;
    }
    Ok(())
}

fn fat_files(fat: &Fat<Window<Arc<dyn Device>>>, names: &Names) -> io::Result<()> {
    for directory in ["loader/entries", "EFI/debian", "EFI/ubuntu", "EFI/BOOT", "boot/grub", "grub"] {
        for file in fat.files(directory)?.iter().take(MOST) {
            let name = file.name.to_ascii_lowercase();
            if file.size > LARGEST || !(name.ends_with(".conf") || name.ends_with(".cfg")) {
                continue;
            }
            if let Some(new) = names.replace(&fat.read(file)?) {
                fat.write_over(file, &new)?;
            }
        }
    }
    Ok(())
}
