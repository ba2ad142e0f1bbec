//! Requests: an operation, a range, and memory described in place.

use std::any::Any;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use vbd_ring::IoVec;

use crate::track::Ticket;
use crate::{Error, ErrorKind, Result};

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Fill the memory from the range.
    Read,
    /// Write the memory to the range.
    Write,
    /// Make everything that has completed durable. Has no range.
    Flush,
    /// The range's content is not needed any more. Advice: parts too small to give back are kept as they are.
    Discard,
    /// The range reads as zeroes from now on.
    WriteZeroes,
    /// Tell what the range consists of, in [`Request::extents`].
    Extents,
}

impl Operation {
    /// Whether this may change the disk.
    pub fn is_write(self) -> bool {
        matches!(self, Operation::Write | Operation::Discard | Operation::WriteZeroes)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Discard => "discard",
            Operation::WriteZeroes => "write zeroes",
            Operation::Extents => "extents",
        })
    }
}

/// How a request is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Durable when it completes (force unit access).
    pub fua: bool,
    /// Zeroes may be made by giving the space back.
    pub may_unmap: bool,
    /// Zeroes only where that is faster than writing them; else [`ErrorKind::Unsupported`].
    pub fast_only: bool,
}

/// A part of a disk, as [`Operation::Extents`] tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes from here on.
    pub len: u64,
    /// What they are.
    pub kind: ExtentKind,
}

/// What a part of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Allocated, with content.
    Data,
    /// Reads as zeroes and takes space.
    Zero,
    /// Reads as zeroes and takes no space.
    Hole,
}

/// Keeps the memory that a request's pieces lie in from going away.
pub type Guard = Arc<dyn Any + Send + Sync>;

/// Receives requests back. One sink has many requests out, told apart by [`Request::token`].
pub trait Sink {
    /// `request` is done, with this result. Runs on the thread that submitted it, possibly within `submit`.
    fn complete(self: Rc<Self>, request: Request, result: Result<()>);
}

/// One request: an owned value that comes back to its sink with every outcome.
///
/// Dropping one that was not completed is a bug: a debug build panics, a release build answers it with an error.
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// First byte.
    pub offset: u64,
    /// Bytes. For a read or write, the sum of the lengths in `memory`.
    pub len: u64,
    /// How to do it.
    pub flags: Flags,
    /// Where the data is or goes, in order. The vector is the sink's to reuse when the request has come back.
    pub memory: Vec<IoVec>,
    /// Keeps `memory` valid.
    pub guard: Option<Guard>,
    /// The answer to [`Operation::Extents`]: covers the range from its start, at least one extent, perhaps not all.
    pub extents: Vec<Extent>,
    /// The sink's own name for this request.
    pub token: u64,
    /// When the front-end took it.
    pub queued_at: Instant,
    /// When the storage below was first asked; queue time ends and service time begins.
    pub issued_at: Option<Instant>,
    sink: Option<Rc<dyn Sink>>,
    /// How many have put their sink before the front-end's.
    depth: u8,
    /// Kept until the request has come back to the sink at `ticket_depth`.
    ticket: Option<Rc<Ticket>>,
    ticket_depth: u8,
}

impl Request {
    /// A request without memory; see the fields.
    pub fn new(operation: Operation, offset: u64, len: u64, queued_at: Instant, sink: Rc<dyn Sink>) -> Self {
        Request {
            operation,
            offset,
            len,
            flags: Flags::default(),
            memory: Vec::new(),
            guard: None,
            extents: Vec::new(),
            token: 0,
            queued_at,
            issued_at: None,
            sink: Some(sink),
            depth: 0,
            ticket: None,
            ticket_depth: 0,
        }
    }

    /// Sends the request back to its sink.
    pub fn complete(mut self, result: Result<()>) {
        if self.ticket_depth >= self.depth {
            self.ticket = None;
        }
        if let Some(sink) = self.sink.take() {
            sink.complete(self, result);
        }
    }

    /// Sends the request back with an error that says what it was doing.
    pub fn fail(self, error: Error) {
        let error = error.at(self.operation, self.offset, self.len);
        self.complete(Err(error));
    }

    /// Puts another sink in place, for a filter that wants to see the outcome; gives the one before.
    pub fn replace_sink(&mut self, sink: Rc<dyn Sink>) -> Option<Rc<dyn Sink>> {
        self.depth = self.depth.saturating_add(1);
        self.sink.replace(sink)
    }

    /// Puts a sink back that [`replace_sink`](Self::replace_sink) gave; the request is then to be completed again.
    pub fn restore_sink(&mut self, sink: Option<Rc<dyn Sink>>) {
        self.depth = self.depth.saturating_sub(1);
        self.sink = sink;
    }

    /// Keeps `held` until the request comes back to the sink that it has now: it is dropped just before. So a filter
    /// knows what is under way below it without standing in the way back. Where another filter before this one has done
    /// that already, both are kept until the request comes back to that one.
    #[inline]
    pub(crate) fn keep(&mut self, held: Rc<Ticket>) {
        if let Some(earlier) = self.ticket.take() {
            self.ticket = Some(Ticket::both(earlier, held));
        } else {
            (self.ticket, self.ticket_depth) = (Some(held), self.depth);
        }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes at {} ({:?})", self.operation, self.len, self.offset, self.flags)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let Some(sink) = self.sink.take() else { return };
        let request = Request {
            memory: std::mem::take(&mut self.memory),
            guard: self.guard.take(),
            extents: std::mem::take(&mut self.extents),
            sink: None,
            ticket: self.ticket.take(),
            ..*self
        };
        sink.complete(request, Err(Error::new(ErrorKind::Io, "the request was lost inside vbd")));
        if cfg!(debug_assertions) && !std::thread::panicking() {
            panic!("a request was dropped without being completed");
        }
    }
}
