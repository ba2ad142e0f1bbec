//! How entries are shown: as lines for people, as objects for programs.

use serde::Serialize;
use vbd_ext4::read::{FileType, Filesystem, Inode, Timestamp};
use vbd_image::clock;

/// The letter that ls(1) has for a kind, which find(1) has too but for files.
pub(super) fn letter(kind: FileType) -> char {
    match kind {
        FileType::Regular => '-',
        FileType::Directory => 'd',
        FileType::Character => 'c',
        FileType::Block => 'b',
        FileType::Fifo => 'p',
        FileType::Socket => 's',
        FileType::Symlink => 'l',
    }
}

/// The kind and the permissions as `drwxr-xr-x`.
pub(super) fn mode(inode: &Inode) -> String {
    let bits = inode.attributes().mode;
    let mut text = String::from(letter(inode.file_type()));
    for (shift, special, set, unset) in [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')]
    {
        let three = bits >> shift;
        text.push(if three & 4 != 0 { 'r' } else { '-' });
        text.push(if three & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & special != 0, three & 1 != 0) {
            (true, true) => set,
            (true, false) => unset,
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// A time to the second, in UTC.
pub(super) fn time(time: Timestamp) -> String {
    clock::rfc3339(time.seconds).replace('T', " ").replace('Z', "")
}

/// A time to the nanosecond, as RFC 3339 has it.
fn exact(time: Timestamp) -> String {
    clock::rfc3339(time.seconds).replace('Z', &format!(".{:09}Z", time.nanoseconds))
}

/// A name or path as text; bytes that are none are shown as replacement characters.
pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The same for a terminal: what could steer it is shown as a question mark.
pub(super) fn plain(bytes: &[u8]) -> String {
    text(bytes).replace(char::is_control, "?")
}

/// Bytes that are no text, as hexadecimal digits, so that a program gets them whole.
fn hexadecimal(bytes: &[u8]) -> Option<String> {
    let digits = || bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    std::str::from_utf8(bytes).is_err().then(digits)
}

/// An entry for programs. Sizes are in bytes, times in UTC.
#[derive(Serialize)]
pub(super) struct Object {
    path: String,
    /// The path in hexadecimal digits, if it is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    path_hex: Option<String>,
    #[serde(rename = "type")]
    kind: &'static str,
    inode: u32,
    mode: String,
    uid: u32,
    gid: u32,
    links: u16,
    size: u64,
    allocated: u64,
    atime: String,
    mtime: String,
    ctime: String,
    crtime: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<(u32, u32)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_hex: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    attributes: Vec<Attribute>,
    /// Why its target or its attributes are missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// An extended attribute for programs.
#[derive(Serialize)]
struct Attribute {
    name: String,
    /// The value in hexadecimal digits.
    value_hex: String,
}

impl Object {
    pub(super) fn new(filesystem: &Filesystem, path: &[u8], inode: &Inode) -> Object {
        let attributes = inode.attributes();
        let mut problem = None;
        let mut note = |error: vbd_ext4::read::Error| problem = Some(error.to_string());
        let target = match inode.file_type() {
            FileType::Symlink => filesystem.read_link(inode).map_err(&mut note).ok(),
            _ => None,
        };
        let xattrs = filesystem.xattrs(inode).map_err(&mut note).unwrap_or_default();
        let xattrs = xattrs.iter().map(|(name, value)| Attribute {
            name: text(name),
            value_hex: value.iter().map(|byte| format!("{byte:02x}")).collect(),
        });
        Object {
            path: text(path),
            path_hex: hexadecimal(path),
            kind: vbd_fs::inside::compare::kind_name(inode.file_type()),
            inode: inode.number(),
            mode: format!("{:04o}", attributes.mode),
            uid: attributes.uid,
            gid: attributes.gid,
            links: inode.links(),
            size: inode.size(),
            allocated: filesystem.allocated(inode),
            atime: exact(attributes.atime),
            mtime: exact(attributes.mtime),
            ctime: exact(attributes.ctime),
            crtime: exact(attributes.crtime),
            device: inode.device(),
            target_hex: target.as_deref().and_then(hexadecimal),
            target: target.as_deref().map(text),
            attributes: xattrs.collect(),
            problem,
        }
    }
}
