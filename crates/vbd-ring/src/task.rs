//! Tasks of one reactor: slow paths written as `async`, polled on the reactor's own thread.

use crate::sync::thread::{ThreadId, current};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use crate::reactor::Shared;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::{Completion, Local, OpId};

type Task = Pin<Box<dyn Future<Output = ()>>>;

pub(crate) struct Tasks {
    all: RefCell<HashMap<u64, Task>>,
    next: Cell<u64>,
    woken: Arc<Woken>,
}

/// The tasks to poll. Wakers may come from any thread.
struct Woken {
    ids: Mutex<Vec<u64>>,
    some: AtomicBool,
    shared: Arc<Shared>,
    /// The reactor's own thread, which looks before it sleeps and needs no system call to wake it.
    thread: ThreadId,
}

struct TaskWaker {
    id: u64,
    woken: Arc<Woken>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.woken.ids.lock().unwrap_or_else(PoisonError::into_inner).push(self.id);
        self.woken.some.store(true, Ordering::SeqCst);
        if current().id() != self.woken.thread {
            self.woken.shared.wake();
        }
    }
}

impl Tasks {
    /// The tasks of the reactor of this thread.
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let (ids, some) = (Mutex::default(), AtomicBool::new(false));
        let woken = Arc::new(Woken { ids, some, shared, thread: current().id() });
        Tasks { all: RefCell::default(), next: Cell::new(0), woken }
    }

    pub(crate) fn spawn(&self, task: Task) {
        let id = self.next.get();
        self.next.set(id + 1);
        self.all.borrow_mut().insert(id, task);
        Arc::new(TaskWaker { id, woken: self.woken.clone() }).wake();
    }

    /// Polls what was woken; true if there was something.
    pub(crate) fn run(&self) -> bool {
        if !self.woken.some.load(Ordering::Relaxed) || !self.woken.some.swap(false, Ordering::SeqCst) {
            return false;
        }
        let ids = std::mem::take(&mut *self.woken.ids.lock().unwrap_or_else(PoisonError::into_inner));
        for &id in &ids {
            // Taken out while it runs, so that it may spawn others.
            let Some(mut task) = self.all.borrow_mut().remove(&id) else { continue };
            let waker = Waker::from(Arc::new(TaskWaker { id, woken: self.woken.clone() }));
            if task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
                self.all.borrow_mut().insert(id, task);
            }
        }
        !ids.is_empty()
    }

    /// Whether a task waits to be polled.
    pub(crate) fn are_woken(&self) -> bool {
        self.woken.some.load(Ordering::SeqCst)
    }

    /// Drops every task. What they had in the kernel stays owned until its completion.
    pub(crate) fn clear(&self) {
        let tasks = std::mem::take(&mut *self.all.borrow_mut());
        drop(tasks);
    }
}

/// The state that an awaited operation shares with its future.
pub(crate) struct Awaited {
    result: Cell<Option<i32>>,
    waker: RefCell<Option<Waker>>,
    /// What the operation's pointers point into.
    keep: RefCell<Option<Box<dyn Any>>>,
}

impl Awaited {
    pub(crate) fn new(keep: Box<dyn Any>) -> Rc<Self> {
        Rc::new(Awaited {
            result: Cell::new(None),
            waker: RefCell::new(None),
            keep: RefCell::new(Some(keep)),
        })
    }
}

impl Completion for Awaited {
    fn complete(self: Rc<Self>, _token: u64, result: i32) {
        self.result.set(Some(result));
        let waker = self.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// Gives the result of an operation, and what the caller had lent it. Dropping it cancels the operation.
pub(crate) struct AwaitedResult {
    pub(crate) state: Rc<Awaited>,
    pub(crate) local: Local,
    pub(crate) cancel: Cancel,
}

/// What to take back when nobody waits any more.
pub(crate) enum Cancel {
    Operation(OpId),
    Timer(crate::TimerId),
    Nothing,
}

impl Future for AwaitedResult {
    type Output = (i32, Option<Box<dyn Any>>);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(result) = self.state.result.get() {
            self.cancel = Cancel::Nothing;
            return Poll::Ready((result, self.state.keep.borrow_mut().take()));
        }
        *self.state.waker.borrow_mut() = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for AwaitedResult {
    fn drop(&mut self) {
        match self.cancel {
            Cancel::Operation(id) => self.local.cancel(id),
            Cancel::Timer(id) => {
                self.local.cancel_timer(id);
            }
            Cancel::Nothing => {}
        }
    }
}
