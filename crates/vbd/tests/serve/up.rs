//! `vbd up` through the real command.

use std::fmt::Write;
use std::fs;
use std::process::Command;

use crate::harness::{MIB, Scratch, run};

#[test]
fn every_disk_has_its_line_and_stops_with_the_others() {
    let scratch = Scratch::new();
    for name in ["a", "b", "c"] {
        scratch.sparse(name, MIB);
    }
    let config = r#"
        nbd.listen = ["unix:nbd.sock"]
        [[disk]]
        path = "a"
        nbd = true
        vhost-user = false
        [[disk]]
        path = "b"
        nbd = false
        [[disk]]
        path = "c"
        name = "see"
        access = "r"
        vhost-user = "c.sock"
        nbd = true
    "#;
    fs::write(scratch.path("vm.toml"), config).unwrap();
    let server = scratch.serve(["up", "vm.toml"], 4);
    let ready = &server.ready;
    assert!(ready[0].starts_with("a: nbd unix:") && ready[0].ends_with("/nbd.sock name a"), "{ready:?}");
    assert!(ready[1].starts_with("b: vhost-user ") && ready[1].ends_with("run/vbd/b.sock"), "{ready:?}");
    assert!(ready[2].starts_with("see: vhost-user ") && ready[2].ends_with("/c.sock"), "{ready:?}");
    assert!(ready[3].ends_with("name see"), "{ready:?}");
    assert_eq!(scratch.vbd(["list", "--json"]).json().as_array().unwrap().len(), 3);

    // Without its last disk the process goes on: others may be added.
    for name in ["a", "b", "see"] {
        scratch.vbd(["detach", name]).ok();
    }
    assert_eq!(scratch.control_sockets().len(), 1);
    server.stop().ok();
    assert!(!scratch.path("nbd.sock").exists());
}

#[test]
fn all_that_is_wrong_is_told_and_nothing_is_left() {
    let scratch = Scratch::new();
    scratch.sparse("good", MIB);
    scratch.sparse("empty", 0);
    let disks = ["good", "missing", "empty"]
        .map(|name| format!("[[disk]]\npath = \"{name}\"\nvhost-user = \"{name}.sock\"\n"));
    fs::write(scratch.path("vm.toml"), disks.concat()).unwrap();
    let ended = scratch.vbd(["up", "vm.toml"]);
    ended.refused(1, &["missing", "empty"]);
    assert_eq!(ended.stderr.lines().count(), 2, "{}", ended.stderr);
    assert!(ended.stderr.lines().all(|line| line.starts_with("vbd: ")));
    assert_eq!(ended.stdout, "");
    assert!(!scratch.path("good.sock").exists());
    assert!(scratch.control_sockets().is_empty());
}

#[test]
fn a_mistake_in_a_configuration_has_its_place() {
    let scratch = Scratch::new();
    fs::write(scratch.path("vm.toml"), "[[disk]]\npath = \"disk\"\nquues = 4\n").unwrap();
    scratch.vbd(["up", "vm.toml"]).refused(1, &["vm.toml:3:1", "quues"]);
    scratch.vbd(["up", "none.toml"]).refused(1, &["none.toml"]);
}

#[test]
fn a_domain_file_is_served_as_it_is() {
    let scratch = Scratch::new();
    let disk = scratch.sparse("vm1disk", MIB);
    let config = format!(
        "# a domain\nname = 'vm1'\nmemory = 512\ndisk = [ 'file:{0},sda1,w',\n  ',hdc:cdrom,r' ]\n",
        disk.display()
    );
    fs::write(scratch.path("vm1.cfg"), config).unwrap();
    let server = scratch.serve(["up", "vm1.cfg"], 1);
    assert!(server.ready[0].contains(": vhost-user "), "{:?}", server.ready);
    let ended = server.stop();
    assert!(ended.stderr.contains("vm1.cfg:5:"), "the empty drive is told of: {}", ended.stderr);
    ended.ok();
}

#[test]
fn missing_images_are_made_as_the_configuration_says_and_kept() {
    let scratch = Scratch::new();
    fs::create_dir_all(scratch.path("tree/etc")).unwrap();
    fs::write(scratch.path("tree/etc/motd"), "hello from the tree\n").unwrap();
    let config = r#"
        [[disk]]
        path = "root"
        size = "32M"
        [disk.build]
        from = "tree"
        label = "made"
        [disk.tailor]
        hostname = "vm1"
        [[disk]]
        path = "data"
        size = "16M"
    "#;
    fs::write(scratch.path("vm.toml"), config).unwrap();
    scratch.serve(["up", "vm.toml"], 2).stop().ok();
    let root = fs::read(scratch.path("root")).unwrap();
    assert_eq!(root.len() as u64, 32 * MIB);
    assert_eq!(fs::metadata(scratch.path("data")).unwrap().len(), 16 * MIB);
    let cat = |path: &str| {
        let mut command = Command::new("debugfs");
        command
            .args(["-R", &format!("cat {path}")])
            .arg(scratch.path("root"))
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
        run(&mut command).ok()
    };
    assert_eq!(cat("/etc/motd"), "hello from the tree\n");
    assert_eq!(cat("/etc/hostname"), "vm1\n");
    // The second time they are there, and served as they are.
    let server = scratch.serve(["up", "vm.toml"], 2);
    assert!(!server.stop().stderr.contains("making"));
    assert!(fs::read(scratch.path("root")).unwrap() == root);
}

#[test]
fn the_limit_of_disks_holds_for_those_added_later() {
    let scratch = Scratch::new();
    scratch.sparse("a", MIB);
    let more = scratch.sparse("b", MIB);
    fs::write(scratch.path("vm.toml"), "limits.max-devices = 1\n[[disk]]\npath = \"a\"\nvhost-user = true\n")
        .unwrap();
    let _server = scratch.serve(["up", "vm.toml", "--control", "control.sock"], 1);
    let body = serde_json::json!({ "path": more, "vhost_user": scratch.path("b.sock") });
    let (status, answer) =
        crate::harness::http(&scratch.path("control.sock"), "POST", "/v1/disks", &body.to_string());
    assert_eq!(status, 429, "{answer}");
    assert!(answer.contains("max-devices"), "{answer}");
    assert!(!scratch.path("b.sock").exists());
}

#[test]
fn a_thousand_idle_disks_take_little_memory() {
    let scratch = Scratch::new();
    let mut config = String::new();
    for index in 0..1000 {
        scratch.sparse(&format!("d{index}"), MIB);
        writeln!(config, "[[disk]]\npath = \"d{index}\"\nvhost-user = true").unwrap();
    }
    fs::write(scratch.path("vm.toml"), config).unwrap();
    let server = scratch.serve(["up", "vm.toml"], 1000);
    let status = fs::read_to_string(format!("/proc/{}/status", server.id())).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let resident: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(resident <= 1000 * 128, "{resident} KiB for 1000 disks");
    assert_eq!(scratch.vbd(["list", "--json"]).json().as_array().unwrap().len(), 1000);
    server.stop().ok();
}
