//! What a process that is killed leaves behind: changes of the mapping that are in memory only.
//!
//! A guest goes on when the process that serves its disk is killed and another takes over. Data that was written is in
//! the kernel then, but entries that lead to it wait in memory for a commit. So each change is noted, before anybody can
//! see it, in a file beside the image (`.NAME.changes`), which the kernel keeps as well: no sync, only a short write. A
//! commit makes the notes before it void. Whoever opens the image next finds the notes, sets the entries again and
//! commits.
//!
//! After a power cut or on another host the notes mean nothing: what they lead to may be lost. They name the boot of the
//! host. They are void, too, once anybody else has written to the image: while there are notes a bit of the header is
//! set, of those that a writer clears which does not know them (so version 2 of the format has no notes).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use vbd_image::ReadAt;
use vbd_ring::sync::{Mutex, MutexGuard};

const MAGIC: [u8; 8] = *b"vbdnotes";
/// Bytes before the first note, and bytes of one.
const HEAD: usize = 128;
const NOTE: usize = 32;
/// Notes that are read at most. There are fewer, as a commit is due long before.
const MOST_BYTES: u64 = 256 << 20;
/// So many notes are reason enough for a commit.
const MANY: usize = 1 << 16;

/// A change of the mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Note {
    /// An L2 table has a new place.
    Table {
        /// Its entry in the L1 table.
        index: u64,
        /// That entry.
        entry: u64,
        /// Where it was before; 0 for a new one.
        old: u64,
    },
    /// A cluster of the disk has a new entry.
    Entry {
        /// The cluster.
        cluster: u64,
        /// Both halves of its entry.
        entry: (u64, u64),
    },
}

impl Note {
    fn words(self) -> [u64; 3] {
        match self {
            Note::Table { index, entry, old } => [1 << 56 | index, entry, old],
            Note::Entry { cluster, entry } => [2 << 56 | cluster, entry.0, entry.1],
        }
    }

    fn encode(self, generation: u64) -> [u8; NOTE] {
        let words = self.words();
        let mut bytes = [0; NOTE];
        for (part, word) in bytes.chunks_exact_mut(8).zip(words.into_iter().chain([seal(generation, &words)]))
        {
            part.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The note in these bytes, if it is one of this generation.
    fn decode(bytes: &[u8], generation: u64) -> Option<Note> {
        let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at * 8..at * 8 + 8)?.try_into().ok()?));
        let words = [word(0)?, word(1)?, word(2)?];
        if word(3)? != seal(generation, &words) {
            return None;
        }
        let number = words[0] & ((1 << 56) - 1);
        match words[0] >> 56 {
            1 => Some(Note::Table { index: number, entry: words[1], old: words[2] }),
            2 => Some(Note::Entry { cluster: number, entry: (words[1], words[2]) }),
            _ => None,
        }
    }
}

/// A number that depends on all of these.
fn seal(generation: u64, words: &[u64]) -> u64 {
    words.iter().fold(generation ^ 0x6a09_e667_f3bc_c908, |sum, word| {
        let mixed = (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^ (mixed >> 29)
    })
}

/// Which image on which boot of the host notes are about.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    boot: [u8; 36],
}

impl Identity {
    /// That of the file at `path`, now; none where the host does not tell.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
        let boot = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
        let boot = boot.get(..36)?.try_into().ok()?;
        Some(Identity { device: metadata.dev(), inode: metadata.ino(), boot })
    }

    fn head(&self, generation: u64) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[..8].copy_from_slice(&MAGIC);
        head[8..16].copy_from_slice(&generation.to_le_bytes());
        head[16..24].copy_from_slice(&self.device.to_le_bytes());
        head[24..32].copy_from_slice(&self.inode.to_le_bytes());
        head[32..68].copy_from_slice(&self.boot);
        head
    }
}

/// The file with notes of changes that a process has left beside the image at `image`, which is to make them when it is opened
/// for writing; none where it was closed. Whoever changes the image otherwise meanwhile may use again what they lead to.
pub fn left_beside(image: &Path) -> Option<PathBuf> {
    path_of(image).filter(|path| path.exists())
}

/// Where the notes of an image are.
pub(super) fn path_of(image: &Path) -> Option<PathBuf> {
    let image = image.canonicalize().ok()?;
    let mut name = std::ffi::OsString::from(".");
    name.push(image.file_name()?);
    name.push(".changes");
    Some(image.with_file_name(name))
}

/// The notes in these bytes, if they are about this image on this boot of the host, in order, and their generation.
pub(super) fn parse(bytes: &[u8], identity: &Identity) -> Option<(u64, Vec<Note>)> {
    let generation = u64::from_le_bytes(bytes.get(8..16)?.try_into().ok()?);
    if bytes.get(..HEAD)? != identity.head(generation) {
        return None;
    }
    // One that was not finished belongs to a change that nobody has seen.
    let notes = bytes[HEAD..].chunks_exact(NOTE).filter_map(|note| Note::decode(note, generation));
    Some((generation, notes.collect()))
}

/// The notes that somebody has left about an image.
pub(super) fn left(path: &Path, identity: &Identity) -> io::Result<Option<(u64, Vec<Note>)>> {
    let file = match open(path, OpenOptions::new().read(true)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let len = file.metadata()?.len();
    if len > MOST_BYTES {
        return Ok(None);
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.fill_at(0, &mut bytes)?;
    Ok(parse(&bytes, identity))
}

/// The directory may belong to somebody else, so nothing but a plain file of one name will do.
fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.nlink() > 1 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a file of changes"));
    }
    Ok(file)
}

/// The notes about an open image.
#[derive(Default)]
pub(super) struct Log(Mutex<State>);

#[derive(Default)]
pub(super) struct State {
    writer: Option<Writer>,
    /// A note could not be written: what it is about must be committed before anybody learns of it.
    pub(super) broken: bool,
}

struct Writer {
    file: File,
    path: PathBuf,
    identity: Identity,
    generation: u64,
    /// Notes that no commit has made void, and how many there were before.
    notes: Vec<Note>,
    before: u64,
}

impl Writer {
    /// Writes all notes anew, in a generation of their own.
    fn begin(&mut self) -> io::Result<()> {
        self.generation += 1;
        let mut bytes = Vec::with_capacity(self.notes.len() * NOTE);
        self.notes.iter().for_each(|note| bytes.extend(note.encode(self.generation)));
        self.file.write_all_at(&bytes, HEAD as u64)?;
        // Those before count until now.
        self.file.write_all_at(&self.identity.head(self.generation), 0)
    }
}

impl Log {
    /// Nobody sets entries or begins a commit while this is held.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there are notes.
    pub(super) fn is_on(&self) -> bool {
        self.state().writer.is_some()
    }

    /// Begins to take notes, with none. `after` is the generation of those that were left.
    pub(super) fn start(&self, path: &Path, identity: Identity, after: u64) -> io::Result<()> {
        let file =
            open(path, OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600))?;
        let writer =
            Writer { file, path: path.to_owned(), identity, generation: after, notes: Vec::new(), before: 0 };
        let writer = self.state().writer.insert(writer).begin();
        writer.inspect_err(|_| self.state().writer = None)
    }

    /// How far notes have come: those before are about changes that are in memory.
    pub(super) fn mark(&self) -> u64 {
        let state = self.state();
        state.writer.as_ref().map_or(0, |writer| writer.before + writer.notes.len() as u64)
    }

    /// Everything before the mark is durable.
    pub(super) fn committed(&self, mark: u64) {
        let mut state = self.state();
        let Some(writer) = &mut state.writer else { return };
        let done = usize::try_from(mark.saturating_sub(writer.before)).unwrap_or(0).min(writer.notes.len());
        if done == 0 {
            return;
        }
        writer.notes.drain(..done);
        writer.before += done as u64;
        if writer.begin().is_err() {
            // Notes of what is durable change nothing, as long as later ones follow.
            state.give_up();
        }
    }

    /// Whether a commit should make notes void.
    pub(super) fn is_long(&self) -> bool {
        self.state().writer.as_ref().is_some_and(|writer| writer.notes.len() > MANY)
    }

    /// Ends the notes, which are all void.
    pub(super) fn end(&self) {
        if let Some(writer) = self.state().writer.take() {
            let _ = std::fs::remove_file(writer.path);
        }
    }
}

impl State {
    /// Notes changes, before anybody sees them.
    pub(super) fn note(&mut self, notes: impl Iterator<Item = Note>) {
        let Some(writer) = &mut self.writer else { return };
        let offset = (HEAD + writer.notes.len() * NOTE) as u64;
        let first = writer.notes.len();
        writer.notes.extend(notes);
        let bytes: Vec<u8> =
            writer.notes[first..].iter().flat_map(|note| note.encode(writer.generation)).collect();
        if writer.file.write_all_at(&bytes, offset).is_err() {
            self.give_up();
        }
    }

    /// Notes that are not complete must not be found.
    fn give_up(&mut self) {
        if let Some(writer) = self.writer.take() {
            let _ = writer.file.set_len(0);
            let _ = std::fs::remove_file(writer.path);
        }
        self.broken = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn note() -> impl Strategy<Value = Note> {
        let small = 0u64..1 << 56;
        prop_oneof![
            (small.clone(), any::<u64>(), any::<u64>()).prop_map(|(index, entry, old)| Note::Table {
                index,
                entry,
                old
            }),
            (small, any::<(u64, u64)>()).prop_map(|(cluster, entry)| Note::Entry { cluster, entry }),
        ]
    }

    proptest! {
        /// Whatever commits come in between: what is found are the notes after the last of them.
        #[test]
        fn notes_are_found_until_a_commit(
            rounds in prop::collection::vec((prop::collection::vec(note(), 0..5), any::<bool>()), 1..12),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("notes");
            let identity = Identity::of(Path::new("/proc/self/exe")).expect("a boot");
            let log = Log::default();
            log.start(&path, identity.clone(), 0).unwrap();
            let mut model: Vec<Note> = Vec::new();
            for (notes, commit) in rounds {
                let mark = log.mark();
                let before = model.len();
                log.state().note(notes.iter().copied());
                model.extend(notes);
                if commit {
                    log.committed(mark);
                    model.drain(..before);
                }
                let (_, found) = left(&path, &identity).unwrap().expect("notes");
                prop_assert_eq!(&found, &model);
            }
            let other = Identity { boot: [b'0'; 36], ..identity };
            prop_assert!(left(&path, &other).unwrap().is_none());
            log.end();
            prop_assert!(!path.exists());
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), generation: u64) {
            let identity = Identity { device: 1, inode: 2, boot: [b'a'; 36] };
            let _ = parse(&bytes, &identity);
            let whole = [&identity.head(generation)[..], &bytes[..]].concat();
            let (_, notes) = parse(&whole, &identity).expect("a head");
            prop_assert!(notes.len() <= bytes.len() / NOTE);
        }
    }
}
