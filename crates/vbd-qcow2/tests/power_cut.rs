//! Power cuts under a qcow2 image that several queues write: whatever the storage kept of what was not flushed, the image
//! has no error, at most leaks, and holds what was flushed.
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

mod images;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use images::Files;
use vbd_core::Session;
use vbd_core::file::{Fault, Faults};
use vbd_qcow2::check::{self, Repair, repair};
use vbd_ring::{EngineKind, Op};
use vbd_testing::client::Client;
use vbd_testing::power::{Cut, Expected, FileRecorder, Load, Recording, SECTOR, drive, stamp_of};
use vbd_testing::qcow2::{Image, incompatible};
use vbd_testing::qemu::{self, Shape};
use vbd_testing::{Random, seeds};

/// A snapshot that was made, what it holds, and when it certainly was there.
struct Made {
    name: String,
    content: Vec<u8>,
    since: usize,
    until: Option<usize>,
}

/// What was done to an image, for looking at its states.
struct Run {
    seed: u64,
    files: Files,
    recording: Arc<Recording>,
    expected: Expected,
    snapshots: Vec<Made>,
    /// When snapshots were made, applied or deleted.
    changes: Vec<Range<usize>>,
}

impl Run {
    /// Loads a disk with requests, between them what else can be done to it, and closes it.
    fn new(seed: u64, shape: Shape, backed: bool, random: &mut Random) -> Self {
        println!("seed {seed}: {shape:?}, backed: {backed}");
        let files = Files::new(shape, backed, random);
        let recording = Recording::new();
        let recorders: Vec<_> = files.bytes().into_iter().map(|bytes| recording.file(bytes)).collect();
        let expected = Expected::new(files.first());
        let mut run = Run { seed, files, recording, expected, snapshots: Vec::new(), changes: Vec::new() };
        for _ in 0..2 {
            run.session(&recorders, random, None);
        }
        run
    }

    /// The same on storage that fails now and then, as `faults` has it, once the image is open.
    fn failing(seed: u64, shape: Shape, backed: bool, random: &mut Random, faults: &Arc<dyn Faults>) -> Self {
        println!("seed {seed}: {shape:?}, backed: {backed}");
        let files = Files::new(shape, backed, random);
        let recording = Recording::new();
        let recorders: Vec<_> = files.bytes().into_iter().map(|bytes| recording.file(bytes)).collect();
        let expected = Expected::new(files.first());
        let mut run = Run { seed, files, recording, expected, snapshots: Vec::new(), changes: Vec::new() };
        run.session(&recorders, random, None);
        run.session(&recorders, random, Some(faults));
        run
    }

    fn session(
        &mut self,
        recorders: &[Arc<FileRecorder>],
        random: &mut Random,
        faults: Option<&Arc<dyn Faults>>,
    ) {
        let session = self.files.open(Some(recorders[0].clone()), recorders.get(1).cloned());
        recorders.iter().for_each(|recorder| recorder.set_faults(faults.cloned()));
        let clients =
            [Client::on_disk(EngineKind::Auto, &session), Client::on_disk(EngineKind::Auto, &session)];
        let sectors = self.files.shape.size / 512;
        for _ in 0..2 {
            // Sometimes all in one place.
            let narrow = random.below(sectors / 2 + 1);
            let part = if random.once_in(3) { narrow..(narrow + 40).min(sectors) } else { 0..sectors };
            let load = Load { requests: 60, may_fail: faults.is_some(), ..Load::on(part) };
            drive(&clients, &self.recording, &mut self.expected, random, &load);
            if faults.is_none() && self.files.shape.has_snapshots() && random.once_in(2) {
                let begun = self.recording.tick();
                self.snapshot(&session, &clients[0], random);
                self.changes.push(begun..self.recording.tick());
            }
        }
        drop(clients);
        drop(session);
    }

    fn snapshot(&mut self, session: &Arc<dyn Session>, client: &Client, random: &mut Random) {
        let live = session.live().expect("qcow2 has snapshots");
        let there: Vec<usize> =
            (0..self.snapshots.len()).filter(|index| self.snapshots[*index].until.is_none()).collect();
        match random.below(3) {
            0 if !there.is_empty() => {
                let snapshot = &mut self.snapshots[*random.one_of(&there)];
                snapshot.until = Some(self.recording.tick());
                live.delete_snapshot(&snapshot.name).expect("deleted");
            }
            1 if !there.is_empty() => {
                let snapshot = &self.snapshots[*random.one_of(&there)];
                let begun = self.recording.tick();
                live.apply_snapshot(&snapshot.name).expect("applied");
                let ended = self.recording.tick();
                for (sector, content) in (0..).zip(snapshot.content.chunks(SECTOR)) {
                    let stamp = stamp_of(sector, content).expect("whole sectors");
                    // It is durable when it was done.
                    let write = self.expected.write(sector..sector + 1, stamp, true, begun);
                    self.expected.ended(write, ended);
                }
            }
            _ => {
                let name = format!("snapshot {}", self.snapshots.len());
                live.create_snapshot(&name).expect("created");
                let since = self.recording.tick();
                // As recorded: two writes to a sector at the same time may come in either order, and every state of the recording has
                // the same.
                let _ = client.read(0, self.files.shape.size);
                let files = self.recording.crash(since, Cut::Everything, random);
                let data = files.get(1).map(|data| &data[..]);
                let image = Image::new(&files[0]).expect("an image");
                let content = self.files.content(&image, data).expect("readable");
                self.snapshots.push(Made { name, content, since, until: None });
            }
        }
    }

    /// Looks at one state; now and then with QEMU and with vbd itself.
    fn look(&self, at: usize, cut: Cut, random: &mut Random, closely: bool) -> Result<(), String> {
        let files = self.recording.crash(at, cut, random);
        let data = files.get(1).map(|data| &data[..]);
        let image = Image::new(&files[0])?;
        // Refcounts are made anew where the image says that they were to be late.
        let mut is_dirty = image.header.incompatible & incompatible::DIRTY != 0;
        let report = image.check();
        // Version 2 cannot say so, but what may be wrong then is the same.
        if image.header.version == 2 && self.changes.iter().any(|change| change.contains(&at)) {
            is_dirty = report.errors.iter().all(|error| error.starts_with("COPIED is wrong"));
        }
        if !report.errors.is_empty() && !is_dirty {
            return Err(format!("{:?}", report.errors));
        }
        self.expected.check_cut(&self.files.content(&image, data)?, at)?;
        let (there, _) = image.snapshots()?;
        for snapshot in &there {
            let made = self.snapshots.iter().find(|made| made.name == snapshot.name);
            let below = |offset, buffer: &mut [u8]| self.files.read_below(offset, buffer);
            let content = image.content_of(snapshot.l1, snapshot.size, &below, None)?;
            match made {
                Some(made) if made.content != content => {
                    let sectors = (0..).zip(made.content.chunks(SECTOR).zip(content.chunks(SECTOR)));
                    let changed: Vec<_> = sectors
                        .filter(|(_, (was, is))| was != is)
                        .map(|(sector, (was, is))| (sector, stamp_of(sector, was), stamp_of(sector, is)))
                        .collect();
                    return Err(format!(
                        "snapshot {}, made by {}, has changed; sectors with what was and what is there: {changed:x?}",
                        snapshot.name, made.since
                    ));
                }
                Some(_) => {}
                None => return Err(format!("snapshot {} was never made", snapshot.name)),
            }
        }
        for made in &self.snapshots {
            let must = made.since <= at && made.until.is_none_or(|until| at < until);
            if must && !there.iter().any(|snapshot| snapshot.name == made.name) {
                return Err(format!("snapshot {} is lost", made.name));
            }
        }
        if closely { self.open_again(&files, at, is_dirty) } else { Ok(()) }
    }

    /// QEMU finds no error in it; vbd opens it, finds the same there, writes, and closes it without an error.
    fn open_again(&self, files: &[Vec<u8>], at: usize, is_dirty: bool) -> Result<(), String> {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let (path, data) = (dir.path().join("disk.qcow2"), dir.path().join("disk.data"));
        std::fs::write(&path, &files[0]).expect("room");
        if let Some(content) = files.get(1) {
            std::fs::write(&data, content).expect("room");
        }
        let found = qemu::check(&path);
        if found.errors > 0 && !is_dirty {
            return Err(found.said);
        }
        if found.errors > 0 && self.files.shape.version == 2 {
            // What is done by itself where the image says that it is needed.
            let file = std::fs::File::options().read(true).write(true).open(&path).expect("there");
            repair(&file, Repair::All, &check::Options::default()).map_err(|error| error.to_string())?;
        }
        let session = self.files.open_at(&path, &data, None, None);
        let client = Client::on_disk(EngineKind::Auto, &session);
        let content = client.read(0, self.files.shape.size);
        self.expected.check_cut(&content, at).map_err(|wrong| format!("opened again: {wrong}"))?;
        client.write(0, vec![1; SECTOR]);
        client.write(self.files.shape.size / 1024 * 512, vec![2; SECTOR]);
        drop((client, session));
        let bytes = std::fs::read(&path).expect("there");
        let errors = Image::new(&bytes)?.check().errors;
        if errors.is_empty() { Ok(()) } else { Err(format!("opened again and closed: {errors:?}")) }
    }

    fn look_often(&self, points: usize, random: &mut Random) {
        for point in 0..points {
            let at = random.index(self.recording.now() + 1);
            let cut = *random.one_of(&Cut::ALL);
            if let Err(wrong) = self.look(at, cut, random, point % 25 == 0) {
                println!("before it:\n{}", self.recording.story(at, 60));
                panic!("seed {}, point {point} ({cut:?} at {at}): {wrong}", self.seed);
            }
        }
        // And the end, where nothing was lost.
        if let Err(wrong) = self.look(self.recording.now(), Cut::Everything, random, true) {
            panic!("seed {}, at the end: {wrong}", self.seed);
        }
    }
}

fn small(random: &mut Random) -> Shape {
    let shape = Shape::random(random);
    Shape { size: shape.size.min(1 << 20), ..shape }
}

#[test]
fn images_of_any_shape_survive_every_power_cut() {
    for seed in seeds(10) {
        let mut random = Random::new(seed);
        let shape = small(&mut random);
        let backed = random.once_in(2);
        Run::new(seed, shape, backed, &mut random).look_often(100, &mut random);
    }
}

#[test]
fn small_clusters_survive_every_power_cut() {
    // Refcount blocks, the refcount table and L2 tables come often there.
    for seed in seeds(6) {
        let mut random = Random::new(seed);
        let shape = Shape { cluster_bits: 9, ..Shape::plain(300 << 10) };
        let backed = random.once_in(2);
        Run::new(seed, shape, backed, &mut random).look_often(150, &mut random);
    }
}

#[test]
fn overlays_survive_every_power_cut() {
    for seed in seeds(6) {
        let mut random = Random::new(seed);
        let shape = Shape { cluster_bits: 16, ..Shape::plain(1 << 20) };
        Run::new(seed, shape, true, &mut random).look_often(100, &mut random);
    }
}

/// Storage that fails now and then: so many times in a thousand, reads and writes; and a flush that fails, or none.
fn now_and_then(seed: u64, odds: u64, flushes: u64) -> Arc<dyn Faults> {
    let random = Mutex::new(Random::new(seed));
    Arc::new(move |op: &Op| {
        let mut random = random.lock().unwrap_or_else(PoisonError::into_inner);
        let odds = match op {
            Op::Sync => flushes,
            Op::Read { .. } => odds / 2,
            _ => odds,
        };
        let error = *random.one_of(&[libc::EIO, libc::ENOSPC]);
        (random.below(1000) < odds).then_some(Fault::Fail(error))
    })
}

#[test]
fn images_on_storage_that_fails_survive_every_power_cut() {
    for seed in seeds(8) {
        let mut random = Random::new(seed);
        let shape = small(&mut random);
        let backed = random.once_in(2);
        let faults = now_and_then(seed, *random.one_of(&[10, 50, 200]), *random.one_of(&[0, 0, 100]));
        Run::failing(seed, shape, backed, &mut random, &faults).look_often(60, &mut random);
    }
}
