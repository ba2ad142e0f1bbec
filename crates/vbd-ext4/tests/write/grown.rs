//! What was written goes on living: the kernel fills it, resize2fs makes it grow.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use tempfile::NamedTempFile;
use vbd_ext4::write::Settings;

use crate::model::{self, Entry, Kind, settings};
use crate::mounted::{Mounted, compare};
use crate::tools::{check, run};

const MIB: u64 = 1 << 20;

fn sample() -> Entry {
    let many = (0..3000).map(|number| (format!("name {number}").into_bytes(), Entry::new(Kind::Fifo)));
    Entry::directory([
        (b"many".to_vec(), Entry::directory(many)),
        (b"file".to_vec(), Entry::file(5_000_000, 7).with_xattr("user.long", &[1; 500])),
        (b"link".to_vec(), Entry::new(Kind::Symlink(vec![b'l'; 100]))),
    ])
}

fn lengthen(image: &Path, size: u64) {
    File::options().write(true).open(image).unwrap().set_len(size).unwrap();
}

#[test]
fn it_grows_offline_and_shrinks() {
    let file = NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    model::write(file.path(), &settings(100 * MIB), &sample());
    lengthen(file.path(), 5000 * MIB);
    run("resize2fs", &[path]);
    check(file.path());
    run("resize2fs", &["-M", path]);
    check(file.path());
    let mounted = Mounted::new(file.path(), "ro,noload");
    compare(mounted.path(), &sample(), true);
}

#[test]
fn the_usual_tools_change_it() {
    let file = NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    model::write(file.path(), &settings(100 * MIB), &sample());
    // The UUID first: what has the old one's checksums keeps them, since their seed is in the superblock.
    for change in [
        &["-U", "random"][..],
        &["-O", "^has_journal"],
        &["-j"],
        &["-O", "^metadata_csum"],
        &["-O", "metadata_csum"],
        &["-O", "orphan_file"],
    ] {
        run("tune2fs", &[change, &[path]].concat());
        check(file.path());
    }
    // Rebuilds all directories; what ours were is as good.
    Command::new("e2fsck").args(["-fyD", path]).output().unwrap();
    check(file.path());
    let mounted = Mounted::new(file.path(), "rw");
    compare(mounted.path(), &sample(), true);
}

/// Blocks, attributes and directories change under load; then everything is there and e2fsck finds nothing.
#[test]
fn the_kernel_works_in_it() {
    let file = NamedTempFile::new().unwrap();
    let settings = Settings { inodes: Some(20_000), ..settings(300 * MIB) };
    model::write(file.path(), &settings, &sample());
    {
        let mounted = Mounted::new(file.path(), "rw");
        let root = mounted.path();
        std::thread::scope(|scope| {
            for worker in 0..4u32 {
                scope.spawn(move || work(root, worker));
            }
        });
        // More into and out of the big directory that was here before.
        for number in 0..5000 {
            fs::write(root.join(format!("many/more {number}")), b"x").unwrap();
        }
        for number in (0..3000).step_by(2) {
            fs::remove_file(root.join(format!("many/name {number}"))).unwrap();
        }
        assert_eq!(fs::read_dir(root.join("many")).unwrap().count(), 6500);
        assert_eq!(fs::read(root.join("file")).unwrap(), vec![7; 5_000_000]);
    }
    check(file.path());
}

/// Files are made, written in random places, cut, renamed and removed; the sequence is fixed.
fn work(root: &Path, worker: u32) {
    let directory = root.join(format!("worker {worker}"));
    fs::create_dir(&directory).unwrap();
    let mut state = worker + 1;
    let mut random = move |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % below
    };
    for _ in 0..1500 {
        let path = directory.join(format!("f{}", random(60)));
        match random(6) {
            0 | 1 => {
                let file = File::options().create(true).truncate(false).write(true).open(&path).unwrap();
                file.write_all_at(&vec![1; random(20_000) as usize], u64::from(random(3_000_000))).unwrap();
            }
            2 => drop(fs::remove_file(&path)),
            3 => drop(fs::rename(&path, directory.join(format!("f{}", random(60))))),
            4 => {
                if let Ok(file) = File::options().write(true).open(&path) {
                    file.set_len(u64::from(random(100_000))).unwrap();
                }
            }
            _ => {
                let value = vec![7; random(900) as usize];
                let flags = rustix::fs::XattrFlags::empty();
                let _absent = rustix::fs::setxattr(&path, "user.value", &value, flags);
            }
        }
    }
}
