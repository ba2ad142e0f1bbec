//! Disks, their sessions and their channels.

use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use vbd_ring::Local;

use crate::track::Track;
use crate::{Error, ErrorKind, Live, Request, Result, Statistics};

/// Sizes, all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Capacity; a multiple of 512. Grows while the disk is served, and never shrinks.
    pub size: u64,
    /// Smallest unit that a guest may address.
    pub block_size: u32,
    /// Smallest unit that is written without reading first.
    pub physical_block_size: u32,
    /// Preferred unit of large transfers; 0 where there is none.
    pub optimal_size: u32,
    /// Discards are rounded inwards to this.
    pub discard_granularity: u32,
    /// Longest discard in one request.
    pub max_discard: u64,
    /// Longest write-zeroes in one request.
    pub max_zeroes: u64,
}

/// What a disk can do. What it cannot is answered with [`ErrorKind::Unsupported`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Writes are refused.
    pub read_only: bool,
    /// Completed writes may need a flush to be durable. Where false, front-ends say so to guests and set FUA.
    pub write_cache: bool,
    /// Discards give space back.
    pub discard: bool,
    /// Zeroes cost less than writing them.
    pub fast_zeroes: bool,
    /// The disk can be made larger.
    pub grow: bool,
}

/// What a disk tells those who watch it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The disk has this size (bytes) from now on.
    Resized(u64),
}

/// A disk by name: the control object, shared between threads. Opening takes the lease.
pub trait Disk: Send + Sync {
    /// The name that exports, sockets and messages use.
    fn name(&self) -> &str;

    /// Takes the lease, opens the files and gives the session; the one there is, where the disk is open already.
    /// May block for as long as the lease's bound, so never call it on a reactor. The lease is released when the last
    /// clone of the session is dropped.
    ///
    /// # Errors
    /// [`Busy`](crate::ErrorKind::Busy) where somebody else holds the lease, and whatever opening meets.
    fn open(&self) -> Result<Arc<dyn Session>>;

    /// Sizes and abilities, without taking the lease: for listings, and for guests that ask before they start.
    ///
    /// # Errors
    /// The files cannot be looked at.
    fn inspect(&self) -> Result<(Geometry, Capabilities)>;

    /// Counters of the disk, over all its sessions.
    fn statistics(&self) -> &Statistics;

    /// The dirty bitmaps of the session that is open now, if there is one and it has some. Does not block.
    fn track(&self) -> Option<Arc<Track>> {
        None
    }

    /// Calls `watcher` on every event, on the thread that caused it, until the given value is dropped.
    fn watch(&self, watcher: Box<dyn Fn(Event) + Send + Sync>) -> Arc<dyn Send + Sync>;
}

/// An open disk whose lease is held. Dropping the last clone closes it.
pub trait Session: Send + Sync {
    /// Sizes as they are now.
    fn geometry(&self) -> Geometry;

    /// Abilities; they do not change within a session.
    fn capabilities(&self) -> Capabilities;

    /// A channel for a queue on this reactor. It keeps the session open.
    ///
    /// # Errors
    /// No resources.
    fn channel(self: Arc<Self>, local: &Local) -> Result<Rc<dyn Channel>>;

    /// Makes the disk larger, to `size` bytes (a multiple of 512), and tells those who watch. Blocks.
    ///
    /// # Errors
    /// `size` is smaller than now or no multiple of 512, the disk cannot grow, or there is no room.
    fn grow(&self, size: u64) -> Result<()>;

    /// Whether writes that have completed outlive this process without a flush: they are in the kernel then. Where they
    /// are not, a guest must not go on after this process was killed, as if nothing had been lost.
    fn keeps_unflushed(&self) -> bool {
        true
    }

    /// A way to read the disk on the calling thread, without a reactor: for jobs that read all of it. Only a session that
    /// nobody writes to has one, and only where its format knows how; everybody can read by a channel.
    fn reader(self: Arc<Self>) -> Option<Arc<dyn Reader>> {
        None
    }

    /// What can be done with the disk beyond reading and writing it, where its format has it.
    fn live(&self) -> Option<&dyn Live> {
        None
    }

    /// The dirty bitmaps, where writes pass some on their way.
    fn track(&self) -> Option<&Arc<Track>> {
        None
    }

    /// Takes note, durably, of which bitmaps there are, after they were changed. Blocks.
    ///
    /// # Errors
    /// They cannot be kept; they work until the disk is closed.
    fn keep_bitmaps(&self) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "the disk has no bitmaps"))
    }
}

/// Reads a disk with system calls of the calling thread, through the host's page cache. It keeps the session open.
pub trait Reader: Send + Sync {
    /// Fills the buffer from an offset (bytes) on. Blocks: never to be called on a reactor.
    ///
    /// # Errors
    /// The range is not inside the disk, or what reading meets.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;
}

/// The way of one queue to its disk, on one reactor thread.
pub trait Channel {
    /// Takes a request; it comes back to its sink.
    fn submit(self: Rc<Self>, request: Request);

    /// Fails every request that waits for something other than the kernel (a policy, a limit), as
    /// [`Cancelled`](crate::ErrorKind::Cancelled). What is in the kernel comes back in its own time.
    fn cancel_waiting(&self) {}
}

type Watcher = Box<dyn Fn(Event) + Send + Sync>;

/// A list of watchers, for implementations of [`Disk::watch`].
#[derive(Default)]
pub struct Watchers(Mutex<Vec<Weak<Entry>>>);

struct Entry(Watcher);

impl Watchers {
    /// Adds a watcher that lives as long as the given value.
    pub fn add(&self, watcher: Watcher) -> Arc<dyn Send + Sync> {
        let entry = Arc::new(Entry(watcher));
        let mut list = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|entry| entry.strong_count() > 0);
        list.push(Arc::downgrade(&entry));
        entry
    }

    /// Tells all watchers.
    pub fn tell(&self, event: Event) {
        let list = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for entry in list.iter().filter_map(Weak::upgrade) {
            (entry.0)(event);
        }
    }
}
