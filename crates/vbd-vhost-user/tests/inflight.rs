//! A back-end that dies: what was in flight is done exactly once by the next.

#![allow(clippy::cast_possible_truncation, reason = "sizes of tests are small")]

mod common;

use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::SeqCst;

use common::Bench;
use common::frontend::{EVENT_INDEX, FLUSH, Frontend, Guest, Queue, code, is_readable, words};
use vbd_testing::eventually;

const OUT: u32 = 1;
const FEATURES: u64 = EVENT_INDEX | FLUSH;
const SIZE: u16 = 64;

/// A front-end's memory, queue and in-flight region, which outlive connections.
struct Machine {
    guest: Guest,
    queue: Queue,
    region: Guest,
    description: Vec<u8>,
}

fn connect(path: &Path, guest: &Guest) -> Frontend {
    let frontend = Frontend::connect(path);
    frontend.negotiate(FEATURES);
    frontend.share(guest);
    frontend
}

impl Machine {
    /// Connects for the first time and gets the region from the server.
    fn new(path: &Path) -> (Self, Frontend) {
        let guest = Guest::new(0x1_0000_0000, 1 << 20);
        let frontend = connect(path, &guest);
        let wanted = description(0, 0, 2, SIZE);
        frontend.send(code::GET_INFLIGHT_FD, 0, &wanted, &[]);
        let (description, file) = frontend.receive_file();
        let len = u64::from_ne_bytes(description[..8].try_into().unwrap()) as usize;
        assert!(len >= 2 * (16 + 16 * usize::from(SIZE)));
        let queue = Queue::new(&guest, 0, SIZE);
        (Machine { guest, queue, region: Guest::of(file, 0, len), description }, frontend)
    }

    /// Connects again, as a front-end does whose back-end has died: it knows the used index only.
    fn again(&self, path: &Path) -> Frontend {
        let frontend = connect(path, &self.guest);
        self.start(&frontend, self.queue.used_index(&self.guest).into());
        frontend
    }

    fn start(&self, frontend: &Frontend, base: u32) {
        frontend.must(code::SET_INFLIGHT_FD, &self.description, &[self.region.file.as_fd()]);
        assert_eq!(frontend.start_at(&self.queue, &self.guest, base), Some(true));
    }

    /// The heads that the region says are in flight.
    fn in_flight(&self) -> Vec<u16> {
        let flag = |head: &u16| self.region.u8(16 + 16 * u64::from(*head)).load(SeqCst) != 0;
        (0..SIZE).filter(flag).collect()
    }

    fn mark(&self, head: u16, counter: u64) {
        self.region.u64(16 + 16 * u64::from(head) + 8).store(counter, SeqCst);
        self.region.u8(16 + 16 * u64::from(head)).store(1, SeqCst);
    }

    /// version, entries, head of the last batch, used index.
    fn set_header(&self, fields: [u16; 4]) {
        (0..).zip(fields).for_each(|(index, field)| self.region.u16(8 + 2 * index).store(field, SeqCst));
    }

    fn write(&self, head: u16, sector: u64) {
        let data = self.queue.data() + 512 * u64::from(head);
        self.guest.write(data, &[u8::try_from(sector).unwrap() + 1; 512]);
        self.queue.request(&self.guest, head, OUT, sector, data, 512);
    }
}

fn description(len: u64, offset: u64, queues: u16, entries: u16) -> Vec<u8> {
    let mut bytes = words(&[len, offset]);
    bytes.extend(queues.to_ne_bytes());
    bytes.extend(entries.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes
}

#[test]
fn the_region_follows_what_is_in_flight() {
    let bench = Bench::new();
    let (machine, frontend) = Machine::new(&bench.path);
    machine.start(&frontend, 0);
    bench.disk.hold.store(true, SeqCst);
    [(6, 1), (0, 2), (3, 3)].into_iter().for_each(|(head, sector)| machine.write(head, sector));
    machine.queue.kick();
    eventually("three writes wait", || bench.disk.transfers().len() == 3);
    assert_eq!(machine.in_flight(), [0, 3, 6]);
    let counter = |head: u64| machine.region.u64(16 + 16 * head + 8).load(SeqCst);
    assert!(counter(6) < counter(0) && counter(0) < counter(3));
    bench.disk.hold.store(false, SeqCst);
    machine.queue.wait(&machine.guest, 3);
    eventually("nothing is in flight", || machine.in_flight().is_empty());
    eventually("the used index is noted", || machine.region.u16(14).load(SeqCst) == 3);
}

/// The body of the process that is killed: serves a disk that holds every write to an odd sector.
#[test]
#[ignore = "run by the next test, in a process of its own"]
fn a_process_to_kill() {
    let Some(path) = std::env::var_os("VBD_TEST_SOCKET") else { return };
    let bench = Bench::new();
    bench.disk.hold_odd.store(true, SeqCst);
    let disk = vbd_testing::MemDisk(bench.disk.clone());
    let handles = bench.reactors.iter().map(vbd_ring::Reactor::handle).collect();
    let disk = std::sync::Arc::new(disk);
    let _server = vbd_vhost_user::Server::bind(path, disk, handles, common::options()).unwrap();
    // Until killed, or until whoever should have done that is gone.
    let _ = std::io::Read::read(&mut std::io::stdin(), &mut [0]);
}

#[test]
fn a_process_is_killed_and_the_next_does_the_rest_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_process_to_kill", "--ignored"])
        .env("VBD_TEST_SOCKET", &path)
        // What it leaves goes with this directory.
        .env("TMPDIR", dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    eventually("the process listens", || path.exists());
    let (machine, frontend) = Machine::new(&path);
    machine.start(&frontend, 0);
    for (head, sector) in (0..60).step_by(3).zip(0..) {
        machine.write(head, sector);
    }
    machine.queue.kick();
    let mut done: Vec<u32> = machine.queue.wait(&machine.guest, 10).iter().map(|entry| entry.0).collect();
    assert_eq!(done, (0..60).step_by(6).collect::<Vec<_>>());
    child.kill().unwrap();
    child.wait().unwrap();
    let left = machine.in_flight();
    assert_eq!(left, (3..60).step_by(6).collect::<Vec<_>>());
    // The guest goes on in the meantime.
    machine.write(60, 20);

    // The next server, on the path of the dead one.
    let bench = Bench::new();
    let server = {
        let handles = bench.reactors.iter().map(vbd_ring::Reactor::handle).collect();
        let disk = std::sync::Arc::new(vbd_testing::MemDisk(bench.disk.clone()));
        vbd_vhost_user::Server::bind(&path, disk, handles, common::options()).unwrap()
    };
    let frontend = machine.again(&path);
    done = machine.queue.wait(&machine.guest, 11).iter().map(|entry| entry.0).collect();
    assert_eq!(done.len(), 11);
    // Each once, in the order they were taken, before what is new.
    let sectors: Vec<u64> = bench.disk.transfers().iter().map(|asked| asked.offset / 512).collect();
    assert_eq!(sectors, (0..20).filter(|sector| sector % 2 == 1).chain([20]).collect::<Vec<_>>());
    let data = bench.disk.data.lock().unwrap().clone();
    assert!(sectors.iter().all(|sector| data[*sector as usize * 512] == *sector as u8 + 1));
    assert!(frontend.is_alive());
    // All is done: a third server finds nothing to do again.
    drop(frontend);
    eventually("the front-end is gone", || !server.status().connected);
    let before = bench.disk.transfers().len();
    let _frontend = machine.again(&path);
    machine.write(0, 5);
    machine.queue.kick();
    machine.queue.wait(&machine.guest, 1);
    assert_eq!(bench.disk.transfers().len(), before + 1);
}

#[test]
fn a_crash_between_publishing_and_clearing_is_mended() {
    let bench = Bench::new();
    let (machine, frontend) = Machine::new(&bench.path);
    // Around the point where indices wrap. Heads 9 and 3 were published as a batch, 9 first; 0 and 6 were not; the
    // counters say that 6 was taken before 0.
    let used = 1u16;
    machine.guest.u16(machine.queue.used_ring() + 2).store(used, SeqCst);
    machine.guest.u16(machine.queue.available_ring() + 2).store(used + 2, SeqCst);
    machine.queue.set_position(used + 2, used);
    for (head, counter) in [(9, 100), (6, 101), (3, 102), (0, 103)] {
        machine.write(head, head.into());
        machine.mark(head, counter);
    }
    machine.guest.u16(machine.queue.available_ring() + 2).store(used + 2, SeqCst);
    machine.region.u16(16 + 16 * 3 + 6).store(9, SeqCst);
    machine.set_header([1, SIZE, 3, used.wrapping_sub(2)]);
    machine.start(&frontend, used.into());
    assert_eq!(machine.queue.wait(&machine.guest, 2), [(6, 1), (0, 1)]);
    let sectors: Vec<u64> = bench.disk.transfers().iter().map(|asked| asked.offset / 512).collect();
    assert_eq!(sectors, [6, 0]);
    assert_eq!(frontend.stop(0), Some(3));
    assert!(machine.in_flight().is_empty());
    assert_eq!(machine.region.u16(14).load(SeqCst), 3);
}

#[test]
fn a_region_that_contradicts_its_ring_starts_nothing() {
    let bench = Bench::new();
    // More published than the ring holds; a batch that names a head that is not there.
    for (header, base) in [([1, SIZE, 0, 1000], 7u32), ([1, SIZE, 99, 65535], 0)] {
        let (machine, frontend) = Machine::new(&bench.path);
        machine.set_header(header);
        machine.start(&frontend, base);
        let error = bench.server().status().error.unwrap();
        assert!(error.contains("in-flight region"), "{error}");
        assert!(!bench.server().status().started);
        assert!(bench.disk.transfers().is_empty());
    }
}

#[test]
fn a_region_of_a_guest_that_has_begun_anew_is_cleared() {
    let bench = Bench::new();
    let (machine, frontend) = Machine::new(&bench.path);
    machine.set_header([1, SIZE, 0, 1000]);
    machine.mark(5, 1);
    machine.start(&frontend, 0);
    machine.write(0, 1);
    machine.queue.kick();
    assert_eq!(machine.queue.wait(&machine.guest, 1), [(0, 1)]);
    assert_eq!(bench.disk.transfers().len(), 1);
}

#[test]
fn regions_of_the_wrong_size_are_refused() {
    let bench = Bench::new();
    let file = Guest::new(0, 1 << 16);
    let len = 1 << 16;
    for bad in [description(100, 0, 1, 64), description(len, 0, 200, 64), description(len, 0, 1, 8192)] {
        let frontend = Frontend::connect(&bench.path);
        frontend.negotiate(FEATURES);
        assert_eq!(frontend.tell(code::SET_INFLIGHT_FD, &bad, &[file.file.as_fd()]), Some(false));
        assert!(!frontend.is_alive());
    }
    let frontend = Frontend::connect(&bench.path);
    frontend.negotiate(FEATURES);
    assert!(frontend.ask(code::GET_INFLIGHT_FD, &description(0, 0, 1, 8192)).is_none());
}

#[test]
fn what_a_leaving_front_end_leaves_is_done_when_it_comes_back() {
    let bench = Bench::new();
    let (machine, frontend) = Machine::new(&bench.path);
    machine.start(&frontend, 0);
    assert_eq!(frontend.set_config(32, &[0]), Some(true));
    bench.disk.hold.store(true, SeqCst);
    [(0, 1), (3, 2)].into_iter().for_each(|(head, sector)| machine.write(head, sector));
    machine.queue.kick();
    eventually("two writes wait", || bench.disk.transfers().len() == 2);
    drop(frontend);
    eventually("the front-end is gone", || !bench.server().status().connected);
    assert_eq!(bench.disk.sessions.load(SeqCst), 0);
    assert_eq!(machine.queue.completed(&machine.guest), []);
    assert_eq!(machine.in_flight(), [0, 3]);
    bench.disk.hold.store(false, SeqCst);
    let frontend = machine.again(&bench.path);
    assert_eq!(machine.queue.wait(&machine.guest, 2), [(0, 1), (3, 1)]);
    // The guest had switched the cache off, and has not been told of any change.
    assert_eq!(frontend.config(32, 1), [0]);
    assert!(bench.disk.transfers().iter().all(|asked| asked.fua));
}

#[test]
fn the_next_server_waits_for_the_lease_before_it_repeats_anything() {
    let bench = Bench::new();
    let (machine, frontend) = Machine::new(&bench.path);
    machine.write(0, 1);
    machine.mark(0, 5);
    machine.set_header([1, SIZE, 0, 0]);
    bench.disk.busy.store(true, SeqCst);
    machine.start(&frontend, 0);
    assert!(frontend.is_alive());
    assert!(!is_readable(&machine.queue.call, 0) && bench.disk.transfers().is_empty());
    bench.disk.busy.store(false, SeqCst);
    assert_eq!(machine.queue.wait(&machine.guest, 1), [(0, 1)]);
    assert_eq!(bench.disk.transfers().len(), 1);
    drop(frontend);
}

#[test]
fn what_the_storage_does_not_give_back_is_not_done_a_second_time_before_it_has() {
    let mut bench = Bench::new();
    let (machine, frontend) = Machine::new(&bench.path);
    machine.start(&frontend, 0);
    bench.disk.stuck.store(true, SeqCst);
    bench.disk.hold.store(true, SeqCst);
    machine.write(0, 1);
    machine.queue.kick();
    eventually("a write is in the storage", || bench.disk.transfers().len() == 1);
    // Not to be stopped: there is no answer, and the connection ends.
    assert_eq!(frontend.stop(0), None);
    eventually("the connection has ended", || !bench.server().status().connected);
    assert_eq!(bench.disk.sessions.load(SeqCst), 1);

    let frontend = machine.again(&bench.path);
    let error = bench.server().status().error.unwrap();
    assert!(error.contains("an earlier connection"), "{error}");
    machine.write(3, 2);
    machine.queue.kick();
    assert!(frontend.is_alive());
    assert_eq!(bench.disk.transfers().len(), 1);
    // It lands, and is complete; the rest follows.
    bench.disk.hold.store(false, SeqCst);
    let mut done = machine.queue.wait(&machine.guest, 2);
    done.sort_unstable();
    assert_eq!(done, [(0, 1), (3, 1)]);
    drop(frontend);

    bench.disk.hold.store(true, SeqCst);
    let frontend = machine.again(&bench.path);
    machine.write(0, 1);
    machine.queue.kick();
    eventually("another is in the storage", || bench.disk.transfers().len() == 3);
    assert!(!bench.server.take().unwrap().stop(std::time::Duration::from_millis(50)));
    drop(frontend);
    bench.disk.hold.store(false, SeqCst);
    eventually("it has landed", || bench.disk.sessions.load(SeqCst) == 0);
}
