//! Filesystems made larger, and given another identity.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};

use vbd_ext4::check;
use vbd_ext4::edit::{Editor, New};
use vbd_ext4::format::ino::ROOT;
use vbd_ext4::read::{Filesystem, Options, Padded};

use crate::images::{KINDS, NOW, check as e2fsck, command, edit, image, part, run};
use crate::model::{Tree, read_from};
use crate::operations::attributes;
use crate::power::{Recorder, states};

const MIB: u64 = 1 << 20;
const UUID: [u8; 16] = *b"another identity";

fn fill(path: &Path) -> Tree {
    let mut editor = edit(path).unwrap();
    for number in 0..40 {
        let name = format!("file {number}");
        let file = editor.create(ROOT, name.as_bytes(), New::File, &attributes(0o644), &[]).unwrap();
        editor.set_content(file, &mut &vec![b'a'; 1000 * number][..]).unwrap();
    }
    editor.commit().unwrap();
    read_from(part(path))
}

fn blocks(path: &Path) -> u64 {
    Filesystem::open(part(path), Options::default()).unwrap().superblock().blocks()
}

/// Neither e2fsck nor our own checker finds anything.
#[track_caller]
fn is_clean(path: &Path) {
    let report = check::check(part(path), &mut |_, _| {}).unwrap();
    assert!(report.is_clean(), "{report:#?}");
    e2fsck(path);
}

fn set_len(path: &Path, size: u64) {
    File::options().write(true).open(path).unwrap().set_len(size).unwrap();
}

#[test]
fn filesystems_grow() {
    for kind in KINDS.iter().filter(|(name, _)| *name != "meta_bg") {
        println!("{}", kind.0);
        let directory = tempfile::tempdir().unwrap();
        // An odd size, for a last group that becomes longer.
        let path = image(&directory, kind, 11);
        let tree = fill(&path);
        let small = blocks(&path);
        for size in [12 * MIB, 47 * MIB + 9000, 300 * MIB] {
            set_len(&path, size);
            let before = blocks(&path);
            let grown = edit(&path).unwrap().grow(size).unwrap();
            is_clean(&path);
            assert_eq!(read_from(part(&path)), tree);
            assert!(
                grown.after <= size && grown.after >= grown.before && grown.after + MIB / 2 > size - size / 8
            );
            assert_eq!(blocks(&path) * (grown.before / before), grown.after);
        }
        assert!(blocks(&path) > small * 20);
        // What is new can be used: by our own editor and by e2fsprogs.
        let mut editor = edit(&path).unwrap();
        let file = editor.create(ROOT, b"large", New::File, &attributes(0o644), &[]).unwrap();
        editor.set_content(file, &mut &vec![b'b'; 40 << 20][..]).unwrap();
        editor.commit().unwrap();
        is_clean(&path);
        set_len(&path, 500 * MIB);
        run("resize2fs", &[path.to_str().unwrap()]);
        is_clean(&path);
    }
}

#[test]
fn what_cannot_grow_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let meta = KINDS.iter().find(|(name, _)| *name == "meta_bg").unwrap();
    let path = image(&directory, meta, 11);
    set_len(&path, 100 * MIB);
    let error = edit(&path).unwrap().grow(100 * MIB).unwrap_err().to_string();
    assert!(error.contains("meta_bg") && error.contains("resize2fs"), "{error}");
    let fixed = ("no room", &["-t", "ext4", "-b", "1024", "-O", "^resize_inode"][..]);
    let path = image(&directory, &fixed, 11);
    set_len(&path, 2000 * MIB);
    let error = edit(&path).unwrap().grow(2000 * MIB).unwrap_err().to_string();
    assert!(error.contains("at most") && error.contains("resize2fs"), "{error}");
    is_clean(&path);
    // It never becomes smaller.
    let grown = edit(&path).unwrap().grow(5 * MIB).unwrap();
    assert_eq!((grown.before, grown.after), (11 * MIB, 11 * MIB));
}

#[test]
fn identities_change() {
    for kind in &KINDS {
        println!("{}", kind.0);
        let directory = tempfile::tempdir().unwrap();
        let path = image(&directory, kind, 40);
        let tree = fill(&path);
        let mut editor = edit(&path).unwrap();
        editor.identify(UUID, Some(b"label")).unwrap();
        editor.commit().unwrap();
        drop(editor);
        is_clean(&path);
        assert_eq!(read_from(part(&path)), tree);
        let shown = run("dumpe2fs", &["-h", path.to_str().unwrap()]);
        assert!(shown.contains("616e6f74-6865-7220-6964-656e74697479"), "{shown}");
        assert!(
            shown.lines().any(|line| line.starts_with("Filesystem volume name:") && line.ends_with(" label"))
        );
        let mut editor = edit(&path).unwrap();
        assert!(editor.identify(UUID, Some(&[b'l'; 17])).is_err());
        drop(editor);
        // A tool that trusts the UUID alone finds its way.
        run("tune2fs", &["-L", "other", path.to_str().unwrap()]);
        is_clean(&path);
    }
}

/// Looks at all that a cut leaves of a change: the numbers before or those after, and nothing wrong.
fn cut(path: &Path, size: u64, change: impl FnOnce(Editor)) {
    let tree = fill(path);
    set_len(path, size);
    let before = std::fs::read(path).unwrap();
    let state = |bytes: &[u8]| {
        let filesystem = Filesystem::open(Padded::new(bytes.to_vec(), 0), Options::default()).unwrap();
        (filesystem.superblock().blocks(), filesystem.superblock().uuid)
    };
    let recorder =
        Recorder { now: Arc::new(Mutex::new(before.clone())), events: Arc::new(Mutex::new(Vec::new())) };
    change(Editor::open(recorder.clone(), NOW).unwrap());
    let (old, new) = (state(&before), state(&recorder.now.lock().unwrap()));
    assert_ne!(old, new);
    let copy = path.with_extension("cut");
    let (mut olds, mut news, mut turn) = (0, 0, 0);
    states(&before, &recorder.events.lock().unwrap(), |number, bytes| {
        let found = state(bytes);
        assert!(found == old || found == new, "event {number}: {found:?}");
        if found == new {
            news += 1
        } else {
            olds += 1
        }
        let report = check::check(Padded::new(bytes.to_vec(), 0), &mut |_, _| {}).unwrap();
        assert!(report.is_clean(), "event {number}: {report:#?}");
        turn += 1;
        if turn % 5 != 0 {
            return;
        }
        std::fs::write(&copy, bytes).unwrap();
        let output = command("e2fsck").args(["-fy", copy.to_str().unwrap()]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(matches!(output.status.code(), Some(0 | 1)), "event {number}: {said}");
        let asked = said.lines().filter(|line| line.contains('?')).collect::<Vec<_>>();
        let harmless = |line: &&str| line.contains("journal") || line.contains("Free ");
        assert!(asked.iter().all(harmless), "event {number}: {said}");
        is_clean(&copy);
        assert_eq!(read_from(part(&copy)), tree);
    });
    assert!(olds > 0 && news > 0, "{olds} times the old one, {news} times the new one");
}

#[test]
fn the_power_is_cut_while_it_grows() {
    for kind in [0, 2, 13] {
        println!("{}", KINDS[kind].0);
        let directory = tempfile::tempdir().unwrap();
        let path = image(&directory, &KINDS[kind], 9);
        cut(&path, 26 * MIB, |editor| {
            editor.grow(26 * MIB).unwrap();
        });
    }
}

#[test]
fn the_power_is_cut_while_the_identity_changes() {
    for kind in [2, 5, 13] {
        let directory = tempfile::tempdir().unwrap();
        let path = image(&directory, &KINDS[kind], 20);
        cut(&path, 20 * MIB, |mut editor| {
            editor.identify(UUID, None).unwrap();
            editor.commit().unwrap();
        });
    }
}
