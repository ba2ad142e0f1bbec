//! Long work on disks, each on a thread of its own; what has ended is remembered for a while.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::control::{JobInfo, JobState};
use crate::{Fault, FaultKind};

/// How many jobs that have ended are remembered.
const REMEMBERED: usize = 64;

/// The jobs of a process.
#[derive(Default)]
pub(super) struct Jobs {
    list: Mutex<Vec<Arc<Job>>>,
    last: AtomicU64,
}

/// One job, as those who watch it and the thread that does it share it.
pub(super) struct Job {
    id: u64,
    kind: &'static str,
    disk: String,
    state: Mutex<State>,
    ended: Condvar,
    done: AtomicU64,
    cancelled: AtomicBool,
}

#[derive(Default)]
struct State {
    step: String,
    total: u64,
    outcome: Option<Result<serde_json::Value, String>>,
}

impl Job {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_running(&self) -> bool {
        self.state().outcome.is_none()
    }

    fn info(&self) -> JobInfo {
        let state = self.state();
        let (now, result, problem) = match &state.outcome {
            None => (JobState::Running, None, None),
            Some(Ok(value)) => (JobState::Done, Some(value.clone()), None),
            Some(Err(problem)) => (JobState::Failed, None, Some(problem.clone())),
        };
        JobInfo {
            id: self.id,
            kind: self.kind.to_owned(),
            disk: self.disk.clone(),
            state: now,
            step: state.step.clone(),
            total: state.total,
            done: self.done.load(Ordering::Relaxed),
            result,
            problem,
        }
    }

    fn end(&self, outcome: Result<serde_json::Value, String>) {
        self.state().outcome.get_or_insert(outcome);
        self.ended.notify_all();
    }
}

impl vbd_jobs::Progress for Job {
    fn step(&self, step: &str, total: u64) {
        let mut state = self.state();
        (state.step, state.total) = (step.to_owned(), total);
        self.done.store(0, Ordering::Relaxed);
    }

    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }
}

/// Ends a job whose thread ends without having said anything.
struct Running(Arc<Job>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.end(Err("the job broke down".into()));
    }
}

impl Jobs {
    fn list(&self) -> MutexGuard<'_, Vec<Arc<Job>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a job; a disk has one at a time.
    pub(super) fn begin<T: Serialize>(
        &self,
        kind: &'static str,
        disk: &str,
        work: impl FnOnce(&Job) -> Result<T, String> + Send + 'static,
    ) -> Result<JobInfo, Fault> {
        let mut list = self.list();
        if let Some(other) = list.iter().find(|job| job.disk == disk && job.is_running()) {
            let Job { id, kind, .. } = &**other;
            let message = format!("`{disk}` has a {kind} running (job {id}): wait for it, or cancel it");
            return Err(Fault::new(FaultKind::Busy, message));
        }
        let job = Arc::new(Job {
            id: self.last.fetch_add(1, Ordering::Relaxed) + 1,
            kind,
            disk: disk.to_owned(),
            state: Mutex::default(),
            ended: Condvar::new(),
            done: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
        });
        let running = Running(job.clone());
        let thread = std::thread::Builder::new().name(format!("vbd-{kind}")).spawn(move || {
            let outcome = work(&running.0);
            let outcome =
                outcome.and_then(|value| serde_json::to_value(value).map_err(|error| error.to_string()));
            if let Err(problem) = &outcome {
                tracing::warn!("{}: {kind}: {problem}", running.0.disk);
            }
            running.0.end(outcome);
        });
        thread.map_err(|error| Fault::failed("starting a thread", error))?;
        if list.iter().filter(|job| !job.is_running()).count() >= REMEMBERED
            && let Some(oldest) = list.iter().position(|job| !job.is_running())
        {
            list.remove(oldest);
        }
        list.push(job.clone());
        Ok(job.info())
    }

    pub(super) fn all(&self) -> Vec<JobInfo> {
        self.list().iter().map(|job| job.info()).collect()
    }

    fn find(&self, id: &str) -> Result<Arc<Job>, Fault> {
        let found = self.list().iter().find(|job| job.id.to_string() == id).cloned();
        let unknown = || Fault::new(FaultKind::Unknown, format!("there is no job `{}`", id.escape_debug()));
        found.ok_or_else(unknown)
    }

    pub(super) fn get(&self, id: &str) -> Result<JobInfo, Fault> {
        self.find(id).map(|job| job.info())
    }

    pub(super) fn cancel(&self, id: &str) -> Result<JobInfo, Fault> {
        let job = self.find(id)?;
        job.cancelled.store(true, Ordering::SeqCst);
        Ok(job.info())
    }

    /// Has the jobs of a disk (of all, if none is named) end, and waits for that, so long at most.
    pub(super) fn end(&self, disk: Option<&str>, within: Duration) {
        let mut jobs = self.list().clone();
        jobs.retain(|job| disk.is_none_or(|disk| job.disk == disk));
        jobs.iter().for_each(|job| job.cancelled.store(true, Ordering::SeqCst));
        let until = Instant::now() + within;
        for job in jobs {
            let mut state = job.state();
            while state.outcome.is_none() {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    tracing::warn!("{}: {} (job {}) does not stop", job.disk, job.kind, job.id);
                    break;
                }
                state = job.ended.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(jobs: &Jobs, id: u64) -> JobInfo {
        loop {
            let info = jobs.get(&id.to_string()).unwrap();
            if info.state != JobState::Running {
                return info;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn a_job_runs_once_a_disk_and_ends_by_itself_or_when_asked() {
        let jobs = Jobs::default();
        let wait = |job: &Job| {
            use vbd_jobs::Progress;
            job.step("waiting", 7);
            job.advance(3);
            while !job.is_cancelled() {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err::<(), _>("stopped".to_owned())
        };
        let first = jobs.begin("backup", "a", wait).unwrap();
        assert_eq!(jobs.begin("backup", "a", wait).unwrap_err().kind, FaultKind::Busy);
        let other = jobs.begin("backup", "b", |_| Ok(5)).unwrap();
        assert_eq!(ended(&jobs, other.id).result, Some(5.into()));
        while jobs.get(&first.id.to_string()).unwrap().done != 3 {
            std::thread::sleep(Duration::from_millis(2));
        }
        jobs.end(Some("b"), Duration::from_secs(5));
        assert_eq!(jobs.get(&first.id.to_string()).unwrap().state, JobState::Running);
        jobs.cancel(&first.id.to_string()).unwrap();
        assert_eq!(ended(&jobs, first.id).problem.as_deref(), Some("stopped"));
        let broken = jobs.begin("backup", "a", |_| -> Result<(), String> { panic!("on purpose") }).unwrap();
        assert_eq!(ended(&jobs, broken.id).problem.as_deref(), Some("the job broke down"));
        assert_eq!(jobs.all().len(), 3);
        assert_eq!(jobs.get("4").unwrap_err().kind, FaultKind::Unknown);
        let last = jobs.begin("backup", "a", wait).unwrap();
        jobs.end(None, Duration::from_secs(5));
        assert_eq!(jobs.get(&last.id.to_string()).unwrap().state, JobState::Failed);
    }
}
