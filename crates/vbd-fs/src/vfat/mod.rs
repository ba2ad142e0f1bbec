//! FAT16 and FAT32, written in one pass: the EFI system partition and seed disks. The same content gives the same bytes.
//! And FATs that are there, FAT12 too, whose files are read and written over ([`Fat`]).
//!
//! Data goes to its place while it is read, each file in one piece; the tables and directories follow at the end. The
//! format is Microsoft's "FAT32 File System Specification" 1.03 ("FAT Type Determination", "FAT Directory Structure",
//! "Long Directory Entries").

mod directory;
mod found;
mod geometry;
mod time;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use crate::Time;
use directory::Directory;
pub(crate) use found::Fat;
use geometry::Geometry;

/// The smallest filesystem that is made, in bytes: with less it would be FAT12, which is of floppy disks.
pub(crate) const SMALLEST: u64 = 4 << 20;
/// The largest file, by the field for its size.
const LARGEST_FILE: u64 = u32::MAX as u64;
/// The first cluster; 0 and 1 have other meanings in the table.
const FIRST: u32 = 2;

/// What a new filesystem is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    /// At most 11 bytes; see [`Name::new`].
    label: [u8; 11],
    /// The number that stands for a UUID.
    id: u32,
}

impl Name {
    /// Checks a label: 1 to 11 letters, digits, `-`, `_` or spaces, which are written in upper case.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub(crate) fn new(label: &str, id: u32) -> Result<Name, String> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b' ');
        if label.trim().is_empty() || label.len() > 11 || !label.bytes().all(plain) {
            return Err(format!("label {label:?}: a FAT's has 1 to 11 letters, digits, - or _"));
        }
        let mut bytes = [b' '; 11];
        bytes[..label.len()].copy_from_slice(label.to_ascii_uppercase().as_bytes());
        Ok(Name { label: bytes, id })
    }

    /// The number as `UUID=` takes it.
    pub(crate) fn uuid(&self) -> String {
        format!("{:04X}-{:04X}", self.id >> 16, self.id & 0xFFFF)
    }
}

/// Looks at a disk whose bytes these are as at a FAT: finds the files that a clone looks for, reads them, and writes the
/// same again. For fuzzing: it must end without a panic, and change nothing.
///
/// # Panics
///
/// When it does not.
pub fn fuzz(bytes: &[u8]) {
    let Ok(Some(fat)) = Fat::open(found::Memory::new(bytes)) else { return };
    for directory in ["", "loader/entries", "EFI/BOOT", "many"] {
        for file in
            fat.files(directory).unwrap_or_default().iter().filter(|file| file.size <= 1 << 20).take(100)
        {
            let Ok(content) = fat.read(file) else { continue };
            fat.write_over(file, &content).expect("what can be read can be written");
        }
    }
    assert!(fat.into_storage().into_bytes() == bytes, "what is the same changes nothing");
}

/// Clusters in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u32,
    count: u32,
}

/// A filesystem that is being filled.
pub(crate) struct Volume<'a> {
    file: &'a File,
    /// Where it begins in the file, in bytes.
    start: u64,
    geometry: Geometry,
    name: Name,
    time: Time,
    /// The first cluster that is free; all after it are.
    next: u32,
    root: Directory,
    /// The chains of clusters, each of one or two runs.
    chains: Vec<Vec<Run>>,
}

impl<'a> Volume<'a> {
    /// Begins one in `length` bytes of `file` from `start` on, which hold zeros, in sectors of `sector` bytes. All in it
    /// gets the time `time`. FAT32 from 256 MiB on, FAT16 below.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] for a length that a FAT cannot have.
    pub(crate) fn format(
        file: &'a File,
        start: u64,
        length: u64,
        sector: u64,
        name: &Name,
        time: Time,
    ) -> io::Result<Volume<'a>> {
        let geometry = Geometry::of(length, sector).ok_or_else(|| {
            let reason = format!("no FAT has {length} bytes in sectors of {sector}");
            io::Error::new(io::ErrorKind::InvalidInput, reason)
        })?;
        // By custom the root directory of a FAT32 begins at the first cluster.
        let next = if geometry.wide { FIRST + 1 } else { FIRST };
        let root = Directory::default();
        Ok(Volume { file, start, geometry, name: name.clone(), time, next, root, chains: Vec::new() })
    }

    /// Writes a file, with the directories above it, and gives its size. The path has slashes between its names.
    ///
    /// # Errors
    ///
    /// Those of reading and writing; [`io::ErrorKind::StorageFull`]; a name that a FAT cannot have; a file that is
    /// there, or one of 4 GiB.
    pub(crate) fn add(&mut self, path: &str, data: &mut dyn Read) -> io::Result<u64> {
        let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
        self.root.descend(above)?.check_new(name)?;
        let cluster = self.geometry.cluster();
        let first = self.next;
        let begin = self.position(first);
        let room = u64::from(self.geometry.end() - first) * cluster;
        let mut buffer = vec![0; 1 << 20];
        let mut size = 0u64;
        loop {
            let read = match data.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            let after = size + read as u64;
            if after > LARGEST_FILE {
                return Err(io::Error::other("a file on a FAT has less than 4 GiB"));
            }
            if after > room {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.file.write_all_at(&buffer[..read], begin + size)?;
            size = after;
        }
        let run = self.take(size)?;
        let size32 = u32::try_from(size).unwrap_or(u32::MAX);
        self.root.descend(above)?.add_file(name, run.map_or(0, |run| run.first), size32)?;
        self.chains.extend(run.map(|run| vec![run]));
        Ok(size)
    }

    /// Makes a directory and those above it, where they are missing.
    ///
    /// # Errors
    ///
    /// A name that a FAT cannot have, or that is a file's.
    pub(crate) fn make_directories(&mut self, path: &str) -> io::Result<()> {
        self.root.descend(path).map(|_| ())
    }

    /// Takes the next clusters for so many bytes; none for none.
    fn take(&mut self, bytes: u64) -> io::Result<Option<Run>> {
        let count = u32::try_from(bytes.div_ceil(self.geometry.cluster())).unwrap_or(u32::MAX);
        if count > self.geometry.end() - self.next {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let run = Run { first: self.next, count };
        self.next += count;
        Ok((count > 0).then_some(run))
    }

    /// Where a cluster is in the file, in bytes.
    fn position(&self, cluster: u32) -> u64 {
        self.start + self.geometry.data() + u64::from(cluster - FIRST) * self.geometry.cluster()
    }

    /// Writes directories, tables and boot sector.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::StorageFull`]; those of writing.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        let mut root = std::mem::take(&mut self.root);
        // Below first, so that each directory knows where those in it are.
        self.place_below(&mut root, 0)?;
        let label = directory::label(&self.name.label, self.time);
        let mut bytes = label.to_vec();
        bytes.extend(root.encode(self.time)?);
        if self.geometry.wide {
            let more = (bytes.len() as u64).saturating_sub(self.geometry.cluster());
            let rest = self.take(more)?;
            let mut chain = vec![Run { first: FIRST, count: 1 }];
            chain.extend(rest);
            self.write_chain(&chain, &bytes)?;
            self.chains.push(chain);
        } else {
            if bytes.len() as u64 > self.geometry.root_bytes() {
                return Err(io::Error::new(io::ErrorKind::StorageFull, "too many files in a FAT16's root"));
            }
            self.file.write_all_at(&bytes, self.start + self.geometry.root())?;
        }
        self.write_tables()?;
        self.write_boot()
    }

    /// Places the directories in one, which has its own place already (0: the root).
    fn place_below(&mut self, directory: &mut Directory, own: u32) -> io::Result<()> {
        for below in directory.directories() {
            let run = self.take(below.size()?)?.ok_or(io::ErrorKind::InvalidInput)?;
            below.cluster = run.first;
            self.chains.push(vec![run]);
            self.place_below(below, run.first)?;
            let mut bytes = directory::dots(run.first, own, self.time);
            bytes.extend(below.encode(self.time)?);
            self.write_chain(&[run], &bytes)?;
        }
        Ok(())
    }

    fn write_chain(&self, chain: &[Run], mut bytes: &[u8]) -> io::Result<()> {
        for run in chain {
            let room = u64::from(run.count) * self.geometry.cluster();
            let length = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
            let (now, later) = bytes.split_at(length);
            self.file.write_all_at(now, self.position(run.first))?;
            bytes = later;
        }
        Ok(())
    }

    /// Both copies of the table, as far as clusters are used: the rest is zeros.
    fn write_tables(&self) -> io::Result<()> {
        let last: u32 = 0x0FFF_FFFF;
        let mut entries = vec![0u32; usize::try_from(self.next).unwrap_or(0)];
        (entries[0], entries[1]) = (0x0FFF_FFF8, last);
        for chain in &self.chains {
            let mut clusters = chain.iter().flat_map(|run| run.first..run.first + run.count).peekable();
            while let Some(cluster) = clusters.next() {
                entries[cluster as usize] = clusters.peek().copied().unwrap_or(last);
            }
        }
        let bytes: Vec<u8> = if self.geometry.wide {
            entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
        } else {
            // The low half of an end mark is an end mark of FAT16.
            entries
                .iter()
                .flat_map(|entry| {
                    let [a, b, ..] = entry.to_le_bytes();
                    [a, b]
                })
                .collect()
        };
        (0..2).try_for_each(|copy| self.file.write_all_at(&bytes, self.start + self.geometry.table(copy)))
    }

    fn write_boot(&self) -> io::Result<()> {
        let sector = self.geometry.sector;
        let boot = self.geometry.boot_sector(self.start / sector, &self.name.label, self.name.id);
        self.file.write_all_at(&boot, self.start)?;
        if self.geometry.wide {
            let information = geometry::information(self.geometry.end() - self.next, self.next);
            for copy in [0, geometry::BACKUP] {
                self.file.write_all_at(&information, self.start + (copy + 1) * sector)?;
            }
            self.file.write_all_at(&boot, self.start + geometry::BACKUP * sector)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_a_fat_cannot_have() {
        assert_eq!(Name::new("cidata", 0x1234_ABCD).unwrap().label, *b"CIDATA     ");
        assert_eq!(Name::new("x", 0x1234_ABCD).unwrap().uuid(), "1234-ABCD");
        for bad in ["", "   ", "twelve bytes", "ä", "a/b"] {
            assert!(Name::new(bad, 0).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_does_not_fit() {
        let file = tempfile::tempfile().unwrap();
        let name = Name::new("x", 1).unwrap();
        assert!(Volume::format(&file, 0, 1 << 20, 512, &name, Time::default()).is_err());
        let mut volume = Volume::format(&file, 0, SMALLEST, 512, &name, Time::default()).unwrap();
        let full = volume.add("a", &mut io::repeat(1)).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        volume.add("a", &mut &b"text"[..]).unwrap();
        for taken in ["A", "a/b"] {
            assert!(volume.add(taken, &mut io::empty()).is_err(), "{taken}");
        }
        for odd in ["", "a:b", "x.", "..", "a\n", &"x".repeat(256)] {
            assert!(volume.add(odd, &mut io::empty()).is_err(), "{odd:?}");
        }
    }

    /// Many names, in the root and deep below, in filesystems of every kind: what others say of them.
    #[test]
    fn others_find_no_fault() {
        let directory = tempfile::tempdir().unwrap();
        for (size, sector) in
            [(SMALLEST, 512), (70 << 20, 512), (256 << 20, 512), (1 << 30, 512), (600 << 20, 4096)]
        {
            let path = directory.path().join(format!("{size}"));
            let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
            file.set_len(size).unwrap();
            let name = Name::new("label", 0x1234_5678).unwrap();
            let time = Time { seconds: 1_700_000_000, nanoseconds: 0 };
            let mut volume = Volume::format(&file, 0, size, sector, &name, time).unwrap();
            for number in 0..100u32 {
                volume
                    .add(&format!("a rather long name, number {number}.text"), &mut &number.to_le_bytes()[..])
                    .unwrap();
                volume
                    .add(&format!("deep/er/und tiefer ä/{number}"), &mut io::repeat(7).take(number.into()))
                    .unwrap();
            }
            volume.add("deep/EXACT.TXT", &mut io::repeat(b'x').take(100_000)).unwrap();
            volume.add("empty", &mut io::empty()).unwrap();
            volume.make_directories("nothing/in it").unwrap();
            volume.finish().unwrap();

            let run = |program: &str, arguments: &[&str]| {
                let mut command = std::process::Command::new(program);
                command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").args(&arguments[..1]).arg(&path);
                let output =
                    command.args(&arguments[1..]).output().unwrap_or_else(|e| panic!("{program}: {e}"));
                let said = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(output.status.success(), "{size}: {said}{}", String::from_utf8_lossy(&output.stderr));
                output.stdout
            };
            let said = run("fsck.vfat", &["-n"]);
            // Nothing but a greeting and the count.
            assert_eq!(
                String::from_utf8_lossy(&said).lines().count(),
                2,
                "{}",
                String::from_utf8_lossy(&said)
            );
            assert_eq!(run("mtype", &["-i", "::deep/EXACT.TXT"]), vec![b'x'; 100_000]);
            assert_eq!(run("mtype", &["-i", "::a rather long name, number 99.text"]), 99u32.to_le_bytes());
        }
    }
}
