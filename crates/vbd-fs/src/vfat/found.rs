//! A FAT that is there, whoever made it: its files found, read, and written over in place. Files stay as long as they are,
//! so neither tables nor directories change.
//!
//! All that it says is hostile until checked: every number has its bounds, and what leads round in a circle ends.

use std::io;
use std::sync::{Mutex, PoisonError};

use vbd_ext4::edit::Storage;
use vbd_ext4::read::Source;

use super::FIRST;
use super::directory::{DIRECTORY, LONG, READ_ONLY_LABEL, UNITS, checksum};

/// Bytes of an entry of a directory.
const ENTRY: usize = 32;
/// The largest directory, in bytes: more no system takes.
const LARGEST_DIRECTORY: u64 = 2 << 20;
/// The most clusters that a FAT32 has numbers for.
const MOST: u64 = 0x0FFF_FFF5;

/// How wide an entry of the table is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Fat12,
    Fat16,
    Fat32,
}

/// Where a directory is.
#[derive(Clone, Copy)]
enum Place {
    /// The root of FAT12 and FAT16: where it begins, and its bytes.
    Area(u64, u64),
    /// From this cluster on.
    Chain(u32),
}

/// A FAT that is there.
pub(crate) struct Fat<S> {
    storage: S,
    kind: Kind,
    /// Bytes of a cluster.
    cluster: u64,
    /// Where the table that counts begins, and where the first cluster is, in bytes.
    table: u64,
    data: u64,
    /// The number behind the last cluster's.
    end: u32,
    root: Place,
}

/// A file in it.
pub(crate) struct File {
    /// Its name.
    pub(crate) name: String,
    /// Its bytes.
    pub(crate) size: u32,
    cluster: u32,
}

struct Entry {
    name: String,
    attributes: u8,
    cluster: u32,
    size: u32,
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
}

fn two(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 2).map_or(0, |bytes| u64::from(u16::from_le_bytes([bytes[0], bytes[1]])))
}

fn four(bytes: &[u8], at: usize) -> u64 {
    two(bytes, at) | two(bytes, at + 2) << 16
}

impl<S: Storage> Fat<S> {
    /// Opens what begins with a FAT's boot sector; nothing where that is none.
    ///
    /// # Errors
    ///
    /// Those of reading; numbers that do not fit each other or what it is in.
    pub(crate) fn open(storage: S) -> io::Result<Option<Fat<S>>> {
        let mut boot = [0; 512];
        if storage.size() < boot.len() as u64 {
            return Ok(None);
        }
        storage.read_exact_at(&mut boot, 0)?;
        let named = [54, 82].iter().any(|at| boot[*at..].starts_with(b"FAT"));
        if boot[510..] != [0x55, 0xAA] || !named {
            return Ok(None);
        }
        let (sector, per_cluster) = (two(&boot, 11), u64::from(boot[13]));
        if ![512, 1024, 2048, 4096].contains(&sector) || !per_cluster.is_power_of_two() {
            return Err(invalid("the FAT has sectors or clusters of no possible size"));
        }
        let either = |narrow: u64, wide: u64| if narrow != 0 { narrow } else { wide };
        let sectors = either(two(&boot, 19), four(&boot, 32));
        let (reserved, copies) = (two(&boot, 14), u64::from(boot[16]));
        let per_table = either(two(&boot, 22), four(&boot, 36));
        let root_bytes = two(&boot, 17) * ENTRY as u64;
        // Of numbers below 2^32 and 2^8, so none of this goes beyond 64 bits.
        let root = (reserved + copies * per_table) * sector;
        let data = root + root_bytes.next_multiple_of(sector);
        let clusters = (sectors * sector).saturating_sub(data) / (per_cluster * sector);
        let kind = match (two(&boot, 22), clusters) {
            (0, _) => Kind::Fat32,
            (_, ..4085) => Kind::Fat12,
            _ => Kind::Fat16,
        };
        let bits = match kind {
            Kind::Fat12 => 12,
            Kind::Fat16 => 16,
            Kind::Fat32 => 32,
        };
        let described = per_table * sector * 8 / bits;
        if reserved == 0 || copies == 0 || clusters == 0 || clusters > MOST {
            return Err(invalid("the FAT has no tables or no clusters"));
        }
        if described < clusters + u64::from(FIRST) || sectors * sector > storage.size() {
            return Err(invalid("the FAT is larger than its table, or than what it is in"));
        }
        // One copy may be the only one that counts, which the flags of a FAT32 say.
        let flags = if kind == Kind::Fat32 { two(&boot, 40) } else { 0 };
        let active = if flags & 0x80 != 0 { flags & 0xF } else { 0 };
        if active >= copies {
            return Err(invalid("the FAT says that a table counts that it does not have"));
        }
        let root = match kind {
            Kind::Fat32 => Place::Chain(u32::try_from(four(&boot, 44)).unwrap_or(0)),
            _ => Place::Area(root, root_bytes),
        };
        Ok(Some(Fat {
            storage,
            kind,
            cluster: per_cluster * sector,
            table: (reserved + active * per_table) * sector,
            data,
            end: u32::try_from(clusters).unwrap_or(0) + FIRST,
            root,
        }))
    }

    /// What it is in.
    pub(super) fn into_storage(self) -> S {
        self.storage
    }

    /// Where a cluster is, in bytes.
    fn place(&self, cluster: u32) -> io::Result<u64> {
        if !(FIRST..self.end).contains(&cluster) {
            return Err(invalid("the FAT names a cluster that it does not have"));
        }
        Ok(self.data + u64::from(cluster - FIRST) * self.cluster)
    }

    /// The cluster after one; nothing after the last. The one asked for is there.
    fn next(&self, cluster: u32) -> io::Result<Option<u32>> {
        let number = u64::from(cluster);
        let at = match self.kind {
            Kind::Fat12 => number + number / 2,
            Kind::Fat16 => number * 2,
            Kind::Fat32 => number * 4,
        };
        let mut bytes = [0; 4];
        let length = if self.kind == Kind::Fat32 { 4 } else { 2 };
        self.storage.read_exact_at(&mut bytes[..length], self.table + at)?;
        let word = u32::from_le_bytes(bytes);
        let (next, last) = match self.kind {
            Kind::Fat12 if cluster % 2 == 1 => (word >> 4, 0xFF8),
            Kind::Fat12 => (word & 0xFFF, 0xFF8),
            Kind::Fat16 => (word, 0xFFF8),
            Kind::Fat32 => (word & 0x0FFF_FFFF, 0x0FFF_FFF8),
        };
        Ok((next < last).then_some(next))
    }

    /// Where the bytes of a chain are, in pieces of a cluster: `size` of them, or as many as there are, where that is
    /// not known, up to what a directory may have.
    fn pieces(&self, first: u32, size: Option<u64>) -> io::Result<Vec<(u64, usize)>> {
        let mut pieces = Vec::new();
        let mut left = size.unwrap_or(LARGEST_DIRECTORY);
        let mut next = if left > 0 { Some(first) } else { None };
        while let Some(cluster) = next {
            let length = left.min(self.cluster);
            pieces.push((self.place(cluster)?, usize::try_from(length).unwrap_or(0)));
            left -= length;
            next = if left > 0 { self.next(cluster)? } else { None };
        }
        match size {
            Some(_) if left > 0 => Err(invalid("a file on the FAT is shorter than it is said to be")),
            None if left == 0 => {
                Err(invalid("a directory on the FAT is too large, or leads round in a circle"))
            }
            _ => Ok(pieces),
        }
    }

    fn bytes(&self, pieces: &[(u64, usize)]) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; pieces.iter().map(|(_, length)| length).sum()];
        let mut rest = &mut bytes[..];
        for (place, length) in pieces {
            let (now, later) = rest.split_at_mut(*length);
            self.storage.read_exact_at(now, *place)?;
            rest = later;
        }
        Ok(bytes)
    }

    fn entries(&self, directory: Place) -> io::Result<Vec<Entry>> {
        let bytes = match directory {
            Place::Area(start, bytes) => self.bytes(&[(start, usize::try_from(bytes).unwrap_or(0))])?,
            Place::Chain(first) => self.bytes(&self.pieces(first, None)?)?,
        };
        let mut entries = Vec::new();
        let mut long = Long::default();
        for entry in bytes.chunks_exact(ENTRY) {
            match (entry[0], entry[11]) {
                (0, _) => break,
                (0xE5, _) => long = Long::default(),
                (_, attributes) if attributes & 0x3F == LONG => long.add(entry),
                (_, attributes) if attributes & READ_ONLY_LABEL != 0 => long = Long::default(),
                (first, attributes) => {
                    let name = std::mem::take(&mut long).name(&entry[..11]).unwrap_or_else(|| short(entry));
                    if first != b'.' {
                        let cluster = two(entry, 20) << 16 | two(entry, 26);
                        entries.push(Entry {
                            name,
                            attributes,
                            cluster: u32::try_from(cluster).unwrap_or(0),
                            size: u32::try_from(four(entry, 28)).unwrap_or(0),
                        });
                    }
                }
            }
        }
        Ok(entries)
    }

    /// The files in a directory, whose path is compared without regard to case; none where there is no such directory.
    ///
    /// # Errors
    ///
    /// Those of reading; a damaged FAT.
    pub(crate) fn files(&self, path: &str) -> io::Result<Vec<File>> {
        let mut directory = self.root;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let entries = self.entries(directory)?;
            let found = entries
                .iter()
                .find(|entry| entry.attributes & DIRECTORY != 0 && entry.name.eq_ignore_ascii_case(name));
            let Some(found) = found else { return Ok(Vec::new()) };
            directory = Place::Chain(found.cluster);
        }
        let files = self.entries(directory)?.into_iter().filter(|entry| entry.attributes & DIRECTORY == 0);
        Ok(files.map(|Entry { name, cluster, size, .. }| File { name, size, cluster }).collect())
    }

    /// The content of a file, all of it: the caller has looked at its size.
    ///
    /// # Errors
    ///
    /// As [`files`](Self::files).
    pub(crate) fn read(&self, file: &File) -> io::Result<Vec<u8>> {
        self.bytes(&self.pieces(file.cluster, Some(file.size.into()))?)
    }

    /// Puts as many other bytes in the place of a file's.
    ///
    /// # Errors
    ///
    /// As [`files`](Self::files), and those of writing; another number of bytes.
    pub(crate) fn write_over(&self, file: &File, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() as u64 != u64::from(file.size) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut rest = bytes;
        for (place, length) in self.pieces(file.cluster, Some(file.size.into()))? {
            let (now, later) = rest.split_at(length);
            self.storage.write_all_at(now, place)?;
            rest = later;
        }
        Ok(())
    }
}

/// The short name of an entry.
fn short(entry: &[u8]) -> String {
    let text = |bytes: &[u8]| bytes.iter().map(|byte| char::from(*byte)).collect::<String>();
    let (stem, extension) = (text(&entry[..8]), text(&entry[8..11]));
    match extension.trim_end() {
        "" => stem.trim_end().to_owned(),
        extension => format!("{}.{extension}", stem.trim_end()),
    }
}

/// A long name on the way: its entries come before the one that it is of, its end first.
#[derive(Default)]
struct Long {
    units: Vec<u16>,
    /// The number of the entry that came last, which counts down to 1.
    number: u8,
    sum: u8,
}

impl Long {
    fn add(&mut self, entry: &[u8]) {
        let number = entry[0] & 0x3F;
        let begins = entry[0] & 0x40 != 0;
        if begins && (1..=20).contains(&number) {
            *self = Long { units: Vec::new(), number, sum: entry[13] };
        } else if begins || number + 1 != self.number || number == 0 || entry[13] != self.sum {
            *self = Long::default();
            return;
        }
        self.number = number;
        let places = (1..11).step_by(2).chain((14..26).step_by(2)).chain((28..32).step_by(2));
        let units = places.map(|at| u16::from_le_bytes([entry[at], entry[at + 1]]));
        let mut all: Vec<u16> = units.collect();
        debug_assert_eq!(all.len(), UNITS);
        all.append(&mut self.units);
        self.units = all;
    }

    /// The name, if it is whole and this entry's.
    fn name(self, short: &[u8]) -> Option<String> {
        let own = checksum(short.try_into().ok()?);
        if self.number != 1 || self.sum != own {
            return None;
        }
        let length = self.units.iter().position(|unit| *unit == 0).unwrap_or(self.units.len());
        String::from_utf16(&self.units[..length]).ok()
    }
}

/// A disk in memory, for tests and fuzzing.
pub(super) struct Memory(Mutex<Vec<u8>>);

impl Memory {
    pub(super) fn new(bytes: &[u8]) -> Memory {
        Memory(Mutex::new(bytes.to_vec()))
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, offset: u64, length: usize, each: impl FnOnce(&mut [u8]) -> T) -> io::Result<T> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let part = start.checked_add(length).and_then(|end| bytes.get_mut(start..end));
        part.map(each).ok_or(io::ErrorKind::UnexpectedEof.into())
    }
}

impl Source for Memory {
    fn size(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(offset, buffer.len(), |part| buffer.copy_from_slice(part))
    }
}

impl Storage for Memory {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.with(offset, bytes.len(), |part| part.copy_from_slice(bytes))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vbd_testing::{Random, seeds};

    use super::super::{Name, Volume};
    use super::*;
    use crate::Time;

    fn names(fat: &Fat<Memory>, path: &str) -> Vec<String> {
        fat.files(path).unwrap().into_iter().map(|file| file.name).collect()
    }

    /// One that was made here.
    fn made(size: u64) -> Vec<u8> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        let name = Name::new("label", 1).unwrap();
        let mut volume = Volume::format(&file, 0, size, 512, &name, Time::default()).unwrap();
        volume.add("EXACT.TXT", &mut &b"exact"[..]).unwrap();
        volume.add("loader/entries/a rather long name äö.conf", &mut &[b'x'; 10_000][..]).unwrap();
        volume.add("loader/entries/empty", &mut io::empty()).unwrap();
        for number in 0..200 {
            volume.add(&format!("many/file number {number}"), &mut &[7; 100][..]).unwrap();
        }
        volume.finish().unwrap();
        let mut bytes = vec![0; usize::try_from(size).unwrap()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn what_was_made_here_is_found_and_written_over() {
        for (size, kind) in [(4 << 20, Kind::Fat16), (256 << 20, Kind::Fat32)] {
            let bytes = made(size);
            let fat = Fat::open(Memory::new(&bytes)).unwrap().unwrap();
            assert_eq!(fat.kind, kind);
            assert_eq!(names(&fat, ""), ["EXACT.TXT"]);
            assert_eq!(names(&fat, "LOADER/Entries"), ["a rather long name äö.conf", "empty"]);
            assert_eq!((names(&fat, "many").len(), names(&fat, "none").len()), (200, 0));
            let file = &fat.files("loader/entries").unwrap()[0];
            assert_eq!(fat.read(file).unwrap(), [b'x'; 10_000]);
            assert!(fat.write_over(file, b"short").is_err());
            fat.write_over(file, &[b'y'; 10_000]).unwrap();
            assert_eq!(fat.read(file).unwrap(), [b'y'; 10_000]);
            let after = fat.into_storage().into_bytes();
            // Block by block first: it is a large disk.
            let blocks = after.chunks(4096).zip(bytes.chunks(4096)).filter(|(one, other)| one != other);
            let changed =
                blocks.flat_map(|(one, other)| one.iter().zip(other)).filter(|(one, other)| one != other);
            let changed = changed.count();
            assert_eq!(changed, 10_000, "nothing else");
        }
        assert!(Fat::open(Memory::new(&[0; 100])).unwrap().is_none());
        assert!(Fat::open(Memory::new(&[0; 4096])).unwrap().is_none());
    }

    /// Of mkfs.fat and mtools, which put other numbers into other places.
    #[test]
    fn what_others_made_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let text = directory.path().join("text");
        std::fs::write(&text, "of others").unwrap();
        for (kind, size, wanted) in
            [("12", 2u64 << 20, Kind::Fat12), ("16", 20 << 20, Kind::Fat16), ("32", 40 << 20, Kind::Fat32)]
        {
            let path = directory.path().join(kind);
            std::fs::File::create(&path).unwrap().set_len(size).unwrap();
            let run = |program: &str, arguments: &[&str]| {
                let mut command = std::process::Command::new(program);
                command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").args(arguments);
                let output = command.output().unwrap();
                assert!(output.status.success(), "{program}: {output:?}");
            };
            let image = path.to_str().unwrap();
            run("mkfs.fat", &["-F", kind, image]);
            run("mmd", &["-i", image, "::/loader", "::/loader/entries"]);
            for name in ["one.conf", "Another Longer Name.conf", "UP.CFG"] {
                run("mcopy", &["-i", image, text.to_str().unwrap(), &format!("::/loader/entries/{name}")]);
            }
            let fat = Fat::open(Memory::new(&std::fs::read(&path).unwrap())).unwrap().unwrap();
            assert_eq!(fat.kind, wanted);
            let files = fat.files("loader/entries").unwrap();
            assert_eq!(files.len(), 3);
            assert!(files.iter().any(|file| file.name == "Another Longer Name.conf"));
            assert!(files.iter().all(|file| fat.read(file).unwrap() == b"of others"));
        }
    }

    #[test]
    fn what_is_damaged_ends() {
        let whole = made(4 << 20);
        for seed in seeds(2000) {
            let mut random = Random::new(seed);
            let mut bytes = whole.clone();
            for _ in 0..=random.below(8) {
                // The boot sector, the tables, the root, or anywhere.
                let bound = *random.one_of(&[90, 512, 40 << 10, 80 << 10, 4 << 20]);
                let at = random.index(bound);
                bytes[at] = random.next_u64().to_le_bytes()[0];
            }
            super::super::fuzz(&bytes);
        }
        // A directory that leads to itself, in the first of whose clusters is no end.
        let fat = Fat::open(Memory::new(&whole)).unwrap().unwrap();
        let Ok(entries) = fat.entries(fat.root) else { panic!("the root") };
        let many = entries.iter().find(|entry| entry.name == "many").unwrap().cluster;
        let place = fat.table + u64::from(many) * 2;
        fat.storage.write_all_at(&u16::try_from(many).unwrap().to_le_bytes(), place).unwrap();
        let error = fat.files("many").err().unwrap();
        assert!(error.to_string().contains("circle"), "{error}");
    }
}
