//! Images of disks that are served: flattened, committed and compacted meanwhile.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Ended, MIB, Scratch, Server, run};

fn qemu_img(scratch: &Scratch, arguments: &[&str]) -> String {
    run(Command::new("qemu-img").args(arguments).current_dir(scratch.path(""))).ok()
}

fn qemu_io(scratch: &Scratch, file: &str, format: &str, commands: &[&str]) -> Ended {
    let mut command = Command::new("qemu-io");
    command.args(["-f", format]);
    commands.iter().for_each(|line| {
        command.args(["-c", line]);
    });
    run(command.arg(scratch.path(file)))
}

/// `disk`, 32 MiB, on `base`, 24 MiB: each of its megabytes holds its number.
fn overlay(scratch: &Scratch, base_format: &str) {
    qemu_img(scratch, &["create", "-q", "-f", base_format, "base", "24M"]);
    let lines: Vec<String> = (0..24).map(|at| format!("write -P {} {at}M 1M", at + 1)).collect();
    qemu_io(scratch, "base", base_format, &lines.iter().map(String::as_str).collect::<Vec<_>>()).ok();
    qemu_img(scratch, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", base_format, "disk", "32M"]);
}

fn serve(scratch: &Scratch) -> Server {
    scratch.serve(["attach", "disk", "--format", "qcow2", "--nbd", "unix:disk.sock"], 1)
}

/// What [`overlay`] holds but for its first megabyte and what is behind the base.
fn the_rest() -> Vec<String> {
    let mut lines: Vec<String> = (1..24).map(|at| format!("read -P {} {at}M 1M", at + 1)).collect();
    lines.push("read -P 0 25M 7M".to_owned());
    lines
}

fn read(scratch: &Scratch, more: &[&str]) {
    let rest = the_rest();
    let lines: Vec<&str> = rest.iter().map(String::as_str).chain(more.iter().copied()).collect();
    scratch.qemu_io("disk", &lines).ok();
}

/// Neither errors nor leaks.
fn sound(scratch: &Scratch, file: &str) {
    qemu_img(scratch, &["check", "-q", "-f", "qcow2", file]);
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

#[test]
fn a_served_image_is_flattened() {
    let scratch = Scratch::new();
    overlay(&scratch, "raw");
    let server = serve(&scratch);
    scratch.qemu_io("disk", &["write -P 77 0 1M", "write -P 78 24M 1M"]).ok();
    qemu_io(&scratch, "base", "raw", &["write 0 1k"]).refused(1, &["lock"]);
    let said = scratch.vbd(["flatten", "disk"]).ok();
    assert!(said.contains("stands on no other image now, 23 MiB copied"), "{said}");
    // The base is nobody's: it may become something else.
    qemu_io(&scratch, "base", "raw", &["write -P 99 0 24M"]).ok();
    read(&scratch, &["read -P 77 0 1M", "read -P 78 24M 1M"]);
    scratch.vbd(["flatten", "disk"]).refused(1, &["stands on no other image"]);
    let jobs = scratch.vbd(["snapshot", "create", "disk", "one"]);
    jobs.ok();
    server.stop().ok();
    sound(&scratch, "disk");
    assert!(!qemu_img(&scratch, &["info", "disk"]).contains("backing"));
    let server = serve(&scratch);
    read(&scratch, &["read -P 77 0 1M", "read -P 78 24M 1M"]);
    server.stop().ok();
}

#[test]
fn a_served_image_is_committed_again_and_again() {
    for base_format in ["raw", "qcow2"] {
        let scratch = Scratch::new();
        overlay(&scratch, base_format);
        let server = serve(&scratch);
        scratch.qemu_io("disk", &["write -P 77 0 1M", "write -P 78 24M 1M"]).ok();
        let said = scratch.vbd(["commit", "disk"]).ok();
        assert!(said.contains("2 MiB written to") && said.contains("base"), "{said}");
        read(&scratch, &["read -P 77 0 1M", "read -P 78 24M 1M"]);
        // It has nothing left, and the base has all.
        let said = scratch.vbd(["commit", "disk"]).ok();
        assert!(said.contains("0 B written to"), "{said}");
        scratch.qemu_io("disk", &["write -P 79 0 64k"]).ok();
        qemu_io(&scratch, "base", base_format, &["write 0 1k"]).refused(1, &["lock"]);
        read(&scratch, &["read -P 79 0 64k", "read -P 77 64k 960k", "read -P 78 24M 1M"]);
        // Somebody else reads it, and must not find other bytes from one moment to the next.
        let other = format!("{base_format}\n");
        qemu_img(
            &scratch,
            &["create", "-q", "-f", "qcow2", "-b", "base", "-F", other.trim(), "other", "32M"],
        );
        let reader = scratch
            .serve(["attach", "other", "--format", "qcow2", "--read-only", "--nbd", "unix:other.sock"], 1);
        scratch.vbd(["commit", "disk"]).refused(1, &["base", "in use by"]);
        read(&scratch, &["read -P 79 0 64k", "read -P 77 64k 960k", "read -P 78 24M 1M"]);
        reader.stop().ok();
        scratch.vbd(["commit", "disk"]).ok();
        server.stop().ok();
        sound(&scratch, "disk");
        if base_format == "qcow2" {
            sound(&scratch, "base");
        }
        qemu_img(&scratch, &["compare", "-q", "-f", "qcow2", "-F", base_format, "disk", "base"]);
        let taken = std::fs::metadata(scratch.path("disk")).unwrap().blocks() * 512;
        assert!(taken < MIB, "{taken} bytes for nothing");
    }
}

#[test]
fn an_image_is_compacted_served_or_not() {
    let scratch = Scratch::new();
    scratch.vbd(["create", "disk", "--format", "qcow2", "--size", "64M"]).ok();
    let server = serve(&scratch);
    scratch.qemu_io("disk", &["write -P 1 0 30M", "write -P 2 30M 2M", "discard 0 30M"]).ok();
    let said = scratch.vbd(["compact", "disk"]).ok();
    assert!(said.contains("the file's length"), "{said}");
    let after = length(&scratch.path("disk"));
    assert!(after < 3 * MIB, "{after}: {said}");
    scratch
        .qemu_io("disk", &["read -P 2 30M 2M", "read -P 0 0 30M", "write -P 3 40M 10M", "discard 40M 9M"])
        .ok();
    server.stop().ok();
    sound(&scratch, "disk");
    scratch.vbd(["compact", "disk", "--max-rate", "1M", "--file-only"]).refused(2, &["--max-rate"]);
    let done = scratch.vbd(["compact", "disk", "--format", "qcow2", "--file-only", "--json"]).json();
    assert_eq!(done["after"], length(&scratch.path("disk")));
    assert!(done["after"].as_u64().unwrap() < 4 * MIB, "{done}");
    sound(&scratch, "disk");
    let server = serve(&scratch);
    scratch.qemu_io("disk", &["read -P 2 30M 2M", "read -P 3 49M 1M", "read -P 0 40M 9M"]).ok();
    server.stop().ok();
}

/// Starts a verb that is watched by nobody.
fn begin(scratch: &Scratch, arguments: &[&str]) -> Child {
    let mut command = scratch.command();
    command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until a job has moved something.
fn under_way(scratch: &Scratch) {
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let socket = scratch.control_sockets().remove(0);
        let (_, jobs) = crate::harness::http(&socket, "GET", "/v1/jobs", "");
        let jobs: serde_json::Value = serde_json::from_str(&jobs).unwrap();
        let moves = |job: &serde_json::Value| job["state"] == "running" && job["done"].as_u64() > Some(0);
        if jobs.as_array().is_some_and(|jobs| jobs.iter().any(moves)) {
            return;
        }
        assert!(Instant::now() < until, "{jobs}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_job_that_is_stopped_or_killed_leaves_the_disk_whole() {
    for (verb, base_format) in [("flatten", "raw"), ("commit", "raw"), ("commit", "qcow2")] {
        let scratch = Scratch::new();
        overlay(&scratch, base_format);
        let server = serve(&scratch);
        scratch.qemu_io("disk", &["write -P 70 0 1M", "write -P 78 24M 1M"]).ok();
        let rest = the_rest();
        if verb == "commit" {
            // Something that takes time, with what it held before.
            let lines: Vec<String> = rest[..23].iter().map(|line| line.replace("read", "write")).collect();
            scratch.qemu_io("disk", &lines.iter().map(String::as_str).collect::<Vec<_>>()).ok();
        }
        let slow = [verb, "disk", "--max-rate", "2M"];
        let stopped = begin(&scratch, &slow);
        under_way(&scratch);
        kill_process(Pid::from_child(&stopped), Signal::INT).unwrap();
        let stopped = stopped.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&stopped.stderr).into_owned();
        assert!(!stopped.status.success() && said.contains("stopped"), "{said}");
        read(&scratch, &["read -P 70 0 1M", "read -P 78 24M 1M"]);

        let mut killed = begin(&scratch, &slow);
        under_way(&scratch);
        scratch.qemu_io("disk", &["write -P 77 0 1M"]).ok();
        server.kill();
        assert!(!killed.wait().unwrap().success());
        let server = serve(&scratch);
        read(&scratch, &["read -P 77 0 1M", "read -P 78 24M 1M"]);
        scratch.vbd([verb, "disk"]).ok();
        read(&scratch, &["read -P 77 0 1M", "read -P 78 24M 1M"]);
        server.stop().ok();
        // A killed process leaves leaks, at worst.
        let check = run(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(scratch.path("disk")));
        assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}");
        if verb == "commit" {
            qemu_img(&scratch, &["compare", "-q", "-f", "qcow2", "-F", base_format, "disk", "base"]);
        } else {
            assert!(!qemu_img(&scratch, &["info", "disk"]).contains("backing"));
        }
    }
}
