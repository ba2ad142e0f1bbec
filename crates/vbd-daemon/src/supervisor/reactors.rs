//! The reactor threads, few, and the disks spread over them.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};

use vbd_ring::{Handle, Reactor, Settings};

use crate::Fault;

/// The most reactors that are started unasked.
const MOST: usize = 4;

pub(super) struct Reactors {
    all: Vec<Reactor>,
    next: AtomicUsize,
}

impl Reactors {
    /// Starts that many; without a number one a processor, up to four.
    pub(super) fn start(count: Option<NonZeroUsize>, settings: &Settings) -> Result<Self, Fault> {
        let count = count.map_or_else(
            || std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MOST),
            NonZeroUsize::get,
        );
        let reactor = |index| {
            Reactor::spawn(&format!("vbd-{index}"), settings.clone())
                .map_err(|error| Fault::failed(format_args!("reactor {index}"), error))
        };
        let all = (0..count).map(reactor).collect::<Result<_, _>>()?;
        Ok(Reactors { all, next: AtomicUsize::new(0) })
    }

    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// All of them, each time beginning with another, so that the first queues of disks are spread.
    pub(super) fn handles(&self) -> Vec<Handle> {
        let first = self.next.fetch_add(1, Ordering::Relaxed) % self.all.len();
        let (tail, head) = self.all.split_at(first);
        head.iter().chain(tail).map(Reactor::handle).collect()
    }
}
