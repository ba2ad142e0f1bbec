//! Checks and repairs of images that QEMU made and that were damaged at random, beside `qemu-img check`.
//!
//! `VBD_SEED=N` repeats one seed, `VBD_ROUNDS=N` runs N times as many.

mod common;

use std::path::Path;

use common::{Damage, Scratch, damage, disk, grown};
use vbd_qcow2::check::{Class, Options, Repair, Report, check, repair};
use vbd_qcow2::format::{Header, incompatible};
use vbd_qcow2::storage::Memory;
use vbd_testing::{Random, qcow2, qemu, seeds};

/// Room for what a repair adds.
const ROOM: usize = 256 << 20;

/// What we find and QEMU does not, whatever the counts say.
///
/// - [`Class::Overlap`]: QEMU counts the uses of a cluster and does not ask what for; where the refcount is that count, it
///   is content.
/// - [`Class::Entry`]: with an external data file, that a cluster is elsewhere than the guest has it; subclusters that
///   contradict each other; reserved bits of snapshots' tables.
/// - [`Class::Bitmap`]: a table that does not fit the disk's size.
/// - [`Class::BeyondEnd`]: data of bitmaps behind the end.
/// - [`Class::Snapshot`]: the size that a snapshot's disk had.
fn only_we_look(report: &Report) -> bool {
    report.classes.keys().any(|class| {
        matches!(
            class,
            Class::Overlap
                | Class::Entry
                | Class::Bitmap
                | Class::BeyondEnd
                | Class::Header
                | Class::Snapshot
        )
    })
}

/// Both see errors or none.
fn agree(seed: u64, what: &str, path: &Path, bytes: &[u8], options: &Options) -> Option<Report> {
    std::fs::write(path, bytes).unwrap();
    let theirs = qemu::check(path);
    let ours = check(bytes, options);
    let told = format!("seed {seed}: {what}: {ours:#?}\nQEMU: {}", theirs.said);
    match &ours {
        // The header says so little that neither looks further; or it says what QEMU passes over.
        Err(error) => {
            assert!(theirs.errors > 0 || error.to_string().contains("header"), "{told}");
        }
        Ok(report) => {
            if theirs.errors > 0 {
                assert!(report.errors > 0, "only QEMU finds errors: {told}");
            } else {
                assert!(report.errors == 0 || only_we_look(report), "only we find errors: {told}");
            }
            // QEMU looks for leaks up to the end of the file, and where it gives up it has not looked everywhere.
            if theirs.leaks > 0 && theirs.errors == 0 {
                assert!(report.leaks > 0 || report.errors > 0, "only QEMU finds leaks: {told}");
            }
            if theirs.errors == 0 && report.errors == 0 {
                assert!(report.leaks >= theirs.leaks, "{told}");
            }
        }
    }
    ours.ok()
}

/// What can be read of an image, by a reader of its own.
fn contents(bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let image = qcow2::Image::new(bytes).ok()?;
    // Nothing is where the external data file is: what matters is where the clusters are.
    let nothing: &dyn Fn(u64, &mut [u8]) = &|_, buffer| buffer.fill(0xee);
    let data = (image.header.incompatible & incompatible::DATA_FILE != 0).then_some(&[][..]);
    let mut all = vec![image.content(nothing, data).ok()?];
    for snapshot in image.snapshots().ok()?.0 {
        // A size that damage made up.
        if snapshot.size > 64 << 20 {
            return None;
        }
        all.push(image.content_of(snapshot.l1, snapshot.size, nothing, data).ok()?);
    }
    Some(all)
}

#[test]
fn images_of_qemu_are_as_sound_as_qemu_says() {
    for seed in seeds(20) {
        let scratch = Scratch::new();
        let path = scratch.dir().join("image");
        let mut random = Random::new(seed);
        grown(&mut random, &path);
        let bytes = std::fs::read(&path).unwrap();
        let theirs = qemu::check(&path);
        let few = Options { memory: 1, ..Options::default() };
        let ours = check(&bytes[..], &Options::default()).unwrap();
        assert_eq!(
            (theirs.errors, theirs.leaks),
            (ours.errors, ours.leaks),
            "seed {seed}: {ours:#?}\n{}",
            theirs.said
        );
        let again = check(&bytes[..], &few).unwrap();
        assert_eq!((again.errors, again.leaks, again.image_end), (ours.errors, ours.leaks, ours.image_end));
    }
}

#[test]
fn damaged_images_are_seen_and_mended() {
    let (mut damaged, mut mended, mut errors) = (0, 0, 0);
    for seed in seeds(17) {
        let scratch = Scratch::new();
        let path = scratch.dir().join("image");
        let mut random = Random::new(seed);
        grown(&mut random, &path);
        let good = std::fs::read(&path).unwrap();
        for round in 0..6 {
            let mut bytes = good.clone();
            let mut what = Vec::new();
            for _ in 0..=random.below(2) {
                what.push(damage(&mut random, &mut bytes));
            }
            let told = format!("round {round}: {what:?}");
            let options = Options { memory: 64 << 10, ..Options::default() };
            let Some(report) = agree(seed, &told, &path, &bytes, &options) else { continue };
            damaged += 1;
            errors += u64::from(report.errors > 0);

            // Subclusters that contradict their cluster cannot be read; the reader takes them from the header.
            let contradiction = report.findings.iter().any(|finding| finding.reason.contains("subclusters"));
            let readable = contents(&bytes).filter(|_| !contradiction);
            let storage = Memory::new(bytes.clone(), ROOM);
            let repaired = match repair(&storage, Repair::All, &options) {
                Ok(repaired) => repaired,
                // What cannot be done is said, and nothing was lost by it.
                Err(error) => {
                    assert!(error.to_string().contains("convert"), "seed {seed}: {told}: {error}");
                    let same = readable.is_none() || contents(&storage.to_bytes()) == readable;
                    assert!(same, "seed {seed}: {told}: other contents");
                    continue;
                }
            };
            let now = storage.into_bytes();
            let after =
                agree(seed, &format!("{told}, repaired: {:#?}", repaired.actions), &path, &now, &options);
            assert_eq!(after.as_ref().map(|report| report.errors), Some(repaired.after.errors));
            // A file that was cut off is as long as it was, and the missing clusters are zeros as before.
            if let Some(readable) = readable {
                assert!(
                    contents(&now) == Some(readable),
                    "seed {seed}: {told}: {repaired:#?}: other contents"
                );
            }
            mended += u64::from(report.errors > 0 && repaired.after.errors == 0);
            // What is told is sound again after a second repair, too, which finds nothing to do.
            if repaired.after.is_clean() {
                let storage = Memory::new(now, ROOM);
                let again = repair(&storage, Repair::All, &options).unwrap();
                assert_eq!(again.actions, [""; 0], "seed {seed}: {told}");
            }
        }
    }
    println!("{damaged} damaged images, {errors} with errors, {mended} mended");
    assert!(errors > damaged / 3 && mended > errors / 3, "{damaged} {errors} {mended}");
}

/// Leaks alone go without anything else being written.
#[test]
fn leaks_are_given_back_and_nothing_else_is_touched() {
    for seed in seeds(10) {
        let scratch = Scratch::new();
        let path = scratch.dir().join("image");
        let mut random = Random::new(seed);
        let shape = grown(&mut random, &path);
        let mut bytes = std::fs::read(&path).unwrap();
        if check(&bytes[..], &Options::default()).unwrap().errors > 0 {
            continue;
        }
        // A count of 1 where nothing is: the last of the first block, behind the end of the file.
        let header = Header::read(&bytes[..]).unwrap();
        let table = usize::try_from(header.refcount_table_offset).unwrap();
        let block = usize::try_from(u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap())).unwrap();
        let layout = header.layout();
        let last = usize::try_from(layout.refcount_block_entries() - 1).unwrap();
        let block = &mut bytes[block..block + layout.cluster_len()];
        if layout.refcount_width.get(block, last) > 0 {
            continue;
        }
        layout.refcount_width.set(block, last, 1);
        let before = contents(&bytes);
        let storage = Memory::new(bytes, ROOM);
        let repaired = repair(&storage, Repair::Leaks, &Options::default()).unwrap();
        assert_eq!(
            (repaired.before.leaks, repaired.after.leaks),
            (1, 0),
            "seed {seed}: {shape:?} {repaired:#?}"
        );
        assert!(contents(&storage.into_bytes()) == before, "seed {seed}");
    }
}

/// Each kind of damage, by name, on one image: what is said of it, and whether it can be mended.
#[test]
fn every_kind_of_damage_is_named() {
    let scratch = Scratch::new();
    let path = scratch.dir().join("image");
    disk(&path);
    let good = std::fs::read(&path).unwrap();
    assert!(check(&good[..], &Options::default()).unwrap().is_clean());
    let at = Damage::of(&good);
    let word = |offset: u64, value: u64| vec![(offset, value.to_be_bytes().to_vec())];
    let count =
        |cluster: u64, value: u16| vec![(at.refcount_block + cluster * 2, value.to_be_bytes().to_vec())];
    let copied = 1u64 << 63;
    let end = good.len() as u64;
    // What is written, the kind of finding, a part of what is said, and whether a repair leaves no error.
    type Case<'a> = (&'a str, Vec<(u64, Vec<u8>)>, Class, &'a str, bool);
    let cases: Vec<Case<'_>> = vec![
        (
            "refcount too low",
            count(at.data >> 16, 0),
            Class::Refcount,
            "the refcount is 0, and there are",
            true,
        ),
        ("leak", count((end >> 16) + 3, 7), Class::Leak, "the refcount is 7, and there are 0", true),
        ("COPIED missing in L1", word(at.l1, at.l2), Class::Copied, "entry 0 of the L1 table", true),
        (
            "COPIED missing in L2",
            word(at.l2 + 8 * at.own_index, at.own),
            Class::Copied,
            "does not say that it is 1",
            true,
        ),
        (
            "COPIED where shared",
            word(at.l2 + 8 * at.shared_index, at.data | copied),
            Class::Copied,
            "and the entry says that it is 1",
            true,
        ),
        ("reserved bits in L1", word(at.l1, at.l2 | copied | 4), Class::Entry, "reserved bits 0x4", true),
        (
            "reserved bits in L2",
            word(at.l2 + 8 * at.own_index, at.own | copied | 0x100),
            Class::Entry,
            "reserved bits 0x100",
            true,
        ),
        ("misaligned L2 table", word(at.l1, at.l2 + 512), Class::Entry, "not aligned", false),
        (
            "misaligned cluster",
            word(at.l2 + 8 * at.own_index, at.own + 512),
            Class::Entry,
            "not aligned to a cluster",
            false,
        ),
        (
            "misaligned cluster of zeros",
            word(at.l2 + 8 * at.own_index, at.own + 513),
            Class::Entry,
            "not aligned to a cluster",
            true,
        ),
        (
            "cluster behind the end",
            word(at.l2 + 8 * at.own_index, 1 << 45 | copied),
            Class::BeyondEnd,
            "behind the end of the file",
            false,
        ),
        ("L2 table behind the end", word(at.l1, 1 << 45), Class::BeyondEnd, "an L2 table at", false),
        (
            "data over a refcount block",
            word(at.l2 + 8 * at.own_index, at.refcount_block),
            Class::Overlap,
            "a refcount block and for guest data",
            true,
        ),
        (
            "data over an L2 table",
            word(at.l2 + 8 * at.own_index, at.l2),
            Class::Overlap,
            "an L2 table and for guest data",
            false,
        ),
        (
            "L2 table over the L1 table",
            word(at.l1, at.l1),
            Class::Overlap,
            "the L1 table and for an L2 table",
            false,
        ),
        (
            "misaligned refcount block",
            word(at.refcount_table, at.refcount_block + 512),
            Class::Entry,
            "of the refcount table",
            true,
        ),
        ("no refcount block", word(at.refcount_table, 0), Class::Refcount, "the refcount is 0", true),
        (
            "refcount block behind the end",
            word(at.refcount_table, 1 << 45),
            Class::BeyondEnd,
            "a refcount block at",
            true,
        ),
        (
            "a block used twice",
            word(at.refcount_table + 8, at.refcount_block),
            Class::Overlap,
            "a refcount block and for a refcount block",
            true,
        ),
        (
            "refcount table over data",
            word(48, at.data),
            Class::Overlap,
            "the refcount table and for guest data",
            true,
        ),
        ("snapshot table over data", word(64, at.data), Class::Snapshot, "the snapshot table", false),
        (
            "bitmap bits misaligned",
            word(at.bitmap_table, at.bitmap_bits + 512),
            Class::Bitmap,
            "not aligned",
            true,
        ),
        (
            "bitmap bits behind the end",
            word(at.bitmap_table, 1 << 45),
            Class::BeyondEnd,
            "the bits of a bitmap",
            true,
        ),
        (
            "bitmap table reserved bits",
            word(at.bitmap_table, at.bitmap_bits | 8),
            Class::Bitmap,
            "reserved",
            true,
        ),
        (
            "bitmap directory garbage",
            word(at.bitmap_directory + 16, 0),
            Class::Bitmap,
            "type of bitmap 0 is 0",
            true,
        ),
        (
            "compressed with COPIED",
            word(at.l2 + 8 * at.compressed_index, at.compressed | copied),
            Class::Copied,
            "a compressed cluster has the flag",
            true,
        ),
    ];
    for (name, changes, class, said, mendable) in cases {
        let mut bytes = good.clone();
        for (offset, change) in changes {
            let offset = usize::try_from(offset).unwrap();
            bytes[offset..offset + change.len()].copy_from_slice(&change);
        }
        let report = check(&bytes[..], &Options::default()).unwrap();
        let found = report
            .findings
            .iter()
            .any(|finding| finding.class == class && finding.to_string().contains(said));
        assert!(found, "{name}: {report:#?}");
        let readable = contents(&bytes);
        let storage = Memory::new(bytes, ROOM);
        let repaired = repair(&storage, Repair::All, &Options::default()).unwrap();
        assert_eq!(repaired.after.errors == 0, mendable, "{name}: {repaired:#?}");
        let now = storage.into_bytes();
        if readable.is_some() {
            assert!(contents(&now) == readable, "{name}: other contents");
        }
        if mendable {
            std::fs::write(&path, &now).unwrap();
            let theirs = qemu::check(&path);
            // What could not be read may use what nothing was found to use.
            let leaks = if repaired.before.incomplete { theirs.leaks } else { 0 };
            assert_eq!((theirs.errors, theirs.leaks), (0, leaks), "{name}: {}", theirs.said);
        }
    }
}

/// A table that cannot be followed may lead to anything: nothing that it could lead to is given back.
#[test]
fn what_a_lost_table_led_to_is_kept() {
    let scratch = Scratch::new();
    let path = scratch.dir().join("image");
    disk(&path);
    let good = std::fs::read(&path).unwrap();
    let at = Damage::of(&good);
    for lost in [at.l2 + 512, 1 << 45] {
        let mut bytes = good.clone();
        let l1 = usize::try_from(at.l1).unwrap();
        bytes[l1..l1 + 8].copy_from_slice(&lost.to_be_bytes());
        for what in [Repair::Leaks, Repair::All] {
            let storage = Memory::new(bytes.clone(), ROOM);
            let repaired = repair(&storage, what, &Options::default()).unwrap();
            assert!(repaired.before.incomplete && repaired.before.leaks > 0, "{repaired:#?}");
            assert!(repaired.after.leaks >= repaired.before.leaks, "{repaired:#?}");
            // Whoever knows where the table was puts the entry back, and all is as it was.
            let mut now = storage.into_bytes();
            now[l1..l1 + 8].copy_from_slice(&good[l1..l1 + 8]);
            assert_eq!(contents(&now), contents(&good));
            assert_eq!(check(&now[..], &Options::default()).unwrap().errors, 0);
        }
    }
}

/// The marks go when the image is sound, and stay while it is not.
#[test]
fn the_marks_are_cleared_when_all_is_well() {
    let scratch = Scratch::new();
    let path = scratch.dir().join("image");
    disk(&path);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = Damage::of(&bytes);
    bytes[79] |= 3;
    let count = usize::try_from(at.refcount_block + (at.data >> 16) * 2).unwrap();
    bytes[count..count + 2].fill(0);
    let storage = Memory::new(bytes.clone(), ROOM);
    let repaired = repair(&storage, Repair::All, &Options::default()).unwrap();
    assert!(repaired.after.is_clean() && repaired.after.notes.is_empty(), "{repaired:#?}");
    assert_eq!(Header::read(&storage).unwrap().incompatible, 0);

    let l1 = usize::try_from(at.l1).unwrap();
    bytes[l1..l1 + 8].copy_from_slice(&(at.l2 + 512).to_be_bytes());
    let storage = Memory::new(bytes, ROOM);
    let repaired = repair(&storage, Repair::All, &Options::default()).unwrap();
    assert!(repaired.after.errors > 0 && repaired.after.notes.len() == 2, "{repaired:#?}");
    assert_eq!(Header::read(&storage).unwrap().incompatible, 3);
}

/// Half of a file that was copied.
#[test]
fn a_file_that_was_cut_off_gets_its_length_back() {
    let scratch = Scratch::new();
    let path = scratch.dir().join("image");
    disk(&path);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = Damage::of(&bytes);
    bytes.truncate(usize::try_from(at.own).unwrap());
    let storage = Memory::new(bytes, ROOM);
    let repaired = repair(&storage, Repair::All, &Options::default()).unwrap();
    assert!(repaired.before.has(Class::BeyondEnd), "{repaired:#?}");
    assert!(repaired.actions[0].contains("are missing read as zeros"), "{repaired:#?}");
    assert_eq!(repaired.after.errors, 0, "{repaired:#?}");
}

/// Small images with every structure, changed anywhere: what the fuzz target asks of any bytes holds.
#[test]
fn bytes_changed_at_random_are_checked_and_repaired() {
    let corpus = vbd_testing::corpus::fuzz_dir().join("corpus/qcow2_check");
    let images: Vec<_> =
        vbd_testing::corpus::entries(&corpus).iter().map(|path| std::fs::read(path).unwrap()).collect();
    for seed in seeds(400) {
        let mut random = Random::new(seed);
        let mut bytes = random.one_of(&images).clone();
        for _ in 0..=random.below(6) {
            let at = random.index(bytes.len());
            match random.below(4) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = u8::try_from(random.below(256)).unwrap(),
                2 => bytes.truncate(at.max(600)),
                // A word that looks like the offset of a cluster.
                _ => {
                    let at = at / 8 * 8;
                    let word = (random.below(16) * 512) | (random.below(2) << 63);
                    if let Some(place) = bytes.get_mut(at..at + 8) {
                        place.copy_from_slice(&word.to_be_bytes());
                    }
                }
            }
        }
        println!("seed {seed}");
        vbd_qcow2::check::fuzz::check_and_repair(&bytes);
        vbd_qcow2::format::fuzz::structures(&bytes);
    }
}

#[test]
fn what_the_fuzzer_keeps_is_answered() {
    vbd_testing::corpus::replay("qcow2_check", vbd_qcow2::check::fuzz::check_and_repair);
}
