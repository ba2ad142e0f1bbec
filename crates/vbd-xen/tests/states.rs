//! The orders of states and events that front-ends and toolstacks produce.

#![allow(clippy::cast_possible_truncation, reason = "sizes of tests are small")]

mod common;

use std::sync::atomic::Ordering;
use std::time::Duration;

use common::frontend::*;
use common::{Answer, Bench, DEVID, DOMID, ID};
use vbd_testing::eventually;
use vbd_xen::{BackendKind, DeviceId, Mode, State};

fn check(front: &mut Frontend, seed: u32) {
    let data = pattern(seed, 8192);
    front.write(0, 8, &data);
    assert!(front.read(0, 8, 8192) == data);
}

/// What comes while the server asks xenstore for something else shows on no descriptor any more.
#[test]
fn a_device_that_comes_while_another_is_looked_at_is_taken() {
    let bench = Bench::new();
    *bench.giver.answer.lock().unwrap() = Answer::NotOurs;
    create(&bench.hypervisor, ID, &[]);
    eventually("the first is asked for", || bench.giver.asked.lock().unwrap().len() == 1);
    // Until its answer has been dealt with.
    std::thread::sleep(Duration::from_millis(100));
    let (hypervisor, other) = (bench.hypervisor.clone(), DeviceId { devid: DEVID + 16, ..ID });
    bench
        .hypervisor
        .store
        .when_read(&format!("{}/frontend", back(ID)), move |_| create(&hypervisor, other, &[]));
    bench.hypervisor.store.set(&format!("{}/touched", back(ID)), "1");
    eventually("the second is asked for", || bench.giver.asked.lock().unwrap().len() == 2);
}

#[test]
fn a_life_from_creation_to_removal() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    for (key, value) in [
        ("hotplug-status", "connected"),
        ("sectors", "2048"),
        ("sector-size", "512"),
        ("physical-sector-size", "4096"),
        ("info", "0"),
        ("feature-flush-cache", "1"),
        ("feature-barrier", "1"),
        ("feature-discard", "1"),
        ("feature-persistent", "1"),
        ("feature-max-indirect-segments", "256"),
        ("multi-queue-max-queues", "4"),
        ("max-ring-page-order", "4"),
    ] {
        assert_eq!(bench.back(key).as_deref(), Some(value), "{key}");
    }
    check(&mut front, 1);
    let asked = bench.giver.asked.lock().unwrap()[0].clone();
    assert_eq!(asked.params, "/disks/a");
    assert_eq!(asked.vm.as_deref(), Some("6a8bb5a2-0f2b-4e4e-9d0a-7a3f3f6a0001"));
    assert_eq!((asked.mode, asked.domain.as_deref()), (Mode::Write, Some("guest")));
    // The domain sees the state in xenstore a moment before whoever asks for the status does.
    eventually("its status says so", || bench.status().connected);
    let status = bench.status();
    assert_eq!((status.state, status.frontend), (State::Connected, State::Connected));

    front.state("5");
    front.wait_back("5");
    front.state("6");
    front.wait_back("6");
    assert_eq!(bench.disk.sessions.load(Ordering::SeqCst), 0, "the lease is given back before state 6");
    assert_eq!(bench.hypervisor.mapped(), 0);
    assert!(!bench.record().exists());
    assert!(bench.giver.closed.lock().unwrap().is_empty());
    bench.hypervisor.store.remove(&back(ID));
    eventually("it is forgotten", || bench.giver.closed.lock().unwrap()[..] == [ID]);
    eventually("nothing is shown", || bench.server.as_ref().unwrap().devices().is_empty());
}

#[test]
fn a_front_end_that_comes_again_after_closing() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    for round in 0..3 {
        check(&mut front, round);
        front.state("5");
        front.wait_back("5");
        front.state("6");
        front.wait_back("6");
        front.state("1");
        front.wait_back("2");
        front.connect();
    }
    check(&mut front, 9);
}

#[test]
fn a_domain_that_was_suspended_comes_with_other_rings() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    check(&mut front, 1);
    let old = front.rings[0].port;
    front.offer();
    front.state("3");
    let port = front.rings[0].port;
    eventually("it is connected anew", || bench.hypervisor.is_bound(DOMID, port));
    front.state("4");
    assert!(!bench.hypervisor.is_bound(DOMID, old));
    check(&mut front, 2);
    assert_eq!(bench.hypervisor.mapped(), 1);
    // And one that begins at the beginning, as the kernel that kexec starts.
    front.state("1");
    front.wait_back("2");
    front.connect();
    check(&mut front, 3);
}

#[test]
fn a_front_end_that_says_connected_at_once() {
    let bench = Bench::new();
    create(&bench.hypervisor, ID, &[]);
    let mut front = Frontend::new(&bench.hypervisor, ID, PLAIN);
    front.offer();
    front.state("4");
    front.wait_back("4");
    check(&mut front, 1);
}

#[test]
fn another_back_end_was_quicker() {
    // The kernel's says that it waits, and what it offers, before it is made to let go.
    let bench = Bench::new();
    let theirs = [
        ("state", "2"),
        ("multi-queue-max-queues", "1"),
        ("max-ring-page-order", "4"),
        ("feature-max-indirect-segments", "64"),
    ];
    create(&bench.hypervisor, ID, &theirs);
    bench.wait_back("feature-persistent", "1");
    bench.wait_back("hotplug-status", "connected");
    assert_eq!(bench.back("multi-queue-max-queues").as_deref(), Some("4"));
    assert_eq!(bench.back("feature-max-indirect-segments").as_deref(), Some("256"));
    let mut front =
        Frontend::new(&bench.hypervisor, ID, Shape { order: 4, queues: 2, persistent: true, ..PLAIN });
    front.connect();
    check(&mut front, 1);
}

#[test]
fn a_device_is_unplugged_while_in_use() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    bench.hypervisor.store.set(&format!("{}/online", back(ID)), "0");
    bench.hypervisor.store.set(&format!("{}/state", back(ID)), "5");
    // The domain still uses it: nothing is cut off.
    check(&mut front, 1);
    front.state("5");
    front.state("6");
    front.wait_back("6");
    assert_eq!(bench.disk.sessions.load(Ordering::SeqCst), 0);
}

#[test]
fn a_device_that_was_never_connected_is_unplugged() {
    let bench = Bench::new();
    create(&bench.hypervisor, ID, &[]);
    bench.wait_back("state", "2");
    bench.hypervisor.store.set(&format!("{}/online", back(ID)), "0");
    bench.hypervisor.store.set(&format!("{}/state", back(ID)), "5");
    bench.wait_back("state", "6");
}

#[test]
fn a_domain_is_destroyed_with_requests_in_flight() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    bench.disk.hold.store(true, Ordering::SeqCst);
    let segments = front.fill(&pattern(1, 4096));
    for sector in 0..20 {
        let id = front.fresh_id();
        front.put(0, WRITE, id, sector * 8, &segments);
    }
    front.push(0);
    eventually("they are in flight", || bench.status().in_flight == 20);
    bench.hypervisor.store.remove(&format!("/local/domain/{DOMID}"));
    bench.wait_back("state", "6");
    assert_eq!(bench.disk.sessions.load(Ordering::SeqCst), 0);
    assert_eq!(bench.hypervisor.mapped(), 0);
    assert!(bench.back("error").is_none());
}

#[test]
fn the_directory_goes_in_the_midst_of_requests() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    bench.disk.hold.store(true, Ordering::SeqCst);
    let segments = front.fill(&pattern(1, 4096));
    let id = front.fresh_id();
    front.put(0, WRITE, id, 0, &segments);
    front.push(0);
    bench.hypervisor.store.remove(&back(ID));
    eventually("it is forgotten", || bench.giver.closed.lock().unwrap()[..] == [ID]);
    assert!(bench.hypervisor.store.get(&format!("{}/state", back(ID))).is_none(), "it does not come back");
    assert_eq!(bench.hypervisor.mapped(), 0);
    // Made anew, it works.
    bench.disk.hold.store(false, Ordering::SeqCst);
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    check(&mut front, 4);
}

#[test]
fn a_disk_grows() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    bench.disk.grow(2 << 20);
    bench.wait_back("sectors", "4096");
    bench.wait_back("state", "4");
    front.write(0, 4000, &pattern(1, 4096));
    bench.server.as_ref().unwrap().resized(&ID);
    check(&mut front, 1);
}

#[test]
fn devices_that_are_not_ours_are_left_alone() {
    let bench = Bench::new();
    *bench.giver.answer.lock().unwrap() = Answer::NotOurs;
    create(&bench.hypervisor, ID, &[]);
    eventually("it is looked at", || bench.giver.asked.lock().unwrap().len() == 1);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(bench.back("state").as_deref(), Some("1"));
    assert!(bench.back("hotplug-status").is_none() && bench.back("feature-persistent").is_none());
    eventually("it is not shown", || bench.server.as_ref().unwrap().devices().is_empty());
}

#[test]
fn a_refusal_reaches_the_script() {
    let bench = Bench::new();
    *bench.giver.answer.lock().unwrap() = Answer::Refusal("no such file".into());
    create(&bench.hypervisor, ID, &[]);
    bench.wait_back("state", "2");
    assert_eq!(bench.back("hotplug-error").as_deref(), Some("no such file"));
    assert_eq!(bench.back("hotplug-status").as_deref(), Some("error"));
    let mut front = Frontend::new(&bench.hypervisor, ID, PLAIN);
    front.offer();
    front.state("3");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(bench.back("state").as_deref(), Some("2"), "it is never connected");
    bench.hypervisor.store.set(&format!("{}/online", back(ID)), "0");
    bench.wait_back("state", "6");
    // The next attempt has nothing of it.
    bench.hypervisor.store.remove(&back(ID));
    *bench.giver.answer.lock().unwrap() = Answer::Disk;
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    check(&mut front, 1);
}

#[test]
fn a_disk_that_somebody_else_has_is_waited_for() {
    let bench = Bench::new();
    bench.disk.busy.store(true, Ordering::SeqCst);
    create(&bench.hypervisor, ID, &[]);
    let mut front = Frontend::new(&bench.hypervisor, ID, PLAIN);
    front.offer();
    front.state("3");
    eventually("the problem is told", || {
        let devices = bench.server.as_ref().unwrap().devices();
        devices.iter().any(|device| device.problem.as_ref().is_some_and(|text| text.contains("held")))
    });
    bench.disk.busy.store(false, Ordering::SeqCst);
    front.wait_back("4");
    front.state("4");
    check(&mut front, 1);
    assert_eq!(bench.status().problem, None);
}

#[test]
fn what_xl_writes_for_files_is_served_too() {
    let bench = Bench::new();
    let id = DeviceId { kind: BackendKind::Qdisk, domid: DOMID, devid: DEVID };
    create(&bench.hypervisor, id, &[("params", "aio:/disks/b")]);
    let mut front = Frontend::new(&bench.hypervisor, id, PLAIN);
    front.wait_back("2");
    front.connect();
    check(&mut front, 1);
    assert_eq!(bench.giver.asked.lock().unwrap()[0].params, "aio:/disks/b");
}

#[test]
fn twelve_disks_of_one_domain() {
    let bench = Bench::new();
    let mut fronts: Vec<_> = (0..12)
        .map(|index| {
            Frontend::connected(&bench.hypervisor, DeviceId { devid: DEVID + 16 * index, ..ID }, PLAIN)
        })
        .collect();
    fronts.iter_mut().enumerate().for_each(|(seed, front)| check(front, seed as u32));
    assert_eq!(bench.server.as_ref().unwrap().devices().len(), 12);
}

#[test]
fn xenstored_goes_and_comes_back() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    bench.hypervisor.store.set_down(true);
    check(&mut front, 1);
    std::thread::sleep(Duration::from_millis(100));
    bench.hypervisor.store.set_down(false);
    front.state("5");
    front.wait_back("5");
    front.state("6");
    front.wait_back("6");
}

#[test]
fn a_server_that_stops_closes_its_devices() {
    let mut bench = Bench::new();
    let front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    let server = bench.server.take().unwrap();
    let stopping = std::thread::spawn(move || server.stop());
    front.wait_back("5");
    front.state("6");
    stopping.join().unwrap();
    front.wait_back("6");
    assert_eq!(bench.hypervisor.mapped(), 0);
    // One whose domain does nothing is closed all the same.
    bench.hypervisor.store.remove(&back(ID));
    bench.serve();
    let front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    bench.server.take().unwrap().stop();
    front.wait_back("6");
}

#[test]
fn a_server_that_leaves_is_followed_by_another() {
    for shape in [PLAIN, Shape { narrow: true, order: 2, queues: 3, persistent: true }] {
        let mut bench = Bench::new();
        let mut front = Frontend::connected(&bench.hypervisor, ID, shape);
        check(&mut front, 1);
        // Some that are answered, and some that are not.
        bench.disk.hold_odd.store(true, Ordering::SeqCst);
        let segments = front.fill(&pattern(2, 4096));
        let ids: Vec<_> = (0..20)
            .map(|index| {
                let id = front.fresh_id();
                front.put(0, WRITE, id, 100 + index, &segments);
                id
            })
            .collect();
        front.push(0);
        eventually("half of them are held", || bench.status().in_flight == 10);
        bench.server.take().unwrap().leave();
        assert_eq!(bench.back("state").as_deref(), Some("4"));
        assert_eq!(bench.hypervisor.mapped(), 0);
        // More come while nobody is there.
        let more = front.fresh_id();
        front.put(0, WRITE, more, 300, &segments);
        front.push(0);
        bench.disk.hold_odd.store(false, Ordering::SeqCst);
        bench.serve();
        for id in ids.into_iter().chain([more]) {
            assert_eq!(front.wait(0, id), OK);
        }
        assert!(front.answers.is_empty());
        check(&mut front, 3);
        // The record goes with the connection.
        assert!(bench.record().exists());
        front.state("5");
        front.state("6");
        front.wait_back("6");
        assert!(!bench.record().exists());
    }
}

#[test]
fn without_a_record_only_empty_rings_are_taken_over() {
    for in_flight in [false, true] {
        let mut bench = Bench::new();
        let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
        check(&mut front, 1);
        bench.server.take().unwrap().leave();
        // As after another back-end.
        bench.hypervisor.store.remove(&format!("{}/vbd-connection", back(ID)));
        if in_flight {
            let segments = front.fill(&pattern(2, 4096));
            let id = front.fresh_id();
            front.put(0, WRITE, id, 100, &segments);
            front.push(0);
        }
        bench.serve();
        if in_flight {
            bench.wait_back("state", "5");
            assert!(bench.status().problem.unwrap().contains("in flight"));
        } else {
            eventually("it goes on", || {
                bench.server.as_ref().unwrap().devices().iter().any(|one| one.connected)
            });
            check(&mut front, 2);
        }
    }
}

#[test]
fn a_successor_without_the_disk_leaves_the_device_to_the_next() {
    let mut bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    bench.disk.hold.store(true, Ordering::SeqCst);
    let segments = front.fill(&pattern(2, 4096));
    let id = front.fresh_id();
    front.put(0, WRITE, id, 100, &segments);
    front.push(0);
    eventually("it is in flight", || bench.status().in_flight == 1);
    bench.server.take().unwrap().leave();
    bench.disk.hold.store(false, Ordering::SeqCst);
    *bench.giver.answer.lock().unwrap() = Answer::Refusal("not mounted yet".into());
    bench.serve();
    bench.wait_back("error", "not mounted yet");
    bench.server.take().unwrap().leave();
    assert_eq!(bench.back("state").as_deref(), Some("4"));
    *bench.giver.answer.lock().unwrap() = Answer::Disk;
    bench.serve();
    assert_eq!(front.wait(0, id), OK);
}

#[test]
fn a_successor_waits_for_the_lease() {
    let mut bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    bench.disk.hold.store(true, Ordering::SeqCst);
    let segments = front.fill(&pattern(2, 4096));
    let id = front.fresh_id();
    front.put(0, WRITE, id, 100, &segments);
    front.push(0);
    eventually("it is in flight", || bench.status().in_flight == 1);
    bench.server.take().unwrap().leave();
    bench.disk.hold.store(false, Ordering::SeqCst);
    bench.disk.busy.store(true, Ordering::SeqCst);
    bench.serve();
    eventually("it has been tried", || bench.status().problem.is_some());
    bench.disk.busy.store(false, Ordering::SeqCst);
    assert_eq!(front.wait(0, id), OK);
    assert!(front.read(0, 100, 4096) == pattern(2, 4096));
}

#[test]
fn work_for_which_there_is_no_thread_is_tried_again() {
    let mut bench = Bench::new();
    let waits = |bench: &Bench| {
        eventually("it is shown what is missing", || {
            bench.status().problem.is_some_and(|problem| problem.contains("no thread"))
        });
    };
    // To find the disk ...
    bench.hypervisor.set_threads(false);
    create(&bench.hypervisor, ID, &[]);
    waits(&bench);
    assert!(bench.giver.asked.lock().unwrap().is_empty());
    bench.hypervisor.set_threads(true);
    bench.wait_back("state", "2");
    assert_eq!(bench.status().problem, None);
    // ... to connect ...
    bench.hypervisor.set_threads(false);
    let mut front = Frontend::new(&bench.hypervisor, ID, PLAIN);
    front.offer();
    front.state("3");
    waits(&bench);
    assert_eq!(bench.disk.opened.load(Ordering::SeqCst), 0);
    bench.hypervisor.set_threads(true);
    bench.wait_back("state", "4");
    front.state("4");
    check(&mut front, 1);
    // ... to end the connection ...
    bench.hypervisor.set_threads(false);
    front.state("5");
    front.wait_back("5");
    front.state("6");
    waits(&bench);
    assert!(bench.hypervisor.mapped() > 0);
    bench.hypervisor.set_threads(true);
    front.wait_back("6");
    assert_eq!(bench.hypervisor.mapped(), 0);
    // ... and where the server ends itself, it does that without one: it has no time to wait.
    bench.hypervisor.store.remove(&back(ID));
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    check(&mut front, 2);
    bench.hypervisor.set_threads(false);
    bench.server.take().unwrap().leave();
    assert_eq!(bench.hypervisor.mapped(), 0);
    assert_eq!(bench.disk.sessions.load(Ordering::SeqCst), 0);
    bench.hypervisor.set_threads(true);
    bench.serve();
    check(&mut front, 3);
}

/// A device that goes while its work waits for a thread is forgotten all the same.
#[test]
fn a_device_that_goes_while_there_is_no_thread_is_forgotten() {
    let bench = Bench::new();
    let mut front = Frontend::connected(&bench.hypervisor, ID, PLAIN);
    check(&mut front, 1);
    bench.hypervisor.set_threads(false);
    bench.hypervisor.store.remove(&back(ID));
    eventually("its end waits", || bench.status().problem.is_some());
    assert!(bench.giver.closed.lock().unwrap().is_empty());
    bench.hypervisor.set_threads(true);
    eventually("it is closed", || bench.giver.closed.lock().unwrap().len() == 1);
    eventually("it is gone", || bench.server.as_ref().unwrap().devices().is_empty());
    assert_eq!(bench.hypervisor.mapped(), 0);
}
