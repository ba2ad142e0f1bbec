//! The tests' own reading of qcow2 says what QEMU says.
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

use std::path::Path;

use vbd_testing::qcow2::Image;
use vbd_testing::qemu::{Model, Shape, check, img, text};
use vbd_testing::{Random, seeds};

fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a directory")
}

/// Reads what is below a disk: content that may be shorter.
fn below(content: Vec<u8>) -> impl Fn(u64, &mut [u8]) {
    move |offset, buffer: &mut [u8]| {
        let start = (offset as usize).min(content.len());
        let len = buffer.len().min(content.len() - start);
        buffer[..len].copy_from_slice(&content[start..start + len]);
        buffer[len..].fill(0);
    }
}

fn as_qemu_reads(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw");
    img(&["convert", "-f", "qcow2", "-O", "raw", text(path), text(&raw)]);
    std::fs::read(raw).expect("converted")
}

#[test]
fn an_image_of_any_shape_is_read_and_checked_as_qemu_does() {
    for seed in seeds(25) {
        let mut random = Random::new(seed);
        let shape = Shape::random(&mut random);
        println!("seed {seed}: {shape:?}");
        let dir = dir();
        let path = dir.path().join("disk.qcow2");
        let backing = dir.path().join("backing.raw");
        let backed = random.once_in(2);
        let mut under = vec![0; (shape.size / 512 / 2 + random.below(shape.size / 512)) as usize * 512];
        under.iter_mut().enumerate().for_each(|(at, byte)| *byte = (at / 512) as u8);
        std::fs::write(&backing, &under).expect("room");
        shape.create(&path, backed.then_some((&backing, "raw")));
        let under = below(if backed { under } else { Vec::new() });
        let mut content = vec![0; shape.size as usize];
        under(0, &mut content);
        let mut model = Model::new(&shape, content);
        let mut snapshots = Vec::new();
        for turn in 0..3 {
            model.change(&path, &shape, &mut random, 12);
            if shape.has_snapshots() {
                img(&["snapshot", "-c", &format!("s{turn}"), text(&path)]);
                snapshots.push(model.content.clone());
            }
        }
        let bytes = std::fs::read(&path).expect("readable");
        let data = shape.data_file.then(|| std::fs::read(path.with_extension("data")).expect("readable"));
        let image = Image::new(&bytes).expect("a header");
        assert_eq!(u64::from(image.header.version), u64::from(shape.version));
        let content = image.content(&under, data.as_deref()).expect("whole");
        assert!(content == model.content, "the content differs from what was written");
        assert!(content == as_qemu_reads(&path), "the content differs from what QEMU reads");
        let (found, _) = image.snapshots().expect("a table");
        assert_eq!(found.len(), snapshots.len());
        for (snapshot, model) in found.iter().zip(&snapshots) {
            let content = image.content_of(snapshot.l1, snapshot.size, &under, None).expect("whole");
            let differs = (0..content.len()).find(|at| content[*at] != model[*at]);
            assert_eq!(differs, None, "snapshot {} differs there", snapshot.name);
        }
        let (ours, theirs) = (image.check(), check(&path));
        assert_eq!(
            (ours.errors.len() as u64, ours.leaks),
            (theirs.errors, theirs.leaks),
            "{ours:#?} {theirs:?}"
        );
    }
}

#[test]
fn bitmaps_are_read_as_qemu_tells_them() {
    let dir = dir();
    let path = dir.path().join("disk.qcow2");
    let shape = Shape::plain(4 << 20);
    shape.create(&path, None);
    img(&["bitmap", "--add", "-g", "65536", text(&path), "one"]);
    img(&["bitmap", "--add", "-g", "32768", "--disable", text(&path), "two"]);
    vbd_testing::qemu::io(&path, &["write -P 1 1M 64k".into(), "write -P 1 3M 70k".into()]);
    let bytes = std::fs::read(&path).expect("readable");
    let image = Image::new(&bytes).expect("a header");
    let bitmaps = image.bitmaps().expect("bitmaps");
    let dirty = |bits: &[bool]| -> Vec<usize> { (0..bits.len()).filter(|bit| bits[*bit]).collect() };
    let told: Vec<_> =
        bitmaps.iter().map(|bitmap| (&*bitmap.name, bitmap.flags, dirty(&bitmap.bits))).collect();
    assert_eq!(told, [("one", 2, vec![16, 48, 49]), ("two", 0, vec![])]);
    assert_eq!(image.check(), vbd_testing::qcow2::Report::default());
}

/// Damages metadata here and there: what QEMU calls an error, this does too.
#[test]
fn damage_is_found_where_qemu_finds_it() {
    let (mut both, mut none) = (0, 0);
    for seed in seeds(40) {
        let mut random = Random::new(seed);
        let dir = dir();
        let path = dir.path().join("disk.qcow2");
        let shape = Shape { cluster_bits: 12, ..Shape::plain(1 << 20) };
        shape.create(&path, None);
        let mut model = Model::new(&shape, vec![0; 1 << 20]);
        model.change(&path, &shape, &mut random, 10);
        img(&["snapshot", "-c", "one", text(&path)]);
        model.change(&path, &shape, &mut random, 10);
        let mut bytes = std::fs::read(&path).expect("readable");
        let header = Image::new(&bytes).expect("a header").header;
        // An entry of the L1 table, of the first L2 table, of the refcount table or of its first block.
        let word =
            |bytes: &[u8], at: u64| u64::from_be_bytes(bytes[at as usize..][..8].try_into().expect("8"));
        let l2 = word(&bytes, header.l1_table_offset) & 0x00ff_ffff_ffff_fe00;
        let block = word(&bytes, header.refcount_table_offset) & !511;
        let at = match random.below(4) {
            0 => header.l1_table_offset,
            1 if l2 != 0 => l2 + random.below(256) * 8,
            2 => header.refcount_table_offset,
            _ => block + random.below(64) * 2 / 8 * 8,
        };
        let bit = random.below(64);
        let damaged = word(&bytes, at) ^ 1 << bit;
        bytes[at as usize..][..8].copy_from_slice(&damaged.to_be_bytes());
        std::fs::write(&path, &bytes).expect("writable");
        let (ours, theirs) = (Image::new(&bytes).expect("a header").check(), check(&path));
        let context = format!("seed {seed}, bit {bit} of {at:#x}: {ours:#?} {}", theirs.said);
        if theirs.errors > 0 {
            assert!(!ours.errors.is_empty(), "only QEMU finds it: {context}");
            both += 1;
        } else if ours.errors.is_empty() {
            assert_eq!(ours.leaks > 0, theirs.leaks > 0, "{context}");
            none += 1;
        } else {
            println!("only this finds it: {context}");
        }
    }
    assert!(both > 5 && none > 0, "{both} errors, {none} without");
}
