//! Random trees, compared through the kernel, through ext4-view and through the reader of our own.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use ext4_view::Ext4;
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tempfile::NamedTempFile;
use vbd_ext4::format::{Attributes, Extent, FileType, Timestamp, Xattr, ino};
use vbd_ext4::read::{DirEntry, Filesystem, Inode, Options, Part};
use vbd_ext4::write::{
    Body, Checksums, Directory, DirectoryEntry, Journal, Layout, Node, Settings, WriteError, Writer, measure,
};

use crate::model::{self, BLOCK, Data, Entry, Kind, settings};
use crate::mounted::{Mounted, compare};
use crate::tools::check;

fn config(cases: u32) -> Config {
    Config { cases, max_shrink_iters: 40, failure_persistence: None, ..Config::default() }
}

fn timestamps() -> impl Strategy<Value = Timestamp> {
    let seconds = prop_oneof![
        Just(i64::from(i32::MIN)),
        Just(15_032_385_535),
        -10_000_000_000i64..10_000_000_000,
        0i64..4_000_000_000
    ];
    (seconds, 0..1_000_000_000u32).prop_map(|(seconds, nanoseconds)| Timestamp {
        seconds: seconds.max(i64::from(i32::MIN)),
        nanoseconds,
    })
}

fn attributes() -> impl Strategy<Value = Attributes> {
    let ids = prop_oneof![0..3000u32, 0..u32::MAX];
    let times = (timestamps(), timestamps(), timestamps(), timestamps());
    (0..0o10_000u16, ids.clone(), ids, times).prop_map(|(mode, uid, gid, (atime, ctime, mtime, crtime))| {
        Attributes { mode, uid, gid, atime, ctime, mtime, crtime }
    })
}

fn xattrs() -> impl Strategy<Value = Vec<Xattr>> {
    let name = "(trusted|security)\\.[a-z.]{1,60}";
    let value = prop_oneof![vec(any::<u8>(), 0..20), vec(any::<u8>(), 0..700)];
    btree_map(name.prop_map(String::into_bytes), value, 0..5).prop_map(|all| all.into_iter().collect())
}

fn names() -> impl Strategy<Value = Vec<u8>> {
    let bytes = any::<u8>().prop_filter("no separator", |byte| *byte != b'/' && *byte != 0);
    prop_oneof!["[a-z]{1,8}".prop_map(String::into_bytes), vec(bytes.clone(), 1..20), vec(bytes, 200..=255),]
        .prop_filter("not one with a meaning", |name| name != b"." && name != b".." && name != b"lost+found")
}

fn data() -> impl Strategy<Value = Data> {
    let pieces = vec((0..3000u64, 1..60u64, 1..=255u8), 0..6);
    let striped = (1..2000u64, 1..=255u8).prop_map(|(blocks, byte)| Data::striped(blocks, byte));
    let scattered =
        (pieces, 0..BLOCK, prop_oneof![Just(0), 0..1u64 << 32]).prop_map(|(pieces, cut, more)| {
            let blocks: BTreeMap<u64, u8> = pieces
                .into_iter()
                .flat_map(|(first, count, byte)| (first..first + count).map(move |block| (block, byte)))
                .collect();
            // Into the last block, or behind it with a hole at the end.
            let end = blocks.last_key_value().map_or(0, |(last, _)| (last + 1) * BLOCK);
            Data { size: if more > 0 { end + more } else { end.saturating_sub(cut) }, blocks }
        });
    prop_oneof![4 => scattered, 1 => striped]
}

/// ext4-view takes no parts of a path that cannot be names.
fn target(mut bytes: Vec<u8>) -> Kind {
    bytes.iter_mut().skip(200).step_by(200).for_each(|byte| *byte = b'/');
    Kind::Symlink(bytes)
}

fn trees() -> impl Strategy<Value = Entry> {
    let leaf = prop_oneof![
        4 => data().prop_map(Kind::File),
        1 => vec(1..=255u8, 1..200).prop_map(target),
        1 => vec(1..=255u8, 3000..=4095).prop_map(target),
        1 => (0..4096u32, 0..1u32 << 20).prop_map(|(major, minor)| Kind::Character(major, minor)),
        1 => (0..4096u32, 0..1u32 << 20).prop_map(|(major, minor)| Kind::Block(major, minor)),
        1 => Just(Kind::Fifo),
        1 => Just(Kind::Socket),
    ];
    let entry = |kind: BoxedStrategy<Kind>| {
        (kind, attributes(), xattrs()).prop_map(|(kind, attributes, xattrs)| Entry {
            attributes,
            xattrs,
            kind,
            links: None,
        })
    };
    let leaf = entry(leaf.boxed()).boxed();
    let tree = leaf.prop_recursive(5, 60, 12, move |inner| {
        entry(btree_map(names(), inner, 0..12).prop_map(Kind::Directory).boxed())
    });
    let root = btree_map(names(), tree, 0..8);
    // A directory of its own for many entries, and further names for some file.
    let many = (1..1500usize, 1..120usize);
    (root, attributes(), xattrs(), many, 0..4u32).prop_map(
        |(mut children, attributes, xattrs, (count, length), links)| {
            let many = (0..count).map(|number| {
                let mut name = number.to_string().into_bytes();
                name.resize(name.len().max(length), b'.');
                (name, Entry::new(Kind::Fifo))
            });
            children.insert(b"many".to_vec(), Entry::directory(many));
            if let Some(first) = children.values_mut().find(|child| matches!(child.kind, Kind::File(_)))
                && links > 0
            {
                first.links = Some((7, links + 1));
                for number in 0..links {
                    children.insert(
                        [&[0xff; 240][..], number.to_string().as_bytes()].concat(),
                        Entry::new(Kind::Link(7)),
                    );
                }
            }
            Entry { attributes, xattrs, kind: Kind::Directory(children), links: None }
        },
    )
}

/// The tree at a path is this one, as far as ext4-view tells.
fn view(image: &Ext4, path: &[u8], entry: &Entry) {
    let metadata = image.symlink_metadata(path).unwrap();
    let Attributes { mode, uid, gid, .. } = entry.attributes;
    assert_eq!((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()), (mode, uid, gid));
    match &entry.kind {
        Kind::Directory(children) => {
            let mut names: Vec<Vec<u8>> = image
                .read_dir(path)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().as_ref().to_vec())
                .filter(|name| !matches!(&name[..], b"." | b".." | b"lost+found"))
                .collect();
            names.sort();
            assert_eq!(names, children.keys().cloned().collect::<Vec<_>>());
            for (name, child) in children {
                let below = [path, if path == b"/" { b"" } else { b"/" }, name].concat();
                if !matches!(child.kind, Kind::Link(_)) {
                    view(image, &below, child);
                }
            }
        }
        Kind::File(data) => {
            assert_eq!(metadata.len(), data.size);
            if data.size < 1 << 24 {
                assert!(image.read(path).unwrap() == data.bytes());
            }
        }
        Kind::Symlink(target) => assert_eq!(image.read_link(path).unwrap(), ext4_view::PathBuf::new(target)),
        _ => {}
    }
}

/// The tree at an inode is this one for the reader of our own.
fn read_back(image: &Filesystem, inode: &Inode, entry: &Entry) {
    assert_eq!(inode.attributes(), entry.attributes);
    let mut xattrs = entry.xattrs.clone();
    xattrs.sort();
    assert_eq!(image.xattrs(inode).unwrap(), xattrs);
    if let Some((_, links)) = entry.links {
        assert_eq!(u32::from(inode.links()), links);
    }
    match &entry.kind {
        Kind::Directory(children) => {
            let mut found: Vec<DirEntry> = image
                .entries(inode)
                .unwrap()
                .map(Result::unwrap)
                .filter(|entry| !matches!(&entry.name[..], b"." | b".." | b"lost+found"))
                .collect();
            found.sort_by(|one, other| one.name.cmp(&other.name));
            assert!(found.iter().map(|entry| &entry.name).eq(children.keys()));
            for (entry, child) in found.iter().zip(children.values()) {
                if !matches!(child.kind, Kind::Link(_)) {
                    read_back(image, &image.entry(entry).unwrap(), child);
                }
            }
        }
        Kind::File(data) => {
            assert_eq!((inode.file_type(), inode.size()), (FileType::Regular, data.size));
            if data.size < 1 << 24 {
                assert!(image.read_all(inode, 1 << 24).unwrap() == data.bytes());
            }
        }
        Kind::Symlink(target) => assert_eq!(&image.read_link(inode).unwrap(), target),
        Kind::Character(major, minor) | Kind::Block(major, minor) => {
            assert_eq!(inode.device(), Some((*major, *minor)));
        }
        Kind::Fifo => assert_eq!(inode.file_type(), FileType::Fifo),
        Kind::Socket => assert_eq!(inode.file_type(), FileType::Socket),
        Kind::Link(_) => {}
    }
}

fn holds(image: &Path, settings: &Settings, root: &Entry) {
    model::write(image, settings, root);
    check(image);
    let mounted = Mounted::new(image, "ro,noload");
    compare(mounted.path(), root, true);
    drop(mounted);
    let part = Part::new(File::open(image).unwrap(), 0, settings.size);
    let image = Filesystem::open(part, Options::default()).unwrap();
    read_back(&image, &image.root().unwrap(), root);
}

/// ext4-view takes times whose lower word has its first bit set for damage; this makes them others.
fn with_plain_times(root: &Entry) -> Entry {
    let mut root = root.clone();
    let Attributes { atime, ctime, mtime, crtime, .. } = &mut root.attributes;
    for time in [atime, ctime, mtime, crtime] {
        time.seconds &= 0x7fff_ffff;
    }
    if let Kind::Directory(children) = &mut root.kind {
        children.values_mut().for_each(|child| *child = with_plain_times(child));
    }
    root
}

#[test]
fn what_goes_in_comes_out() {
    let mut runner = TestRunner::new(config(16));
    runner
        .run(&trees(), |root| {
            let file = NamedTempFile::new().unwrap();
            holds(file.path(), &settings(256 << 20), &root);
            let (file, root) = (NamedTempFile::new().unwrap(), with_plain_times(&root));
            model::write(file.path(), &settings(256 << 20), &root);
            view(&Ext4::load_from_path(file.path()).unwrap(), b"/", &root);
            Ok(())
        })
        .unwrap();
}

#[test]
fn the_same_goes_in_and_the_same_comes_out() {
    let mut runner = TestRunner::new(config(4));
    runner
        .run(&trees(), |root| {
            let (one, other) = (NamedTempFile::new().unwrap(), NamedTempFile::new().unwrap());
            model::write(one.path(), &settings(64 << 20), &root);
            model::write(other.path(), &settings(64 << 20), &root);
            prop_assert!(std::fs::read(one.path()).unwrap() == std::fs::read(other.path()).unwrap());
            Ok(())
        })
        .unwrap();
}

fn any_settings() -> impl Strategy<Value = Settings> {
    let size = (20..34u32, any::<u64>()).prop_map(|(power, bytes)| (1 << power) + bytes % (1 << power));
    let journal = prop_oneof![
        2 => Just(Journal::Auto),
        1 => Just(Journal::None),
        1 => (1024..3000u32).prop_map(Journal::Blocks)
    ];
    let bytes_per_inode = prop::sample::select(vec![1024, 4096, 16384, 1 << 20]);
    let block_size = prop::sample::select(vec![1024, 2048, 4096]);
    (size, block_size, bytes_per_inode, journal, any::<bool>(), any::<u32>()).prop_map(
        |(size, block_size, bytes_per_inode, journal, orphan_file, seed)| Settings {
            block_size,
            bytes_per_inode,
            journal,
            orphan_file,
            checksums: Checksums::Seed(seed),
            ..settings(size)
        },
    )
}

/// Whatever the settings, a filesystem empty or full to the last block is one that e2fsck likes.
#[test]
fn any_settings_make_a_filesystem() {
    let mut runner = TestRunner::new(config(40));
    runner
        .run(&(any_settings(), any::<bool>()), |(settings, full)| {
            let layout = match Layout::new(&settings) {
                Ok(layout) => layout,
                Err(WriteError::TooSmall { .. }) if settings.size < 16 << 20 => return Ok(()),
                Err(error) => panic!("{error}"),
            };
            let file = NamedTempFile::new().unwrap();
            let mut left = layout.free_blocks();
            let mut writer = Writer::new(layout, file.reopen().unwrap(), 0).unwrap();
            let mut entries = Vec::new();
            let attributes = model::attributes(0o644);
            if full {
                // One file of all that is free; what is not written of it reads as zeros.
                let extents_at_most = left / 8192 + 200;
                let taken = left - 1 - measure::extent_blocks(writer.layout(), extents_at_most);
                let mut logical = 0;
                let mut extents = Vec::new();
                for run in writer.allocate(taken).unwrap() {
                    let length = u32::try_from(run.length).unwrap();
                    extents.push(Extent { logical, physical: run.start, length, unwritten: false });
                    logical += length;
                }
                let size = taken * u64::from(settings.block_size);
                let ino = writer.reserve_inode().unwrap();
                let body = Body::File { size, extents: &extents };
                writer.put(ino, &Node { attributes, xattrs: &[], links: 1, body }).unwrap();
                entries.push(DirectoryEntry { name: b"full", ino, file_type: FileType::Regular });
                left = writer.free_blocks();
            }
            let root = Directory { parent: ino::ROOT, attributes, xattrs: &[], entries: &entries };
            writer.put_directory(ino::ROOT, &root).unwrap();
            let summary = writer.finish(model::UUID).unwrap();
            prop_assert_eq!(summary.free_blocks, left - 1);
            check(file.path());
            Ok(())
        })
        .unwrap();
}
