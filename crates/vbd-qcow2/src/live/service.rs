//! Work on an image outside of its queues: at opening and closing, and for operations that need it alone.

use std::future::Future;
use std::sync::Arc;

use vbd_core::file::Backend;
use vbd_core::{Error, ErrorKind, Guard, Result, Session};
use vbd_luks::Encrypted;
use vbd_ring::sync::mpsc::sync_channel;
use vbd_ring::{Reactor, Settings};

use super::io::{Files, Io};

/// What a task on a file needs.
pub(super) struct Place {
    pub(super) backend: Arc<Backend>,
    pub(super) data_file: Option<Arc<dyn Session>>,
    pub(super) encrypted: Option<Arc<Encrypted>>,
    pub(super) owner: Guard,
}

/// Runs a task on a reactor of its own and waits for it: so the file is reached in the same way, and its faults are
/// injected and its changes recorded, as by any queue. Not to be called in a task.
pub(super) fn run<T, W, F>(place: Place, work: W) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + 'static,
    W: FnOnce(Io) -> F + Send + 'static,
{
    let failed = |error: std::io::Error| Error::io("cannot start a thread for the image", error);
    let reactor = Reactor::spawn("vbd-qcow2", Settings::default()).map_err(failed)?;
    let (sender, receiver) = sync_channel(1);
    reactor.handle().post(move |local| {
        let files = Files {
            backend: &place.backend,
            data_file: place.data_file.as_ref(),
            encrypted: place.encrypted.as_ref(),
        };
        let io = match Io::new(&files, local, place.owner) {
            Ok(io) => io,
            Err(error) => {
                let _ = sender.send(Err(error));
                return;
            }
        };
        let task = work(io);
        local.spawn(async move {
            let _ = sender.send(task.await);
        });
    });
    let result = receiver.recv();
    reactor.join();
    result.unwrap_or_else(|_| Err(Error::new(ErrorKind::Cancelled, "the task was given up")))
}
