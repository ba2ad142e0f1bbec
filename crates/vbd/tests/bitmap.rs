//! `vbd bitmap` on qcow2 images at rest, beside qemu-img.

mod common;

use std::process::Command;

use common::refused;

fn vbd(arguments: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_vbd")).arg("bitmap").args(arguments).output().unwrap()
}

#[track_caller]
fn done(arguments: &[&str]) -> String {
    let output = vbd(arguments);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn bitmaps_of_a_qcow2_image_are_in_it() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    let name = image.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", name, "8M"]);
    let on = ["--format", "qcow2"];
    done(&["add", name, "since", "--granularity", "64K", on[0], on[1]]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 1M 128k", name]);
    done(&["add", name, "other", on[0], on[1]]);
    done(&["merge", name, "other", "since", on[0], on[1]]);
    done(&["disable", name, "since", on[0], on[1]]);
    let json: serde_json::Value =
        serde_json::from_str(&done(&["list", name, "--json", on[0], on[1]])).unwrap();
    let wanted = serde_json::json!([
        { "name": "since", "granularity": 65536, "enabled": false, "marked": 131_072 },
        { "name": "other", "granularity": 65536, "enabled": true, "marked": 131_072 },
    ]);
    assert_eq!(json, wanted);
    let info = run("qemu-img", &["info", "-f", "qcow2", name]);
    assert!(info.contains("name: since") && info.contains("name: other"), "{info}");
    done(&["clear", name, "other", on[0], on[1]]);
    done(&["remove", name, "since", on[0], on[1]]);
    let text = done(&["list", name, on[0], on[1]]);
    assert!(text.contains("other") && !text.contains("since"), "{text}");
    refused(&vbd(&["remove", name, "since", on[0], on[1]]), 1, &["image.qcow2", "no bitmap \"since\""]);
    run("qemu-img", &["check", "-q", "-f", "qcow2", name]);
}
