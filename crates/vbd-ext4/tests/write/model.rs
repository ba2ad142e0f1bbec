//! A tree in memory, written through the public face, and compared with what the kernel or ext4-view shows.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vbd_ext4::format::{Attributes, Extent, FileType, Ino, Timestamp, Xattr, ino};
use vbd_ext4::write::{Body, Directory, DirectoryEntry, Layout, Node, Settings, Summary, Writer};

/// The grain of data here, whatever the filesystem's blocks are.
pub(crate) const BLOCK: u64 = 4096;
const GRAIN: usize = 4096;
pub(crate) const UUID: [u8; 16] = *b"a UUID of a test";

/// What is in a file: pieces of data in rising order, holes between them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Data {
    pub(crate) size: u64,
    /// Offsets in blocks, and the byte that each block is full of.
    pub(crate) blocks: BTreeMap<u64, u8>,
}

impl Data {
    pub(crate) fn full(size: u64, byte: u8) -> Data {
        Data { size, blocks: (0..size.div_ceil(BLOCK)).map(|block| (block, byte)).collect() }
    }

    /// Every other block.
    pub(crate) fn striped(blocks: u64, byte: u8) -> Data {
        Data { size: blocks * BLOCK, blocks: (0..blocks).step_by(2).map(|block| (block, byte)).collect() }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(self.size).unwrap()];
        for (block, byte) in &self.blocks {
            let at = usize::try_from(block * BLOCK).unwrap();
            let end = bytes.len().min(at + GRAIN);
            bytes[at..end].fill(*byte);
        }
        bytes
    }
}

#[derive(Clone)]
pub(crate) enum Kind {
    Directory(BTreeMap<Vec<u8>, Entry>),
    File(Data),
    Symlink(Vec<u8>),
    Character(u32, u32),
    Block(u32, u32),
    Fifo,
    Socket,
    /// Another name of the file with this number in [`Entry::links`] of the first.
    Link(usize),
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Directory(entries) if entries.len() > 50 => {
                write!(f, "Directory of {} entries", entries.len())
            }
            Kind::Directory(entries) => f
                .debug_map()
                .entries(entries.iter().map(|(name, entry)| (String::from_utf8_lossy(name), entry)))
                .finish(),
            Kind::File(data) => write!(f, "File of {} bytes, {} blocks", data.size, data.blocks.len()),
            Kind::Symlink(target) => write!(f, "Symlink of {} bytes", target.len()),
            Kind::Character(major, minor) => write!(f, "Character {major}:{minor}"),
            Kind::Block(major, minor) => write!(f, "Block {major}:{minor}"),
            Kind::Fifo => f.write_str("Fifo"),
            Kind::Socket => f.write_str("Socket"),
            Kind::Link(number) => write!(f, "Link to {number}"),
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) attributes: Attributes,
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) kind: Kind,
    /// A number that further names refer to, and how many names there are.
    pub(crate) links: Option<(usize, u32)>,
}

pub(crate) fn at(seconds: i64, nanoseconds: u32) -> Timestamp {
    Timestamp { seconds, nanoseconds }
}

pub(crate) fn attributes(mode: u16) -> Attributes {
    let time = at(1_700_000_000, 123_456_789);
    Attributes { mode, uid: 0, gid: 0, atime: time, ctime: time, mtime: time, crtime: time }
}

impl Entry {
    pub(crate) fn new(kind: Kind) -> Entry {
        let mode = if matches!(kind, Kind::Directory(_)) { 0o755 } else { 0o644 };
        let mode = if matches!(kind, Kind::Symlink(_)) { 0o777 } else { mode };
        Entry { attributes: attributes(mode), xattrs: Vec::new(), kind, links: None }
    }

    pub(crate) fn file(size: u64, byte: u8) -> Entry {
        Entry::new(Kind::File(Data::full(size, byte)))
    }

    pub(crate) fn directory(entries: impl IntoIterator<Item = (Vec<u8>, Entry)>) -> Entry {
        Entry::new(Kind::Directory(entries.into_iter().collect()))
    }

    pub(crate) fn with_xattr(mut self, name: &str, value: &[u8]) -> Entry {
        self.xattrs.push((name.as_bytes().to_vec(), value.to_vec()));
        self
    }
}

pub(crate) fn settings(size: u64) -> Settings {
    Settings {
        time: at(1_700_000_000, 0),
        hash_seed: *b"the hashes' seed",
        label: b"a label".to_vec(),
        ..Settings::new(size)
    }
}

/// Writes a tree into a file.
pub(crate) fn write(path: &Path, settings: &Settings, root: &Entry) -> Summary {
    write_at(path, 0, settings, root)
}

pub(crate) fn write_at(path: &Path, offset: u64, settings: &Settings, root: &Entry) -> Summary {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let writer = Writer::new(Layout::new(settings).unwrap(), file.try_clone().unwrap(), offset).unwrap();
    let mut build = Build { writer, file, links: BTreeMap::new() };
    build.directory(ino::ROOT, ino::ROOT, root);
    build.writer.finish(UUID).unwrap()
}

struct Build {
    writer: Writer,
    file: File,
    links: BTreeMap<usize, (Ino, FileType)>,
}

impl Build {
    fn directory(&mut self, ino: Ino, parent: Ino, entry: &Entry) {
        let Kind::Directory(children) = &entry.kind else { panic!("{entry:?} is no directory") };
        let entries: Vec<DirectoryEntry<'_>> = children
            .iter()
            .map(|(name, child)| {
                let (ino, file_type) = self.entry(ino, child);
                DirectoryEntry { name, ino, file_type }
            })
            .collect();
        let Entry { attributes, xattrs, .. } = entry;
        let directory = Directory { parent, attributes: *attributes, xattrs, entries: &entries };
        self.writer.put_directory(ino, &directory).unwrap();
    }

    fn entry(&mut self, parent: Ino, entry: &Entry) -> (Ino, FileType) {
        if let Kind::Link(number) = entry.kind {
            return self.links[&number];
        }
        let ino = self.writer.reserve_inode().unwrap();
        let mut extents = Vec::new();
        let (body, file_type) = match &entry.kind {
            Kind::Directory(_) => {
                self.directory(ino, parent, entry);
                return (ino, FileType::Directory);
            }
            Kind::File(data) => {
                self.data(data, &mut extents);
                (Body::File { size: data.size, extents: &extents }, FileType::Regular)
            }
            Kind::Symlink(target) => (Body::Symlink(target), FileType::Symlink),
            Kind::Character(major, minor) => {
                (Body::Character { major: *major, minor: *minor }, FileType::Character)
            }
            Kind::Block(major, minor) => (Body::Block { major: *major, minor: *minor }, FileType::Block),
            Kind::Fifo => (Body::Fifo, FileType::Fifo),
            Kind::Socket => (Body::Socket, FileType::Socket),
            Kind::Link(_) => unreachable!("looked at above"),
        };
        let links = entry.links.map_or(1, |(_, count)| count);
        let node = Node { attributes: entry.attributes, xattrs: &entry.xattrs, links, body };
        self.writer.put(ino, &node).unwrap();
        if let Some((number, _)) = entry.links {
            self.links.insert(number, (ino, file_type));
        }
        (ino, file_type)
    }

    /// Writes a file's blocks, each piece of them where it was given room.
    fn data(&mut self, data: &Data, extents: &mut Vec<Extent>) {
        let mut blocks = data.blocks.iter().peekable();
        while let Some((first, byte)) = blocks.next() {
            let mut bytes = vec![*byte; GRAIN];
            let mut next = first + 1;
            while let Some((_, byte)) = blocks.next_if(|(block, _)| **block == next) {
                bytes.extend([*byte; GRAIN]);
                next += 1;
            }
            // What is behind the end of the file is zeros.
            bytes.truncate(usize::try_from((data.size - first * BLOCK).min(bytes.len() as u64)).unwrap());
            let block_size = u64::from(self.writer.layout().block_size());
            let mut logical = *first * (BLOCK / block_size);
            let mut from = 0;
            for run in self.writer.allocate((bytes.len() as u64).div_ceil(block_size)).unwrap() {
                let end = bytes.len().min(from + usize::try_from(run.length * block_size).unwrap());
                self.file.write_all_at(&bytes[from..end], self.writer.position(run.start)).unwrap();
                extents.push(Extent {
                    logical: u32::try_from(logical).unwrap(),
                    physical: run.start,
                    length: u32::try_from(run.length).unwrap(),
                    unwritten: false,
                });
                logical += run.length;
                from = end;
            }
        }
    }
}
