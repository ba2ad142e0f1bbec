//! A tree with one of everything, and what a tree is, entry by entry.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps};

/// What an entry is, as far as a filesystem keeps it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: char,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds and nanoseconds.
    pub(crate) mtime: (i64, u32),
    /// Names of a file; 0 for a directory, which counts differently everywhere.
    pub(crate) links: u64,
    /// Major and minor number of a device.
    pub(crate) device: (u32, u32),
    /// A file's bytes or a link's target.
    pub(crate) content: Vec<u8>,
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
    /// Which blocks of 4 KiB of a file are no hole.
    pub(crate) blocks: Vec<u64>,
}

pub(crate) type Tree = BTreeMap<Vec<u8>, Entry>;

fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

pub(crate) fn set_xattr(path: &Path, name: &str, value: &[u8]) -> std::io::Result<()> {
    let flags = rustix::fs::XattrFlags::empty();
    Ok(rustix::fs::lsetxattr(c(path).as_c_str(), name, value, flags)?)
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 4096];
    let length = rustix::fs::llistxattr(c(path).as_c_str(), &mut names[..]).unwrap();
    let names = names[..length].split(|&b| b == 0).filter(|name| !name.is_empty());
    let get = |name: &[u8]| {
        let mut value = vec![0; 65536];
        let length = rustix::fs::lgetxattr(c(path).as_c_str(), name, &mut value[..]).unwrap();
        value.truncate(length);
        (String::from_utf8(name.to_vec()).unwrap(), value)
    };
    names.map(get).collect()
}

pub(crate) fn set_time(path: &Path, seconds: i64) {
    set_precise_time(path, (seconds, 123_456_789));
}

pub(crate) fn set_precise_time(path: &Path, (seconds, nanoseconds): (i64, u32)) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn chown(path: &Path, uid: u32, gid: u32) {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
}

/// An ACL in the kernel's form: tag, permissions and number of each entry.
pub(crate) fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend_from_slice(&tag.to_le_bytes());
        value.extend_from_slice(&permissions.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    value
}

/// Bytes that look random and are always the same.
pub(crate) fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..length).map(|_| step()).collect()
}

/// Makes a tree with one of everything that this user can make.
pub(crate) fn make(root: &Path) {
    let at = |name: &str| root.join(name);
    fs::create_dir_all(at("dir/deep/deeper")).unwrap();
    fs::create_dir(at("empty dir")).unwrap();
    fs::write(at("dir/empty"), b"").unwrap();
    fs::write(at("dir/one"), b"x").unwrap();
    fs::write(at("dir/deep/some"), noise(5000)).unwrap();
    fs::write(at("dir/large"), noise(3 << 20)).unwrap();
    fs::write(at("dir/program"), b"#!/bin/sh\n").unwrap();
    fs::write(root.join(OsStr::from_bytes(b"b\xffd\nname \"x\"")), b"odd").unwrap();
    fs::write(at(&"n".repeat(255)), b"long").unwrap();
    for i in 0..60 {
        fs::write(at(&format!("dir/deep/deeper/{i}{}", "m".repeat(200))), i.to_string()).unwrap();
    }
    let sparse = File::create(at("sparse")).unwrap();
    for (offset, length) in [(1 << 20, 10_000), (5 << 20, 1), ((9 << 20) + 4096, 4096)] {
        sparse.write_all_at(&noise(length), offset).unwrap();
    }
    sparse.set_len((20 << 20) + 77).unwrap();
    File::create(at("hole")).unwrap().set_len(3 << 30).unwrap();
    fs::hard_link(at("dir/large"), at("also large")).unwrap();
    fs::hard_link(at("dir/large"), at("dir/deep/large too")).unwrap();
    symlink("dir/one", at("link")).unwrap();
    symlink("/etc/shadow", at("link out")).unwrap();
    symlink("x/".repeat(60), at("long link")).unwrap();
    symlink("y".repeat(60), at("link of 60")).unwrap();
    rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    drop(UnixListener::bind(at("socket")).unwrap());
    if super::setting::is_root() {
        let all = Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(CWD, at("null"), FileType::CharacterDevice, all, rustix::fs::makedev(1, 3))
            .unwrap();
        let disk = rustix::fs::makedev(259, 70_000);
        rustix::fs::mknodat(CWD, at("disk"), FileType::BlockDevice, all, disk).unwrap();
        chown(&at("dir/one"), 1234, 5678);
        chown(&at("dir/deep"), 70_000, 4_000_000_000);
        chown(&at("link"), 5, 6);
        chown(&at("null"), 0, 15);
        chown(&at("dir/program"), 0, 42);
        let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        set_xattr(&at("dir/program"), "security.capability", &capability).unwrap();
        set_xattr(&at("dir"), "trusted.note", b"kept").unwrap();
        set_xattr(&at("link"), "trusted.note", b"on a link").unwrap();
        chown(root, 7, 8);
    }
    set_xattr(&at("dir/one"), "user.note", b"a\0b\xff").unwrap();
    // More than an inode holds, and than fakeroot does.
    set_xattr(&at("dir/deep/some"), "user.large", &noise(2000)).unwrap();
    set_xattr(root, "user.root", b"yes").unwrap();
    let base = [(1, 7, u32::MAX), (2, 5, 4321), (4, 5, u32::MAX), (16, 5, u32::MAX), (32, 0, u32::MAX)];
    set_xattr(&at("dir/empty"), "system.posix_acl_access", &acl(&base)).unwrap();
    set_xattr(&at("dir/deep"), "system.posix_acl_default", &acl(&base)).unwrap();
    for (name, mode) in
        [("dir", 0o2751), ("empty dir", 0o1777), ("dir/deep/some", 0o400), ("fifo", 0o640), ("", 0o711)]
    {
        fs::set_permissions(at(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    if super::setting::is_root() {
        fs::set_permissions(at("dir/one"), PermissionsExt::from_mode(0o4000)).unwrap();
    }
    let times = [("dir/one", 0), ("dir/large", 2_147_483_647), ("link", 1_000_000_000), ("dir/deep/some", 1)];
    for (name, seconds) in times {
        set_time(&at(name), seconds);
    }
    for name in ["dir/deep", "dir", "empty dir", ""] {
        set_time(&at(name), 1_234_567_890);
    }
}

/// Reads a tree of the host's.
pub(crate) fn read(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        let full = root.join(&path);
        let meta = fs::symlink_metadata(&full).unwrap();
        let kind = meta.file_type();
        let kind = match () {
            () if kind.is_dir() => 'd',
            () if kind.is_file() => 'f',
            () if kind.is_symlink() => 'l',
            () if kind.is_char_device() => 'c',
            () if kind.is_block_device() => 'b',
            () if kind.is_fifo() => 'p',
            () => 's',
        };
        if kind == 'd' {
            todo.extend(fs::read_dir(&full).unwrap().map(|entry| path.join(entry.unwrap().file_name())));
        }
        let (content, blocks) = match kind {
            'f' => content(&full, meta.len()),
            'l' => (fs::read_link(&full).unwrap().as_os_str().as_bytes().to_vec(), Vec::new()),
            _ => (Vec::new(), Vec::new()),
        };
        let device = if matches!(kind, 'c' | 'b') { meta.rdev() } else { 0 };
        let entry = Entry {
            kind,
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: (meta.mtime(), u32::try_from(meta.mtime_nsec()).unwrap()),
            links: if kind == 'd' { 0 } else { meta.nlink() },
            device: (rustix::fs::major(device), rustix::fs::minor(device)),
            content,
            xattrs: xattrs(&full),
            blocks,
        };
        tree.insert(path.as_os_str().as_bytes().to_vec(), entry);
    }
    tree
}

/// A file's bytes, and its blocks that are not zero. One of nothing but a large hole is compared by its length.
fn content(path: &Path, length: u64) -> (Vec<u8>, Vec<u64>) {
    if length > 0 && fs::metadata(path).unwrap().blocks() == 0 {
        return (length.to_string().into_bytes(), Vec::new());
    }
    let bytes = fs::read(path).unwrap();
    let blocks = (0u64..).zip(bytes.chunks(4096)).filter(|(_, block)| block.iter().any(|&b| b != 0));
    let blocks = blocks.map(|(at, _)| at).collect();
    (bytes, blocks)
}
