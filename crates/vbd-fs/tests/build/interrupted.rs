//! Builds that are stopped, or killed, and what they leave.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use vbd_fs::{Cancel, Error, Filesystem, Progress, Source, Step};
use vbd_image::create::CreateError;

use super::sample::noise;
use super::setting::{MIB, Scratch, as_ordinary_user, build, build_with, is_root, names, options};

/// Asks to stop when a step begins, or some bytes into it.
struct StopAt {
    step: Step,
    now: bool,
    cancel: Cancel,
}

impl Progress for StopAt {
    fn step(&mut self, step: Step, _total: Option<u64>) {
        self.now = step == self.step;
        if self.now && step != Step::Read {
            self.cancel.request();
        }
    }

    fn advance(&mut self, _bytes: u64) {
        if self.now {
            self.cancel.request();
        }
    }

    fn cancel(&self) -> Cancel {
        self.cancel.clone()
    }
}

fn stopped_anywhere() {
    for filesystem in [Filesystem::Ext4, Filesystem::Ext2] {
        stopped(filesystem);
    }
}

fn stopped(filesystem: Filesystem) {
    for step in [Step::Measure, Step::Read, Step::Tailor, Step::Write, Step::Sync] {
        let scratch = Scratch::new();
        let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
        std::fs::create_dir(&tree).unwrap();
        for i in 0..8 {
            std::fs::write(tree.join(i.to_string()), noise(4 << 20)).unwrap();
        }
        let mut progress = StopAt { step, now: false, cancel: Cancel::new() };
        let mut options = options(64 * MIB, &tree);
        options.spec.filesystem = filesystem;
        let error = build_with(&file, &options, &mut progress);
        assert!(matches!(error, Err(Error::Interrupted)), "{step:?}: {error:?}");
        assert_eq!(scratch.names(), ["tree"], "{step:?}");
    }
}

#[test]
fn a_build_stopped_anywhere_leaves_nothing() {
    stopped_anywhere();
}

#[test]
fn an_ordinary_users_build_stopped_anywhere_leaves_nothing() {
    as_ordinary_user(
        "interrupted::an_ordinary_users_build_stopped_anywhere_leaves_nothing",
        stopped_anywhere,
    );
}

/// Not a test: a build in a process of its own, from a tree or from a pipe.
#[test]
fn build_elsewhere() {
    if let (Some(file), Some(from)) = (std::env::var_os("VBD_TEST_FILE"), std::env::var_os("VBD_TEST_FROM")) {
        let mut options = options(64 * MIB, Path::new(&from));
        if from == "-" {
            options.spec.from = Source::Stdin;
        }
        if let Some(filesystem) = std::env::var_os("VBD_TEST_FILESYSTEM") {
            options.spec.filesystem = filesystem.to_str().unwrap().parse().unwrap();
        }
        build(Path::new(&file), &options).unwrap();
    }
}

/// Runs that, with what it needs to hold made beside the image.
fn elsewhere(file: &Path, from: &Path, filesystem: Filesystem) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "interrupted::build_elsewhere", "--nocapture"]).env_remove("TMPDIR");
    command.env("VBD_TEST_FILE", file).env("VBD_TEST_FROM", from).stdout(Stdio::null());
    command.env("VBD_TEST_FILESYSTEM", filesystem.name());
    command
}

/// A build that waits in the middle of an archive.
fn reading(file: &Path, filesystem: Filesystem) -> (Child, ChildStdin) {
    let mut child = elsewhere(file, Path::new("-"), filesystem).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_path("file").unwrap();
    header.set_size(1 << 30);
    header.set_mode(0o644);
    header.set_cksum();
    stdin.write_all(header.as_bytes()).unwrap();
    // More than a pipe holds: when it is written, it was read.
    stdin.write_all(&noise(2 << 20)).unwrap();
    (child, stdin)
}

#[test]
fn a_killed_build_leaves_nothing() {
    let scratch = Scratch::new();
    let (mut child, stdin) = reading(&scratch.path("disk"), Filesystem::Ext4);
    assert_eq!(scratch.names(), [""; 0]);
    child.kill().unwrap();
    child.wait().unwrap();
    drop(stdin);
    assert_eq!(scratch.names(), [""; 0]);
}

fn killed() {
    let scratch = Scratch::new();
    let file = scratch.path("disk");
    let (mut child, stdin) = reading(&file, Filesystem::Ext2);
    let staged = || {
        let stage = scratch.names().into_iter().find(|name| name.starts_with(".vbd-stage-"));
        stage.is_some_and(|name| scratch.path(&name).join("tree/file").exists())
    };
    wait_until("it reads", staged);
    child.kill().unwrap();
    child.wait().unwrap();
    if is_root() {
        // Nobody was left to clean up: the next build does.
        let tree = scratch.path("tree");
        std::fs::create_dir(&tree).unwrap();
        assert!(elsewhere(&file, &tree, Filesystem::Ext2).status().unwrap().success());
        assert_eq!(scratch.names(), ["disk", "tree"]);
    } else {
        wait_until("the stage cleans up", || scratch.names().is_empty());
    }
    drop(stdin);
}

fn wait_until(what: &str, is: impl Fn() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_killed_build_with_a_stage_leaves_no_image() {
    killed();
}

#[test]
fn an_ordinary_users_killed_build_leaves_nothing() {
    as_ordinary_user("interrupted::an_ordinary_users_killed_build_leaves_nothing", killed);
}

#[test]
fn a_stage_that_another_build_uses_is_not_removed() {
    let scratch = Scratch::new();
    let (tree, theirs) = (scratch.path("tree"), scratch.path(".vbd-stage-theirs"));
    std::fs::create_dir(&tree).unwrap();
    std::fs::create_dir(&theirs).unwrap();
    let lock = std::fs::File::open(&theirs).unwrap();
    lock.lock().unwrap();
    let mut options = options(16 * MIB, &tree);
    options.spec.filesystem = Filesystem::Ext2;
    build(&scratch.path("disk"), &options).unwrap();
    assert_eq!(names(&theirs), Vec::<String>::new());
}

#[test]
fn an_image_is_replaced_by_force_alone_and_as_a_whole() {
    let scratch = Scratch::new();
    let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(&file, b"precious").unwrap();
    let mut options = options(16 * MIB, &tree);
    assert!(matches!(build(&file, &options), Err(Error::Image(CreateError::Exists(path))) if path == file));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    options.force = true;
    let mut old = std::fs::File::open(&file).unwrap();
    std::os::unix::fs::symlink("disk", scratch.path("link")).unwrap();
    build(&scratch.path("link"), &options).unwrap();
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 16 * MIB);
    let mut text = String::new();
    old.read_to_string(&mut text).unwrap();
    assert_eq!(text, "precious");
    assert_eq!(scratch.names(), ["disk", "link", "tree"]);
    let error = build(&scratch.path("tree"), &options).unwrap_err();
    assert!(error.to_string().contains("is a directory, which"), "{error}");
}

/// Makes a file of the final name while the build is on its way.
struct Rival<'a>(&'a Path);

impl Progress for Rival<'_> {
    fn step(&mut self, step: Step, _total: Option<u64>) {
        if step == Step::Write {
            std::fs::write(self.0, b"first").unwrap();
        }
    }
}

#[test]
fn a_file_that_appears_during_a_build_stays() {
    let scratch = Scratch::new();
    let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
    std::fs::create_dir(&tree).unwrap();
    let result = build_with(&file, &options(16 * MIB, &tree), &mut Rival(&file));
    assert!(matches!(result, Err(Error::Image(CreateError::Exists(_)))), "{result:?}");
    assert_eq!(std::fs::read(&file).unwrap(), b"first");
    assert_eq!(scratch.names(), ["disk", "tree"]);
}
