//! Filesystems with something of everything in them.

use tempfile::NamedTempFile;
use vbd_ext4::format::Attributes;
use vbd_ext4::write::Settings;

use crate::model::{self, BLOCK, Data, Entry, Kind, at, settings};
use crate::mounted::{Mounted, compare};
use crate::tools::{check, run};

const MIB: u64 = 1 << 20;
/// user::rw-, user:1000:r--, group::r--, mask::r--, other::---
const ACL: [u8; 44] = [
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255,
    0x10, 0, 4, 0, 255, 255, 255, 255, 0x20, 0, 0, 0, 255, 255, 255, 255,
];

/// cap_net_bind_service=ep, in the form of version 2.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn many(count: usize, length: usize) -> Entry {
    Entry::directory((0..count).map(|number| {
        let mut name = format!("{number:x}").into_bytes();
        name.resize(name.len().max(length), b'_');
        (name, Entry::new(Kind::Fifo))
    }))
}

/// Something of everything.
fn everything() -> Entry {
    let long = |byte: u8| [byte; 300];
    let mut old = Entry::file(1, b'o');
    old.attributes = Attributes {
        mode: 0o6755,
        uid: 70_000,
        gid: 4_000_000_000,
        atime: at(-1, 999_999_999),
        ctime: at(1, 0),
        mtime: at(i64::from(i32::MIN), 0),
        crtime: at(0, 0),
    };
    let mut late = Entry::file(0, 0);
    late.attributes.mtime = at(15_032_385_535, 999_999_999);
    late.attributes.mode = 0o1000;
    let mut first = Entry::file(10, b'l');
    first.links = Some((1, 3));
    let mut acl = Entry::file(3, b'a').with_xattr("system.posix_acl_access", &ACL);
    acl.attributes.mode = 0o640;
    let entries: Vec<(&[u8], Entry)> = vec![
        (b"old", old),
        (b"late", late),
        (b"empty directory", Entry::directory([])),
        (b"first name", first),
        (b"second name", Entry::new(Kind::Link(1))),
        (b"tail", Entry::file(2 * BLOCK + 17, b't')),
        (b"striped", Entry::new(Kind::File(Data::striped(3000, b's')))),
        (
            b"hole",
            Entry::new(Kind::File(Data { size: 1 << 40, blocks: [(0, 1), ((1 << 28) - 1, 2)].into() })),
        ),
        (b"only a hole", Entry::new(Kind::File(Data { size: 12345, blocks: [].into() }))),
        (b"short link", Entry::new(Kind::Symlink(vec![b'x'; 59]))),
        (b"long link", Entry::new(Kind::Symlink(vec![b'y'; 60]))),
        (b"longest link", Entry::new(Kind::Symlink(vec![b'z'; 4095]))),
        (b"null", Entry::new(Kind::Character(1, 3))),
        (b"disk", Entry::new(Kind::Block(259, 65_536))),
        (b"fifo", Entry::new(Kind::Fifo)),
        (b"socket", Entry::new(Kind::Socket)),
        (b"\xff\xfe \n\xc3", Entry::file(1, 1)),
        (&[b'n'; 255], Entry::file(1, 2)),
        (b"acl", acl),
        (b"short attribute", Entry::file(1, 3).with_xattr("user.a", b"b").with_xattr("user.empty", b"")),
        (
            b"long attribute",
            Entry::file(1, 3).with_xattr("user.a", &long(b'l')).with_xattr("trusted.x", b"y"),
        ),
        (b"equal attribute", Entry::new(Kind::Fifo).with_xattr("trusted.a", &long(b'l'))),
        (b"equal attribute too", Entry::new(Kind::Socket).with_xattr("trusted.a", &long(b'l'))),
        (
            b"labelled",
            Entry::directory([(b"sub".to_vec(), many(10, 5))])
                .with_xattr("system.posix_acl_default", &ACL)
                .with_xattr("security.capability", &CAPABILITY)
                .with_xattr("user.longest", &[b'v'; 3900]),
        ),
        (b"hundred", many(100, 200)),
        (b"thousands", many(9000, 12)),
    ];
    let mut root = Entry::directory(entries.into_iter().map(|(name, entry)| (name.to_vec(), entry)));
    if let Kind::Directory(children) = &mut root.kind {
        let inner = Entry::directory([(b"third name".to_vec(), Entry::new(Kind::Link(1)))]);
        children.insert(b"g sorted after the first".to_vec(), inner);
    }
    root.attributes.mode = 0o1777;
    root.attributes.uid = 5;
    root
}

#[test]
fn the_kernel_sees_everything() {
    let file = NamedTempFile::new().unwrap();
    let root = everything();
    let settings = settings(200 * MIB);
    model::write(file.path(), &settings, &root);
    check(file.path());
    {
        let mounted = Mounted::new(file.path(), "ro,noload");
        compare(mounted.path(), &root, true);
        assert!(mounted.path().join("lost+found").is_dir());
    }
    let text = run("dumpe2fs", &["-h", file.path().to_str().unwrap()]);
    assert!(text.contains("a label"), "{text}");
}

#[test]
fn smaller_blocks_hold_it_too() {
    for block_size in [1024, 2048] {
        let file = NamedTempFile::new().unwrap();
        let mut root = everything();
        let Kind::Directory(children) = &mut root.kind else { unreachable!("the root") };
        // A target and attributes have to fit into one block.
        let longest = Kind::Symlink(vec![b'z'; block_size as usize - 1]);
        children.get_mut(&b"longest link"[..]).unwrap().kind = longest;
        children.get_mut(&b"labelled"[..]).unwrap().xattrs.retain(|(name, _)| name != b"user.longest");
        let settings = Settings { block_size, ..settings(200 * MIB) };
        model::write(file.path(), &settings, &root);
        check(file.path());
        let mounted = Mounted::new(file.path(), "ro,noload");
        compare(mounted.path(), &root, true);
    }
}

/// The kernel finds a block of attributes that it would make itself, by its hash, and shares it.
#[test]
fn blocks_of_attributes_are_the_kernels() {
    let file = NamedTempFile::new().unwrap();
    let root =
        Entry::directory([(b"ours".to_vec(), Entry::file(1, 1).with_xattr("user.long", &[b'f'; 301]))]);
    model::write(file.path(), &settings(16 * MIB), &root);
    {
        let mounted = Mounted::new(file.path(), "rw");
        // Known to the kernel once it was looked at.
        compare(mounted.path(), &root, true);
        let theirs = mounted.path().join("theirs");
        std::fs::write(&theirs, b"").unwrap();
        let flags = rustix::fs::XattrFlags::CREATE;
        rustix::fs::setxattr(&theirs, "user.long", &[b'f'; 301], flags).unwrap();
    }
    check(file.path());
    let place = |name: &str| {
        let text = run("debugfs", &["-R", &format!("stat {name}"), file.path().to_str().unwrap()]);
        text.lines().find_map(|line| line.strip_prefix("File ACL: ").map(str::to_owned)).expect("a block")
    };
    assert_ne!(place("/ours"), "0");
    assert_eq!(place("/ours"), place("/theirs"));
}

#[test]
fn what_cannot_be_is_refused() {
    use vbd_ext4::format::Extent;
    use vbd_ext4::write::{Body, Layout, Node, WriteError, Writer};
    let file = NamedTempFile::new().unwrap();
    let mut writer =
        Writer::new(Layout::new(&settings(16 * MIB)).unwrap(), file.reopen().unwrap(), 0).unwrap();
    let ino = writer.reserve_inode().unwrap();
    let plain = Node { attributes: model::attributes(0o644), xattrs: &[], links: 1, body: Body::Fifo };
    let mut put = |node: Node<'_>| writer.put(ino, &node).unwrap_err();
    let extent = |logical, length| Extent { logical, physical: 5000, length, unwritten: false };
    let with = |name: &str, value: &[u8]| [(name.as_bytes().to_vec(), value.to_vec())];
    let late = Attributes { mtime: at(15_032_385_536, 0), ..model::attributes(0o644) };

    assert!(matches!(put(Node { links: 0, ..plain }), WriteError::Links(0)));
    assert!(matches!(put(Node { links: 65_001, ..plain }), WriteError::Links(65_001)));
    assert!(matches!(put(Node { attributes: late, ..plain }), WriteError::Time(15_032_385_536)));
    assert!(matches!(
        put(Node { attributes: model::attributes(0o10_000), ..plain }),
        WriteError::Mode(0o10_000)
    ));
    for target in [&b""[..], b"a\0b", &[b'x'; 4096]] {
        assert!(matches!(put(Node { body: Body::Symlink(target), ..plain }), WriteError::Symlink { .. }));
    }
    let device = Body::Character { major: 4096, minor: 0 };
    assert!(matches!(put(Node { body: device, ..plain }), WriteError::Device { .. }));
    for (size, extents) in [
        (4096, vec![extent(0, 2)]),
        (9000, vec![extent(0, 2), extent(1, 1)]),
        (9000, vec![extent(0, 0)]),
        (1 << 44, vec![]),
        (4096, vec![Extent { physical: 0, length: 0, ..extent(0, 1) }]),
        (8192, vec![Extent { physical: 16 * MIB / BLOCK - 1, ..extent(0, 2) }]),
    ] {
        let body = Body::File { size, extents: &extents };
        assert!(matches!(put(Node { body, ..plain }), WriteError::File { .. }));
    }
    for xattrs in [
        with("com.apple.quarantine", b""),
        with("system.data", b""),
        with("user.big", &[0; 4100]),
        with(&format!("user.{}", "n".repeat(256)), b""),
    ] {
        assert!(matches!(put(Node { xattrs: &xattrs, ..plain }), WriteError::Xattr { .. }));
    }
    let acl = with("system.posix_acl_access", b"no ACL");
    assert!(matches!(put(Node { xattrs: &acl, ..plain }), WriteError::Acl { .. }));
    let twice = [with("user.a", b"1"), with("user.a", b"2")].concat();
    assert!(matches!(put(Node { xattrs: &twice, ..plain }), WriteError::Xattr { .. }));

    // None of it counts as written; what can be, is, once.
    writer.put(ino, &plain).unwrap();
    assert!(matches!(writer.put(ino, &plain), Err(WriteError::Inode { .. })));
    assert!(matches!(writer.put(5000, &plain), Err(WriteError::Inode { .. })));
    let free = writer.free_blocks();
    assert!(
        matches!(writer.allocate(free + 1), Err(WriteError::NoBlocks { needed, .. }) if needed == free + 1)
    );
    assert!(matches!(writer.finish(model::UUID), Err(WriteError::Inode { .. })));
}

#[test]
fn what_is_given_back_is_free() {
    use vbd_ext4::format::ino;
    use vbd_ext4::write::{Directory, Layout, Run, Writer};
    let file = NamedTempFile::new().unwrap();
    let layout = Layout::new(&settings(16 * MIB)).unwrap();
    let free = layout.free_blocks();
    let inodes = layout.free_inodes();
    let mut writer = Writer::new(layout, file.reopen().unwrap(), 0).unwrap();
    let runs = writer.allocate(100).unwrap();
    writer.release(Run::new(runs[0].start + 3, 10));
    writer.release(Run::new(runs[0].start + 13, runs[0].length - 13));
    writer.release(Run::new(runs[0].start, 3));
    writer.reserve_inode().unwrap();
    let attributes = model::attributes(0o755);
    let root = Directory { parent: ino::ROOT, attributes, xattrs: &[], entries: &[] };
    writer.put_directory(ino::ROOT, &root).unwrap();
    let summary = writer.finish(model::UUID).unwrap();
    assert_eq!((summary.free_blocks, summary.free_inodes), (free - 1, inodes));
    check(file.path());
}

/// Blocks that a file has and nobody wrote: they read as zeros whatever lies there, and are the file's.
#[test]
fn blocks_can_be_kept_for_a_file() {
    use vbd_ext4::format::{Extent, FileType, ino};
    use vbd_ext4::write::{Body, Directory, DirectoryEntry, Layout, Node, Writer};
    let file = NamedTempFile::new().unwrap();
    let layout = Layout::new(&settings(300 * MIB)).unwrap();
    let mut writer = Writer::new(layout, file.reopen().unwrap(), 0).unwrap();
    let mut logical = 0;
    let mut extents = Vec::new();
    for run in writer.allocate(50_000).unwrap() {
        let length = u32::try_from(run.length).unwrap();
        extents.push(Extent { logical, physical: run.start, length, unwritten: true });
        logical += length;
    }
    let dirt = writer.position(extents[0].physical);
    std::os::unix::fs::FileExt::write_all_at(file.as_file(), &[0xAA; 8192], dirt).unwrap();
    let attributes = model::attributes(0o644);
    let ino = writer.reserve_inode().unwrap();
    let body = Body::File { size: 50_000 * BLOCK, extents: &extents };
    writer.put(ino, &Node { attributes, xattrs: &[], links: 1, body }).unwrap();
    let entries = [DirectoryEntry { name: b"kept", ino, file_type: FileType::Regular }];
    let root = Directory { parent: ino::ROOT, attributes, xattrs: &[], entries: &entries };
    writer.put_directory(ino::ROOT, &root).unwrap();
    writer.finish(model::UUID).unwrap();
    check(file.path());
    let mounted = Mounted::new(file.path(), "ro,noload");
    let kept = mounted.path().join("kept");
    assert!(std::fs::read(&kept).unwrap().iter().all(|byte| *byte == 0));
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&kept).unwrap());
    assert_eq!(blocks, 50_000 * 8);
}
