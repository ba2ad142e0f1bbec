//! A queue's way through the bitmaps of its disk.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;

use vbd_ring::Local;
use vbd_ring::sync::atomic::Ordering;
use vbd_ring::sync::thread_local;

use super::preserve::Preserve;
use super::{Config, Phase, Track};
use crate::ask::Pending;
use crate::{Channel, Operation, Request, Session};

thread_local! {
    /// The channels of this thread, so that those without writes notice an instant too.
    static CHANNELS: RefCell<Vec<Weak<TrackChannel>>> = const { RefCell::new(Vec::new()) };
}

/// Brings all channels of this thread to the configuration that counts.
pub(super) fn refresh_all() {
    let channels: Vec<_> = CHANNELS.with(|list| list.borrow().iter().filter_map(Weak::upgrade).collect());
    channels.iter().for_each(|channel| channel.refresh());
}

/// The writes of one channel under one configuration. Each holds it, and so does the channel until the next instant.
pub(crate) struct Ticket(Kept);

enum Kept {
    Of(Arc<Phase>),
    /// Of two channels that a write passes one after the other.
    Both {
        _one: Rc<Ticket>,
        _other: Rc<Ticket>,
    },
}

impl Ticket {
    fn new(phase: Arc<Phase>) -> Rc<Self> {
        *phase.lock() += 1;
        Rc::new(Ticket(Kept::Of(phase)))
    }

    /// Two in one.
    #[cold]
    pub(crate) fn both(one: Rc<Ticket>, other: Rc<Ticket>) -> Rc<Self> {
        Rc::new(Ticket(Kept::Both { _one: one, _other: other }))
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let Kept::Of(phase) = &self.0 else { return };
        let mut open = phase.lock();
        *open -= 1;
        if *open == 0 {
            phase.ended.notify_all();
        }
    }
}

/// What counts for a channel now.
struct Current {
    config: Arc<Config>,
    ticket: Rc<Ticket>,
    /// Where a running backup has its copies.
    store: Option<Rc<dyn Channel>>,
}

pub(super) struct TrackChannel {
    track: Arc<Track>,
    inner: Rc<dyn Channel>,
    local: Local,
    /// Keeps the bitmaps from being put away.
    _session: Arc<dyn Session>,
    generation: Cell<u64>,
    /// A backup wants to know how busy guests are.
    watched: Cell<bool>,
    current: RefCell<Current>,
}

impl TrackChannel {
    pub(super) fn new(
        track: &Arc<Track>,
        inner: Rc<dyn Channel>,
        local: &Local,
        session: Arc<dyn Session>,
    ) -> Rc<Self> {
        track.count(local, true);
        let (generation, current) = now(track, local);
        let channel = Rc::new(TrackChannel {
            track: track.clone(),
            inner,
            local: local.clone(),
            _session: session,
            generation: Cell::new(generation),
            watched: Cell::new(current.config.preserve.is_some()),
            current: RefCell::new(current),
        });
        CHANNELS.with(|list| list.borrow_mut().push(Rc::downgrade(&channel)));
        channel
    }

    /// Passes a request on when what it would destroy was copied away.
    #[cold]
    fn preserve_first(
        self: Rc<Self>,
        preserve: Arc<Preserve>,
        store: Option<Rc<dyn Channel>>,
        request: Request,
    ) {
        let Some(store) = store else { return self.inner.clone().submit(request) };
        if request.operation == Operation::Discard {
            // Advice, and not worth a copy of everything that a guest does not need.
            return request.complete(Ok(()));
        }
        let local = self.local.clone();
        local.spawn(async move {
            let mut pending = Pending::new(request);
            preserve.before(&self.inner, &store, &self.local, pending.request()).await;
            self.inner.clone().submit(pending.take());
        });
    }

    #[cold]
    fn count(&self) {
        if let Some(preserve) = &self.current.borrow().config.preserve {
            preserve.count_request();
        }
    }

    /// Takes over the configuration that counts.
    #[cold]
    fn refresh(&self) {
        if self.generation.get() == self.track.generation.load(Ordering::Acquire) {
            return;
        }
        let (generation, current) = now(&self.track, &self.local);
        self.generation.set(generation);
        self.watched.set(current.config.preserve.is_some());
        // The last one before lets go: after the borrow, since it takes a lock of its own.
        let before = self.current.replace(current);
        drop(before);
    }
}

fn now(track: &Track, local: &Local) -> (u64, Current) {
    let state = track.state();
    // Under the lock, under which it changes.
    let generation = track.generation.load(Ordering::Acquire);
    let (config, ticket) = (state.config.clone(), Ticket::new(state.phase.clone()));
    drop(state);
    let store = config.preserve.as_ref().map(|preserve| preserve.store(local));
    (generation, Current { config, ticket, store })
}

impl Channel for TrackChannel {
    #[inline]
    fn submit(self: Rc<Self>, mut request: Request) {
        if self.watched.get() {
            self.count();
        }
        if request.operation.is_write() {
            if self.generation.get() != self.track.generation.load(Ordering::Acquire) {
                self.refresh();
            }
            let current = self.current.borrow();
            for bitmap in &current.config.marks {
                bitmap.mark(request.offset, request.len);
            }
            request.keep(current.ticket.clone());
            if let Some(preserve) = &current.config.preserve
                && preserve.concerns(request.offset, request.len)
            {
                let (preserve, store) = (preserve.clone(), current.store.clone());
                drop(current);
                return self.preserve_first(preserve, store, request);
            }
        }
        self.inner.clone().submit(request);
    }

    fn cancel_waiting(&self) {
        self.inner.cancel_waiting();
    }
}

impl Drop for TrackChannel {
    fn drop(&mut self) {
        let this: *const TrackChannel = self;
        CHANNELS.with(|list| list.borrow_mut().retain(|weak| weak.as_ptr() != this));
        self.track.count(&self.local, false);
    }
}
