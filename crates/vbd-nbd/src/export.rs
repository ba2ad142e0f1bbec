//! Disks under the names that clients ask for.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use vbd_core::Disk;

/// How a disk is exported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportOptions {
    /// Refuse writes, even where the disk takes them.
    pub read_only: bool,
    /// For human beings who list the exports.
    pub description: String,
}

/// A disk that clients can ask for.
pub(crate) struct Export {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) read_only: bool,
    pub(crate) description: String,
    /// Which numbers connections have, for their counters.
    numbers: Mutex<Vec<bool>>,
}

impl Export {
    pub(crate) fn new(disk: Arc<dyn Disk>, options: ExportOptions) -> Arc<Self> {
        Arc::new(Export {
            disk,
            read_only: options.read_only,
            description: options.description,
            numbers: Mutex::default(),
        })
    }

    /// The lowest label that no other connection has: two must not count with the same counters at once, and a
    /// thousand that come and go must not leave a thousand behind.
    pub(crate) fn label(export: &Arc<Self>) -> Label {
        let mut numbers = export.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let number = numbers.iter().position(|taken| !taken).unwrap_or_else(|| {
            numbers.push(false);
            numbers.len() - 1
        });
        numbers[number] = true;
        Label(export.clone(), number)
    }
}

/// The name of a connection's counters. Given back when dropped.
pub(crate) struct Label(Arc<Export>, usize);

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nbd/{}", self.1)
    }
}

impl Drop for Label {
    fn drop(&mut self) {
        self.0.numbers.lock().unwrap_or_else(PoisonError::into_inner)[self.1] = false;
    }
}
