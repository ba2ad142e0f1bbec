//! An image on a filesystem without locks: refused, shared only where that is meant, and never taken for free.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use vbd_core::{Disk, ErrorKind};
use vbd_image::lease::{self, Lease, LeaseError, Mode, Options};
use vbd_image::raw::{Raw, RawOptions};

use crate::one_file::{Manner, OneFile};

/// What filesystems say that have none.
const NONE: [i32; 4] = [libc::ENOLCK, libc::EOPNOTSUPP, libc::ENOSYS, libc::EINVAL];

fn acquire(path: &Path, mode: Mode, options: Options) -> Result<Lease, LeaseError> {
    let file = File::options().read(true).write(mode == Mode::Write).open(path).expect("opened");
    Lease::acquire(file.as_fd(), path, mode, options)
}

#[test]
fn a_lease_is_refused_at_once_and_says_why() {
    for errno in NONE {
        let Some(image) = OneFile::mount(Manner::NoLocks(errno)) else { return };
        for mode in [Mode::Read, Mode::Write] {
            let began = Instant::now();
            let wait = Duration::from_secs(600);
            let error = acquire(image.path(), mode, Options { wait, override_: false }).expect_err("refused");
            assert!(began.elapsed() < wait / 2, "there is nothing to wait for");
            let text = error.to_string();
            let LeaseError::NoLocks { path, error } = error else { panic!("{errno}: {text}") };
            assert_eq!((path.as_path(), error.raw_os_error()), (image.path(), Some(errno)));
            assert!(text.contains("vm.img: its filesystem has no locks") && text.contains("(w!)"), "{text}");
        }
        assert_eq!(lease::holders(image.path()).expect("nobody is known"), []);
    }
}

#[test]
fn who_means_it_may_share_the_file() {
    for errno in NONE {
        let Some(image) = OneFile::mount(Manner::NoLocks(errno)) else { return };
        let share = Options { override_: true, ..Options::default() };
        let first = acquire(image.path(), Mode::Write, share).expect("at one's own risk");
        let second = acquire(image.path(), Mode::Write, share).expect("nothing could tell");
        assert!(acquire(image.path(), Mode::Write, Options::default()).is_err(), "and only who means it");
        drop((first, second));
    }
}

#[test]
fn a_disk_is_not_served() {
    let Some(image) = OneFile::mount(Manner::NoLocks(libc::ENOLCK)) else { return };
    let options = RawOptions::new(image.path());
    let error = Raw::new(options.clone()).open().err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("keep the file elsewhere"), "{error}");
    Raw::new(RawOptions { share: true, ..options }).open().expect("served with `w!`");
}

#[test]
fn locks_that_fail_are_another_thing() {
    let Some(image) = OneFile::mount(Manner::NoLocks(libc::EIO)) else { return };
    for override_ in [false, true] {
        let options = Options { override_, ..Options::default() };
        let error = acquire(image.path(), Mode::Write, options).expect_err("refused");
        assert!(matches!(error, LeaseError::Io { .. }), "{error}");
        assert!(error.to_string().contains("cannot take its lease"), "{error}");
    }
    assert!(lease::holders(image.path()).is_err(), "nobody knows is not the same as nobody");
    assert_eq!(Raw::new(RawOptions::new(image.path())).open().err().map(|e| e.kind()), Some(ErrorKind::Io));
}
