//! A FAT that is filled: from a directory, or from an archive.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::Path;

use crate::archive::Archive;
use crate::entry::{Content, Entry, Node, Sink};
use crate::error::Context;
use crate::vfat::Volume;
use crate::{Error, Progress, Result};

/// Puts the files of a directory or an archive into a FAT, which has neither links nor devices, nor owners and modes.
///
/// # Errors
///
/// Something that a FAT cannot hold, by its name; no room; those of reading and writing.
pub(super) fn fill(
    volume: &mut Volume<'_>,
    from: &Path,
    scratch: &Path,
    progress: &mut dyn Progress,
) -> Result<()> {
    if from.is_dir() {
        return directory(volume, from, "", progress);
    }
    let file = File::open(from).at("open", from)?;
    let name = from.display().to_string();
    // What it says of ACLs is of no use here, as are owners.
    Archive { name: &name, file, scratch }.unpack(&mut Filled { volume }, progress).map(|_| ())
}

const NO_NAME: &str = "has a name that a FAT cannot have";
const NO_FILE: &str = "is neither a file nor a directory, and a FAT holds nothing else";

/// Copies the files below a directory.
fn directory(
    volume: &mut Volume<'_>,
    directory: &Path,
    below: &str,
    progress: &mut dyn Progress,
) -> Result<()> {
    let entries = std::fs::read_dir(directory).at("list", directory)?;
    let mut entries: Vec<_> = entries.collect::<io::Result<_>>().at("list", directory)?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        if progress.cancelled() {
            return Err(Error::Interrupted);
        }
        let path = entry.path();
        let source = |reason: &str| Error::Source { path: path.clone(), reason: reason.to_owned() };
        let name = entry.file_name().into_string().map_err(|_| source(NO_NAME))?;
        let inside = if below.is_empty() { name } else { format!("{below}/{name}") };
        let kind = entry.file_type().at("look at", &path)?;
        if kind.is_dir() {
            volume.make_directories(&inside).at("make in the FAT", &path)?;
            self::directory(volume, &path, &inside, progress)?;
        } else if kind.is_file() {
            let mut file = File::open(&path).at("open", &path)?;
            progress.advance(volume.add(&inside, &mut file).at("copy into the FAT", &path)?);
        } else {
            return Err(source(NO_FILE));
        }
    }
    Ok(())
}

/// A FAT as the place where an archive's entries go.
struct Filled<'a, 'b> {
    volume: &'a mut Volume<'b>,
}

impl Sink for Filled<'_, '_> {
    fn add(&mut self, entry: Entry<'_>, progress: &mut dyn Progress) -> Result<()> {
        if progress.cancelled() {
            return Err(Error::Interrupted);
        }
        let Entry { path, node, .. } = entry;
        let source = |reason: String| Error::Source { path: path.to_owned(), reason };
        let inside = path.to_str().ok_or_else(|| source(NO_NAME.to_owned()))?;
        match node {
            Node::Directory if inside.is_empty() => Ok(()),
            Node::Directory => self
                .volume
                .make_directories(inside)
                .map_err(|error| source(format!("cannot be made in the FAT: {error}"))),
            Node::File { size, content } => {
                let mut bytes = Flat { content, size, at: 0, extent: 0..0 };
                let added = self.volume.add(inside, &mut bytes);
                progress.advance(
                    added.map_err(|error| source(format!("cannot be copied into the FAT: {error}")))?,
                );
                Ok(())
            }
            Node::HardLink(to) => Err(source(format!(
                "is another name of {}, which a FAT cannot have; pack it with --hard-dereference",
                to.display()
            ))),
            Node::Symlink(_) | Node::Device { .. } => Err(source(NO_FILE.to_owned())),
        }
    }
}

/// All bytes of a content, those of its holes too.
struct Flat<'a> {
    content: &'a mut dyn Content,
    size: u64,
    at: u64,
    /// The extent that is read, or the next.
    extent: Range<u64>,
}

impl Read for Flat<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.size || buffer.is_empty() {
            return Ok(0);
        }
        if self.at >= self.extent.end {
            let next = self.content.next_extent()?;
            self.extent = next.unwrap_or(self.size..u64::MAX);
        }
        let hole = self.at < self.extent.start;
        let end = if hole { self.extent.start.min(self.size) } else { self.extent.end.min(self.size) };
        let length = usize::try_from(end - self.at).unwrap_or(usize::MAX).min(buffer.len());
        let read = if hole {
            buffer[..length].fill(0);
            length
        } else {
            self.content.read(&mut buffer[..length])?
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that each say where they are, in extents.
    struct Pieces(Vec<Range<u64>>, Range<u64>);

    impl Content for Pieces {
        fn next_extent(&mut self) -> io::Result<Option<Range<u64>>> {
            if self.0.is_empty() {
                return Ok(None);
            }
            self.1 = self.0.remove(0);
            Ok(Some(self.1.clone()))
        }

        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = buffer.len().min(3).min(usize::try_from(self.1.end - self.1.start).unwrap());
            for byte in &mut buffer[..length] {
                *byte = u8::try_from(self.1.start).unwrap();
                self.1.start += 1;
            }
            Ok(length)
        }
    }

    #[test]
    fn holes_are_zeros() {
        for (extents, size) in
            [(vec![], 0u64), (vec![], 9), (vec![2..7, 9..20, 40..41], 50), (vec![0..10, 10..30], 30)]
        {
            let mut content = Pieces(extents.clone(), 0..0);
            let mut bytes = Vec::new();
            Flat { content: &mut content, size, at: 0, extent: 0..0 }.read_to_end(&mut bytes).unwrap();
            let data = |at: &u64| extents.iter().any(|extent| extent.contains(at));
            let expected: Vec<u8> =
                (0..size).map(|at| if data(&at) { u8::try_from(at).unwrap() } else { 0 }).collect();
            assert_eq!(bytes, expected);
        }
    }
}
