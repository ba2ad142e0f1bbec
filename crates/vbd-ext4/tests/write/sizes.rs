//! Empty filesystems of many sizes and settings.

use std::fs::File;
use std::path::Path;

use tempfile::NamedTempFile;
use vbd_ext4::format::{Attributes, Timestamp, ino};
use vbd_ext4::write::{Directory, Layout, Settings, Summary, Writer};

use crate::mounted::Mounted;
use crate::tools::check;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const UUID: [u8; 16] = *b"a UUID of a test";

fn settings(size: u64) -> Settings {
    Settings { time: Timestamp { seconds: 1_700_000_000, nanoseconds: 0 }, ..Settings::new(size) }
}

/// Writes a filesystem with nothing in it.
fn empty(path: &Path, settings: &Settings) -> Summary {
    let layout = Layout::new(settings).unwrap();
    let (blocks, inodes) = (layout.free_blocks(), layout.free_inodes());
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut writer = Writer::new(layout, file, 0).unwrap();
    let root = Directory {
        parent: ino::ROOT,
        attributes: Attributes { mode: 0o755, ..Attributes::default() },
        xattrs: &[],
        entries: &[],
    };
    writer.put_directory(ino::ROOT, &root).unwrap();
    let summary = writer.finish(UUID).unwrap();
    assert_eq!(summary.free_blocks, blocks - 1, "only the root's block is missing");
    assert_eq!(summary.free_inodes, inodes);
    summary
}

fn look(settings: &Settings) -> Summary {
    let file = NamedTempFile::new().unwrap();
    let summary = empty(file.path(), settings);
    check(file.path());
    summary
}

#[test]
fn small_sizes_and_odd_ones() {
    for size in [MIB, MIB + 512, 3 * MIB, 8 * MIB - KIB, 8 * MIB, 100 * MIB, 128 * MIB - 4 * KIB, 128 * MIB] {
        look(&settings(size));
    }
}

#[test]
fn sizes_around_a_groups_end() {
    for size in
        [128 * MIB + 4 * KIB, 129 * MIB, 131 * MIB, 140 * MIB, 256 * MIB + 200 * KIB, 2 * GIB + 8 * MIB]
    {
        look(&settings(size));
    }
}

#[test]
fn large_sizes() {
    for size in [20 * GIB, 100 * GIB, 1025 * GIB] {
        let summary = look(&settings(size));
        assert_eq!(summary.blocks, size / 4096);
    }
}

#[test]
fn other_block_sizes() {
    for block_size in [1024, 2048] {
        for size in [MIB, 8 * MIB, 16 * MIB + 5 * KIB, 100 * MIB, GIB] {
            look(&Settings { block_size, ..settings(size) });
        }
    }
}

/// In memory: the largest files of other filesystems are smaller.
fn in_memory() -> NamedTempFile {
    NamedTempFile::new_in("/dev/shm").unwrap()
}

#[test]
fn as_large_as_32_bit_block_numbers_reach() {
    let file = in_memory();
    let settings = Settings { inodes: Some(1 << 20), ..settings((16 << 40) - 4096) };
    let summary = empty(file.path(), &settings);
    assert_eq!(summary.blocks, u64::from(u32::MAX));
    check(file.path());
}

#[test]
fn larger_than_32_bit_block_numbers_reach() {
    let file = in_memory();
    let settings = Settings { inodes: Some(1 << 20), ..settings(20 << 40) };
    let summary = empty(file.path(), &settings);
    assert_eq!(summary.blocks, 20 << 28);
    check(file.path());
    let mounted = Mounted::new(file.path(), "rw");
    std::fs::write(mounted.path().join("file"), [1; 100_000]).unwrap();
    drop(mounted);
    check(file.path());
}
