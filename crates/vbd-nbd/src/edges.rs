//! Writes of parts of sectors: read what lies beside them, then write whole sectors, with every other write of those
//! sectors kept out meanwhile, over all connections of an export.

use std::cell::RefCell;
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Instant;

use vbd_core::{Channel, Error, ErrorKind, Operation, Request, Result, Sink};

use crate::memory::Buffer;
use crate::transmission::piece_of;

/// A write that waits for its sectors; it comes back even where nobody waits any more.
pub(crate) struct Parked(Option<Request>);

impl Parked {
    pub(crate) fn new(request: Request) -> Self {
        Parked(Some(request))
    }

    /// Its piece, and the bytes that it writes.
    pub(crate) fn about(&self) -> Option<(u32, Range<u64>)> {
        self.0.as_ref().map(|request| (piece_of(request), range(request)))
    }

    /// The request, to be submitted.
    pub(crate) fn take(mut self) -> Option<Request> {
        self.0.take()
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        if let Some(request) = self.0.take() {
            request.fail(Error::new(ErrorKind::Cancelled, "the disk is stopping"));
        }
    }
}

/// The bytes that a request is about.
pub(crate) fn range(request: &Request) -> Range<u64> {
    request.offset..request.offset + request.len
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
