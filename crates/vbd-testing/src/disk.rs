//! A disk in memory whose behaviour tests choose.
#![allow(clippy::cast_possible_truncation, reason = "sizes of tests are small")]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vbd_core::{
    Capabilities, Channel, Disk, Error, ErrorKind, Event, Geometry, Operation, Request, Result, Session,
    Statistics, Watchers,
};
use vbd_ring::{Completion, Local};

/// What a disk was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// What for.
    pub operation: Operation,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// It is to be durable when it completes.
    pub fua: bool,
    /// Zeroes may give space back.
    pub may_unmap: bool,
}

/// What a disk does, what it holds, and what it was asked.
pub struct Behaviour {
    /// Its bytes.
    pub data: Mutex<Vec<u8>>,
    /// All that it was asked, in order.
    pub asked: Mutex<Vec<Asked>>,
    /// Requests wait, as for a policy, until this is false.
    pub hold: AtomicBool,
    /// They wait in the storage, where they cannot be cancelled.
    pub stuck: AtomicBool,
    /// Requests at odd sectors wait.
    pub hold_odd: AtomicBool,
    /// Requests fail like this.
    pub fail: Mutex<Option<ErrorKind>>,
    /// The lease is held by somebody else.
    pub busy: AtomicBool,
    /// Sessions that there are.
    pub sessions: AtomicUsize,
    /// Sessions that there were.
    pub opened: AtomicUsize,
    /// It says that it can only be read.
    pub read_only: AtomicBool,
    /// It says that writes need a flush.
    pub write_cache: AtomicBool,
    statistics: Statistics,
    watchers: Watchers,
}

/// A disk in memory.
pub struct MemDisk(pub Arc<Behaviour>);

impl MemDisk {
    /// So many bytes of zeroes.
    pub fn new(size: usize) -> Self {
        MemDisk(Arc::new(Behaviour {
            data: Mutex::new(vec![0; size]),
            asked: Mutex::default(),
            hold: AtomicBool::new(false),
            stuck: AtomicBool::new(false),
            hold_odd: AtomicBool::new(false),
            fail: Mutex::default(),
            busy: AtomicBool::new(false),
            sessions: AtomicUsize::new(0),
            opened: AtomicUsize::new(0),
            read_only: AtomicBool::new(false),
            write_cache: AtomicBool::new(true),
            statistics: Statistics::default(),
            watchers: Watchers::default(),
        }))
    }
}

impl Behaviour {
    fn geometry(&self) -> Geometry {
        Geometry {
            size: self.data.lock().unwrap().len() as u64,
            block_size: 512,
            physical_block_size: 4096,
            optimal_size: 65536,
            discard_granularity: 4096,
            max_discard: 1 << 20,
            max_zeroes: 1 << 20,
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read_only: self.read_only.load(Ordering::SeqCst),
            write_cache: self.write_cache.load(Ordering::SeqCst),
            discard: true,
            fast_zeroes: true,
            grow: true,
        }
    }

    /// Makes it longer and tells those who watch.
    ///
    /// # Panics
    /// Another thread has panicked with it.
    pub fn grow(&self, size: usize) {
        self.data.lock().unwrap().resize(size, 0);
        self.watchers.tell(Event::Resized(size as u64));
    }

    /// What was asked, without flushes.
    ///
    /// # Panics
    /// Another thread has panicked with it.
    pub fn transfers(&self) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap();
        asked.iter().copied().filter(|asked| asked.operation != Operation::Flush).collect()
    }

    fn carry_out(&self, request: &Request) -> Result<()> {
        if let Some(kind) = *self.fail.lock().unwrap() {
            return Err(Error::new(kind, "as the test wants it"));
        }
        let mut data = self.data.lock().unwrap();
        if request.operation == Operation::Flush {
            return Ok(());
        }
        let end = request.offset.checked_add(request.len).filter(|end| *end <= data.len() as u64);
        let end = end.ok_or_else(|| Error::new(ErrorKind::OutOfRange, "beyond the end"))? as usize;
        let mut at = request.offset as usize;
        let range = at..end;
        for piece in &request.memory {
            let (memory, len) = (piece.iov_base.cast::<u8>(), piece.iov_len);
            // SAFETY: the request's guard keeps its memory.
            unsafe {
                match request.operation {
                    Operation::Read => std::ptr::copy(data[at..at + len].as_ptr(), memory, len),
                    _ => std::ptr::copy(memory, data[at..at + len].as_mut_ptr(), len),
                }
            }
            at += len;
        }
        if matches!(request.operation, Operation::Discard | Operation::WriteZeroes) {
            data[range].fill(0);
        }
        Ok(())
    }
}

impl Disk for MemDisk {
    fn name(&self) -> &str {
        "memory"
    }

    fn open(&self) -> Result<Arc<dyn Session>> {
        if self.0.busy.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Busy, "held by somebody else"));
        }
        self.0.sessions.fetch_add(1, Ordering::SeqCst);
        self.0.opened.fetch_add(1, Ordering::SeqCst);
        Ok(Arc::new(MemSession(self.0.clone())))
    }

    fn inspect(&self) -> Result<(Geometry, Capabilities)> {
        Ok((self.0.geometry(), self.0.capabilities()))
    }

    fn statistics(&self) -> &Statistics {
        &self.0.statistics
    }

    fn watch(&self, watcher: Box<dyn Fn(Event) + Send + Sync>) -> Arc<dyn Send + Sync> {
        self.0.watchers.add(watcher)
    }
}

struct MemSession(Arc<Behaviour>);

impl Drop for MemSession {
    fn drop(&mut self) {
        self.0.sessions.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Session for MemSession {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn channel(self: Arc<Self>, local: &Local) -> Result<Rc<dyn Channel>> {
        Ok(Rc::new(MemChannel { session: self, local: local.clone(), held: RefCell::default() }))
    }

    fn grow(&self, size: u64) -> Result<()> {
        self.0.grow(size as usize);
        Ok(())
    }
}

struct MemChannel {
    session: Arc<MemSession>,
    local: Local,
    held: RefCell<VecDeque<Request>>,
}

impl Channel for MemChannel {
    fn submit(self: Rc<Self>, mut request: Request) {
        let disk = self.session.0.clone();
        let Request { operation, offset, len, flags, .. } = request;
        disk.asked.lock().unwrap().push(Asked {
            operation,
            offset,
            len,
            fua: flags.fua,
            may_unmap: flags.may_unmap,
        });
        let odd = disk.hold_odd.load(Ordering::SeqCst) && offset / 512 % 2 == 1;
        if odd || disk.hold.load(Ordering::SeqCst) {
            self.held.borrow_mut().push_back(request);
            self.look_again();
            return;
        }
        request.issued_at = Some(self.local.now());
        let result = disk.carry_out(&request);
        request.complete(result);
    }

    fn cancel_waiting(&self) {
        if self.session.0.stuck.load(Ordering::SeqCst) {
            return;
        }
        let held = std::mem::take(&mut *self.held.borrow_mut());
        held.into_iter().for_each(|request| request.fail(Error::new(ErrorKind::Cancelled, "given up")));
    }
}

impl MemChannel {
    fn look_again(self: &Rc<Self>) {
        // What is in the storage keeps its channel.
        let stuck = self.session.0.stuck.load(Ordering::SeqCst).then(|| self.clone());
        let timer = Rc::new(Timer(Rc::downgrade(self), stuck));
        self.local.timer(Instant::now() + Duration::from_millis(1), timer, 0);
    }

    fn look(self: Rc<Self>) {
        let disk = &self.session.0;
        if disk.hold.load(Ordering::SeqCst) || disk.hold_odd.load(Ordering::SeqCst) {
            if !self.held.borrow().is_empty() {
                self.look_again();
            }
            return;
        }
        let held = std::mem::take(&mut *self.held.borrow_mut());
        for request in held {
            let result = self.session.0.carry_out(&request);
            request.complete(result);
        }
    }
}

/// Looks again, as long as there is a channel.
struct Timer(Weak<MemChannel>, Option<Rc<MemChannel>>);

impl Completion for Timer {
    fn complete(self: Rc<Self>, _token: u64, _result: i32) {
        if let Some(channel) = self.1.clone().or_else(|| self.0.upgrade()) {
            channel.look();
        }
    }
}
