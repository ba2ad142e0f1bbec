//! Quota files and projects: what e2fsck counts, what the kernel goes on with.

use std::collections::BTreeMap;
use std::path::Path;

use vbd_ext4::edit::{Attributes, EditError, New};
use vbd_ext4::format::ino::ROOT;
use vbd_ext4::format::quota::{Entry, Kind};
use vbd_ext4::read::{Filesystem, Options};

use crate::images::{KINDS, NOW, check, command, edit, image, part, run};
use crate::model::number;
use crate::operations::{attributes, with_mounted};

/// The kind with all quotas.
const ALL: usize = 14;

fn quotas(path: &Path, kind: Kind) -> BTreeMap<u32, (u64, u64)> {
    let filesystem = Filesystem::open(part(path), Options::default()).unwrap();
    let entries = filesystem.quotas(kind).unwrap();
    entries.iter().map(|entry| (entry.id.get(), (entry.space.get(), entry.inodes.get()))).collect()
}

fn of(uid: u32, gid: u32) -> Attributes {
    Attributes { mode: 0o644, uid, gid, atime: NOW, ctime: NOW, mtime: NOW, crtime: NOW }
}

/// Numbers of many owners: more leaves and nodes than one page has room for.
#[test]
fn many_owners() {
    for kind in [ALL, ALL + 1] {
        println!("{}", KINDS[kind].0);
        let directory = tempfile::tempdir().unwrap();
        let path = image(&directory, &KINDS[kind], 24);
        let mut editor = edit(&path).unwrap();
        let owner = |number: u32| number.wrapping_mul(0x0101_0173);
        for number in 0..300 {
            let name = format!("file {number}");
            let file =
                editor.create(ROOT, name.as_bytes(), New::File, &of(owner(number), number), &[]).unwrap();
            editor.set_content(file, &mut &vec![b'q'; number as usize * 40][..]).unwrap();
            if number % 100 == 50 {
                editor.commit().unwrap();
                check(&path);
            }
        }
        editor.commit().unwrap();
        check(&path);
        let users = quotas(&path, Kind::User);
        assert_eq!(users.len(), 300);
        let block = u64::from(editor.filesystem().block_size());
        assert_eq!(users[&owner(200)], ((200 * 40u64).div_ceil(block) * block, 1));
        // Half of them go, the others are given away.
        for number in 0..300u32 {
            let name = format!("file {number}");
            if number % 2 == 0 {
                editor.remove(ROOT, name.as_bytes()).unwrap();
            } else {
                let file = number_of(&editor, &name);
                editor.set_attributes(file, &of(5, 6)).unwrap();
            }
        }
        editor.commit().unwrap();
        check(&path);
        let users = quotas(&path, Kind::User);
        assert_eq!(users[&owner(200)], (0, 0));
        assert_eq!(users[&5].1, 150);
        assert_eq!(quotas(&path, Kind::Group)[&6].1, 150);
    }
}

fn number_of(editor: &vbd_ext4::edit::Editor, path: &str) -> u32 {
    number(editor.filesystem(), path.as_bytes())
}

/// Gives a directory a project that what comes into it is of.
fn project(path: &Path, directory: &str, id: u32) {
    let name = path.to_str().unwrap();
    run("debugfs", &["-w", "-R", &format!("sif {directory} projid {id}"), name]);
    run("debugfs", &["-w", "-R", &format!("sif {directory} flags 0x20080000"), name]);
    // debugfs counts nobody's usage.
    let output = command("e2fsck").args(["-fy", name]).output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
    check(path);
}

#[test]
fn projects_are_handed_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(&directory, &KINDS[ALL], 24);
    let mut editor = edit(&path).unwrap();
    let shared = editor.create(ROOT, b"shared", New::Directory, &attributes(0o755), &[]).unwrap();
    let other = editor.create(ROOT, b"other", New::File, &attributes(0o644), &[]).unwrap();
    editor.commit().unwrap();
    drop(editor);
    project(&path, "/shared", 4242);

    let mut editor = edit(&path).unwrap();
    let sub = editor.create(shared, b"sub", New::Directory, &attributes(0o755), &[]).unwrap();
    let file = editor.create(sub, b"file", New::File, &attributes(0o644), &[]).unwrap();
    editor.set_content(file, &mut &[1; 10_000][..]).unwrap();
    for result in [editor.link(sub, b"link", other), editor.rename((ROOT, b"other"), (shared, b"other"))] {
        assert!(matches!(result, Err(EditError::Kind { why, .. }) if why.contains("project")));
    }
    editor.rename((sub, b"file"), (shared, b"moved")).unwrap();
    editor.link(sub, b"link", file).unwrap();
    editor.commit().unwrap();
    check(&path);
    let block = u64::from(editor.filesystem().block_size());
    let projects = quotas(&path, Kind::Project);
    assert_eq!(projects[&4242], (2 * block + 10_000u64.div_ceil(block) * block, 3));
    let seen = run("debugfs", &["-R", "stat /shared/sub", path.to_str().unwrap()]);
    assert!(seen.contains("Project:  4242") && seen.contains("0x20080000"), "{seen}");
}

/// Whether the kernel here mounts filesystems with quotas; some are built without.
pub(crate) fn kernel_has_quotas(path: &Path) -> bool {
    let mounts = vbd_testing::Mounted::attempt(path, "rw").is_some();
    if !mounts {
        println!("the kernel here does not mount filesystems with quotas");
    }
    mounts
}

/// The kernel goes on with the counts that it finds, and the editor with the kernel's.
#[test]
fn the_kernel_counts_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(&directory, &KINDS[ALL], 24);
    if !kernel_has_quotas(&path) {
        return;
    }
    for round in 0..3u32 {
        let mut editor = edit(&path).unwrap();
        for number in 0..30u32 {
            let name = format!("{round} {number}");
            let file = editor.create(ROOT, name.as_bytes(), New::File, &of(number * 300, 70_000), &[]);
            editor.set_content(file.unwrap(), &mut &vec![2; number as usize * 1000][..]).unwrap();
        }
        editor.commit().unwrap();
        check(&path);
        with_mounted(&path, |place| {
            for number in 0..30u32 {
                let file = place.join(format!("{round} {number}"));
                match number % 3 {
                    0 => std::fs::remove_file(&file).unwrap(),
                    1 => std::os::unix::fs::chown(&file, Some(7_000_000 + number), Some(1)).unwrap(),
                    _ => std::fs::write(&file, vec![3; 50_000]).unwrap(),
                }
            }
        });
        check(&path);
    }
    assert_eq!(quotas(&path, Kind::User)[&7_000_001].1, 3);
}

/// What does not fit together is found by the checker, as by e2fsck; a damaged file is no harm to the editor.
#[test]
fn wrong_counts_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = image(&directory, &KINDS[ALL], 24);
    let mut editor = edit(&path).unwrap();
    editor.create(ROOT, b"file", New::File, &attributes(0o644), &[]).unwrap();
    editor.commit().unwrap();
    drop(editor);
    let whole = std::fs::read(&path).unwrap();
    let name = path.to_str().unwrap();
    let place = run("debugfs", &["-R", "bmap <3> 0", name]);
    let block: usize = place.trim().parse().unwrap();
    let size = usize::try_from(edit(&path).unwrap().filesystem().block_size()).unwrap();
    let found = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let output = command("e2fsck").args(["-fn", name]).output().unwrap();
        let report = vbd_ext4::check::check(part(&path), &mut |_, _| {}).unwrap();
        let named = report.problems.iter().any(|problem| problem.place == "the user quota file");
        (output.status.code() == Some(4), named)
    };
    assert_eq!(found(&whole), (false, false));
    // The bytes of the entry of 0 or 7, the tree's root, the file's beginning.
    let entry = |id: u32| -> usize {
        // Six pages, in blocks that follow each other.
        let pages = block * size..block * size + 6 * 1024;
        let wanted = Entry::new(id);
        (pages.start..pages.end)
            .step_by(4)
            .find(|at| {
                let here = &whole[*at..*at + 48];
                here[..4] == wanted.id.to_bytes() && here[4..24] == [0; 20] && here[24..32] != [0; 8]
            })
            .unwrap()
    };
    for at in [entry(7) + 24, entry(7) + 48] {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        assert_eq!(found(&bytes), (true, true), "byte {at}");
    }
    for at in [block * size, block * size + 1024] {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        std::fs::write(&path, &bytes).unwrap();
        let report = vbd_ext4::check::check(part(&path), &mut |_, _| {}).unwrap();
        assert!(!report.is_clean(), "byte {at}");
        let mut editor = edit(&path).unwrap();
        let result = editor.create(ROOT, b"new", New::File, &attributes(0o644), &[]);
        assert!(result.is_err() && editor.commit().is_err(), "byte {at}");
        assert!(std::fs::read(&path).unwrap() == bytes, "byte {at}: the image changed");
    }
}
