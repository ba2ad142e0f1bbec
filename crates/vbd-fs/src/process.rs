//! Other programs: run, watched, stopped with us, and quoted when they fail.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::{Error, Progress, Result};

/// How long a wish to stop may go unseen.
const TICK: Duration = Duration::from_millis(50);
/// How much of what a program says is kept.
const SAID: usize = 2048;

/// A program that runs. Dropped before its end, it is asked to end, and killed if it does not.
pub(crate) struct Running {
    name: String,
    child: Child,
    said: Option<JoinHandle<String>>,
}

impl Running {
    /// Starts a program with its messages caught; `package` is what to install where it is missing.
    pub(crate) fn start(command: &mut Command, package: &str) -> Result<Running> {
        let name = command.get_program().to_string_lossy().into_owned();
        // A group of its own: a ^C is for us, who tell it and all that it runs.
        let child = command.process_group(0).stderr(Stdio::piped()).spawn().map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Error::Missing { program: name.clone(), package: package.to_owned() },
            _ => Error::io(format!("cannot run {name}"), e),
        })?;
        let mut running = Running { name, child, said: None };
        running.said = running.child.stderr.take().map(|stderr| std::thread::spawn(move || tail(stderr)));
        Ok(running)
    }

    /// What the program writes, where that was asked for.
    pub(crate) fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Waits for the end, looking at `progress` for a wish to stop and calling `tick` a few times a second. Returns what
    /// the program said.
    pub(crate) fn wait(
        mut self,
        progress: &mut dyn Progress,
        mut tick: impl FnMut(&mut dyn Progress),
    ) -> Result<String> {
        let status = self.ended(progress, &mut tick)?;
        let said = self.said();
        if status.success() {
            return Ok(said);
        }
        Err(Error::Tool { program: self.name.clone(), status: status.to_string(), stderr: said })
    }

    /// Waits for the end as [`Running::wait`] does; the exit code, where a signal did not end it.
    pub(crate) fn code(mut self, progress: &mut dyn Progress) -> Result<i32> {
        let status = self.ended(progress, &mut |_| {})?;
        let said = self.said();
        status.code().ok_or_else(|| Error::Tool {
            program: self.name.clone(),
            status: status.to_string(),
            stderr: said,
        })
    }

    fn ended(
        &mut self,
        progress: &mut dyn Progress,
        tick: &mut dyn FnMut(&mut dyn Progress),
    ) -> Result<ExitStatus> {
        let failed = |e: io::Error| Error::io("cannot wait for a program".to_owned(), e);
        let pid = Pid::from_child(&self.child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| failed(e.into()))?;
        let timeout = Timespec { tv_sec: 0, tv_nsec: TICK.subsec_nanos().into() };
        loop {
            let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return self.child.wait().map_err(failed),
                Err(e) => return Err(failed(e.into())),
            }
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            tick(progress);
        }
    }

    fn said(&mut self) -> String {
        self.said.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // Politely, for mmdebstrap has mounts and directories to take down, and the programs that it runs to end first.
        let pid = Pid::from_child(&self.child);
        let patience = Timespec { tv_sec: 10, tv_nsec: 0 };
        if kill_process_group(pid, Signal::TERM).is_ok()
            && let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty())
        {
            // However this ends, what follows does no harm.
            let _ = poll(&mut [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)], Some(&patience));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The end of what a program says, in whole lines.
fn tail(mut stderr: ChildStderr) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(n) = stderr.read(&mut buffer) {
        if n == 0 {
            break;
        }
        kept.extend_from_slice(&buffer[..n]);
        if kept.len() > 2 * SAID {
            kept.drain(..kept.len() - SAID);
        }
    }
    let from = kept.len().saturating_sub(SAID);
    String::from_utf8_lossy(&kept[from..]).into_owned()
}

/// A program of e2fsprogs, speaking English and not asking.
pub(crate) fn e2fsprogs(program: &str) -> Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // An ordinary user's path often lacks where they are.
    let path = std::env::join_paths(std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]));
    let mut command = Command::new(program);
    command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null());
    if let Ok(path) = path {
        command.env("PATH", path);
    }
    command
}
