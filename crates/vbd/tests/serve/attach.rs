//! `vbd attach` through the real command.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;

use crate::harness::{MIB, Scratch, Server, run};

#[test]
fn without_a_front_end_the_options_are_named() {
    let scratch = Scratch::new();
    scratch.sparse("disk", MIB);
    scratch.vbd(["attach", "disk"]).refused(2, &["--vhost-user SOCK", "--nbd unix:SOCK", "--nbd HOST:PORT"]);
}

#[test]
fn one_ready_line_for_each_way_to_the_disk_and_nothing_left_after_the_stop() {
    let scratch = Scratch::new();
    scratch.sparse("disk", MIB);
    let both = ["attach", "disk", "--name", "vm1", "--vhost-user", "v.sock", "--nbd", "unix:n.sock"];
    let server = scratch.serve(both, 2);
    let dir = scratch.path("");
    let (v, n) = (dir.join("v.sock"), dir.join("n.sock"));
    assert!(
        server.ready[0].starts_with("vm1: vhost-user ") && server.ready[0].ends_with("v.sock"),
        "{:?}",
        server.ready
    );
    assert!(
        server.ready[1].starts_with("vm1: nbd unix:") && server.ready[1].ends_with("n.sock name vm1"),
        "{:?}",
        server.ready
    );
    assert!(v.exists() && n.exists());
    assert_eq!(scratch.control_sockets().len(), 1);
    let ended = server.stop();
    assert_eq!(ended.stderr, "");
    ended.ok();
    assert!(!v.exists() && !n.exists());
    assert!(scratch.control_sockets().is_empty());
}

#[test]
fn verbose_says_how_to_connect() {
    let scratch = Scratch::new();
    scratch.sparse("disk", MIB);
    let both = ["attach", "disk", "-v", "--vhost-user", "v.sock", "--nbd", "unix:n.sock"];
    let mut server = scratch.serve(both, 9);
    let all = server.ready.join("\n");
    for word in [
        "vhost-user-blk-pci",
        "Cloud Hypervisor",
        "crosvm",
        "nbd+unix:///disk?socket=",
        "nbdinfo",
        "phy:/dev/nbd0",
    ] {
        assert!(all.contains(word), "{word}: {all}");
    }
    server.signal(Signal::INT);
    assert!(server.wait().success(), "Ctrl-C is a clean stop");
}

#[test]
fn what_a_client_writes_is_in_the_file() {
    let scratch = Scratch::new();
    let server = scratch.nbd("disk", &[]);
    scratch.qemu_io("disk", &["write -P 0x5a 1M 64k", "flush", "read -P 0x5a 1M 64k", "read -P 0 0 1M"]).ok();
    server.stop().ok();
    let content = fs::read(scratch.path("disk")).unwrap();
    assert_eq!(content.len() as u64, 16 * MIB);
    assert!(content[1 << 20..(1 << 20) + (64 << 10)].iter().all(|byte| *byte == 0x5a));
}

#[test]
fn the_thread_pool_serves_as_well() {
    let scratch = Scratch::new();
    for cache in ["none", "writeback", "writethrough"] {
        let server =
            scratch.nbd("disk", &["--engine", "threads", "--cache", cache, "--reactors", "1", "--spin", "0"]);
        scratch.qemu_io("disk", &["write -P 0x77 0 128k", "flush", "read -P 0x77 0 128k"]).ok();
        server.stop().ok();
    }
}

#[test]
fn a_read_only_disk_is_not_written_to() {
    let scratch = Scratch::new();
    let _server = scratch.nbd("disk", &["--read-only"]);
    let refused = scratch.qemu_io("disk", &["write -P 1 0 512"]);
    assert!(!refused.status.success() || refused.stdout.contains("read-only"), "{refused:?}");
    assert!(fs::read(scratch.path("disk")).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn what_is_no_disk_is_refused_with_its_name() {
    let scratch = Scratch::new();
    let attach = |file: &str| scratch.vbd(["attach", file, "--vhost-user", "v.sock"]);
    attach("missing").refused(1, &["missing", "vbd create"]);
    assert!(!scratch.path("missing").exists());
    fs::create_dir(scratch.path("dir")).unwrap();
    attach("dir").refused(1, &["dir", "a directory"]);
    scratch.sparse("void", 0);
    attach("void").refused(1, &["void", "empty"]);
    symlink("nowhere", scratch.path("dangling")).unwrap();
    attach("dangling").refused(1, &["dangling"]);
    assert!(!scratch.path("v.sock").exists());
    assert!(scratch.control_sockets().is_empty());
}

#[test]
fn names_and_numbers_that_cannot_be_are_usage_errors() {
    let scratch = Scratch::new();
    scratch.sparse("disk", MIB);
    let attach = |more: &[&str]| scratch.vbd(["attach", "disk", "--vhost-user", "v.sock"].iter().chain(more));
    attach(&["--name", "a/b"]).refused(2, &["--name"]);
    attach(&["--serial", "twenty-one characters!"]).refused(2, &["--serial", "20"]);
    attach(&["--queues", "0"]).refused(2, &["--queues"]);
    attach(&["--queues", "129"]).refused(2, &["--queues"]);
    attach(&["--nbd", "nowhere"]).refused(2, &["--nbd", "port"]);
    attach(&["--cache", "some"]).refused(2, &["writethrough"]);
    attach(&["--format", "qed"]).refused(2, &["qemu-img convert"]);
    attach(&["--read-only", "--force-lease"]).refused(2, &["--force-lease"]);
}

#[test]
fn a_living_socket_is_refused_and_a_dead_one_replaced() {
    let scratch = Scratch::new();
    scratch.sparse("disk", MIB);
    for (option, address, name) in [("--vhost-user", "v.sock", "v.sock"), ("--nbd", "unix:n.sock", "n.sock")]
    {
        let socket = scratch.path(name);
        let listener = UnixListener::bind(&socket).unwrap();
        scratch.vbd(["attach", "disk", option, address]).refused(1, &[name]);
        assert!(socket.exists(), "the other's socket stays");
        drop(listener);
        scratch.serve(["attach", "disk", option, address], 1).stop().ok();
        assert!(!socket.exists());
        fs::write(&socket, "precious").unwrap();
        scratch.vbd(["attach", "disk", option, address]).refused(1, &[name]);
        assert_eq!(fs::read(&socket).unwrap(), b"precious");
    }
}

#[test]
fn a_second_writer_is_told_who_the_first_is_and_a_kill_leaves_no_lock() {
    let scratch = Scratch::new();
    let first = scratch.nbd("disk", &[]);
    let id = first.id().to_string();
    scratch.vbd(["attach", "disk", "--vhost-user", "v.sock"]).refused(1, &["disk", &id]);
    scratch.vbd(["attach", "disk", "--vhost-user", "v.sock", "--read-only"]).refused(1, &[&id]);
    scratch.serve(["attach", "disk", "--vhost-user", "v.sock", "--incoming"], 1).stop().ok();
    scratch.serve(["attach", "disk", "--vhost-user", "v.sock", "--force-lease"], 1).stop().ok();
    first.kill();
    scratch.nbd("disk", &[]).stop().ok();
}

#[test]
fn a_runtime_directory_that_others_write_to_is_refused() {
    let scratch = Scratch::new();
    scratch.sparse("disk", MIB);
    fs::create_dir(scratch.runtime()).unwrap();
    fs::set_permissions(scratch.runtime(), fs::Permissions::from_mode(0o777)).unwrap();
    scratch.vbd(["attach", "disk", "--vhost-user", "v.sock"]).refused(1, &["run/vbd", "chmod go-w"]);
}

/// A service manager that is told how its service is.
struct Manager(UnixDatagram);

impl Manager {
    /// One for this command, which is then started.
    fn start(scratch: &Scratch, command: &mut Command, lines: usize) -> (Manager, Server) {
        let socket = UnixDatagram::bind(scratch.path("notify")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let server = Server::start(command.env("NOTIFY_SOCKET", scratch.path("notify")), lines);
        (Manager(socket), server)
    }

    /// Waits until it is told this.
    fn wait_for(&self, state: &str) {
        let mut buffer = [0; 1024];
        loop {
            let read = self.0.recv(&mut buffer).unwrap();
            if String::from_utf8_lossy(&buffer[..read]).lines().any(|line| line == state) {
                return;
            }
        }
    }
}

#[test]
fn the_service_manager_is_told() {
    let scratch = Scratch::new();
    scratch.sparse("disk", MIB);
    let mut command = scratch.command();
    command.args(["attach", "disk", "--vhost-user", "v.sock"]);
    let (manager, server) = Manager::start(&scratch, &mut command, 1);
    manager.wait_for("READY=1");
    server.stop().ok();
    manager.wait_for("STOPPING=1");
}

/// A client that asks for much more than a socket holds and takes none of it.
fn greedy(scratch: &Scratch) -> UnixStream {
    let mut stream = UnixStream::connect(scratch.path("disk.sock")).unwrap();
    stream.read_exact(&mut [0; 18]).unwrap();
    // Fixed newstyle without padding, then NBD_OPT_EXPORT_NAME (the protocol's doc/proto.md).
    let mut hello = 3u32.to_be_bytes().to_vec();
    hello.extend(b"IHAVEOPT");
    hello.extend(1u32.to_be_bytes());
    hello.extend(4u32.to_be_bytes());
    hello.extend(b"disk");
    stream.write_all(&hello).unwrap();
    stream.read_exact(&mut [0; 10]).unwrap();
    for cookie in 0..64u64 {
        let mut read = 0x2560_9513_u32.to_be_bytes().to_vec();
        read.extend([0; 4]);
        read.extend(cookie.to_be_bytes());
        read.extend(0u64.to_be_bytes());
        read.extend((1u32 << 20).to_be_bytes());
        stream.write_all(&read).unwrap();
    }
    // The first answer has begun: requests were taken.
    stream.read_exact(&mut [0; 4]).unwrap();
    stream
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let scratch = Scratch::new();
    scratch.sparse("disk", 16 * MIB);
    let mut command = scratch.command();
    command.args(["attach", "disk", "--nbd", "unix:disk.sock", "--stop-within", "50000"]);
    let (manager, server) = Manager::start(&scratch, &mut command, 1);
    let _client = greedy(&scratch);
    server.signal(Signal::TERM);
    manager.wait_for("STOPPING=1");
    let ended = server.stop();
    ended.refused(1, &["second signal"]);
    scratch.nbd("disk", &[]).stop().ok();
}

#[test]
fn nohup_is_respected() {
    let scratch = Scratch::new();
    scratch.sparse("disk", MIB);
    let serve =
        |program: &mut Command| Server::start(program.args(["attach", "disk", "--vhost-user", "v.sock"]), 1);
    let mut server = serve(&mut scratch.command());
    server.signal(Signal::HUP);
    assert!(server.wait().success(), "a terminal that goes takes its server along, cleanly");

    let mut nohup = Command::new("nohup");
    nohup
        .arg(env!("CARGO_BIN_EXE_vbd"))
        .current_dir(scratch.path(""))
        .env("XDG_RUNTIME_DIR", scratch.path("run"));
    let server = serve(&mut nohup);
    let status = fs::read_to_string(format!("/proc/{}/status", server.id())).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    assert_eq!(u64::from_str_radix(ignored.trim(), 16).unwrap() & 1, 1, "SIGHUP stays ignored");
    server.stop().ok();
}

#[test]
fn a_clean_stop_is_bounded() {
    let scratch = Scratch::new();
    let server = scratch.nbd("disk", &["--stop-within", "1"]);
    let _client = greedy(&scratch);
    server.stop().refused(1, &["disk", "cut off"]);
    assert!(!scratch.path("disk.sock").exists());
}

#[test]
fn a_certificate_that_cannot_be_read_is_named() {
    let scratch = Scratch::new();
    scratch.sparse("disk", MIB);
    let tls = ["attach", "disk", "--nbd", "unix:n.sock", "--tls-cert", "none.pem", "--tls-key", "none.key"];
    scratch.vbd(tls).refused(1, &["none."]);
    scratch.vbd(&tls[..6]).refused(2, &["--tls-key"]);
    let without = ["attach", "disk", "--vhost-user", "v.sock", "--tls-cert", "a", "--tls-key", "b"];
    scratch.vbd(without).refused(2, &["--nbd"]);
}

#[test]
fn a_passed_socket_is_an_nbd_listener() {
    let scratch = Scratch::new();
    let file = scratch.sparse("disk", MIB);
    let socket = scratch.path("disk.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    // The shell becomes vbd, so its number is the right one.
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" attach \"$1\" 3<&0 </dev/null";
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_vbd")]).arg(&file);
    command.env("XDG_RUNTIME_DIR", scratch.path("run")).stdin(std::os::fd::OwnedFd::from(listener));
    let server = Server::start(&mut command, 1);
    assert!(server.ready[0].starts_with("disk: nbd "), "{:?}", server.ready);
    scratch.qemu_io("disk", &["write -P 3 0 4k", "read -P 3 0 4k"]).ok();
    server.stop().ok();
    assert!(socket.exists(), "it belongs to the service manager");
}

#[test]
fn qemu_img_reads_what_is_served() {
    let scratch = Scratch::new();
    fs::write(scratch.path("disk"), b"content ".repeat(128 * 1024)).unwrap();
    let _server = scratch.nbd("disk", &["--read-only"]);
    let copy = scratch.path("copy");
    run(Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "raw", &scratch.uri("disk")])
        .arg(&copy))
    .ok();
    assert!(fs::read(&copy).unwrap() == fs::read(scratch.path("disk")).unwrap());
}

#[test]
fn a_filesystem_that_was_not_unmounted_is_warned_of() {
    let scratch = Scratch::new();
    let file = scratch.sparse("disk", 16 * MIB);
    let tool = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        run(command.args(arguments).arg(&file).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")).ok()
    };
    tool("mke2fs", &["-q", "-t", "ext4"]);
    let stop = || scratch.serve(["attach", "disk", "--vhost-user", "v.sock"], 1).stop().stderr;
    assert_eq!(stop(), "");
    // As after a crash: the state is not "clean".
    tool("debugfs", &["-w", "-R", "set_super_value state 0"]);
    let warning = stop();
    assert!(warning.contains("disk") && warning.contains("ext4"), "{warning}");
}

#[test]
fn several_addresses_lead_to_one_disk() {
    let scratch = Scratch::new();
    scratch.sparse("disk", MIB);
    let _server = scratch.serve(["attach", "disk", "--nbd", "unix:disk.sock", "--nbd", "unix:more.sock"], 2);
    scratch.qemu_io("disk", &["write -P 9 0 4k"]).ok();
    let uri = format!("nbd+unix:///disk?socket={}", scratch.path("more.sock").display());
    run(Command::new("qemu-io").args(["-f", "raw", "-c", "read -P 9 0 4k", &uri])).ok();
}

#[test]
fn manual_pages_and_completions_have_every_verb() {
    let scratch = Scratch::new();
    scratch.vbd(["man", "pages"]).ok();
    for verb in ["attach", "up", "list", "stat", "grow", "detach", "create", "build", "info", "map"] {
        let page = fs::read_to_string(scratch.path(&format!("pages/vbd-{verb}.1"))).unwrap();
        assert!(page.contains(verb));
        assert!(scratch.vbd(["completions", "bash"]).ok().contains(verb));
    }
    assert!(!scratch.path("pages/vbd-__build-stage.1").exists());
}
