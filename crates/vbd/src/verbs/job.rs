//! Jobs of processes that serve, watched until they end.

use std::time::Duration;

use anyhow::bail;
use serde::de::DeserializeOwned;
use vbd_daemon::control::{Client, JobInfo, JobState, Upkeep};
use vbd_image::size::Size;
use vbd_jobs::Progress;

use crate::UsageError;
use crate::progress::Bar;

/// How often a job is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// How fast work on a disk may be.
#[derive(clap::Args)]
#[group(skip)]
pub(super) struct PaceArgs {
    /// The most bytes a second that are moved of a disk that is served (default: it rests for as long as it works)
    #[arg(long, value_name = "SIZE")]
    max_rate: Option<Size>,
}

impl PaceArgs {
    /// For a disk that is served.
    pub(super) fn served(&self) -> Upkeep {
        Upkeep { max_rate: self.max_rate.map(Size::bytes) }
    }

    /// For a file that nobody serves: as fast as it can be.
    pub(super) fn file(&self) -> anyhow::Result<()> {
        if self.max_rate.is_some() {
            let message = "--max-rate is for disks that are served: nobody waits for a file".to_owned();
            return Err(UsageError(message).into());
        }
        Ok(())
    }
}

/// Watches a job until it ends, and passes on the wish to stop it.
pub(super) fn wait<T: DeserializeOwned>(client: &Client, mut job: JobInfo, bar: &Bar) -> anyhow::Result<T> {
    let (mut step, mut shown, mut stopping) = (String::new(), 0, false);
    loop {
        match job.state {
            JobState::Done => return Ok(serde_json::from_value(job.result.unwrap_or_default())?),
            JobState::Failed => bail!("{}", job.problem.unwrap_or_default()),
            JobState::Running => {}
        }
        if bar.is_cancelled() && !stopping {
            client.cancel_job(job.id)?;
            stopping = true;
        }
        if job.step != step {
            bar.step(&job.step, job.total);
            (step, shown) = (job.step.clone(), 0);
        }
        bar.advance(job.done.saturating_sub(shown));
        shown = shown.max(job.done);
        std::thread::sleep(LOOK_AGAIN);
        job = client.job(job.id)?;
    }
}
