//! `vbd xen` and what speaks of Xen elsewhere, on a machine without it: what is installed, and what is refused.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn vbd(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vbd")).args(arguments).output().unwrap()
}

fn install(root: &Path, more: &[&str]) -> Output {
    let mut arguments = vec!["xen", "install", "--root", root.to_str().unwrap()];
    arguments.extend(more);
    vbd(&arguments)
}

fn done(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn refused(output: &Output, code: i32, texts: &[&str]) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{message}");
    for text in texts {
        assert!(message.contains(text), "{text:?} is not in: {message}");
    }
}

#[test]
fn what_is_installed_is_said_and_goes_again() {
    let root = tempfile::tempdir().unwrap();
    let said = done(&install(root.path(), &[]));
    let files = [
        "etc/xen/scripts/block-vbd",
        "usr/lib/vbd/xen-device-model",
        "usr/lib/systemd/system/vbd-xen.service",
    ];
    for file in files {
        let path = root.path().join(file);
        assert!(said.contains(&format!("wrote {}", path.display())), "{said}");
        assert!(fs::read_to_string(path).unwrap().contains("/usr/bin"), "{file}");
    }
    assert!(!root.path().join("etc/xen/scripts/block").exists(), "only when --files asks for it");
    done(&install(root.path(), &[]));
    let said = done(&install(root.path(), &["--remove"]));
    assert_eq!(said.lines().filter(|line| line.starts_with("removed ")).count(), 3, "{said}");
    assert_eq!(done(&install(root.path(), &["--remove"])), "nothing to do\n");
}

#[test]
fn others_files_stay_unless_forced() {
    let root = tempfile::tempdir().unwrap();
    let scripts = root.path().join("etc/xen/scripts");
    fs::create_dir_all(&scripts).unwrap();
    fs::write(scripts.join("block-vbd"), "#!/bin/sh\n# another's\n").unwrap();
    refused(&install(root.path(), &[]), 1, &["block-vbd: is not vbd's", "--force"]);
    assert!(!root.path().join("usr").exists(), "all or nothing");
    done(&install(root.path(), &["--remove"]));
    assert!(scripts.join("block-vbd").exists());
    done(&install(root.path(), &["--force"]));
    assert!(fs::read_to_string(scripts.join("block-vbd")).unwrap().contains("hotplug-status"));
}

#[test]
fn xls_own_script_is_moved_and_put_back() {
    let root = tempfile::tempdir().unwrap();
    let scripts = root.path().join("etc/xen/scripts");
    fs::create_dir_all(&scripts).unwrap();
    fs::write(scripts.join("block"), "#!/bin/sh\n# Xen's\n").unwrap();
    for _ in 0..2 {
        done(&install(root.path(), &["--files"]));
        assert_eq!(fs::read_to_string(scripts.join("block.xen")).unwrap(), "#!/bin/sh\n# Xen's\n");
        assert!(fs::read_to_string(scripts.join("block")).unwrap().contains("block.xen"));
    }
    let unit = fs::read_to_string(root.path().join("usr/lib/systemd/system/vbd-xen.service")).unwrap();
    assert!(unit.contains("ExecStart=/usr/bin/vbd xen serve --files\n"), "{unit}");
    done(&install(root.path(), &["--remove"]));
    assert_eq!(fs::read_to_string(scripts.join("block")).unwrap(), "#!/bin/sh\n# Xen's\n");
    assert!(!scripts.join("block.xen").exists());
}

#[test]
fn without_xen_it_says_so() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("vm1disk");
    fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
    let control = root.path().join("control.sock");
    let control = control.to_str().unwrap();
    let file = file.to_str().unwrap();
    refused(&vbd(&["attach", file, "--xen", "vm1,xvdb", "--control", control]), 1, &["Xen"]);
    let domain = root.path().join("vm1.cfg");
    fs::write(&domain, format!("name = 'vm1'\ndisk = ['script=block-vbd,vdev=xvda,target={file}']\n"))
        .unwrap();
    refused(&vbd(&["up", domain.to_str().unwrap(), "--xen", "--control", control]), 1, &["Xen"]);
    refused(
        &vbd(&["xen", "status", "--control", root.path().to_str().unwrap()]),
        1,
        &["no process serves Xen's domains", "vbd xen serve"],
    );
}

#[test]
fn mistakes_are_usage_errors() {
    for place in ["vm1", ",xvda", "vm1,nonsense"] {
        refused(&vbd(&["attach", "vm1disk", "--xen", place]), 2, &["--xen"]);
    }
    refused(&vbd(&["xen", "device-model", "--", "-machine", "xenpv"]), 2, &["-xen-domid"]);
    let hvm = ["xen", "device-model", "--", "-xen-domid", "3", "-machine", "xenfv,suppress-vmdesc=on"];
    refused(&vbd(&hvm), 2, &["`xenfv`", "PV domains"]);
}
