//! Images of formats, served.

use std::process::Command;

use crate::harness::{MIB, Scratch, run};

fn qemu_img(scratch: &Scratch, arguments: &[&str]) -> String {
    run(Command::new("qemu-img").args(arguments).current_dir(scratch.path(""))).ok()
}

#[test]
fn a_qcow2_image_is_served_with_all_that_it_stands_on() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.path("bases")).unwrap();
    qemu_img(&scratch, &["create", "-q", "-f", "raw", "bases/base", "8M"]);
    run(Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write -P 5 1M 1M"])
        .arg(scratch.path("bases/base")))
    .ok();
    std::fs::create_dir(scratch.path("vm")).unwrap();
    qemu_img(
        &scratch,
        &["create", "-q", "-f", "qcow2", "-b", "../bases/base", "-F", "raw", "vm/disk", "16M"],
    );

    let outside = ["attach", "vm/disk", "--format", "qcow2", "--nbd", "unix:disk.sock"];
    scratch.vbd(outside).refused(1, &["outside", "--allow-dir"]);
    let server = scratch.serve(outside.into_iter().chain(["--allow-dir", "bases"]), 1);
    let list = scratch.vbd(["list", "--json"]).json();
    assert_eq!((&list[0]["format"], &list[0]["size"]), (&"qcow2".into(), &(16 * MIB).into()));
    scratch.qemu_io("disk", &["read -P 5 1M 1M", "write -P 6 1500k 1M", "write -z 12M 1M", "flush"]).ok();
    scratch.qemu_io("disk", &["read -P 6 1500k 1M", "read -P 5 1M 476k", "read -P 0 12M 1M"]).ok();
    // Nobody else writes to it, and nobody to what it stands on.
    let image = scratch.path("vm/disk");
    let other = run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write 0 1k"]).arg(&image));
    other.refused(1, &["lock"]);
    let below =
        run(Command::new("qemu-io").args(["-f", "raw", "-c", "write 0 1k"]).arg(scratch.path("bases/base")));
    below.refused(1, &["lock"]);
    let grown = scratch.vbd(["grow", "disk", "+16M"]).ok();
    assert!(grown.contains("16 MiB -> 32 MiB"), "{grown}");
    server.stop().ok();
    qemu_img(&scratch, &["check", "-q", "-f", "qcow2", "vm/disk"]);
    let compare = ["compare", "vm/disk", "vm/disk", "--format", "qcow2", "--second-format", "qcow2"];
    scratch.vbd(compare.into_iter().chain(["--allow-dir", "bases"])).ok();
}

#[test]
fn a_vhd_is_served_and_other_programs_images_are_read() {
    let scratch = Scratch::new();
    scratch.vbd(["create", "disk", "--format", "vhd", "--size", "8M"]).ok();
    let server = scratch.serve(["attach", "disk", "--format", "vhd", "--nbd", "unix:disk.sock"], 1);
    scratch.qemu_io("disk", &["write -P 3 2M 100k", "flush", "read -P 3 2M 100k"]).ok();
    server.stop().ok();
    qemu_img(&scratch, &["convert", "-f", "vpc", "-O", "vmdk", "disk", "other"]);
    let vmdk =
        ["attach", "other", "--format", "vmdk", "--read-only", "--name", "disk", "--nbd", "unix:disk.sock"];
    let server = scratch.serve(vmdk, 1);
    let uri = scratch.uri("disk");
    run(Command::new("qemu-io").args(["-r", "-f", "raw", "-c", "read -P 3 2M 100k", &uri])).ok();
    server.stop().ok();
}

#[test]
fn a_configuration_names_formats_and_directories() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.path("bases")).unwrap();
    std::fs::create_dir(scratch.path("vm")).unwrap();
    qemu_img(&scratch, &["create", "-q", "-f", "raw", "bases/base", "8M"]);
    qemu_img(
        &scratch,
        &["create", "-q", "-f", "qcow2", "-b", "../bases/base", "-F", "raw", "vm/disk", "16M"],
    );
    let write = |more: &str| {
        let text = format!(
            "nbd.listen = 'unix:disk.sock'\n[[disk]]\npath = 'vm/disk'\nformat = 'qcow2'\nvhost-user = false\n{more}"
        );
        std::fs::write(scratch.path("vm.toml"), text).unwrap();
    };
    write("");
    scratch.vbd(["up", "vm.toml"]).refused(1, &["allow-dirs"]);
    write("allow-dirs = ['bases']\n");
    let server = scratch.serve(["up", "vm.toml"], 1);
    scratch.qemu_io("disk", &["write -P 3 2M 100k", "flush"]).ok();
    server.stop().ok();
    qemu_img(&scratch, &["check", "-q", "-f", "qcow2", "vm/disk"]);
}

/// Without errors and leaks for QEMU.
fn sound(scratch: &Scratch) {
    let check = ["check", "-f", "qcow2", "disk"];
    let status =
        Command::new("qemu-img").args(check).current_dir(scratch.path("")).status().expect("qemu-img");
    assert!(status.success(), "{status}");
}

#[test]
fn snapshots_are_kept_while_a_disk_is_served_and_when_it_is_not() {
    let scratch = Scratch::new();
    scratch.vbd(["create", "disk", "--format", "qcow2", "--size", "16M"]).ok();
    let server = scratch.serve(["attach", "disk", "--format", "qcow2", "--nbd", "unix:disk.sock"], 1);
    scratch.qemu_io("disk", &["write -P 1 0 1M"]).ok();
    let made = scratch.vbd(["snapshot", "create", "disk", "before"]).ok();
    assert!(made.contains("\"before\""), "{made}");
    scratch.qemu_io("disk", &["write -P 2 0 1M", "read -P 2 0 1M"]).ok();
    scratch.vbd(["snapshot", "create", "disk", "before"]).refused(1, &["before"]);
    let list = scratch.vbd(["snapshot", "list", "disk", "--json"]).json();
    assert_eq!((&list[0]["name"], &list[0]["size"]), (&"before".into(), &(16 * MIB).into()));
    scratch.vbd(["snapshot", "apply", "disk", "after"]).refused(1, &["after"]);
    scratch.vbd(["snapshot", "apply", "disk", "before"]).ok();
    scratch.qemu_io("disk", &["read -P 1 0 1M"]).ok();
    server.stop().ok();
    sound(&scratch);
    assert!(qemu_img(&scratch, &["snapshot", "-l", "disk"]).contains("before"));

    let offline = |more: &[&str]| scratch.vbd(["snapshot"].iter().chain(more).chain(&["--format", "qcow2"]));
    offline(&["create", "disk", "second"]).ok();
    offline(&["delete", "disk", "before"]).ok();
    let list = offline(&["list", "disk"]).ok();
    assert!(list.contains("second") && !list.contains("before"), "{list}");
    sound(&scratch);
    scratch.sparse("raw", MIB);
    scratch.vbd(["snapshot", "create", "raw", "one"]).refused(1, &["no snapshots", "qcow2"]);
}
