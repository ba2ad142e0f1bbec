//! What changes while the device runs: cache mode, size, memory, logs, queues; and how it stops.

#![allow(clippy::cast_possible_truncation, reason = "sizes of tests are small")]

mod common;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use common::frontend::{
    EVENT_INDEX, FLUSH, Frontend, Guest, LOG_ALL, Machine, Queue, code, halves, is_readable, words,
};
use common::{Bench, options};
use vbd_core::{ErrorKind, Operation};
use vbd_testing::eventually;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH_REQUEST: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const ALL: u64 = EVENT_INDEX | FLUSH;

fn segments(machine: &Machine, segments: &[(u64, u32, u32)]) -> u32 {
    for (index, (sector, sectors, flags)) in (0u64..).zip(segments) {
        let at = machine.queue.data() + 16 * index;
        machine.guest.u64(at).store(*sector, SeqCst);
        machine.guest.u32(at + 8).store(*sectors, SeqCst);
        machine.guest.u32(at + 12).store(*flags, SeqCst);
    }
    16 * segments.len() as u32
}

#[test]
fn the_configuration_is_the_disk() {
    let bench = Bench::new();
    let m = Machine::start(&bench.path, ALL);
    let half = |at: u32| u32::from_le_bytes(m.frontend.config(at, 4).try_into().unwrap());
    assert_eq!(m.frontend.capacity(), 1 << 20);
    // The queue has 64 entries, two of which are header and status.
    assert_eq!(half(12), 62);
    assert_eq!(half(20), 512);
    // Eight blocks of 512 in a physical one, the smallest good transfer; the best are 128 of them.
    assert_eq!(m.frontend.config(24, 8), [3, 0, 8, 0, 128, 0, 0, 0]);
    // The cache writes back; 128 queues.
    assert_eq!(m.frontend.config(32, 4), [1, 0, 128, 0]);
    assert_eq!([half(36), half(40), half(44)], [2048, 16, 8]);
    assert_eq!([half(48), half(52), half(56)], [2048, 16, 1]);
    // What is behind it reads as zeroes, for front-ends that know a longer one.
    assert_eq!(m.frontend.config(0, 256)[60..], [0; 196]);
    let queues = m.frontend.ask(code::GET_QUEUE_NUM, &[]).unwrap();
    assert_eq!(queues, words(&[128]));
    let status = bench.server().status();
    assert!(status.connected && status.started && status.error.is_none());
    assert_eq!(status.features & ALL, ALL);
}

#[test]
fn a_read_only_disk_says_so_and_takes_no_writes() {
    let bench = Bench::new();
    bench.disk.read_only.store(true, SeqCst);
    let frontend = Frontend::connect(&bench.path);
    let offered = frontend.negotiate(0);
    assert_ne!(offered & 1 << 5, 0);
    assert_eq!(offered & (1 << 13 | 1 << 14), 0);
}

#[test]
fn discards_and_zeroes_of_many_segments() {
    let bench = Bench::new();
    bench.disk.data.lock().unwrap().fill(1);
    let m = Machine::start(&bench.path, ALL);
    let len = segments(&m, &[(8, 8, 0), (32, 8, 0)]);
    assert_eq!(m.round(DISCARD, 0, len), 0);
    let len = segments(&m, &[(64, 1, 1), (80, 2, 0), (96, 0, 0)]);
    assert_eq!(m.round(WRITE_ZEROES, 0, len), 0);
    let data = bench.disk.data.lock().unwrap().clone();
    for sector in 0..128 {
        let zero = matches!(sector, 8..16 | 32..40 | 64 | 80 | 81);
        assert_eq!(data[sector * 512], u8::from(!zero), "sector {sector}");
    }
    let asked = bench.disk.transfers();
    assert_eq!(asked.iter().filter(|asked| asked.operation == Operation::Discard).count(), 2);
    let unmap: Vec<_> = asked.iter().filter(|asked| asked.may_unmap).map(|asked| asked.offset).collect();
    assert_eq!(unmap, [64 * 512]);

    // A flag that discard does not have, and one that nothing has: nothing of the request is done.
    let before = bench.disk.transfers().len();
    let len = segments(&m, &[(0, 1, 0), (0, 1, 1)]);
    assert_eq!(m.round(DISCARD, 0, len), 2);
    let len = segments(&m, &[(0, 1, 2)]);
    assert_eq!(m.round(WRITE_ZEROES, 0, len), 2);
    // Longer than told, more segments than told, not whole segments, out of all numbers.
    let len = segments(&m, &[(0, 2049, 0)]);
    assert_eq!(m.round(DISCARD, 0, len), 1);
    let len = segments(&m, &[(0, 1, 0); 17]);
    assert_eq!(m.round(DISCARD, 0, len), 1);
    assert_eq!(m.round(DISCARD, 0, 24), 1);
    let len = segments(&m, &[(u64::MAX, 1, 0)]);
    assert_eq!(m.round(WRITE_ZEROES, 0, len), 1);
    assert_eq!(bench.disk.transfers().len(), before);
}

#[test]
fn the_serial_number() {
    let bench = Bench::with(1 << 20, vbd_vhost_user::Options { serial: "vbd-0001".into(), ..options() });
    let m = Machine::start(&bench.path, ALL);
    m.guest.write(m.queue.data(), &[0xff; 24]);
    assert_eq!(m.round(GET_ID, 0, 24), 0);
    assert_eq!(m.guest.read(m.queue.data(), 24), *b"vbd-0001\0\0\0\0\0\0\0\0\0\0\0\0\xff\xff\xff\xff");
}

#[test]
fn every_error_has_its_status() {
    let bench = Bench::new();
    let m = Machine::start(&bench.path, ALL);
    use ErrorKind::*;
    for kind in [Io, NoSpace, OutOfRange, ReadOnly, Unsupported, FlushLost, Cancelled, Busy, Corrupt] {
        *bench.disk.fail.lock().unwrap() = Some(kind);
        let expected = if kind == Unsupported { 2 } else { 1 };
        let len = segments(&m, &[(0, 1, 0), (8, 1, 0)]);
        for (request, len) in [(IN, 512), (OUT, 512), (FLUSH_REQUEST, 0), (DISCARD, len), (WRITE_ZEROES, len)]
        {
            assert_eq!(m.round(request, 0, len), expected, "{kind:?} for {request}");
        }
    }
    *bench.disk.fail.lock().unwrap() = None;
    assert_eq!(m.round(OUT, 0, 512), 0);
}

#[test]
fn writes_are_durable_when_the_cache_is_off() {
    let bench = Bench::new();
    let m = Machine::start(&bench.path, ALL);
    let write = |expected: bool| {
        assert_eq!(m.round(OUT, 0, 512), 0);
        assert_eq!(bench.disk.transfers().last().unwrap().fua, expected);
    };
    write(false);
    assert_eq!(m.frontend.set_config(32, &[0]), Some(true));
    write(true);
    assert_eq!(m.frontend.config(32, 1), [0]);
    for request in [DISCARD, WRITE_ZEROES] {
        let len = segments(&m, &[(0, 1, 0)]);
        assert_eq!(m.round(request, 0, len), 0);
        assert!(bench.disk.transfers().last().unwrap().fua);
    }
    assert_eq!(m.round(IN, 0, 512), 0);
    assert!(!bench.disk.transfers().last().unwrap().fua);
    assert_eq!(m.frontend.set_config(32, &[1]), Some(true));
    write(false);
    // Other fields, and values that it does not have, are refused; the connection goes on.
    for (offset, bytes) in [(0, &[0][..]), (31, &[0, 0]), (32, &[2]), (33, &[0]), (4000, &[0])] {
        assert_eq!(m.frontend.set_config(offset, bytes), Some(false));
    }
    write(false);
    // A reset brings the cache back.
    assert_eq!(m.frontend.set_config(32, &[0]), Some(true));
    m.frontend.must(code::RESET_DEVICE, &[], &[]);
    assert_eq!(m.frontend.config(32, 1), [1]);
    assert!(!bench.server().status().started);
}

#[test]
fn writes_are_durable_for_guests_that_do_not_flush() {
    let bench = Bench::new();
    let m = Machine::start(&bench.path, EVENT_INDEX);
    assert_eq!(m.round(OUT, 0, 512), 0);
    assert!(bench.disk.transfers()[0].fua);

    let bench = Bench::new();
    bench.disk.write_cache.store(false, SeqCst);
    let m = Machine::start(&bench.path, ALL);
    assert_eq!(m.frontend.config(32, 1), [0]);
    assert_eq!(m.round(OUT, 0, 512), 0);
    assert!(bench.disk.transfers()[0].fua);
    assert_eq!(m.frontend.set_config(32, &[1]), Some(false));
}

#[test]
fn the_front_end_hears_that_the_disk_has_grown() {
    let bench = Bench::new();
    let m = Machine::start(&bench.path, ALL);
    let (ours, theirs) = UnixStream::pair().unwrap();
    m.frontend.must(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    drop(theirs);
    bench.disk.grow(2 << 20);
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut message = [0; 12];
    std::io::Read::read_exact(&mut &ours, &mut message).unwrap();
    // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no payload, no answer wanted.
    assert_eq!(message.to_vec(), halves(&[2, 1, 0]));
    assert_eq!(m.frontend.capacity(), 2 << 20);
    assert_eq!(m.round(OUT, 4000, 512), 0);
    // A front-end that does not read holds up nobody.
    (0..10_000).for_each(|_| bench.disk.grow(2 << 20));
    assert_eq!(m.round(OUT, 4000, 512), 0);
}

#[test]
fn written_pages_are_logged() {
    let bench = Bench::new();
    let m = Machine::start(&bench.path, ALL);
    let pages = (m.guest.at + m.guest.len as u64) / 4096;
    let log = Guest::new(0, (pages / 8) as usize);
    let dirty = || {
        let bits = log.read(m.guest.at / 4096 / 8, m.guest.len / 4096 / 8);
        let set = |page: &u64| bits[*page as usize / 8] & 1 << (page % 8) != 0;
        let pages: Vec<u64> = (0..m.guest.len as u64 / 4096).filter(set).collect();
        log.write(m.guest.at / 4096 / 8, &vec![0; bits.len()]);
        pages
    };
    let page = |address: u64| (address - m.guest.at) / 4096;
    assert_eq!(m.round(IN, 0, 512), 0);
    assert_eq!(dirty(), Vec::<u64>::new());

    let answer = {
        m.frontend.send(code::SET_LOG_BASE, 0, &words(&[log.len as u64, 0]), &[log.file.as_fd()]);
        m.frontend.receive()
    };
    assert_eq!(answer.unwrap(), words(&[log.len as u64, 0]));
    let features = bench.server().status().features;
    m.frontend.must(code::SET_FEATURES, &words(&[features | LOG_ALL]), &[]);
    m.frontend.must(code::SET_VRING_ADDR, &m.queue.addresses(&m.guest, m.queue.used_ring()), &[]);

    let (data, status, used) = (m.queue.data(), m.queue.data() + 0x8000, m.queue.used_ring());
    assert_eq!(m.round(OUT, 0, 4096), 0);
    assert_eq!(dirty(), [page(used), page(status)]);
    assert_eq!(m.queue.round(&m.guest, IN, 0, data + 0xf00, 4608), 0);
    assert_eq!(dirty(), [page(used), page(data), page(data) + 1, page(data) + 2, page(status)]);
    assert_eq!(m.queue.round(&m.guest, GET_ID, 0, data + 0x3000, 20), 0);
    assert_eq!(dirty(), [page(used), page(data) + 3, page(status)]);

    // With the log switched off, nothing is logged.
    m.frontend.must(code::SET_FEATURES, &words(&[features]), &[]);
    dirty();
    assert_eq!(m.round(IN, 0, 4096), 0);
    assert_eq!(dirty(), Vec::<u64>::new());
}

#[test]
fn a_log_that_is_too_small_stops_the_queue() {
    let bench = Bench::new();
    let m = Machine::start(&bench.path, ALL);
    let log = Guest::new(0, 4096);
    m.frontend.send(code::SET_LOG_BASE, 0, &words(&[64, 0]), &[log.file.as_fd()]);
    m.frontend.receive().unwrap();
    let features = bench.server().status().features;
    m.frontend.must(code::SET_FEATURES, &words(&[features | LOG_ALL]), &[]);
    m.queue.request(&m.guest, 0, IN, 0, m.queue.data(), 512);
    m.queue.kick();
    m.queue.wait_broken();
}

#[test]
fn a_memory_slot_is_removed_under_a_request() {
    let bench = Bench::new();
    bench.disk.data.lock().unwrap()[..512].fill(5);
    let m = Machine::start(&bench.path, ALL);
    let extra = Guest::new(0x2_0000_0000, 1 << 16);
    m.frontend.share(&extra);
    bench.disk.hold.store(true, SeqCst);
    m.queue.request(&m.guest, 0, IN, 0, extra.at, 512);
    m.queue.kick();
    eventually("the read is under way", || bench.disk.transfers().len() == 1);
    m.frontend.must(code::REM_MEM_REG, &Frontend::region(&extra), &[]);
    bench.disk.hold.store(false, SeqCst);
    // It lands in the memory that it was made for, and the queue goes on.
    m.queue.wait(&m.guest, 1);
    assert_eq!(extra.read(extra.at, 512), [5; 512]);
    assert_eq!(m.round(IN, 0, 512), 0);
    // From now on, that memory is not there.
    m.queue.request(&m.guest, 0, IN, 0, extra.at, 512);
    m.queue.kick();
    m.queue.wait_broken();
}

#[test]
fn the_memory_of_a_running_ring_is_removed_and_comes_back() {
    let bench = Bench::new();
    let m = Machine::start(&bench.path, ALL);
    bench.disk.hold.store(true, SeqCst);
    m.queue.request(&m.guest, 0, OUT, 0, m.queue.data(), 512);
    m.queue.kick();
    eventually("a write is under way", || bench.disk.transfers().len() == 1);
    m.frontend.must(code::REM_MEM_REG, &Frontend::region(&m.guest), &[]);
    // What is in flight ends in the memory that it has, and nothing more is taken.
    m.queue.request(&m.guest, 3, OUT, 1, m.queue.data(), 512);
    m.queue.kick();
    bench.disk.hold.store(false, SeqCst);
    assert_eq!(m.queue.wait(&m.guest, 1), [(0, 1)]);
    assert!(m.frontend.is_alive());
    assert_eq!(bench.disk.transfers().len(), 1);
    m.frontend.share(&m.guest);
    assert_eq!(m.queue.wait(&m.guest, 1), [(3, 1)]);
    // Taken away for good, it can be stopped.
    m.frontend.must(code::REM_MEM_REG, &Frontend::region(&m.guest), &[]);
    assert_eq!(m.frontend.stop(0), Some(2));
}

#[test]
fn slots_that_overlap_or_are_unknown_are_refused() {
    let bench = Bench::new();
    for spoil in [0usize, 1] {
        let m = Machine::start(&bench.path, ALL);
        let other = Guest::new(m.guest.at + 4096, 1 << 16);
        let request = [code::ADD_MEM_REG, code::REM_MEM_REG][spoil];
        let fds = [other.file.as_fd()];
        let answer = m.frontend.tell(request, &Frontend::region(&other), &fds[..1 - spoil]);
        assert_eq!(answer, Some(false));
        assert!(!m.frontend.is_alive());
    }
}

#[test]
fn a_queue_stops_within_a_bound_and_starts_again_where_it_was() {
    let bench = Bench::new();
    let m = Machine::start(&bench.path, ALL);
    assert_eq!(m.round(OUT, 0, 512), 0);
    bench.disk.hold.store(true, SeqCst);
    for head in [0, 3, 6] {
        m.queue.request(&m.guest, head, OUT, 0, m.queue.data(), 512);
    }
    m.queue.kick();
    eventually("three writes wait", || bench.disk.transfers().len() == 4);
    // What waits is failed once the bound is over, and the answer comes after that.
    assert_eq!(m.frontend.stop(0), Some(4));
    assert_eq!(m.queue.completed(&m.guest).len(), 3);
    assert_eq!([0, 3, 6].map(|head| m.queue.status(&m.guest, head)), [1; 3]);
    assert_eq!(bench.disk.sessions.load(SeqCst), 0);
    assert!(!bench.server().status().started);
    // Nothing more is taken.
    bench.disk.hold.store(false, SeqCst);
    m.queue.request(&m.guest, 0, OUT, 7, m.queue.data(), 512);
    m.queue.kick();
    assert_eq!(m.frontend.stop(0), Some(4));
    assert_eq!(m.queue.completed(&m.guest), []);
    // What was made available in the meantime is served when it starts again, without a kick.
    assert_eq!(m.frontend.start_at(&m.queue, &m.guest, 4), Some(true));
    assert_eq!(m.queue.wait(&m.guest, 1), [(0, 1)]);
    assert_eq!(bench.disk.transfers().last().unwrap().offset, 7 * 512);
}

#[test]
fn a_disabled_queue_waits() {
    let bench = Bench::new();
    let m = Machine::start(&bench.path, ALL);
    m.frontend.must(code::SET_VRING_ENABLE, &halves(&[0, 0]), &[]);
    m.queue.request(&m.guest, 0, OUT, 0, m.queue.data(), 512);
    m.queue.kick();
    assert!(m.frontend.is_alive());
    assert_eq!(m.queue.completed(&m.guest), []);
    m.frontend.must(code::SET_VRING_ENABLE, &halves(&[0, 1]), &[]);
    m.queue.wait(&m.guest, 1);
}

#[test]
fn eventfds_are_replaced_while_the_queue_runs() {
    let bench = Bench::new();
    let mut m = Machine::start(&bench.path, ALL);
    let other = Queue::new(&m.guest, 0, 64);
    let index = words(&[0]);
    m.frontend.must(code::SET_VRING_KICK, &index, &[other.kick.as_fd()]);
    m.frontend.must(code::SET_VRING_CALL, &index, &[other.call.as_fd()]);
    // A driver may have missed an interrupt on the old one.
    assert!(is_readable(&other.call, 20));
    (m.queue.kick, m.queue.call) = (other.kick, other.call);
    assert_eq!(m.round(OUT, 0, 512), 0);
}

#[test]
fn descriptors_that_are_no_eventfds() {
    let bench = Bench::new();
    for request in [code::SET_VRING_KICK, code::SET_VRING_CALL, code::SET_VRING_ERR] {
        let m = Machine::start(&bench.path, ALL);
        let (_ours, theirs) = UnixStream::pair().unwrap();
        assert_eq!(m.frontend.tell(request, &words(&[0]), &[theirs.as_fd()]), Some(false));
        assert!(!m.frontend.is_alive());
    }
    // Of the same kind at first sight, and able to hold anything.
    let m = Machine::start(&bench.path, ALL);
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    assert_eq!(m.frontend.tell(code::SET_VRING_KICK, &words(&[0]), &[epoll.as_fd()]), Some(false));
}

#[test]
fn the_lease_is_taken_when_the_device_starts_and_waits_for_its_holder() {
    let bench = Bench::new();
    let open = || bench.disk.sessions.load(SeqCst);
    bench.disk.busy.store(true, SeqCst);
    let guest = Guest::new(0x1_0000_0000, 1 << 20);
    let frontend = Frontend::connect(&bench.path);
    frontend.negotiate(ALL);
    frontend.share(&guest);
    assert_eq!(frontend.capacity(), 1 << 20);
    let queue = Queue::new(&guest, 0, 64);
    queue.request(&guest, 0, OUT, 0, queue.data(), 512);
    assert_eq!(frontend.start(&queue, &guest), Some(true));
    assert_eq!(bench.disk.opened.load(SeqCst), 0);
    assert!(bench.server().status().error.unwrap().contains("somebody else"));
    // The front-end is answered while the disk is waited for, and the guest's request is served when it is there.
    assert!(frontend.is_alive());
    bench.disk.busy.store(false, SeqCst);
    assert_eq!(queue.wait(&guest, 1), [(0, 1)]);
    assert_eq!(open(), 1);
    assert_eq!(bench.server().status().error, None);
    drop(frontend);
    eventually("the lease is given back", || open() == 0 && !bench.server().status().connected);
}

#[test]
fn many_queues_share_one_session() {
    let bench = Bench::new();
    let guest = Guest::new(0x1_0000_0000, 4 << 20);
    let frontend = Frontend::connect(&bench.path);
    frontend.negotiate(ALL);
    frontend.share(&guest);
    let indices = [0, 1, 2, 3, 17];
    let queues = indices.map(|index| Queue::new(&guest, index, 16 << (index % 4)));
    for queue in &queues {
        assert_eq!(frontend.start(queue, &guest), Some(true));
    }
    for (sector, queue) in (0..).zip(&queues) {
        guest.write(queue.data(), &[sector + 1; 512]);
        queue.request(&guest, 0, OUT, sector.into(), queue.data(), 512);
        queue.kick();
    }
    for queue in &queues {
        assert_eq!(queue.wait(&guest, 1), [(0, 1)]);
    }
    let data = bench.disk.data.lock().unwrap().clone();
    assert!((0..5).all(|sector| data[sector * 512] == sector as u8 + 1));
    assert_eq!(bench.disk.opened.load(SeqCst), 1);
    // The disk is given back with the last of them.
    for (index, left) in indices.iter().zip((0..5).rev()) {
        assert_eq!(frontend.stop(*index), Some(1));
        assert_eq!(bench.disk.sessions.load(SeqCst), usize::from(left > 0));
    }
    // One too many.
    assert_eq!(frontend.tell(code::SET_VRING_NUM, &halves(&[128, 64]), &[]), Some(false));
}

#[test]
fn a_server_stops_clean() {
    let mut bench = Bench::new();
    let m = Machine::start(&bench.path, ALL);
    bench.disk.hold.store(true, SeqCst);
    m.queue.request(&m.guest, 0, OUT, 0, m.queue.data(), 512);
    m.queue.kick();
    eventually("a write waits", || bench.disk.transfers().len() == 1);
    let server = bench.server.take().unwrap();
    let path = bench.path.clone();
    let disk = bench.disk.clone();
    let release = std::thread::spawn(move || {
        // While the server stops, which it shows by the path that is gone.
        eventually("the socket is removed", || !path.exists());
        disk.hold.store(false, SeqCst);
    });
    assert!(server.stop(Duration::from_secs(20)));
    release.join().unwrap();
    assert_eq!(m.queue.wait(&m.guest, 1), [(0, 1)]);
    assert!(!m.frontend.is_alive());
    assert_eq!(bench.disk.asked.lock().unwrap().last().unwrap().operation, Operation::Flush);
    assert_eq!(bench.disk.sessions.load(SeqCst), 0);
}

#[test]
fn a_server_with_parked_requests_stops_within_its_bound() {
    let mut bench = Bench::new();
    let m = Machine::start(&bench.path, ALL);
    bench.disk.hold.store(true, SeqCst);
    m.queue.request(&m.guest, 0, OUT, 0, m.queue.data(), 512);
    m.queue.kick();
    eventually("a write waits", || bench.disk.transfers().len() == 1);
    assert!(bench.server.take().unwrap().stop(Duration::from_millis(50)));
    // The guest sees a pause and no error: who serves the ring next takes the request again.
    assert_eq!(m.queue.completed(&m.guest), []);
    assert_eq!(m.queue.status(&m.guest, 0), 0xff);
    assert_eq!(bench.disk.sessions.load(SeqCst), 0);
}

#[test]
fn an_unconnected_server_stops_and_half_a_message_holds_up_nobody() {
    let mut bench = Bench::new();
    let second = bench.serve("second", vbd_testing::MemDisk::new(1 << 20), options());
    let half = Frontend::connect(&bench.path);
    std::io::Write::write_all(&mut &half.socket, &halves(&[1, 1])).unwrap();
    let m = Machine::start(&bench.dir.path().join("second"), ALL);
    assert_eq!(m.round(OUT, 0, 512), 0);
    // The rest comes, and is answered; another half is there when the server stops.
    std::io::Write::write_all(&mut &half.socket, &halves(&[0])).unwrap();
    assert!(half.receive().is_some());
    std::io::Write::write_all(&mut &half.socket, &halves(&[1, 1])).unwrap();
    assert!(bench.server.take().unwrap().stop(Duration::from_secs(5)));
    drop(m);
    assert!(second.stop(Duration::from_secs(5)));
}
