//! Front-ends that break the rules lose their own disk, or their own request, and nobody else notices.

#![allow(clippy::cast_possible_truncation, reason = "sizes of tests are small")]

mod common;

use std::sync::atomic::Ordering;

use common::frontend::*;
use common::{Bench, DEVID, DOMID, ID};
use proptest::prelude::*;
use vbd_testing::eventually;
use vbd_xen::{DeviceId, fuzz_ring, fuzz_store};

#[test]
fn indices_that_make_no_sense_break_one_device() {
    for index in [33u32, 1000, u32::MAX, 0x8000_0000] {
        let bench = Bench::new();
        let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
        let other = DeviceId { devid: DEVID + 16, ..ID };
        let mut good = Frontend::connected(&bench.hypervisor, other, PLAIN);
        front.write(0, 0, &pattern(1, 4096));
        let ring = &front.rings[0];
        ring.word(0).store(ring.produced.wrapping_add(index), Ordering::SeqCst);
        bench.hypervisor.notify(DOMID, ring.port);
        front.wait_back("5");
        // Xenstore has the state before the status has the reason.
        eventually("the reason is shown", || bench.status().problem.is_some());
        let problem = bench.status().problem.unwrap();
        assert!(problem.contains("more than its ring holds"), "{problem}");
        assert!(bench.back("error").is_some());
        good.write(0, 0, &pattern(2, 4096));
        // It may close and come again.
        front.state("6");
        front.wait_back("6");
        front.state("1");
        front.wait_back("2");
        front.connect();
        front.write(0, 0, &pattern(3, 4096));
    }
}

#[test]
fn pages_that_are_not_granted() {
    for (persistent, direct) in [(false, true), (true, true), (false, false)] {
        let bench = Bench::with(1 << 20, direct, |_| {});
        let mut front = Frontend::connected(&bench.hypervisor, ID, Shape { persistent, ..PLAIN });
        let good = front.fill(&pattern(1, 4096));
        for segments in [vec![(7777, 0, 7)], vec![good[0], (7777, 0, 7)], vec![(7777, 0, 7); 11]] {
            assert_eq!(front.ask(0, WRITE, 0, &segments), ERROR);
            assert_eq!(front.ask(0, FLUSH, 0, &segments), ERROR);
            assert_eq!(front.ask(0, BARRIER, 0, &segments), ERROR);
            assert_eq!(front.ask(0, READ, 0, &segments), ERROR);
        }
        // Granted for reading only, and to be read into.
        let page = front.page(false);
        assert_eq!(front.ask(0, READ, 0, &[(page.reference, 0, 7)]), ERROR);
        // Many at once, good and bad: each has its own answer.
        let ids: Vec<_> = (0..30u64)
            .map(|index| {
                let id = front.fresh_id();
                let segment = if index % 3 == 0 { (7777, 0, 7) } else { good[0] };
                front.put(0, WRITE, id, index * 8, &[segment]);
                (id, index % 3 == 0)
            })
            .collect();
        front.push(0);
        for (id, bad) in ids {
            assert_eq!(front.wait(0, id), if bad { ERROR } else { OK });
        }
        // Indirect pages, and what they describe.
        let id = front.put_indirect(0, WRITE, 0, &[(7777, 0, 7)]);
        front.push(0);
        assert_eq!(front.wait(0, id), ERROR);
        let id = front.fresh_id();
        let mut words = front.head(INDIRECT, WRITE, id, 0);
        words[0] |= 12 << 16;
        words.extend([0, 9999, 0, 0, 0, 0, 0, 0, 0]);
        front.put_words(0, &words);
        front.push(0);
        assert_eq!(front.wait(0, id), ERROR);
        front.write(0, 0, &pattern(4, 4096));
        assert_eq!(bench.status().in_flight, 0);
    }
}

#[test]
fn segments_and_sectors_out_of_bounds() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    let reference = front.fill(&pattern(1, 4096))[0].0;
    for (first, last) in [(0, 8), (3, 2), (255, 255), (0, 255)] {
        assert_eq!(front.ask(0, WRITE, 0, &[(reference, first, last)]), ERROR);
        let id = front.put_indirect(0, WRITE, 0, &[(reference, first, last)]);
        front.push(0);
        assert_eq!(front.wait(0, id), ERROR);
    }
    for sector in [2041, 2048, 1 << 40, u64::MAX / 512, u64::MAX] {
        assert_eq!(front.ask(0, WRITE, sector, &[(reference, 0, 7)]), ERROR);
    }
    assert_eq!(front.ask(0, WRITE, 2040, &[(reference, 0, 7)]), OK);
    // More segments than an entry has.
    for count in [12, 200, 255] {
        let id = front.fresh_id();
        let words = front.head(WRITE, count, id, 0);
        front.put_words(0, &words);
        front.push(0);
        assert_eq!(front.wait(0, id), ERROR);
    }
}

#[test]
fn one_name_for_two_requests() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    let segments = front.fill(&pattern(1, 4096));
    front.put(0, WRITE, 7, 0, &segments);
    front.put(0, WRITE, 7, 8, &segments);
    front.push(0);
    let mut answers = Vec::new();
    eventually("both are answered", || {
        answers.extend(front.reap(0));
        answers.len() == 2
    });
    assert_eq!(answers, [(7, WRITE, OK), (7, WRITE, OK)]);
}

#[test]
fn answers_that_nobody_takes() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    let segments = front.fill(&pattern(1, 512));
    // It goes on producing where answers are, and never looks at one.
    for round in 0..50 {
        for _ in 0..32 {
            front.put(0, WRITE, 1, 0, &segments);
        }
        front.push(0);
        let wanted = (round + 1) * 32;
        eventually("they are answered", || front.rings[0].word(2).load(Ordering::SeqCst) == wanted);
    }
    assert_eq!(bench.status().state, vbd_xen::State::Connected);
}

#[test]
fn nonsense_in_xenstore() {
    for (key, value) in [
        ("ring-ref", "-1"),
        ("ring-ref", "4294967296"),
        ("ring-ref", ""),
        ("event-channel", "x"),
        ("event-channel", "123456"),
        ("protocol", "mips-abi"),
        ("ring-page-order", "5"),
        ("ring-page-order", "99999999999999999999"),
        ("multi-queue-num-queues", "0"),
        ("multi-queue-num-queues", "5"),
        ("multi-queue-num-queues", "4"),
        ("ring-page-order", "2"),
        ("ring-ref", "99"),
    ] {
        let bench = Bench::new();
        create(&bench.hypervisor, ID, &[]);
        let mut front = Frontend::new(&bench.hypervisor, ID, PLAIN);
        front.wait_back("2");
        front.offer();
        front.set(key, value);
        front.state("3");
        front.wait_back("5");
        assert!(bench.status().problem.is_some(), "{key} = {value}");
        assert_eq!(bench.disk.sessions.load(Ordering::SeqCst), 0);
        assert_eq!(bench.hypervisor.mapped(), 0);
        // Once it has closed it may try again, and do it right.
        front.state("6");
        front.wait_back("6");
        for extra in ["ring-page-order", "multi-queue-num-queues"] {
            bench.hypervisor.store.remove(&format!("{}/{extra}", common::frontend::front(ID)));
        }
        front.state("1");
        front.wait_back("2");
        front.connect();
        front.write(0, 0, &pattern(1, 512));
    }
}

#[test]
fn a_front_end_of_somebody_elses() {
    let bench = Bench::new();
    let theirs = common::frontend::front(DeviceId { domid: 4, ..ID });
    // A device that this domain's toolstack would not have made so; the key that makes it whole comes last.
    bench.hypervisor.store.set(&format!("{}/params", back(ID)), "/x");
    bench.hypervisor.store.set(&format!("{}/frontend-id", back(ID)), DOMID.to_string());
    bench.hypervisor.store.set(&format!("{}/mode", back(ID)), "w");
    bench.hypervisor.store.set(&format!("{}/frontend", back(ID)), theirs);
    bench.wait_back("hotplug-status", "error");
    assert!(bench.giver.asked.lock().unwrap().is_empty());
}

#[test]
fn states_that_flap() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    let other = DeviceId { devid: DEVID + 16, ..ID };
    let mut good = Frontend::connected(&bench.hypervisor, other, PLAIN);
    let mut seed = 1u32;
    for _ in 0..300 {
        seed = seed.wrapping_mul(1_103_515_245).wrapping_add(12345);
        let states = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "", "4\0", "-1"];
        front.state(states[(seed >> 16) as usize % states.len()]);
    }
    good.write(0, 0, &pattern(1, 4096));
    // In the end it can be used as before, or closed.
    front.state("6");
    front.wait_back("6");
    eventually("nothing is under way", || bench.hypervisor.mapped() == 1);
    assert_eq!(bench.disk.sessions.load(Ordering::SeqCst), 1);
    front.state("1");
    front.wait_back("2");
    front.connect();
    front.write(0, 0, &pattern(1, 4096));
}

/// Entries that are nearly right.
fn image() -> impl Strategy<Value = Vec<u8>> {
    let reference = prop_oneof![8 => 16u32..32, 1 => any::<u32>()];
    let place = prop_oneof![4 => Just(0x0700u32), 2 => (0u32..8, 0u32..8).prop_map(|(a, b)| a | b << 8), 1 => any::<u32>()];
    let segment = (reference, place).prop_map(|(reference, place)| [reference, place]);
    let head =
        (prop_oneof![8 => 0u8..7, 1 => any::<u8>()], prop_oneof![8 => 0u8..12, 1 => any::<u8>()], 0u16..40);
    let sector = prop_oneof![8 => (0u32..4096).prop_map(|low| [low, 0]), 1 => any::<[u32; 2]>()];
    let entry = (head, any::<u32>(), sector, prop::collection::vec(segment.clone(), 11));
    let entries = prop::collection::vec(entry, 1..33);
    let pages = prop::collection::vec(prop::collection::vec(segment, 32), 16);
    (any::<u8>(), 0u32..36, any::<u8>(), entries, pages).prop_map(
        |(flags, produced, bound, entries, pages)| {
            let mut bytes = vec![flags];
            bytes.extend(produced.to_le_bytes());
            bytes.push(bound);
            for ((operation, second, count), id, sector, segments) in entries {
                let mut words = vec![u32::from(operation) | u32::from(second) << 8 | u32::from(count) << 16];
                if flags & 1 == 0 {
                    words.push(0);
                }
                words.extend([id, 0]);
                words.extend(sector);
                words.extend(segments.as_flattened());
                words.resize(if flags & 1 == 0 { 28 } else { 27 }, 0);
                bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            }
            bytes.resize(6 + 4096 - 64, 0);
            bytes.extend(pages.iter().flatten().flatten().flat_map(|word| word.to_le_bytes()));
            bytes
        },
    )
}

fn keys() -> impl Strategy<Value = Vec<u8>> {
    let key = prop_oneof![
        Just("protocol".to_owned()),
        Just("feature-persistent".to_owned()),
        Just("multi-queue-num-queues".to_owned()),
        Just("ring-page-order".to_owned()),
        Just("ring-ref".to_owned()),
        Just("event-channel".to_owned()),
        (0..5, 0..3).prop_map(|(queue, page)| format!("queue-{queue}/ring-ref{page}")),
        (0..5).prop_map(|queue| format!("queue-{queue}/event-channel")),
    ];
    let value = prop_oneof![
        (0u32..20).prop_map(|n| n.to_string().into_bytes()),
        prop::collection::vec(any::<u8>(), 0..12)
    ];
    prop::collection::vec((key, value), 0..30).prop_map(|lines| {
        lines
            .into_iter()
            .flat_map(|(key, value)| [key.into_bytes(), vec![b'='], value, vec![b'\n']].concat())
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_ring_does_harm(image in image()) {
        fuzz_ring(&image);
    }

    #[test]
    fn no_ring_without_any_sense_does_harm(bytes in prop::collection::vec(any::<u8>(), 0..6000)) {
        fuzz_ring(&bytes);
    }

    #[test]
    fn no_key_does_harm(bytes in prop_oneof![keys(), prop::collection::vec(any::<u8>(), 0..300)]) {
        fuzz_store(&bytes);
    }
}

#[test]
fn the_corpora_pass() {
    vbd_testing::corpus::replay("xen_ring", fuzz_ring);
    vbd_testing::corpus::replay("xen_store", fuzz_store);
}
