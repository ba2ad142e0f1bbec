//! The power is cut at every write of a change: what is in the image is the old filesystem or the new one.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use vbd_ext4::edit::{Editor, New, Storage};
use vbd_ext4::format::ino::ROOT;
use vbd_ext4::read::{Padded, Source};

use crate::images::{KINDS, NOW, check, command, edit, image, part};
use crate::model::{Tree, read_from};
use crate::operations::{attributes, with_mounted};

/// What reaches the storage whole.
const PAGE: usize = 4096;

pub(crate) enum Event {
    Write(usize, Vec<u8>),
    Sync,
}

/// An image in memory that remembers how it came about.
#[derive(Clone)]
pub(crate) struct Recorder {
    pub(crate) now: Arc<Mutex<Vec<u8>>>,
    pub(crate) events: Arc<Mutex<Vec<Event>>>,
}

impl Source for Recorder {
    fn size(&self) -> u64 {
        self.now.lock().unwrap().len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.now.lock().unwrap()[at..at + buffer.len()]);
        Ok(())
    }
}

impl Storage for Recorder {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let at = usize::try_from(offset).unwrap();
        self.now.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        self.events.lock().unwrap().push(Event::Write(at, bytes.to_vec()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.events.lock().unwrap().push(Event::Sync);
        Ok(())
    }
}

/// All that the storage may hold when the power is cut: the writes since the last flush each page by page, in any mixture.
/// The same numbers give the same mixtures.
pub(crate) fn states(before: &[u8], events: &[Event], mut look: impl FnMut(usize, &[u8])) {
    let mut flushed = before.to_vec();
    let mut pending: Vec<(usize, Vec<u8>)> = Vec::new();
    let mut random = 0x1234_5678_9abc_def0u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    for (number, event) in events.iter().enumerate() {
        match event {
            Event::Sync => {
                for (at, bytes) in pending.drain(..) {
                    flushed[at..at + bytes.len()].copy_from_slice(&bytes);
                }
            }
            Event::Write(at, bytes) => pending.push((*at, bytes.clone())),
        }
        // In order, and twice in disorder: of each page one of the versions that it had since the flush.
        for round in 0..if pending.is_empty() { 1 } else { 3 } {
            let mut state = flushed.clone();
            let mut stop: std::collections::HashMap<usize, u64> = std::collections::HashMap::new();
            for (at, bytes) in &pending {
                let mut from = *at;
                while from < at + bytes.len() {
                    let page = from / PAGE;
                    let to = ((page + 1) * PAGE).min(at + bytes.len());
                    let lost = round > 0 && {
                        let left = stop.entry(page).or_insert_with(|| next() % 3);
                        let lost = *left == 0;
                        *left = left.saturating_sub(1);
                        lost
                    };
                    if !lost {
                        state[from..to].copy_from_slice(&bytes[from - at..to - at]);
                    }
                    from = to;
                }
            }
            look(number, &state);
        }
    }
}

/// Makes a change and looks at every state that it can leave behind.
fn cut(path: &Path, change: impl FnOnce(&mut Editor), mounting: bool) -> usize {
    let before = std::fs::read(path).unwrap();
    let old = read_from(part(path));
    let recorder =
        Recorder { now: Arc::new(Mutex::new(before.clone())), events: Arc::new(Mutex::new(Vec::new())) };
    let mut editor = Editor::open(recorder.clone(), NOW).unwrap();
    change(&mut editor);
    editor.commit().unwrap();
    drop(editor);
    std::fs::write(path, &*recorder.now.lock().unwrap()).unwrap();
    check(path);
    let new = read_from(part(path));
    assert_ne!(old, new, "nothing changed");

    let is_right = |tree: &Tree, what: &str| {
        assert!(*tree == old || *tree == new, "{what}: neither the old nor the new filesystem");
        *tree == new
    };
    let copy = path.with_extension("cut");
    let (mut seen, mut olds, mut news) = (std::collections::HashSet::new(), 0, 0);
    let mut last = 0;
    states(&before, &recorder.events.lock().unwrap(), |number, state| {
        use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
        if !seen.insert(BuildHasherDefault::<DefaultHasher>::default().hash_one(state)) {
            return;
        }
        // As our own reader sees it.
        let first = is_right(&read_from(Padded::new(state.to_vec(), 0)), "read");
        if first {
            news += 1
        } else {
            olds += 1
        }
        // As e2fsck makes it.
        std::fs::write(&copy, state).unwrap();
        let output = command("e2fsck").args(["-fy", copy.to_str().unwrap()]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(matches!(output.status.code(), Some(0 | 1)), "event {number}: {said}");
        // The superblock's own counts are older than the journal, with the kernel's changes too.
        let usual = ["Pass ", "Free ", "Fix? yes"];
        let other = said.lines().find(|line| {
            !line.is_empty()
                && !usual.iter().any(|usual| line.starts_with(usual))
                && !["recovering journal", "WAS MODIFIED", " files ("]
                    .iter()
                    .any(|usual| line.contains(usual))
        });
        assert_eq!(other, None, "event {number}: {said}");
        check(&copy);
        is_right(&read_from(part(&copy)), "repaired");
        // As this editor makes it.
        std::fs::write(&copy, state).unwrap();
        drop(edit(&copy).unwrap());
        check(&copy);
        assert_eq!(is_right(&read_from(part(&copy)), "recovered"), first);
        // As the kernel makes it: once for each event.
        if mounting && last != number {
            last = number;
            std::fs::write(&copy, state).unwrap();
            with_mounted(&copy, |_| {});
            check(&copy);
            assert_eq!(is_right(&read_from(part(&copy)), "mounted"), first);
        }
    });
    assert!(olds > 0 && news > 0, "{olds} times the old one, {news} times the new one");
    olds + news
}

#[test]
fn at_every_write_of_an_edit() {
    for kind in [0, 2, 4, 13, 14] {
        println!("{}", KINDS[kind].0);
        let directory = tempfile::tempdir().unwrap();
        let path = image(&directory, &KINDS[kind], 8);
        let mut editor = edit(&path).unwrap();
        let file = editor.create(ROOT, b"file", New::File, &attributes(0o644), &[]).unwrap();
        editor.set_content(file, &mut &[b'a'; 9000][..]).unwrap();
        editor.commit().unwrap();
        drop(editor);
        let mounting = kind != 4 && (kind != 14 || crate::quota::kernel_has_quotas(&path));
        let seen = cut(&path, |editor| editor.set_content(file, &mut &[b'b'; 12_000][..]).unwrap(), mounting);
        assert!(seen > 10, "{seen}");
    }
}

#[test]
fn at_every_write_of_many_changes_at_once() {
    for (kind, files) in [(1, 20), (2, 60), (14, 20)] {
        println!("{}", KINDS[kind].0);
        let directory = tempfile::tempdir().unwrap();
        let path = image(&directory, &KINDS[kind], 8);
        let mut editor = edit(&path).unwrap();
        let sub = editor.create(ROOT, b"sub", New::Directory, &attributes(0o755), &[]).unwrap();
        for number in 0..files {
            let name = format!("a rather long name of a file {number}").into_bytes();
            let file = editor.create(sub, &name, New::File, &attributes(0o644), &[]).unwrap();
            // Blocks that begin as a journal's do.
            editor.set_content(file, &mut &[0xC0, 0x3B, 0x39, 0x98, number][..]).unwrap();
        }
        editor.commit().unwrap();
        drop(editor);
        cut(
            &path,
            |editor| {
                editor.remove_all(ROOT, b"sub").unwrap();
                let new = editor.create(ROOT, b"new", New::Directory, &attributes(0o700), &[]).unwrap();
                for number in 0..files / 5 {
                    let name = format!("another {number}").into_bytes();
                    let file = editor.create(new, &name, New::File, &attributes(0o600), &[]).unwrap();
                    editor.set_content(file, &mut &[b'z'; 3000][..]).unwrap();
                }
                // A block of metadata that begins with the journal's own number.
                let mut target = 0xC03B_3998u32.to_be_bytes().to_vec();
                target.extend([b't'; 100]);
                editor.create(new, b"target", New::Symlink(&target), &attributes(0o777), &[]).unwrap();
            },
            false,
        );
    }
}

/// A kernel that was stopped in the middle of its work left a journal with changes; then the power is cut while the editor
/// recovers and changes it.
#[test]
fn at_every_write_of_a_recovery() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(&directory, &KINDS[2], 8);
    let copy = directory.path().join("copy");
    with_mounted(&path, |place| {
        for number in 0..30 {
            std::fs::write(place.join(format!("file {number}")), vec![b'k'; 2000]).unwrap();
        }
        rustix::fs::sync();
        std::fs::copy(&path, &copy).unwrap();
    });
    let filesystem =
        vbd_ext4::read::Filesystem::open(part(&copy), vbd_ext4::read::Options::default()).unwrap();
    assert!(filesystem.replayed() > 0, "the kernel left nothing in its journal");
    drop(filesystem);
    cut(
        &copy,
        |editor| {
            editor.remove(ROOT, b"file 3").unwrap();
        },
        true,
    );
}
