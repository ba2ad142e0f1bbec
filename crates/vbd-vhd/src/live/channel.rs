//! A queue's way to an image: what one range of the file answers goes there at once, the rest becomes a task.

use std::rc::Rc;
use std::sync::Arc;

use vbd_core::ask::Pending;
use vbd_core::{Channel, Error, ErrorKind, Guard, Operation, Request, Result};
use vbd_ring::Local;

use super::Image;
use super::relay::Relay;

/// The channel.
pub(crate) struct VhdChannel {
    pub(crate) image: Arc<Image>,
    /// To the file.
    pub(crate) file: Rc<dyn Channel>,
    /// To the parent, and its size in bytes.
    pub(crate) parent: Option<(Rc<dyn Channel>, u64)>,
    pub(crate) local: Local,
    relay: Rc<Relay>,
}

impl VhdChannel {
    /// A channel on this reactor, which keeps `session`, the image's, open.
    ///
    /// # Errors
    /// The parent has none to give.
    pub(crate) fn new(image: Arc<Image>, session: Guard, local: &Local) -> Result<Rc<Self>> {
        let parent = match &image.parent {
            Some(parent) => Some((parent.clone().channel(local)?, parent.geometry().size)),
            None => None,
        };
        let file = image.backend.clone().channel(local, session);
        let relay = Relay::new(file.clone(), image.clone());
        Ok(Rc::new(VhdChannel { image, file, parent, local: local.clone(), relay }))
    }

    fn check(&self, request: &Request) -> Result<()> {
        if request.operation == Operation::Flush {
            return Ok(());
        }
        if request.operation.is_write() && self.image.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the disk is read-only"));
        }
        let size = self.image.size;
        if request.offset.checked_add(request.len).is_none_or(|end| end > size) {
            return Err(Error::new(ErrorKind::OutOfRange, format!("the disk ends at {size}")));
        }
        let transfers = matches!(request.operation, Operation::Read | Operation::Write);
        if transfers && request.memory.iter().map(|piece| piece.iov_len as u64).sum::<u64>() != request.len {
            return Err(Error::new(ErrorKind::OutOfRange, "the memory given is not as long as the range"));
        }
        Ok(())
    }

    /// Does a request as a task.
    fn work(self: Rc<Self>, request: Request) {
        let mut pending = Pending::new(request);
        self.local.clone().spawn(async move {
            let request = pending.request();
            request.issued_at = Some(self.local.now());
            let result = self.serve(request).await;
            pending.complete(result.map_err(|error| error.of(&self.image.label)));
        });
    }
}

impl Channel for VhdChannel {
    fn submit(self: Rc<Self>, request: Request) {
        if let Err(error) = self.check(&request) {
            return request.fail(error.of(&self.image.label));
        }
        // The content of a fixed disk begins the file.
        let Some(map) = &self.image.map else { return self.file.clone().submit(request) };
        let to = match request.operation {
            Operation::Flush => return self.relay.pass(request, 0, Some(map.durable.begin())),
            // Where metadata is not durable yet, a durable write needs a flush.
            _ if request.flags.fua && !map.durable.is_settled() => None,
            _ => map.direct(request.offset, request.len),
        };
        match to {
            Some(to) => self.relay.pass(request, to, None),
            None => self.work(request),
        }
    }

    fn cancel_waiting(&self) {
        self.file.cancel_waiting();
        if let Some((parent, _)) = &self.parent {
            parent.cancel_waiting();
        }
    }
}
