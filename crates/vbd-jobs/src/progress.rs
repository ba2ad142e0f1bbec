//! How far a job is, and the wish to stop it.

/// Watches a job, from several threads at once.
pub trait Progress: Sync {
    /// The next part of the job begins: `step` is what it does ("copying"), and moves that many bytes.
    fn step(&self, step: &str, total: u64);

    /// So many more bytes are done.
    fn advance(&self, bytes: u64);

    /// Whether the job is to stop as soon as it can do so in good order.
    fn is_cancelled(&self) -> bool;
}

/// Shows nothing and never stops.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn step(&self, _step: &str, _total: u64) {}

    fn advance(&self, _bytes: u64) {}

    fn is_cancelled(&self) -> bool {
        false
    }
}
