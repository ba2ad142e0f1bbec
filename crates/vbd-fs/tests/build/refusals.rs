//! Sources that cannot be taken as they are: what is wrong is named, and nothing is left.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tar::{EntryType, Header};
use vbd_fs::{Error, ImageSize, Progress, Step};

use super::image;
use super::sample::noise;
use super::setting::{MIB, Scratch, as_ordinary_user, build, build_with, options};

/// An archive under construction.
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn add(mut self, path: &str, kind: u8, link: &str, data: &[u8]) -> Archive {
        let mut header = Header::new_ustar();
        let old = header.as_old_mut();
        old.name[..path.len()].copy_from_slice(path.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(EntryType::new(kind));
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

fn file(path: &str) -> Archive {
    Archive::default().add(path, b'0', "", b"data")
}

/// Builds from an archive's bytes; what it left behind is an error of its own.
fn from_bytes(bytes: &[u8]) -> Result<PathBuf, String> {
    let scratch = Scratch::new();
    let archive = scratch.path("a.tar");
    std::fs::write(&archive, bytes).unwrap();
    let outside = scratch.path("outside");
    std::fs::write(&outside, b"untouched").unwrap();
    let built = build(&scratch.path("disk"), &options(16 * MIB, &archive));
    assert_eq!(std::fs::read(&outside).unwrap(), b"untouched");
    match built {
        Ok(report) => Ok(report.path),
        Err(error) => {
            assert_eq!(scratch.names(), ["a.tar", "outside"], "{error}");
            let text = error.to_string();
            Err(text.replace(&archive.display().to_string(), "a.tar"))
        }
    }
}

#[test]
fn hostile_entries_are_named() {
    let record = |text: &str| format!("{} {text}\n", text.len() + 4).into_bytes();
    let cases = [
        (file("/etc/passwd"), r#"entry "/etc/passwd" is absolute"#),
        (file("a/../../outside"), r#"entry "a/../../outside" leads out of the tree by '..'"#),
        (file(".."), r#"entry ".." leads out"#),
        (Archive::default().add("x", b'1', "../outside", b""), r#"entry "x" links to a path that leads out"#),
        (
            Archive::default().add("x", b'1', "/etc/passwd", b""),
            r#"entry "x" links to a path that is absolute"#,
        ),
        (Archive::default().add("x", b'1', "missing", b""), r#"entry "x" cannot be made: No such file"#),
        (
            file("dir").add("dir/x", b'0', "", b""),
            r#"entry "dir/x" leads through dir, which is no directory"#,
        ),
        (
            Archive::default().add("out", b'2', "..", b"").add("out/outside", b'0', "", b"overwritten"),
            r#"entry "out/outside" leads through out, which is no directory"#,
        ),
        (
            Archive::default().add("out", b'2', "/", b"").add("x", b'1', "out/etc/passwd", b""),
            "leads through out, which is no directory",
        ),
        (Archive::default().add("x", b'V', "", b""), r#"entry "x" has the unknown type 'V'"#),
        (Archive::default().add("x", b'M', "", b"abc"), r#"entry "x" has 3 bytes of data, which its type"#),
        (Archive::default().add("x", b'2', "", b""), r#"entry "x" is a link with no target"#),
        (
            Archive::default().add("x", b'x', "", b"nonsense"),
            r#"entry "x" has an extended header that is damaged"#,
        ),
        (Archive::default().add("g", b'g', "", &record("path=/etc/x")), r#"sets "path" for all entries"#),
        (
            Archive::default().add("x", b'x', "", &record("path=../y")).add("x", b'0', "", b""),
            r#"entry "../y" leads"#,
        ),
        (
            Archive::default().add("x", b'x', "", &record("uid=99999999999")).add("x", b'0', "", b""),
            "has the owner",
        ),
        (Archive::default().add("", b'0', "", b""), "has no name"),
    ];
    for (archive, expected) in cases {
        let error = from_bytes(&archive.end()).expect_err(expected);
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

#[test]
fn a_large_directory_named_twice_and_a_replaced_entry_are_taken() {
    let archive =
        file("a/x").add("a/", b'5', "", b"").add("a/x", b'0', "", b"newer").add("a/y", b'1', "a/x", b"");
    let scratch = Scratch::new();
    let (path, disk) = (scratch.path("a.tar"), scratch.path("disk"));
    std::fs::write(&path, archive.end()).unwrap();
    build(&disk, &options(16 * MIB, &path)).unwrap();
    assert_eq!(
        (image::cat(&disk, "/a/x"), image::cat(&disk, "/a/y")),
        ("newer".to_owned(), "newer".to_owned())
    );
    assert_eq!(image::entry(&disk, "/a/x").links, 2);
}

#[test]
fn truncated_archives_are_refused_wherever_they_end() {
    let whole = file("a").add("b", b'0', "", &noise(1500)).add("c", b'2', "a", b"").end();
    let used = whole.len() - 1024;
    for length in [1, 100, 511, 512, 513, 1023, 1024, 1536, 2000, 3072, used - 512, used - 1, used] {
        let error = from_bytes(&whole[..length]).unwrap_err();
        assert!(error.contains("truncated"), "{length}: {error}");
    }
    let error = from_bytes(b"").unwrap_err();
    assert!(error.contains("a.tar is truncated: it is empty"), "{error}");
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(&whole).unwrap();
    let packed = encoder.finish().unwrap();
    for cut in [1, 8, 20] {
        let error = from_bytes(&packed[..packed.len() - cut]).unwrap_err();
        assert!(error.contains("a.tar"), "{error}");
    }
}

#[test]
fn what_is_no_tar_is_said_to_be_none() {
    for (bytes, expected) in [
        (noise(4096), "is no tar"),
        (b"BZh91AY&SY".repeat(100), "bzip2"),
        (b"hello".repeat(1000), "is no tar"),
        (vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3], "cannot be read"),
    ] {
        let error = from_bytes(&bytes).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    let mut damaged = file("a").end();
    damaged[3] ^= 1;
    assert!(from_bytes(&damaged).unwrap_err().contains("is no tar"));
}

#[test]
fn sources_that_are_not_there_or_make_no_sense() {
    let scratch = Scratch::new();
    let disk = scratch.path("disk");
    let missing = build(&disk, &options(16 * MIB, Path::new("/nonexistent/tree"))).unwrap_err();
    assert_eq!(
        missing.to_string(),
        "/nonexistent/tree: cannot be read: No such file or directory (os error 2)"
    );
    let tree = scratch.path("tree");
    std::fs::create_dir(&tree).unwrap();
    type Change = fn(&mut vbd_fs::BuildOptions);
    let cases: [(Change, &str); 9] = [
        (|o| o.size = ImageSize::Fixed(0), "the size is 0"),
        (|o| o.spec.label = Some("x".repeat(17)), "at most 16 bytes"),
        (|o| o.spec.uuid = Some("123".to_owned()), "is no UUID"),
        (|o| o.spec.reserved_percent = Some(51), "at most 50 percent"),
        (|o| o.spec.packages = vec!["vim".to_owned()], "are for debian:SUITE"),
        (|o| o.tailor.hostname = Some("a b".to_owned()), "is no host's name"),
        (|o| o.tailor.serial_console = Some("../x".to_owned()), "is no console's name"),
        (|o| o.spec.from = "-".parse().unwrap(), "it is empty"),
        (|o| o.size = ImageSize::Fixed(10_240), "10 KiB are too few for ext4"),
    ];
    for (change, expected) in cases {
        let mut options = options(16 * MIB, &tree);
        change(&mut options);
        let error = build(&disk, &options).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
    let huge = build(&disk, &options(u64::MAX >> 1, &tree)).unwrap_err().to_string();
    assert!(huge.contains("File too large") || huge.contains("mke2fs"), "{huge}");
    assert_eq!(scratch.names(), ["tree"]);
    let nowhere = build(&scratch.path("no/such/disk"), &options(16 * MIB, &tree)).unwrap_err();
    assert!(nowhere.to_string().contains("no/such"), "{nowhere}");
}

#[test]
fn what_may_not_be_read_is_named() {
    as_ordinary_user("refusals::what_may_not_be_read_is_named", || {
        for directory in [false, true] {
            let scratch = Scratch::new();
            let tree = scratch.path("tree");
            std::fs::create_dir_all(tree.join("etc")).unwrap();
            let secret = tree.join("etc/secret");
            if directory {
                std::fs::create_dir(&secret).unwrap()
            } else {
                std::fs::write(&secret, b"x").unwrap()
            }
            std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o000)).unwrap();
            let mut options = options(16 * MIB, &tree);
            let error = build(&scratch.path("disk"), &options).unwrap_err().to_string();
            assert!(error.starts_with(&secret.display().to_string()), "{error}");
            assert!(error.contains("cannot be read: Permission denied"), "{error}");
            assert_eq!(scratch.names(), ["tree"]);
            options.spec.exclude = vec!["etc/secret".to_owned()];
            build(&scratch.path("disk"), &options).unwrap();
            std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o700)).unwrap();
        }
    });
}

/// Changes the source whenever some of it was read.
struct Restless<F: FnMut()> {
    reading: bool,
    change: F,
}

impl<F: FnMut()> Progress for Restless<F> {
    fn step(&mut self, step: Step, _total: Option<u64>) {
        self.reading = step == Step::Read;
    }

    fn advance(&mut self, _bytes: u64) {
        if self.reading {
            (self.change)();
        }
    }
}

#[test]
fn a_file_that_changes_is_read_again_and_then_refused_unless_live() {
    if !super::setting::is_root() {
        // An ordinary user's tree is read by another process, which cannot be caught in the act.
        return;
    }
    let scratch = Scratch::new();
    let (tree, disk) = (scratch.path("tree"), scratch.path("disk"));
    std::fs::create_dir(&tree).unwrap();
    let log = tree.join("log");
    // Its last parts are read when the first one was placed.
    std::fs::write(&log, noise(24 << 20)).unwrap();
    let append = || {
        let mut log = std::fs::OpenOptions::new().append(true).open(&log).unwrap();
        log.write_all(b"more").unwrap();
    };
    // Once: the second reading is whole.
    let mut changes = 0;
    let once = || {
        changes += 1;
        if changes == 1 {
            append();
        }
    };
    build_with(&disk, &options(64 * MIB, &tree), &mut Restless { reading: false, change: once }).unwrap();
    assert!(changes > 1);
    assert!(image::debugfs(&disk, "cat /log") == std::fs::read(&log).unwrap());
    std::fs::remove_file(&disk).unwrap();
    // Always: an error, or a warning.
    let mut options = options(64 * MIB, &tree);
    let error = build_with(&disk, &options, &mut Restless { reading: false, change: append }).unwrap_err();
    assert!(matches!(&error, Error::Source { path, .. } if *path == log), "{error}");
    assert!(error.to_string().contains("changed while it was read"), "{error}");
    assert_eq!(scratch.names(), ["tree"]);
    options.spec.live = true;
    let report = build_with(&disk, &options, &mut Restless { reading: false, change: append }).unwrap();
    assert_eq!(report.warnings.len(), 1, "{:?}", report.warnings);
    image::check(&disk);
}

#[test]
fn an_entry_that_vanishes_is_named() {
    if !super::setting::is_root() {
        return;
    }
    let scratch = Scratch::new();
    let (tree, disk) = (scratch.path("tree"), scratch.path("disk"));
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("a"), noise(24 << 20)).unwrap();
    let gone = tree.join("b");
    std::fs::write(&gone, noise(1 << 20)).unwrap();
    let mut vanish = Restless { reading: false, change: || drop(std::fs::remove_file(&gone)) };
    let error = build_with(&disk, &options(64 * MIB, &tree), &mut vanish).unwrap_err();
    assert!(matches!(&error, Error::Source { path, .. } if *path == gone), "{error}");
}
