//! One piece of work, done in several ways in turn, round after round.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::bench::results::median;
use crate::bench::{Plan, output};

/// By work, `build/debian`, then by way.
pub(crate) type Works = BTreeMap<String, BTreeMap<String, Timing>>;

/// How long a way took, round by round.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Timing {
    pub(crate) seconds: Vec<f64>,
    /// The most memory that its process had at a time (its resident set), KiB.
    pub(crate) peak_kib: Vec<f64>,
    /// Instructions of a request, where those were counted.
    #[serde(default)]
    pub(crate) instructions: Option<f64>,
    /// Why there are no more.
    pub(crate) failure: Option<String>,
}

impl Timing {
    /// Median of the rounds.
    pub(crate) fn seconds(&self) -> Option<f64> {
        median(self.seconds.clone())
    }

    /// Median of the rounds.
    pub(crate) fn peak_kib(&self) -> Option<f64> {
        median(self.peak_kib.clone())
    }
}

/// One way to do it.
pub(crate) struct Way {
    pub(crate) name: &'static str,
    pub(crate) command: Box<dyn Fn() -> Command>,
    /// What it makes, and must not be there before.
    pub(crate) makes: Vec<PathBuf>,
    /// What has to be content with it after the first round: a wrong one is no result.
    pub(crate) check: Option<Box<dyn Fn() -> Command>>,
}

/// The work.
pub(crate) struct Race<'a> {
    pub(crate) name: &'a str,
    pub(crate) rounds: usize,
    /// Whether each way begins with nothing left to be written to storage by the one before.
    pub(crate) settle: bool,
    pub(crate) ways: Vec<Way>,
}

impl Race<'_> {
    /// Measures. A way that fails is left out of later rounds, and the results say why.
    pub(crate) fn run(mut self, plan: &Plan, works: &mut Works) -> Result<()> {
        self.ways.retain(|way| plan.takes(way.name));
        eprintln!("{}: {} rounds of {} ways", self.name, self.rounds, self.ways.len());
        let work = works.entry(self.name.to_owned()).or_default();
        work.clear();
        for round in 0..self.rounds {
            self.ways.retain(|way| {
                let timing = work.entry(way.name.to_owned()).or_default();
                match way.once(self.settle, round == 0) {
                    Ok((seconds, peak_kib)) => {
                        timing.seconds.push(seconds);
                        timing.peak_kib.push(peak_kib);
                    }
                    Err(error) => {
                        eprintln!("{}: {}: {error:#}", self.name, way.name);
                        timing.failure = Some(format!("{error:#}"));
                        let _ = way.clear();
                    }
                }
                timing.failure.is_none()
            });
        }
        // Memory for the next work.
        self.ways.iter().try_for_each(Way::clear)
    }
}

impl Way {
    /// Seconds, and KiB of memory at most.
    fn once(&self, settle: bool, check: bool) -> Result<(f64, f64)> {
        self.clear()?;
        if settle {
            rustix::fs::sync();
        }
        let mut said = tempfile::tempfile()?;
        let mut command = (self.command)();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said.try_clone()?);
        let start = Instant::now();
        let child = command.spawn().with_context(|| format!("start {}", command.get_program().display()))?;
        let (status, peak_kib) = wait(&child)?;
        let seconds = start.elapsed().as_secs_f64();
        if !status.success() {
            let mut text = String::new();
            said.seek(SeekFrom::Start(0))?;
            said.read_to_string(&mut text)?;
            anyhow::bail!("{status}: {}", text.trim());
        }
        if let Some(command) = self.check.as_ref().filter(|_| check) {
            output(&mut command())?;
        }
        Ok((seconds, peak_kib))
    }

    fn clear(&self) -> Result<()> {
        self.makes.iter().try_for_each(|path| remove(path))
    }
}

fn remove(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    }
    .with_context(|| format!("remove {}", path.display()))
}

/// Waits for its end, and gives the most memory it had, in KiB. That is never less than what this process has, which the
/// kernel counts from before the new program took over: a few MiB.
fn wait(child: &Child) -> Result<(ExitStatus, f64)> {
    let pid = libc::pid_t::try_from(child.id())?;
    let mut status = 0;
    // SAFETY: the structure is of integers alone, for which zeros are a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to variables of their types that live on; the child is ours and nobody else waits for it.
    let ended = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
    ensure!(ended == pid, "wait for process {pid}: {}", std::io::Error::last_os_error());
    Ok((ExitStatus::from_raw(status), usage.ru_maxrss as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(script: &'static str, makes: Vec<PathBuf>) -> Way {
        let command = move || {
            let mut sh = Command::new("sh");
            sh.args(["-ec", script]);
            sh
        };
        Way { name: "sh", command: Box::new(command), makes, check: None }
    }

    #[test]
    fn time_and_memory_are_those_of_the_process() {
        // A buffer of 64 MiB.
        let (seconds, peak_kib) = way("sleep 0.1; exec dd if=/dev/zero of=/dev/null bs=64M count=1", vec![])
            .once(false, true)
            .unwrap();
        assert!(seconds >= 0.1, "{seconds} s");
        assert!((64.0 * 1024.0..1024.0 * 1024.0).contains(&peak_kib), "{peak_kib} KiB");
    }

    #[test]
    fn failures_say_what_the_program_said() {
        let error = way("echo no room >&2; exit 3", vec![]).once(false, false).unwrap_err().to_string();
        assert!(error.contains('3') && error.contains("no room"), "{error}");
    }

    #[test]
    fn what_an_earlier_round_made_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (file, tree) = (dir.path().join("file"), dir.path().join("tree"));
        fs::write(&file, "old").unwrap();
        fs::create_dir_all(tree.join("below")).unwrap();
        way("true", vec![file.clone(), tree.clone(), dir.path().join("absent")]).once(false, false).unwrap();
        assert!(!file.exists() && !tree.exists());
    }
}
