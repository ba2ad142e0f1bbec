//! Errors, delays and torn writes on purpose.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vbd_ring::{Completion, Local};

use super::Filter;
use super::relay::{Outcome, Relay};
use crate::{Channel, Error, ErrorKind, Operation, Request, Result, SECTOR};

/// What happens to a request that a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It fails and does nothing.
    Fail(ErrorKind),
    /// It is passed on after this time.
    Delay(Duration),
    /// A read or write does this many of its sectors, then fails with an I/O error.
    Torn(u64),
}

/// Which requests something happens to.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Only this operation, or any.
    pub operation: Option<Operation>,
    /// Only requests that touch this range, in bytes. Flushes have none and always match.
    pub range: Range<u64>,
    /// So many matching requests pass first.
    pub skip: u64,
    /// So many are then hit; afterwards the rule is spent.
    pub times: u64,
    /// What happens to them.
    pub action: Action,
}

impl Rule {
    /// `action` for every request with this operation.
    pub fn always(operation: Operation, action: Action) -> Self {
        Rule { operation: Some(operation), range: 0..u64::MAX, skip: 0, times: u64::MAX, action }
    }

    fn matches(&self, request: &Request) -> bool {
        let end = request.offset.saturating_add(request.len);
        let touches = request.operation == Operation::Flush
            || (request.offset < self.range.end && self.range.start < end);
        self.operation.is_none_or(|operation| operation == request.operation) && touches
    }
}

/// The filter. Rules can be changed while it works.
#[derive(Default)]
pub struct Inject(Mutex<Vec<Rule>>);

impl Inject {
    /// A filter with these rules; the first that matches counts.
    pub fn new(rules: Vec<Rule>) -> Arc<Self> {
        Arc::new(Inject(Mutex::new(rules)))
    }

    /// Replaces the rules.
    pub fn set(&self, rules: Vec<Rule>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = rules;
    }

    fn action(&self, request: &Request) -> Option<Action> {
        let mut rules = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let rule = rules.iter_mut().find(|rule| rule.times > 0 && rule.matches(request))?;
        if rule.skip > 0 {
            rule.skip -= 1;
            return None;
        }
        rule.times = rule.times.saturating_sub(1);
        Some(rule.action)
    }
}

impl Filter for Inject {
    fn wrap(self: Arc<Self>, inner: Rc<dyn Channel>, local: &Local) -> Rc<dyn Channel> {
        Rc::new(InjectChannel {
            rules: self,
            relay: Relay::new(inner),
            local: local.clone(),
            delayed: RefCell::default(),
        })
    }
}

struct InjectChannel {
    rules: Arc<Inject>,
    relay: Rc<Relay<InjectChannel>>,
    local: Local,
    delayed: RefCell<Vec<Option<Request>>>,
}

impl Channel for InjectChannel {
    fn submit(self: Rc<Self>, request: Request) {
        match self.rules.action(&request) {
            None => self.relay.clone().pass(self, request),
            Some(Action::Fail(kind)) => request.fail(Error::new(kind, "injected")),
            Some(Action::Delay(time)) => {
                let mut delayed = self.delayed.borrow_mut();
                let slot = delayed.iter().position(Option::is_none).unwrap_or(delayed.len());
                let len = delayed.len().max(slot + 1);
                delayed.resize_with(len, || None);
                delayed[slot] = Some(request);
                drop(delayed);
                let (local, at) = (self.local.clone(), self.local.now() + time);
                local.timer(at, self, slot as u64);
            }
            Some(Action::Torn(sectors)) => self.tear(request, sectors * SECTOR),
        }
    }

    fn cancel_waiting(&self) {
        let waiting: Vec<_> = self.delayed.borrow_mut().iter_mut().filter_map(Option::take).collect();
        for request in waiting {
            request.fail(Error::new(ErrorKind::Cancelled, "given up while it was delayed"));
        }
        self.relay.inner().cancel_waiting();
    }
}

impl InjectChannel {
    /// Passes on a request that does only the first bytes of this one, and fails this one when it is done.
    fn tear(self: Rc<Self>, request: Request, len: u64) {
        if len == 0 || len >= request.len {
            return request.fail(Error::new(ErrorKind::Io, "injected"));
        }
        let torn = Rc::new(Torn(RefCell::new(None)));
        let mut part = Request::new(request.operation, request.offset, len, request.queued_at, torn.clone());
        let mut left = len;
        for piece in &request.memory {
            let take = usize::try_from(left).unwrap_or(usize::MAX).min(piece.iov_len);
            if take > 0 {
                part.memory.push(crate::IoVec { iov_base: piece.iov_base, iov_len: take });
            }
            left -= take as u64;
        }
        part.guard = request.guard.clone();
        part.flags = request.flags;
        *torn.0.borrow_mut() = Some(request);
        self.relay.inner().clone().submit(part);
    }
}

/// Waits for the part of a torn request.
struct Torn(RefCell<Option<Request>>);

impl crate::Sink for Torn {
    fn complete(self: Rc<Self>, _part: Request, _result: Result<()>) {
        if let Some(whole) = self.0.borrow_mut().take() {
            whole.fail(Error::new(ErrorKind::Io, "injected"));
        }
    }
}

impl Completion for InjectChannel {
    fn complete(self: Rc<Self>, token: u64, _result: i32) {
        let slot = usize::try_from(token).unwrap_or(usize::MAX);
        let request = self.delayed.borrow_mut().get_mut(slot).and_then(Option::take);
        if let Some(request) = request {
            self.relay.clone().pass(self, request);
        }
    }
}

impl Outcome for InjectChannel {
    fn returned(self: Rc<Self>, request: Request, result: Result<()>) {
        request.complete(result);
    }
}

impl Drop for InjectChannel {
    fn drop(&mut self) {
        for request in self.delayed.borrow_mut().iter_mut().filter_map(Option::take) {
            request.fail(Error::new(ErrorKind::Cancelled, "its queue was closed while it was delayed"));
        }
    }
}
