//! Messages from the back-end to the front-end: that the configuration has changed.
//!
//! The message layer's `Backend` has no such message and does not give its socket out. So the socket is taken from a
//! look at the message that brings it, before the message layer takes the message itself.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};

/// Bytes of a message's header: request, flags and the payload's size, 32 bits each.
const HEADER: usize = 12;
/// VHOST_USER_SET_BACKEND_REQ_FD.
const SET_BACKEND_REQ_FD: u32 = 21;
/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;
/// The protocol's version, in a message's flags.
const VERSION: u32 = 1;

/// The front-end's socket for messages to it.
#[derive(Default)]
pub(crate) struct Backchannel(Mutex<Sockets>);

#[derive(Default)]
struct Sockets {
    seen: Option<OwnedFd>,
    installed: Option<OwnedFd>,
}

/// The next message, as far as it has arrived.
pub(crate) struct Header {
    request: u32,
    /// Bytes of the whole message.
    pub(crate) len: usize,
}

impl Backchannel {
    /// Looks at the next message without taking it. None if not even its header is there.
    pub(crate) fn peek(&self, socket: &UnixStream) -> Option<Header> {
        let mut bytes = [0; HEADER];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let (got, _) = rustix::net::recv(socket, &mut bytes, flags).ok()?;
        let half = |at: usize| bytes[at..at + 4].try_into().map_or(0, u32::from_ne_bytes);
        let header = Header { request: half(0), len: HEADER + usize::try_from(half(8)).ok()? };
        if got < HEADER {
            return None;
        }
        if header.request == SET_BACKEND_REQ_FD {
            self.take_copy(socket);
        }
        Some(header)
    }

    fn take_copy(&self, socket: &UnixStream) {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; HEADER];
        let mut pieces = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        if recvmsg(socket.as_fd(), &mut pieces, &mut control, flags).is_err() {
            return;
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut fds) = message {
                self.lock().seen = fds.next();
            }
        }
    }

    /// Uses the socket that was seen, which the message layer has found to be one.
    pub(crate) fn install(&self) {
        let mut sockets = self.lock();
        sockets.installed = sockets.seen.take();
    }

    /// Tells the front-end to read the configuration again. Never blocks: one that does not read misses it.
    pub(crate) fn configuration_changed(&self) {
        let header = [CONFIG_CHANGE, VERSION, 0].map(u32::to_ne_bytes);
        if let Some(socket) = &self.lock().installed {
            let _ = send(socket, header.as_flattened(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Sockets> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
