//! One front-end's connection, on a thread of its own: nobody else waits for what it does or leaves half done.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::{BackendReqHandler, Error};

use crate::backchannel::Backchannel;
use crate::device::Device;
use crate::server::Shared;
use crate::sigbus::Owner;

/// How long the rest of a message may take once its first byte is there.
const MESSAGE_WITHIN: Duration = Duration::from_secs(10);
/// Between looks at a message that is not complete.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// A longer message is refused by the message layer, without its payload.
const MOST_BYTES: usize = 12 + 4096;

/// Serves a connection until its end.
pub(crate) fn serve(shared: &Arc<Shared>, socket: UnixStream) -> std::io::Result<()> {
    let owner = Arc::new(Owner::new(socket.try_clone()?.into()));
    let messages = socket.try_clone()?;
    let backchannel = Arc::new(Backchannel::default());
    let told = backchannel.clone();
    let _watch = shared.disk().watch(Box::new(move |_| told.configuration_changed()));
    let device = Arc::new(Mutex::new(Device::new(shared.clone(), owner.clone(), backchannel.clone())));
    let mut handler = BackendReqHandler::from_stream(socket, device.clone());
    tracing::debug!("{}: a front-end has connected", shared.name());

    loop {
        if !wait(&messages, lock(&device).retry_at()) {
            lock(&device).retry();
            continue;
        }
        if !is_whole(&messages, &backchannel) {
            break;
        }
        match handler.handle_request() {
            Ok(()) => {}
            Err(_) if lock(&device).take_refused() => {}
            Err(Error::Disconnected) => break,
            Err(error) => {
                if shared.stop_until().is_none() {
                    shared.complain(&format!("the connection is given up: {error}"));
                }
                break;
            }
        }
    }
    if owner.is_lost() {
        shared.complain("the front-end has truncated the memory it shares");
    }
    drop(handler);
    drop(device);
    // Memory of requests that are still in the storage keeps a copy of the socket.
    let _ = messages.shutdown(Shutdown::Both);
    tracing::debug!("{}: the connection has ended", shared.name());
    Ok(())
}

fn lock(device: &Mutex<Device>) -> MutexGuard<'_, Device> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until there is something to read, or the peer has gone; false if the time has come before.
fn wait(socket: &UnixStream, until: Option<Instant>) -> bool {
    let timeout = until.map(|until| until.saturating_duration_since(Instant::now()));
    let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());
    let mut set = [PollFd::new(socket, PollFlags::IN)];
    !matches!(poll(&mut set, timeout.as_ref()), Ok(0))
}

/// Waits for the rest of a message that has begun to arrive, since the message layer takes it as a whole.
fn is_whole(socket: &UnixStream, backchannel: &Backchannel) -> bool {
    let deadline = Instant::now() + MESSAGE_WITHIN;
    loop {
        if let Some(header) = backchannel.peek(socket) {
            let there = rustix::io::ioctl_fionread(socket).unwrap_or(0);
            if header.len > MOST_BYTES || there >= header.len as u64 {
                return true;
            }
        }
        let mut set = [PollFd::new(socket, PollFlags::RDHUP)];
        let gone = !matches!(poll(&mut set, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0));
        if gone || Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}
