//! `vbd map`: table, picture and JSON of where a file holds data.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

fn map(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vbd"));
    command.arg("map").args(arguments).current_dir(directory).output().unwrap()
}

fn text(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A file of 4 MiB with 1 MiB of data at 1 MiB.
fn file(directory: &Path) {
    let file = File::create(directory.join("vm")).unwrap();
    file.set_len(4 << 20).unwrap();
    file.write_all_at(&vec![1; 1 << 20], 1 << 20).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_table_and_a_picture() {
    let directory = tempfile::tempdir().unwrap();
    file(directory.path());
    let text = text(map(directory.path(), &["vm"]));
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let lines: Vec<_> = text.lines().map(words).collect();
    assert_eq!(lines[0], ["START", "LENGTH", "STATE"]);
    assert_eq!(lines[1], ["0", "1048576", "hole"]);
    assert_eq!(lines[2], ["1048576", "1048576", "data"]);
    assert_eq!(lines[3], ["2097152", "2097152", "hole"]);
    assert!(text.contains("4 MiB: data 1 MiB, holes 3 MiB; allocated 1 MiB\n"), "{text}");
    assert!(text.contains("        0 B ····") && text.contains("████"), "{text}");
    assert!(!text.contains('\x1b'), "no colours without a terminal");
}

#[test]
fn the_picture_alone() {
    let directory = tempfile::tempdir().unwrap();
    file(directory.path());
    let text = text(map(directory.path(), &["--picture", "vm"]));
    assert!(!text.contains("START") && text.lines().count() == 5, "{text}");
}

#[test]
fn json_for_programs() {
    let directory = tempfile::tempdir().unwrap();
    file(directory.path());
    let map: Value = serde_json::from_str(&text(map(directory.path(), &["--json", "vm"]))).unwrap();
    assert_eq!(map["size"], 4 << 20);
    assert_eq!(
        map["extents"],
        json!([
            {"start": 0, "length": 1 << 20, "state": "hole", "shared": false},
            {"start": 1 << 20, "length": 1 << 20, "state": "data", "shared": false},
            {"start": 2 << 20, "length": 2 << 20, "state": "hole", "shared": false},
        ])
    );
}

/// qemu-img knows the same holes.
#[test]
fn as_qemu_img_maps_it() {
    let directory = tempfile::tempdir().unwrap();
    file(directory.path());
    let ours: Value = serde_json::from_str(&text(map(directory.path(), &["--json", "vm"]))).unwrap();
    let mut qemu_img = Command::new("qemu-img");
    qemu_img.args(["map", "-f", "raw", "--output=json", "vm"]).current_dir(directory.path());
    let output = qemu_img.output().unwrap();
    let theirs: Value = serde_json::from_slice(&output.stdout).unwrap();
    let ours =
        ours["extents"].as_array().unwrap().iter().map(|e| (&e["start"], &e["length"], e["state"] == "data"));
    let theirs = theirs.as_array().unwrap().iter().map(|e| (&e["start"], &e["length"], e["data"] == true));
    assert_eq!(ours.collect::<Vec<_>>(), theirs.collect::<Vec<_>>());
}

#[test]
fn an_empty_file_and_none() {
    let directory = tempfile::tempdir().unwrap();
    File::create(directory.path().join("empty")).unwrap();
    assert!(text(map(directory.path(), &["empty"])).ends_with("0 B: data 0 B; allocated 0 B\n"));
    let message = |name| String::from_utf8(map(directory.path(), &[name]).stderr).unwrap();
    assert!(message("missing").contains("missing: there is no such file"));
    assert!(message(".").contains("is a directory"));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let directory = tempfile::tempdir().unwrap();
    file(directory.path());
    let mut command = Command::new(env!("CARGO_BIN_EXE_vbd"));
    command.args(["map", "vm"]).current_dir(directory.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
}
