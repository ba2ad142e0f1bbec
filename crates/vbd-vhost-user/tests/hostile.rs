//! Guests that break the rules: each loses its own queue, and a neighbour on the same reactors does not notice.

mod common;

use common::frontend::{EVENT_INDEX, INDIRECT, Machine, NEXT, Queue, TABLE, WRITE, put_descriptor};
use common::{Bench, options};
use vbd_testing::MemDisk;

const OUT: u32 = 1;

/// Runs a guest that does something forbidden; checks that its queue is given up, that nothing came back, that a
/// neighbour is well, and that the guest's next life is.
fn breaks(mischief: impl Fn(&Machine)) {
    let bench = Bench::new();
    let neighbour = MemDisk::new(1 << 20);
    let _server = bench.serve("neighbour", neighbour, options());
    let good = Machine::start(&bench.dir.path().join("neighbour"), EVENT_INDEX);
    for features in [INDIRECT | EVENT_INDEX, INDIRECT] {
        let bad = Machine::start(&bench.path, features);
        assert_eq!(bad.round(OUT, 0, 512), 0);
        mischief(&bad);
        bad.queue.kick();
        bad.queue.wait_broken();
        let said = bench.server().status().error.unwrap();
        assert!(said.starts_with("queue 0 is given up: "), "{said}");
        assert_eq!(bad.queue.completed(&bad.guest), []);
        assert_eq!(good.round(OUT, 1, 512), 0);
        // The front-end can stop it, and is told no nonsense.
        assert!(bad.frontend.stop(0).is_some());
        drop(bad);
        let reborn = Machine::start(&bench.path, features);
        assert_eq!(reborn.round(OUT, 2, 512), 0);
    }
}

fn header(machine: &Machine) -> u64 {
    let header = machine.queue.data() + 0x9000;
    machine.guest.u32(header).store(OUT, std::sync::atomic::Ordering::SeqCst);
    header
}

#[test]
fn a_loop() {
    breaks(|m| {
        m.queue.describe(&m.guest, 1, header(m), 16, NEXT, 2);
        m.queue.describe(&m.guest, 2, m.queue.data(), 512, NEXT, 1);
        m.queue.offer(&m.guest, 1);
    });
}

#[test]
fn a_descriptor_that_is_its_own_successor() {
    breaks(|m| {
        m.queue.describe(&m.guest, 1, header(m), 16, NEXT | WRITE, 1);
        m.queue.offer(&m.guest, 1);
    });
}

#[test]
fn a_head_outside_of_the_table() {
    breaks(|m| m.queue.offer(&m.guest, 64));
    breaks(|m| m.queue.offer(&m.guest, 0xffff));
}

#[test]
fn a_successor_outside_of_the_table() {
    breaks(|m| {
        m.queue.describe(&m.guest, 1, header(m), 16, NEXT, 64);
        m.queue.offer(&m.guest, 1);
    });
}

#[test]
fn addresses_outside_of_memory() {
    let end = |m: &Machine| m.guest.at + m.guest.len as u64;
    let with_data = |m: &Machine, address: u64, len: u32| {
        m.queue.request(&m.guest, 1, OUT, 0, address, len);
    };
    breaks(|m| with_data(m, 0, 512));
    breaks(|m| with_data(m, m.guest.at - 1, 512));
    breaks(|m| with_data(m, end(m) - 511, 512));
    breaks(|m| with_data(m, end(m), 512));
    breaks(|m| with_data(m, u64::MAX - 255, 512));
    breaks(|m| with_data(m, m.queue.data(), u32::MAX));
    // The header and the status byte, too.
    breaks(|m| {
        m.queue.describe(&m.guest, 1, end(m) - 8, 16, NEXT, 2);
        m.queue.describe(&m.guest, 2, m.queue.data(), 1, WRITE, 0);
        m.queue.offer(&m.guest, 1);
    });
    breaks(|m| {
        m.queue.describe(&m.guest, 1, header(m), 16, NEXT, 2);
        m.queue.describe(&m.guest, 2, end(m), 1, WRITE, 0);
        m.queue.offer(&m.guest, 1);
    });
}

fn table(m: &Machine, entries: &[(u64, u32, u16, u16)], len: u32, flags: u16) {
    let at = m.queue.data() + 0xa000;
    for (index, (address, len, flags, next)) in entries.iter().enumerate() {
        put_descriptor(&m.guest, at + 16 * index as u64, *address, *len, *flags, *next);
    }
    m.queue.describe(&m.guest, 1, at, len, TABLE | flags, 2);
    m.queue.describe(&m.guest, 2, m.queue.data(), 1, WRITE, 0);
    m.queue.offer(&m.guest, 1);
}

#[test]
fn indirect_tables_that_are_wrong() {
    let (header, status) =
        (|m: &Machine| (header(m), 16, NEXT, 1), |m: &Machine| (m.queue.data(), 1, WRITE, 0));
    // Empty, not a multiple of 16, out of memory, chained.
    breaks(|m| table(m, &[header(m), status(m)], 0, 0));
    breaks(|m| table(m, &[header(m), status(m)], 24, 0));
    breaks(|m| table(m, &[header(m), status(m)], 0xffff_fff0, 0));
    breaks(|m| table(m, &[header(m), status(m)], 32, NEXT));
    // A table in a table, a successor outside of it, a loop in it.
    breaks(|m| table(m, &[header(m), (m.queue.data() + 0xa000, 32, TABLE, 0)], 32, 0));
    breaks(|m| table(m, &[header(m), (m.queue.data(), 512, NEXT, 2)], 32, 0));
    breaks(|m| table(m, &[header(m), (m.queue.data(), 512, NEXT, 1)], 32, 0));
}

#[test]
fn a_chain_longer_than_any_queue() {
    breaks(|m| {
        let entry = |index: u16| (m.queue.data(), 1, NEXT, index + 1);
        let entries: Vec<_> = (0..1000).map(entry).collect();
        table(m, &entries, 16000, 0);
    });
}

#[test]
fn requests_without_header_or_status() {
    breaks(|m| {
        m.queue.describe(&m.guest, 1, header(m), 15, NEXT, 2);
        m.queue.describe(&m.guest, 2, m.queue.data(), 1, WRITE, 0);
        m.queue.offer(&m.guest, 1);
    });
    breaks(|m| {
        m.queue.describe(&m.guest, 1, header(m), 528, 0, 0);
        m.queue.offer(&m.guest, 1);
    });
    // A place for the status of no length.
    breaks(|m| {
        m.queue.describe(&m.guest, 1, header(m), 16, NEXT, 2);
        m.queue.describe(&m.guest, 2, m.queue.data(), 0, WRITE, 0);
        m.queue.offer(&m.guest, 1);
    });
}

#[test]
fn memory_to_read_behind_memory_to_write() {
    breaks(|m| {
        m.queue.describe(&m.guest, 1, header(m), 16, NEXT, 2);
        m.queue.describe(&m.guest, 2, m.queue.data(), 1, WRITE | NEXT, 3);
        m.queue.describe(&m.guest, 3, m.queue.data(), 512, 0, 0);
        m.queue.offer(&m.guest, 1);
    });
}

#[test]
fn an_available_index_that_jumps() {
    breaks(|m| {
        let index = m.guest.u16(m.queue.available_ring() + 2);
        index
            .store(index.load(std::sync::atomic::Ordering::SeqCst) + 65, std::sync::atomic::Ordering::SeqCst);
    });
}

#[test]
fn a_head_that_is_in_flight() {
    let bench = Bench::new();
    let m = Machine::start(&bench.path, EVENT_INDEX);
    bench.disk.hold.store(true, std::sync::atomic::Ordering::SeqCst);
    m.queue.request(&m.guest, 3, OUT, 0, m.queue.data(), 512);
    m.queue.offer(&m.guest, 3);
    m.queue.kick();
    m.queue.wait_broken();
    // The first of the two is served, once.
    bench.disk.hold.store(false, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(m.queue.wait(&m.guest, 1), [(3, 1)]);
    assert_eq!(m.queue.status(&m.guest, 3), 0);
    assert_eq!(bench.disk.transfers().len(), 1);
}

#[test]
fn odd_but_allowed() {
    let bench = Bench::new();
    let m = Machine::start(&bench.path, EVENT_INDEX | INDIRECT);
    let (guest, queue) = (&m.guest, &m.queue);
    // Header in pieces, descriptors without length, data in overlapping pieces, status at the end of a larger piece.
    guest.write(queue.data(), &[7; 1024]);
    let at = header(&m);
    queue.describe(guest, 1, at, 5, NEXT, 2);
    queue.describe(guest, 2, queue.data(), 0, NEXT, 3);
    queue.describe(guest, 3, at + 5, 11, NEXT, 4);
    queue.describe(guest, 4, queue.data(), 512, NEXT, 5);
    queue.describe(guest, 5, queue.data() + 256, 512, NEXT, 6);
    queue.describe(guest, 6, queue.data() + 0x4000, 3, WRITE, 0);
    guest.write(queue.data() + 0x4000, &[9; 3]);
    queue.offer(guest, 1);
    queue.kick();
    assert_eq!(queue.wait(guest, 1), [(1, 1)]);
    assert_eq!(guest.read(queue.data() + 0x4000, 3), [9, 9, 0]);
    assert_eq!(bench.disk.data.lock().unwrap()[..1024], [7; 1024]);
    assert_eq!(bench.disk.transfers()[0].len, 1024);

    // Header and data in one piece.
    let mut bytes = vec![0; 16];
    bytes[0] = 1;
    bytes[8] = 4;
    bytes.extend([3; 512]);
    guest.write(queue.data() + 0x2000, &bytes);
    queue.describe(guest, 9, queue.data() + 0x2000, 528, NEXT, 10);
    queue.describe(guest, 10, queue.data() + 0x4000, 1, WRITE, 0);
    queue.offer(guest, 9);
    queue.kick();
    queue.wait(guest, 1);
    assert_eq!(bench.disk.data.lock().unwrap()[2048..2560], [3; 512]);
}

#[test]
fn requests_that_make_no_sense_fail_and_the_queue_goes_on() {
    let bench = Bench::new();
    let m = Machine::start(&bench.path, EVENT_INDEX);
    assert_eq!(m.round(OUT, 0, 511), 1);
    assert_eq!(m.round(OUT, 0, 0), 1);
    assert_eq!(m.round(0, 0, 513), 1);
    assert_eq!(m.round(OUT, u64::MAX, 512), 1);
    assert_eq!(m.round(OUT, u64::MAX / 512, 512), 1);
    assert_eq!(m.round(OUT, 1 << 20, 512), 1);
    assert_eq!(m.round(2, 0, 512), 2);
    assert_eq!(m.round(0xffff_ffff, 0, 512), 2);
    assert_eq!(m.round(OUT, 0, 512), 0);
}

#[test]
fn rings_where_they_cannot_be() {
    use common::frontend::{Frontend, Guest, code, halves, words};
    let bench = Bench::new();
    let good = |guest: &Guest| Queue::new(guest, 0, 64);
    let cases: [fn(&Guest, &mut Queue); 3] = [
        |_, queue| queue.at += 0x1000_0000,
        |guest, queue| queue.at = guest.at + guest.len as u64 - 0x8010,
        |_, queue| queue.size = 4096,
    ];
    for spoil in cases {
        let guest = Guest::new(0x1_0000_0000, 1 << 20);
        let frontend = Frontend::connect(&bench.path);
        frontend.negotiate(0);
        frontend.share(&guest);
        let mut queue = good(&guest);
        let honest = queue.addresses(&guest, 0);
        let place = queue.at;
        spoil(&guest, &mut queue);
        frontend.must(code::SET_VRING_NUM, &halves(&[0, queue.size.into()]), &[]);
        let shift = queue.at.wrapping_sub(place);
        let mut addresses = halves(&[0, 0]);
        for word in honest[8..32].chunks(8) {
            let word = u64::from_ne_bytes(word.try_into().unwrap());
            addresses.extend(words(&[word.wrapping_add(shift)]));
        }
        addresses.extend(words(&[0]));
        // A table of 4096 entries reaches into the others; that is the guest's own affair, unless it leaves memory.
        frontend.must(code::SET_VRING_ADDR, &addresses, &[]);
        use std::os::fd::AsFd;
        frontend.must(code::SET_VRING_KICK, &words(&[0]), &[queue.kick.as_fd()]);
        frontend.must(code::SET_VRING_ENABLE, &halves(&[0, 1]), &[]);
        let started = bench.server().status().started;
        assert_eq!(started, queue.size == 4096);
        assert_eq!(bench.server().status().error.is_some(), !started);
        assert!(frontend.is_alive());
    }
    // Sizes that no ring has.
    for size in [0, 3, 100, 8192, 65536] {
        let frontend = Frontend::connect(&bench.path);
        frontend.negotiate(0);
        assert_eq!(frontend.tell(code::SET_VRING_NUM, &halves(&[0, size]), &[]), Some(false), "{size}");
        assert!(!frontend.is_alive());
    }
}

#[test]
fn a_ring_cannot_move_while_it_runs() {
    use common::frontend::{code, halves};
    let bench = Bench::new();
    let m = Machine::start(&bench.path, EVENT_INDEX);
    // The same addresses again are no move.
    m.frontend.must(code::SET_VRING_ADDR, &m.queue.addresses(&m.guest, 0), &[]);
    assert_eq!(m.round(OUT, 0, 512), 0);
    let elsewhere = Queue::new(&m.guest, 1, 64);
    let mut addresses = elsewhere.addresses(&m.guest, 0);
    addresses[..4].copy_from_slice(&0u32.to_ne_bytes());
    assert_eq!(m.frontend.tell(code::SET_VRING_ADDR, &addresses, &[]), Some(false));
    assert!(!m.frontend.is_alive());
    for (request, payload) in
        [(code::SET_VRING_NUM, halves(&[0, 32])), (code::SET_VRING_BASE, halves(&[0, 7]))]
    {
        let m = Machine::start(&bench.path, EVENT_INDEX);
        assert_eq!(m.frontend.tell(request, &payload, &[]), Some(false));
        assert!(!m.frontend.is_alive());
    }
}

#[test]
fn an_interrupt_that_cannot_be_delivered_holds_up_nobody() {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    let bench = Bench::new();
    let bad = Machine::start(&bench.path, 0);
    assert_eq!(bad.round(OUT, 0, 512), 0);
    // Full, and a write to it would wait.
    let _ = rustix::io::read(&bad.queue.call, &mut [0; 8]);
    rustix::io::write(&bad.queue.call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let flags = fcntl_getfl(&bad.queue.call).unwrap();
    fcntl_setfl(&bad.queue.call, flags - OFlags::NONBLOCK).unwrap();
    let count = || bad.queue.used_index(&bad.guest);
    let before = count();
    for _ in 0..5 {
        let served = count();
        bad.queue.request(&bad.guest, 0, OUT, 0, bad.queue.data(), 512);
        bad.queue.kick();
        vbd_testing::eventually("the request is served", || count() != served);
    }
    assert_eq!(count(), before + 5);
    // On every reactor, so on the same one too.
    for name in ["first", "second", "third"] {
        let _server = bench.serve(name, MemDisk::new(1 << 20), options());
        let good = Machine::start(&bench.dir.path().join(name), EVENT_INDEX);
        assert_eq!(good.round(OUT, 0, 512), 0);
    }
    rustix::io::read(&bad.queue.call, &mut [0; 8]).unwrap();
}
