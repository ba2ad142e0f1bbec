//! A tree in memory, changed as an image is, and read back out of one.

use std::collections::BTreeMap;

use vbd_ext4::format::{FileType, Xattr};
use vbd_ext4::read::{Filesystem, Inode, Links, Options, Source};

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    Directory,
    File(Vec<u8>),
    Symlink(Vec<u8>),
    Other(FileType, (u32, u32)),
}

/// An entry, and which other names are the same inode: those with the same number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) content: Content,
    pub(crate) mode: u16,
    pub(crate) owner: (u32, u32),
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) links: u16,
}

/// All entries by their paths, `/`-separated and without one in front; the root is "".
pub(crate) type Tree = BTreeMap<Vec<u8>, Node>;

fn node(filesystem: &Filesystem, inode: &Inode) -> Node {
    let attributes = inode.attributes();
    let content = match inode.file_type() {
        FileType::Directory => Content::Directory,
        FileType::Regular => Content::File(filesystem.read_all(inode, 1 << 26).unwrap()),
        FileType::Symlink => Content::Symlink(filesystem.read_link(inode).unwrap()),
        other => Content::Other(other, inode.device().unwrap_or_default()),
    };
    Node {
        // The block's size, and so that of a directory, is not the tree's.
        content,
        mode: attributes.mode,
        owner: (attributes.uid, attributes.gid),
        xattrs: filesystem.xattrs(inode).unwrap(),
        links: inode.links(),
    }
}

/// Everything in a filesystem but `lost+found`.
pub(crate) fn read(filesystem: &Filesystem) -> Tree {
    let mut tree = Tree::new();
    let mut left = vec![(Vec::new(), filesystem.root().unwrap())];
    while let Some((path, inode)) = left.pop() {
        if inode.file_type() == FileType::Directory {
            for entry in filesystem.entries(&inode).unwrap() {
                let entry = entry.unwrap();
                if [&b"."[..], b"..", b"lost+found"].contains(&&entry.name[..]) {
                    continue;
                }
                let child = filesystem.entry(&entry).unwrap();
                assert_eq!(entry.file_type, Some(child.file_type()));
                let below =
                    if path.is_empty() { entry.name } else { [&path[..], b"/", &entry.name].concat() };
                left.push((below, child));
            }
        }
        let node = node(filesystem, &inode);
        assert!(tree.insert(path, node).is_none(), "a name comes twice");
    }
    tree
}

pub(crate) fn read_from(source: impl Source + 'static) -> Tree {
    read(&Filesystem::open(source, Options::default()).unwrap())
}

/// The number of the inode at a path.
pub(crate) fn number(filesystem: &Filesystem, path: &[u8]) -> u32 {
    filesystem.lookup(path, Links::Keep).unwrap().number()
}
