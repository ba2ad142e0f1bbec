//! How other threads reach a connection or a listener: orders, and a wake-up.

use std::future::{Future, poll_fn};
use std::sync::{Mutex, PoisonError};
use std::task::{Poll, Waker};

/// What is to become of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Order {
    /// Go on.
    #[default]
    Run,
    /// Take nothing new, finish what was taken, then end.
    Finish,
    /// End at once.
    End,
    /// It has ended; nobody needs to listen any more.
    Gone,
}

#[derive(Default)]
struct State {
    order: Order,
    woken: bool,
    waker: Option<Waker>,
}

/// The part of a connection that other threads reach.
#[derive(Default)]
pub(crate) struct Control(Mutex<State>);

impl Control {
    fn change(&self, change: impl FnOnce(&mut State)) {
        let waker = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut state);
            state.woken = true;
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Gives an order; one that was harsher stays.
    pub(crate) fn order(&self, order: Order) {
        self.change(|state| state.order = state.order.max(order));
    }

    /// Has the connection look whether it can go on.
    pub(crate) fn wake(&self) {
        self.change(|_| {});
    }

    /// The next time that something was said: the order that holds.
    pub(crate) fn changed(&self) -> impl Future<Output = Order> {
        poll_fn(|context| {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if std::mem::take(&mut state.woken) {
                return Poll::Ready(state.order);
            }
            state.waker = Some(context.waker().clone());
            Poll::Pending
        })
    }
}
