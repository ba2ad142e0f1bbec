//! The way of a request that one range of the file answers: its offset changed on the way down and put back on the way
//! up, without an allocation.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use vbd_core::{Channel, Request, Result, Sink};

use super::Image;

/// How a request came.
struct Origin {
    sink: Option<Rc<dyn Sink>>,
    token: u64,
    offset: u64,
    /// For a flush: the metadata that it covers.
    covers: Option<u64>,
}

pub(crate) struct Relay {
    inner: Rc<dyn Channel>,
    image: Arc<Image>,
    out: RefCell<Vec<Option<Origin>>>,
    free: RefCell<Vec<usize>>,
}

impl Relay {
    pub(crate) fn new(inner: Rc<dyn Channel>, image: Arc<Image>) -> Rc<Self> {
        Rc::new(Relay { inner, image, out: RefCell::default(), free: RefCell::default() })
    }

    /// Passes a request on, to this byte of the file.
    pub(crate) fn pass(self: &Rc<Self>, mut request: Request, to: u64, covers: Option<u64>) {
        let slot = self.free.borrow_mut().pop().unwrap_or_else(|| {
            self.out.borrow_mut().push(None);
            self.out.borrow().len() - 1
        });
        let (token, offset) = (request.token, request.offset);
        let sink = request.replace_sink(self.clone());
        self.out.borrow_mut()[slot] = Some(Origin { sink, token, offset, covers });
        request.token = slot as u64;
        request.offset = to;
        self.inner.clone().submit(request);
    }
}

impl Sink for Relay {
    fn complete(self: Rc<Self>, mut request: Request, result: Result<()>) {
        let slot = usize::try_from(request.token).unwrap_or(usize::MAX);
        let Some(origin) = self.out.borrow_mut().get_mut(slot).and_then(Option::take) else { return };
        self.free.borrow_mut().push(slot);
        request.token = origin.token;
        request.offset = origin.offset;
        request.restore_sink(origin.sink);
        if let (Ok(()), Some(covered), Some(map)) = (&result, origin.covers, &self.image.map) {
            map.durable.ended(covered);
        }
        request.complete(result);
    }
}
