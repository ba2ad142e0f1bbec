//! Each operation on each kind of filesystem: our reader, e2fsck, debugfs and the kernel see it.

use std::io::Read;
use std::path::Path;

use vbd_ext4::edit::{Attributes, EditError, Editor, New};
use vbd_ext4::format::ino::ROOT;

use crate::images::{KINDS, NOW, check, edit, image, part, run};
use crate::model::{Content, read, read_from};

pub(crate) fn attributes(mode: u16) -> Attributes {
    Attributes { mode, uid: 7, gid: 70_000, atime: NOW, ctime: NOW, mtime: NOW, crtime: NOW }
}

fn content(editor: &Editor, path: &str) -> Vec<u8> {
    let inode = editor.filesystem().lookup(path.as_bytes(), vbd_ext4::read::Links::Keep).unwrap();
    editor.filesystem().read_all(&inode, 1 << 30).unwrap()
}

/// Bytes that are nowhere zero for long.
fn bytes(length: usize, seed: u8) -> Vec<u8> {
    (0..251u8).cycle().map(|byte| byte ^ seed | 1).take(length).collect()
}

#[test]
fn everything_on_every_kind() {
    for kind in &KINDS {
        println!("{}", kind.0);
        let directory = tempfile::tempdir().unwrap();
        let path = image(&directory, kind, 24);
        let mut editor = edit(&path).unwrap();

        // New things of all kinds.
        let etc = editor.create(ROOT, b"etc", New::Directory, &attributes(0o755), &[]).unwrap();
        let file = editor.create(etc, b"file", New::File, &attributes(0o640), &[]).unwrap();
        editor.set_content(file, &mut &b"short"[..]).unwrap();
        let large = editor.create(ROOT, b"large", New::File, &attributes(0o4755), &[]).unwrap();
        let mut data = bytes(3 << 20, 9);
        data[1 << 20..(1 << 20) + 300_000].fill(0);
        editor.set_content(large, &mut &data[..]).unwrap();
        editor.create(etc, b"link", New::Symlink(b"../large"), &attributes(0o777), &[]).unwrap();
        let far = [b'x'; 900];
        editor.create(etc, b"far", New::Symlink(&far), &attributes(0o777), &[]).unwrap();
        editor.create(etc, b"null", New::Character { major: 1, minor: 3 }, &attributes(0o666), &[]).unwrap();
        editor
            .create(etc, b"disk", New::Block { major: 259, minor: 70_000 }, &attributes(0o660), &[])
            .unwrap();
        editor.create(etc, b"fifo", New::Fifo, &attributes(0o600), &[]).unwrap();
        editor.create(etc, b"socket", New::Socket, &attributes(0o600), &[]).unwrap();
        editor.link(ROOT, b"also", file).unwrap();
        editor.commit().unwrap();
        check(&path);
        assert_eq!(content(&edit(&path).unwrap(), "also"), b"short");
        assert_eq!(content(&edit(&path).unwrap(), "large"), data);

        // Changed, replaced, given attributes.
        editor.set_content(file, &mut &bytes(70_000, 3)[..]).unwrap();
        editor.set_content(large, &mut std::io::empty()).unwrap();
        let xattrs = [
            (b"user.large".to_vec(), bytes(700, 1)),
            (b"user.small".to_vec(), b"value".to_vec()),
            (b"security.capability".to_vec(), bytes(20, 2)),
        ];
        editor.set_xattrs(file, &xattrs).unwrap();
        editor.set_attributes(file, &Attributes { uid: 1 << 20, ..attributes(0o7777) }).unwrap();
        editor.commit().unwrap();
        check(&path);
        let tree = read_from(part(&path));
        let node = &tree[&b"etc/file"[..]];
        assert_eq!(node.content, Content::File(bytes(70_000, 3)));
        assert_eq!((node.mode, node.owner, node.links), (0o7777, (1 << 20, 70_000), 2));
        let mut sorted = xattrs.to_vec();
        sorted.sort();
        assert_eq!(node.xattrs, sorted);
        assert_eq!(tree[&b"etc/far"[..]].content, Content::Symlink(far.to_vec()));
        assert_eq!(tree[&b"large"[..]].content, Content::File(Vec::new()));

        // Moved and removed.
        let var = editor.create(ROOT, b"var", New::Directory, &attributes(0o755), &[]).unwrap();
        editor.rename((ROOT, b"etc"), (var, b"etc2")).unwrap();
        editor.rename((var, b"etc2"), (ROOT, b"etc3")).unwrap();
        editor.rename((ROOT, b"large"), (var, b"small")).unwrap();
        editor.rename((ROOT, b"also"), (var, b"small")).unwrap();
        editor.commit().unwrap();
        check(&path);
        editor.set_xattrs(file, &[]).unwrap();
        editor.remove_all(ROOT, b"etc3").unwrap();
        editor.commit().unwrap();
        check(&path);
        let left: Vec<Vec<u8>> = read(editor.filesystem()).into_keys().collect();
        assert_eq!(left, [&b""[..], b"var", b"var/small"]);
        editor.remove(var, b"small").unwrap();
        editor.remove(ROOT, b"var").unwrap();
        editor.commit().unwrap();
        check(&path);
        assert_eq!(read_from(part(&path)).len(), 1);
    }
}

#[test]
fn what_cannot_be_done_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(&directory, &KINDS[1], 16);
    let mut editor = edit(&path).unwrap();
    let sub = editor.create(ROOT, b"sub", New::Directory, &attributes(0o755), &[]).unwrap();
    let deep = editor.create(sub, b"deep", New::Directory, &attributes(0o755), &[]).unwrap();
    editor.commit().unwrap();
    let before = std::fs::read(&path).unwrap();
    let exists = editor.create(ROOT, b"sub", New::File, &attributes(0o644), &[]);
    assert!(matches!(exists, Err(EditError::Exists(_))));
    assert!(matches!(editor.remove(ROOT, b"none"), Err(EditError::NotFound(_))));
    assert!(matches!(editor.remove(ROOT, b"sub"), Err(EditError::NotEmpty(_))));
    assert!(matches!(editor.remove(sub, b".."), Err(EditError::NotFound(_))));
    assert!(matches!(editor.rename((ROOT, b"sub"), (deep, b"below")), Err(EditError::Kind { .. })));
    assert!(matches!(editor.set_content(sub, &mut &b"x"[..]), Err(EditError::Kind { .. })));
    assert!(matches!(editor.link(ROOT, b"other", sub), Err(EditError::Kind { .. })));
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
        assert!(matches!(
            editor.create(ROOT, name, New::File, &attributes(0o644), &[]),
            Err(EditError::Write(_))
        ));
    }
    assert!(!editor.is_changed());
    editor.commit().unwrap();
    assert!(std::fs::read(&path).unwrap() == before, "the image changed");

    // What fails in the middle cannot be committed.
    let file = editor.create(ROOT, b"file", New::File, &attributes(0o644), &[]).unwrap();
    let error = editor.set_content(file, &mut std::io::repeat(1).take(1 << 30)).unwrap_err();
    assert!(matches!(error, EditError::NoBlocks { .. }), "{error}");
    assert!(matches!(editor.commit(), Err(EditError::Refused(_))));
    check(&path);
    assert_eq!(read_from(part(&path)).len(), 3);
}

#[test]
fn a_directory_grows_from_one_block_to_a_tree_of_three_levels_and_empties() {
    for (kind, count) in [(2, 6_000), (4, 1_500), (11, 1_000), (13, 1_500), (0, 1_500)] {
        println!("{}", KINDS[kind].0);
        let directory = tempfile::tempdir().unwrap();
        let path = image(&directory, &KINDS[kind], 48);
        let mut editor = edit(&path).unwrap();
        let sub = editor.create(ROOT, b"sub", New::Directory, &attributes(0o755), &[]).unwrap();
        let file = editor.create(ROOT, b"file", New::File, &attributes(0o644), &[]).unwrap();
        let name = |number: usize| format!("{number:0width$}", width = 5 + number % 90).into_bytes();
        for number in 0..count {
            editor.link(sub, &name(number), file).unwrap();
            if number % 1000 == count / 20 {
                editor.commit().unwrap();
                check(&path);
            }
        }
        editor.commit().unwrap();
        check(&path);
        let inode = editor.filesystem().inode(sub).unwrap();
        let listed = editor.filesystem().entries(&inode).unwrap().count();
        assert_eq!(listed, count + 2);
        for number in 0..count {
            if number % 7 != 0 {
                editor.remove(sub, &name(number)).unwrap();
            }
        }
        editor.commit().unwrap();
        check(&path);
        for number in 0..count {
            let path = [b"/sub/", &name(number)[..]].concat();
            if number % 101 == 0 {
                assert_eq!(editor.locate(&path).unwrap().found.is_some(), number % 7 == 0);
            }
        }
        editor.remove_all(ROOT, b"sub").unwrap();
        editor.commit().unwrap();
        check(&path);
    }
}

/// A file in as many pieces as it has blocks, so that its map has nodes of its own.
#[test]
fn files_in_many_pieces() {
    for kind in [1, 2, 12, 13] {
        println!("{}", KINDS[kind].0);
        let directory = tempfile::tempdir().unwrap();
        let path = image(&directory, &KINDS[kind], 32);
        let mut editor = edit(&path).unwrap();
        let file = editor.create(ROOT, b"file", New::File, &attributes(0o644), &[]).unwrap();
        let mut data = bytes(6 << 20, 4);
        for (number, block) in data.chunks_mut(4096).enumerate() {
            if number % 2 == 0 {
                block.fill(0);
            }
        }
        editor.set_content(file, &mut &data[..]).unwrap();
        editor.commit().unwrap();
        check(&path);
        assert_eq!(content(&edit(&path).unwrap(), "file"), data);
        editor.remove(ROOT, b"file").unwrap();
        editor.commit().unwrap();
        check(&path);
    }
}

#[test]
fn an_access_acl_follows_the_mode() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(&directory, &KINDS[1], 16);
    let mut editor = edit(&path).unwrap();
    let entry = |tag: u16, bits: u16, id: u32| {
        [&tag.to_le_bytes()[..], &bits.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    let none = u32::MAX;
    let acl = |owner, mask, others| {
        [
            2u32.to_le_bytes().to_vec(),
            entry(1, owner, none),
            entry(2, 6, 1000),
            entry(4, 4, none),
            entry(0x10, mask, none),
            entry(0x20, others, none),
        ]
        .concat()
    };
    let name = b"system.posix_acl_access".to_vec();
    let file =
        editor.create(ROOT, b"file", New::File, &attributes(0o664), &[(name.clone(), acl(6, 6, 4))]).unwrap();
    editor.set_attributes(file, &attributes(0o750)).unwrap();
    editor.commit().unwrap();
    check(&path);
    assert_eq!(read_from(part(&path))[&b"file"[..]].xattrs, [(name, acl(7, 5, 0))]);
}

/// The kernel mounts what was changed (needs root and loop devices), changes it itself, and leaves it to be changed again:
/// with its journal's checksums then.
#[test]
fn in_turns_with_the_kernel() {
    for kind in [0, 1, 2, 4, 13] {
        println!("{}", KINDS[kind].0);
        let directory = tempfile::tempdir().unwrap();
        let path = image(&directory, &KINDS[kind], 32);
        for round in 0..3u8 {
            let mut editor = edit(&path).unwrap();
            let sub =
                editor.create(ROOT, &[b'd', b'0' + round], New::Directory, &attributes(0o755), &[]).unwrap();
            for number in 0..200 {
                let name = format!("a file with a name {number}").into_bytes();
                let file = editor.create(sub, &name, New::File, &attributes(0o644), &[]).unwrap();
                editor.set_content(file, &mut &bytes(number * 50, round)[..]).unwrap();
            }
            editor.commit().unwrap();
            check(&path);
            with_mounted(&path, |place| {
                for number in 0..200 {
                    let file = place.join(format!("d{round}/a file with a name {number}"));
                    assert_eq!(std::fs::read(&file).unwrap(), bytes(number * 50, round));
                    if number % 2 == 0 {
                        std::fs::remove_file(&file).unwrap();
                    }
                }
                std::fs::write(place.join(format!("kernel {round}")), bytes(100_000, round)).unwrap();
            });
            check(&path);
            assert_eq!(content(&edit(&path).unwrap(), &format!("kernel {round}")), bytes(100_000, round));
        }
        let seen = run("debugfs", &["-R", "ls -p /d2", path.to_str().unwrap()]);
        assert_eq!(seen.lines().filter(|line| line.contains("a file")).count(), 100, "{seen}");
    }
}

pub(crate) fn with_mounted(image: &Path, look: impl FnOnce(&Path)) {
    look(vbd_testing::Mounted::new(image, "rw").path());
}
