//! Upkeep of the images of disks that are served: jobs that change what the image stands on, or how long its file is.

use std::sync::Arc;

use serde::Serialize;
use vbd_core::Session;
use vbd_jobs::{Pace, Progress};

use super::Supervisor;
use crate::control::{JobInfo, Upkeep};
use crate::{Fault, FaultKind};

impl Supervisor {
    /// Begins to copy into a disk's image all that it reads from others.
    ///
    /// # Errors
    /// No disk has this name, it cannot be opened, or it has a job already; so for all that follow.
    pub fn flatten(&self, name: &str, asked: Upkeep) -> Result<JobInfo, Fault> {
        self.upkeep("flatten", name, asked, vbd_jobs::flatten)
    }

    /// Begins to write what a disk's image holds to the one that it stands on.
    ///
    /// # Errors
    /// As [`flatten`](Self::flatten).
    pub fn commit(&self, name: &str, asked: Upkeep) -> Result<JobInfo, Fault> {
        let served = self.get(name)?;
        let spec = served.spec().cloned().ok_or_else(|| {
            Fault::new(FaultKind::Invalid, format!("`{name}` is no image that stands on another"))
        })?;
        self.upkeep("commit", name, asked, move |session, pace, progress| {
            vbd_jobs::commit_served(session, &spec, pace, progress)
        })
    }

    /// Begins to make the file of a disk's image as short as it can be.
    ///
    /// # Errors
    /// As [`flatten`](Self::flatten).
    pub fn compact(&self, name: &str, asked: Upkeep) -> Result<JobInfo, Fault> {
        self.upkeep("compact", name, asked, vbd_jobs::compact)
    }

    fn upkeep<T: Serialize>(
        &self,
        kind: &'static str,
        name: &str,
        asked: Upkeep,
        work: impl FnOnce(&Arc<dyn Session>, Pace, &dyn Progress) -> vbd_jobs::Result<T> + Send + 'static,
    ) -> Result<JobInfo, Fault> {
        let session = self.session(name)?;
        let pace = asked.max_rate.map_or(Pace::Half, Pace::Rate);
        self.jobs.begin(kind, name, move |job| work(&session, pace, job).map_err(|error| error.to_string()))
    }
}
