//! Trees, disks of them, and what is told of a tree.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::fs::{AtFlags, CWD, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};

/// A program, found where those of the administrator are as well.
pub(crate) fn command(program: &str, arguments: &[&str], directory: &Path) -> Command {
    let mut command = Command::new(program);
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    command.args(arguments).current_dir(directory).env("PATH", path).stdin(Stdio::null());
    command
}

#[track_caller]
pub(crate) fn run(program: &str, arguments: &[&str], directory: &Path) -> Vec<u8> {
    let output = command(program, arguments, directory).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {} {said}", output.status);
    output.stdout
}

pub(crate) fn vbd(arguments: &[&str], directory: &Path) -> Output {
    command(env!("CARGO_BIN_EXE_vbd"), arguments, directory).output().unwrap()
}

/// What a vbd that succeeds prints.
#[track_caller]
pub(crate) fn ok(arguments: &[&str], directory: &Path) -> String {
    String::from_utf8(run(env!("CARGO_BIN_EXE_vbd"), arguments, directory)).unwrap()
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Makes `tree` with an entry of each kind.
pub(crate) fn tree(root: &Path) {
    fs::create_dir_all(root.join("etc/deep/er")).unwrap();
    fs::create_dir(root.join("empty")).unwrap();
    fs::write(root.join("etc/hostname"), "vm1\n").unwrap();
    fs::write(root.join("etc/deep/er/data"), (0..300_000u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>())
        .unwrap();
    fs::write(root.join("etc/nothing"), "").unwrap();
    fs::write(root.join("n".repeat(255)), "long").unwrap();
    fs::write(root.join("etc/ä \u{1b}[2J"), "strange").unwrap();
    fs::hard_link(root.join("etc/hostname"), root.join("zz-same")).unwrap();
    fs::hard_link(root.join("n".repeat(255)), root.join("o".repeat(255))).unwrap();
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.set_len(3_000_000).unwrap();
    sparse.write_all_at(&[7; 10_000], 1_000_000).unwrap();
    symlink("etc/hostname", root.join("link")).unwrap();
    symlink("/x".repeat(100), root.join("far")).unwrap();
    rustix::fs::mknodat(CWD, root.join("fifo"), rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o640), 0)
        .unwrap();
    if is_root() {
        let device = rustix::fs::makedev(259, 70_000);
        let kind = rustix::fs::FileType::BlockDevice;
        rustix::fs::mknodat(CWD, root.join("disk"), kind, Mode::from_raw_mode(0o660), device).unwrap();
        let (uid, gid) = (Some(Uid::from_raw(3_000_001)), Some(Gid::from_raw(200_002)));
        rustix::fs::chownat(CWD, root.join("etc/nothing"), uid, gid, AtFlags::empty()).unwrap();
    }
    fs::set_permissions(root.join("etc/nothing"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::set_permissions(root.join("etc/deep"), fs::Permissions::from_mode(0o1750)).unwrap();
    fs::set_permissions(root.join("etc/deep/er"), fs::Permissions::from_mode(0o555)).unwrap();
    rustix::fs::setxattr(root.join("etc/hostname"), "user.note", b"a\0b\n", XattrFlags::empty()).unwrap();
    let acl: Vec<u8> = [2u32.to_le_bytes().to_vec(), acl_entries()].concat();
    rustix::fs::setxattr(root.join("sparse"), "system.posix_acl_access", &acl, XattrFlags::empty()).unwrap();
    for (path, seconds) in
        [("etc/hostname", -5), ("sparse", 1_000_000_000), ("link", 86_400), ("etc", 1_600_000_000)]
    {
        let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, root.join(path), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

/// user::rw-, user:1234:r--, group::r--, mask::r--, other::---
fn acl_entries() -> Vec<u8> {
    let entries =
        [(1u16, 6u16, u32::MAX), (2, 4, 1234), (4, 4, u32::MAX), (0x10, 4, u32::MAX), (0x20, 0, u32::MAX)];
    let bytes = |(tag, bits, id): (u16, u16, u32)| {
        [&tag.to_le_bytes()[..], &bits.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    entries.into_iter().flat_map(bytes).collect()
}

/// Makes a disk of what [`tree`] made, in the directory that both are in.
pub(crate) fn disk(directory: &Path, tree: &str, name: &str, more: &[&str]) {
    run("mke2fs", &[&["-q", "-t", "ext4"], more, &["-d", tree, name, "64M"]].concat(), directory);
    // Directories have the time when mke2fs filled them; one gets its own back.
    run("debugfs", &["-w", "-R", "set_inode_field /etc mtime @1600000000", name], directory);
}

/// A line for each entry of a tree, with everything about it that can be kept.
pub(crate) fn describe(root: &Path) -> BTreeMap<String, String> {
    let mut lines = BTreeMap::new();
    let mut left = vec![root.to_owned()];
    let mut inodes = BTreeMap::new();
    while let Some(path) = left.pop() {
        let metadata = path.symlink_metadata().unwrap();
        let kind = metadata.file_type();
        let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        if name == "lost+found" {
            continue;
        }
        let mut hash = DefaultHasher::new();
        if kind.is_file() {
            fs::read(&path).unwrap().hash(&mut hash);
        }
        let target = if kind.is_symlink() { fs::read_link(&path).unwrap() } else { "".into() };
        let special = kind.is_fifo() || kind.is_socket() || kind.is_block_device() || kind.is_char_device();
        // Hard links by the name that comes first.
        let first = inodes.entry(metadata.ino()).or_insert_with(Vec::new);
        first.push(name.clone());
        let size = if kind.is_dir() { 0 } else { metadata.size() };
        let links = if kind.is_dir() { 0 } else { metadata.nlink() };
        let rdev = if special { metadata.rdev() } else { 0 };
        // The root is the destination's own.
        let (mode, time) = if name.is_empty() { (0, 0) } else { (metadata.mode(), metadata.mtime()) };
        let time = if kind.is_dir() && name != "etc" { 0 } else { time };
        let line = format!(
            "{mode:o} {}:{} {size} x{links} {time} {rdev} {target:?} {:?} {:x}",
            metadata.uid(),
            metadata.gid(),
            xattrs(&path),
            hash.finish()
        );
        if kind.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        lines.insert(name, line);
    }
    for mut names in inodes.into_values().filter(|names| names.len() > 1) {
        names.sort();
        for name in &names {
            lines.get_mut(name).unwrap().push_str(&format!(" {names:?}"));
        }
    }
    lines
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 65_536];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap_or(0);
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; 65_536];
        let length = rustix::fs::lgetxattr(path, name, &mut value).unwrap();
        (String::from_utf8(name.to_vec()).unwrap(), value[..length].to_vec())
    };
    names.map(value).collect()
}

/// Expects the same lines, and shows those that differ.
#[track_caller]
pub(crate) fn same(left: &BTreeMap<String, String>, right: &BTreeMap<String, String>) {
    let names = left.keys().chain(right.keys());
    let differ: Vec<_> = names.filter(|name| left.get(*name) != right.get(*name)).collect();
    let shown: Vec<_> =
        differ.iter().map(|name| format!("{name}: {:?} {:?}", left.get(*name), right.get(*name))).collect();
    assert!(differ.is_empty(), "{}", shown.join("\n"));
}
