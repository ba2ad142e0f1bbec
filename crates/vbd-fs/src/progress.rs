//! How a build tells what it is doing, and asks whether to go on.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

/// A part of a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Counting what the source holds.
    Measure,
    /// Reading the source.
    Read,
    /// Making the changes that were asked for.
    Tailor,
    /// Writing the filesystem.
    Write,
    /// Reading it back.
    Verify,
    /// Making it durable.
    Sync,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Measure => "measuring the source",
            Step::Read => "reading the source",
            Step::Tailor => "tailoring",
            Step::Write => "writing the filesystem",
            Step::Verify => "reading it back",
            Step::Sync => "making it durable",
        })
    }
}

/// What a build reports to while it runs.
pub trait Progress {
    /// A step begins; `total` is its length in bytes where it is known.
    fn step(&mut self, _step: Step, _total: Option<u64>) {}
    /// `bytes` more of the step are done.
    fn advance(&mut self, _bytes: u64) {}
    /// A line about what is going on inside of a step.
    fn message(&mut self, _text: &str) {}
    /// What the caller stops the build with. Looked at often, and obeyed within a fraction of a second.
    fn cancel(&self) -> Cancel {
        Cancel::never()
    }
    /// Whether to stop.
    fn cancelled(&self) -> bool {
        self.cancel().requested()
    }
}

/// A wish to stop, shared by those who may have it and those who obey.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Option<Arc<AtomicBool>>);

impl Cancel {
    /// A wish that can be made by [`Cancel::request`].
    pub fn new() -> Cancel {
        Cancel(Some(Arc::default()))
    }

    /// A wish that is never made.
    pub fn never() -> Cancel {
        Cancel(None)
    }

    /// Asks to stop. Safe in a signal handler.
    pub fn request(&self) {
        if let Some(flag) = &self.0 {
            flag.store(true, Ordering::Relaxed);
        }
    }

    /// Whether somebody asked to stop.
    pub fn requested(&self) -> bool {
        self.0.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed))
    }
}

/// Reports nothing and never stops.
pub struct Silent;

impl Progress for Silent {}
