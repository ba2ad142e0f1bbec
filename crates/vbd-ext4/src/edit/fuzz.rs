//! What the fuzz target calls: a filesystem in memory, changed in every way.

use std::io;
use std::sync::{Mutex, PoisonError};

use super::{Attributes, Editor, Ino, New, Storage, Timestamp};
use crate::format::ino::ROOT;
use crate::read::Source;

/// Bytes that an image is taken to have at least: zeros after what is there.
const SIZE: usize = 16 << 20;
/// Entries of the root that something is done with.
const ENTRIES: usize = 20;
/// The time of all changes.
const NOW: Timestamp = Timestamp { seconds: 1_700_000_000, nanoseconds: 0 };

/// An image in memory.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    /// Does something with bytes that are there.
    fn at(&self, offset: u64, length: usize, work: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let range =
            usize::try_from(offset).ok().and_then(|from| bytes.get_mut(from..from.checked_add(length)?));
        range.map(work).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

impl Source for Memory {
    fn size(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.at(offset, buffer.len(), |bytes| buffer.copy_from_slice(bytes))
    }
}

impl Storage for Memory {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.at(offset, bytes.len(), |place| place.copy_from_slice(bytes))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Changes an image in every way there is. Never panics, whatever the bytes.
pub fn edit(bytes: &[u8]) {
    let open = || {
        let mut image = bytes.to_vec();
        image.resize(image.len().max(SIZE), 0);
        Editor::open(Memory(Mutex::new(image)), NOW)
    };
    let Ok(editor) = open() else { return };
    let Ok(root) = editor.filesystem().root() else { return };
    let Ok(entries) = editor.filesystem().entries(&root) else { return };
    let entries: Vec<(Vec<u8>, Ino)> =
        entries.map_while(Result::ok).map(|entry| (entry.name, entry.inode)).take(ENTRIES).collect();
    // Each from the beginning: one that fails ends the editor.
    for number in 0..=entries.len() {
        let Ok(mut editor) = open() else { return };
        let _ = match entries.get(number) {
            Some((name, ino)) => change(&mut editor, name, *ino),
            None => make(&mut editor),
        };
        let _ = editor.commit();
    }
}

fn attributes() -> Attributes {
    Attributes { mode: 0o644, uid: 0, gid: 0, atime: NOW, ctime: NOW, mtime: NOW, crtime: NOW }
}

/// Makes some of everything.
fn make(editor: &mut Editor) -> super::Result<()> {
    let directory = editor.create(ROOT, b"new", New::Directory, &attributes(), &[])?;
    let file = editor.create(directory, b"file", New::File, &attributes(), &[])?;
    editor.set_content(file, &mut &[1; 50_000][..])?;
    editor.set_xattrs(file, &[(b"user.name".to_vec(), vec![2; 600])])?;
    for number in 0..100 {
        editor.link(directory, format!("a further name of the file, {number}").as_bytes(), file)?;
    }
    editor.rename((ROOT, b"new"), (ROOT, b"renamed"))
}

/// Does something with an entry, then removes it.
fn change(editor: &mut Editor, name: &[u8], ino: Ino) -> super::Result<()> {
    let _ = editor.set_content(ino, &mut &[3; 10_000][..]);
    let _ = editor.set_xattrs(ino, &[]);
    let _ = editor.set_attributes(ino, &attributes());
    let _ = editor.create(ino, b"below", New::Symlink(&[b'x'; 100]), &attributes(), &[]);
    editor.rename((ROOT, name), (ROOT, b"another"))?;
    editor.remove_all(ROOT, b"another")
}
