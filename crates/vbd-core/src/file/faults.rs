//! Faults below the channel, so that tests reach every error path of the file I/O.

use vbd_ring::Op;

use super::Recorder;

/// What is to happen to an operation instead of what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this errno and does nothing.
    Fail(i32),
    /// A read or write ends after this many bytes, which are transferred.
    Short(usize),
}

/// Decides about every operation before it goes to the kernel.
pub trait Faults: Send + Sync {
    /// The fault for this operation, if it is to have one.
    fn before(&self, op: &Op) -> Option<Fault>;

    /// Who sees what is done to the file, if anybody does.
    fn recorder(&self) -> Option<&dyn Recorder> {
        None
    }
}

impl<F: Fn(&Op) -> Option<Fault> + Send + Sync> Faults for F {
    fn before(&self, op: &Op) -> Option<Fault> {
        self(op)
    }
}
