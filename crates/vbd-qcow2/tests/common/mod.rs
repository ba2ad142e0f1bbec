//! QEMU's tools, and a directory that goes away.
#![allow(dead_code, reason = "each test file uses a part")]

use std::io;
use std::path::Path;
use std::process::{Command, Output};

use vbd_qcow2::format::{Header, L1Entry, L2Entry};
use vbd_qcow2::storage::{Source, Storage};
use vbd_testing::power::{MemFile, Recording};
use vbd_testing::{Random, qemu};

/// A directory for a test.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Scratch(tempfile::tempdir().unwrap())
    }

    /// A name in it.
    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn dir(&self) -> &Path {
        self.0.path()
    }
}

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output();
    output.unwrap_or_else(|error| panic!("{program} (Debian package qemu-utils): {error}"))
}

/// Runs qemu-img, which must succeed, and gives what it printed.
pub(crate) fn qemu_img(arguments: &[&str]) -> String {
    let output = run("qemu-img", arguments);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Runs qemu-img and gives its exit code and all that it printed.
pub(crate) fn qemu_img_status(arguments: &[&str]) -> (i32, String) {
    let output = run("qemu-img", arguments);
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
}

/// Runs commands of qemu-io on a qcow2 image.
pub(crate) fn qemu_io(image: &str, commands: &[&str]) {
    let mut arguments = vec!["-f", "qcow2"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(image);
    let output = run("qemu-io", &arguments);
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    let failed = ["failed", "error", "Error"].iter().any(|word| text.contains(word));
    assert!(output.status.success() && !failed, "qemu-io {commands:?}: {text}");
}

/// An image of a random shape that was written to, with snapshots and bitmaps where it can have them.
pub(crate) fn grown(random: &mut Random, path: &Path) -> qemu::Shape {
    let mut shape = qemu::Shape::random(random);
    // Refcounts of few bits cannot say what snapshots need, and QEMU leaves a mess when it finds out.
    if shape.refcount_bits < 4 {
        shape.refcount_bits = 4;
    }
    shape.size = shape.size.min(1 << 20);
    shape.create(path, None);
    let mut model = qemu::Model::new(&shape, vec![0; usize::try_from(shape.size).unwrap()]);
    let name = qemu::text(path);
    for round in 0..1 + random.below(3) {
        model.change(path, &shape, random, 12);
        if shape.has_snapshots() && random.once_in(2) {
            qemu::img(&["snapshot", "-c", &format!("snapshot {round}"), name]);
        }
        if shape.version >= 3 && random.once_in(3) {
            qemu::img(&["bitmap", "--add", "-g", "512", name, &format!("bitmap {round}")]);
        }
    }
    shape
}

/// An image of 64 KiB clusters and 8 MiB with a snapshot, a bitmap, and a compressed cluster.
pub(crate) fn disk(path: &Path) {
    let name = qemu::text(path);
    qemu_img(&["create", "-q", "-f", "qcow2", name, "8M"]);
    qemu_io(name, &["write -P 1 0 256k"]);
    qemu_img(&["snapshot", "-c", "one", name]);
    qemu_img(&["bitmap", "--add", "-g", "64k", name, "since"]);
    qemu_io(name, &["write -P 2 64k 4k", "write -P 5 3M 64k"]);
    qemu_io(name, &["write -c -P 3 2M 64k"]);
    // The last cluster is whole, so that nothing behind it is in the file.
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len().next_multiple_of(1 << 16)).unwrap();
}

/// Where everything is in the image of [`disk`].
#[derive(Debug)]
pub(crate) struct Damage {
    pub(crate) l1: u64,
    pub(crate) l2: u64,
    /// A cluster that the snapshot has, too, and its index in the L2 table.
    pub(crate) data: u64,
    pub(crate) shared_index: u64,
    /// A cluster that nobody else has.
    pub(crate) own: u64,
    pub(crate) own_index: u64,
    pub(crate) compressed: u64,
    pub(crate) compressed_index: u64,
    pub(crate) refcount_table: u64,
    pub(crate) refcount_block: u64,
    pub(crate) bitmap_directory: u64,
    pub(crate) bitmap_table: u64,
    pub(crate) bitmap_bits: u64,
}

impl Damage {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let word = |offset: u64| {
            let offset = usize::try_from(offset).unwrap();
            u64::from_be_bytes(bytes[offset..offset + 8].try_into().unwrap())
        };
        let header = Header::read(bytes).unwrap();
        let l2 = L1Entry(word(header.l1_offset)).offset();
        let bitmap_directory = header.bitmaps().unwrap().directory_offset;
        let bitmap_table = word(bitmap_directory);
        let offset = |index: u64| L2Entry(word(l2 + index * 8)).offset();
        Damage {
            l1: header.l1_offset,
            l2,
            data: offset(0),
            shared_index: 0,
            own: offset(48),
            own_index: 48,
            compressed: word(l2 + 32 * 8),
            compressed_index: 32,
            refcount_table: header.refcount_table_offset,
            refcount_block: word(header.refcount_table_offset),
            bitmap_directory,
            bitmap_table,
            bitmap_bits: word(bitmap_table),
        }
    }
}

/// Damages a table somewhere, or cuts the file off, and tells how.
pub(crate) fn damage(random: &mut Random, bytes: &mut Vec<u8>) -> String {
    let word = |bytes: &[u8], offset: u64| {
        let offset = usize::try_from(offset).unwrap();
        bytes.get(offset..offset + 8).map_or(0, |word| u64::from_be_bytes(word.try_into().unwrap()))
    };
    let Ok(header) = Header::read(&bytes[..]) else { return "nothing, the header is gone".to_owned() };
    let cluster = header.layout().cluster_size();
    if random.once_in(10) {
        let length = usize::try_from(cluster).unwrap() + random.index(bytes.len());
        bytes.truncate(length);
        return format!("cut off at {length:#x}");
    }
    // Tables: their offset, and bytes of them that are in use.
    let mut tables = vec![
        ("refcount table", header.refcount_table_offset, 16),
        ("L1 table", header.l1_offset, header.l1_bytes().min(64)),
    ];
    for index in 0..header.l1_bytes().min(64) / 8 {
        let l2 = L1Entry(word(bytes, header.l1_offset + index * 8)).offset();
        if l2 != 0 {
            tables.push(("L2 table", l2, cluster.min(1024)));
            tables.push(("L2 table", l2, cluster));
        }
    }
    let block = word(bytes, header.refcount_table_offset);
    tables.push(("refcount block", block, cluster.min(256)));
    if let Ok((snapshots, length)) = vbd_qcow2::format::read_snapshots(&header, &bytes[..])
        && let Some(snapshot) = snapshots.first()
    {
        tables.push(("snapshot table", header.snapshots_offset, length as u64));
        tables.push(("snapshot's L1 table", snapshot.l1_offset, 16));
    }
    if let Ok(bitmaps) = vbd_qcow2::format::read_bitmaps(&header, &bytes[..])
        && let Some(bitmap) = bitmaps.first()
    {
        tables.push(("bitmap directory", header.bitmaps().unwrap().directory_offset, 32));
        tables.push(("bitmap table", bitmap.table_offset, u64::from(bitmap.table_entries) * 8));
    }
    // What two kinds of damage leave of a table is the header, which is looked at elsewhere.
    tables.retain(|(_, offset, length)| *offset >= cluster && *length >= 8);
    let (name, offset, length) = *random.one_of(&tables);
    let at = offset + random.below(length / 8) * 8;
    let before = word(bytes, at);
    let clusters = bytes.len() as u64 / cluster;
    let value = match random.below(7) {
        0 => before ^ 1 << random.below(64),
        1 => before ^ 1 << 63,
        2 => 0,
        3 => random.next_u64(),
        4 => (random.below(clusters.max(1)) * cluster) | (1 << 63),
        5 => random.below(clusters.max(1)) * cluster,
        _ => word(bytes, offset + random.below(length / 8) * 8),
    };
    let start = usize::try_from(at).unwrap();
    if let Some(place) = bytes.get_mut(start..start + 8) {
        place.copy_from_slice(&value.to_be_bytes());
    }
    format!("{name} at {at:#x}: {before:#x} became {value:#x}")
}

/// A file in memory whose changes are recorded.
pub(crate) struct Recorded(MemFile);

impl Recorded {
    pub(crate) fn new(recording: &std::sync::Arc<Recording>, bytes: Vec<u8>) -> Self {
        Recorded(MemFile::new(recording, bytes))
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        self.0.content()
    }

    /// Everything fails with this error once so many changes were made.
    pub(crate) fn fail_after(&self, changes: usize, error: i32) {
        self.0.fail_after(changes, error);
    }
}

impl vbd_image::ReadAt for Recorded {
    fn fill_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(self.0.read_at(offset, buffer))
    }
}

impl Source for Recorded {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.len())
    }
}

impl Storage for Recorded {
    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.set_len(length)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.0.punch(offset, length)
    }
}
