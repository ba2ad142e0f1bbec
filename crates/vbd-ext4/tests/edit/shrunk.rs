//! Filesystems made smaller in place.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use vbd_ext4::check;
use vbd_ext4::edit::{EditError, Editor, New};
use vbd_ext4::format::ino::ROOT;
use vbd_ext4::read::{Filesystem, Options, Padded};

use crate::images::{KINDS, NOW, check as e2fsck, command, edit, image, part, run};
use crate::model::{Tree, read_from};
use crate::operations::{attributes, with_mounted};
use crate::power::{Recorder, states};
use crate::quota::kernel_has_quotas;

const MIB: u64 = 1 << 20;

/// The same kind with its journal at its beginning, as our own writer has it; mke2fs puts it into the middle.
fn journal_first<'a>(kind: &(&'a str, &'a [&'a str])) -> (&'a str, Vec<&'a str>) {
    let own: &[&str] = if kind.1.is_empty() { &[] } else { &["-J", "location=0"] };
    (kind.0, [kind.1, own].concat())
}

/// An image with something of everything behind its middle: entries with blocks and inodes there.
fn fill(directory: &TempDir, kind: &(&str, &[&str]), megabytes: u64, files: usize) -> (PathBuf, Tree) {
    let path = image(directory, kind, megabytes);
    let mut editor = edit(&path).unwrap();
    let commit = |editor: &mut Editor| editor.commit().unwrap();
    // What comes first takes what is in front.
    let first = editor.create(ROOT, b"first", New::Directory, &attributes(0o755), &[]).unwrap();
    let ballast = editor.create(ROOT, b"ballast", New::File, &attributes(0o644), &[]).unwrap();
    editor.set_content(ballast, &mut &vec![b'x'; usize::try_from(megabytes).unwrap() << 19][..]).unwrap();
    let most = usize::try_from(editor.filesystem().usage().unwrap().free_inodes).unwrap();
    let front = most.saturating_sub(files * 2).min(1500);
    for number in 0..front {
        editor.create(first, format!("{number}").as_bytes(), New::Fifo, &attributes(0o600), &[]).unwrap();
        if number % 300 == 0 {
            commit(&mut editor);
        }
    }
    commit(&mut editor);
    let sub = editor.create(ROOT, b"sub", New::Directory, &attributes(0o755), &[]).unwrap();
    let deep = editor.create(sub, b"deep", New::Directory, &attributes(0o755), &[]).unwrap();
    let many = editor.create(deep, b"many", New::Directory, &attributes(0o755), &[]).unwrap();
    let mut xattrs = vec![(b"user.shared".to_vec(), vec![b'v'; 600]), (b"user.own".to_vec(), Vec::new())];
    for number in 0..files {
        let name = format!("a file with the number {number:0width$}", width = number % 60);
        let file = editor.create(many, name.as_bytes(), New::File, &attributes(0o644), &[]).unwrap();
        let mut data = vec![b'd'; number * 4096 % 70_000];
        data.chunks_mut(4096).step_by(2).for_each(|block| block.fill(0));
        editor.set_content(file, &mut &data[..]).unwrap();
        if number % 7 == 0 {
            xattrs[1].1 = vec![b'o'; number % 100];
            editor.set_xattrs(file, &xattrs).unwrap();
            editor.link(ROOT, format!("link {number}").as_bytes(), file).unwrap();
        }
        if number % 11 == 0 {
            let below =
                editor.create(deep, name.as_bytes(), New::Directory, &attributes(0o700), &[]).unwrap();
            editor.create(below, b"target", New::Symlink(&[b't'; 200]), &attributes(0o777), &[]).unwrap();
            editor.create(below, b"short", New::Symlink(b"t"), &attributes(0o777), &[]).unwrap();
            editor
                .create(below, b"null", New::Character { major: 1, minor: 3 }, &attributes(0o666), &[])
                .unwrap();
        }
        if number % 40 == 0 {
            commit(&mut editor);
        }
    }
    commit(&mut editor);
    editor.remove(ROOT, b"ballast").unwrap();
    for number in 0..front {
        editor.remove(first, format!("{number}").as_bytes()).unwrap();
    }
    commit(&mut editor);
    e2fsck(&path);
    (path.clone(), read_from(part(&path)))
}

fn blocks(path: &Path) -> u64 {
    Filesystem::open(part(path), Options::default()).unwrap().superblock().blocks()
}

/// Shrinks an image, and cuts its file.
fn shrink(path: &Path, size: u64) -> Result<u64, EditError> {
    let mut told = (0, 0);
    let shrunk = edit(path)?.shrink(size, &mut |done, all| {
        assert!(told.0 <= done && done <= all);
        told = (done, all);
        true
    })?;
    assert!(shrunk.after <= size && told.0 == told.1, "{shrunk:?}");
    File::options().write(true).open(path).unwrap().set_len(shrunk.after).unwrap();
    Ok(shrunk.after)
}

#[test]
fn filesystems_shrink() {
    for kind in KINDS.iter().filter(|(name, _)| *name != "meta_bg") {
        println!("{}", kind.0);
        let directory = tempfile::tempdir().unwrap();
        let (name, options) = journal_first(kind);
        let (path, tree) = fill(&directory, &(name, &options[..]), 80, 300);
        for size in [70 * MIB + 5000, 50 * MIB, 25 * MIB] {
            edit(&path).unwrap().may_shrink(size).unwrap();
            let after = shrink(&path, size).unwrap();
            assert!(after > size - size / 4, "{after} of {size}");
            e2fsck(&path);
            assert!(read_from(part(&path)) == tree, "the trees differ");
        }
        // It can be used, and grows again: by our own editor, by e2fsprogs.
        let mut editor = edit(&path).unwrap();
        editor.remove_all(ROOT, b"sub").unwrap();
        editor.commit().unwrap();
        let file = editor.create(ROOT, b"large", New::File, &attributes(0o644), &[]).unwrap();
        editor.set_content(file, &mut &vec![b'b'; 6 << 20][..]).unwrap();
        editor.commit().unwrap();
        drop(editor);
        e2fsck(&path);
        File::options().write(true).open(&path).unwrap().set_len(60 * MIB).unwrap();
        edit(&path).unwrap().grow(60 * MIB).unwrap();
        e2fsck(&path);
        File::options().write(true).open(&path).unwrap().set_len(90 * MIB).unwrap();
        run("resize2fs", &[path.to_str().unwrap()]);
        e2fsck(&path);
    }
}

#[test]
fn the_kernel_goes_on_with_a_smaller_one() {
    let directory = tempfile::tempdir().unwrap();
    for kind in [0, 2, 14] {
        let (name, options) = journal_first(&KINDS[kind]);
        let (path, tree) = fill(&directory, &(name, &options[..]), 60, 150);
        shrink(&path, 24 * MIB).unwrap();
        if kind == 14 && !kernel_has_quotas(&path) {
            continue;
        }
        with_mounted(&path, |place| {
            assert_eq!(std::fs::read_dir(place.join("sub/deep/many")).unwrap().count(), 150);
            for number in 0..300 {
                std::fs::write(place.join(format!("new {number}")), vec![b'n'; 9000]).unwrap();
            }
            std::fs::remove_dir_all(place.join("sub/deep/many")).unwrap();
        });
        e2fsck(&path);
        assert!(read_from(part(&path)).len() + 150 > tree.len());
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (name, options) = journal_first(&KINDS[2]);
    let (path, _) = fill(&directory, &(name, &options[..]), 60, 150);
    let mut editor = edit(&path).unwrap();
    let file = editor.create(ROOT, b"large", New::File, &attributes(0o644), &[]).unwrap();
    editor.set_content(file, &mut &vec![b'b'; 30 << 20][..]).unwrap();
    editor.commit().unwrap();
    drop(editor);
    let before = std::fs::read(&path).unwrap();
    for (size, wanted) in [(20 * MIB, "is full"), (2 * MIB, "journal"), (1000, "nothing would be left")] {
        let error = edit(&path).unwrap().may_shrink(size).unwrap_err();
        assert!(error.to_string().contains(wanted), "{size}: {error}");
        assert!(shrink(&path, size).is_err());
        assert!(std::fs::read(&path).unwrap() == before, "{size}: the image changed");
    }
    // Larger is nothing to do.
    assert_eq!(shrink(&path, 70 * MIB).unwrap(), 60 * MIB);
    let meta = KINDS.iter().find(|(name, _)| *name == "meta_bg").unwrap();
    let path = image(&directory, meta, 30);
    assert!(matches!(shrink(&path, 20 * MIB), Err(EditError::Refused(why)) if why.contains("meta_bg")));
    // The journal in the middle.
    let path = image(&directory, &KINDS[2], 60);
    assert!(matches!(shrink(&path, 20 * MIB), Err(EditError::Refused(why)) if why.contains("journal")));
    e2fsck(&path);
}

/// Somebody stops it: what was done is whole, and the next one goes on.
#[test]
fn interrupted_and_gone_on_with() {
    let directory = tempfile::tempdir().unwrap();
    let (name, options) = journal_first(&KINDS[2]);
    let (path, tree) = fill(&directory, &(name, &options[..]), 60, 150);
    let mut left = 0;
    loop {
        let mut turns = left;
        let result = edit(&path).unwrap().shrink(30 * MIB, &mut |_, _| {
            turns -= 1;
            turns >= 0
        });
        if result.is_ok() {
            break;
        }
        assert!(matches!(result, Err(EditError::Interrupted)));
        e2fsck(&path);
        assert!(read_from(part(&path)) == tree, "the trees differ");
        assert!(blocks(&path) * 1024 == 60 * MIB);
        left += 1;
    }
    assert!(left > 4, "{left} turns");
    e2fsck(&path);
    assert_eq!(blocks(&path) * 1024, 30 * MIB);
}

#[test]
fn the_power_is_cut_while_it_shrinks() {
    // The first crosses the end of a block of descriptors.
    let mut refusals = 0;
    for (kind, size, to) in [(8, 20, 14), (2, 18, 12), (14, 18, 12), (13, 18, 12)] {
        let (name, options) = journal_first(&KINDS[kind]);
        println!("{name}");
        let directory = tempfile::tempdir().unwrap();
        let (path, tree) = fill(&directory, &(name, &options[..]), size, 14);
        let before = std::fs::read(&path).unwrap();
        let recorder =
            Recorder { now: Arc::new(Mutex::new(before.clone())), events: Arc::new(Mutex::new(Vec::new())) };
        let mounting = kind != 14 || kernel_has_quotas(&path);
        let editor = Editor::open(recorder.clone(), NOW).unwrap();
        editor.shrink(to * MIB, &mut |_, _| true).unwrap();
        let copy = path.with_extension("cut");
        let count = |bytes: &[u8]| {
            let filesystem = Filesystem::open(Padded::new(bytes.to_vec(), 0), Options::default()).unwrap();
            filesystem.superblock().blocks()
        };
        let (old, new) = (count(&before), count(&recorder.now.lock().unwrap()));
        assert!(new < old);
        let (mut olds, mut news, mut turn, mut last) = (0, 0, 0, 0);
        let events = recorder.events.lock().unwrap();
        states(&before, &events, |number, bytes| {
            turn += 1;
            // Some of them, more at the end, where it becomes smaller.
            let each = if number + 40 < events.len() { 97 } else { 7 };
            if turn % each != 0 {
                return;
            }
            let found = count(bytes);
            assert!(found == old || found == new, "event {number}: {found}");
            if found == new {
                news += 1
            } else {
                olds += 1
            }
            let report = check::check(Padded::new(bytes.to_vec(), 0), &mut |_, _| {}).unwrap();
            assert!(report.is_clean(), "event {number}: {report:#?}");
            std::fs::write(&copy, bytes).unwrap();
            let output = command("e2fsck").args(["-fy", copy.to_str().unwrap()]).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(matches!(output.status.code(), Some(0 | 1)), "event {number}: {said}");
            let asked = said.lines().filter(|line| line.contains('?')).collect::<Vec<_>>();
            let harmless = |line: &&str| line.contains("journal") || line.contains("Free ");
            assert!(asked.iter().all(harmless), "event {number}: {said}");
            e2fsck(&copy);
            assert!(read_from(part(&copy)) == tree, "event {number}: the trees differ");
            // The same command goes on.
            std::fs::write(&copy, bytes).unwrap();
            shrink(&copy, to * MIB).unwrap();
            e2fsck(&copy);
            assert!(read_from(part(&copy)) == tree, "event {number}: the trees differ");
            if mounting && last != number {
                last = number;
                std::fs::write(&copy, bytes).unwrap();
                // Where blocks of descriptors became others, a kernel that replays that has the old numbers, and
                // refuses to go on with them, once.
                if kind == 8 && found == new && vbd_testing::Mounted::attempt(&copy, "rw").is_none() {
                    refusals += 1;
                }
                with_mounted(&copy, |place| {
                    std::fs::write(place.join("new"), vec![b'n'; 100_000]).unwrap();
                    std::fs::create_dir(place.join("new directory")).unwrap();
                });
                e2fsck(&copy);
            }
        });
        assert!(olds > 0 && news > 0, "{olds} times the old one, {news} times the new one");
    }
    println!("{refusals} refusals of the kernel");
}
