//! One queue: as many requests in flight as it has slots, each sent again when it comes back.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use vbd_core::memory::Buffer;
use vbd_core::{Channel, Operation, Request, Result, Sink};
use vbd_ring::Local;

/// What a queue asks for.
pub(crate) struct Plan {
    pub(crate) operation: Operation,
    /// Bytes of a request.
    pub(crate) block: u32,
    /// The disk's size in requests.
    pub(crate) blocks: u64,
    pub(crate) depth: u32,
    pub(crate) requests: u64,
    pub(crate) seed: u64,
}

/// The queue. It ends when all of its requests have come back.
pub(crate) struct Queue {
    channel: RefCell<Option<Rc<dyn Channel>>>,
    local: Local,
    operation: Operation,
    block: u64,
    blocks: u64,
    /// Requests that are to be sent, and those that have not come back.
    left: Cell<u64>,
    out: Cell<u64>,
    random: Cell<u64>,
    ready: RefCell<Vec<Request>>,
    sending: Cell<bool>,
    failure: RefCell<Option<String>>,
    done: Sender<std::result::Result<(), String>>,
}

impl Queue {
    /// Sends the first requests.
    pub(crate) fn start(
        channel: Rc<dyn Channel>,
        local: &Local,
        plan: &Plan,
        done: Sender<std::result::Result<(), String>>,
    ) {
        let queue = Rc::new(Queue {
            channel: RefCell::new(Some(channel)),
            local: local.clone(),
            operation: plan.operation,
            block: u64::from(plan.block),
            blocks: plan.blocks,
            left: Cell::new(plan.requests),
            out: Cell::new(0),
            random: Cell::new(plan.seed),
            ready: RefCell::default(),
            sending: Cell::new(false),
            failure: RefCell::default(),
            done,
        });
        if plan.requests == 0 {
            return queue.end();
        }
        for _ in 0..u64::from(plan.depth).min(plan.requests) {
            let buffer = Arc::new(Buffer::new(plan.block as usize));
            let mut request = queue.next(vec![buffer.whole()]);
            request.guard = Some(buffer);
            queue.ready.borrow_mut().push(request);
        }
        queue.send();
    }

    /// The next request, at a random place.
    fn next(self: &Rc<Self>, memory: Vec<vbd_core::IoVec>) -> Request {
        let mut random = self.random.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.random.set(random);
        random = (random ^ (random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        random = (random ^ (random >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let offset = (random ^ (random >> 31)) % self.blocks * self.block;
        let mut request = Request::new(self.operation, offset, self.block, self.local.now(), self.clone());
        request.memory = memory;
        self.left.set(self.left.get() - 1);
        self.out.set(self.out.get() + 1);
        request
    }

    /// Sends what is ready. What comes back within is sent by the loop, not by a call within the call.
    fn send(&self) {
        if self.sending.replace(true) {
            return;
        }
        loop {
            let request = self.ready.borrow_mut().pop();
            let Some(request) = request else { break };
            let channel = self.channel.borrow().clone();
            if let Some(channel) = channel {
                channel.submit(request);
            }
        }
        self.sending.set(false);
        if self.out.get() == 0 {
            self.end();
        }
    }

    fn end(&self) {
        // The session goes with its last channel.
        self.channel.borrow_mut().take();
        let failure = self.failure.borrow_mut().take();
        let _ = self.done.send(failure.map_or(Ok(()), Err));
    }
}

impl Sink for Queue {
    fn complete(self: Rc<Self>, mut request: Request, result: Result<()>) {
        self.out.set(self.out.get() - 1);
        if let Err(error) = result {
            self.failure.borrow_mut().get_or_insert(error.to_string());
            self.left.set(0);
        }
        if self.left.get() > 0 {
            let mut next = self.next(std::mem::take(&mut request.memory));
            next.guard = request.guard.take();
            self.ready.borrow_mut().push(next);
        }
        self.send();
    }
}
