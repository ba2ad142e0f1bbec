//! Images to change, and what looks at them afterwards.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use vbd_ext4::edit::{Editor, Result, Timestamp};
use vbd_ext4::read::Part;
use vbd_ext4::write::{Directory, Layout, Settings, Writer};

/// The time of all changes.
pub(crate) const NOW: Timestamp = Timestamp { seconds: 1_780_000_000, nanoseconds: 5 };

pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    // Programs of the system's administrator are not on every user's path.
    command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
    command
}

/// Runs a program that must succeed; its output.
#[track_caller]
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output =
        command(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?} ended with {}:\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Neither e2fsck nor the checker here finds anything, and e2fsck says nothing but its five passes and the summary.
#[track_caller]
pub(crate) fn check(image: &Path) {
    let text = run("e2fsck", &["-fn", image.to_str().expect("a plain path")]);
    let words = text.lines().filter(|line| !line.starts_with("Pass ") && !line.is_empty()).count();
    assert_eq!(words, 1, "e2fsck has something to say:\n{text}");
    let report = vbd_ext4::check::check(part(image), &mut |_, _| {}).unwrap();
    assert!(report.is_clean(), "{report:#?}");
}

/// The kinds of filesystems that are changed: arguments for mke2fs, or none for one of our own writer.
pub(crate) const KINDS: [(&str, &[&str]); 16] = [
    ("ours", &[]),
    ("ext4", &["-t", "ext4"]),
    ("ext4 of 1 KiB", &["-t", "ext4", "-b", "1024"]),
    ("ext4 of 2 KiB in groups of 2048", &["-t", "ext4", "-b", "2048", "-g", "2048"]),
    ("no checksums", &["-t", "ext4", "-O", "^metadata_csum"]),
    ("checksums of descriptors", &["-t", "ext4", "-O", "^metadata_csum,uninit_bg", "-b", "1024"]),
    ("32 bits", &["-t", "ext4", "-O", "^64bit", "-b", "1024"]),
    ("meta_bg", &["-t", "ext4", "-O", "meta_bg,^resize_inode", "-b", "1024"]),
    ("no flex_bg", &["-t", "ext4", "-O", "^flex_bg", "-b", "1024", "-g", "1024"]),
    ("inodes of 128 bytes", &["-t", "ext4", "-I", "128", "-O", "^extra_isize"]),
    ("inodes of 1 KiB", &["-t", "ext4", "-I", "1024"]),
    ("no dir_index", &["-t", "ext4", "-O", "^dir_index", "-b", "1024"]),
    ("ext3", &["-t", "ext3"]),
    ("ext3 of 1 KiB", &["-t", "ext3", "-b", "1024"]),
    ("quotas", &["-t", "ext4", "-O", "quota,project", "-E", ALL_QUOTAS]),
    ("quotas of ext3 of 1 KiB", &["-t", "ext3", "-O", "quota", "-b", "1024"]),
];

const ALL_QUOTAS: &str = "quotatype=usrquota:grpquota:prjquota";

/// Makes an empty image of one of the kinds.
pub(crate) fn image(directory: &TempDir, kind: &(&str, &[&str]), megabytes: u64) -> PathBuf {
    let path = directory.path().join("image");
    let _ = std::fs::remove_file(&path);
    if kind.1.is_empty() {
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let time = Timestamp { seconds: 1_700_000_000, nanoseconds: 0 };
        let settings = Settings { time, ..Settings::new(megabytes << 20) };
        let mut writer = Writer::new(Layout::new(&settings).unwrap(), file, 0).unwrap();
        let attributes = vbd_ext4::format::Attributes {
            mode: 0o755,
            ctime: time,
            mtime: time,
            atime: time,
            crtime: time,
            uid: 0,
            gid: 0,
        };
        let root = vbd_ext4::format::ino::ROOT;
        writer
            .put_directory(root, &Directory { parent: root, attributes, xattrs: &[], entries: &[] })
            .unwrap();
        writer.finish(*b"a UUID of a test").unwrap();
    } else {
        let size = format!("{megabytes}M");
        let mut arguments = vec!["-q", "-F", "-E", "lazy_itable_init=1"];
        arguments.extend(kind.1);
        arguments.extend(["-N", "2048", path.to_str().unwrap(), &size]);
        run("mke2fs", &arguments);
    }
    path
}

pub(crate) fn part(path: &Path) -> Part {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let size = file.metadata().unwrap().len();
    Part::new(file, 0, size)
}

pub(crate) fn edit(path: &Path) -> Result<Editor> {
    Editor::open(part(path), NOW)
}
