//! Options of images changed in place: what QEMU says of them afterwards, and the power going meanwhile.
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

mod common;

use std::path::Path;

use common::{Recorded, Scratch, qemu_img};
use vbd_qcow2::format::{Header, incompatible};
use vbd_qcow2::{Amend, Version, amend};
use vbd_testing::power::{Cut, Recording};
use vbd_testing::qcow2::Image;
use vbd_testing::qemu::{self, Model, Shape};
use vbd_testing::{Random, seeds};

fn change(path: &Path, wanted: &Amend) -> Result<Vec<String>, String> {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    amend(&file, wanted).map_err(|error| error.to_string())
}

fn to(version: Version) -> Amend {
    Amend { version: Some(version), ..Amend::default() }
}

fn header(path: &Path) -> Header {
    Header::read(&std::fs::File::open(path).unwrap()).unwrap()
}

fn contents(bytes: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let image = Image::new(bytes)?;
    let report = image.check();
    if !report.errors.is_empty() {
        return Err(format!("{:?}", report.errors));
    }
    let zeroes = |_, bytes: &mut [u8]| bytes.fill(0);
    let mut all = vec![image.content(&zeroes, None)?];
    for snapshot in image.snapshots()?.0 {
        all.push(image.content_of(snapshot.l1, snapshot.size, &zeroes, None)?);
    }
    Ok(all)
}

/// An image with some history and snapshots, without a data file.
fn written(random: &mut Random, path: &Path) -> Shape {
    let mut shape = Shape::random(random);
    (shape.data_file, shape.data_file_raw) = (false, false);
    shape.size = shape.size.min(1 << 20);
    shape.refcount_bits = shape.refcount_bits.max(4);
    shape.create(path, None);
    let mut model = Model::new(&shape, vec![0; shape.size as usize]);
    for round in 0..2 {
        model.change(path, &shape, random, 12);
        if shape.has_snapshots() {
            qemu::img(&["snapshot", "-c", &format!("snapshot {round}"), qemu::text(path)]);
        }
    }
    model.change(path, &shape, random, 12);
    shape
}

/// Changes that this image can take, at random.
fn wanted(random: &mut Random, shape: &Shape, now: u32) -> Amend {
    let can_be_2 = !shape.extended_l2 && !shape.zstd;
    let version = if now == 2 || !can_be_2 || random.once_in(2) { Version::V3 } else { Version::V2 };
    let mut amend = to(version);
    if version == Version::V3 {
        amend.refcount_bits = random.once_in(2).then(|| *random.one_of(&[4, 8, 16, 32, 64]));
        amend.lazy_refcounts = random.once_in(2).then(|| random.once_in(2));
    }
    amend
}

#[test]
fn images_are_changed_and_hold_what_they_held() {
    let mut versions = [0; 2];
    for seed in seeds(10) {
        let mut random = Random::new(seed);
        let scratch = Scratch::new();
        let path = scratch.dir().join("disk.qcow2");
        let shape = written(&mut random, &path);
        println!("seed {seed}: {shape:?}");
        let held = contents(&std::fs::read(&path).unwrap()).unwrap();
        for _ in 0..3 {
            let amend = wanted(&mut random, &shape, header(&path).version);
            let done =
                change(&path, &amend).unwrap_or_else(|error| panic!("seed {seed}: {amend:?}: {error}"));
            println!("{amend:?}: {done:?}");
            let found = qemu::check(&path);
            assert!(found.errors == 0 && found.leaks == 0, "seed {seed}: {amend:?}: {}", found.said);
            assert!(contents(&std::fs::read(&path).unwrap()).unwrap() == held, "seed {seed}: {amend:?}");
            let info = qemu::img(&["info", "-f", "qcow2", "--output=json", qemu::text(&path)]);
            let compat = if amend.version == Some(Version::V2) { "0.10" } else { "1.1" };
            versions[usize::from(compat == "1.1")] += 1;
            assert!(info.contains(&format!("\"compat\": \"{compat}\"")), "{info}");
            if let Some(bits) = amend.refcount_bits {
                assert!(info.contains(&format!("\"refcount-bits\": {bits}")), "{info}");
            }
            if let Some(lazy) = amend.lazy_refcounts {
                assert!(info.contains(&format!("\"lazy-refcounts\": {lazy}")), "{info}");
            }
            // A second time it is so already.
            assert_eq!(change(&path, &amend).unwrap(), [""; 0], "seed {seed}: {amend:?}");
            // QEMU goes on in it.
            if qemu::run("qemu-img", &["snapshot", "-c", "more", qemu::text(&path)]).status.success() {
                qemu::img(&["snapshot", "-d", "more", qemu::text(&path)]);
            }
            let found = qemu::check(&path);
            assert!(found.errors == 0 && found.leaks == 0, "seed {seed}: {}", found.said);
        }
    }
    assert!(versions.iter().all(|count| *count > 1), "{versions:?}");
}

#[test]
fn the_power_goes_while_options_change() {
    for seed in seeds(6) {
        let mut random = Random::new(seed);
        let scratch = Scratch::new();
        let path = scratch.dir().join("disk.qcow2");
        let shape = written(&mut random, &path);
        // A header of these may be longer than a sector, and is written at once.
        if (10..12).contains(&shape.cluster_bits) {
            continue;
        }
        let amend_to = wanted(&mut random, &shape, shape.version);
        println!("seed {seed}: {shape:?}: {amend_to:?}");
        let before = std::fs::read(&path).unwrap();
        let held = contents(&before).unwrap();
        let recording = Recording::new();
        let file = Recorded::new(&recording, before.clone());
        amend(&file, &amend_to).unwrap();
        for _ in 0..60 {
            let at = random.index(recording.now() + 1);
            let cut = *random.one_of(&Cut::ALL);
            let bytes = recording.crash(at, cut, &mut random).remove(0);
            let state = format!("seed {seed}, {cut:?} at {at}");
            let now = contents(&bytes).unwrap_or_else(|error| panic!("{state}: {error}"));
            assert!(now == held, "{state}: it holds something else");
            // The same once more ends it.
            let file = Recorded::new(&Recording::new(), bytes);
            amend(&file, &amend_to).unwrap_or_else(|error| panic!("{state}: once more: {error}"));
            assert!(contents(&file.content()).unwrap() == held, "{state}: once more");
        }
        for changes in 0..30 {
            let file = Recorded::new(&Recording::new(), before.clone());
            file.fail_after(changes, libc::ENOSPC);
            let result = amend(&file, &amend_to);
            assert!(contents(&file.content()).unwrap() == held, "seed {seed}: failed after {changes}");
            if result.is_ok() {
                break;
            }
        }
    }
}

#[test]
fn what_an_image_cannot_be_is_said() {
    let scratch = Scratch::new();
    let base = scratch.path("base");
    qemu_img(&["create", "-q", "-f", "raw", &base, "1M"]);
    let make = |name: &str, options: &str| {
        let path = scratch.dir().join(name);
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, qemu::text(&path), "1M"]);
        path
    };
    let refused = |path: &Path, amend: &Amend, said: &str| {
        let before = std::fs::read(path).unwrap();
        let error = change(path, amend).unwrap_err();
        assert!(error.contains(said), "{amend:?}: {error}");
        assert!(std::fs::read(path).unwrap() == before, "{amend:?}");
    };
    let plain = make("plain", "compat=1.1");
    let old = make("old", "compat=0.10");
    let bits = |bits: u32| Amend { refcount_bits: Some(bits), ..Amend::default() };
    let lazy = Amend { lazy_refcounts: Some(true), ..Amend::default() };
    refused(&old, &bits(8), "refcounts of 16 bits alone");
    refused(&old, &lazy, "no lazy refcounts");
    refused(&plain, &Amend { version: Some(Version::V2), ..lazy.clone() }, "no lazy refcounts");
    refused(&plain, &bits(3), "1, 2, 4, 8");
    refused(&plain, &Amend { backing_format: Some("raw".into()), ..Amend::default() }, "no backing file");
    refused(&plain, &Amend { data_file_raw: Some(true), ..Amend::default() }, "from the beginning");
    let data = format!("data_file={},data_file_raw=on", scratch.path("data"));
    let with_data = make("with-data", &data);
    refused(&with_data, &to(Version::V2), "no external data file");
    let off = Amend { data_file_raw: Some(false), ..Amend::default() };
    change(&with_data, &off).unwrap();
    assert!(
        qemu::img(&["info", "--output=json", qemu::text(&with_data)]).contains("\"data-file-raw\": false")
    );
    refused(&make("parts", "extended_l2=on"), &to(Version::V2), "subclusters");
    refused(&make("zstd", "compression_type=zstd"), &to(Version::V2), "compression other than zlib");
    let marked = make("marked", "compat=1.1");
    qemu_img(&["bitmap", "--add", qemu::text(&marked), "one"]);
    refused(&marked, &to(Version::V2), "no bitmaps");
    let over = make("over", &format!("backing_file={base},backing_fmt=raw"));
    common::qemu_io(qemu::text(&over), &["write -z 0 64k"]);
    refused(&over, &to(Version::V2), "flatten it first");
    let named = Amend { backing_format: Some("qcow2".into()), ..Amend::default() };
    assert_eq!(change(&over, &named).unwrap(), ["the backing file's format is qcow2 now"]);
    assert_eq!(header(&over).backing_format(), Some(&b"qcow2"[..]));
    // Two references to one cluster are more than one bit says.
    let shared = make("shared", "compat=1.1");
    common::qemu_io(qemu::text(&shared), &["write -P 1 0 64k"]);
    qemu_img(&["snapshot", "-c", "one", qemu::text(&shared)]);
    refused(&shared, &bits(1), "refcounts of 1 bits cannot say");
    assert!(!header(&shared).has(incompatible::DIRTY));
}
