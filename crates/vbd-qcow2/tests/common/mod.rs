//! QEMU's tools, and a directory that goes away.
#![allow(dead_code, reason = "each test file uses a part")]

use std::path::Path;
use std::process::{Command, Output};

/// A directory for a test.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Scratch(tempfile::tempdir().unwrap())
    }

    /// A name in it.
    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn dir(&self) -> &Path {
        self.0.path()
    }
}

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output();
    output.unwrap_or_else(|error| panic!("{program} (Debian package qemu-utils): {error}"))
}

/// Runs qemu-img, which must succeed, and gives what it printed.
pub(crate) fn qemu_img(arguments: &[&str]) -> String {
    let output = run("qemu-img", arguments);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Runs qemu-img and gives its exit code and all that it printed.
pub(crate) fn qemu_img_status(arguments: &[&str]) -> (i32, String) {
    let output = run("qemu-img", arguments);
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
}

/// Runs commands of qemu-io on a qcow2 image.
pub(crate) fn qemu_io(image: &str, commands: &[&str]) {
    let mut arguments = vec!["-f", "qcow2"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(image);
    let output = run("qemu-io", &arguments);
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    let failed = ["failed", "error", "Error"].iter().any(|word| text.contains(word));
    assert!(output.status.success() && !failed, "qemu-io {commands:?}: {text}");
}
