//! An image, what was done to it, and what it may hold.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vbd_core::client::{Buffer, Client};
use vbd_core::file::Cache;
use vbd_core::{Disk, Session};
use vbd_qcow2::{CreateOptions, Qcow2, Qcow2Options, Version, create};
use vbd_ring::Reactor;
use vbd_testing::Random;
use vbd_testing::power::{Cut, Expected, FileRecorder, Recording, SECTOR};
use vbd_testing::qcow2::{Image, incompatible};

use crate::load::reactor;

/// What an image is like.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    version: u32,
    cluster: u64,
    extended: bool,
    size: u64,
    refcount_bits: u32,
    cache_bytes: Option<u64>,
    /// Guests ask for zeroes: in clusters that are theirs these go in place, and may meet a write of another guest there.
    pub(crate) zeroes: bool,
    /// Guests give up much of what they write, in few places.
    pub(crate) churn: bool,
}

impl Shape {
    pub(crate) fn random(random: &mut Random) -> Self {
        let version = if random.once_in(5) { 2 } else { 3 };
        Self::new(version, random)
    }

    /// One of this version of the format.
    pub(crate) fn new(version: u32, random: &mut Random) -> Self {
        // L2 tables of 64, 512 and 1024 or 2048 entries.
        let cluster = *random.one_of(&[512, 512, 4096, 16384]);
        Shape {
            version,
            cluster,
            extended: version == 3 && cluster == 16384 && random.once_in(2),
            size: *random.one_of(&[3 * 64 * 512, 5 * 64 * 512 + 512]),
            refcount_bits: if version == 2 { 16 } else { *random.one_of(&[8, 16, 64]) },
            cache_bytes: random.once_in(2).then_some(cluster),
            zeroes: random.once_in(2),
            churn: random.once_in(2),
        }
    }
}

/// A snapshot that was made between two times.
pub(crate) struct Made {
    pub(crate) name: String,
    pub(crate) begun: usize,
    pub(crate) ended: usize,
}

pub(crate) struct Case {
    pub(crate) shape: Shape,
    path: PathBuf,
    /// What guests are served on: until the image is closed, as tasks that are given up end at an unknown time.
    pub(crate) reactors: [Reactor; 2],
    pub(crate) recording: Arc<Recording>,
    recorder: Arc<FileRecorder>,
    // Held for moments in which nobody else gets a turn.
    expected: Mutex<Expected>,
    pub(crate) snapshots: Mutex<Vec<Made>>,
    dir: tempfile::TempDir,
}

/// The files as a process that was killed has left them.
pub(crate) struct Killed {
    image: PathBuf,
    at: usize,
}

impl Case {
    pub(crate) fn new(shape: Shape) -> Arc<Self> {
        // Not a filesystem in memory: there, files are written without waiting.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let path = dir.path().join("image.qcow2");
        let options = CreateOptions {
            size: shape.size,
            version: if shape.version == 2 { Version::V2 } else { Version::V3 },
            cluster_size: shape.cluster,
            refcount_bits: shape.refcount_bits,
            extended_l2: shape.extended,
            ..CreateOptions::default()
        };
        create(&path, &options).expect("an image");
        let recording = Recording::new();
        let recorder = recording.file(std::fs::read(&path).expect("there"));
        let expected = Mutex::new(Expected::new(vec![0; shape.size as usize / SECTOR]));
        let reactors = [reactor(), reactor()];
        Arc::new(Case {
            shape,
            path,
            reactors,
            recording,
            recorder,
            expected,
            snapshots: Mutex::default(),
            dir,
        })
    }

    pub(crate) fn expected(&self) -> MutexGuard<'_, Expected> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of a cluster.
    pub(crate) fn cluster(&self) -> u64 {
        self.shape.cluster
    }

    pub(crate) fn open(&self) -> Arc<dyn Session> {
        let options = Qcow2Options { faults: Some(self.recorder.clone()), ..self.options(&self.path) };
        Qcow2::new(options).open().expect("openable")
    }

    fn options(&self, path: &Path) -> Qcow2Options {
        Qcow2Options {
            cache: Cache::Writeback,
            cache_bytes: self.shape.cache_bytes,
            ..Qcow2Options::new(path)
        }
    }

    /// Closes the image and looks at it.
    pub(crate) fn close(&self, session: Arc<dyn Session>, random: &mut Random) {
        {
            let client = Client::new(&self.reactors[0].handle(), session.clone()).expect("a channel");
            let content = read(&client, session.geometry().size);
            let result = self.expected().check_now(&content, self.recording.tick());
            self.check(result, "in the end");
        }
        // Tasks that give clusters back.
        while Arc::strong_count(&session) > 1 {
            vbd_ring::sync::thread::yield_now();
        }
        drop(session);
        // A disk that grows does so on a reactor of its own. What is given up with that ends, and is not told of.
        let changed = !self.snapshots.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        assert!(changed || self.recording.is_quiet(), "closed while something is under way");
        self.look(random);
    }

    fn check(&self, result: Result<(), String>, when: &str) {
        if let Err(wrong) = result {
            eprintln!("{:?}, before it:\n{}", self.shape, self.recording.story(usize::MAX, 80));
            panic!("{when}: {wrong}");
        }
    }

    /// Looks at an image that was closed, and at what power cuts might have left.
    pub(crate) fn look(&self, random: &mut Random) {
        let bytes = std::fs::read(&self.path).expect("there");
        let image = Image::new(&bytes).expect("an image");
        let report = image.check();
        self.check(if report.errors.is_empty() { Ok(()) } else { Err(report.errors.join(", ")) }, "closed");
        self.check(if report.leaks == 0 { Ok(()) } else { Err(format!("{} leaks", report.leaks)) }, "closed");
        let content = image.content(&below, None).expect("readable");
        let result = self.expected().check_now(&content, self.recording.now());
        self.check(result, "closed");
        assert!(!self.dir.path().join(".image.qcow2.changes").exists(), "notes are left");
        self.look_at_snapshots(&image);
        let collisions = self.recording.collisions();
        assert!(self.shape.zeroes || collisions.is_empty(), "{:?}", &collisions[..collisions.len().min(3)]);
        for _ in 0..8 {
            let (at, cut) = (random.index(self.recording.now() + 1), *random.one_of(&Cut::ALL));
            let files = self.recording.crash(at, cut, random);
            let image = Image::new(&files[0]).expect("an image");
            let errors = image.check().errors;
            if image.header.incompatible & incompatible::DIRTY == 0 && !self.is_old_and_alone() {
                let result = if errors.is_empty() { Ok(()) } else { Err(errors.join(", ")) };
                self.check(result, &format!("after a power cut ({cut:?} at {at})"));
            }
            let content = image.content(&below, None).expect("readable");
            let content = grown(content, &self.expected());
            let result = self.expected().check_cut(&content, at);
            self.check(result, &format!("after a power cut ({cut:?} at {at})"));
        }
    }

    /// Version 2 cannot say that its refcounts do not fit while snapshots change.
    fn is_old_and_alone(&self) -> bool {
        self.shape.version == 2 && !self.snapshots.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    fn look_at_snapshots(&self, image: &Image<'_>) {
        let (there, _) = image.snapshots().expect("readable");
        let made = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        for snapshot in there {
            let made = made.iter().find(|made| made.name == snapshot.name).expect("one that was made");
            let content = image.content_of(snapshot.l1, snapshot.size, &below, None).expect("readable");
            let result = self.expected().check_read(0, &content, made.begun, made.ended);
            self.check(result, &format!("{} (made from {} to {})", made.name, made.begun, made.ended));
        }
    }

    /// What a snapshot holds, as its file has it: what it leads to does not change.
    pub(crate) fn content_of(&self, name: &str) -> Vec<u8> {
        let bytes = std::fs::read(&self.path).expect("there");
        let image = Image::new(&bytes).expect("an image");
        let (there, _) = image.snapshots().expect("readable");
        let snapshot = there.iter().find(|snapshot| snapshot.name == name).expect("there");
        image.content_of(snapshot.l1, snapshot.size, &below, None).expect("readable")
    }

    /// Keeps the files as they are at this moment.
    pub(crate) fn kill(&self) -> Killed {
        let at = self.recording.tick();
        let image = self.dir.path().join(format!("killed-{at}.qcow2"));
        std::fs::copy(&self.path, &image).expect("room");
        let notes = |image: &Path| {
            image.with_file_name(format!(".{}.changes", image.file_name().unwrap().to_str().unwrap()))
        };
        if let Ok(mut bytes) = std::fs::read(notes(&self.path)) {
            // The file that they are about has another number there.
            use std::os::unix::fs::MetadataExt;
            let inode = std::fs::metadata(&image).expect("there").ino();
            bytes[24..32].copy_from_slice(&inode.to_le_bytes());
            std::fs::write(notes(&image), bytes).expect("room");
        }
        Killed { image, at }
    }

    /// Opens what a process that was killed has left.
    pub(crate) fn open_killed(&self, killed: &Killed) {
        let session = Qcow2::new(self.options(&killed.image)).open().expect("openable");
        let size = session.geometry().size;
        let content =
            { read(&Client::new(&self.reactors[0].handle(), session.clone()).expect("a channel"), size) };
        drop(session);
        let name = killed.image.file_name().expect("a name").to_str().expect("text");
        assert!(!killed.image.with_file_name(format!(".{name}.changes")).exists(), "notes are left");
        let result = self.expected().check_now(&content, killed.at);
        self.check(result, &format!("killed at {}", killed.at));
        let bytes = std::fs::read(&killed.image).expect("there");
        let errors = Image::new(&bytes).expect("an image").check().errors;
        self.check(if errors.is_empty() { Ok(()) } else { Err(errors.join(", ")) }, "killed and closed");
    }
}

/// All of a disk.
fn read(client: &Client, size: u64) -> Vec<u8> {
    let mut buffer = Buffer::new(size as usize);
    client.read(0, &mut buffer, size as usize).expect("readable");
    buffer.to_vec()
}

/// Nothing is behind these images.
fn below(_: u64, buffer: &mut [u8]) {
    buffer.fill(0);
}

/// The content of a disk that may not have grown yet, as long as it became.
fn grown(mut content: Vec<u8>, expected: &Expected) -> Vec<u8> {
    content.resize(expected.sectors() as usize * SECTOR, 0);
    content
}
