//! What the tests of single verbs share.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::fs;
use std::path::Path;
use std::process::Output;

/// Expect that exit code, each of these texts in the message, and nothing on standard output.
#[track_caller]
pub(crate) fn refused(output: &Output, code: i32, texts: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{message}");
    for text in texts {
        assert!(message.contains(text), "{text:?} is not in: {message}");
    }
    assert!(output.stdout.is_empty(), "what failed has nothing to say to a program");
}

/// What is in a directory, sorted.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
