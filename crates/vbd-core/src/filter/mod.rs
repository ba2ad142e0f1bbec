//! Filters: disks in front of disks. Each wears the face of what it stands before, so they stack.
//!
//! A filter only says how it wraps a channel ([`Filter`]); [`Filtered`] makes a disk of it and another disk.

mod hold;
mod inject;
mod relay;

use std::rc::Rc;
use std::sync::Arc;

use vbd_ring::Local;

use crate::track::Track;
use crate::{Capabilities, Channel, Disk, Event, Geometry, Live, Result, Session, Statistics};

pub use hold::{Hold, Policy, Verdict};
pub use inject::{Action, Inject, Rule};
pub use relay::{Outcome, Relay};

/// How a filter stands before a channel.
pub trait Filter: Send + Sync + 'static {
    /// A channel that passes on to `inner`, as it sees fit.
    fn wrap(self: Arc<Self>, inner: Rc<dyn Channel>, local: &Local) -> Rc<dyn Channel>;
}

/// A disk with a filter in front.
pub struct Filtered<F> {
    disk: Arc<dyn Disk>,
    filter: Arc<F>,
}

impl<F: Filter> Filtered<F> {
    /// Puts `filter` in front of `disk`.
    pub fn new(disk: Arc<dyn Disk>, filter: Arc<F>) -> Arc<Self> {
        Arc::new(Filtered { disk, filter })
    }
}

impl<F: Filter> Disk for Filtered<F> {
    fn name(&self) -> &str {
        self.disk.name()
    }

    fn open(&self) -> Result<Arc<dyn Session>> {
        Ok(Arc::new(FilteredSession { session: self.disk.open()?, filter: self.filter.clone() }))
    }

    fn inspect(&self) -> Result<(Geometry, Capabilities)> {
        self.disk.inspect()
    }

    fn statistics(&self) -> &Statistics {
        self.disk.statistics()
    }

    fn track(&self) -> Option<Arc<Track>> {
        self.disk.track()
    }

    fn watch(&self, watcher: Box<dyn Fn(Event) + Send + Sync>) -> Arc<dyn Send + Sync> {
        self.disk.watch(watcher)
    }
}

struct FilteredSession<F> {
    session: Arc<dyn Session>,
    filter: Arc<F>,
}

impl<F: Filter> Session for FilteredSession<F> {
    fn geometry(&self) -> Geometry {
        self.session.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.session.capabilities()
    }

    fn channel(self: Arc<Self>, local: &Local) -> Result<Rc<dyn Channel>> {
        Ok(self.filter.clone().wrap(self.session.clone().channel(local)?, local))
    }

    fn keeps_unflushed(&self) -> bool {
        self.session.keeps_unflushed()
    }

    fn grow(&self, size: u64) -> Result<()> {
        self.session.grow(size)
    }

    fn live(&self) -> Option<&dyn Live> {
        self.session.live()
    }

    fn track(&self) -> Option<&Arc<Track>> {
        self.session.track()
    }

    fn keep_bitmaps(&self) -> Result<()> {
        self.session.keep_bitmaps()
    }
}
