//! Memory of requests in flight: page-aligned buffers from a pool of each reactor, bounded for each client and in all.
//!
//! Every client may have [`RESERVE`] bytes whatever the others hold, so that it always moves on. What it has beyond
//! that counts against the server's total. A client for whom there is none stops reading its socket, which in time
//! stops the sender.

use std::alloc::Layout;
use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vbd_core::IoVec;

use crate::control::Control;

/// The longest buffer, in bytes. Longer requests are served in pieces.
pub(crate) const PIECE: usize = 1 << 20;
/// What every client may have at once, in bytes.
pub(crate) const RESERVE: usize = PIECE;
const PAGE: usize = 4096;
/// Sizes of buffers: powers of two from a page to a piece.
const CLASSES: usize = (PIECE / PAGE).ilog2() as usize + 1;
/// Bytes that a reactor keeps for reuse.
const KEPT: usize = 32 << 20;

/// What all clients of a server may have beyond their reserve.
pub(crate) struct Total {
    most: usize,
    used: AtomicUsize,
    /// Somebody waits: looked at on every release, so that the lock is taken only then.
    some: AtomicBool,
    waiting: Mutex<Vec<Arc<Control>>>,
}

impl Total {
    pub(crate) fn new(most: usize) -> Arc<Self> {
        Arc::new(Total {
            most,
            used: AtomicUsize::new(0),
            some: AtomicBool::new(false),
            waiting: Mutex::default(),
        })
    }

    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize) -> bool {
        let fits = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= self.most);
        self.used.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fits).is_ok()
    }

    fn give(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::SeqCst);
        if self.some.load(Ordering::SeqCst) && self.some.swap(false, Ordering::SeqCst) {
            let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
            waiting.iter().for_each(|control| control.wake());
        }
    }

    /// Wakes `control` when something was given back. What was given back just before this is seen by trying again.
    fn wait(&self, control: &Arc<Control>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiting.iter().any(|other| Arc::ptr_eq(other, control)) {
            waiting.push(control.clone());
        }
        self.some.store(true, Ordering::SeqCst);
    }
}

/// The buffers of one reactor that are free.
#[derive(Default)]
pub(crate) struct Pool {
    free: RefCell<[Vec<NonNull<u8>>; CLASSES]>,
    kept: Cell<usize>,
}

fn class_of(len: usize) -> usize {
    (len.next_power_of_two().max(PAGE) / PAGE).ilog2() as usize
}

/// Bytes that a buffer for `len` bytes takes.
fn size_of(class: usize) -> usize {
    PAGE << class
}

fn layout(class: usize) -> Layout {
    Layout::from_size_align(size_of(class), PAGE).expect("a power of two")
}

impl Pool {
    fn take(&self, class: usize) -> NonNull<u8> {
        if let Some(start) = self.free.borrow_mut()[class].pop() {
            self.kept.set(self.kept.get() - size_of(class));
            return start;
        }
        // Zeroed, so that its bytes may be looked at. A new mapping is zeroes anyway.
        // SAFETY: the layout has a size.
        let start = unsafe { std::alloc::alloc_zeroed(layout(class)) };
        NonNull::new(start).unwrap_or_else(|| std::alloc::handle_alloc_error(layout(class)))
    }

    fn put(&self, start: NonNull<u8>, class: usize) {
        if self.kept.get() + size_of(class) <= KEPT {
            self.kept.set(self.kept.get() + size_of(class));
            self.free.borrow_mut()[class].push(start);
        } else {
            // SAFETY: it was allocated with this layout and is nobody's any more.
            unsafe { std::alloc::dealloc(start.as_ptr(), layout(class)) };
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (class, free) in self.free.get_mut().iter_mut().enumerate() {
            for start in free.drain(..) {
                // SAFETY: as in `put`.
                unsafe { std::alloc::dealloc(start.as_ptr(), layout(class)) };
            }
        }
    }
}

/// What one client has, and may have.
pub(crate) struct Account {
    pool: Rc<Pool>,
    total: Arc<Total>,
    most: usize,
    used: Cell<usize>,
    control: Arc<Control>,
}

impl Account {
    pub(crate) fn new(pool: Rc<Pool>, total: Arc<Total>, most: usize, control: Arc<Control>) -> Rc<Self> {
        Rc::new(Account { pool, total, most: most.max(RESERVE), used: Cell::new(0), control })
    }

    /// A buffer for `len` bytes, at most a [`PIECE`]; none while there is no room for it. Then the client's own
    /// buffers, when they are given back, or its control tell when to ask again.
    pub(crate) fn buffer(self: &Rc<Self>, len: usize) -> Option<Buffer> {
        self.reserve(size_of(class_of(len))).then(|| self.reserved(len))
    }

    /// Buffers for all of `lens`, or none.
    pub(crate) fn buffers(self: &Rc<Self>, lens: impl Iterator<Item = usize> + Clone) -> Option<Vec<Buffer>> {
        let bytes = lens.clone().map(|len| size_of(class_of(len))).sum();
        self.reserve(bytes).then(|| lens.map(|len| self.reserved(len)).collect())
    }

    /// Whether the client has nothing at the moment.
    pub(crate) fn is_empty(&self) -> bool {
        self.used.get() == 0
    }

    fn reserve(&self, bytes: usize) -> bool {
        let (before, after) = (self.used.get(), self.used.get() + bytes);
        // Alone, a request is never too long for its client: the limit is on what piles up.
        if after > self.most && before > 0 {
            return false;
        }
        let beyond = beyond(after) - beyond(before);
        if beyond > 0 && !self.total.take(beyond) {
            self.total.wait(&self.control);
            if !self.total.take(beyond) {
                return false;
            }
        }
        self.used.set(after);
        true
    }

    fn reserved(self: &Rc<Self>, len: usize) -> Buffer {
        let class = class_of(len);
        Buffer { start: self.pool.take(class), class, account: self.clone() }
    }

    fn give(&self, bytes: usize) {
        let (before, after) = (self.used.get(), self.used.get() - bytes);
        self.used.set(after);
        let beyond = beyond(before) - beyond(after);
        if beyond > 0 {
            self.total.give(beyond);
        }
    }
}

fn beyond(used: usize) -> usize {
    used.saturating_sub(RESERVE)
}

/// Page-aligned memory. The kernel may be at it as long as it lives.
pub(crate) struct Buffer {
    start: NonNull<u8>,
    class: usize,
    account: Rc<Account>,
}

impl Buffer {
    pub(crate) fn len(&self) -> usize {
        size_of(self.class)
    }

    /// A part, for a request.
    pub(crate) fn piece(&self, start: usize, len: usize) -> IoVec {
        assert!(start <= self.len() && len <= self.len() - start);
        // SAFETY: within the buffer.
        IoVec { iov_base: unsafe { self.start.as_ptr().add(start) }.cast(), iov_len: len }
    }

    /// The bytes. Not to be called while a request works on them.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: allocated with this length, zeroed at first, and not written to meanwhile.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len()) }
    }

    /// The bytes. Not to be called while a request works on them.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.account.give(self.len());
        self.account.pool.put(self.start, self.class);
    }
}

/// What the connections of one reactor share.
pub(crate) struct Thread {
    pub(crate) pool: Rc<Pool>,
    /// Where sockets are read to.
    pub(crate) scratch: RefCell<Box<[u8]>>,
}

/// Bytes that are read from a socket at once.
pub(crate) const SCRATCH: usize = 256 << 10;

impl Thread {
    /// This thread's, which lives as long as somebody uses it.
    pub(crate) fn current() -> Rc<Thread> {
        thread_local!(static CURRENT: RefCell<std::rc::Weak<Thread>> = RefCell::default());
        CURRENT.with_borrow_mut(|current| {
            current.upgrade().unwrap_or_else(|| {
                let scratch = RefCell::new(vec![0; SCRATCH].into());
                let thread = Rc::new(Thread { pool: Rc::default(), scratch });
                *current = Rc::downgrade(&thread);
                thread
            })
        })
    }
}
