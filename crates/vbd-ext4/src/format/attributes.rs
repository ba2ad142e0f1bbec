//! What an inode says of an entry, apart from its content.

use super::Timestamp;
use super::inode::kind;

/// An extended attribute: its name with the prefix (`security.capability`), and the value as the kernel's interface has it.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// Who may do what with an entry, and when it changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Attributes {
    /// Permission bits with set-uid, set-gid and sticky: 0 to 0o7777.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last read.
    pub atime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// When it was made.
    pub crtime: Timestamp,
}

/// The kinds of entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FileType {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A character device.
    Character,
    /// A block device.
    Block,
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
    /// A symbolic link.
    Symlink,
}

impl FileType {
    /// The number in a directory entry ("Linear (Classic) Directories"); 0 there means unknown.
    pub fn code(self) -> u8 {
        match self {
            FileType::Regular => 1,
            FileType::Directory => 2,
            FileType::Character => 3,
            FileType::Block => 4,
            FileType::Fifo => 5,
            FileType::Socket => 6,
            FileType::Symlink => 7,
        }
    }

    /// The kind that a number in a directory entry means.
    pub fn from_code(code: u8) -> Option<FileType> {
        Some(match code {
            1 => FileType::Regular,
            2 => FileType::Directory,
            3 => FileType::Character,
            4 => FileType::Block,
            5 => FileType::Fifo,
            6 => FileType::Socket,
            7 => FileType::Symlink,
            _ => return None,
        })
    }

    /// The bits in an inode's mode.
    pub fn mode(self) -> u16 {
        match self {
            FileType::Regular => kind::REGULAR,
            FileType::Directory => kind::DIRECTORY,
            FileType::Character => kind::CHARACTER,
            FileType::Block => kind::BLOCK,
            FileType::Fifo => kind::FIFO,
            FileType::Socket => kind::SOCKET,
            FileType::Symlink => kind::SYMLINK,
        }
    }

    /// The kind that an inode's mode means.
    pub fn from_mode(mode: u16) -> Option<FileType> {
        Some(match mode & kind::MASK {
            kind::REGULAR => FileType::Regular,
            kind::DIRECTORY => FileType::Directory,
            kind::CHARACTER => FileType::Character,
            kind::BLOCK => FileType::Block,
            kind::FIFO => FileType::Fifo,
            kind::SOCKET => FileType::Socket,
            kind::SYMLINK => FileType::Symlink,
            _ => return None,
        })
    }
}
