//! Many of something: entries of one directory, subdirectories, inodes that share attributes.

use std::fs;
use std::os::unix::fs::MetadataExt;

use tempfile::NamedTempFile;
use vbd_ext4::format::{FileType, Ino, ino};
use vbd_ext4::write::{Body, Directory, DirectoryEntry, Layout, Node, Settings, WriteError, Writer};

use crate::model::{self, Entry, Kind, attributes, settings};
use crate::mounted::{Mounted, compare};
use crate::tools::{check, run};

const MIB: u64 = 1 << 20;

fn put_root(writer: &mut Writer, entries: &[DirectoryEntry<'_>]) {
    let root = Directory { parent: ino::ROOT, attributes: attributes(0o755), xattrs: &[], entries };
    writer.put_directory(ino::ROOT, &root).unwrap();
}

/// A million names of few inodes, so that nearly all there is is the directory.
fn a_million_names(settings: &Settings) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let mut writer = Writer::new(Layout::new(settings).unwrap(), file.reopen().unwrap(), 0).unwrap();
    let directory = writer.reserve_inode().unwrap();
    let names: Vec<String> = (0..1_000_000).map(|number| format!("name {number}")).collect();
    let mut entries = Vec::with_capacity(names.len());
    for names in names.chunks(50_000) {
        let ino = writer.reserve_inode().unwrap();
        let node = Node { attributes: attributes(0o644), xattrs: &[], links: 50_000, body: Body::Fifo };
        writer.put(ino, &node).unwrap();
        entries.extend(names.iter().map(|name| DirectoryEntry {
            name: name.as_bytes(),
            ino,
            file_type: FileType::Fifo,
        }));
    }
    let many = Directory { parent: ino::ROOT, attributes: attributes(0o755), xattrs: &[], entries: &entries };
    writer.put_directory(directory, &many).unwrap();
    put_root(
        &mut writer,
        &[DirectoryEntry { name: b"many", ino: directory, file_type: FileType::Directory }],
    );
    writer.finish(model::UUID).unwrap();
    check(file.path());

    let mounted = Mounted::new(file.path(), "rw");
    let many = mounted.path().join("many");
    for number in (0..1_000_000).step_by(9973) {
        assert_eq!(fs::symlink_metadata(many.join(format!("name {number}"))).unwrap().nlink(), 50_000);
    }
    assert!(fs::symlink_metadata(many.join("name 1000000")).is_err());
    for number in 0..500 {
        fs::write(many.join(format!("more {number}")), b"").unwrap();
    }
    drop(mounted);
    check(file.path());
    file
}

#[test]
fn a_million_entries_in_one_directory() {
    let file = a_million_names(&settings(512 * MIB));
    let text = run("dumpe2fs", &["-h", file.path().to_str().unwrap()]);
    assert!(!text.contains("large_dir"));
}

#[test]
fn a_million_entries_in_small_blocks_need_three_levels() {
    let file = a_million_names(&Settings { block_size: 1024, ..settings(512 * MIB) });
    let text = run("dumpe2fs", &["-h", file.path().to_str().unwrap()]);
    assert!(text.contains("large_dir"));
}

/// The count of links ends at 65,000; what is more says 1.
#[test]
fn as_many_subdirectories_as_there_may_be() {
    for (count, links) in [(64_997u32, 64_999), (64_998, 1)] {
        let file = NamedTempFile::new().unwrap();
        let settings = Settings { block_size: 1024, inodes: Some(66_000), ..settings(256 * MIB) };
        let mut writer = Writer::new(Layout::new(&settings).unwrap(), file.reopen().unwrap(), 0).unwrap();
        let top = writer.reserve_inode().unwrap();
        let names: Vec<(Vec<u8>, Ino)> = (0..count)
            .map(|number| {
                let ino = writer.reserve_inode().unwrap();
                let empty =
                    Directory { parent: top, attributes: attributes(0o755), xattrs: &[], entries: &[] };
                writer.put_directory(ino, &empty).unwrap();
                (number.to_string().into_bytes(), ino)
            })
            .collect();
        let entries: Vec<DirectoryEntry<'_>> = names
            .iter()
            .map(|(name, ino)| DirectoryEntry { name, ino: *ino, file_type: FileType::Directory })
            .collect();
        let directory =
            Directory { parent: ino::ROOT, attributes: attributes(0o755), xattrs: &[], entries: &entries };
        writer.put_directory(top, &directory).unwrap();
        put_root(&mut writer, &[DirectoryEntry { name: b"top", ino: top, file_type: FileType::Directory }]);
        writer.finish(model::UUID).unwrap();
        check(file.path());
        let mounted = Mounted::new(file.path(), "ro,noload");
        assert_eq!(fs::metadata(mounted.path().join("top")).unwrap().nlink(), links);
    }
}

#[test]
fn a_block_of_attributes_is_shared_by_a_thousand_and_not_more() {
    let file = NamedTempFile::new().unwrap();
    let with =
        |entry: Entry| entry.with_xattr("trusted.long", &[7; 200]).with_xattr("trusted.other", &[8; 90]);
    let entries = (0..2500).map(|number| (format!("{number}").into_bytes(), with(Entry::new(Kind::Fifo))));
    let root = Entry::directory([(b"many".to_vec(), Entry::directory(entries))]);
    let settings = settings(64 * MIB);
    let free = Layout::new(&settings).unwrap().free_blocks();
    let summary = model::write(file.path(), &settings, &root);
    check(file.path());
    let names: Vec<Vec<u8>> = (0..2500).map(|number| number.to_string().into_bytes()).collect();
    let layout = Layout::new(&settings).unwrap();
    let directory =
        vbd_ext4::write::measure::directory_blocks(&layout, names.iter().map(Vec::as_slice)).unwrap();
    // The root's block, the directory's, and three of attributes for 2500 inodes.
    assert_eq!(free - summary.free_blocks, 1 + directory + 3);
    let mounted = Mounted::new(file.path(), "ro,noload");
    compare(mounted.path(), &root, true);
}

#[test]
fn lost_and_found_of_a_source_is_kept() {
    let file = NamedTempFile::new().unwrap();
    let mut own = Entry::directory([(b"#123".to_vec(), Entry::file(10, 1))]);
    own.attributes.mode = 0o711;
    let root = Entry::directory([(b"lost+found".to_vec(), own)]);
    let settings = settings(16 * MIB);
    let layout = Layout::new(&settings).unwrap();
    let summary = model::write(file.path(), &settings, &root);
    check(file.path());
    // Its four blocks are free again; the root's, its own and the file's are not.
    assert_eq!(summary.free_blocks, layout.free_blocks() + 4 - 3);
    let mounted = Mounted::new(file.path(), "ro,noload");
    compare(mounted.path(), &root, true);
}

/// What is refused takes neither blocks nor a number, and the filesystem is good without it.
#[test]
fn what_is_refused_leaves_nothing_behind() {
    let file = NamedTempFile::new().unwrap();
    let layout = Layout::new(&settings(16 * MIB)).unwrap();
    let free = layout.free_blocks();
    let mut writer = Writer::new(layout, file.reopen().unwrap(), 0).unwrap();
    let ino = writer.reserve_inode().unwrap();
    let bad = [(b"no.such.kind".to_vec(), vec![1])];
    let attributes = attributes(0o755);
    let names: Vec<String> = (0..1000).map(|number| format!("{number}")).collect();
    let entry = |name: &'static [u8], file_type| DirectoryEntry { name, ino, file_type };
    let entries: Vec<DirectoryEntry<'_>> = names
        .iter()
        .map(|name| DirectoryEntry { name: name.as_bytes(), ino, file_type: FileType::Fifo })
        .collect();
    let body = Body::Symlink(&[b'l'; 1000]);
    assert!(writer.put(ino, &Node { attributes, xattrs: &bad, links: 1, body }).is_err());
    let directory = Directory { parent: ino::ROOT, attributes, xattrs: &bad, entries: &entries };
    assert!(writer.put_directory(ino, &directory).is_err());
    let root = |entries| Directory { parent: ino::ROOT, attributes, xattrs: &[], entries };
    let fifo = [entry(b"lost+found", FileType::Fifo)];
    assert!(matches!(writer.put_directory(ino::ROOT, &root(&fifo)), Err(WriteError::LostAndFound)));
    let twice = [entry(b"a", FileType::Fifo), entry(b"a", FileType::Fifo)];
    assert!(matches!(writer.put_directory(ino::ROOT, &root(&twice)), Err(WriteError::Twice(_))));
    put_root(&mut writer, &[]);
    assert_eq!(writer.finish(model::UUID).unwrap().free_blocks, free - 1);
    check(file.path());
}

#[test]
fn a_full_disk_is_named() {
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let mut writer = Writer::new(Layout::new(&settings(16 * MIB)).unwrap(), full, 0).unwrap();
    put_root(&mut writer, &[]);
    let error = writer.finish(model::UUID).unwrap_err();
    assert!(matches!(error, WriteError::Io { .. }), "{error}");
    assert!(error.to_string().contains("No space left"), "{error}");
}

#[test]
fn inodes_run_out() {
    let file = NamedTempFile::new().unwrap();
    let settings = Settings { inodes: Some(32), ..settings(16 * MIB) };
    let layout = Layout::new(&settings).unwrap();
    let free = layout.free_inodes();
    let mut writer = Writer::new(layout, file.reopen().unwrap(), 0).unwrap();
    for _ in 0..free {
        writer.reserve_inode().unwrap();
    }
    assert!(matches!(writer.reserve_inode(), Err(WriteError::NoInodes(32))));
}
