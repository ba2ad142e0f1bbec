//! What carries operations out: io_uring, or a thread pool where the kernel forbids it.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::op::Waits;
use crate::reactor::Shared;
use crate::threads::Threads;
use crate::uring::Uring;
use crate::{Completion, FileHandle, Op, OpId};

/// Which engine a reactor uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring, or threads with one warning in the log where it cannot be had.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// The thread pool.
    Threads,
}

pub(crate) enum Engine {
    Uring(Box<Uring>),
    Threads(Threads),
    #[cfg(shuttle)]
    Simulated(crate::simulated::Simulated),
}

impl Engine {
    pub(crate) fn new(kind: EngineKind, shared: &Arc<Shared>) -> std::io::Result<Self> {
        #[cfg(shuttle)]
        if kind == EngineKind::Auto {
            return Ok(Engine::Simulated(crate::simulated::Simulated::new(shared.clone())));
        }
        match kind {
            EngineKind::Threads => Ok(Engine::Threads(Threads::new(shared.clone()))),
            EngineKind::Uring => Ok(Engine::Uring(Box::new(Uring::new()?))),
            EngineKind::Auto => match Uring::new() {
                Ok(ring) => Ok(Engine::Uring(Box::new(ring))),
                Err(error) => {
                    static WARNED: std::sync::Once = std::sync::Once::new();
                    WARNED.call_once(|| {
                        tracing::warn!(
                            "io_uring is not available here ({error}); using a thread pool, which is slower \
                             (see kernel.io_uring_disabled and the container's seccomp profile)"
                        );
                    });
                    Ok(Engine::Threads(Threads::new(shared.clone())))
                }
            },
        }
    }

    pub(crate) fn is_uring(&self) -> bool {
        matches!(self, Engine::Uring(_))
    }

    /// # Safety
    /// The pointers in `op` stay valid until the operation's result was reaped.
    pub(crate) unsafe fn start(&mut self, id: OpId, file: &FileHandle, op: &Op) {
        // SAFETY: passed on to the caller.
        unsafe {
            match self {
                Engine::Uring(ring) => ring.start(id, file, op),
                Engine::Threads(threads) => threads.start(id, file, op),
                #[cfg(shuttle)]
                Engine::Simulated(simulated) => simulated.start(id, file, op),
            }
        }
    }

    pub(crate) fn cancel(&mut self, id: OpId) {
        match self {
            Engine::Uring(ring) => ring.cancel(id),
            Engine::Threads(threads) => threads.cancel(id),
            #[cfg(shuttle)]
            Engine::Simulated(simulated) => simulated.cancel(id),
        }
    }

    /// Hands what was started to the kernel.
    pub(crate) fn flush(&mut self) {
        if let Engine::Uring(ring) = self {
            ring.flush();
        }
    }

    /// Takes what has finished. What was started may still wait for [`flush`](Self::flush) or [`wait`](Self::wait).
    pub(crate) fn reap(&mut self, done: &mut Vec<(OpId, i32)>) {
        match self {
            Engine::Uring(ring) => ring.reap(done),
            Engine::Threads(threads) => threads.reap(done, Some(Duration::ZERO)),
            #[cfg(shuttle)]
            Engine::Simulated(simulated) => simulated.reap(done),
        }
    }

    /// Hands what was started to the kernel, takes what has finished, and sleeps until there is something or the time is over.
    pub(crate) fn wait(&mut self, timeout: Option<Duration>, done: &mut Vec<(OpId, i32)>) {
        match self {
            Engine::Uring(ring) => ring.wait(timeout, done),
            Engine::Threads(threads) => threads.reap(done, timeout),
            #[cfg(shuttle)]
            Engine::Simulated(simulated) => simulated.wait(timeout, done),
        }
    }

    pub(crate) fn register(&mut self, fd: &OwnedFd) -> Option<u32> {
        match self {
            Engine::Uring(ring) => ring.register(fd),
            Engine::Threads(_) => None,
            #[cfg(shuttle)]
            Engine::Simulated(_) => None,
        }
    }

    pub(crate) fn unregister(&mut self, slot: u32) {
        if let Engine::Uring(ring) = self {
            ring.unregister(slot);
        }
    }
}

/// An operation in flight: who receives its result. Holds the file so that its descriptor stays open.
struct Flight {
    sink: Rc<dyn Completion>,
    token: u64,
    waits: Waits,
    _file: Option<FileHandle>,
}

/// The operations in flight, by slot and generation.
#[derive(Default)]
pub(crate) struct Flights {
    slots: Vec<(u32, Option<Flight>)>,
    free: Vec<u32>,
}

impl Flights {
    pub(crate) fn add(
        &mut self,
        sink: Rc<dyn Completion>,
        token: u64,
        waits: Waits,
        file: Option<FileHandle>,
    ) -> OpId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 operations fit in memory")
        });
        let entry = &mut self.slots[slot as usize];
        entry.1 = Some(Flight { sink, token, waits, _file: file });
        OpId::new(entry.0, slot, waits)
    }

    pub(crate) fn take(&mut self, id: OpId) -> Option<(Rc<dyn Completion>, u64)> {
        let slot = id.slot();
        let entry = self.slots.get_mut(usize::try_from(slot).ok()?)?;
        if u64::from(entry.0) != id.generation() {
            return None;
        }
        let flight = entry.1.take()?;
        // 31 bits of a name are the generation.
        entry.0 = (entry.0 + 1) & 0x7fff_ffff;
        self.free.push(u32::try_from(slot).ok()?);
        Some((flight.sink, flight.token))
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// How many of them end before the thread does.
    pub(crate) fn ending(&self) -> usize {
        let flights = self.slots.iter().filter_map(|(_, flight)| flight.as_ref());
        flights.filter(|flight| flight.waits != Waits::Driver).count()
    }

    /// The operations in flight that wait for somebody else, or for storage too.
    pub(crate) fn ids(&self, storage: bool) -> Vec<OpId> {
        let wanted = |flight: &Flight| match flight.waits {
            Waits::Peer => true,
            Waits::Storage => storage,
            Waits::Driver => false,
        };
        let slots = (0..).zip(&self.slots);
        let chosen = slots.filter_map(|(slot, (generation, flight))| {
            let flight = flight.as_ref().filter(|flight| wanted(flight))?;
            Some(OpId::new(*generation, slot, flight.waits))
        });
        chosen.collect()
    }
}
