//! A disk whose guest holds writes for done that are lost.

use std::rc::Rc;
use std::sync::Arc;

use vbd_core::{Capabilities, Channel, Error, ErrorKind, Geometry, Request, Result, Session};
use vbd_ring::Local;

/// The disk as it looks, with every request an error.
pub(crate) struct Lost(pub(crate) Arc<dyn Session>);

impl Session for Lost {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn channel(self: Arc<Self>, _local: &Local) -> Result<Rc<dyn Channel>> {
        Ok(Rc::new(Refusing(self)))
    }

    fn grow(&self, size: u64) -> Result<()> {
        self.0.grow(size)
    }

    fn keeps_unflushed(&self) -> bool {
        false
    }
}

/// Keeps the session open.
struct Refusing(#[allow(dead_code, reason = "held")] Arc<Lost>);

impl Channel for Refusing {
    fn submit(self: Rc<Self>, request: Request) {
        let message = "writes were lost with a server that was killed; the guest has to be reset";
        request.fail(Error::new(ErrorKind::FlushLost, message));
    }
}
