//! vbd as a server, and its other verbs, each test's apart from every other's.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;

use crate::process::finish;
use crate::{Disk, Finished, Process, Scratch, command, vbd};

/// A server says its first line when all its disks are ready.
const READY: &str = "\n";
/// How long a server may take to be ready, and to stop.
const LIMIT: Duration = Duration::from_secs(30);
/// How long a verb that ends by itself may take.
const VERB: Duration = Duration::from_secs(120);

impl Scratch {
    /// Runs a verb of vbd to its end, with this directory's sockets as the runtime directory.
    ///
    /// # Errors
    /// When it cannot be started, or does not end in time.
    pub fn vbd<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<Finished> {
        finish(Process::spawn(self.command(arguments))?, VERB)
    }

    /// Starts `vbd up` with a configuration of this name and text; comes back when its disks are ready.
    ///
    /// # Errors
    /// When it ends instead, or says nothing in time.
    pub fn up(&self, name: &str, configuration: &str) -> Result<Server> {
        let path = self.path(name);
        fs::write(&path, configuration)?;
        Server::start(self.command(["up".as_ref(), path.as_os_str()]))
    }

    /// A disk that [`Scratch::up`] serves by this name, as a guest takes it.
    pub fn disk(&self, name: &str, queues: u16) -> Disk {
        Disk { socket: self.socket(format!("vbd/{name}.sock")), queues }
    }

    fn command<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut vbd = command(vbd());
        vbd.args(arguments).env("XDG_RUNTIME_DIR", self.socket(""));
        vbd
    }
}

/// How a file is served.
pub struct Attach<'a> {
    scratch: &'a Scratch,
    file: PathBuf,
    vhost_user: Option<PathBuf>,
    nbd: Option<String>,
    queues: u16,
    options: Vec<String>,
}

impl<'a> Attach<'a> {
    /// Serves `file`, on nothing yet.
    pub fn new(scratch: &'a Scratch, file: impl Into<PathBuf>) -> Self {
        Self { scratch, file: file.into(), vhost_user: None, nbd: None, queues: 1, options: Vec::new() }
    }

    /// Over vhost-user-blk, on this socket.
    pub fn vhost_user(mut self, socket: impl Into<PathBuf>) -> Self {
        self.vhost_user = Some(socket.into());
        self
    }

    /// Over NBD, on this unix socket.
    pub fn nbd(mut self, socket: &Path) -> Self {
        self.nbd = Some(format!("unix:{}", socket.display()));
        self
    }

    /// With this many queues.
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// With one more word of `vbd attach`, as it is.
    pub fn option(mut self, option: &str) -> Self {
        self.options.push(option.to_owned());
        self
    }

    /// Starts it; comes back when it is ready.
    ///
    /// # Errors
    /// When it ends instead, or says nothing in time.
    pub fn start(&self) -> Result<Server> {
        let mut attach = self.scratch.command(["attach"]);
        attach.arg(&self.file).args(&self.options);
        if let Some(socket) = &self.vhost_user {
            attach.arg("--vhost-user").arg(socket).arg("--queues").arg(self.queues.to_string());
        }
        if let Some(address) = &self.nbd {
            attach.arg("--nbd").arg(address);
        }
        Server::start(attach)
    }

    /// The disk as a guest takes it.
    ///
    /// # Panics
    /// When it is not served over vhost-user.
    pub fn disk(&self) -> Disk {
        Disk { socket: self.vhost_user.clone().expect("served over vhost-user"), queues: self.queues }
    }
}

/// A running server; killed when dropped.
pub struct Server {
    process: Process,
}

impl Server {
    fn start(command: Command) -> Result<Self> {
        let process = Process::spawn(command)?;
        process.stdout.wait_for(READY, LIMIT).with_context(|| process.stderr.text())?;
        Ok(Self { process })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Asks it to stop (SIGTERM) and waits for its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn stop(mut self) -> Result<ExitStatus> {
        self.process.signal(Signal::TERM)?;
        self.process.wait(LIMIT)
    }

    /// Kills it at once, as `kill -9` does.
    pub fn kill(mut self) {
        self.process.kill();
    }

    /// What it has said on standard error.
    pub fn stderr(&self) -> String {
        self.process.stderr.text()
    }
}
