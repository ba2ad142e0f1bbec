//! What the control thread is told by others: jobs that are done, rings that are broken, requests of the program.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use crate::connect::{Connection, Failure};
use crate::options::{DeviceId, Provided};

/// What others have for the control thread.
pub(crate) enum Message {
    Provided(DeviceId, Result<Option<Provided>, String>),
    Connected(DeviceId, Result<Box<Connection>, Failure>),
    Ended(DeviceId),
    Broken(DeviceId, u64, String),
    Resized(DeviceId),
    Leave(Leaving),
}

/// How a server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// Devices are closed.
    Close,
    /// They are left connected, for a successor.
    Keep,
}

/// A queue of messages with an eventfd.
pub(crate) struct Mail {
    messages: Mutex<Vec<Message>>,
    wake: OwnedFd,
}

impl Mail {
    pub(crate) fn new() -> io::Result<Mail> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        Ok(Mail { messages: Mutex::default(), wake: rustix::event::eventfd(0, flags)? })
    }

    pub(crate) fn send(&self, message: Message) {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner).push(message);
        // An eventfd refuses only at 2^64 - 1.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    pub(crate) fn take(&self) -> Vec<Message> {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
        std::mem::take(&mut *self.messages.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl AsFd for Mail {
    /// Readable when there is something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
