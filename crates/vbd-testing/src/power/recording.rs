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

impl Entry {
    /// What it was and where, for messages.
    fn place(&self) -> (&'static str, std::ops::Range<u64>) {
        let what = match self.change {
            Change::Write { .. } => "write",
            Change::Space { .. } => "fallocate",
            Change::Length(_) => "length",
            Change::Sync => "sync",
        };
        (what, range(&self.change))
    }
}

/// The bytes that a change is about; none of a flush or a length.
fn range(change: &Change) -> std::ops::Range<u64> {
    match change {
        Change::Write { offset, data, .. } => *offset..*offset + data.len() as u64,
        Change::Space { offset, len, .. } => *offset..*offset + *len,
        Change::Length(_) | Change::Sync => 0..0,
    }
}

fn overlap(one: &Change, other: &Change) -> bool {
    let (one, other) = (range(one), range(other));
    one.start < other.end && other.start < one.end
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

    /// Changes of one place of one file that were under way at the same time, a write and one that frees or zeroes it: what
    /// is there afterwards is chance. Of writes alone, a guest may have made them so; two that zero it leave zeroes in
    /// whatever order.
    pub fn collisions(&self) -> Vec<String> {
        self.collide(|one, other| {
            matches!(one.change, Change::Space { .. }) != matches!(other.change, Change::Space { .. })
        })
    }

    /// The same for any two changes, where no requests of the guest were.
    pub fn all_collisions(&self) -> Vec<String> {
        self.collide(|_, _| true)
    }

    fn collide(&self, counts: impl Fn(&Entry, &Entry) -> bool) -> Vec<String> {
        let log = self.log();
        let mut found = Vec::new();
        let mut open: Vec<&Entry> = Vec::new();
        for entry in &log.entries {
            open.retain(|other| other.ended.is_none_or(|(ended, _)| ended > entry.begun));
            let together = open.iter().filter(|other| {
                other.file == entry.file && overlap(&other.change, &entry.change) && counts(other, entry)
            });
            found.extend(together.map(|other| format!("{:?} and {:?}", other.place(), entry.place())));
            open.push(entry);
        }
        found
    }

    /// The last changes that had begun by this time, for those who look for what went wrong.
    pub fn story(&self, at: usize, count: usize) -> String {
        let log = self.log();
        let begun: Vec<&Entry> = log.entries.iter().filter(|entry| entry.begun < at).collect();
        let mut text = String::new();
        for entry in &begun[begun.len().saturating_sub(count)..] {
            let (what, range) = entry.place();
            let ended = match entry.ended {
                Some((ended, result)) if ended < at => format!("to {ended}: {result}"),
                Some((ended, _)) => format!("under way until {ended}"),
                None => "never ended".into(),
            };
            let durable = if entry.is_durable_itself() { ", durable" } else { "" };
            text += &format!(
                "  file {}: {what} {:#x}..{:#x} from {} {ended}{durable}\n",
                entry.file, range.start, range.end, entry.begun
            );
        }
        text
    }

    /// The ranges that were written at least once, as offset and bytes, in order of time.
    pub fn writes(&self) -> Vec<(u64, Vec<u8>)> {
        let log = self.log();
        let writes = log.entries.iter().filter_map(|entry| match &entry.change {
            Change::Write { offset, data, .. } => Some((*offset, data.clone())),
            _ => None,
        });
        writes.collect()
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
