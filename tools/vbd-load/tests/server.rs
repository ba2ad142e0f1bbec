//! The load generator against a server that is known to be right: qemu-storage-daemon (Debian package qemu-utils).

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};

struct Server {
    process: Child,
    dir: tempfile::TempDir,
}

impl Server {
    /// Serves a new, empty file.
    fn start(size: u64, writable: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        std::fs::File::create(&file).unwrap().set_len(size).unwrap();
        let on = if writable { "on" } else { "off" };
        let process = Command::new("qemu-storage-daemon")
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=f,filename={}", file.display()))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable={on},num-queues=2",
                dir.path().join("socket").display()
            ))
            .spawn()
            .expect("qemu-storage-daemon (apt install qemu-utils)");
        Server { process, dir }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    fn load(&self, args: &[&str]) -> Output {
        load(&self.socket(), args)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn load(socket: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vbd-load")).arg(socket).args(args).output().unwrap()
}

fn report(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn writes_are_read_back_in_both_ways_of_waiting() {
    let server = Server::start(16 << 20, true);
    for wait in ["block", "poll"] {
        let args =
            ["--rw=randrw", "--ops=2000", "--depth=8", "--queues=2", "--verify", "--json", "--wait", wait];
        let report = report(&server.load(&args));
        assert_eq!(report["ops"], 4000);
        assert!(report["verified"].as_u64().unwrap() > 1000);
    }
}

#[test]
fn sequential_writes_reach_the_file_at_their_offsets() {
    let server = Server::start(8 << 20, true);
    let report =
        report(&server.load(&["--rw=write", "--bs=64K", "--ops=128", "--depth=4", "--verify", "--json"]));
    assert_eq!(report["verified"], 128);
    let content = std::fs::read(server.dir.path().join("disk")).unwrap();
    for (sector, at) in content.chunks_exact(512).zip((0u64..).step_by(512)) {
        assert_eq!(sector[..8], at.to_le_bytes());
        assert_eq!(sector[8..16], (at / 65536 + 1).to_le_bytes());
    }
}

#[test]
fn cpu_time_of_the_server_is_counted() {
    let server = Server::start(8 << 20, true);
    let pid = server.process.id().to_string();
    let report = report(&server.load(&["--ops=2000", "--json", "--server-pid", &pid]));
    assert!(report["server_cpu_s"].as_f64().unwrap() > 0.0);
    assert!(report["iops_per_server_cpu"].as_f64().unwrap() > 0.0);
}

#[test]
fn holds_disks_that_do_nothing() {
    let servers = [Server::start(1 << 20, true), Server::start(1 << 20, true)];
    let second = servers[1].socket();
    let output = servers[0].load(&["--hold=0", second.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8(output.stdout).unwrap().starts_with("2 disks connected"));
}

#[test]
fn refuses_what_cannot_work() {
    let server = Server::start(1 << 20, false);
    let message = |output: Output| {
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(message(server.load(&["--rw=randwrite"])).contains("read-only"));
    assert!(message(server.load(&["--bs=1000"])).contains("multiple of 512"));
    assert!(message(server.load(&["--bs=1M"])).contains("too few"));
    let nobody = server.dir.path().join("nobody");
    assert!(message(load(&nobody, &["--timeout=0"])).contains("connect to"));
}
