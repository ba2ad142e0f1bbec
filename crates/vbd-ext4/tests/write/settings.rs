//! Settings, and what the usual tools say of them.

use std::path::Path;
use std::process::Command;

use tempfile::NamedTempFile;
use vbd_ext4::format::{Seed, superblock::mount_option};
use vbd_ext4::write::{Checksums, Journal, Layout, Settings, WriteError, measure};

use crate::model::{self, Data, Entry, Kind, UUID, settings};
use crate::mounted::{Mounted, compare};
use crate::tools::{check, run};

const MIB: u64 = 1 << 20;

fn sample() -> Entry {
    Entry::directory([
        (b"file".to_vec(), Entry::file(100_000, 1)),
        (b"striped".to_vec(), Entry::new(Kind::File(Data::striped(20, 2)))),
    ])
}

/// What dumpe2fs says, by name.
fn header(image: &Path) -> impl Fn(&str) -> String {
    let text = run("dumpe2fs", &["-h", image.to_str().unwrap()]);
    move |name| {
        let line = text.lines().find(|line| line.starts_with(&format!("{name}:")));
        let line = line.unwrap_or_else(|| panic!("{name} is not in\n{text}"));
        line.split_once(':').unwrap().1.trim().to_owned()
    }
}

#[test]
fn all_of_them_arrive() {
    let file = NamedTempFile::new().unwrap();
    let settings = Settings {
        label: b"sixteen bytes ok".to_vec(),
        checksums: Checksums::Seed(0x1234_5678),
        reserved_percent: 2.5,
        inodes: Some(5000),
        journal: Journal::Blocks(2000),
        default_mount_options: mount_option::ACL | mount_option::DISCARD,
        mount_options: b"noatime,commit=30".to_vec(),
        orphan_file: true,
        ..settings(300 * MIB)
    };
    model::write(file.path(), &settings, &sample());
    check(file.path());
    let header = header(file.path());
    assert_eq!(header("Filesystem volume name"), "sixteen bytes ok");
    assert_eq!(header("Filesystem UUID"), "61205555-4944-206f-6620-612074657374");
    assert_eq!(header("Directory Hash Seed"), "74686520-6861-7368-6573-272073656564");
    assert_eq!(header("Checksum seed"), "0x12345678");
    assert_eq!(header("Reserved block count"), "1920");
    // Three groups' worth, in whole blocks of the tables.
    assert_eq!(header("Inode count"), "5040");
    assert_eq!(header("Total journal blocks"), "2000");
    assert_eq!(header("Default mount options"), "acl discard");
    assert_eq!(header("Mount options"), "noatime,commit=30");
    assert_eq!(header("Orphan file inode"), "12");
    assert!(header("Filesystem created").contains("2023"));
    // As mke2fs counts them.
    let features = "has_journal ext_attr resize_inode dir_index orphan_file filetype extent 64bit flex_bg \
                    metadata_csum_seed sparse_super large_file huge_file dir_nlink extra_isize metadata_csum";
    assert_eq!(header("Filesystem features"), features);
    let mounted = Mounted::new(file.path(), "rw");
    compare(mounted.path(), &sample(), true);
}

#[test]
fn numbers_are_mke2fs_own() {
    // Blocks of metadata, free blocks, the journal and room to grow are as mke2fs has them.
    for size in [16 * MIB, 300 * MIB, 3000 * MIB] {
        let (ours, theirs) = (NamedTempFile::new().unwrap(), NamedTempFile::new().unwrap());
        let settings = Settings { checksums: Checksums::OfUuid(UUID), ..settings(size) };
        model::write(ours.path(), &settings, &Entry::directory([]));
        check(ours.path());
        let path = theirs.path().to_str().unwrap();
        run(
            "mke2fs",
            &["-q", "-F", "-t", "ext4", "-b", "4096", "-i", "16384", path, &format!("{}k", size / 1024)],
        );
        let (ours, theirs) = (header(ours.path()), header(theirs.path()));
        for name in [
            "Filesystem features",
            "Inode count",
            "Block count",
            "Reserved block count",
            "Overhead clusters",
            "Free blocks",
            "Free inodes",
            "Reserved GDT blocks",
            "Inodes per group",
            "Flex block group size",
            "Total journal blocks",
            "Journal backup",
            "Filesystem flags",
            "Default mount options",
            "Errors behavior",
            "Default directory hash",
        ] {
            assert_eq!(ours(name), theirs(name), "{name} with {size} bytes");
        }
    }
}

#[test]
fn the_uuid_can_be_the_seed() {
    let file = NamedTempFile::new().unwrap();
    let settings =
        Settings { checksums: Checksums::OfUuid(UUID), journal: Journal::None, ..settings(64 * MIB) };
    assert_eq!(settings.checksums.seed(), Seed::of_uuid(&UUID));
    model::write(file.path(), &settings, &sample());
    check(file.path());
    let header = header(file.path());
    assert!(!header("Filesystem features").contains("seed"));
    assert!(!header("Filesystem features").contains("journal"));
}

#[test]
fn a_filesystem_begins_where_it_is_told() {
    let file = NamedTempFile::new().unwrap();
    model::write_at(file.path(), 3 * MIB, &settings(64 * MIB), &sample());
    assert_eq!(file.path().metadata().unwrap().len(), 67 * MIB);
    let mounted = Mounted::new(file.path(), "ro,noload,offset=3145728");
    compare(mounted.path(), &sample(), true);
    drop(mounted);
    let image = format!("{}?offset=3145728", file.path().display());
    let output = Command::new("e2fsck").args(["-fn", &image]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn the_smallest_holds_what_was_asked_for() {
    let asked =
        [(0, 0), (100, 10), (5000, 100), (5000, 30_000), (40_000, 3), (700_000, 100_000), (1 << 28, 1 << 20)];
    for (blocks, inodes) in asked {
        for orphan_file in [false, true] {
            let settings = Settings { orphan_file, ..settings(0) };
            let layout = Layout::smallest(blocks, inodes, &settings).unwrap();
            assert!(layout.free_blocks() >= blocks && layout.free_inodes() >= inodes);
            let again = Layout::new(layout.settings()).unwrap();
            assert_eq!((again.blocks(), again.free_blocks()), (layout.blocks(), layout.free_blocks()));
            // No block is there in vain, but those that a last group needs to be worth having.
            let surplus = layout.free_blocks() - blocks;
            assert!(surplus < 700, "{surplus} blocks more than {blocks}");
        }
    }
    // What decides is the inodes, of which a group has 32,768 at most, or the journal.
    let layout = Layout::smallest(5000, 40_000, &settings(0)).unwrap();
    assert!((32_768..36_000).contains(&layout.blocks()), "{}", layout.blocks());
    let journal = Settings { journal: Journal::Blocks(100_000), ..settings(0) };
    let layout = Layout::smallest(0, 0, &journal).unwrap();
    assert!((100_000..103_000).contains(&layout.blocks()), "{}", layout.blocks());
    let impossible = Layout::smallest(100, 1 << 33, &settings(0));
    assert!(matches!(impossible, Err(WriteError::NoInodes(_))), "{impossible:?}");
}

#[test]
fn what_was_measured_is_what_is_taken() {
    let names: Vec<String> = (0..30_000).map(|number| format!("entry number {number}")).collect();
    let mut entries: Vec<_> =
        names.iter().map(|name| (name.as_bytes().to_vec(), Entry::new(Kind::Fifo))).collect();
    entries.push((b"s".to_vec(), Entry::new(Kind::File(Data::striped(10_000, 1)))));
    let layout = Layout::new(&settings(1)).err();
    assert!(matches!(layout, Some(WriteError::TooSmall { .. })));
    let any = Layout::new(&settings(64 * MIB)).unwrap();
    let all = entries.iter().map(|(name, _)| name.as_slice());
    let blocks = measure::directory_blocks(&any, all.chain([&b"lost+found"[..]])).unwrap()
        + 5000
        + measure::extent_blocks(&any, 5000);
    let layout = Layout::smallest(blocks, entries.len() as u64, &settings(0)).unwrap();
    let file = NamedTempFile::new().unwrap();
    let summary = model::write(file.path(), layout.settings(), &Entry::directory(entries));
    check(file.path());
    assert_eq!(summary.free_blocks, layout.free_blocks() - blocks);
}

#[test]
fn settings_that_cannot_be_are_refused() {
    let good = || settings(64 * MIB);
    let cases = [
        Settings { block_size: 8192, ..good() },
        Settings { label: vec![b'x'; 17], ..good() },
        Settings { mount_options: vec![b'x'; 64], ..good() },
        Settings { reserved_percent: 51.0, ..good() },
        Settings { reserved_percent: f64::NAN, ..good() },
        Settings { bytes_per_inode: 512, ..good() },
        Settings { journal: Journal::Blocks(1023), ..good() },
    ];
    for settings in cases {
        assert!(matches!(Layout::new(&settings), Err(WriteError::Setting { .. })), "{settings:?}");
    }
    let journal = Settings { journal: Journal::Blocks(20_000), ..good() };
    assert!(matches!(Layout::new(&journal), Err(WriteError::TooSmall { .. })));
    let inodes = Settings { inodes: Some(100_000), ..good() };
    assert!(matches!(Layout::new(&inodes), Err(WriteError::NoInodes(32_768))));
}
