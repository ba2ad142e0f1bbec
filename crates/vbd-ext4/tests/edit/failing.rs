//! The storage fails at any call of a change: the change is told as failed, what it was made with takes no other, and
//! what is in the image is the old filesystem or the new one.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vbd_ext4::edit::{Editor, New, Storage};
use vbd_ext4::format::ino::ROOT;
use vbd_ext4::read::{Padded, Source};

use crate::images::{KINDS, NOW, check, edit, image, part};
use crate::model::read_from;
use crate::operations::attributes;
use crate::power::Recorder;

/// Fails one write or flush, by its number, and all that follow.
#[derive(Clone)]
struct Failing {
    below: Recorder,
    left: Arc<AtomicUsize>,
}

impl Failing {
    fn spend(&self) -> io::Result<()> {
        let spent = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        spent.map(drop).map_err(|_| io::Error::from_raw_os_error(5))
    }
}

impl Source for Failing {
    fn size(&self) -> u64 {
        self.below.size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.below.read_exact_at(buffer, offset)
    }
}

impl Storage for Failing {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.spend()?;
        self.below.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.spend()?;
        self.below.sync()
    }
}

#[test]
fn a_change_whose_storage_fails_is_not_called_done() {
    for kind in [0, 4, 13] {
        let directory = tempfile::tempdir().unwrap();
        let path = image(&directory, &KINDS[kind], 8);
        let before = std::fs::read(&path).unwrap();
        let old = read_from(part(&path));
        let (mut failed, mut last, mut found_both) = (0, None, Vec::new());
        for calls in 0.. {
            let below = Recorder { now: Arc::new(before.clone().into()), events: Arc::default() };
            let storage = Failing { below: below.clone(), left: Arc::new(calls.into()) };
            let mut editor = Editor::open(storage, NOW).unwrap();
            let made = editor
                .create(ROOT, b"made", New::File, &attributes(0o644), &[])
                .and_then(|file| editor.set_content(file, &mut &[7; 30_000][..]));
            let done = made.is_ok() && editor.commit().is_ok();
            let state = below.now.lock().unwrap().clone();
            let tree = read_from(Padded::new(state.clone(), 0));
            if done {
                assert_ne!(tree, old, "{}: done, and not there", KINDS[kind].0);
                last = Some(tree);
                break;
            }
            failed += 1;
            let more = editor.create(ROOT, b"more", New::Fifo, &attributes(0o644), &[]);
            assert!(more.is_err() || editor.commit().is_err(), "one that failed goes on");
            drop(editor);
            // Whoever opens it next finds one of the two, whole.
            std::fs::write(&path, &state).unwrap();
            drop(edit(&path).unwrap());
            check(&path);
            let found = read_from(part(&path));
            assert_eq!(found, tree, "{}, call {calls}", KINDS[kind].0);
            found_both.push(found);
        }
        let new = last.expect("one that does not fail");
        assert!(
            found_both.iter().all(|found| *found == old || *found == new),
            "{}: neither of them",
            KINDS[kind].0
        );
        assert!(failed > 5, "{failed} calls failed");
    }
}
