//! Requests within a task: to ask a channel and await what it says, and to answer a request that a task works on.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Instant;

use crate::{Channel, Error, ErrorKind, Extent, Flags, Guard, IoVec, Operation, Request, Result, Sink};

/// What to ask of a channel. See the fields of [`Request`].
pub struct Ask {
    /// What to do.
    pub operation: Operation,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// How to do it.
    pub flags: Flags,
    /// Where the data is or goes.
    pub memory: Vec<IoVec>,
    /// Keeps `memory` valid until the operation has ended, which may be later than the future that waits for it.
    pub guard: Option<Guard>,
}

impl Ask {
    /// One without memory and flags.
    pub fn new(operation: Operation, offset: u64, len: u64) -> Self {
        Ask { operation, offset, len, flags: Flags::default(), memory: Vec::new(), guard: None }
    }

    /// A read into this memory, or a write of it.
    pub fn transfer(operation: Operation, offset: u64, memory: Vec<IoVec>, guard: Option<Guard>) -> Self {
        let len = memory.iter().map(|piece| piece.iov_len as u64).sum();
        Ask { memory, guard, ..Ask::new(operation, offset, len) }
    }

    /// A flush.
    pub fn flush() -> Self {
        Ask::new(Operation::Flush, 0, 0)
    }

    /// The same, durable when it completes.
    #[must_use]
    pub fn durable(mut self, fua: bool) -> Self {
        self.flags.fua = fua;
        self
    }
}

/// Holds the answer until the task takes it.
#[derive(Default)]
struct Answer {
    result: Cell<Option<Result<Vec<Extent>>>>,
    waker: RefCell<Option<Waker>>,
}

impl Sink for Answer {
    fn complete(self: Rc<Self>, mut request: Request, result: Result<()>) {
        self.result.set(Some(result.map(|()| std::mem::take(&mut request.extents))));
        let waker = self.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Submits a request and gives its answer: for [`Operation::Extents`] these, for others none. It is submitted at once,
/// and is carried out whether or not the future is awaited. `now` is the time it counts from.
///
/// # Errors
/// What the channel says.
pub fn ask(
    channel: &Rc<dyn Channel>,
    ask: Ask,
    now: Instant,
) -> impl Future<Output = Result<Vec<Extent>>> + use<> {
    let answer = Rc::new(Answer::default());
    let mut request = Request::new(ask.operation, ask.offset, ask.len, now, answer.clone());
    request.flags = ask.flags;
    request.memory = ask.memory;
    request.guard = ask.guard;
    channel.clone().submit(request);
    poll_fn(move |context| match answer.result.take() {
        Some(result) => Poll::Ready(result),
        None => {
            *answer.waker.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        }
    })
}

/// A request that a task works on; it comes back even where the task is dropped.
pub struct Pending(Option<Request>);

impl Pending {
    /// Takes a request on.
    pub fn new(request: Request) -> Self {
        Pending(Some(request))
    }

    /// The request.
    pub fn request(&mut self) -> &mut Request {
        self.0.as_mut().expect("there until it is completed")
    }

    /// Gives the request back to the task, which passes it on at once.
    ///
    /// # Panics
    /// Never: it is there until it is completed.
    pub fn take(mut self) -> Request {
        self.0.take().expect("there until it is completed")
    }

    /// Sends the request back; an error says what it was doing.
    pub fn complete(mut self, result: Result<()>) {
        match (self.0.take(), result) {
            (Some(request), Ok(())) => request.complete(Ok(())),
            (Some(request), Err(error)) => request.fail(error),
            (None, _) => {}
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(request) = self.0.take() {
            request.fail(Error::new(ErrorKind::Cancelled, "the disk is stopping"));
        }
    }
}
