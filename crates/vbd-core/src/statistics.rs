//! Counters of a disk's queues, read from other threads without touching the data path.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::{Operation, Request};

/// The queues of a disk, over all front-ends.
#[derive(Default)]
pub struct Statistics {
    queues: Mutex<Vec<Arc<QueueCounters>>>,
}

impl Statistics {
    /// The counters of the queue with this label ("vhost-user/0", "nbd/3"): those from before, if it had some.
    pub fn queue(&self, label: &str) -> Arc<QueueCounters> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = queues.iter().find(|queue| queue.label == label) {
            return queue.clone();
        }
        let queue = Arc::new(QueueCounters { label: label.to_owned(), ..QueueCounters::default() });
        queues.push(queue.clone());
        queue
    }

    /// What every queue has counted.
    pub fn snapshot(&self) -> Vec<QueueSnapshot> {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.iter().map(|queue| queue.snapshot()).collect()
    }
}

/// Counters of one queue. One thread adds, any thread reads.
#[derive(Default)]
pub struct QueueCounters {
    label: String,
    operations: [Counters; 5],
}

#[derive(Default)]
struct Counters {
    count: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    queue_ns: AtomicU64,
    service_ns: AtomicU64,
    longest_ns: AtomicU64,
}

impl QueueCounters {
    /// Counts a request that has come back.
    pub fn record(&self, request: &Request, now: Instant, failed: bool) {
        let counters = &self.operations[index(request.operation)];
        let issued = request.issued_at.unwrap_or(now);
        let queued = nanoseconds(request.queued_at, issued);
        let served = nanoseconds(issued, now);
        // One writer a queue: a load and a store are enough, and cheaper than a locked add.
        let add =
            |counter: &AtomicU64, value| counter.store(counter.load(Relaxed).wrapping_add(value), Relaxed);
        add(&counters.count, 1);
        add(&counters.bytes, request.len);
        add(&counters.errors, u64::from(failed));
        add(&counters.queue_ns, queued);
        add(&counters.service_ns, served);
        if queued + served > counters.longest_ns.load(Relaxed) {
            counters.longest_ns.store(queued + served, Relaxed);
        }
    }

    fn snapshot(&self) -> QueueSnapshot {
        let names = ["read", "write", "flush", "discard", "zeroes"];
        let counts = names.iter().zip(&self.operations).map(|(name, counters)| OperationCount {
            operation: name,
            count: counters.count.load(Relaxed),
            bytes: counters.bytes.load(Relaxed),
            errors: counters.errors.load(Relaxed),
            queue_ns: counters.queue_ns.load(Relaxed),
            service_ns: counters.service_ns.load(Relaxed),
            longest_ns: counters.longest_ns.load(Relaxed),
        });
        QueueSnapshot { label: self.label.clone(), operations: counts.collect() }
    }
}

/// What a queue had counted at one moment.
#[derive(Clone, Debug)]
pub struct QueueSnapshot {
    /// Front-end and number.
    pub label: String,
    /// One entry an operation.
    pub operations: Vec<OperationCount>,
}

/// Counts of one operation. Times are sums in nanoseconds; divide by `count` for the mean.
#[derive(Clone, Copy, Debug)]
pub struct OperationCount {
    /// read, write, flush, discard or zeroes.
    pub operation: &'static str,
    /// Requests that have come back.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Those that have failed.
    pub errors: u64,
    /// Time before the storage was asked: limits, locks, policies.
    pub queue_ns: u64,
    /// Time in the storage.
    pub service_ns: u64,
    /// The longest of both for one request.
    pub longest_ns: u64,
}

fn index(operation: Operation) -> usize {
    match operation {
        Operation::Read | Operation::Extents => 0,
        Operation::Write => 1,
        Operation::Flush => 2,
        Operation::Discard => 3,
        Operation::WriteZeroes => 4,
    }
}

fn nanoseconds(from: Instant, to: Instant) -> u64 {
    u64::try_from(to.saturating_duration_since(from).as_nanos()).unwrap_or(u64::MAX)
}
