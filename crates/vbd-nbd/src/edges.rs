//! Writes of parts of sectors: read what lies beside them, then write whole sectors, with others kept out meanwhile.
//!
//! Only such writes exclude each other, over all connections of an export. A write of whole sectors that overlaps one
//! of them is a race that the client has made, and either may win.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Instant;

use vbd_core::{Channel, Operation, Request, Result, Sink};

use crate::memory::Buffer;

/// The ranges of an export that parts of sectors are being written in.
#[derive(Default)]
pub(crate) struct Edges(Mutex<State>);

#[derive(Default)]
struct State {
    held: Vec<Range<u64>>,
    waiting: Vec<Waker>,
}

impl Edges {
    /// Waits until nobody else is at work in the range.
    pub(crate) fn lock(self: &Arc<Self>, range: Range<u64>) -> impl Future<Output = Held> {
        let edges = self.clone();
        poll_fn(move |context| {
            let mut state = edges.0.lock().unwrap_or_else(PoisonError::into_inner);
            if state.held.iter().any(|held| held.start < range.end && range.start < held.end) {
                state.waiting.push(context.waker().clone());
                return Poll::Pending;
            }
            state.held.push(range.clone());
            Poll::Ready(Held(edges.clone(), range.clone()))
        })
    }
}

/// Keeps others out of a range.
pub(crate) struct Held(Arc<Edges>, Range<u64>);

impl Drop for Held {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
            // Ranges that are held do not overlap, so this is the one.
            state.held.retain(|held| *held != self.1);
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// A read that a task waits for.
struct Answer {
    buffer: Buffer,
    result: RefCell<Option<Result<()>>>,
    waker: RefCell<Option<Waker>>,
}

impl Sink for Answer {
    fn complete(self: Rc<Self>, _request: Request, result: Result<()>) {
        *self.result.borrow_mut() = Some(result);
        let waker = self.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Reads a sector into `buffer` and copies it to where it is wanted.
pub(crate) async fn read_sector(
    channel: Rc<dyn Channel>,
    offset: u64,
    buffer: Buffer,
    now: Instant,
) -> Result<[u8; 512]> {
    let memory = buffer.piece(0, 512);
    let answer = Rc::new(Answer { buffer, result: RefCell::default(), waker: RefCell::default() });
    let mut request = Request::new(Operation::Read, offset, 512, now, answer.clone());
    request.memory.push(memory);
    channel.submit(request);
    poll_fn(|context| {
        if let Some(result) = answer.result.borrow_mut().take() {
            return Poll::Ready(result);
        }
        *answer.waker.borrow_mut() = Some(context.waker().clone());
        Poll::Pending
    })
    .await?;
    let mut sector = [0; 512];
    sector.copy_from_slice(&answer.buffer.bytes()[..512]);
    Ok(sector)
}
