//! A flush outside of any queue, before the disk is given back.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use vbd_core::{Channel, Operation, Request, Result, Session, Sink};
use vbd_ring::Handle;

struct Answer {
    sender: SyncSender<std::result::Result<(), String>>,
    /// Held until the answer is there.
    _channel: Rc<dyn Channel>,
}

impl Sink for Answer {
    fn complete(self: Rc<Self>, _request: Request, result: Result<()>) {
        let _ = self.sender.try_send(result.map_err(|error| error.to_string()));
    }
}

/// Flushes a disk on a reactor and waits for it, so long at most.
///
/// # Errors
/// What the flush has met, or that it takes too long.
pub(crate) fn flush(
    reactor: &Handle,
    session: &Arc<dyn Session>,
    within: Duration,
) -> std::result::Result<(), String> {
    let (sender, receiver) = sync_channel(1);
    let session = session.clone();
    reactor.post(move |local| match session.channel(local) {
        Ok(channel) => {
            let sink = Rc::new(Answer { sender, _channel: channel.clone() });
            channel.submit(Request::new(Operation::Flush, 0, 0, local.now(), sink));
        }
        Err(error) => {
            let _ = sender.try_send(Err(error.to_string()));
        }
    });
    receiver.recv_timeout(within).unwrap_or_else(|_| Err("no answer in time".into()))
}
