//! Persistent bitmaps: changed offline beside qemu-img, kept while the disk is served, and whole after power cuts.

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{Recorded, Scratch, qemu_img, qemu_io};
use vbd_core::Disk;
use vbd_core::track::Tracked;
use vbd_qcow2::check::{self, Repair};
use vbd_qcow2::storage::Memory;
use vbd_qcow2::{CreateOptions, Preallocation, Qcow2, Qcow2Options, Version, bitmaps, create_in, info};
use vbd_ring::EngineKind;
use vbd_testing::client::{Ask, Client};
use vbd_testing::power::{Cut, Recording};
use vbd_testing::{Random, qcow2, qemu, seeds};

const SIZE: u64 = 4 << 20;

/// Name to: granularity, enabled, marked blocks.
type Told = BTreeMap<String, (u64, bool, Vec<u64>)>;

fn told(bytes: &[u8]) -> Told {
    let held = bitmaps::list(bytes).unwrap();
    let one = |held: bitmaps::Held| {
        let bits = held.bits.expect("saved");
        let blocks = bits
            .runs(0..SIZE)
            .flat_map(|run| (run.start / held.granularity)..run.end.div_ceil(held.granularity));
        (held.name, (held.granularity, held.enabled, blocks.collect()))
    };
    held.into_iter().map(one).collect()
}

fn open(path: &str) -> std::fs::File {
    std::fs::File::options().read(true).write(true).open(path).unwrap()
}

/// Random changes by us and by QEMU in turns: both see the same bitmaps, and nothing leaks.
#[test]
fn we_and_qemu_change_the_same_bitmaps() {
    for seed in seeds(6) {
        let scratch = Scratch::new();
        let path = scratch.path("image");
        let mut random = Random::new(seed);
        let cluster = *random.one_of(&["512", "4k", "64k"]);
        let options = format!("cluster_size={cluster},refcount_bits={}", random.one_of(&["16", "1", "64"]));
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, &path, "4M"]);
        let mut model = Told::new();
        for step in 0..14 {
            let ours = random.once_in(2);
            let names: Vec<_> = model.keys().cloned().collect();
            let name = if names.is_empty() { String::new() } else { random.one_of(&names).clone() };
            match random.below(7) {
                0 | 1 => {
                    let name = format!("bitmap {step}");
                    let granularity = 512 << random.below(8);
                    let enabled = random.once_in(2);
                    if ours {
                        bitmaps::add(&open(&path), &name, granularity, enabled).unwrap();
                    } else {
                        let text = granularity.to_string();
                        let flag = if enabled { "--enable" } else { "--disable" };
                        qemu_img(&["bitmap", "--add", flag, "-g", &text, &path, &name]);
                    }
                    model.insert(name, (granularity, enabled, Vec::new()));
                }
                // QEMU keeps those that are enabled.
                2 | 3 => {
                    let (offset, length) =
                        (random.below(SIZE / 4096 - 64) * 4096, 4096 * (1 + random.below(64)));
                    qemu_io(&path, &[&format!("write -P 1 {offset} {length}")]);
                    for (granularity, enabled, marked) in model.values_mut() {
                        if *enabled {
                            marked.extend(offset / *granularity..(offset + length).div_ceil(*granularity));
                            marked.sort_unstable();
                            marked.dedup();
                        }
                    }
                }
                _ if name.is_empty() => {}
                4 => {
                    let enabled = random.once_in(2);
                    if ours {
                        bitmaps::enable(&open(&path), &name, enabled).unwrap();
                    } else {
                        qemu_img(&["bitmap", if enabled { "--enable" } else { "--disable" }, &path, &name]);
                    }
                    model.get_mut(&name).unwrap().1 = enabled;
                }
                5 => {
                    let other = random.one_of(&names).clone();
                    if ours {
                        bitmaps::merge(&open(&path), &name, &[&other]).unwrap();
                    } else {
                        qemu_img(&["bitmap", "--merge", &other, &path, &name]);
                    }
                    let (from, _, marked) = model[&other].clone();
                    let into = model.get_mut(&name).unwrap();
                    for block in marked {
                        let end = ((block + 1) * from).min(SIZE);
                        into.2.extend(block * from / into.0..end.div_ceil(into.0));
                    }
                    into.2.sort_unstable();
                    into.2.dedup();
                }
                _ => {
                    let clear = random.once_in(2);
                    match (ours, clear) {
                        (true, true) => bitmaps::clear(&open(&path), &name).unwrap(),
                        (true, false) => bitmaps::remove(&open(&path), &name).unwrap(),
                        (false, true) => drop(qemu_img(&["bitmap", "--clear", &path, &name])),
                        (false, false) => drop(qemu_img(&["bitmap", "--remove", &path, &name])),
                    }
                    if clear {
                        model.get_mut(&name).unwrap().2.clear();
                    } else {
                        model.remove(&name);
                    }
                }
            }
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!(told(&bytes), model, "seed {seed}, step {step}, ours: {ours}");
            let theirs = qemu::check(Path::new(&path));
            assert_eq!((theirs.errors, theirs.leaks), (0, 0), "seed {seed}, step {step}: {}", theirs.said);
            let report = check::check(&bytes[..], &check::Options::default()).unwrap();
            assert!(report.is_clean(), "seed {seed}, step {step}: {report:#?}");
        }
    }
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let memory = |options: CreateOptions| {
        let storage = Memory::new(Vec::new(), 64 << 20);
        create_in(&storage, &options).unwrap();
        storage
    };
    let options = CreateOptions { size: SIZE, ..Default::default() };
    let old = memory(CreateOptions { version: Version::V2, ..options.clone() });
    assert!(bitmaps::add(&old, "a", 65536, true).unwrap_err().to_string().contains("version 2"));
    let storage = memory(options);
    bitmaps::add(&storage, "a", 65536, true).unwrap();
    let before = storage.to_bytes();
    let long = "n".repeat(1024);
    let refusals = [
        (bitmaps::add(&storage, "a", 65536, true), "already"),
        (bitmaps::add(&storage, "", 65536, true), "1 to 1023 bytes"),
        (bitmaps::add(&storage, &long, 65536, true), "1 to 1023 bytes"),
        (bitmaps::add(&storage, "b", 1000, true), "1000"),
        (bitmaps::add(&storage, "b", 256, true), "256"),
        (bitmaps::remove(&storage, "b"), "no bitmap \"b\""),
        (bitmaps::merge(&storage, "a", &["b"]), "no bitmap \"b\""),
    ];
    for (result, wanted) in refusals {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}: {wanted}");
    }
    assert_eq!(told(&storage.to_bytes()), told(&before));
    assert!(check::check(&storage, &check::Options::default()).unwrap().is_clean());
}

/// An image whose refcount table is full gets a larger one.
#[test]
fn a_full_refcount_table_grows() {
    let storage = Memory::new(Vec::new(), 64 << 20);
    // A table of one cluster has 64 entries, for 64 clusters of 512 bytes each.
    let options = CreateOptions {
        size: (64 * 64 * 512) - (64 << 10),
        cluster_size: 512,
        refcount_bits: 64,
        preallocation: Preallocation::Metadata,
        ..Default::default()
    };
    create_in(&storage, &options).unwrap();
    let before = check::check(&storage, &check::Options::default()).unwrap();
    assert!(before.is_clean(), "{before:#?}");
    for number in 0..40 {
        bitmaps::add(&storage, &format!("bitmap {number}"), 512, true).unwrap();
    }
    assert_eq!(bitmaps::list(&storage).unwrap().len(), 40);
    let report = check::check(&storage, &check::Options::default()).unwrap();
    assert!(report.is_clean(), "{report:#?}");
    assert!(report.image_end > 64 * 64 * 512, "the table had to grow: {report:#?}");
}

/// After a power cut at any moment of any change the image has the bitmaps of before or of after, all bits of them, and no
/// error.
#[test]
fn a_power_cut_leaves_the_bitmaps_of_before_or_after() {
    let mut points = 0;
    for seed in seeds(4) {
        let mut random = Random::new(seed);
        let storage = Memory::new(Vec::new(), 64 << 20);
        let cluster_size = *random.one_of(&[512, 4096, 65536]);
        create_in(&storage, &CreateOptions { size: SIZE, cluster_size, ..Default::default() }).unwrap();
        for number in 0..1 + random.below(3) {
            bitmaps::add(&storage, &format!("bitmap {number}"), 4096, true).unwrap();
        }
        let mark = |_: &_, held: &mut Vec<bitmaps::Held>| {
            held[0].bits.as_ref().unwrap().mark(100_000, 300_000);
            Ok(())
        };
        bitmaps::change(&storage, mark).unwrap();
        let recording = Recording::new();
        let file = Recorded::new(&recording, storage.into_bytes());
        let mut states = vec![told(&file.content())];
        for step in 0..4 {
            match random.below(4) {
                0 => bitmaps::add(&file, &format!("more {step}"), 512, false).unwrap(),
                1 => bitmaps::change(&file, |_, held| {
                    held[0].bits.as_ref().unwrap().mark(0, SIZE / 2);
                    Ok(())
                })
                .unwrap(),
                2 => bitmaps::enable(&file, "bitmap 0", random.once_in(2)).unwrap(),
                _ => bitmaps::clear(&file, "bitmap 0").unwrap(),
            }
            states.push(told(&file.content()));
        }
        for at in 0..=recording.now() {
            for _ in 0..2 {
                let cut = *random.one_of(&Cut::ALL);
                let bytes = recording.crash(at, cut, &mut random).remove(0);
                points += 1;
                let place = format!("seed {seed}, at {at}, {cut:?}");
                let report = check::check(&bytes[..], &check::Options::default()).unwrap();
                assert_eq!(report.errors, 0, "{place}: {report:#?}");
                assert!(states.contains(&told(&bytes)), "{place}: {:#?}\n{states:#?}", told(&bytes));
            }
        }
    }
    println!("{points} points");
}

/// A repair that the power ends at any moment has made nothing worse: another one mends what that would have.
#[test]
fn a_power_cut_in_a_repair_loses_nothing() {
    let mut points = 0;
    for seed in seeds(2) {
        let scratch = Scratch::new();
        let path = scratch.dir().join("image");
        let mut random = Random::new(seed);
        common::disk(&path);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = common::Damage::of(&bytes);
        let mut put = |offset: u64, value: u64| {
            let offset = usize::try_from(offset).unwrap();
            bytes[offset..offset + 8].copy_from_slice(&value.to_be_bytes());
        };
        // Counts and flags; or the whole refcount structure.
        if seed % 2 == 0 {
            put(at.refcount_table, at.refcount_block + 512);
        } else {
            put(at.refcount_block + 8, random.next_u64());
        }
        put(at.l2 + at.own_index * 8, at.own);
        put(at.l2 + at.shared_index * 8, at.data | 1 << 63);
        let content = |bytes: &[u8]| {
            qcow2::Image::new(bytes).unwrap().content(&|_, buffer| buffer.fill(0), None).unwrap()
        };
        let wanted = content(&bytes);
        let recording = Recording::new();
        let file = Recorded::new(&recording, bytes);
        let repaired = check::repair(&file, Repair::All, &check::Options::default()).unwrap();
        assert!(repaired.after.is_clean(), "seed {seed}: {repaired:#?}");
        for at in 0..=recording.now() {
            for _ in 0..2 {
                let cut = *random.one_of(&Cut::ALL);
                let bytes = recording.crash(at, cut, &mut random).remove(0);
                points += 1;
                let storage = Memory::new(bytes, 64 << 20);
                let again = check::repair(&storage, Repair::All, &check::Options::default()).unwrap();
                let place = format!("seed {seed}, at {at}, {cut:?}");
                assert!(again.after.is_clean(), "{place}: {again:#?}");
                assert!(content(&storage.into_bytes()) == wanted, "{place}: other contents");
            }
        }
    }
    println!("{points} points");
}

/// While a disk is served its bitmaps are in use, and after a clean close they know all that was written.
#[test]
fn bitmaps_are_kept_while_the_disk_is_served() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    qemu_img(&["create", "-q", "-f", "qcow2", &path, "4M"]);
    qemu_img(&["bitmap", "--add", "-g", "64k", &path, "since"]);
    qemu_img(&["bitmap", "--add", "--disable", "-g", "64k", &path, "off"]);
    qemu_io(&path, &["write -P 1 0 64k"]);
    let disk = || {
        let kept = bitmaps::Kept::new();
        let options = Qcow2Options { bitmaps: Some(kept.clone()), ..Qcow2Options::new(&path) };
        Tracked::new(Qcow2::new(options), Some(Box::new(kept)))
    };
    for round in 1..3u64 {
        let disk = disk();
        let session = disk.open().unwrap();
        let client = Client::on_disk(EngineKind::Auto, &session);
        client.ask(Ask::write(round << 20, vec![7; 4096])).result.unwrap();
        let during = info::read(&open(&path)).unwrap();
        assert!(during.bitmaps.iter().all(|bitmap| bitmap.in_use), "{during:#?}");
        assert!(during.bitmaps_consistent);
        drop(client);
        drop(session);
        drop(disk);
        let now = told(&std::fs::read(&path).unwrap());
        let written = [0, 16, 32][..=usize::try_from(round).unwrap()].to_vec();
        assert_eq!(now["since"], (65536, true, written), "round {round}");
        assert_eq!(now["off"], (65536, false, vec![]));
        let theirs = qemu::check(Path::new(&path));
        assert_eq!((theirs.errors, theirs.leaks), (0, 0), "{}", theirs.said);
    }
    // QEMU goes on where we ended.
    qemu_io(&path, &["write -P 1 3M 4k"]);
    assert_eq!(told(&std::fs::read(&path).unwrap())["since"].2, [0, 16, 32, 48]);

    // A crash: what is on the disk then says that nothing is known.
    let disk = disk();
    let session = disk.open().unwrap();
    let client = Client::on_disk(EngineKind::Auto, &session);
    client.ask(Ask::write(0, vec![8; 4096])).result.unwrap();
    let crashed = std::fs::read(&path).unwrap();
    drop((client, session));
    drop(disk);
    let held = bitmaps::list(&crashed[..]).unwrap();
    assert!(held.len() == 2 && held.iter().all(|held| held.bits.is_none()), "{held:#?}");
    let storage = Memory::new(crashed, 64 << 20);
    let error = bitmaps::merge(&storage, "since", &["off"]).unwrap_err().to_string();
    assert!(error.contains("was not saved"), "{error}");
    bitmaps::remove(&storage, "since").unwrap();
    assert_eq!(bitmaps::list(&storage).unwrap().len(), 1);
}
