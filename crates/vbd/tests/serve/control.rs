//! The control socket and the verbs that use it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use crate::harness::{MIB, Scratch, http, run};

#[test]
fn nothing_is_served() {
    let scratch = Scratch::new();
    let list = scratch.vbd(["list"]);
    assert!(list.stderr.contains("no disk is served"));
    list.ok();
    assert_eq!(scratch.vbd(["list", "--json"]).json(), serde_json::json!([]));
    assert_eq!(scratch.vbd(["stat", "--json"]).json(), serde_json::json!([]));
    scratch.vbd(["stat", "vm1"]).refused(1, &["`vm1`", "vbd list"]);
    scratch.vbd(["detach", "vm1"]).refused(1, &["`vm1`", "vbd list"]);
    scratch.vbd(["grow", "vm1", "--size", "1G"]).refused(1, &["vm1", "no such file", "vbd list"]);
    scratch.vbd(["grow", "./vm1", "--size", "1G"]).refused(1, &["./vm1", "no such file"]);
    assert!(!scratch.path("vm1").exists());
}

#[test]
fn list_shows_the_disks_of_every_process() {
    let scratch = Scratch::new();
    let first = scratch.nbd("first", &[]);
    let second = scratch.nbd("second disk", &["--read-only", "--name", "sécond %2F disk"]);
    let list = scratch.vbd(["list", "--json"]).json();
    let list = list.as_array().unwrap();
    assert_eq!(list.len(), 2);
    let by_pid = |pid: u32| list.iter().find(|disk| disk["pid"] == pid).unwrap();
    let disk = by_pid(first.id());
    assert_eq!(disk["name"], "first");
    assert_eq!(disk["size"], 16 * MIB);
    assert_eq!(disk["read_only"], false);
    assert_eq!(disk["path"], scratch.path("first").to_str().unwrap());
    assert_eq!(disk["front_ends"][0]["kind"], "nbd");
    assert_eq!(disk["front_ends"][0]["export"], "first");
    assert_eq!(disk["front_ends"][0]["clients"], 0);
    assert_eq!(by_pid(second.id())["read_only"], true);

    let text = scratch.vbd(["list"]).ok();
    assert!(text.starts_with("NAME") && text.contains("16 MiB") && text.contains("second disk"), "{text}");
    // A name that a path cannot hold as it is.
    let stat = scratch.vbd(["stat", "sécond %2F disk", "--json"]).json();
    assert_eq!(stat[0]["name"], "sécond %2F disk");
}

#[test]
fn a_killed_process_is_not_listed_and_its_socket_removed() {
    let scratch = Scratch::new();
    let server = scratch.nbd("disk", &[]);
    server.kill();
    assert_eq!(scratch.control_sockets().len(), 1, "a kill leaves the socket");
    assert_eq!(scratch.vbd(["list", "--json"]).json(), serde_json::json!([]));
    assert!(scratch.control_sockets().is_empty());
}

#[test]
fn stat_counts_what_clients_do() {
    let scratch = Scratch::new();
    let _server = scratch.nbd("disk", &[]);
    assert!(scratch.vbd(["stat"]).ok().contains("no requests yet"));
    scratch.qemu_io("disk", &["write 0 64k", "write 64k 64k", "read 0 4k", "flush"]).ok();
    let stat = scratch.vbd(["stat", "disk", "--json"]).json();
    let total = |operation: &str, key: &str| -> u64 {
        let queues = stat[0]["queues"].as_array().unwrap().iter();
        let operations = queues.flat_map(|queue| queue["operations"].as_array().unwrap());
        operations.filter(|o| o["operation"] == operation).map(|o| o[key].as_u64().unwrap()).sum()
    };
    assert_eq!(total("write", "count"), 2);
    assert_eq!(total("write", "bytes"), 128 << 10);
    assert_eq!(total("write", "errors"), 0);
    assert!(total("write", "service_ns") > 0);
    assert!(total("write", "longest_ns") > 0);
    assert!(total("read", "bytes") >= 4096);
    let text = scratch.vbd(["stat", "disk"]).ok();
    assert!(text.contains("128 KiB") && text.contains("LONGEST"), "{text}");
}

#[test]
fn a_served_disk_grows_and_its_clients_see_it() {
    let scratch = Scratch::new();
    let _server = scratch.nbd("disk", &[]);
    assert_eq!(scratch.vbd(["grow", "disk", "--size", "+16M"]).ok(), "disk: 16 MiB -> 32 MiB\n");
    assert_eq!(scratch.vbd(["grow", "disk", "48M"]).ok(), "disk: 32 MiB -> 48 MiB\n");
    // The file that is served, by its path.
    assert_eq!(scratch.vbd(["grow", "./disk", "--size", "64M"]).ok(), "disk: 48 MiB -> 64 MiB\n");
    assert_eq!(fs::metadata(scratch.path("disk")).unwrap().len(), 64 * MIB);
    let size = run(Command::new("nbdinfo").args(["--size", &scratch.uri("disk")])).ok();
    assert_eq!(size.trim(), (64 * MIB).to_string());
    scratch.vbd(["grow", "disk", "--size", "1M"]).refused(1, &["disk", "smaller"]);
    scratch.vbd(["grow", "disk", "--size", "+8E"]).refused(2, &["too large"]);
    scratch.vbd(["grow", "disk", "--size", "0"]).refused(2, &["0"]);
    scratch.vbd(["grow", "disk"]).refused(2, &["SIZE"]);
    assert_eq!(fs::metadata(scratch.path("disk")).unwrap().len(), 64 * MIB);
}

#[test]
fn a_file_grows_unless_somebody_uses_it() {
    let scratch = Scratch::new();
    let file = scratch.sparse("file", MIB);
    scratch.vbd(["grow", "file", "--size", "+1M"]).ok();
    assert_eq!(fs::metadata(&file).unwrap().len(), 2 * MIB);
    scratch.vbd(["grow", "file", "--size", "1M"]).refused(1, &["file", "smaller"]);
    fs::create_dir(scratch.path("dir")).unwrap();
    scratch.vbd(["grow", "dir", "--size", "1M"]).refused(1, &["dir", "a directory"]);

    let mut qemu = Command::new("qemu-io");
    let mut qemu =
        qemu.args(["-f", "raw"]).arg(&file).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // It says this when it has opened, and locked, the file.
    use std::io::{Read, Write};
    qemu.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
    let mut seen = [0; 1];
    let mut said = String::new();
    while !said.contains("2 MiB") && qemu.stdout.as_mut().unwrap().read(&mut seen).unwrap() == 1 {
        said.push(char::from(seen[0]));
    }
    scratch.vbd(["grow", "file", "--size", "4M"]).refused(1, &["file", &qemu.id().to_string()]);
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    assert_eq!(fs::metadata(&file).unwrap().len(), 2 * MIB);
    scratch.vbd(["grow", "file", "--size", "4M"]).ok();
    assert_eq!(fs::metadata(&file).unwrap().len(), 4 * MIB);
}

#[test]
fn detaching_the_disk_of_attach_ends_it() {
    let scratch = Scratch::new();
    let mut server = scratch.nbd("disk", &[]);
    scratch.vbd(["detach", "disk"]).ok();
    assert!(server.wait().success());
    assert!(!scratch.path("disk.sock").exists());
    scratch.vbd(["detach", "disk"]).refused(1, &["`disk`"]);
}

#[test]
fn a_disk_in_use_is_detached_by_force_only() {
    let scratch = Scratch::new();
    let mut server = scratch.nbd("disk", &[]);
    let mut client = Command::new("qemu-io");
    let client =
        client.args(["-f", "raw", &scratch.uri("disk")]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut client = client.spawn().unwrap();
    let clients = || scratch.vbd(["list", "--json"]).json()[0]["front_ends"][0]["clients"].clone();
    while clients() == 0 {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    scratch.vbd(["detach", "disk"]).refused(1, &["disk", "in use", "--force"]);
    assert_eq!(clients(), 1);
    scratch.vbd(["detach", "disk", "--force"]).ok();
    assert!(server.wait().success());
    client.kill().unwrap();
    client.wait().unwrap();
}

#[test]
fn two_disks_of_one_name_are_told_apart_by_their_process() {
    let scratch = Scratch::new();
    let first = scratch.nbd("first", &["--name", "disk"]);
    let _second = scratch.nbd("second", &["--name", "disk"]);
    scratch.vbd(["stat", "disk"]).refused(1, &["2 processes", "--control", &first.id().to_string()]);
    let control = scratch.runtime().join(format!("control-{}.sock", first.id()));
    let stat = scratch.vbd(["stat", "disk", "--json", "--control", control.to_str().unwrap()]).json();
    assert_eq!(stat[0]["path"], scratch.path("first").to_str().unwrap());
}

#[test]
fn disks_are_added_over_the_socket() {
    let scratch = Scratch::new();
    let server = scratch.nbd("disk", &["--control", "control.sock"]);
    let control = scratch.path("control.sock");
    let more = scratch.sparse("more", 8 * MIB);
    let ask = |body: serde_json::Value| http(&control, "POST", "/v1/disks", &body.to_string());

    let (status, body) = ask(serde_json::json!({ "path": more, "nbd": "more", "access": "r" }));
    assert_eq!(status, 200, "{body}");
    let uri = format!("nbd+unix:///more?socket={}", scratch.path("disk.sock").display());
    assert_eq!(run(Command::new("nbdinfo").args(["--size", &uri])).ok().trim(), (8 * MIB).to_string());
    let list = scratch.vbd(["list", "--json", "--control", control.to_str().unwrap()]).json();
    assert_eq!(list[1]["name"], "more");
    assert_eq!(list[1]["read_only"], true);

    for (body, expected, word) in [
        (serde_json::json!({ "path": more, "nbd": "more" }), 409, "more"),
        (serde_json::json!({ "path": more, "name": "other", "nbd": "more", "access": "r" }), 409, "more"),
        (serde_json::json!({ "path": "more", "nbd": "x" }), 400, "absolute"),
        (serde_json::json!({ "path": more, "name": "x" }), 400, "front-end"),
        (serde_json::json!({ "path": more, "name": "x", "nbd": "x", "format": "qed" }), 400, "qed"),
        (serde_json::json!({ "path": more, "nbd": "x", "unheard-of": 1 }), 400, "unheard-of"),
        (serde_json::json!({ "path": scratch.path("missing"), "nbd": "x" }), 500, "missing"),
    ] {
        let (status, answer) = ask(body);
        assert_eq!(status, expected, "{answer}");
        assert!(answer.contains(word), "{answer}");
    }
    let (status, _) = http(&control, "POST", "/v1/disks/more/detach", "{}");
    assert_eq!(status, 200);
    let (status, _) = http(&control, "GET", "/v1/disks/more", "");
    assert_eq!(status, 404);
    server.stop().ok();
    assert!(!control.exists());
}

#[test]
fn requests_that_make_no_sense_are_refused_in_json() {
    let scratch = Scratch::new();
    let _server = scratch.nbd("disk", &["--control", "control.sock"]);
    let control = scratch.path("control.sock");
    for (method, path, body, expected, kind) in [
        ("GET", "/", "", 404, "unknown"),
        ("GET", "/v1/disks/none", "", 404, "unknown"),
        ("POST", "/v1/disks/disk/grow", "{", 400, "invalid"),
        ("POST", "/v1/disks/disk/grow", r#"{"to":-1}"#, 400, "invalid"),
        ("POST", "/v1/disks/disk/grow", r#"{"by":18446744073709551615}"#, 400, "invalid"),
        ("POST", "/v1/disks/none/grow", r#"{"by":1}"#, 404, "unknown"),
        ("POST", "/v1/disks/none/detach", "{}", 404, "unknown"),
        ("PATCH", "/v1/disks", "{}", 400, "invalid"),
    ] {
        let (status, answer) = http(&control, method, path, body);
        assert_eq!(status, expected, "{method} {path} {body}: {answer}");
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["kind"], kind);
        assert!(answer["message"].is_string());
    }
    assert_eq!(scratch.vbd(["list", "--json", "--control", "control.sock"]).json()[0]["size"], 16 * MIB);
}

#[test]
fn other_users_are_hung_up_on() {
    let scratch = Scratch::new();
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let server = scratch.nbd("disk", &["--control", "control.sock"]);
    let control = scratch.path("control.sock");
    let open = |path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    // As if somebody had opened what vbd closes.
    open(scratch.path(""), 0o755);
    open(control.clone(), 0o666);
    let ask = "import socket, sys\n\
               s = socket.socket(socket.AF_UNIX)\n\
               s.connect(sys.argv[1])\n\
               s.sendall(b'GET /v1/disks HTTP/1.0\\r\\n\\r\\n')\n\
               answer = s.recv(100)\n\
               sys.exit(0 if b' 200 ' in answer else 'hung up' if not answer else answer)";
    let get = |user: &str| {
        let mut python = Command::new("setpriv");
        python.args(["--reuid", user, "--regid", user, "--clear-groups", "/usr/bin/python3", "-c", ask]);
        run(python.arg(&control))
    };
    get("0").ok();
    let refused = get("65534");
    let hung_up =
        ["hung up", "BrokenPipe", "ConnectionReset"].iter().any(|word| refused.stderr.contains(word));
    assert!(!refused.status.success() && hung_up, "{refused:?}");
    server.stop().ok();
}

#[test]
fn a_control_socket_that_is_alive_is_refused() {
    let scratch = Scratch::new();
    let _server = scratch.nbd("disk", &["--control", "control.sock"]);
    scratch.sparse("other", MIB);
    let refused = scratch.vbd(["attach", "other", "--vhost-user", "v.sock", "--control", "control.sock"]);
    refused.refused(1, &["control.sock", "--control"]);
    scratch.vbd(["list", "--control", "nowhere.sock"]).refused(1, &["nowhere.sock"]);
}

#[test]
fn a_read_only_disk_does_not_grow_and_odd_file_names_are_listed() {
    use std::os::unix::ffi::OsStrExt;
    let scratch = Scratch::new();
    let odd = std::ffi::OsStr::from_bytes(b"no\xffutf");
    fs::File::create(scratch.path("").join(odd)).unwrap().set_len(MIB).unwrap();
    let arguments =
        ["attach", "--name", "odd", "--nbd", "unix:n.sock", "--read-only"].map(std::ffi::OsStr::new);
    let _server = scratch.serve(arguments.into_iter().chain([odd]), 1);
    let list = scratch.vbd(["list", "--json"]).json();
    assert!(list[0]["path"].as_str().unwrap().ends_with("no\u{fffd}utf"), "{list}");
    scratch.vbd(["grow", "odd", "--size", "2M"]).refused(1, &["odd"]);
    assert_eq!(fs::metadata(scratch.path("").join(odd)).unwrap().len(), MIB);
}
