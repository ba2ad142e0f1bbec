//! Every kind of request, in every shape of ring, wherever its data is put.

#![allow(clippy::cast_possible_truncation, reason = "sizes of tests are small")]

mod common;

use std::sync::atomic::Ordering;

use common::frontend::*;
use common::{Bench, ID};
use proptest::prelude::*;
use vbd_core::{ErrorKind, Operation};
use vbd_testing::eventually;

fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    for narrow in [false, true] {
        for order in [0, 1, 4] {
            for queues in [1, 3] {
                for persistent in [false, true] {
                    shapes.push(Shape { narrow, order, queues, persistent });
                }
            }
        }
    }
    shapes
}

#[test]
fn data_arrives_in_every_shape() {
    for shape in shapes() {
        for direct in [true, false] {
            let bench = Bench::with(1 << 20, direct, |_| {});
            let mut front = Frontend::connected(&bench.hypervisor, ID, shape);
            for ring in 0..shape.queues {
                let data = pattern(ring as u32 + 1, 20 * 4096 + 512);
                front.write(ring, 100 * ring as u64 + 3, &data);
                assert!(
                    front.read(ring, 100 * ring as u64 + 3, data.len()) == data,
                    "{shape:?} direct {direct}"
                );
                let at = (100 * ring + 3) * 512;
                assert!(
                    bench.disk.data.lock().unwrap()[at..at + data.len()] == data,
                    "{shape:?} direct {direct}"
                );
            }
            eventually("it is shown as connected", || bench.status().connected);
            let status = bench.status();
            assert_eq!(usize::from(status.queues), shape.queues);
            assert_eq!(status.ring_pages, 1 << shape.order);
            assert_eq!(status.abi, if shape.narrow { "x86_32-abi" } else { "x86_64-abi" });
            assert_eq!(status.features.contains(&"feature-persistent"), shape.persistent && direct);
            assert_eq!(status.grants_persistent > 0, shape.persistent && direct);
            drop(bench.server);
            assert_eq!(bench.hypervisor.mapped(), 0, "everything is unmapped");
        }
    }
}

#[test]
fn many_requests_at_once_are_all_answered() {
    for shape in [PLAIN, Shape { order: 2, narrow: true, queues: 2, persistent: true }] {
        let bench = Bench::new();
        let mut front = Frontend::connected(&bench.hypervisor, ID, shape);
        let data = pattern(9, 4096);
        let segments = front.fill(&data);
        for round in 0..20u64 {
            let entries = front.rings[0].entries;
            let ids: Vec<_> = (0..entries).map(|_| front.fresh_id()).collect();
            for (index, id) in ids.iter().enumerate() {
                front.put(0, WRITE, *id, (round * 7 + index as u64 * 8) % 2000, &segments);
            }
            front.push(0);
            for id in ids {
                assert_eq!(front.wait(0, id), OK);
            }
            assert!(front.answers.is_empty());
        }
    }
}

#[test]
fn parts_of_pages() {
    for shape in [PLAIN, Shape { persistent: true, ..PLAIN }] {
        let bench = Bench::new();
        let mut front = Frontend::connected(&bench.hypervisor, ID, shape);
        let (first, second) = (front.page(true), front.page(true));
        let data = pattern(5, 4096);
        front.bytes(first).copy_from_slice(&data);
        // Sectors 2 to 4 of one page, and 7 of the same.
        let segments = [(first.reference, 2, 4), (first.reference, 7, 7)];
        assert_eq!(front.ask(0, WRITE, 10, &segments), OK);
        let expected = [&data[1024..2560], &data[3584..]].concat();
        assert_eq!(bench.disk.data.lock().unwrap()[5120..5120 + 2048], expected);
        assert_eq!(front.ask(0, READ, 10, &[(second.reference, 1, 4)]), OK);
        assert_eq!(front.bytes(second)[512..2560], expected);
        assert!(front.bytes(second)[2560..].iter().chain(&front.bytes(second)[..512]).all(|byte| *byte == 0));
    }
}

#[test]
fn indirect_requests() {
    for (persistent, direct) in [(false, true), (true, true), (false, false)] {
        let bench = Bench::with(4 << 20, direct, |_| {});
        let mut front = Frontend::connected(&bench.hypervisor, ID, Shape { persistent, ..PLAIN });
        for pages in [1, 12, 33, 200, 256] {
            let data = pattern(pages as u32, pages * 4096);
            let segments = front.fill(&data);
            let id = front.put_indirect(0, WRITE, 64, &segments);
            front.push(0);
            assert_eq!(front.wait(0, id), OK, "{pages} pages");
            assert!(bench.disk.data.lock().unwrap()[64 * 512..][..data.len()] == data);
            let into: Vec<_> = (0..pages).map(|_| front.page(true)).collect();
            let segments: Vec<_> = into.iter().map(|page| (page.reference, 0, 7)).collect();
            let id = front.put_indirect(0, READ, 64, &segments);
            front.push(0);
            assert_eq!(front.wait(0, id), OK, "{pages} pages");
            let read: Vec<u8> = into.iter().flat_map(|page| front.bytes(*page).to_vec()).collect();
            assert!(read == data, "{pages} pages");
        }
        // More than was offered, none, and one within another.
        let segments = front.fill(&pattern(1, 257 * 4096));
        for (write, segments) in [(WRITE, &segments[..]), (READ, &[]), (INDIRECT, &segments[..1])] {
            let id = front.put_indirect(0, write, 0, segments);
            front.push(0);
            assert_eq!(front.wait(0, id), ERROR);
        }
    }
}

#[test]
fn flushes_barriers_and_their_data() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    assert_eq!(front.ask(0, FLUSH, 0, &[]), OK);
    assert_eq!(front.ask(0, BARRIER, 0, &[]), OK);
    let data = pattern(3, 4096);
    let segments = front.fill(&data);
    for operation in [FLUSH, BARRIER] {
        bench.disk.asked.lock().unwrap().clear();
        assert_eq!(front.ask(0, operation, 8, &segments), OK);
        let asked = bench.disk.asked.lock().unwrap().clone();
        let seen: Vec<_> = asked.iter().map(|asked| (asked.operation, asked.fua)).collect();
        assert_eq!(seen, [(Operation::Flush, false), (Operation::Write, true)]);
    }
    assert_eq!(bench.disk.data.lock().unwrap()[4096..8192], data);
}

#[test]
fn a_barrier_waits_for_what_is_before_it_and_holds_what_is_after() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    let segments = front.fill(&pattern(3, 4096));
    bench.disk.hold_odd.store(true, Ordering::SeqCst);
    let ids = [1u64, 2, 3].map(|_| front.fresh_id());
    front.put(0, WRITE, ids[0], 1, &segments);
    front.put(0, BARRIER, ids[1], 16, &segments);
    front.put(0, WRITE, ids[2], 32, &segments);
    front.push(0);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(bench.disk.asked.lock().unwrap().len(), 1, "only the first");
    bench.disk.hold_odd.store(false, Ordering::SeqCst);
    for id in ids {
        assert_eq!(front.wait(0, id), OK);
    }
    let asked = bench.disk.asked.lock().unwrap().clone();
    let order: Vec<_> = asked.iter().map(|asked| (asked.operation, asked.offset / 512)).collect();
    assert_eq!(
        order,
        [(Operation::Write, 1), (Operation::Flush, 0), (Operation::Write, 16), (Operation::Write, 32)]
    );
}

#[test]
fn discards() {
    let bench = Bench::with(4 << 20, true, |_| {});
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    front.write(0, 0, &pattern(1, 4096));
    assert_eq!(front.discard(0, 0, 8, 0), OK);
    assert!(bench.disk.data.lock().unwrap()[..4096].iter().all(|byte| *byte == 0));
    // The disk takes a mebibyte at a time.
    bench.disk.asked.lock().unwrap().clear();
    assert_eq!(front.discard(0, 8, 6000, 0), OK);
    let lens: Vec<_> = bench.disk.asked.lock().unwrap().iter().map(|asked| asked.len / 512).collect();
    assert_eq!(lens, [2048, 2048, 1904]);
    assert_eq!(front.discard(0, 0, 8, 1), UNSUPPORTED, "nobody can promise that");
    assert_eq!(front.discard(0, 8000, 1000, 0), ERROR);
    assert_eq!(front.discard(0, u64::MAX / 512, u64::MAX / 512, 0), ERROR);
    assert_eq!(front.discard(0, 0, 0, 0), OK);
    assert_eq!(bench.back("discard-secure").as_deref(), Some("0"));
    assert_eq!(bench.back("discard-granularity").as_deref(), Some("4096"));
}

#[test]
fn what_is_not_known_is_unsupported() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    for operation in [4, 7, 255] {
        assert_eq!(front.ask(0, operation, 0, &[]), UNSUPPORTED);
    }
    assert_eq!(front.ask(0, READ, 0, &[]), ERROR, "a read of nothing");
}

#[test]
fn read_only_disks() {
    let bench = Bench::new();
    create(&bench.hypervisor, ID, &[("mode", "r")]);
    let mut front = Frontend::new(&bench.hypervisor, ID, PLAIN);
    front.wait_back("2");
    front.connect();
    assert_eq!(bench.back("info").as_deref(), Some("4"));
    assert_eq!(bench.back("feature-discard").as_deref(), Some("0"));
    let segments = front.fill(&pattern(1, 4096));
    assert_eq!(front.ask(0, WRITE, 0, &segments), ERROR);
    assert_eq!(front.discard(0, 0, 8, 0), UNSUPPORTED);
    assert_eq!(front.ask(0, FLUSH, 0, &[]), OK);
    assert_eq!(front.read(0, 0, 4096), [0; 4096]);
    assert!(bench.disk.transfers().iter().all(|asked| asked.operation == Operation::Read));
}

#[test]
fn the_storage_fails() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    let segments = front.fill(&pattern(1, 4096));
    for kind in [ErrorKind::Io, ErrorKind::NoSpace, ErrorKind::FlushLost] {
        *bench.disk.fail.lock().unwrap() = Some(kind);
        assert_eq!(front.ask(0, WRITE, 0, &segments), ERROR);
        assert_eq!(front.ask(0, FLUSH, 0, &[]), ERROR);
        assert_eq!(front.ask(0, FLUSH, 0, &segments), ERROR);
    }
    *bench.disk.fail.lock().unwrap() = None;
    assert_eq!(front.ask(0, WRITE, 0, &segments), OK);
    assert_eq!(bench.status().errors, 9);
}

#[test]
fn without_a_write_cache_every_write_is_durable() {
    let bench = Bench::new();
    bench.disk.write_cache.store(false, Ordering::SeqCst);
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    assert_eq!(bench.back("feature-flush-cache").as_deref(), Some("0"));
    front.write(0, 0, &pattern(1, 512));
    assert!(bench.disk.asked.lock().unwrap().iter().all(|asked| asked.fua));
}

#[test]
fn persistent_pages_are_mapped_once_and_bounded() {
    let bench = Bench::with(1 << 20, true, |options| options.persistent_grants = 16);
    let mut front = Frontend::connected(&bench.hypervisor, ID, Shape { persistent: true, ..PLAIN });
    let segments = front.fill(&pattern(1, 8 * 4096));
    front.ask(0, WRITE, 0, &segments);
    let before = bench.hypervisor.maps();
    for _ in 0..50 {
        assert_eq!(front.ask(0, WRITE, 0, &segments), OK);
    }
    assert_eq!((bench.hypervisor.maps(), bench.hypervisor.copies()), (before, 0));
    // Others push out what was used longest ago.
    for round in 0..20 {
        let data = pattern(round, 3 * 4096);
        front.write(0, 100, &data);
        assert!(front.read(0, 100, data.len()) == data);
        assert!(bench.status().grants_persistent <= 16);
        assert!(bench.hypervisor.mapped() <= 17);
    }
    // More than may stay mapped, in one request.
    let data = pattern(77, 40 * 4096);
    let segments = front.fill(&data);
    let id = front.put_indirect(0, WRITE, 0, &segments);
    front.push(0);
    assert_eq!(front.wait(0, id), OK);
    assert!(bench.disk.data.lock().unwrap()[..data.len()] == data);
    assert!(bench.hypervisor.mapped() <= 17);
}

/// A request that waits for own pages gets them, also where those before it are answered in the turn in which it began
/// to wait.
#[test]
fn a_request_that_waits_for_pages_is_not_forgotten() {
    let bench = Bench::with(8 << 20, false, |_| {});
    let mut front = Frontend::connected(&bench.hypervisor, ID, Shape { order: 2, ..PLAIN });
    let requests: Vec<_> = (0..6)
        .map(|number| {
            // Four of them are more than there is room for.
            let data = pattern(number, 256 * 4096);
            let segments = front.fill(&data);
            (front.put_indirect(0, WRITE, u64::from(number) * 2048, &segments), data)
        })
        .collect();
    front.push(0);
    for (number, (id, data)) in requests.into_iter().enumerate() {
        assert_eq!(front.wait(0, id), OK);
        assert!(bench.disk.data.lock().unwrap()[number << 20..][..data.len()] == data);
    }
}

/// Pages that the kernel does not give back are counted as mapped until the device has closed, and nothing else is wrong.
#[test]
fn pages_that_cannot_be_unmapped_go_with_the_device() {
    let bench = Bench::with(1 << 20, true, |options| options.persistent_grants = 8);
    let mut front = Frontend::connected(&bench.hypervisor, ID, Shape { persistent: true, ..PLAIN });
    let mut write = |seed| {
        let data = pattern(seed, 5 * 4096);
        let segments = front.fill(&data);
        assert_eq!(front.ask(0, WRITE, 0, &segments), OK);
        assert!(bench.disk.data.lock().unwrap()[..data.len()] == data);
    };
    write(1);
    // The next pages push those out, in vain.
    bench.hypervisor.fail_unmaps(1);
    write(2);
    assert_eq!((bench.hypervisor.mapped(), bench.status().grants_mapped), (11, 11));
    assert_eq!(bench.status().grants_persistent, 5);
    write(3);
    assert_eq!((bench.hypervisor.mapped(), bench.status().grants_mapped), (11, 11));
    // The ring, too.
    bench.hypervisor.fail_unmaps(100);
    front.state("5");
    front.wait_back("5");
    front.state("6");
    front.wait_back("6");
    assert_eq!(bench.hypervisor.mapped(), 0);
    assert_eq!(bench.status().grants_mapped, 0);
}

/// One request of the model: a read or a write, with so many segments of so many sectors.
#[derive(Clone, Debug)]
enum Step {
    Write { sector: u16, segments: Vec<(u8, u8)>, seed: u32 },
    Read { sector: u16, segments: Vec<(u8, u8)> },
    Discard { sector: u16, sectors: u16 },
    Flush,
}

fn segments() -> impl Strategy<Value = Vec<(u8, u8)>> {
    let segment = (0u8..8, 0u8..8).prop_map(|(a, b)| (a.min(b), a.max(b)));
    prop::collection::vec(prop_oneof![1 => Just((0, 7)), 1 => segment], 1..40)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u16..1000, segments(), any::<u32>()).prop_map(|(sector, segments, seed)| Step::Write { sector, segments, seed }),
        4 => (0u16..1000, segments()).prop_map(|(sector, segments)| Step::Read { sector, segments }),
        1 => (0u16..1000, 1u16..300).prop_map(|(sector, sectors)| Step::Discard { sector, sectors }),
        1 => Just(Step::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn the_disk_is_what_was_written(
        steps in prop::collection::vec(step(), 1..40),
        narrow in any::<bool>(), persistent in any::<bool>(), direct in any::<bool>(),
        most in prop_oneof![Just(1056u32), Just(24)],
    ) {
        let size = 1 << 20;
        let bench = Bench::with(size, direct, |options| options.persistent_grants = most);
        let mut front = Frontend::connected(&bench.hypervisor, ID, Shape { narrow, persistent, ..PLAIN });
        let pages: Vec<_> = (0..40).map(|_| front.page(true)).collect();
        let mut model = vec![0u8; size];
        for step in steps {
            match step {
                Step::Flush => prop_assert_eq!(front.ask(0, FLUSH, 0, &[]), OK),
                Step::Discard { sector, sectors } => {
                    prop_assert_eq!(front.discard(0, sector.into(), sectors.into(), 0), OK);
                    model[usize::from(sector) * 512..][..usize::from(sectors) * 512].fill(0);
                }
                Step::Write { sector, ref segments, .. } | Step::Read { sector, ref segments } => {
                    let write = matches!(step, Step::Write { .. });
                    let mut at = usize::from(sector) * 512;
                    for (index, (first, last)) in segments.iter().enumerate() {
                        let len = (usize::from(last - first) + 1) * 512;
                        let range = usize::from(*first) * 512..usize::from(*first) * 512 + len;
                        if let Step::Write { seed, .. } = step {
                            let data = pattern(seed.wrapping_add(index as u32), len);
                            front.bytes(pages[index])[range].copy_from_slice(&data);
                            model[at..at + len].copy_from_slice(&data);
                        }
                        at += len;
                    }
                    let list: Vec<_> = segments.iter().zip(&pages)
                        .map(|((first, last), page)| (page.reference, *first, *last)).collect();
                    let operation = if write { WRITE } else { READ };
                    let status = if list.len() <= 11 {
                        front.ask(0, operation, sector.into(), &list)
                    } else {
                        let id = front.put_indirect(0, operation, sector.into(), &list);
                        front.push(0);
                        front.wait(0, id)
                    };
                    prop_assert_eq!(status, OK);
                    if !write {
                        let mut at = usize::from(sector) * 512;
                        for ((first, last), page) in segments.iter().zip(&pages) {
                            let len = (usize::from(last - first) + 1) * 512;
                            let read = &front.bytes(*page)[usize::from(*first) * 512..][..len];
                            prop_assert!(read == &model[at..at + len]);
                            at += len;
                        }
                    }
                }
            }
        }
        prop_assert!(*bench.disk.data.lock().unwrap() == model);
    }
}
