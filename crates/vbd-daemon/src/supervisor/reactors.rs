//! The reactor threads: few, for any number of disks.

use std::num::NonZeroUsize;

use vbd_ring::{Handle, Reactor, Settings};

use crate::Fault;

/// The most reactors that are started unasked.
const MOST: usize = 4;

pub(super) struct Reactors {
    all: Vec<Reactor>,
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
        Ok(Reactors { all: (0..count).map(reactor).collect::<Result<_, _>>()? })
    }

    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    /// All of them. Front-ends spread their queues and clients over these.
    pub(super) fn handles(&self) -> Vec<Handle> {
        self.all.iter().map(Reactor::handle).collect()
    }
}
