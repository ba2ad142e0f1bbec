//! What is not changed: refused by its name, before anything is written.

use vbd_ext4::edit::{EditError, New};
use vbd_ext4::format::ino::ROOT;

use crate::images::{KINDS, check, edit, image, run};
use crate::operations::attributes;

#[test]
fn features_that_cannot_be_kept_right() {
    for (options, name) in [
        (&["-t", "ext4", "-O", "bigalloc"][..], "bigalloc"),
        (&["-t", "ext4", "-O", "inline_data"], "inline_data"),
        (&["-t", "ext4", "-O", "encrypt"], "encrypt"),
        (&["-t", "ext4", "-O", "casefold"], "casefold"),
        (&["-t", "ext4", "-O", "ea_inode"], "ea_inode"),
        (&["-t", "ext4", "-O", "verity"], "verity"),
        (&["-t", "ext4", "-O", "mmp"], "mmp"),
        (&["-t", "ext2"], "no journal"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let path = image(&directory, &("", options), 16);
        let before = std::fs::read(&path).unwrap();
        match edit(&path) {
            Err(EditError::Refused(why)) => assert!(why.contains(name), "{name}: {why}"),
            Err(other) => panic!("{name}: {other}"),
            Ok(_) => panic!("{name} was not refused"),
        }
        assert!(std::fs::read(&path).unwrap() == before, "{name}: the image changed");
    }
}

#[test]
fn orphans_and_errors() {
    for (field, value) in [("last_orphan", "12"), ("state", "2")] {
        let directory = tempfile::tempdir().unwrap();
        let path = image(&directory, &KINDS[1], 16);
        run("debugfs", &["-w", "-R", &format!("ssv {field} {value}"), path.to_str().unwrap()]);
        assert!(matches!(edit(&path), Err(EditError::Refused(_))), "{field}");
    }
}

#[test]
fn immutable_files() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(&directory, &KINDS[1], 16);
    let mut editor = edit(&path).unwrap();
    let file = editor.create(ROOT, b"file", New::File, &attributes(0o644), &[]).unwrap();
    editor.commit().unwrap();
    drop(editor);
    run("debugfs", &["-w", "-R", "sif /file flags 0x80010", path.to_str().unwrap()]);
    let mut editor = edit(&path).unwrap();
    let refused = [
        editor.set_content(file, &mut &b"x"[..]),
        editor.remove(ROOT, b"file"),
        editor.set_attributes(file, &attributes(0o600)),
    ];
    for result in refused {
        assert!(matches!(result, Err(EditError::Kind { why, .. }) if why.contains("immutable")));
    }
    assert!(!editor.is_changed());
}

#[test]
fn a_change_larger_than_the_journal() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(&directory, &("", &["-t", "ext4", "-b", "1024", "-J", "size=1"]), 64);
    let before = std::fs::read(&path).unwrap();
    let mut editor = edit(&path).unwrap();
    for number in 0..1100 {
        // Each has a block of its own in the journal.
        let target = vec![b't'; 500];
        editor
            .create(ROOT, format!("{number}").as_bytes(), New::Symlink(&target), &attributes(0o777), &[])
            .unwrap();
    }
    let error = editor.commit().unwrap_err();
    assert!(matches!(error, EditError::TooLarge { room: 1023, .. }), "{error}");
    assert!(std::fs::read(&path).unwrap() == before, "the image changed");
    check(&path);
}
