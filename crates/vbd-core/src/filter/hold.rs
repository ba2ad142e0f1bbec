//! Requests that have to wait: parked on an error by a policy, or held back while the disk is paused.
//!
//! Waiting is a state with a list and a way out, not a blocked thread: [`Hold::resume`] tries everything again,
//! [`Hold::cancel`] fails it, and a front-end that stops cancels its own ([`Channel::cancel_waiting`]).

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::{Arc, PoisonError};

use vbd_ring::sync::Mutex;
use vbd_ring::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use vbd_ring::sync::thread_local;
use vbd_ring::{Handle, Local};

use super::Filter;
use super::relay::{Outcome, Relay};
use crate::{Channel, Error, ErrorKind, Request, Result};

/// What to do with a request that has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Tell the guest.
    Report,
    /// Keep the request until [`Hold::resume`] or [`Hold::cancel`].
    Park,
}

/// Decides about failed requests. Called on reactor threads.
pub trait Policy: Send + Sync + 'static {
    /// What is to happen to `request`, which has failed with `error`.
    fn failed(&self, request: &Request, error: &Error) -> Verdict;
}

impl<F: Fn(&Request, &Error) -> Verdict + Send + Sync + 'static> Policy for F {
    fn failed(&self, request: &Request, error: &Error) -> Verdict {
        self(request, error)
    }
}

/// The filter; one for a disk, over all its channels.
pub struct Hold {
    policy: Box<dyn Policy>,
    paused: AtomicBool,
    parked: AtomicUsize,
    reactors: Mutex<Vec<(Handle, usize)>>,
}

/// The channels of a hold that live on one reactor, found by the hold's address.
type Channels = Vec<(usize, Weak<HoldChannel>)>;

thread_local! {
    static CHANNELS: RefCell<Channels> = const { RefCell::new(Vec::new()) };
}

impl Hold {
    /// A filter with this policy.
    pub fn new(policy: impl Policy) -> Arc<Self> {
        Arc::new(Hold {
            policy: Box::new(policy),
            paused: AtomicBool::new(false),
            parked: AtomicUsize::new(0),
            reactors: Mutex::default(),
        })
    }

    /// How many requests wait.
    pub fn waiting(&self) -> usize {
        self.parked.load(Ordering::SeqCst)
    }

    /// Holds every new request back until [`resume`](Self::resume). What is under way goes on.
    pub fn pause(&self) {
        self.paused.store(true, Ordering::SeqCst);
    }

    /// Lets everything that waits go on: it is submitted again, on its own reactor.
    pub fn resume(self: &Arc<Self>) {
        self.paused.store(false, Ordering::SeqCst);
        self.on_channels(|channel| channel.retry());
    }

    /// Fails everything that waits, as [`ErrorKind::Cancelled`].
    pub fn cancel(self: &Arc<Self>) {
        self.on_channels(|channel| channel.cancel_waiting());
    }

    fn on_channels(self: &Arc<Self>, work: fn(Rc<HoldChannel>)) {
        let reactors = self.reactors.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let id = self.id();
        for (handle, _) in reactors {
            let hold = self.clone();
            handle.post(move |_| {
                debug_assert_eq!(hold.id(), id);
                let channels = CHANNELS.with(|list| {
                    list.borrow()
                        .iter()
                        .filter(|(owner, _)| *owner == id)
                        .filter_map(|(_, weak)| weak.upgrade())
                        .collect()
                });
                let channels: Vec<Rc<HoldChannel>> = channels;
                channels.into_iter().for_each(work);
            });
        }
    }

    fn id(self: &Arc<Self>) -> usize {
        Arc::as_ptr(self).addr()
    }

    /// Counts a reactor in, or out where its last channel is gone.
    fn count(self: &Arc<Self>, local: &Local, more: bool) {
        let mut reactors = self.reactors.lock().unwrap_or_else(PoisonError::into_inner);
        let handle = local.handle();
        match reactors.iter_mut().find(|(other, _)| *other == handle) {
            Some((_, count)) if more => *count += 1,
            Some((_, count)) => *count -= 1,
            None if more => reactors.push((handle, 1)),
            None => {}
        }
        reactors.retain(|(_, count)| *count > 0);
    }
}

impl Filter for Hold {
    fn wrap(self: Arc<Self>, inner: Rc<dyn Channel>, local: &Local) -> Rc<dyn Channel> {
        let id = self.id();
        self.count(local, true);
        let channel = Rc::new(HoldChannel {
            relay: Relay::new(inner),
            hold: self,
            local: local.clone(),
            parked: RefCell::default(),
        });
        CHANNELS.with(|list| list.borrow_mut().push((id, Rc::downgrade(&channel))));
        channel
    }
}

struct HoldChannel {
    relay: Rc<Relay<HoldChannel>>,
    hold: Arc<Hold>,
    local: Local,
    parked: RefCell<Vec<Request>>,
}

impl HoldChannel {
    fn park(&self, request: Request) {
        self.hold.parked.fetch_add(1, Ordering::SeqCst);
        self.parked.borrow_mut().push(request);
    }

    fn take(&self) -> Vec<Request> {
        let parked = std::mem::take(&mut *self.parked.borrow_mut());
        self.hold.parked.fetch_sub(parked.len(), Ordering::SeqCst);
        parked
    }

    fn retry(self: Rc<Self>) {
        for mut request in self.take() {
            // Time spent here is queue time.
            request.issued_at = None;
            self.clone().submit(request);
        }
    }
}

impl Channel for HoldChannel {
    fn submit(self: Rc<Self>, request: Request) {
        if self.hold.paused.load(Ordering::SeqCst) {
            self.park(request);
        } else {
            self.relay.clone().pass(self, request);
        }
    }

    fn cancel_waiting(&self) {
        for request in self.take() {
            request.fail(Error::new(ErrorKind::Cancelled, "given up while it waited"));
        }
        self.relay.inner().cancel_waiting();
    }
}

impl Outcome for HoldChannel {
    fn returned(self: Rc<Self>, request: Request, result: Result<()>) {
        match result {
            Err(error) if self.hold.policy.failed(&request, &error) == Verdict::Park => self.park(request),
            result => request.complete(result),
        }
    }
}

impl Drop for HoldChannel {
    fn drop(&mut self) {
        for request in self.take() {
            request.fail(Error::new(ErrorKind::Cancelled, "its queue was closed while it waited"));
        }
        let this: *const HoldChannel = self;
        CHANNELS.with(|list| list.borrow_mut().retain(|(_, weak)| weak.as_ptr() != this));
        self.hold.count(&self.local, false);
    }
}
