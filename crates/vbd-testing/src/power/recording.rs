//! The record of what was done to some files.

use std::sync::{Arc, Mutex, PoisonError};

use vbd_core::file::{Change, Fault, Faults, Recorder};
use vbd_ring::Op;

/// Beginnings and endings, counted over all files of a recording.
pub(super) type Instant = usize;

/// One change and its time.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) file: usize,
    pub(super) change: Change,
    pub(super) begun: Instant,
    /// When it ended, and with what.
    pub(super) ended: Option<(Instant, i32)>,
}

#[derive(Default)]
pub(super) struct Log {
    /// What each file held at first.
    pub(super) files: Vec<Vec<u8>>,
    pub(super) entries: Vec<Entry>,
    pub(super) now: Instant,
}

/// Sees what is done to some files that belong together, as an image and its data file.
#[derive(Default)]
pub struct Recording {
    log: Mutex<Log>,
}

impl Recording {
    /// Of no file yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Records one more file, which holds these bytes now; they are on the storage.
    pub fn file(self: &Arc<Self>, content: Vec<u8>) -> Arc<FileRecorder> {
        let mut log = self.log();
        log.files.push(content);
        let file = log.files.len() - 1;
        drop(log);
        Arc::new(FileRecorder { recording: self.clone(), file, faults: Mutex::default() })
    }

    /// The time: changes that were seen to begin and to end. The power may go at any time from 0 to this.
    pub fn now(&self) -> usize {
        self.log().now
    }

    /// The same for something that a test does or sees: no two have the same time.
    pub fn tick(&self) -> usize {
        let mut log = self.log();
        log.now += 1;
        log.now - 1
    }

    /// Whether all that has begun has ended.
    pub fn is_quiet(&self) -> bool {
        self.log().entries.iter().all(|entry| entry.ended.is_some())
    }

    pub(super) fn log(&self) -> std::sync::MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begun(&self, file: usize, change: Change) -> u64 {
        let mut log = self.log();
        let begun = log.now;
        log.now += 1;
        log.entries.push(Entry { file, change, begun, ended: None });
        log.entries.len() as u64 - 1
    }

    pub(super) fn ended(&self, number: u64, result: i32) {
        let mut log = self.log();
        let ended = log.now;
        log.now += 1;
        let entry = usize::try_from(number).ok().and_then(|number| log.entries.get_mut(number));
        let entry = entry.expect("a change that has begun");
        assert!(entry.ended.replace((ended, result)).is_none(), "a change ended twice: {:?}", entry.change);
    }
}

type Chosen = Option<Arc<dyn Faults>>;

/// Records one file: to be given to it as its faults. Others may be put behind it.
pub struct FileRecorder {
    pub(super) recording: Arc<Recording>,
    pub(super) file: usize,
    faults: Mutex<Chosen>,
}

impl FileRecorder {
    /// Has these faults decide from now on.
    pub fn set_faults(&self, faults: Option<Arc<dyn Faults>>) {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner) = faults;
    }
}

impl Faults for FileRecorder {
    fn before(&self, op: &Op) -> Option<Fault> {
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner).clone();
        faults?.before(op)
    }

    fn recorder(&self) -> Option<&dyn Recorder> {
        Some(self)
    }
}

impl Recorder for FileRecorder {
    fn begun(&self, change: Change) -> u64 {
        self.recording.begun(self.file, change)
    }

    fn ended(&self, number: u64, result: i32) {
        self.recording.ended(number, result);
    }
}
