//! Flattening, committing and compacting while guests use the disk.
#![allow(clippy::cast_possible_truncation, reason = "sizes of tests are small")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vbd_core::file::{Fault, Faults};
use vbd_core::track::Tracked;
use vbd_core::{Commit, Disk, Error, ErrorKind, Flags, Layer, Operation, Result, Session, Watch};
use vbd_image::lease::{self, Mode};
use vbd_image::raw::{Raw, RawOptions};
use vbd_qcow2::{Qcow2, Qcow2Options};
use vbd_ring::{EngineKind, Op};
use vbd_testing::client::{Ask, Client};
use vbd_testing::power::{Cut, Expected, Load, Recording, SECTOR, Stamp, drive, fill};
use vbd_testing::qcow2::Image;
use vbd_testing::qemu::{self, Shape};
use vbd_testing::{Random, seeds};

/// Goes on; stops after so many steps, where that was said.
struct Watching {
    steps: AtomicU64,
    stop_after: u64,
}

impl Watching {
    fn always() -> Self {
        Self::stop_after(u64::MAX)
    }

    fn stop_after(stop_after: u64) -> Self {
        Watching { steps: AtomicU64::new(0), stop_after }
    }
}

impl Watch for Watching {
    fn step(&self, _: &str, _: u64) {}

    fn advance(&self, _: u64, _: u64) -> Result<()> {
        if self.steps.fetch_add(1, Ordering::SeqCst) >= self.stop_after {
            return Err(Error::new(ErrorKind::Cancelled, "stopped"));
        }
        Ok(())
    }
}

/// An image that stands on another, made by QEMU.
struct Case {
    shape: Shape,
    image: PathBuf,
    base: PathBuf,
    base_format: &'static str,
    base_size: u64,
    model: Vec<u8>,
    dir: tempfile::TempDir,
}

fn bytes_of(random: &mut Random, len: usize) -> Vec<u8> {
    let start = random.next_u64();
    (0..len as u64).map(|at| ((start + at / 512) % 251) as u8 + 1).collect()
}

impl Case {
    fn new(random: &mut Random, shape: Shape, base_format: &'static str) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let (image, base) = (dir.path().join("disk.qcow2"), dir.path().join("base"));
        let sectors = shape.size / 512;
        let base_size = (sectors / 2 + random.below(sectors) + 1) * 512;
        let mut below = vec![0; base_size as usize];
        // Data, and holes of all sizes.
        let mut at = 0;
        while at < below.len() {
            let len = (1 + random.index(200)) * 512;
            let end = (at + len).min(below.len());
            if random.once_in(2) {
                let data = bytes_of(random, end - at);
                below[at..end].copy_from_slice(&data);
            }
            at = end;
        }
        let raw = dir.path().join("raw");
        std::fs::write(&raw, &below).expect("room");
        qemu::img(&["convert", "-O", base_format, qemu::text(&raw), qemu::text(&base)]);
        std::fs::remove_file(raw).expect("there");
        shape.create(&image, Some((&base, base_format)));
        below.resize(shape.size as usize, 0);
        Case { shape, image, base, base_format, base_size, model: below, dir }
    }

    fn random(random: &mut Random) -> Self {
        let shape = Shape { data_file: false, data_file_raw: false, ..Shape::random(random) };
        let format = *random.one_of(&["raw", "qcow2"]);
        println!("{shape:?} on {format}");
        Self::new(random, shape, format)
    }

    fn disk(&self, faults: Option<Arc<dyn Faults>>, below: Option<Arc<dyn Faults>>) -> Arc<dyn Disk> {
        let mut options = Qcow2Options::new(&self.image);
        options.faults = faults;
        options.backing = Some(self.base_disk(true, below));
        Tracked::new(Qcow2::new(options), None)
    }

    fn base_disk(&self, read_only: bool, faults: Option<Arc<dyn Faults>>) -> Arc<dyn Disk> {
        // As the commands have it: a disk that is to be written to is not waited for.
        let lease_wait =
            if read_only { std::time::Duration::from_secs(2) } else { std::time::Duration::ZERO };
        match self.base_format {
            "raw" => Raw::new(RawOptions { read_only, faults, lease_wait, ..RawOptions::new(&self.base) }),
            _ => Qcow2::new(Qcow2Options {
                read_only,
                faults,
                lease_wait,
                notes: false,
                ..Qcow2Options::new(&self.base)
            }),
        }
    }

    fn commit(&self) -> Commit {
        Commit { into: self.base_disk(false, None), track: None }
    }

    /// Neither errors nor leaks, and all that it should hold.
    fn check(&self) {
        self.check_but(false);
    }

    /// The same, where the image below may have clusters that nobody uses.
    fn check_but(&self, leaks_below: bool) {
        for (path, format) in [(&self.image, "qcow2"), (&self.base, self.base_format)] {
            if format == "qcow2" && path.exists() {
                let check = qemu::check(path);
                let leaks = if leaks_below && path == &self.base { 0 } else { check.leaks };
                assert_eq!((check.errors, leaks), (0, 0), "{}", check.said);
            }
        }
        assert!(content(&self.image, "qcow2", self.dir.path()) == self.model, "other bytes for QEMU");
    }

    fn stands_on_something(&self) -> bool {
        qemu::img(&["info", qemu::text(&self.image)]).contains("backing file")
    }
}

fn content(path: &Path, format: &str, dir: &Path) -> Vec<u8> {
    let raw = dir.join("content");
    qemu::img(&["convert", "-f", format, "-O", "raw", qemu::text(path), qemu::text(&raw)]);
    std::fs::read(raw).expect("converted")
}

/// Somebody who uses a part of a disk.
struct Guest<'a> {
    client: Client,
    /// Where it begins, and what it holds.
    start: u64,
    model: &'a mut [u8],
    random: Random,
}

impl Guest<'_> {
    fn range(&mut self) -> (usize, usize) {
        let sectors = self.model.len() / 512;
        let first = self.random.index(sectors);
        let most = if self.random.once_in(8) { 600 } else { 24 };
        (first * 512, (1 + self.random.index(most)).min(sectors - first) * 512)
    }

    fn read(&self, from: usize, len: usize) -> Vec<u8> {
        self.client.read(self.start + from as u64, len as u64)
    }

    fn act(&mut self) {
        if self.model.is_empty() {
            return;
        }
        let (from, len) = self.range();
        let offset = self.start + from as u64;
        let part = from..from + len;
        match self.random.below(16) {
            0 => {
                self.client.ask(Ask::new(Operation::Flush, 0, 0)).result.expect("flushed");
            }
            1 | 2 => {
                let mut ask = Ask::new(Operation::WriteZeroes, offset, len as u64);
                ask.flags = Flags { may_unmap: self.random.once_in(2), ..Flags::default() };
                self.client.ask(ask).result.expect("zeroed");
                self.model[part].fill(0);
            }
            3 => {
                self.client.ask(Ask::new(Operation::Discard, offset, len as u64)).result.expect("discarded");
                let now = self.read(from, len);
                for (at, (new, old)) in now.iter().zip(&self.model[part.clone()]).enumerate() {
                    assert!(*new == 0 || new == old, "{at} after a discard: {new} for {old}");
                }
                self.model[part].copy_from_slice(&now);
            }
            4..8 => assert!(self.read(from, len) == self.model[part], "read other bytes at {offset} ({len})"),
            _ => {
                let data = bytes_of(&mut self.random, len);
                self.model[part].copy_from_slice(&data);
                self.client.write(offset, data);
            }
        }
    }

    fn check(&self) {
        assert!(self.read(0, self.model.len()) == self.model, "other bytes from {}", self.start);
    }
}

/// Has two guests use a disk while something is done to it; what that says.
fn while_guests<T: Send>(
    session: &Arc<dyn Session>,
    model: &mut [u8],
    random: &mut Random,
    work: impl FnOnce() -> T + Send,
) -> T {
    let half = model.len() / 1024 * 512;
    let (one, two) = model.split_at_mut(half);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let guests = [(0, one), (half as u64, two)].map(|(start, model)| {
            let client = Client::on_disk(EngineKind::Auto, session);
            let random = Random::new(random.next_u64());
            let mut guest = Guest { client, start, model, random };
            let done = &done;
            scope.spawn(move || {
                let mut acts = 0;
                // Not before it as well: so there is something to be committed.
                while !done.load(Ordering::SeqCst) || acts < 20 {
                    guest.act();
                    acts += 1;
                }
                (0..10).for_each(|_| guest.act());
                guest.check();
            })
        });
        let result = work();
        done.store(true, Ordering::SeqCst);
        guests.into_iter().for_each(|guest| guest.join().expect("a guest"));
        result
    })
}

#[test]
fn a_disk_is_flattened_while_guests_use_it() {
    for seed in seeds(12) {
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let mut case = Case::random(&mut random);
        let disk = case.disk(None, None);
        let session = disk.open().expect("openable");
        let mut model = std::mem::take(&mut case.model);
        while_guests(&session, &mut model, &mut random, || ());
        if random.once_in(3) {
            // Stopped, it can be done again.
            let stopped = session.live().expect("live").flatten(&Watching::stop_after(0));
            assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
        }
        while_guests(&session, &mut model, &mut random, || {
            session.live().expect("live").flatten(&Watching::always()).expect("flattened")
        });
        case.model = model;
        // The file below is nobody's any more, and nobody needs it, not even where the disk is opened anew.
        assert_eq!(lease::holders(&case.base).expect("a file"), []);
        std::fs::remove_file(&case.base).expect("there");
        let again = session.live().expect("live").flatten(&Watching::always()).unwrap_err().to_string();
        assert!(again.contains("stands on no other image"), "{again}");
        drop(session);
        assert!(!case.stands_on_something());
        case.check();
        let session = disk.open().expect("open again");
        let mut model = std::mem::take(&mut case.model);
        while_guests(&session, &mut model, &mut random, || ());
        drop(session);
        case.model = model;
        case.check();
    }
}

#[test]
fn a_disk_is_committed_while_guests_use_it() {
    for seed in seeds(12) {
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let mut case = Case::random(&mut random);
        let disk = case.disk(None, None);
        let session = disk.open().expect("openable");
        let live = || session.live().expect("live");
        let mut model = std::mem::take(&mut case.model);
        while_guests(&session, &mut model, &mut random, || ());
        if random.once_in(3) {
            let watch = Watching::stop_after(random.below(2));
            let stopped =
                while_guests(&session, &mut model, &mut random, || live().commit(case.commit(), &watch));
            assert_eq!(stopped.unwrap_err().kind(), ErrorKind::Cancelled);
        }
        while_guests(&session, &mut model, &mut random, || {
            live().commit(case.commit(), &Watching::always()).expect("committed")
        });
        // What they have written since is not there yet. With nobody about, the two are the same, and the image is empty.
        live().commit(case.commit(), &Watching::always()).expect("committed");
        let size = session.geometry().size;
        let mut at = 0;
        while at < size {
            for extent in live().layer(at, size - at).expect("told") {
                assert_eq!(extent.layer, Layer::Below, "at {at}");
                at += extent.len;
            }
        }
        let holders = lease::holders(&case.base).expect("a file");
        assert!(!holders.is_empty() && holders.iter().all(|holder| holder.mode == Mode::Read), "{holders:?}");
        assert!(session.track().expect("tracked").list().is_empty());
        let mut below = content_of_base(&case);
        below.truncate(model.len());
        assert!(below == model, "the image below holds other bytes");
        while_guests(&session, &mut model, &mut random, || ());
        drop(session);
        case.model = model;
        case.check();
        assert!(case.stands_on_something());
    }
}

fn content_of_base(case: &Case) -> Vec<u8> {
    content(&case.base, case.base_format, case.dir.path())
}

#[test]
fn a_disk_grows_while_it_is_committed() {
    let mut random = Random::new(1);
    for base_format in ["raw", "qcow2"] {
        let mut case = Case::new(&mut random, Shape::plain(1 << 20), base_format);
        // Longer than the disk, so that something comes to light that is not to be seen.
        assert!(case.base_size > 512 << 10);
        let disk = case.disk(None, None);
        let session = disk.open().expect("openable");
        let mut model = std::mem::take(&mut case.model);
        let growing = Growing(Mutex::new(Some(session.clone())));
        while_guests(&session, &mut model, &mut random, || {
            session.live().expect("live").commit(case.commit(), &growing).expect("committed")
        });
        model.resize(3 << 20, 0);
        assert_eq!(session.geometry().size, 3 << 20);
        drop(session);
        case.model = model;
        case.check();
    }
}

/// Grows the disk when the first piece is done.
struct Growing(Mutex<Option<Arc<dyn Session>>>);

impl Watch for Growing {
    fn step(&self, _: &str, _: u64) {}

    fn advance(&self, _: u64, _: u64) -> Result<()> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(session) => session.grow(3 << 20),
            None => Ok(()),
        }
    }
}

#[test]
fn what_others_need_is_not_taken_from_them() {
    let mut random = Random::new(2);
    let case = Case::new(&mut random, Shape::plain(1 << 20), "raw");
    let session = case.disk(None, None).open().expect("openable");
    let live = session.live().expect("live");
    // Another image stands on the same file.
    let reader = case.base_disk(true, None).open().expect("shared");
    let busy = live.commit(case.commit(), &Watching::always()).unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy);
    assert!(busy.to_string().contains("in use by"), "{busy}");
    let client = Client::on_disk(EngineKind::Auto, &session);
    assert!(client.read(0, 1 << 20) == case.model);
    drop(reader);
    live.commit(case.commit(), &Watching::always()).expect("nobody else is there");
    live.create_snapshot("one").expect("a snapshot");
    for refused in [live.flatten(&Watching::always()), live.commit(case.commit(), &Watching::always())] {
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("snapshots need"), "{refused}");
    }
    assert!(client.read(0, 1 << 20) == case.model);
}

/// Guests got I/O errors for what they read of the image behind, between a refused opening and its opening for reading.
#[test]
fn a_commit_that_is_refused_is_not_seen_by_guests() {
    for seed in seeds(4) {
        let mut random = Random::new(seed);
        let case = Case::new(&mut random, Shape::plain(1 << 20), "raw");
        let session = case.disk(None, None).open().expect("openable");
        let other = case.base_disk(true, None).open().expect("shared");
        let mut model = case.model.clone();
        while_guests(&session, &mut model, &mut random, || {
            for _ in 0..20 {
                let live = session.live().expect("live");
                let busy = live.commit(case.commit(), &Watching::always()).unwrap_err();
                assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");
            }
        });
        drop(other);
        assert!(Client::on_disk(EngineKind::Auto, &session).read(0, 1 << 20) == model);
    }
}

#[test]
fn a_disk_is_compacted_while_guests_use_it() {
    for seed in seeds(8) {
        println!("seed {seed}");
        let mut random = Random::new(seed);
        let mut case = Case::random(&mut random);
        let disk = case.disk(None, None);
        let session = disk.open().expect("openable");
        let live = || session.live().expect("live");
        let mut model = std::mem::take(&mut case.model);
        while_guests(&session, &mut model, &mut random, || ());
        let snapshot = case.shape.has_snapshots() && random.once_in(3);
        if snapshot {
            live().create_snapshot("one").expect("a snapshot");
        }
        // Most of it is given up again, from the start on.
        let client = Client::on_disk(EngineKind::Auto, &session);
        let most = model.len() / 512 * 3 / 4 * 512;
        if case.shape.version >= 3 {
            let mut ask = Ask::new(Operation::WriteZeroes, 0, most as u64);
            ask.flags.may_unmap = true;
            client.ask(ask).result.expect("zeroed");
            model[..most].fill(0);
        }
        while_guests(&session, &mut model, &mut random, || {
            live().compact(&Watching::always()).expect("compacted")
        });
        let (_, after) = live().compact(&Watching::always()).expect("compacted");
        let length = || std::fs::metadata(&case.image).expect("there").len();
        assert_eq!(length(), after);
        // Nothing is left to be moved.
        let (before, again) = live().compact(&Watching::always()).expect("compacted");
        assert!(before == after && again == after, "{before} {after} {again}");
        while_guests(&session, &mut model, &mut random, || ());
        let (_, after) = live().compact(&Watching::always()).expect("compacted");
        let used = live()
            .layer(0, case.shape.size)
            .expect("told")
            .into_iter()
            .filter(|part| part.layer == Layer::Data);
        let used: u64 = used.map(|part| part.len).sum();
        let cluster = 1 << case.shape.cluster_bits;
        if !snapshot && case.shape.preallocation == "off" && !case.shape.extended_l2 {
            // Tables, counts, and what is rounded up to blocks of the filesystem.
            let tables = (case.shape.size / (cluster / 8 * cluster) + 8 + used / cluster / 64) * cluster;
            assert!(after <= used + tables + 4096 + cluster * 16, "{after} bytes for {used} of data");
        }
        drop((client, session));
        case.model = model;
        case.check();
    }
}

/// Fails some operations, once told to.
struct Failing {
    on: AtomicBool,
    error: i32,
    which: fn(&Op) -> bool,
}

impl Failing {
    fn new(error: i32, which: fn(&Op) -> bool) -> Arc<Self> {
        Arc::new(Failing { on: AtomicBool::new(false), error, which })
    }

    fn switch(&self, on: bool) {
        self.on.store(on, Ordering::SeqCst);
    }
}

impl Faults for Failing {
    fn before(&self, op: &Op) -> Option<Fault> {
        (self.on.load(Ordering::SeqCst) && (self.which)(op)).then_some(Fault::Fail(self.error))
    }
}

fn is_read(op: &Op) -> bool {
    matches!(op, Op::Read { .. })
}

fn is_write(op: &Op) -> bool {
    matches!(op, Op::Write { .. } | Op::Fallocate { .. })
}

fn is_sync(op: &Op) -> bool {
    matches!(op, Op::Sync)
}

#[test]
fn what_fails_leaves_the_disk_as_it_was() {
    for base_format in ["raw", "qcow2"] {
        let mut random = Random::new(3);
        let mut case = Case::new(&mut random, Shape::plain(2 << 20), base_format);
        let reading = Failing::new(libc::EIO, is_read);
        let writing = Failing::new(libc::ENOSPC, is_write);
        let disk = case.disk(Some(writing.clone()), Some(reading.clone()));
        let session = disk.open().expect("openable");
        let client = Client::on_disk(EngineKind::Auto, &session);
        let live = session.live().expect("live");
        client.write(64 << 10, vec![7; 100 << 10]);
        case.model[64 << 10..164 << 10].fill(7);
        let all = |case: &Case| assert!(client.read(0, 2 << 20) == case.model, "other bytes");

        reading.switch(true);
        let error = live.flatten(&Watching::always()).unwrap_err();
        assert!(error.to_string().contains("base") && error.kind() == ErrorKind::Io, "{error}");
        reading.switch(false);
        all(&case);
        writing.switch(true);
        let error = live.flatten(&Watching::always()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        writing.switch(false);
        all(&case);

        for (error, which) in
            [(libc::EIO, is_write as fn(&Op) -> bool), (libc::ENOSPC, is_write), (libc::EIO, is_sync)]
        {
            let failing = Failing::new(error, which);
            failing.switch(true);
            let into = case.base_disk(false, Some(failing));
            let error = live.commit(Commit { into, track: None }, &Watching::always()).unwrap_err();
            assert!(
                matches!(error.kind(), ErrorKind::Io | ErrorKind::NoSpace | ErrorKind::FlushLost),
                "{error}"
            );
            assert!(error.to_string().contains("base"), "{error}");
            all(&case);
            client.write(0, vec![9; 512]);
            case.model[..512].fill(9);
        }
        // All of it goes well in the end.
        live.commit(case.commit(), &Watching::always()).expect("committed");
        all(&case);
        live.flatten(&Watching::always()).expect("flattened");
        drop((client, session));
        // A session that cannot flush gives nothing back any more.
        case.check_but(true);
    }
}

/// The name of what is below at first.
const BELOW: Stamp = 0x1be1;

/// Power cuts under an image and the one that it stands on, while guests use the disk and `work` is done.
fn cut_the_power(seed: u64, work: fn(&Arc<dyn Session>, &Arc<dyn Disk>)) {
    let mut random = Random::new(seed);
    let shape = Shape { cluster_bits: *random.one_of(&[9, 12, 16]), ..Shape::plain(256 << 10) };
    println!("seed {seed}: {shape:?}");
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let (image, base) = (dir.path().join("disk.qcow2"), dir.path().join("base"));
    let sectors = shape.size as usize / SECTOR;
    let under = sectors / 2 + random.index(sectors / 2);
    let mut below = vec![0; under * SECTOR];
    fill(BELOW, 0, &mut below);
    std::fs::write(&base, &below).expect("room");
    shape.create(&image, Some((&base, "raw")));
    let recording = Recording::new();
    let recorders = [&image, &base].map(|path| recording.file(std::fs::read(path).expect("there")));
    let first = (0..sectors).map(|sector| if sector < under { BELOW } else { 0 }).collect();
    let mut expected = Expected::new(first);

    let mut options = Qcow2Options::new(&image);
    options.faults = Some(recorders[0].clone());
    options.backing = Some(Raw::new(RawOptions { read_only: true, ..RawOptions::new(&base) }));
    let into: Arc<dyn Disk> =
        Raw::new(RawOptions { faults: Some(recorders[1].clone()), ..RawOptions::new(&base) });
    let disk = Tracked::new(Qcow2::new(options), None);
    let session = disk.open().expect("openable");
    let clients = [Client::on_disk(EngineKind::Auto, &session), Client::on_disk(EngineKind::Auto, &session)];
    let load = Load { requests: 60, ..Load::on(0..sectors as u64) };
    drive(&clients, &recording, &mut expected, &mut random, &load);
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| work(&session, &into));
        while !worker.is_finished() {
            let load = Load { requests: 10, ..Load::on(0..sectors as u64) };
            drive(&clients, &recording, &mut expected, &mut random, &load);
        }
        worker.join().expect("done");
    });
    drive(&clients, &recording, &mut expected, &mut random, &load);
    drop((clients, session));
    drop(disk);

    let now = recording.now();
    for point in 0..150 {
        let at = if point == 0 { now } else { random.index(now + 1) };
        let cut = if point == 0 { Cut::Everything } else { *random.one_of(&Cut::ALL) };
        let files = recording.crash(at, cut, &mut random);
        let look = || -> std::result::Result<(), String> {
            let image = Image::new(&files[0])?;
            let report = image.check();
            if !report.errors.is_empty() {
                return Err(format!("{:?}", report.errors));
            }
            let below: &[u8] = if image.header.backing_file.is_some() { &files[1] } else { &[] };
            let content = image.content(
                &|offset, buffer| {
                    let start = (offset as usize).min(below.len());
                    let len = buffer.len().min(below.len() - start);
                    buffer[..len].copy_from_slice(&below[start..start + len]);
                    buffer[len..].fill(0);
                },
                None,
            )?;
            expected.check_cut(&content, at)
        };
        if let Err(wrong) = look() {
            println!("before it:\n{}", recording.story(at, 60));
            panic!("seed {seed}, point {point} ({cut:?} at {at} of {now}): {wrong}");
        }
    }
}

#[test]
fn a_power_cut_while_a_disk_is_flattened_loses_nothing() {
    for seed in seeds(8) {
        cut_the_power(seed, |session, _| {
            session.live().expect("live").flatten(&Watching::always()).expect("flattened");
        });
    }
}

#[test]
fn a_power_cut_while_a_disk_is_committed_loses_nothing() {
    for seed in seeds(8) {
        cut_the_power(seed, |session, into| {
            let commit = Commit { into: into.clone(), track: None };
            session.live().expect("live").commit(commit, &Watching::always()).expect("committed");
        });
    }
}

#[test]
fn a_power_cut_while_a_disk_is_compacted_loses_nothing() {
    for seed in seeds(8) {
        cut_the_power(seed, |session, _| {
            session.live().expect("live").compact(&Watching::always()).expect("compacted");
        });
    }
}
