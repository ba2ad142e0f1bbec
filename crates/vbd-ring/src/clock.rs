//! Timers of one reactor.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;

use crate::Completion;

/// Names a timer, for [`Local::cancel_timer`](crate::Local::cancel_timer).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimerId(Instant, u64);

#[derive(Default)]
pub(crate) struct Timers {
    waiting: BTreeMap<TimerId, (Rc<dyn Completion>, u64)>,
    next: u64,
}

impl Timers {
    pub(crate) fn add(&mut self, at: Instant, sink: Rc<dyn Completion>, token: u64) -> TimerId {
        self.next += 1;
        let id = TimerId(at, self.next);
        self.waiting.insert(id, (sink, token));
        id
    }

    pub(crate) fn cancel(&mut self, id: TimerId) -> bool {
        self.waiting.remove(&id).is_some()
    }

    pub(crate) fn next_at(&self) -> Option<Instant> {
        self.waiting.keys().next().map(|id| id.0)
    }

    /// The first timer that is due, taken out.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<(Rc<dyn Completion>, u64)> {
        let id = *self.waiting.keys().next()?;
        if id.0 > now { None } else { self.waiting.remove(&id) }
    }
}
