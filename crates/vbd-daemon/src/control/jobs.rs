//! Long work on disks that are served: begun by one request, watched by others. And their bitmaps.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What has become of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// It goes on.
    Running,
    /// It is done.
    Done,
    /// It has failed, or was stopped.
    Failed,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobInfo {
    /// Its number.
    pub id: u64,
    /// What it does: `backup`, `flatten`, `commit` or `compact`.
    pub kind: String,
    /// The disk it works on.
    pub disk: String,
    /// What has become of it.
    pub state: JobState,
    /// The part that it is at.
    pub step: String,
    /// The bytes of that part.
    pub total: u64,
    /// Those of them that are done.
    pub done: u64,
    /// What it gives, once it is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<serde_json::Value>,
    /// Why it has failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A backup to begin.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewBackup {
    /// The directory of the store, or of the chains: an absolute path.
    pub store: PathBuf,
    /// The disk's name in the store; its own if left out.
    pub disk: Option<String>,
    /// The backup's name; the time if left out.
    pub name: Option<String>,
    /// Read only what has changed since the disk's last backup in the store.
    #[serde(default)]
    pub incremental: bool,
    /// The same since this one.
    pub since: Option<String>,
    /// Have a bitmap begin for the next backup.
    #[serde(default)]
    pub checkpoint: bool,
    /// The level of compression.
    pub level: Option<i32>,
    /// The longest that a write of a guest may be held up, in milliseconds.
    pub max_delay_ms: Option<u64>,
    /// The most bytes of overwritten content that may lie aside.
    pub max_kept: Option<u64>,
    /// Threads that read and compress.
    pub threads: Option<usize>,
    /// Make images that stand on each other instead of chunks: a full one in this format, `raw` or `qcow2`.
    pub chain: Option<String>,
}

/// How a disk's image is worked on: flattened, committed, compacted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upkeep {
    /// The most bytes a second that are moved; if left out, the job rests for as long as it works.
    pub max_rate: Option<u64>,
}

/// A bitmap of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// The bytes that one bit stands for.
    pub granularity: u64,
    /// Whether writes are marked in it.
    pub enabled: bool,
    /// Bytes in blocks that are marked.
    pub marked: u64,
    /// Whether it is kept when the disk is closed.
    pub persistent: bool,
}

impl From<vbd_core::track::Info> for BitmapInfo {
    fn from(info: vbd_core::track::Info) -> Self {
        let vbd_core::track::Info { name, granularity, enabled, marked, persistent } = info;
        BitmapInfo { name, granularity, enabled, marked, persistent }
    }
}

/// A change of a disk's bitmaps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum BitmapChange {
    /// A new one.
    Add {
        /// Its name.
        name: String,
        /// The bytes that one bit stands for; 64 KiB if left out.
        granularity: Option<u64>,
        /// It goes when the disk is closed.
        #[serde(default)]
        temporary: bool,
    },
    /// Takes one away.
    Remove {
        /// Its name.
        name: String,
    },
    /// Marks writes from now on.
    Enable {
        /// Its name.
        name: String,
    },
    /// Marks no writes from now on.
    Disable {
        /// Its name.
        name: String,
    },
    /// Takes every mark away.
    Clear {
        /// Its name.
        name: String,
    },
    /// Marks what is marked in others.
    Merge {
        /// Where to.
        name: String,
        /// The others.
        from: Vec<String>,
    },
}
