//! A process-wide pool of threads for calls that block: what io_uring cannot do, and all I/O where it is forbidden.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Calls that block at the same time; more wait their turn.
const MOST_THREADS: usize = 64;
/// A thread without work ends after this time.
const LINGER: Duration = Duration::from_secs(5);

type Job = Box<dyn FnOnce() + Send>;

struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    threads: usize,
}

static STATE: Mutex<State> = Mutex::new(State { jobs: VecDeque::new(), idle: 0, threads: 0 });
static WORK: Condvar = Condvar::new();

/// Runs `job` on a thread of the pool.
pub(crate) fn run(job: Job) {
    if cfg!(shuttle) {
        // The checker's threads are all of one of its runs.
        drop(crate::sync::thread::spawn(job));
        return;
    }
    let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    state.jobs.push_back(job);
    if state.jobs.len() <= state.idle || state.threads >= MOST_THREADS {
        WORK.notify_one();
        return;
    }
    state.threads += 1;
    let started = std::thread::Builder::new().name("vbd-blocking".into()).stack_size(256 << 10).spawn(worker);
    if started.is_ok() {
        return;
    }
    state.threads -= 1;
    if state.threads == 0
        && let Some(job) = state.jobs.pop_back()
    {
        // No thread can be had at all: late is better than never.
        drop(state);
        job();
    }
}

fn worker() {
    let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            job();
            state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        state.idle += 1;
        let (guard, timeout) = WORK.wait_timeout(state, LINGER).unwrap_or_else(PoisonError::into_inner);
        state = guard;
        state.idle -= 1;
        if timeout.timed_out() && state.jobs.is_empty() {
            state.threads -= 1;
            return;
        }
    }
}
