//! Memory that a front-end truncates while it is in use: it loses its connection, and a neighbour on the same reactor
//! does not notice.

mod common;

use std::sync::atomic::Ordering::SeqCst;

use common::frontend::{EVENT_INDEX, Machine};
use common::{Bench, options};
use vbd_testing::{MemDisk, eventually};

const OUT: u32 = 1;

/// Truncates guest memory to `left` bytes at a moment that `during` chooses.
fn vanish(left: u64, during: impl Fn(&Bench, &Machine)) {
    let bench = Bench::new();
    let _server = bench.serve("neighbour", MemDisk::new(1 << 20), options());
    let good = Machine::start(&bench.dir.path().join("neighbour"), EVENT_INDEX);
    for _ in 0..3 {
        let bad = Machine::start(&bench.path, EVENT_INDEX);
        assert_eq!(bad.round(OUT, 0, 512), 0);
        during(&bench, &bad);
        rustix::fs::ftruncate(&bad.guest.file, left).unwrap();
        bench.disk.hold.store(false, SeqCst);
        bad.queue.kick();
        eventually("the connection is lost", || !bad.frontend.is_alive());
        eventually("the disk is given back", || bench.disk.sessions.load(SeqCst) == 0);
        assert_eq!(good.round(OUT, 0, 512), 0);
    }
    let error = bench.server().status().error.unwrap();
    assert!(error.contains("truncated"), "{error}");
    // The server takes the next, who gets an honest disk.
    let next = Machine::start(&bench.path, EVENT_INDEX);
    assert_eq!(next.round(OUT, 0, 512), 0);
}

#[test]
fn all_of_it() {
    vanish(0, |_, _| {});
}

#[test]
fn all_but_the_rings() {
    // The request's header and status lie beyond: one of them is touched, whether the request is taken before or after.
    vanish(0x10000, |bench, machine| {
        bench.disk.hold.store(true, SeqCst);
        machine.queue.request(&machine.guest, 0, OUT, 0, machine.queue.data(), 512);
    });
}

#[test]
fn under_a_request() {
    vanish(0, |bench, machine| {
        bench.disk.hold.store(true, SeqCst);
        let asked = || bench.disk.asked.lock().unwrap().len();
        let before = asked();
        machine.queue.request(&machine.guest, 0, 4, 0, 0, 0);
        machine.queue.kick();
        eventually("the flush is under way", || asked() > before);
    });
}

/// The body of a process that touches memory of its own which is not there.
#[test]
#[ignore = "run by the next test, in a process of its own"]
fn a_process_with_a_fault_of_its_own() {
    let bench = Bench::new();
    let machine = Machine::start(&bench.path, EVENT_INDEX);
    let foreign = common::frontend::Guest::new(0, 4096);
    rustix::fs::ftruncate(&foreign.file, 0).unwrap();
    assert_eq!(machine.round(OUT, 0, 512), 0);
    if std::env::var_os("VBD_TEST_FAULT").is_some() {
        // Without a picture of it.
        let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
        rustix::process::setrlimit(rustix::process::Resource::Core, none).unwrap();
        foreign.u8(0).load(SeqCst);
    }
}

#[test]
fn a_fault_that_is_nobodys_ends_the_process_as_ever() {
    use std::os::unix::process::ExitStatusExt;
    // What a process leaves that could not clean up.
    let dir = tempfile::tempdir().unwrap();
    let run = |fault: &str| {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "a_process_with_a_fault_of_its_own", "--ignored"])
            .env("TMPDIR", dir.path())
            .env_remove("VBD_TEST_FAULT");
        if !fault.is_empty() {
            command.env("VBD_TEST_FAULT", fault);
        }
        command.output().unwrap().status
    };
    assert!(run("").success());
    // SIGBUS
    assert_eq!(run("yes").signal(), Some(7));
}
