//! Work that may block, each on a thread of its own. Where no thread is to be had, it waits and is tried again: a device
//! whose work was dropped would wait for it for ever.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::mail::{Mail, Message};
use crate::options::DeviceId;
use crate::sys::Threads;

/// After no thread could be had, the next attempt.
const RETRY: Duration = Duration::from_secs(1);

/// What the work is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To find a device's disk.
    Open,
    /// To connect it.
    Connect,
    /// To end its connection.
    End,
}

impl Purpose {
    /// A name for its thread; the kernel shows 15 bytes.
    fn name(self) -> &'static str {
        match self {
            Purpose::Open => "vbd-xen-open",
            Purpose::Connect => "vbd-xen-connect",
            Purpose::End => "vbd-xen-end",
        }
    }
}

type Work = Box<dyn FnOnce() -> Message + Send>;

/// Work that waits for a thread.
struct Waiting {
    id: DeviceId,
    purpose: Purpose,
    work: Work,
    problem: String,
}

/// Starts work; what it comes to is sent as a message.
pub(crate) struct Jobs {
    threads: Arc<dyn Threads>,
    mail: Arc<Mail>,
    /// In the order in which it came.
    waiting: Vec<Waiting>,
    retry: Option<Instant>,
}

impl Jobs {
    pub(crate) fn new(threads: Arc<dyn Threads>, mail: Arc<Mail>) -> Jobs {
        Jobs { threads, mail, waiting: Vec::new(), retry: None }
    }

    /// Begins with a device's work, now or as soon as there is a thread.
    pub(crate) fn start(
        &mut self,
        id: DeviceId,
        purpose: Purpose,
        work: impl FnOnce() -> Message + Send + 'static,
    ) {
        if let Err((error, work)) = self.spawn(purpose, Box::new(work)) {
            let problem = format!("no thread to go on with: {error} (trying again)");
            tracing::error!("{id}: {problem}");
            self.waiting.push(Waiting { id, purpose, work, problem });
            self.retry.get_or_insert(Instant::now() + RETRY);
        }
    }

    fn spawn(&self, purpose: Purpose, work: Work) -> Result<(), (io::Error, Work)> {
        // A thread that cannot be started takes what it was given with it.
        let slot = Arc::new(Mutex::new(Some(work)));
        let take = |slot: &Mutex<Option<Work>>| slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (inside, mail) = (slot.clone(), self.mail.clone());
        let run = move || {
            if let Some(work) = take(&inside) {
                mail.send(work());
            }
        };
        match self.threads.start(purpose.name(), Box::new(run)) {
            Ok(()) => Ok(()),
            Err(error) => match take(&slot) {
                Some(work) => Err((error, work)),
                None => Ok(()),
            },
        }
    }

    /// When [`retry`](Self::retry) is to be called.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.retry
    }

    /// Tries again if it is time: the devices whose work has begun.
    pub(crate) fn retry(&mut self, now: Instant) -> Vec<DeviceId> {
        let mut begun = Vec::new();
        if self.retry.is_none_or(|at| at > now) {
            return begun;
        }
        for one in std::mem::take(&mut self.waiting) {
            match self.spawn(one.purpose, one.work) {
                Ok(()) => begun.push(one.id),
                Err((error, work)) => {
                    tracing::debug!("{}: still no thread: {error}", one.id);
                    self.waiting.push(Waiting { work, ..one });
                }
            }
        }
        self.retry = (!self.waiting.is_empty()).then(|| now + RETRY);
        begun
    }

    /// What a device waits for, for people; none if it does not wait for a thread.
    pub(crate) fn problem(&self, id: &DeviceId) -> Option<&str> {
        self.waiting.iter().find(|one| one.id == *id).map(|one| one.problem.as_str())
    }

    /// Ends connections that wait for a thread on this one, which is to end itself and can wait no longer.
    pub(crate) fn end_here(&mut self) {
        for one in self.waiting.extract_if(.., |one| one.purpose == Purpose::End) {
            self.mail.send((one.work)());
        }
    }
}
