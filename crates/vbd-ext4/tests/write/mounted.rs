//! The kernel mounts what was written (through a loop device: these tests need root and loop devices).

use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

pub(crate) use vbd_testing::Mounted;

use crate::model::{BLOCK, Data, Entry, Kind};

fn xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut names = vec![0u8; 65536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let mut found: Vec<_> = names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0u8; 65536];
            let length = rustix::fs::lgetxattr(path, &*CString::new(name).unwrap(), &mut value[..]).unwrap();
            (name.to_vec(), value[..length].to_vec())
        })
        .collect();
    found.sort();
    found
}

/// The tree at a path is this one, in everything.
pub(crate) fn compare(path: &Path, entry: &Entry, root: bool) {
    let metadata = fs::symlink_metadata(path).unwrap();
    let wanted = entry.attributes;
    assert_eq!(metadata.mode() & 0o7777, u32::from(wanted.mode), "mode of {path:?}");
    assert_eq!((metadata.uid(), metadata.gid()), (wanted.uid, wanted.gid), "owner of {path:?}");
    for (found, wanted) in [
        ((metadata.mtime(), metadata.mtime_nsec()), wanted.mtime),
        ((metadata.ctime(), metadata.ctime_nsec()), wanted.ctime),
        ((metadata.atime(), metadata.atime_nsec()), wanted.atime),
    ] {
        assert_eq!(found, (wanted.seconds, i64::from(wanted.nanoseconds)), "times of {path:?}");
    }
    let mut attributes = entry.xattrs.clone();
    attributes.sort();
    assert_eq!(xattrs(path), attributes, "attributes of {path:?}");
    let kind = metadata.file_type();
    match &entry.kind {
        Kind::Directory(children) => {
            let mut names: Vec<OsString> =
                fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.retain(|name| !root || name != "lost+found" || children.contains_key(name.as_bytes()));
            names.sort();
            let wanted: Vec<OsString> = children.keys().cloned().map(OsString::from_vec).collect();
            assert_eq!(names, wanted, "entries of {path:?}");
            for (name, child) in children {
                let below = path.join(OsStr::from_bytes(name));
                if !matches!(child.kind, Kind::Link(_)) {
                    compare(&below, child, false);
                }
            }
        }
        Kind::File(data) => file(path, data, &metadata),
        Kind::Symlink(target) => {
            assert_eq!(fs::read_link(path).unwrap(), PathBuf::from(OsStr::from_bytes(target)));
        }
        Kind::Character(major, minor) | Kind::Block(major, minor) => {
            assert_eq!(kind.is_char_device(), matches!(entry.kind, Kind::Character(..)));
            assert_eq!(kind.is_block_device(), matches!(entry.kind, Kind::Block(..)));
            let device = metadata.rdev();
            assert_eq!((rustix::fs::major(device), rustix::fs::minor(device)), (*major, *minor), "{path:?}");
        }
        Kind::Fifo => assert!(kind.is_fifo()),
        Kind::Socket => assert!(kind.is_socket()),
        Kind::Link(_) => {}
    }
    if let Some((_, links)) = entry.links {
        assert_eq!(metadata.nlink(), u64::from(links), "names of {path:?}");
    }
}

fn file(path: &Path, data: &Data, metadata: &fs::Metadata) {
    assert_eq!(metadata.len(), data.size, "size of {path:?}");
    if data.size < 64 << 20 {
        assert!(fs::read(path).unwrap() == data.bytes(), "content of {path:?}");
    }
    let bytes: u64 = data.blocks.keys().map(|block| BLOCK.min(data.size - block * BLOCK)).sum();
    let (least, most) = (bytes.div_ceil(512), data.blocks.len() as u64 * 8);
    let tree_and_attributes = most / 80 + 24;
    assert!((least..=most + tree_and_attributes).contains(&metadata.blocks()), "blocks of {path:?}");
}
