//! A flush outside of any queue, before the disk is given back.

use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vbd_ring::sync::mpsc::{SyncSender, sync_channel};
use vbd_ring::{Completion, Handle};

use crate::{Channel, Operation, Request, Result, Session, Sink};

struct Answer {
    sender: SyncSender<std::result::Result<(), String>>,
    /// Held until the answer is there.
    channel: Rc<dyn Channel>,
}

impl Sink for Answer {
    fn complete(self: Rc<Self>, _request: Request, result: Result<()>) {
        let _ = self.sender.try_send(result.map_err(|error| error.to_string()));
    }
}

/// The end of the time: a flush that waits for a policy is given up.
struct Late(Weak<Answer>);

impl Completion for Late {
    fn complete(self: Rc<Self>, _token: u64, _result: i32) {
        if let Some(answer) = self.0.upgrade() {
            answer.channel.cancel_waiting();
        }
    }
}

/// Flushes a disk on a reactor and waits for it, so long at most.
///
/// # Errors
/// What the flush has met, or that it takes too long.
pub fn flush(
    reactor: &Handle,
    session: &Arc<dyn Session>,
    within: Duration,
) -> std::result::Result<(), String> {
    let (sender, receiver) = sync_channel(1);
    let session = session.clone();
    reactor.post(move |local| match session.channel(local) {
        Ok(channel) => {
            let sink = Rc::new(Answer { sender, channel: channel.clone() });
            local.timer(Instant::now() + within, Rc::new(Late(Rc::downgrade(&sink))), 0);
            channel.submit(Request::new(Operation::Flush, 0, 0, local.now(), sink));
        }
        Err(error) => {
            let _ = sender.try_send(Err(error.to_string()));
        }
    });
    // A little more, for a flush that was given up to say so.
    let answer = receiver.recv_timeout(within + Duration::from_secs(1));
    if answer.is_ok() {
        // The channel is given back in the turn of the answer; after that, the lease depends on the caller alone.
        reactor.call(|_| ());
    }
    answer.unwrap_or_else(|_| Err("the storage does not answer".into()))
}
