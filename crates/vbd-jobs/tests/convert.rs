//! Disks made anew as other files.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vbd_core::file::Fault;
use vbd_formats::{Format, ImageSpec, NewImage};
use vbd_jobs::{ConvertOptions, Error, Image, Leftover, Progress, Silent, compare, convert};
use vbd_ring::Op;
use vbd_testing::{Failing, with_failing};

const MIB: usize = 1 << 20;

/// A file with data and holes in it, of a size that is no multiple of anything but 512.
fn source(dir: &Path) -> (PathBuf, Vec<u8>) {
    let mut bytes = vec![0u8; 24 * MIB + 512];
    let noise = |bytes: &mut [u8], seed: u64| {
        let mut state = seed | 1;
        for byte in bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (state >> 56) as u8;
        }
    };
    for (start, len) in [(0, 512), (3 * MIB - 100, 4 * MIB), (12 * MIB, 1), (20 * MIB + 4096, 3 * MIB)] {
        noise(&mut bytes[start..start + len], start as u64);
    }
    let end = bytes.len();
    noise(&mut bytes[end - 512..], 7);
    let path = dir.join("source");
    let file = fs::File::create(&path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (number, piece) in bytes.chunks(4096).enumerate() {
        if piece.iter().any(|byte| *byte != 0) {
            std::os::unix::fs::FileExt::write_all_at(&file, piece, number as u64 * 4096).unwrap();
        }
    }
    (path, bytes)
}

fn to_qcow2() -> ConvertOptions {
    ConvertOptions::new(NewImage::new(Format::Qcow2, 0).unwrap())
}

fn to_raw() -> ConvertOptions {
    ConvertOptions::new(NewImage::new(Format::Raw, 0).unwrap())
}

fn leftovers(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(".vbd-")).collect()
}

/// Stops a job after so many bytes.
struct StopAfter(AtomicU64);

impl Progress for StopAfter {
    fn step(&self, _step: &str, _total: u64) {}

    fn advance(&self, bytes: u64) {
        let _ =
            self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| Some(left.saturating_sub(bytes)));
    }

    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }
}

#[test]
fn a_copy_is_equal_and_as_sparse() {
    let dir = tempfile::tempdir().unwrap();
    let (path, bytes) = source(dir.path());
    for (number, ordered) in [true, false].into_iter().enumerate() {
        let target = dir.path().join(format!("copy{number}"));
        let options = ConvertOptions { ordered, verify: true, ..to_raw() };
        let done = convert(&ImageSpec::new(&path, Format::Raw), &target, &options, &Silent).unwrap();
        assert_eq!(done.size, bytes.len() as u64);
        assert!(fs::read(&target).unwrap() == bytes);
        let blocks = |path: &Path| std::os::unix::fs::MetadataExt::blocks(&path.metadata().unwrap()) * 512;
        assert!(blocks(&target) <= blocks(&path) + 65536, "{} {}", blocks(&target), blocks(&path));
        assert_eq!(leftovers(dir.path()), [""; 0]);
    }
    let there = convert(&ImageSpec::new(&path, Format::Raw), &dir.path().join("copy0"), &to_raw(), &Silent);
    assert!(matches!(there, Err(Error::Create(_))));
    let mut options = to_raw();
    options.target.replace = true;
    convert(&ImageSpec::new(&path, Format::Raw), &dir.path().join("copy0"), &options, &Silent).unwrap();
}

#[test]
fn zeroes_that_take_room_take_none_in_the_copy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("source");
    fs::write(&path, vec![0; 8 * MIB]).unwrap();
    let target = dir.path().join("copy");
    let done = convert(&ImageSpec::new(&path, Format::Raw), &target, &to_raw(), &Silent).unwrap();
    assert_eq!(done.written, 0);
    assert_eq!(std::os::unix::fs::MetadataExt::blocks(&target.metadata().unwrap()), 0);
}

#[test]
fn a_job_that_was_stopped_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (path, bytes) = source(dir.path());
    let (spec, target) = (ImageSpec::new(&path, Format::Raw), dir.path().join("copy"));
    let one = ConvertOptions { threads: 1, ..to_raw() };
    let stopped = convert(&spec, &target, &one, &StopAfter(AtomicU64::new(8 << 20))).unwrap_err();
    assert!(stopped.to_string().contains("--resume"), "{stopped}");
    assert!(!target.exists());
    assert_eq!(leftovers(dir.path()).len(), 2);
    let refused = convert(&spec, &target, &one, &Silent).unwrap_err();
    assert!(refused.to_string().contains("--restart"), "{refused}");
    let resume = ConvertOptions { leftover: Leftover::Resume, ..one.clone() };
    let done = convert(&spec, &target, &resume, &Silent).unwrap();
    assert!(done.resumed_at >= 8 << 20, "{done:?}");
    assert!(fs::read(&target).unwrap() == bytes);
    assert_eq!(leftovers(dir.path()), [""; 0]);

    // A source that has changed meanwhile.
    let again = dir.path().join("again");
    convert(&spec, &again, &one, &StopAfter(AtomicU64::new(8 << 20))).unwrap_err();
    fs::File::options().write(true).open(&path).unwrap().set_len(25 << 20).unwrap();
    let refused = convert(&spec, &again, &resume, &Silent).unwrap_err();
    assert!(refused.to_string().contains("has changed"), "{refused}");
    let restart = ConvertOptions { leftover: Leftover::Restart, ..one };
    assert_eq!(convert(&spec, &again, &restart, &Silent).unwrap().resumed_at, 0);
    assert_eq!(fs::read(&again).unwrap()[..bytes.len()], bytes[..]);
}

#[test]
fn a_source_that_cannot_be_read_leaves_nothing_or_what_can_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = source(dir.path());
    let broken = Arc::new(AtomicBool::new(true));
    let inside = broken.clone();
    let faults = move |op: &Op| {
        let late = matches!(op, Op::Read { offset, .. } if *offset >= 20 << 20);
        (late && inside.load(Ordering::SeqCst)).then_some(Fault::Fail(libc::EIO))
    };
    let spec = ImageSpec { faults: Some(Arc::new(faults)), ..ImageSpec::new(&path, Format::Raw) };
    let target = dir.path().join("copy");
    let one = ConvertOptions { threads: 1, ..to_raw() };
    let error = convert(&spec, &target, &one, &Silent).unwrap_err();
    assert!(error.to_string().contains("--resume") && error.to_string().contains("read"), "{error}");
    broken.store(false, Ordering::SeqCst);
    let resume = ConvertOptions { leftover: Leftover::Resume, ..one };
    assert!(convert(&spec, &target, &resume, &Silent).unwrap().resumed_at > 0);
}

#[test]
fn the_first_difference_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let (path, bytes) = source(dir.path());
    let open = |path: &Path| Image::open(&ImageSpec::new(path, Format::Raw).read_only()).unwrap();
    let other = dir.path().join("other");
    let check = |changes: &[usize], expected: Option<u64>| {
        let mut changed = bytes.clone();
        for at in changes {
            changed[*at] ^= 0x10;
        }
        fs::write(&other, &changed).unwrap();
        for (one, two) in [(&path, &other), (&other, &path)] {
            let compared = compare(&open(one), &open(two), 8, &Silent).unwrap();
            assert_eq!(compared.difference.map(|difference| difference.offset), expected, "{changes:?}");
        }
    };
    check(&[], None);
    check(&[0], Some(0));
    check(&[bytes.len() - 1], Some(bytes.len() as u64 - 1));
    // In what is a hole of one of them, and two of which the first counts.
    check(&[22 * MIB, 17 * MIB + 77], Some((17 * MIB + 77) as u64));

    // Sizes: zeroes beyond the end are no difference, anything else is.
    let longer = dir.path().join("longer");
    fs::write(&longer, &bytes).unwrap();
    let file = fs::File::options().write(true).open(&longer).unwrap();
    file.set_len(40 << 20).unwrap();
    let compared = compare(&open(&path), &open(&longer), 4, &Silent).unwrap();
    assert_eq!((compared.difference, compared.sizes), (None, (bytes.len() as u64, 40 << 20)));
    std::os::unix::fs::FileExt::write_all_at(&file, &[1], (39 << 20) + 5).unwrap();
    let compared = compare(&open(&longer), &open(&path), 4, &Silent).unwrap();
    assert_eq!(compared.difference.map(|difference| difference.offset), Some((39 << 20) + 5));
}

/// Errors of the calls that write, and of those that make it durable: nothing under the name that the image is to have, and
/// nothing is left of what was not noted.
#[test]
fn a_target_that_cannot_be_written_is_no_image() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = source(dir.path());
    let spec = ImageSpec::new(&path, Format::Raw);
    let target = dir.path().join("new");
    let everything = 0..u64::MAX;
    // The header is written last; the tables before it lie behind the data.
    let failures: [(&str, Vec<Failing>); 6] = [
        ("writes", vec![Failing::writes(everything, libc::EIO)]),
        ("room", vec![Failing::writes(4 << 20..u64::MAX, libc::ENOSPC)]),
        ("the header", vec![Failing::writes(0..1, libc::EIO)]),
        ("flushes", Failing::flushes(libc::EIO).to_vec()),
        ("the length", vec![Failing::every(libc::SYS_ftruncate, libc::ENOSPC)]),
        ("reads", vec![Failing::every(libc::SYS_pread64, libc::EIO)]),
    ];
    for (what, failing) in failures {
        let qcow2 = to_qcow2();
        let mut packed = to_qcow2();
        packed.compress = true;
        if let vbd_formats::Kind::Qcow2(kind) = &mut packed.target.kind {
            kind.compression = vbd_qcow2::format::Compression::Zstd;
        }
        for (kind, options) in [("raw", to_raw()), ("qcow2", qcow2), ("compressed", packed)] {
            // A raw image has no header, but a first block.
            let options = ConvertOptions { leftover: Leftover::Restart, ..options };
            let error = with_failing(&failing, || convert(&spec, &target, &options, &Silent)).unwrap_err();
            assert!(!target.exists(), "{what}, {kind}");
            if error.to_string().contains("--resume") {
                // What was written before is noted, and is a beginning.
                let options = ConvertOptions { leftover: Leftover::Resume, verify: true, ..options };
                convert(&spec, &target, &options, &Silent).unwrap();
                fs::remove_file(&target).unwrap();
            }
            assert_eq!(leftovers(dir.path()), [""; 0], "{what}, {kind}: {error}");
        }
    }
    // Nothing of that has harmed what comes after it.
    let again = ConvertOptions { verify: true, leftover: Leftover::Restart, ..to_qcow2() };
    convert(&spec, &target, &again, &Silent).unwrap();
    assert_eq!(leftovers(dir.path()), [""; 0]);
}

/// Every kind of image, stopped somewhere, a damaged or foreign draft, and on to the end.
#[test]
fn an_image_that_was_stopped_goes_on_in_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let (path, bytes) = source(dir.path());
    let spec = ImageSpec::new(&path, Format::Raw);
    for (number, (cluster, compress, ordered)) in [
        (65536u64, false, true),
        (65536, true, true),
        (4096, true, false),
        (512, false, true),
        (2 << 20, false, true),
    ]
    .into_iter()
    .enumerate()
    {
        let target = dir.path().join(format!("new{number}"));
        let mut image = NewImage::new(Format::Qcow2, 0).unwrap();
        if let vbd_formats::Kind::Qcow2(options) = &mut image.kind {
            options.cluster_size = cluster;
        }
        let one = ConvertOptions { threads: 1, compress, ordered, ..ConvertOptions::new(image) };
        let mut options = one.clone();
        for stop in [5u64 << 20, 4 << 20, 9 << 20] {
            let stopped = convert(&spec, &target, &options, &StopAfter(AtomicU64::new(stop))).unwrap_err();
            assert!(stopped.to_string().contains("--resume"), "{stopped}");
            assert!(!target.exists());
            options = ConvertOptions { leftover: Leftover::Resume, threads: 4, ..one.clone() };
        }
        // Other options are another image.
        let other = ConvertOptions { compress: !compress, ..options.clone() };
        let refused = convert(&spec, &target, &other, &Silent).unwrap_err().to_string();
        assert!(refused.contains("--restart"), "{refused}");
        let done = convert(&spec, &target, &ConvertOptions { verify: true, ..options }, &Silent).unwrap();
        assert!(done.resumed_at >= 16 << 20, "{done:?}");
        assert_eq!(leftovers(dir.path()), [""; 0]);
        let seen = vbd_testing::qemu::check(&target);
        assert_eq!((seen.errors, seen.leaks), (0, 0), "{cluster}: {}", seen.said);
        let image = Image::open(&ImageSpec::new(&target, Format::Qcow2).read_only()).unwrap();
        let mut read = vec![0; bytes.len()];
        image.read_at(0, &mut read).unwrap();
        assert!(read == bytes, "{cluster}");
    }
}

#[test]
fn a_draft_that_is_not_what_its_journal_says_is_no_start() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _) = source(dir.path());
    let (spec, target) = (ImageSpec::new(&path, Format::Raw), dir.path().join("new"));
    let one = ConvertOptions { threads: 1, ..to_qcow2() };
    convert(&spec, &target, &one, &StopAfter(AtomicU64::new(8 << 20))).unwrap_err();
    fs::write(dir.path().join(".vbd-new.convert"), vec![0xff; 1 << 20]).unwrap();
    let resume = ConvertOptions { leftover: Leftover::Resume, ..one.clone() };
    let refused = convert(&spec, &target, &resume, &Silent).unwrap_err().to_string();
    assert!(refused.contains("begin anew"), "{refused}");
    let restart = ConvertOptions { leftover: Leftover::Restart, verify: true, ..one };
    convert(&spec, &target, &restart, &Silent).unwrap();
}

/// What is not to be durable is as whole, and what is left of it when it was stopped is nothing.
#[test]
fn without_durability_nothing_can_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let (path, bytes) = source(dir.path());
    let (spec, target) = (ImageSpec::new(&path, Format::Raw), dir.path().join("new"));
    let quick = ConvertOptions { threads: 1, durable: false, ..to_raw() };
    let stopped = convert(&spec, &target, &quick, &StopAfter(AtomicU64::new(8 << 20))).unwrap_err();
    assert!(matches!(stopped, Error::Cancelled), "{stopped}");
    assert_eq!(leftovers(dir.path()), [""; 0]);
    // Nor does it need what makes things durable.
    with_failing(&Failing::flushes(libc::EIO), || convert(&spec, &target, &quick, &Silent)).unwrap();
    assert!(fs::read(&target).unwrap() == bytes);
}
