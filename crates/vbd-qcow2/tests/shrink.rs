//! Disks in images made smaller in place: as QEMU does it, with snapshots and bitmaps, and the power going meanwhile.
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

mod common;

use std::path::Path;

use common::{Recorded, Scratch};
use vbd_core::Disk;
use vbd_qcow2::check::{self, check};
use vbd_qcow2::format::{Header, read_snapshots};
use vbd_qcow2::storage::Source;
use vbd_qcow2::{Qcow2, Qcow2Options, bitmaps, shrink};
use vbd_ring::EngineKind;
use vbd_testing::client::Client;
use vbd_testing::power::{Cut, Recording};
use vbd_testing::qcow2::Image;
use vbd_testing::qemu::{self, Model, Shape};
use vbd_testing::{Random, seeds};

fn shrink_file(path: &Path, size: u64) -> Result<(), String> {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    shrink(&file, size).map_err(|error| error.to_string())
}

/// What a snapshot held when it was made.
struct Kept {
    name: String,
    content: Vec<u8>,
}

/// An image that was written to, its content, and its snapshots.
fn written(random: &mut Random, path: &Path) -> (Shape, Vec<u8>, Vec<Kept>) {
    let mut shape = Shape::random(random);
    // Refcounts of few bits cannot say what snapshots need; and QEMU cannot shrink a disk whose data file is to be raw.
    shape.refcount_bits = shape.refcount_bits.max(4);
    shape.size = shape.size.min(2 << 20);
    shape.create(path, None);
    let mut model = Model::new(&shape, vec![0; shape.size as usize]);
    let mut kept = Vec::new();
    for round in 0..1 + random.below(3) {
        model.change(path, &shape, random, 12);
        if shape.has_snapshots() && random.once_in(2) {
            let name = format!("snapshot-{round}");
            qemu::img(&["snapshot", "-c", &name, qemu::text(path)]);
            kept.push(Kept { name, content: model.content.clone() });
        }
        if shape.version >= 3 && random.once_in(3) {
            qemu::img(&["bitmap", "--add", "-g", "512", qemu::text(path), &format!("bitmap {round}")]);
        }
    }
    (shape, model.content, kept)
}

/// Another size, with ends of clusters and tables among them.
fn smaller(random: &mut Random, shape: &Shape) -> u64 {
    let unit = *random.one_of(&[512, 1 << shape.cluster_bits, 1 << (2 * shape.cluster_bits - 3).min(20)]);
    let most = (shape.size - 1) / unit;
    (random.below(most + 1) * unit).clamp(512, shape.size - 512)
}

fn snapshots_hold(path: &Path, kept: &[Kept], data: Option<&[u8]>, who: &str) {
    let bytes = std::fs::read(path).unwrap();
    let image = Image::new(&bytes).unwrap();
    let (found, _) = image.snapshots().unwrap();
    assert_eq!(found.len(), kept.len(), "{who}");
    for (snapshot, kept) in found.iter().zip(kept) {
        let content = image.content_of(snapshot.l1, snapshot.size, &|_, bytes| bytes.fill(0), data).unwrap();
        assert!(snapshot.name == kept.name && content == kept.content, "{who}: {} has changed", kept.name);
    }
}

/// The content as QEMU reads it.
fn as_qemu_reads(scratch: &Scratch, path: &Path) -> Vec<u8> {
    let out = scratch.path("out");
    qemu::img(&["convert", "-f", "qcow2", "-O", "raw", qemu::text(path), &out]);
    std::fs::read(out).unwrap()
}

#[test]
fn a_smaller_disk_is_what_qemu_makes_of_it() {
    let mut compared = 0;
    for seed in seeds(16) {
        let mut random = Random::new(seed);
        let scratch = Scratch::new();
        let path = scratch.dir().join("disk.qcow2");
        let (shape, content, kept) = written(&mut random, &path);
        let size = smaller(&mut random, &shape);
        println!("seed {seed}: {shape:?} to {size}, {} snapshots", kept.len());
        let theirs = scratch.dir().join("theirs.qcow2");
        std::fs::copy(&path, &theirs).unwrap();
        let names = |path: &Path| -> Vec<(String, bool)> {
            let held = bitmaps::list(&std::fs::File::open(path).unwrap()).unwrap();
            held.iter().map(|held| (held.name.clone(), held.bits.is_some())).collect()
        };
        let had = names(&path);
        let before = std::fs::metadata(&path).unwrap().len();
        if shape.version < 3 && !kept.is_empty() {
            // QEMU says in its snapshots how large the disk was, in version 2 too, so it can be done.
            let (told, _) = {
                let file = std::fs::File::open(&path).unwrap();
                read_snapshots(&Header::read(&file).unwrap(), &file).unwrap()
            };
            assert!(told.iter().all(|snapshot| snapshot.disk_size.is_some()));
        }
        shrink_file(&path, size).unwrap_or_else(|error| panic!("seed {seed}: {error}"));

        let found = qemu::check(&path);
        assert!(found.errors == 0 && found.leaks == 0, "seed {seed}: {}", found.said);
        let report = check(&std::fs::File::open(&path).unwrap(), &check::Options::default()).unwrap();
        assert!(report.is_clean(), "seed {seed}: {:?}", report.findings);
        assert!(
            std::fs::metadata(&path).unwrap().len() <= before + (40 << shape.cluster_bits),
            "seed {seed}"
        );
        let data = shape.data_file.then(|| std::fs::read(path.with_extension("data")).unwrap());
        assert!(as_qemu_reads(&scratch, &path) == content[..size as usize], "seed {seed}: content");
        snapshots_hold(&path, &kept, data.as_deref(), &format!("seed {seed}"));
        // Bitmaps are those before, cut.
        assert_eq!(names(&path), had, "seed {seed}");
        for held in bitmaps::list(&std::fs::File::open(&path).unwrap()).unwrap() {
            assert!(held.bits.is_none_or(|bits| bits.size() == size), "seed {seed}");
        }
        // QEMU's own way, where it takes it: not with snapshots of version 2, and with a data file in this place alone.
        if !shape.data_file {
            let size = size.to_string();
            let resized = qemu::run(
                "qemu-img",
                &["resize", "-q", "--shrink", "-f", "qcow2", qemu::text(&theirs), &size],
            );
            if resized.status.success() {
                compared += 1;
                qemu::img(&[
                    "compare",
                    "-s",
                    "-f",
                    "qcow2",
                    "-F",
                    "qcow2",
                    qemu::text(&path),
                    qemu::text(&theirs),
                ]);
            }
        }
        // It goes on, and nothing of what was cut off comes back.
        let mut options = Qcow2Options::new(&path);
        if shape.data_file {
            let data = path.with_extension("data");
            std::fs::File::options().write(true).open(&data).unwrap().set_len(size).unwrap();
            options.data_file = Some(vbd_image::raw::Raw::new(vbd_image::raw::RawOptions::new(data)));
        }
        let session = Qcow2::new(options).open().unwrap();
        let larger = shape.size + 65_536;
        session.grow(larger).unwrap();
        let client = Client::on_disk(EngineKind::Auto, &session);
        let mut now = content[..size as usize].to_vec();
        now.resize(larger as usize, 0);
        assert!(client.read(0, larger) == now, "seed {seed}: grown again");
        client.write(larger - 40_000, vec![9; 40_000]);
        drop((client, session));
        now[larger as usize - 40_000..].fill(9);
        assert!(as_qemu_reads(&scratch, &path) == now, "seed {seed}: written again");
        // Whoever writes and keeps no bitmaps leaves their room behind.
        let found = qemu::check(&path);
        let clean = found.errors == 0 && (found.leaks == 0 || !had.is_empty());
        assert!(clean, "seed {seed}: {}", found.said);
    }
    assert!(compared > 5, "{compared}");
}

/// At any moment the disk has its old size and all of its content, or its new one; nothing is wrong; snapshots are there.
#[test]
fn the_power_goes_while_a_disk_becomes_smaller() {
    for seed in seeds(8) {
        let mut random = Random::new(seed);
        let scratch = Scratch::new();
        let path = scratch.dir().join("disk.qcow2");
        let (shape, content, kept) = written(&mut random, &path);
        // A header of these is longer than a sector and is written at once.
        if shape.data_file || (10..12).contains(&shape.cluster_bits) {
            continue;
        }
        let size = smaller(&mut random, &shape);
        println!("seed {seed}: {shape:?} to {size}");
        let before = std::fs::read(&path).unwrap();
        let recording = Recording::new();
        let file = Recorded::new(&recording, before.clone());
        shrink(&file, size).unwrap();
        let mut seen = [false; 2];
        for _ in 0..60 {
            let at = random.index(recording.now() + 1);
            let cut = *random.one_of(&Cut::ALL);
            let bytes = recording.crash(at, cut, &mut random).remove(0);
            let state = format!("seed {seed}, {cut:?} at {at}");
            let image = Image::new(&bytes).unwrap_or_else(|error| panic!("{state}: {error}"));
            let report = image.check();
            assert!(report.errors.is_empty(), "{state}: {:?}", report.errors);
            let now = image.content(&|_, bytes| bytes.fill(0), None).unwrap();
            assert!(now.len() as u64 == size || now == content, "{state}: {} bytes", now.len());
            assert!(now[..] == content[..now.len()], "{state}: content is lost");
            seen[usize::from(now.len() as u64 == size)] = true;
            std::fs::write(&path, &bytes).unwrap();
            snapshots_hold(&path, &kept, None, &state);
        }
        assert_eq!(seen, [true; 2], "seed {seed}: both were there");
        // And where the storage fails in mid-way: the old one, or the new one, and no error.
        for changes in 0..20 {
            let recording = Recording::new();
            let file = Recorded::new(&recording, before.clone());
            file.fail_after(changes, libc::ENOSPC);
            let result = shrink(&file, size);
            let bytes = file.content();
            let image = Image::new(&bytes).unwrap();
            assert!(image.check().errors.is_empty(), "seed {seed}, failed after {changes}");
            let now = image.content(&|_, bytes| bytes.fill(0), None).unwrap();
            assert!(now[..] == content[..now.len()]);
            if result.is_ok() {
                break;
            }
        }
    }
}

#[test]
fn what_cannot_become_smaller_is_refused() {
    let scratch = Scratch::new();
    let path = scratch.dir().join("disk");
    common::disk(&path);
    let refused = |size: u64, said: &str| {
        let before = std::fs::read(&path).unwrap();
        let error = shrink_file(&path, size).unwrap_err();
        assert!(error.contains(said), "{error}");
        assert!(std::fs::read(&path).unwrap() == before);
    };
    refused(1000, "no multiple of 512");
    refused(0, "nothing at all");
    refused(16 << 20, "more than the 8388608 it has");
    let good = std::fs::read(&path).unwrap();
    // Marked as not closed; and with a refcount that is wrong.
    let mut bytes = good.clone();
    bytes[79] |= 1;
    std::fs::write(&path, &bytes).unwrap();
    refused(1 << 20, "was not closed");
    let places = common::Damage::of(&good);
    let mut bytes = good.clone();
    bytes[places.refcount_block as usize + 3] = 0;
    std::fs::write(&path, &bytes).unwrap();
    refused(1 << 20, "has to be repaired first");
    // A snapshot that does not say how large its disk was.
    let header = Header::read(&good[..]).unwrap();
    let mut bytes = good.clone();
    let at = header.snapshots_offset as usize;
    bytes[at + 36..at + 40].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    let error = shrink_file(&path, 1 << 20).unwrap_err();
    assert!(error.contains("repaired first") || error.contains("how large its disk was"), "{error}");
    // And it can be done.
    std::fs::write(&path, &good).unwrap();
    shrink_file(&path, 1 << 20).unwrap();
    assert_eq!(Header::read(&std::fs::File::open(&path).unwrap()).unwrap().size, 1 << 20);
    assert!(Source::length(&std::fs::File::open(&path).unwrap()).unwrap() <= good.len() as u64 + (4 << 16));
}
