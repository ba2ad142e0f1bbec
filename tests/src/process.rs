//! Processes with a bound: on how long they run, and on outliving whoever started them.

use std::ffi::OsStr;
use std::io::Write;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::Transcript;

/// How often a process is asked whether it has ended.
const PACE: Duration = Duration::from_millis(10);
/// How long output may come after the end of its process.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// A command that the kernel kills when the thread that starts it ends, however it ends.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// How a process ended, and what it said.
#[derive(Debug)]
pub struct Finished {
    /// Its exit status.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

/// Runs `program` with `arguments` to its end.
///
/// # Errors
/// When it cannot be started, or runs longer than `limit` (it is killed then).
pub fn run<A: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = A>,
    limit: Duration,
) -> Result<Finished> {
    let mut started = command(program);
    started.args(arguments);
    finish(Process::spawn(started)?, limit)
}

/// Waits for the end of a process that gets no input.
pub(crate) fn finish(mut process: Process, limit: Duration) -> Result<Finished> {
    drop(process.stdin.take());
    let status = process.wait(limit)?;
    let (stdout, stderr) = (process.stdout.finish(LAST_WORDS), process.stderr.finish(LAST_WORDS));
    Ok(Finished { status, stdout, stderr })
}

/// As [`run`], and gives the standard output of a process that succeeded.
///
/// # Errors
/// As [`run`], and when it exits with another status than 0: the error carries what it said.
pub fn run_ok<A: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = A>,
    limit: Duration,
) -> Result<String> {
    let name = program.as_ref().to_string_lossy().into_owned();
    let finished = run(program, arguments, limit)?;
    if !finished.status.success() {
        bail!("{name}: {}\n{}{}", finished.status, finished.stdout, finished.stderr);
    }
    Ok(finished.stdout)
}

/// A running process whose output is collected; killed when dropped.
pub struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    /// Its standard output.
    pub stdout: Transcript,
    /// Its standard error.
    pub stderr: Transcript,
}

impl Process {
    /// Starts what [`command`] made.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(mut command: Command) -> Result<Self> {
        let name = format!("{command:?}").replace('"', "").replace("setpriv --pdeathsig KILL -- ", "");
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let stdin = child.stdin.take();
        let stdout = Transcript::of(child.stdout.take().context("no standard output")?);
        let stderr = Transcript::of(child.stderr.take().context("no standard error")?);
        Ok(Self { name, child, stdin, stdout, stderr })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Writes `text` to its standard input.
    ///
    /// # Errors
    /// When it no longer reads.
    pub fn send(&mut self, text: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("standard input is closed")?;
        stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()).context(self.name.clone())
    }

    /// Waits for its end; kills it after `limit`.
    ///
    /// # Errors
    /// When it had to be killed.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= end {
                self.kill();
                bail!(
                    "{}: still running after {} s, killed; it said:\n{}{}",
                    self.name,
                    limit.as_secs(),
                    self.stdout.text(),
                    self.stderr.text()
                );
            }
            thread::sleep(PACE);
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process has gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let id = Pid::from_child(&self.child);
        kill_process(id, signal).with_context(|| format!("signalling {}", self.name))
    }

    /// Kills it at once (SIGKILL) and waits for its end; nothing happens when it has ended before.
    pub fn kill(&mut self) {
        let _gone_before = self.child.kill();
        let _status = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
