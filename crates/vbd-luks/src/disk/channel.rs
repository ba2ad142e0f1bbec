//! A queue's way to an encrypted disk: what no disk could do is refused, the rest is for the data's own channel.

use std::rc::Rc;
use std::sync::Arc;

use vbd_core::{Channel, Error, ErrorKind, Operation, Request, Result, Session as _};
use vbd_ring::Local;

use super::LuksSession;

pub(super) struct LuksChannel {
    session: Arc<LuksSession>,
    data: Rc<dyn Channel>,
}

impl LuksChannel {
    pub(super) fn new(session: Arc<LuksSession>, inner: Rc<dyn Channel>, local: &Local) -> Rc<Self> {
        let data = session.data.channel(inner, local);
        Rc::new(LuksChannel { session, data })
    }

    fn check(&self, request: &Request) -> Result<()> {
        if request.operation == Operation::Flush {
            return Ok(());
        }
        if request.operation.is_write() && self.session.capabilities().read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the disk is read-only"));
        }
        let size = self.session.geometry().size;
        if request.offset.checked_add(request.len).is_none_or(|end| end > size) {
            return Err(Error::new(ErrorKind::OutOfRange, format!("the disk ends at {size}")));
        }
        let transfers = matches!(request.operation, Operation::Read | Operation::Write);
        if transfers && request.memory.iter().map(|piece| piece.iov_len as u64).sum::<u64>() != request.len {
            return Err(Error::new(ErrorKind::OutOfRange, "the memory given is not as long as the range"));
        }
        Ok(())
    }
}

impl Channel for LuksChannel {
    fn submit(self: Rc<Self>, request: Request) {
        match self.check(&request) {
            Ok(()) => self.data.clone().submit(request),
            Err(error) => request.fail(error.of(self.session.data.label())),
        }
    }

    fn cancel_waiting(&self) {
        self.data.cancel_waiting();
    }
}
