//! Corruption that other implementations of qcow2 have had, each as a test.
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

mod images;

use std::sync::Arc;

use images::Files;
use vbd_core::{Operation, Session};
use vbd_ring::EngineKind;
use vbd_testing::client::{Ask, Client};
use vbd_testing::power::{Expected, FileRecorder, Load, Recording, SECTOR, drive, fill};
use vbd_testing::qcow2::{Image, Report};
use vbd_testing::qemu::{self, Shape};
use vbd_testing::{Random, seeds};

/// A new image that is recorded.
fn recorded(shape: Shape, backed: bool, seed: u64) -> (Files, Arc<Recording>, Arc<FileRecorder>) {
    let files = Files::new(shape, backed, &mut Random::new(seed));
    let recording = Recording::new();
    let recorder = recording.file(files.bytes().remove(0));
    (files, recording, recorder)
}

fn clients(session: &Arc<dyn Session>, count: usize) -> Vec<Client> {
    (0..count).map(|_| Client::on_disk(EngineKind::Auto, session)).collect()
}

/// The image has neither error nor leak, and holds what is expected.
fn is_sound(files: &Files, expected: &Expected, at: usize) {
    let bytes = std::fs::read(&files.image).expect("there");
    let image = Image::new(&bytes).expect("a header");
    assert_eq!(image.check(), Report::default());
    let content = files.content(&image, None).expect("whole");
    expected.check_now(&content, at).unwrap_or_else(|wrong| panic!("{wrong}"));
    let check = qemu::check(&files.image);
    assert_eq!((check.errors, check.leaks), (0, 0), "{}", check.said);
}

/// Only headers are written to where the header is.
fn header_is_kept(recording: &Recording, cluster: u64) {
    for (offset, data) in recording.writes() {
        let is_header = offset > 0 || data.starts_with(b"QFI\xfb");
        assert!(offset >= cluster || offset + data.len() as u64 <= cluster, "a write over the header's end");
        assert!(is_header, "{} bytes were written over the header", data.len());
    }
}

/// cloud-hypervisor #8358.
#[test]
fn the_first_cluster_is_never_overwritten() {
    for (seed, cluster_bits) in seeds(4).into_iter().zip([9, 12, 16, 16]) {
        let shape = Shape { cluster_bits, ..Shape::plain(1 << 20) };
        let (files, recording, recorder) = recorded(shape, seed % 2 == 0, seed);
        let session = files.open(Some(recorder), None);
        let queues = clients(&session, 2);
        let mut expected = Expected::new(files.first());
        let load = Load { odds: [1, 8, 3, 4, 1], requests: 200, ..Load::on(0..2048) };
        drive(&queues, &recording, &mut expected, &mut Random::new(seed), &load);
        drop((queues, session));
        header_is_kept(&recording, 1 << cluster_bits);
        is_sound(&files, &expected, recording.now());
    }
}

/// Sets the refcount of a cluster (of 64 KiB, refcounts of 16 bits) in the image's first refcount block.
fn set_refcount(files: &Files, cluster: u64, refcount: u16) {
    let mut bytes = std::fs::read(&files.image).expect("there");
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight"));
    let block = word(Image::new(&bytes).expect("a header").header.refcount_table_offset as usize) & !511;
    let at = (block + cluster * 2) as usize;
    bytes[at..at + 2].copy_from_slice(&refcount.to_be_bytes());
    std::fs::write(&files.image, bytes).expect("writable");
}

/// The same from refcounts that lie: a cluster that holds tables is called free. Its bytes stay as they are.
fn called_free(which: impl Fn(&Image<'_>) -> u64) {
    let files = Files::new(Shape::plain(4 << 20), false, &mut Random::new(1));
    qemu::io(&files.image, &["write -P 7 0 128k".into()]);
    let before = std::fs::read(&files.image).expect("there");
    let image = Image::new(&before).expect("a header");
    let cluster = which(&image) / 65536;
    set_refcount(&files, cluster, 0);
    let recording = Recording::new();
    let recorder = recording.file(std::fs::read(&files.image).expect("there"));
    let session = files.open(Some(recorder), None);
    let client = Client::on_disk(EngineKind::Auto, &session);
    for part in 2..60 {
        // It may be refused: the image is damaged.
        let _ = client.ask(Ask::write(part * 65536, vec![9; 65536])).result;
    }
    let _ = client.ask(Ask::new(Operation::Flush, 0, 0)).result;
    let old = client.ask(Ask::new(Operation::Read, 0, 131_072));
    if old.result.is_ok() {
        assert!(old.data.iter().all(|byte| *byte == 7), "what was there has changed");
    }
    drop((client, session));
    let after = std::fs::read(&files.image).expect("there");
    let table = &after[(cluster * 65536) as usize..];
    let filled = table.chunks(512).take(128).filter(|sector| sector.iter().all(|byte| *byte == 9)).count();
    assert_eq!(filled, 0, "data was written over a table");
}

/// cloud-hypervisor #8606, and #8358 where the refcount of the header is wrong.
#[test]
fn tables_that_refcounts_call_free_are_not_handed_out() {
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    called_free(|_| 0);
    called_free(|image| image.header.l1_table_offset);
    called_free(|image| image.header.refcount_table_offset);
    called_free(|image| first_word(image, image.header.refcount_table_offset) & !511);
    called_free(|image| first_word(image, image.header.l1_table_offset) & OFFSET);
}

fn first_word(image: &Image<'_>, at: u64) -> u64 {
    u64::from_be_bytes(image.bytes()[at as usize..][..8].try_into().expect("eight"))
}

/// cloud-hypervisor #8606, from within: tables come and go, and none is ever data.
#[test]
fn live_tables_are_never_handed_out() {
    for seed in seeds(4) {
        // Each L2 table maps 32 KiB: there are many.
        let shape = Shape { cluster_bits: 9, ..Shape::plain(1 << 20) };
        let (files, recording, recorder) = recorded(shape, false, seed);
        let mut random = Random::new(seed);
        let mut expected = Expected::new(files.first());
        for _ in 0..3 {
            let session = files.open(Some(recorder.clone()), None);
            let queues = clients(&session, 2);
            let load = Load { odds: [1, 8, 2, 6, 1], requests: 120, ..Load::on(0..2048) };
            drive(&queues, &recording, &mut expected, &mut random, &load);
            drop((queues, session));
            is_sound(&files, &expected, recording.now());
        }
    }
}

/// cloud-hypervisor #8624: discards on one queue, flushes and writes that reuse the clusters on others.
#[test]
fn a_cluster_is_not_reused_before_its_hole_is_made() {
    for seed in seeds(4) {
        let shape = Shape { cluster_bits: 12, ..Shape::plain(1 << 20) };
        // On a disk, where holes take their time.
        let (files, recording, recorder) = recorded(shape, seed % 2 == 0, seed);
        let session = files.open(Some(recorder), None);
        let queues = clients(&session, 3);
        let mut expected = Expected::new(files.first());
        let mut random = Random::new(seed);
        let load = Load { odds: [2, 6, 1, 6, 3], requests: 400, longest: 32, ..Load::on(0..2048) };
        drive(&queues, &recording, &mut expected, &mut random, &load);
        drop((queues, session));
        let collisions = recording.collisions();
        assert!(collisions.is_empty(), "seed {seed}: {:?}", &collisions[..collisions.len().min(3)]);
        is_sound(&files, &expected, recording.now());
    }
}

/// cloud-hypervisor #8621: queues that write parts of the same clusters, all of which have to be copied first.
#[test]
fn queues_over_a_backing_file_keep_each_others_sectors() {
    for (seed, cluster_bits) in seeds(4).into_iter().zip([16, 12, 16, 21]) {
        let size = if cluster_bits == 21 { 4 << 20 } else { 1 << 20 };
        let shape = Shape { cluster_bits, ..Shape::plain(size) };
        let (files, recording, recorder) = recorded(shape, true, seed);
        let session = files.open(Some(recorder), None);
        let queues = clients(&session, 4);
        let mut expected = Expected::new(files.first());
        let mut random = Random::new(seed);
        // One sector to a few, so that many meet in one cluster.
        let load =
            Load { odds: [4, 8, 0, 0, 0], requests: 600, depth: 32, longest: 4, ..Load::on(0..size / 512) };
        drive(&queues, &recording, &mut expected, &mut random, &load);
        let whole = queues[0].read(0, size);
        expected.check_now(&whole, recording.now()).unwrap_or_else(|wrong| panic!("{wrong}"));
        drop((queues, session));
        is_sound(&files, &expected, recording.now());
    }
}

/// cloud-hypervisor #7526: COPIED comes back when the last snapshot that shared a cluster goes. QEMU and the second reading
/// both call a flag that is missing, or one too many, an error.
#[test]
fn the_copied_flag_says_what_the_refcount_says() {
    let (files, recording, recorder) =
        recorded(Shape { cluster_bits: 12, ..Shape::plain(1 << 20) }, false, 1);
    let mut expected = Expected::new(files.first());
    let mut random = Random::new(1);
    for _ in 0..3 {
        let session = files.open(Some(recorder.clone()), None);
        let queues = clients(&session, 2);
        let live = session.live().expect("qcow2 has snapshots");
        let load = Load { odds: [0, 6, 1, 2, 1], requests: 40, ..Load::on(0..2048) };
        drive(&queues, &recording, &mut expected, &mut random, &load);
        live.create_snapshot("one").expect("room");
        drive(&queues, &recording, &mut expected, &mut random, &load);
        live.create_snapshot("two").expect("room");
        drop(queues);
        let reading = std::fs::read(&files.image).expect("there");
        // The tables on the file are those of the last commit; they are whole by themselves.
        assert_eq!(Image::new(&reading).expect("a header").check().errors, Vec::<String>::new());
        live.delete_snapshot("one").expect("there");
        live.delete_snapshot("two").expect("there");
        drop(session);
        is_sound(&files, &expected, recording.now());
    }
}

/// cloud-hypervisor #8597: refcount blocks and the refcount table grow, and none is lost.
#[test]
fn refcount_structures_that_grow_are_not_leaked() {
    // A block counts 256 clusters of 512 bytes, or 64; the table has 64 blocks at first.
    for (refcount_bits, size) in [(16, 9 << 20), (64, 3 << 20)] {
        let shape = Shape { cluster_bits: 9, refcount_bits, ..Shape::plain(size) };
        let (files, recording, recorder) = recorded(shape, false, 1);
        let before = std::fs::read(&files.image).expect("there");
        let before = Image::new(&before).expect("a header").header.refcount_table_clusters;
        let session = files.open(Some(recorder), None);
        let client = Client::on_disk(EngineKind::Auto, &session);
        let mut expected = Expected::new(files.first());
        for first in (0..size / 512).step_by(64) {
            let begun = recording.tick();
            let mut data = vec![0; 64 * SECTOR];
            fill(3, first, &mut data);
            let number = expected.write(first..first + 64, 3, false, begun);
            client.write(first * 512, data);
            expected.ended(number, recording.tick());
        }
        drop((client, session));
        is_sound(&files, &expected, recording.now());
        let after = std::fs::read(&files.image).expect("there");
        let after = Image::new(&after).expect("a header").header.refcount_table_clusters;
        assert!(after > before, "the refcount table had no need to grow: {before} clusters, {after}");
    }
}
