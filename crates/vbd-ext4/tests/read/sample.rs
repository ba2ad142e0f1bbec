//! A tree with entries of every kind, and the comparison of one with an image.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{CWD, Mode, XattrFlags};
use vbd_ext4::read::{FileType, Filesystem, Inode};

/// Bytes without a pattern that a block could hide behind.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The value of an ACL at the kernel's interface: user::rw-, user:1234:r--, group::r--, mask::r--, other::---
const ACL: [u8; 44] = [
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 0xd2, 4, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255,
    0x10, 0, 4, 0, 255, 255, 255, 255, 0x20, 0, 0, 0, 255, 255, 255, 255,
];

fn xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::setxattr(path, name, value, XattrFlags::empty()).unwrap();
}

/// Fills an empty directory.
pub(crate) fn fill(root: &Path) {
    let large = root.join("large");
    fs::create_dir_all(root.join("a/b/c")).unwrap();
    fs::create_dir(&large).unwrap();
    fs::create_dir(root.join("empty")).unwrap();
    for number in 0..1500 {
        fs::write(large.join(format!("a file with number {number}")), number.to_string()).unwrap();
    }
    fs::write(root.join("a/nothing"), b"").unwrap();
    fs::write(root.join("a/tiny"), b"tiny").unwrap();
    fs::write(root.join("a/inline"), noise(100, 1)).unwrap();
    fs::write(root.join("a/b/middle"), noise(70_001, 2)).unwrap();
    fs::write(root.join("a/b/c/long"), noise(2_000_003, 3)).unwrap();
    fs::write(root.join("x".repeat(255)), b"a long name").unwrap();
    fs::write(root.join("na\u{fc}me \u{1f600} \x01\x7f"), b"a strange name").unwrap();
    fs::hard_link(root.join("a/b/middle"), root.join("hard")).unwrap();

    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.set_len(5 << 20).unwrap();
    for at in [0u64, 70_000, 1 << 20, (3 << 20) + 12345, (5 << 20) - 1] {
        sparse.write_all_at(&noise(9000.min((5 << 20) - usize::try_from(at).unwrap()), at), at).unwrap();
    }
    File::create(root.join("hole")).unwrap().set_len(3_456_789).unwrap();

    symlink("a/b", root.join("link")).unwrap();
    symlink("/a/b/c/../middle", root.join("absolute")).unwrap();
    symlink("loop", root.join("loop")).unwrap();
    symlink("/t".repeat(500), root.join("far")).unwrap();
    rustix::fs::mknodat(CWD, root.join("fifo"), rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o640), 0)
        .unwrap();
    rustix::fs::mknodat(
        CWD,
        root.join("socket"),
        rustix::fs::FileType::Socket,
        Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    if rustix::process::geteuid().is_root() {
        for (name, kind, major, minor) in [
            ("null", rustix::fs::FileType::CharacterDevice, 1, 3),
            ("disk", rustix::fs::FileType::BlockDevice, 259, 70_000),
        ] {
            let device = rustix::fs::makedev(major, minor);
            rustix::fs::mknodat(CWD, root.join(name), kind, Mode::from_raw_mode(0o660), device).unwrap();
        }
        rustix::fs::chownat(
            CWD,
            root.join("a/tiny"),
            Some(rustix::fs::Uid::from_raw(70_001)),
            Some(rustix::fs::Gid::from_raw(80_002)),
            rustix::fs::AtFlags::empty(),
        )
        .unwrap();
    }
    fs::set_permissions(root.join("a/tiny"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::set_permissions(root.join("a/b"), fs::Permissions::from_mode(0o1777)).unwrap();
}

/// Adds extended attributes, on a filesystem that has them.
pub(crate) fn decorate(root: &Path) {
    xattr(&root.join("a/tiny"), "user.small", b"value");
    xattr(&root.join("a/tiny"), "user.empty", b"");
    xattr(&root.join("a/inline"), "user.large", &noise(900, 4));
    xattr(&root.join("a/b/middle"), "user.also", &noise(50, 5));
    xattr(&root.join("a/b"), "user.directory", b"yes");
    xattr(&root.join("a/b/c/long"), "system.posix_acl_access", &ACL);
}

/// What can be compared of an entry.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    kind: FileType,
    mode: u32,
    uid: u32,
    gid: u32,
    size: u64,
    links: u64,
    mtime: (i64, u32),
    device: Option<(u32, u32)>,
    target: Option<Vec<u8>>,
    content: Option<Vec<u8>>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

pub(crate) type Tree = BTreeMap<Vec<u8>, Entry>;

/// What there is in a directory of the host, itself included.
pub(crate) fn of_host(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let metadata = path.symlink_metadata().unwrap();
        let kind = metadata.file_type();
        let file_type = match () {
            () if kind.is_dir() => FileType::Directory,
            () if kind.is_file() => FileType::Regular,
            () if kind.is_symlink() => FileType::Symlink,
            () if kind.is_fifo() => FileType::Fifo,
            () if kind.is_socket() => FileType::Socket,
            () if kind.is_char_device() => FileType::Character,
            () => FileType::Block,
        };
        let device = metadata.rdev();
        let is_device = matches!(file_type, FileType::Character | FileType::Block);
        let entry = Entry {
            kind: file_type,
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            size: if kind.is_dir() { 0 } else { metadata.size() },
            links: metadata.nlink(),
            mtime: (metadata.mtime(), u32::try_from(metadata.mtime_nsec()).unwrap()),
            device: is_device.then(|| (rustix::fs::major(device), rustix::fs::minor(device))),
            target: kind.is_symlink().then(|| fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec()),
            content: kind.is_file().then(|| fs::read(&path).unwrap()),
            xattrs: host_xattrs(&path),
        };
        if kind.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        tree.insert(path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec(), entry);
    }
    tree
}

fn host_xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut names = vec![0; 65_536];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap_or(0);
    let mut all = Vec::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 65_536];
        let length = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
        all.push((name.to_vec(), value[..length].to_vec()));
    }
    all.sort();
    all
}

/// What there is in an image.
pub(crate) fn of_image(filesystem: &Filesystem) -> Tree {
    let mut tree = Tree::new();
    let mut left = vec![(Vec::new(), filesystem.root().unwrap())];
    while let Some((path, inode)) = left.pop() {
        if inode.file_type() == FileType::Directory {
            for entry in filesystem.entries(&inode).unwrap() {
                let entry = entry.unwrap();
                if entry.name == b"." || entry.name == b".." {
                    continue;
                }
                let child = filesystem.entry(&entry).unwrap();
                assert!(entry.file_type.is_none_or(|kind| kind == child.file_type()));
                let separator = if path.is_empty() { &b""[..] } else { b"/" };
                left.push(([&path, separator, &entry.name].concat(), child));
            }
        }
        let entry = of_inode(filesystem, &inode);
        assert!(tree.insert(path, entry).is_none());
    }
    tree
}

fn of_inode(filesystem: &Filesystem, inode: &Inode) -> Entry {
    let kind = inode.file_type();
    let attributes = inode.attributes();
    Entry {
        kind,
        mode: attributes.mode.into(),
        uid: attributes.uid,
        gid: attributes.gid,
        size: if kind == FileType::Directory { 0 } else { inode.size() },
        links: inode.links().into(),
        mtime: (attributes.mtime.seconds, attributes.mtime.nanoseconds),
        device: inode.device(),
        target: (kind == FileType::Symlink).then(|| filesystem.read_link(inode).unwrap()),
        content: (kind == FileType::Regular).then(|| content(filesystem, inode)),
        xattrs: filesystem.xattrs(inode).unwrap(),
    }
}

/// A file read whole, and once more by its ranges: both have to say the same.
fn content(filesystem: &Filesystem, inode: &Inode) -> Vec<u8> {
    let whole = filesystem.read_all(inode, 1 << 30).unwrap();
    let mut pieces = vec![0; whole.len()];
    for range in filesystem.data(inode, 0).unwrap() {
        let range = range.unwrap();
        let within = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        assert_eq!(
            filesystem.read_at(inode, range.start, &mut pieces[within.clone()]).unwrap(),
            within.len()
        );
    }
    assert!(whole == pieces, "inode {} differs when it is read by its ranges", inode.number());
    whole
}

/// Expects two trees to be the same, with what they may differ in taken off by `adapt`.
#[track_caller]
pub(crate) fn same(mut left: Tree, mut right: Tree, adapt: impl Fn(&[u8], &mut Entry)) {
    for tree in [&mut left, &mut right] {
        tree.remove(&b"lost+found"[..]);
        tree.iter_mut().for_each(|(path, entry)| adapt(path, entry));
    }
    let names =
        |tree: &Tree| tree.keys().map(|name| String::from_utf8_lossy(name).into_owned()).collect::<Vec<_>>();
    assert_eq!(names(&left), names(&right));
    for (path, entry) in &left {
        let name = String::from_utf8_lossy(path);
        let other = &right[path];
        assert!(entry.content == other.content, "the contents of {name} differ");
        let plain = |entry: &Entry| format!("{:?}", Entry { content: None, ..clone(entry) });
        assert_eq!(plain(entry), plain(other), "{name}");
    }
}

fn clone(entry: &Entry) -> Entry {
    Entry { target: entry.target.clone(), content: None, xattrs: entry.xattrs.clone(), ..*entry }
}

impl Entry {
    /// What mke2fs does not keep: nanoseconds, and of the root what making lost+found changes.
    pub(crate) fn as_mke2fs(&mut self, path: &[u8]) {
        self.mtime.1 = 0;
        if path.is_empty() {
            (self.links, self.mtime) = (0, (0, 0));
        }
    }

    /// The same, where filling a directory can take longer than a second: it has the time of that.
    pub(crate) fn as_filled(&mut self, path: &[u8]) {
        self.as_mke2fs(path);
        if self.kind == FileType::Directory {
            self.mtime = (0, 0);
        }
    }
}
