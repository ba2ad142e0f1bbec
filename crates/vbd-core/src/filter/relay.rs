//! Sees the outcome of requests that a filter passes on.

use std::cell::RefCell;
use std::rc::Rc;

use crate::{Channel, Request, Result, Sink};

/// What a filter does with a request that has come back.
pub trait Outcome {
    /// Called with the request as the front-end had made it: complete it, or keep it.
    fn returned(self: Rc<Self>, request: Request, result: Result<()>);
}

/// The sink and token that a request came with.
type Origin = (Rc<dyn Sink>, u64);

/// Passes requests on with itself as their sink, and gives them their own back before the filter sees them.
pub struct Relay<T> {
    inner: Rc<dyn Channel>,
    filter: RefCell<Option<Rc<T>>>,
    /// Sink and token of each request that is out.
    out: RefCell<Vec<Option<Origin>>>,
    free: RefCell<Vec<usize>>,
}

impl<T: Outcome + 'static> Relay<T> {
    /// A relay before `inner`.
    pub fn new(inner: Rc<dyn Channel>) -> Rc<Self> {
        Rc::new(Relay {
            inner,
            filter: RefCell::new(None),
            out: RefCell::default(),
            free: RefCell::default(),
        })
    }

    /// Passes a request on; its outcome goes to `filter`, which lives at least until then.
    pub fn pass(self: &Rc<Self>, filter: Rc<T>, mut request: Request) {
        *self.filter.borrow_mut() = Some(filter);
        let slot = self.free.borrow_mut().pop().unwrap_or_else(|| {
            self.out.borrow_mut().push(None);
            self.out.borrow().len() - 1
        });
        let token = request.token;
        if let Some(sink) = request.replace_sink(self.clone()) {
            self.out.borrow_mut()[slot] = Some((sink, token));
        }
        request.token = slot as u64;
        self.inner.clone().submit(request);
    }

    /// The channel that requests are passed on to.
    pub fn inner(&self) -> &Rc<dyn Channel> {
        &self.inner
    }
}

impl<T: Outcome + 'static> Sink for Relay<T> {
    fn complete(self: Rc<Self>, mut request: Request, result: Result<()>) {
        let slot = usize::try_from(request.token).unwrap_or(usize::MAX);
        let entry = self.out.borrow_mut().get_mut(slot).and_then(Option::take);
        let Some((sink, token)) = entry else { return };
        self.free.borrow_mut().push(slot);
        request.restore_sink(Some(sink));
        request.token = token;
        let filter = self.filter.borrow().clone();
        // The last one out lets go, so that filter and relay do not keep each other alive.
        if self.out.borrow().len() == self.free.borrow().len() {
            self.filter.borrow_mut().take();
        }
        match filter {
            Some(filter) => filter.returned(request, result),
            None => request.complete(result),
        }
    }
}
