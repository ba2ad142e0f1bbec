//! A stage in a process of its own, under fakeroot, so that an ordinary user's tree has owners and devices.
//!
//! The two speak lines of JSON over a socket pair: one job, then events. The stage ends when the socket does, so that
//! it cleans up even after a parent that was killed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::FdFlags;
use serde::{Deserialize, Serialize};

use super::{Done, Job};
use crate::error::Context;
use crate::process::Running;
use crate::{Cancel, Error, Progress, Result, Shortage, Silent, Step, sys};

/// Names the descriptors of the socket and the image: `3:4`.
const VARIABLE: &str = "VBD_STAGE";
/// How often progress is passed on.
const INTERVAL: Duration = Duration::from_millis(50);

#[derive(Debug, Serialize, Deserialize)]
enum Event {
    Step(Step, Option<u64>),
    Advance(u64),
    Message(String),
    Done(Done),
    Failed(Failure),
}

/// An error on its way to the parent: its kind where a caller would ask for it, and the text.
#[derive(Debug, Serialize, Deserialize)]
enum Failure {
    NoRoom(Shortage),
    Invalid(String),
    Archive { archive: String, entry: String, reason: String },
    Source(PathBuf, String),
    Interrupted,
    Other(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error {
            Error::NoRoom(shortage) => Failure::NoRoom(shortage),
            Error::Invalid(text) => Failure::Invalid(text),
            Error::Archive { archive, entry, reason } => Failure::Archive { archive, entry, reason },
            Error::Source { path, reason } => Failure::Source(path, reason),
            Error::Interrupted => Failure::Interrupted,
            other => Failure::Other(other.to_string()),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        match failure {
            Failure::NoRoom(shortage) => Error::NoRoom(shortage),
            Failure::Invalid(text) => Error::Invalid(text),
            Failure::Archive { archive, entry, reason } => Error::Archive { archive, entry, reason },
            Failure::Source(path, reason) => Error::Source { path, reason },
            Failure::Interrupted => Error::Interrupted,
            Failure::Other(text) => Error::Stage(text),
        }
    }
}

/// Has `helper` do a job under fakeroot. Its standard input is the tar, where there is one.
pub(crate) fn run(
    job: &Job,
    image: &File,
    archive: Option<File>,
    helper: &[PathBuf],
    progress: &mut dyn Progress,
) -> Result<Done> {
    let trouble = |e: io::Error| Error::io("cannot speak with the process that builds", e);
    let (ours, theirs) = UnixStream::pair().map_err(trouble)?;
    let mut command = Command::new("fakeroot");
    command.arg("--").args(helper);
    command.env(VARIABLE, format!("{}:{}", theirs.as_raw_fd(), image.as_raw_fd()));
    command.stdin(archive.map_or(Stdio::null(), Stdio::from)).stdout(Stdio::null());
    let inherited = [theirs.as_raw_fd(), image.as_raw_fd()];
    // SAFETY: between fork and exec it makes one system call for each descriptor, which are open in the child as they
    // are in the parent.
    unsafe { command.pre_exec(move || inherited.iter().try_for_each(|&fd| keep_over_exec(fd))) };
    let running = Running::start(&mut command, "fakeroot")?;
    drop(theirs);
    drop(command);
    let mut line = serde_json::to_vec(job).map_err(|e| trouble(e.into()))?;
    line.push(b'\n');
    let sent = (&ours).write_all(&line);
    let heard = match sent {
        Ok(()) => listen(&ours, progress),
        // It ended at once; what it said tells why.
        Err(_) => None,
    };
    // Its end of the line: whatever it is doing, it stops and cleans up.
    drop(ours);
    let ended = running.wait(&mut Silent, |_| {});
    match heard {
        Some(Ok(done)) => ended.map(|_| done),
        Some(Err(error)) => Err(error),
        None => {
            Err(ended.err().unwrap_or_else(|| Error::Stage("the process that builds ended early".to_owned())))
        }
    }
}

/// Clears the flag that closes a descriptor when another program takes over the process.
fn keep_over_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: the caller has it open.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(rustix::io::fcntl_setfd(fd, FdFlags::empty())?)
}

/// Passes events on until the last one; nothing if the stage ended without one.
fn listen(socket: &UnixStream, progress: &mut dyn Progress) -> Option<Result<Done>> {
    socket.set_read_timeout(Some(INTERVAL)).ok()?;
    let mut reader = BufReader::new(socket);
    let mut line = Vec::new();
    loop {
        if progress.cancelled() {
            return Some(Err(Error::Interrupted));
        }
        match reader.read_until(b'\n', &mut line) {
            Ok(0) => return None,
            Ok(_) if line.ends_with(b"\n") => {}
            Ok(_) => return None,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => continue,
            Err(e) => return Some(Err(Error::io("cannot hear the process that builds", e))),
        }
        let event = serde_json::from_slice(&line);
        line.clear();
        match event {
            Ok(Event::Step(step, total)) => progress.step(step, total),
            Ok(Event::Advance(bytes)) => progress.advance(bytes),
            Ok(Event::Message(text)) => progress.message(&text),
            Ok(Event::Done(done)) => return Some(Ok(done)),
            Ok(Event::Failed(failure)) => return Some(Err(failure.into())),
            Err(e) => return Some(Err(Error::io("cannot understand the process that builds", e.into()))),
        }
    }
}

/// Does the job of a parent that called [`build`](crate::build()) as an ordinary user: what the program named as
/// [`helper`](crate::BuildOptions::helper) must call, and nothing besides.
///
/// # Errors
///
/// When it was not started by such a parent. How the job itself went is told to the parent alone.
pub fn serve() -> Result<()> {
    let fds = std::env::var(VARIABLE).ok();
    let fds = fds
        .as_deref()
        .and_then(|v| v.split_once(':'))
        .and_then(|(socket, image)| Some((socket.parse::<RawFd>().ok()?, image.parse::<RawFd>().ok()?)));
    let Some((socket, image)) = fds.filter(|_| sys::user() == 0) else {
        return Err(Error::Invalid("this is a part of a build, and not for use by itself".to_owned()));
    };
    let (socket, image) = (take(socket)?, File::from(take(image)?));
    let socket = UnixStream::from(socket);
    let trouble = |e: io::Error| Error::io("cannot speak with the build", e);
    let mut reader = BufReader::new(socket.try_clone().map_err(trouble)?);
    let mut line = Vec::new();
    reader.read_until(b'\n', &mut line).map_err(trouble)?;
    let job: Job = serde_json::from_slice(&line).map_err(|e| trouble(e.into()))?;
    let cancel = Cancel::new();
    let hung_up = cancel.clone();
    std::thread::spawn(move || {
        // Nothing more is said: this ends when the parent does, or when it has had enough.
        let _ = reader.read(&mut [0]);
        hung_up.request();
    });
    let archive = match job.from {
        super::From::Archive(_) => Some(stdin()?),
        super::From::Directory { .. } => None,
    };
    let mut progress = Reporter { socket, cancel, bytes: 0, told: Instant::now() };
    let last = match super::run(&job, &image, archive, &mut progress) {
        Ok(done) => Event::Done(done),
        Err(error) => Event::Failed(error.into()),
    };
    progress.tell(&last);
    Ok(())
}

/// Takes over a descriptor that the parent left open, and lets it go no further.
fn take(fd: RawFd) -> Result<OwnedFd> {
    let open = (3..=i32::MAX).contains(&fd) && Path::new(&format!("/proc/self/fd/{fd}")).exists();
    if !open {
        return Err(Error::Invalid(format!("{VARIABLE} names descriptor {fd}, which is not open")));
    }
    // SAFETY: it is open, the parent opened it for this process, and nothing else here knows of it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC).at("keep", Path::new("a descriptor"))?;
    Ok(fd)
}

/// Standard input, as a file that can be polled.
pub(crate) fn stdin() -> Result<File> {
    let fd = io::stdin().as_fd().try_clone_to_owned();
    Ok(File::from(fd.at("open", Path::new("standard input"))?))
}

/// Passes progress on to the parent, a few times a second.
struct Reporter {
    socket: UnixStream,
    cancel: Cancel,
    bytes: u64,
    told: Instant,
}

impl Reporter {
    fn tell(&mut self, event: &Event) {
        if self.bytes > 0 {
            let bytes = std::mem::take(&mut self.bytes);
            self.tell(&Event::Advance(bytes));
        }
        let Ok(mut line) = serde_json::to_vec(event) else { return };
        line.push(b'\n');
        // A parent that does not listen any more is gone, which the other thread notices.
        let _ = self.socket.write_all(&line);
        self.told = Instant::now();
    }
}

impl Progress for Reporter {
    fn step(&mut self, step: Step, total: Option<u64>) {
        self.tell(&Event::Step(step, total));
    }

    fn advance(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.told.elapsed() >= INTERVAL {
            let bytes = std::mem::take(&mut self.bytes);
            self.tell(&Event::Advance(bytes));
        }
    }

    fn message(&mut self, text: &str) {
        self.tell(&Event::Message(text.to_owned()));
    }

    fn cancel(&self) -> Cancel {
        self.cancel.clone()
    }
}
