//! The inodes and directories of a plan whose content is placed, written in the order of their paths.

use std::path::Path;

use sha2::{Digest as _, Sha256};
use vbd_ext4::format::{Attributes, Extent, FileType, Ino, Timestamp, Xattr, ino};
use vbd_ext4::write::{Body as Content, Directory, DirectoryEntry, Node as Inode, Writer};

use super::failed;
use crate::entry::{Meta, Special};
use crate::plan::{Body, NodeId, Plan};
use crate::{Error, Progress, Result};

/// Writes what is in `plan`; returns what stands for all of it but the content of files.
///
/// # Errors
///
/// The entry that the filesystem cannot represent, by its path; what goes wrong in writing.
pub(super) fn emit(plan: &Plan, writer: &mut Writer, progress: &mut dyn Progress) -> Result<[u8; 32]> {
    let mut digest = Sha256::new();
    // Of each node; 0 for one that has none yet.
    let mut numbers: Vec<Ino> = vec![0; plan.nodes()];
    numbers[plan.root().index()] = ino::ROOT;
    let mut parents = vec![plan.root()];
    parents.resize(plan.nodes(), plan.root());
    for (directory, children) in plan.directories() {
        if progress.cancelled() {
            return Err(Error::Interrupted);
        }
        let here = || plan.directory_path(directory);
        let mut entries = Vec::with_capacity(children.len());
        for name in children {
            let node = plan.target(name);
            let bytes = plan.name(name);
            digest.update(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
            digest.update(bytes);
            let number = &mut numbers[node.index()];
            let known = *number != 0;
            if !known {
                *number = writer.reserve_inode().map_err(|e| failed(&plan.path(name), e))?;
            }
            digest.update(number.to_le_bytes());
            let file_type = file_type(&plan.node(node).body);
            entries.push(DirectoryEntry { name: bytes, ino: *number, file_type });
            if file_type == FileType::Directory {
                parents[node.index()] = directory;
            } else if !known {
                let number = *number;
                note(plan, node, &mut digest);
                put(plan, node, number, writer).map_err(|e| failed(&plan.path(name), e))?;
            }
        }
        note(plan, directory, &mut digest);
        let made = Directory {
            parent: numbers[parents[directory.index()].index()],
            attributes: attributes(&plan.node(directory).meta),
            xattrs: &xattrs(plan, directory),
            entries: &entries,
        };
        writer.put_directory(numbers[directory.index()], &made).map_err(|e| failed(&here(), e))?;
    }
    Ok(digest.finalize().into())
}

fn put(plan: &Plan, id: NodeId, number: Ino, writer: &mut Writer) -> vbd_ext4::write::Result<()> {
    let node = plan.node(id);
    let extents: Vec<Extent>;
    let body = match &node.body {
        // Written with its names.
        Body::Directory(_) => return Ok(()),
        Body::File { size, data } => {
            let extent = |run: &crate::plan::Run| Extent {
                logical: run.logical,
                physical: run.block,
                length: run.count,
                unwritten: false,
            };
            extents = data.runs().iter().map(extent).collect();
            Content::File { size: *size, extents: &extents }
        }
        Body::Symlink(target) => Content::Symlink(plan.text(*target)),
        Body::Device { kind, major, minor } => match kind {
            Special::Character => Content::Character { major: *major, minor: *minor },
            Special::Block => Content::Block { major: *major, minor: *minor },
            Special::Fifo => Content::Fifo,
            Special::Socket => Content::Socket,
        },
    };
    let (attributes, xattrs) = (attributes(&node.meta), xattrs(plan, id));
    writer.put(number, &Inode { attributes, xattrs: &xattrs, links: node.links, body })
}

pub(super) fn file_type(body: &Body) -> FileType {
    match body {
        Body::Directory(_) => FileType::Directory,
        Body::File { .. } => FileType::Regular,
        Body::Symlink(_) => FileType::Symlink,
        Body::Device { kind: Special::Character, .. } => FileType::Character,
        Body::Device { kind: Special::Block, .. } => FileType::Block,
        Body::Device { kind: Special::Fifo, .. } => FileType::Fifo,
        Body::Device { kind: Special::Socket, .. } => FileType::Socket,
    }
}

/// All times are that of the content's last change: the others say when somebody looked at the source, or copied it.
pub(super) fn attributes(meta: &Meta) -> Attributes {
    let time = Timestamp { seconds: meta.mtime.seconds, nanoseconds: meta.mtime.nanoseconds };
    Attributes {
        // Twelve bits.
        mode: u16::try_from(meta.mode & 0o7777).unwrap_or(0),
        uid: meta.uid,
        gid: meta.gid,
        atime: time,
        ctime: time,
        mtime: time,
        crtime: time,
    }
}

pub(super) fn xattrs(plan: &Plan, node: NodeId) -> Vec<Xattr> {
    let all = plan.xattrs(node).iter();
    all.map(|(name, value)| (name.as_encoded_bytes().to_vec(), value.clone())).collect()
}

/// Takes everything about a node but its names and content into the digest.
fn note(plan: &Plan, id: NodeId, digest: &mut Sha256) {
    let node = plan.node(id);
    let Meta { mode, uid, gid, mtime } = node.meta;
    for number in [mode, uid, gid, mtime.nanoseconds, u32::from(file_type(&node.body).code())] {
        digest.update(number.to_le_bytes());
    }
    digest.update(mtime.seconds.to_le_bytes());
    match &node.body {
        Body::Directory(_) => {}
        Body::File { size, .. } => digest.update(size.to_le_bytes()),
        Body::Symlink(target) => {
            let target = plan.text(*target);
            digest.update((target.len() as u64).to_le_bytes());
            digest.update(target);
        }
        Body::Device { major, minor, .. } => {
            digest.update(major.to_le_bytes());
            digest.update(minor.to_le_bytes());
        }
    }
    for (name, value) in plan.xattrs(id) {
        for bytes in [name.as_encoded_bytes(), value] {
            digest.update((bytes.len() as u64).to_le_bytes());
            digest.update(bytes);
        }
    }
}

/// The path of the entry, as messages have it.
pub(super) fn shown(path: &Path) -> std::path::PathBuf {
    Path::new("/").join(path)
}
