//! Filesystems with something of everything in them.

use tempfile::NamedTempFile;
use vbd_ext4::format::Attributes;

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
