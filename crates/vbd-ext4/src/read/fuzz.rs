//! What the fuzz target calls: a filesystem in memory, looked through as far as there is time.

use super::{DirEntry, FileType, Filesystem, Inode, Links, Options, Padded};

/// Bytes that an image is taken to have at least: zeros after what is there.
const SIZE: u64 = 16 << 20;
/// Inodes that are looked at.
const INODES: usize = 400;
/// Bytes that are read of each file, from the front and from the back.
const PIECE: usize = 16 << 10;

/// Reads an image in every way there is. Never panics, whatever the bytes.
pub fn read(bytes: &[u8]) {
    for verify in [true, false] {
        let source = Padded::new(bytes.to_vec(), SIZE);
        if let Ok(filesystem) = Filesystem::open(source, Options { verify, replay: true }) {
            let _ = look_through(&filesystem);
        }
    }
}

/// Looks at some hundred inodes of the tree; how many.
pub fn look_through(filesystem: &Filesystem) -> usize {
    let _ = filesystem.usage();
    let mut left = vec![filesystem.root()];
    let mut seen = 0;
    while let Some(found) = left.pop() {
        let Ok(inode) = found else { continue };
        seen += 1;
        look_at(filesystem, &inode);
        if inode.file_type() != FileType::Directory {
            continue;
        }
        let Ok(entries) = filesystem.entries(&inode) else { continue };
        let entries: Vec<DirEntry> = entries.take(INODES).filter_map(Result::ok).collect();
        for entry in entries {
            assert!(!entry.name.is_empty() && !entry.name.contains(&b'/') && !entry.name.contains(&0));
            if left.len() + seen < INODES {
                left.push(filesystem.entry(&entry));
            }
            if seen < 10 {
                let _ = filesystem.lookup(&entry.name, Links::Follow);
            }
        }
    }
    seen
}

fn look_at(filesystem: &Filesystem, inode: &Inode) {
    let _ = (inode.attributes(), inode.device(), filesystem.allocated(inode));
    let _ = filesystem.xattrs(inode).map(|xattrs| assert!(xattrs.is_sorted()));
    if inode.file_type() == FileType::Symlink {
        let _ = filesystem.read_link(inode);
    }
    let mut buffer = vec![0; PIECE];
    for offset in [0, inode.size().saturating_sub(PIECE as u64 / 2)] {
        let _ = filesystem.read_at(inode, offset, &mut buffer);
    }
    if let Ok(ranges) = filesystem.data(inode, 0) {
        let mut end = None;
        for range in ranges.take(1000).map_while(Result::ok) {
            assert!(
                range.start < range.end
                    && range.end <= inode.size()
                    && end.is_none_or(|end| end < range.start)
            );
            end = Some(range.end);
        }
    }
}
