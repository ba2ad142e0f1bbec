//! The socket's path, and who may have it.

mod common;

use std::os::unix::net::UnixListener;
use std::sync::Arc;

use common::frontend::Machine;
use common::{Bench, options};
use vbd_testing::{MemDisk, eventually};
use vbd_vhost_user::{Error, Options, Server};

fn bind(bench: &Bench, name: &str, options: Options) -> Result<Server, Error> {
    let handles = bench.reactors.iter().map(vbd_ring::Reactor::handle).collect();
    Server::bind(bench.dir.path().join(name), Arc::new(MemDisk::new(4096)), handles, options)
}

#[test]
fn a_path_that_lives_is_refused_and_a_dead_one_replaced() {
    let bench = Bench::new();
    let refused = bind(&bench, "socket", options()).err().unwrap();
    assert!(matches!(refused, Error::InUse(_)));
    assert!(refused.to_string().contains("another server"), "{refused}");

    let foreign = UnixListener::bind(bench.dir.path().join("foreign")).unwrap();
    assert!(matches!(bind(&bench, "foreign", options()), Err(Error::InUse(_))));
    drop(foreign);
    let server = bind(&bench, "foreign", options()).unwrap();
    assert!(server.path().exists());

    std::fs::write(bench.dir.path().join("file"), "precious").unwrap();
    assert!(matches!(bind(&bench, "file", options()), Err(Error::NotASocket(_))));
    assert_eq!(std::fs::read(bench.dir.path().join("file")).unwrap(), b"precious");
    assert!(matches!(bind(&bench, "no/such/place", options()), Err(Error::Bind { .. })));
}

#[test]
fn a_stop_removes_the_socket_unless_it_is_somebody_elses() {
    let bench = Bench::new();
    let server = bind(&bench, "mine", options()).unwrap();
    let path = server.path().to_owned();
    drop(server);
    assert!(!path.exists());
    let server = bind(&bench, "mine", options()).unwrap();
    std::fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(server);
    assert!(path.exists());
}

#[test]
fn front_ends_take_turns() {
    let bench = Bench::new();
    let first = Machine::start(&bench.path, 0);
    let path = bench.path.clone();
    let second = std::thread::spawn(move || Machine::start(&path, 0).round(1, 0, 512));
    assert_eq!(first.round(1, 0, 512), 0);
    drop(first);
    assert_eq!(second.join().unwrap(), 0);
    eventually("both are gone", || !bench.server().status().connected);
    // The two tries of the path's owner were connections that came to nothing.
    assert_eq!(Machine::start(&bench.path, 0).round(1, 0, 512), 0);
}

#[test]
fn options_have_limits() {
    let bench = Bench::new();
    let refused = |options: Options| matches!(bind(&bench, "other", options), Err(Error::Option(_)));
    assert!(refused(Options { queues: 0, ..options() }));
    assert!(refused(Options { queues: 257, ..options() }));
    assert!(refused(Options { serial: "x".repeat(21), ..options() }));
    assert!(
        Server::bind(bench.dir.path().join("other"), Arc::new(MemDisk::new(4096)), vec![], options())
            .is_err()
    );
    assert!(!bench.dir.path().join("other").exists());
}
