//! The programs that filesystems are held against.

use std::path::Path;
use std::process::Command;

/// Runs a program that must succeed; its output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?} ended with {}:\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// e2fsck finds nothing, and says nothing but its five passes and the summary.
pub(crate) fn check(image: &Path) {
    let text = run("e2fsck", &["-fn", image.to_str().expect("a plain path")]);
    let words = text.lines().filter(|line| !line.starts_with("Pass ") && !line.is_empty()).count();
    assert_eq!(words, 1, "e2fsck has something to say:\n{text}");
}
