//! Images, and the programs that make them.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vbd_ext4::read::{Filesystem, Options, Part};

/// A program of the system, silent.
pub(crate) fn command(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    // Programs of the system's administrator are not on every user's path.
    command.env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Runs a program of the system and gives its standard output; anything but success is the test's failure.
#[track_caller]
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let mut command = command(program, arguments);
    let output = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn text(path: &(impl AsRef<OsStr> + ?Sized)) -> &str {
    path.as_ref().to_str().expect("paths of tests are text")
}

/// An image of `size` with what is in `tree`, made by mke2fs with these further arguments.
pub(crate) fn image(directory: &Path, tree: Option<&Path>, size: &str, arguments: &[&str]) -> PathBuf {
    let image = directory.join("image");
    let _ = std::fs::remove_file(&image);
    let mut all = vec!["-q", "-F"];
    all.extend(arguments);
    if let Some(tree) = tree {
        all.extend(["-d", text(tree)]);
    }
    all.extend([text(&image), size]);
    run("mke2fs", &all);
    image
}

/// The filesystem in an image.
pub(crate) fn open(image: &Path) -> vbd_ext4::read::Result<Filesystem> {
    let file = File::open(image).unwrap();
    let size = file.metadata().unwrap().len();
    Filesystem::open(Part::new(file, 0, size), Options::default())
}

/// Runs commands of debugfs that change an image.
pub(crate) fn debugfs(image: &Path, commands: &[&str]) {
    for command in commands {
        run("debugfs", &["-w", "-R", command, text(image)]);
    }
}
