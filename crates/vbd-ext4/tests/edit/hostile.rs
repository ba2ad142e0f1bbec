//! Images that somebody made on purpose: nothing panics, and nothing runs without an end.

use proptest::prelude::*;
use vbd_ext4::edit::{New, fuzz};
use vbd_ext4::format::ino::ROOT;

use crate::images::{KINDS, edit, image};
use crate::operations::attributes;

/// The front of an image with some of everything in it; behind it are zeros.
fn front(kind: usize) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = image(&directory, &KINDS[kind], 16);
    let mut editor = edit(&path).unwrap();
    let sub = editor.create(ROOT, b"sub", New::Directory, &attributes(0o755), &[]).unwrap();
    let file = editor.create(ROOT, b"file", New::File, &attributes(0o644), &[]).unwrap();
    let mut data = vec![7; 100_000];
    data.chunks_mut(4096).step_by(2).for_each(|block| block.fill(0));
    editor.set_content(file, &mut &data[..]).unwrap();
    editor.set_xattrs(file, &[(b"user.x".to_vec(), vec![1; 500])]).unwrap();
    for number in 0..200 {
        editor.link(sub, format!("a name that is longer {number}").as_bytes(), file).unwrap();
    }
    editor.create(ROOT, b"link", New::Symlink(&[b'l'; 100]), &attributes(0o777), &[]).unwrap();
    editor.commit().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    bytes.truncate(end);
    bytes
}

/// Images without checksums: what is changed there is believed until something else contradicts it.
#[test]
fn bytes_changed_anywhere() {
    for kind in [4, 13] {
        let bytes = front(kind);
        let used: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 0).collect();
        let changes =
            proptest::collection::vec((any::<prop::sample::Index>(), 0usize..8, any::<u8>()), 1..12);
        let mut runner =
            proptest::test_runner::TestRunner::new(ProptestConfig { cases: 5, ..ProptestConfig::default() });
        runner
            .run(&changes, |changes| {
                let mut bytes = bytes.clone();
                for (at, near, value) in changes {
                    let at = (used[at.index(used.len())] + near).min(bytes.len() - 1);
                    bytes[at] = value;
                }
                fuzz::edit(&bytes);
                Ok(())
            })
            .unwrap();
    }
}
