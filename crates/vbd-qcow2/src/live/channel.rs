//! The fast path: a request that maps to one run of a file is passed on as it is, without an allocation or a lock.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use vbd_core::memory::zero;
use vbd_core::{Channel, Error, ErrorKind, Guard, Operation, Request, Result, Sink};
use vbd_ring::Local;

use super::behind::Missing;
use super::compressed::Last;
use super::grace::{Entered, Member, Operations, Token};
use super::image::Image;
use super::io::{Io, bytes};
use super::map::{L1, Span, Table, span};

/// The most tables that a channel remembers.
const REMEMBERED: usize = 1024;

/// A queue's way to an image.
pub(super) struct Qcow2Channel {
    pub(super) image: Arc<Image>,
    pub(super) io: Io,
    backing: RefCell<Option<Rc<dyn Channel>>>,
    pub(super) l1: RefCell<Arc<L1>>,
    /// Tables by the low bits of their index.
    tables: RefCell<Box<[Option<Arc<Table>>]>>,
    slots: RefCell<Slots>,
    operations: Operations,
    parked: RefCell<VecDeque<Request>>,
    is_parked: Cell<bool>,
    /// It gets its way to the image behind when it is resumed.
    is_without_below: Cell<bool>,
    /// Work of the image's own that waits until it is resumed.
    waiting: RefCell<Vec<Waker>>,
    /// The number that others know it by.
    id: Cell<u64>,
    /// The compressed cluster that was read last.
    pub(super) last: RefCell<Option<Last>>,
    /// Counts the times that it was forgotten.
    pub(super) age: Cell<u64>,
    /// Keeps the image open.
    _owner: Guard,
}

/// Requests that were passed on, each with what it came with.
#[derive(Default)]
struct Slots {
    all: Vec<Option<Origin>>,
    free: Vec<usize>,
}

struct Origin {
    sink: Option<Rc<dyn Sink>>,
    token: u64,
    offset: u64,
    generation: u64,
}

/// An operation on the slow path: counted until it is dropped.
pub(super) struct Busy {
    channel: Rc<Qcow2Channel>,
    generation: u64,
}

impl std::ops::Deref for Busy {
    type Target = Rc<Qcow2Channel>;

    fn deref(&self) -> &Rc<Qcow2Channel> {
        &self.channel
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.channel.operations.end(self.generation);
    }
}

impl Qcow2Channel {
    /// A channel of an image, which `owner` keeps open.
    pub(super) fn new(image: Arc<Image>, owner: Guard, local: &Local) -> Result<Rc<Self>> {
        let io = Io::new(&image.files(), local, owner.clone())?;
        let l1 = image.l1();
        // Never more than the bound of the image lets live.
        let remembered = l1.len().min(image.tables.bound()).clamp(1, REMEMBERED);
        let remembered = (remembered + 1).next_power_of_two() / 2;
        let channel = Rc::new(Qcow2Channel {
            io,
            backing: RefCell::default(),
            l1: RefCell::new(l1),
            tables: RefCell::new((0..remembered).map(|_| None).collect()),
            slots: RefCell::default(),
            operations: Operations::default(),
            parked: RefCell::default(),
            is_parked: Cell::new(false),
            is_without_below: Cell::new(false),
            waiting: RefCell::default(),
            id: Cell::new(0),
            last: RefCell::new(None),
            age: Cell::new(0),
            image,
            _owner: owner,
        });
        let member: Rc<dyn Member> = channel.clone();
        let Entered { id, parked, without_below } = channel.image.members.enter(&member, local);
        channel.id.set(id);
        channel.is_parked.set(parked);
        // Whoever puts another image behind waits for a message that this thread handles afterwards.
        if without_below {
            channel.leave_below();
        } else {
            *channel.backing.borrow_mut() = channel.image.below.channel(local)?;
        }
        Ok(channel)
    }

    /// The way to the image behind.
    #[inline]
    pub(super) fn below(&self) -> Option<Rc<dyn Channel>> {
        self.backing.borrow().clone()
    }

    /// Begins work of the image's own, once nobody is alone with it. It is waited for as a request is.
    pub(super) async fn begin(self: Rc<Self>) -> Busy {
        poll_fn(|context| {
            if !self.is_parked.get() {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await;
        let generation = self.operations.begin();
        Busy { channel: self, generation }
    }

    /// Refuses what no disk could do.
    fn check(&self, request: &Request) -> Result<()> {
        if request.operation == Operation::Flush {
            return Ok(());
        }
        if request.operation.is_write() && self.image.read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "the disk is read-only"));
        }
        let size = self.image.size();
        if request.offset.checked_add(request.len).is_none_or(|end| end > size) {
            return Err(Error::new(ErrorKind::OutOfRange, format!("the disk ends at {size}")));
        }
        let transfers = matches!(request.operation, Operation::Read | Operation::Write);
        if transfers && request.memory.iter().map(|piece| piece.iov_len as u64).sum::<u64>() != request.len {
            return Err(Error::new(ErrorKind::OutOfRange, "the memory given is not as long as the range"));
        }
        Ok(())
    }

    /// What a range is mapped to, where that can be told at once and for all of it.
    #[inline]
    fn whole_span(&self, request: &Request) -> Option<Span> {
        let layout = &self.image.layout;
        let index = request.offset >> layout.l2_span_bits();
        if request.len == 0 || (request.offset + request.len - 1) >> layout.l2_span_bits() != index {
            return None;
        }
        let mut tables = self.tables.borrow_mut();
        let slot = bytes(index & (tables.len() as u64 - 1));
        let table = match &mut tables[slot] {
            Some(table) if table.index == index => table,
            remembered => {
                if self.l1.borrow().get(index).offset() == 0 {
                    return Some(Span::Below);
                }
                remembered.insert(self.image.tables.get(index)?)
            }
        };
        if table.suspect {
            return None;
        }
        let (span, len) = span(layout, table, request.offset, request.len);
        (len == request.len).then_some(span)
    }

    /// The table that maps an offset, where this channel remembers it: others are asked for nothing then.
    fn remembered(&self, offset: u64) -> Option<Arc<Table>> {
        let index = offset >> self.image.layout.l2_span_bits();
        let tables = self.tables.borrow();
        let table = tables[bytes(index & (tables.len() as u64 - 1))].as_ref()?;
        (table.index == index).then(|| table.clone())
    }

    /// What a range of at most `most` bytes is mapped to, and for how many bytes.
    pub(super) async fn span(&self, l1: &L1, offset: u64, most: u64) -> Result<(Span, u64)> {
        match self.remembered(offset) {
            Some(table) if !table.suspect => Ok(span(&self.image.layout, &table, offset, most)),
            _ => self.image.span(&self.io, l1, offset, most).await,
        }
    }

    /// The table that maps an offset, made or moved so that it may be changed.
    pub(super) async fn own_table(&self, l1: &L1, offset: u64) -> Result<Arc<Table>> {
        let index = offset >> self.image.layout.l2_span_bits();
        match self.remembered(offset) {
            Some(table) if l1.get(index).copied() && self.image.log_started.load(Ordering::Acquire) => {
                Ok(table)
            }
            _ => self.image.own_table(&self.io, l1, offset).await,
        }
    }

    /// Passes a request on to `target`, where its range begins at `offset`.
    fn pass(self: Rc<Self>, target: &Rc<dyn Channel>, mut request: Request, offset: u64) {
        let generation = self.operations.begin();
        let target = target.clone();
        let origin = Origin { sink: None, token: request.token, offset: request.offset, generation };
        let mut slots = self.slots.borrow_mut();
        let slot = slots.free.pop().unwrap_or_else(|| {
            slots.all.push(None);
            slots.all.len() - 1
        });
        let sink = request.replace_sink(self.clone());
        slots.all[slot] = Some(Origin { sink, ..origin });
        drop(slots);
        request.token = slot as u64;
        request.offset = offset;
        target.submit(request);
    }

    fn submit_checked(self: Rc<Self>, request: Request) {
        match request.operation {
            Operation::Read => match self.whole_span(&request) {
                Some(Span::Data { host, .. }) if self.is_in_file(host, request.len) => {
                    let data = self.io.data.clone();
                    self.pass(&data, request, host);
                }
                Some(Span::Below) => self.read_below(request),
                Some(Span::Zero { .. }) => self.read_zeroes(request),
                _ => self.read_slowly(request),
            },
            Operation::Write => {
                let durable = request.flags.fua && !self.image.progress.is_clean();
                match self.whole_span(&request) {
                    Some(Span::Data { host, owned: true })
                        if !durable && self.is_in_file(host, request.len) =>
                    {
                        let data = self.io.data.clone();
                        self.pass(&data, request, host);
                    }
                    _ => self.write_slowly(request),
                }
            }
            Operation::Flush => self.flush(request),
            Operation::Discard => self.discard(request),
            Operation::WriteZeroes => self.write_zeroes(request),
            Operation::Extents => self.extents(request),
        }
    }

    /// Whether a range of guest clusters is inside the file; one that was cut off ends within its last cluster.
    #[inline]
    pub(super) fn is_in_file(&self, host: u64, len: u64) -> bool {
        self.image.data_file.is_some() || host + len <= self.image.backend.size()
    }

    fn read_below(self: Rc<Self>, request: Request) {
        match self.below() {
            Some(backing) if request.offset + request.len <= self.image.backing_size() => {
                let offset = request.offset;
                self.pass(&backing, request, offset);
            }
            Some(_) if request.offset < self.image.backing_size() => self.read_slowly(request),
            _ => self.read_zeroes(request),
        }
    }

    fn read_zeroes(&self, mut request: Request) {
        request.issued_at = Some(self.io.local.now());
        // SAFETY: the request's guard keeps its memory valid.
        unsafe { zero(&request.memory, 0, bytes(request.len)) };
        request.complete(Ok(()));
    }

    fn flush(self: Rc<Self>, request: Request) {
        if self.image.read_only || (self.image.progress.is_clean() && self.image.data_file.is_none()) {
            if let Err(error) = self.image.progress.check() {
                return request.fail(error.of(&self.image.label));
            }
            let file = self.io.file.clone();
            let offset = request.offset;
            return self.pass(&file, request, offset);
        }
        self.work(request, async |this, _| this.image.commit(&this.io).await);
    }

    /// Runs an operation as a task.
    pub(super) fn work<F>(self: Rc<Self>, request: Request, work: F)
    where
        F: AsyncFnOnce(&Busy, &mut Request) -> Result<()> + 'static,
    {
        let generation = self.operations.begin();
        let local = self.io.local.clone();
        let busy = Busy { channel: self, generation };
        let mut pending = vbd_core::ask::Pending::new(request);
        local.spawn(async move {
            pending.request().issued_at = Some(busy.io.local.now());
            let result = work(&busy, pending.request()).await;
            let result = result.map_err(|error| error.of(&busy.image.label));
            // Counted out first: whoever gets the answer may close the disk.
            drop(busy);
            pending.complete(result);
        });
    }

    /// Makes what a request has changed durable, where it asks for that.
    pub(super) async fn made_durable(&self, request: &Request) -> Result<()> {
        let always = self.image.cache == vbd_core::file::Cache::Writethrough;
        if request.flags.fua || always || self.image.log.state().broken {
            self.image.commit(&self.io).await
        } else {
            Ok(())
        }
    }

    /// The active L1 table as this channel knows it.
    pub(super) fn l1(&self) -> Arc<L1> {
        self.l1.borrow().clone()
    }
}

impl Channel for Qcow2Channel {
    fn submit(self: Rc<Self>, request: Request) {
        if self.is_parked.get() {
            return self.parked.borrow_mut().push_back(request);
        }
        match self.check(&request) {
            Ok(()) => self.submit_checked(request),
            Err(error) => request.fail(error.of(&self.image.label)),
        }
    }

    fn cancel_waiting(&self) {
        let parked = std::mem::take(&mut *self.parked.borrow_mut());
        for request in parked {
            request.fail(Error::new(ErrorKind::Cancelled, "given up while it waited"));
        }
        if let Some(backing) = self.below() {
            backing.cancel_waiting();
        }
        if self.io.apart {
            self.io.data.cancel_waiting();
        }
    }
}

impl Sink for Qcow2Channel {
    fn complete(self: Rc<Self>, mut request: Request, result: Result<()>) {
        let slot = bytes(request.token);
        let origin = {
            let mut slots = self.slots.borrow_mut();
            slots.free.push(slot);
            slots.all.get_mut(slot).and_then(Option::take)
        };
        let Some(origin) = origin else { return };
        request.restore_sink(origin.sink);
        request.token = origin.token;
        request.offset = origin.offset;
        self.operations.end(origin.generation);
        request.complete(result);
    }
}

impl Member for Qcow2Channel {
    fn hold(&self, token: Token, park: bool) {
        if park {
            self.is_parked.set(true);
        }
        // Its clusters may be used for something else before the next message.
        self.last.borrow_mut().take();
        self.age.set(self.age.get() + 1);
        self.operations.hold(token);
    }

    fn leave_below(&self) {
        self.is_without_below.set(true);
        // Nobody reads from there now, and whoever does all the same must not take it for nothing.
        let before = self.backing.replace(Some(Rc::new(Missing)));
        drop(before);
    }

    fn resume(self: Rc<Self>) {
        if self.is_without_below.take() {
            let below = self.image.below.channel(&self.io.local).unwrap_or_else(|error| {
                tracing::error!("{}: the image behind cannot be read: {error}", self.image.label);
                Some(Rc::new(Missing))
            });
            *self.backing.borrow_mut() = below;
        }
        self.is_parked.set(false);
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        waiting.into_iter().for_each(Waker::wake);
        *self.l1.borrow_mut() = self.image.l1();
        self.tables.borrow_mut().iter_mut().for_each(|table| *table = None);
        let parked = std::mem::take(&mut *self.parked.borrow_mut());
        for request in parked {
            self.clone().submit(request);
        }
    }
}

impl Drop for Qcow2Channel {
    fn drop(&mut self) {
        self.image.members.leave(self.id.get());
        for request in self.parked.borrow_mut().drain(..) {
            request.fail(Error::new(ErrorKind::Cancelled, "its queue was closed while it waited"));
        }
    }
}
