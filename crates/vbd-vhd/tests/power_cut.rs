//! The power goes at any time, with any of what was not flushed: what was flushed is there, the rest is old or new, and
//! the image opens. And errors of the storage: nothing else happens to the image.
#![allow(clippy::cast_possible_truncation, reason = "disks of tests are small")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use support::{Shape, client, image, in_memory, on_disk, read_all};
use vbd_core::Disk;
use vbd_core::file::Fault;
use vbd_ring::{EngineKind, Op};
use vbd_testing::client::Client;
use vbd_testing::power::{Cut, Expected, Load, Recording, drive, fill};
use vbd_testing::{Random, seeds};
use vbd_vhd::{Vhd, VhdOptions, check};

const SECTORS: u64 = 600;
/// So small that a load makes the file grow many times.
const BLOCK: u32 = 16 << 10;

/// A differencing disk over a raw file of marked sectors, or a dynamic disk; and what it holds.
fn marked(dir: &std::path::Path, over: bool) -> (VhdOptions, Vec<u64>) {
    if !over {
        return (image(dir, Shape::Dynamic(BLOCK), SECTORS * 512).0, vec![0; SECTORS as usize]);
    }
    let shape = Shape::OverRaw(BLOCK, SECTORS / 2 * 512);
    let (options, _) = image(dir, shape, SECTORS * 512);
    let stamps: Vec<u64> =
        (0..SECTORS).map(|sector| if sector < SECTORS / 2 { 1 + sector } else { 0 }).collect();
    let mut base = vec![0; (SECTORS / 2 * 512) as usize];
    for (sector, piece) in (0..).zip(base.chunks_mut(512)) {
        fill(stamps[sector as usize], sector, piece);
    }
    std::fs::write(dir.join("base"), base).expect("a base");
    (options, stamps)
}

/// Loads a disk and looks at many states that the storage may be in where the power goes.
fn cut(seed: u64, over: bool, dir: &std::path::Path, states: usize) {
    let (mut options, first) = marked(dir, over);
    let recording = Recording::new();
    let recorder = recording.file(std::fs::read(&options.path).expect("there"));
    options.faults = Some(recorder);
    let disk = Vhd::new(options.clone());
    let clients = [client(&disk), client(&disk)];
    let mut random = Random::new(seed);
    let mut expected = Expected::new(first);
    let depth = *random.one_of(&[1, 4, 16]);
    let load = Load { depth, requests: 80, longest: 80, ..Load::on(0..SECTORS) };
    drive(&clients, &recording, &mut expected, &mut random, &load);
    let now = clients[0].read(0, SECTORS * 512);
    expected.check_now(&now, recording.now()).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
    drop(clients);
    drop(disk);
    options.faults = None;
    let lost = dir.join("lost.vhd");
    for _ in 0..states {
        let at = random.index(recording.now() + 1);
        let cut = *random.one_of(&Cut::ALL);
        let bytes = recording.crash(at, cut, &mut random).remove(0);
        std::fs::write(&lost, bytes).expect("written");
        let state = format!("seed {seed}, {cut:?} at {at}");
        let report = check(&std::fs::File::open(&lost).expect("there"))
            .unwrap_or_else(|error| panic!("{state}: {error}"));
        // The footer at the end may be missing, and room lost: opening it for writing mends both.
        if let Some(error) = report.problems.iter().find(|found| found.is_error() && !found.is_repairable()) {
            panic!("{state}: {error}");
        }
        let disk = Vhd::new(VhdOptions { path: lost.clone(), ..options.clone() });
        let content = read_all(&disk);
        expected.check_cut(&content, at).unwrap_or_else(|wrong| panic!("{state}: {wrong}"));
        drop(disk);
        let after = support::problems(&lost);
        assert!(after.is_empty(), "{state}: {after:?} after it was opened");
    }
}

#[test]
fn a_dynamic_disk_after_a_power_cut() {
    for seed in seeds(6) {
        cut(seed, false, in_memory().path(), 120);
    }
    for seed in seeds(2) {
        cut(seed, false, on_disk().path(), 60);
    }
}

#[test]
fn a_differencing_disk_after_a_power_cut() {
    for seed in seeds(6) {
        cut(seed, true, in_memory().path(), 120);
    }
    for seed in seeds(2) {
        cut(seed, true, on_disk().path(), 60);
    }
}

/// Every operation of the file fails once in a load, with both errors: each sector stays old or new, and the image is
/// whole afterwards and takes writes again.
#[test]
fn every_operation_fails_once() {
    for over in [false, true] {
        for errno in [libc::EIO, libc::ENOSPC] {
            let mut failing = 0;
            loop {
                let dir = in_memory();
                let (mut options, first) = marked(dir.path(), over);
                let recording = Recording::new();
                let recorder = recording.file(std::fs::read(&options.path).expect("there"));
                let seen = Arc::new(AtomicU64::new(0));
                let count = seen.clone();
                options.faults = Some(recorder.clone());
                let disk = Vhd::new(options.clone());
                let clients = [client(&disk), client(&disk)];
                recorder.set_faults(Some(Arc::new(move |op: &Op| {
                    // A flush that fails is final, and has its own test.
                    let is_one = !matches!(op, Op::Sync);
                    (is_one && count.fetch_add(1, Ordering::SeqCst) == failing).then_some(Fault::Fail(errno))
                })));
                let mut expected = Expected::new(first);
                let mut random = Random::new(7);
                let load = Load { requests: 40, longest: 80, may_fail: true, ..Load::on(0..SECTORS) };
                drive(&clients, &recording, &mut expected, &mut random, &load);
                let ended = seen.load(Ordering::SeqCst) <= failing;
                recorder.set_faults(None);
                drive(&clients, &recording, &mut expected, &mut random, &Load { requests: 30, ..load });
                let content = clients[1].read(0, SECTORS * 512);
                let wrong =
                    |wrong: String| panic!("operation {failing}, errno {errno}, over {over}: {wrong}");
                expected.check_now(&content, recording.now()).unwrap_or_else(wrong);
                drop(clients);
                drop(disk);
                options.faults = None;
                let disk = Vhd::new(options.clone());
                assert!(read_all(&disk) == content, "operation {failing}: opened anew it differs");
                drop(disk);
                assert_eq!(support::problems(&options.path), [""; 0], "operation {failing}, {errno}");
                if ended {
                    break;
                }
                failing += 1;
            }
            assert!(failing > 40, "only {failing} operations failed");
        }
    }
}

#[test]
fn a_flush_that_fails_is_remembered() {
    let dir = in_memory();
    let (mut options, _) = marked(dir.path(), true);
    let failing = Arc::new(AtomicBool::new(true));
    let fails = failing.clone();
    options.faults = Some(Arc::new(move |op: &Op| {
        (matches!(op, Op::Sync) && fails.load(Ordering::SeqCst)).then_some(Fault::Fail(libc::EIO))
    }));
    let disk = Vhd::new(options);
    let client = client(&disk);
    // The first allocation needs one, to make room.
    let write = vbd_testing::client::Ask::write(0, vec![1; 512]);
    assert_eq!(client.kind(write.clone()), Some(vbd_core::ErrorKind::Io));
    assert_eq!(client.kind(write), Some(vbd_core::ErrorKind::FlushLost));
    let flush = vbd_testing::client::Ask::new(vbd_core::Operation::Flush, 0, 0);
    assert_eq!(client.kind(flush), Some(vbd_core::ErrorKind::FlushLost));
    assert_eq!(client.read(0, 512)[..8], 1u64.to_le_bytes(), "the parent's");
    drop(client);
    assert!(disk.open().is_err(), "its end cannot be put in order");
    failing.store(false, Ordering::SeqCst);
    assert!(disk.open().is_ok(), "opened anew");
}

/// Each operation of opening an image whose end a crash has left in disorder, and of closing one that has grown, fails
/// once: it is said, or put in order by the next who opens it.
#[test]
fn every_operation_of_opening_and_closing_fails_once() {
    for over in [false, true] {
        for errno in [libc::EIO, libc::ENOSPC] {
            let mut failing = 0;
            loop {
                let dir = in_memory();
                let (mut options, _) = marked(dir.path(), over);
                let before = read_all(&Vhd::new(options.clone()));
                // Room that was made ahead, and no footer behind it.
                let len = std::fs::metadata(&options.path).expect("there").len();
                let file = std::fs::File::options().write(true).open(&options.path).expect("there");
                file.set_len(len + 8192).expect("longer");
                let seen = Arc::new(AtomicU64::new(0));
                let count = seen.clone();
                options.faults = Some(Arc::new(move |_: &Op| {
                    (count.fetch_add(1, Ordering::SeqCst) == failing).then_some(Fault::Fail(errno))
                }));
                let disk = Vhd::new(options.clone());
                let mut written = false;
                if let Ok(session) = disk.open() {
                    let queue = Client::on_disk(EngineKind::Auto, &session);
                    let write = vbd_testing::client::Ask::write(0, vec![7; 512]);
                    written = queue.ask(write).result.is_ok();
                }
                drop(disk);
                options.faults = None;
                let after = read_all(&Vhd::new(options.clone()));
                assert!(after[512..] == before[512..], "operation {failing}, errno {errno}: it differs");
                assert!(!written || after[..512] == [7; 512], "operation {failing}: a write is lost");
                assert_eq!(support::problems(&options.path), [""; 0], "operation {failing}, {errno}");
                if seen.load(Ordering::SeqCst) <= failing {
                    break;
                }
                failing += 1;
            }
            assert!(failing > 8, "only {failing} operations failed");
        }
    }
}

/// A write with FUA to a block whose place was not durable yet.
#[test]
fn fua_covers_the_place_of_the_block() {
    for over in [false, true] {
        let dir = in_memory();
        let (mut options, first) = marked(dir.path(), over);
        let recording = Recording::new();
        options.faults = Some(recording.file(std::fs::read(&options.path).expect("there")));
        let disk = Vhd::new(options.clone());
        let queue = client(&disk);
        let mut expected = Expected::new(first);
        for (fua, stamp) in [(false, 0x1057), (true, 0x2057)] {
            let mut write = vbd_testing::client::Ask::write(0, vec![0; 512]);
            fill(stamp, 0, &mut write.data);
            write.flags.fua = fua;
            let number = expected.write(0..1, stamp, fua, recording.tick());
            queue.ask(write).result.expect("writable");
            expected.ended(number, recording.tick());
        }
        drop(queue);
        drop(disk);
        options.faults = None;
        let mut random = Random::new(1);
        let at = recording.now();
        for _ in 0..20 {
            let bytes = recording.crash(at, *random.one_of(&Cut::ALL), &mut random).remove(0);
            let lost = dir.path().join("lost.vhd");
            std::fs::write(&lost, bytes).expect("written");
            let content = read_all(&Vhd::new(VhdOptions { path: lost, ..options.clone() }));
            expected.check_cut(&content, at).unwrap_or_else(|wrong| panic!("{wrong}"));
        }
    }
}
