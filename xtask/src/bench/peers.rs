//! Who is compared: how each serves a file, and how it is stopped.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use vbd_tests::command;

use super::files::Storage;
use super::loads::Target;
use super::{Tools, output};

/// One way to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Peer {
    File,
    LoopDirect,
    LoopBuffered,
    QemuNbdNative,
    QemuNbdUring,
    Nbdkit,
    QsdNbd,
    VbdNbd,
    QsdVhostNative,
    QsdVhostUring,
    QsdVhostThreads,
    VbdVhost,
}

impl Peer {
    /// In the order of the tables: each of vbd's front-ends after those that it competes with.
    pub(crate) const ALL: [Peer; 12] = [
        Peer::File,
        Peer::LoopDirect,
        Peer::LoopBuffered,
        Peer::QemuNbdNative,
        Peer::QemuNbdUring,
        Peer::Nbdkit,
        Peer::QsdNbd,
        Peer::VbdNbd,
        Peer::QsdVhostNative,
        Peer::QsdVhostUring,
        Peer::QsdVhostThreads,
        Peer::VbdVhost,
    ];
    pub(crate) const QEMU_NBD: [Peer; 2] = [Peer::QemuNbdNative, Peer::QemuNbdUring];
    pub(crate) const QSD_VHOST: [Peer; 3] =
        [Peer::QsdVhostNative, Peer::QsdVhostUring, Peer::QsdVhostThreads];

    /// The name on the command line and in the results.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Peer::File => "file",
            Peer::LoopDirect => "loop-direct",
            Peer::LoopBuffered => "loop",
            Peer::QemuNbdNative => "qemu-nbd-native",
            Peer::QemuNbdUring => "qemu-nbd-io_uring",
            Peer::Nbdkit => "nbdkit",
            Peer::QsdNbd => "qsd-nbd",
            Peer::VbdNbd => "vbd-nbd",
            Peer::QsdVhostNative => "qsd-vhost-native",
            Peer::QsdVhostUring => "qsd-vhost-io_uring",
            Peer::QsdVhostThreads => "qsd-vhost-threads",
            Peer::VbdVhost => "vbd-vhost",
        }
    }

    /// What the tables call it.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Peer::File => "fio on the file",
            Peer::LoopDirect => "loop, direct I/O",
            Peer::LoopBuffered => "loop, default (page cache)",
            Peer::QemuNbdNative => "qemu-nbd, aio=native",
            Peer::QemuNbdUring => "qemu-nbd, aio=io_uring",
            Peer::Nbdkit => "nbdkit file (page cache)",
            Peer::QsdNbd => "qemu-storage-daemon, NBD, aio=native",
            Peer::VbdNbd => "**vbd, NBD**",
            Peer::QsdVhostNative => "qemu-storage-daemon, vhost-user, aio=native",
            Peer::QsdVhostUring => "qemu-storage-daemon, vhost-user, aio=io_uring",
            Peer::QsdVhostThreads => "qemu-storage-daemon, vhost-user, aio=threads",
            Peer::VbdVhost => "**vbd, vhost-user**",
        }
    }

    /// Serves `file` in this way.
    pub(crate) fn start(self, file: &Path, storage: Storage, tools: &Tools) -> Result<Serving> {
        let dir = tools.scratch.as_path();
        let name = file.display();
        let socket = dir.join("bench.sock");
        let at = socket.display();
        let qsd = |aio: &str, export: String| {
            let mut command = command("qemu-storage-daemon");
            command
                .arg("--blockdev")
                .arg(format!("driver=file,node-name=disk,filename={name},cache.direct=on,aio={aio}"));
            (command, export)
        };
        let qsd_vhost = |aio| {
            let at = format!("addr.type=unix,addr.path={at}");
            let (mut command, export) =
                qsd(aio, format!("type=vhost-user-blk,id=e,node-name=disk,writable=on,{at}"));
            command.arg("--export").arg(export);
            command
        };
        let qemu_nbd = |aio: &str| {
            let mut command = command("qemu-nbd");
            command
                .args(["--format=raw", "--cache=none", "--persistent", "--aio", aio, "--socket"])
                .arg(&socket)
                .arg(file);
            command
        };
        match self {
            // Memory has no O_DIRECT worth the name.
            Peer::File => Ok(Serving::file(file, storage == Storage::Disk)),
            Peer::LoopDirect => Serving::through_loop(file, true),
            Peer::LoopBuffered => Serving::through_loop(file, false),
            Peer::QemuNbdNative => Serving::nbd(qemu_nbd("native"), socket, dir),
            Peer::QemuNbdUring => Serving::nbd(qemu_nbd("io_uring"), socket, dir),
            Peer::Nbdkit => {
                let mut command = command("nbdkit");
                command.args(["--foreground", "--unix"]).arg(&socket).arg("file").arg(file);
                Serving::nbd(command, socket, dir)
            }
            Peer::QsdNbd => {
                let (mut command, export) =
                    qsd("native", "type=nbd,id=e,node-name=disk,name=,writable=on".into());
                command
                    .arg("--nbd-server")
                    .arg(format!("addr.type=unix,addr.path={at}"))
                    .arg("--export")
                    .arg(export);
                Serving::nbd(command, socket, dir)
            }
            Peer::QsdVhostNative => Serving::vhost_user(qsd_vhost("native"), socket, dir),
            Peer::QsdVhostUring => Serving::vhost_user(qsd_vhost("io_uring"), socket, dir),
            Peer::QsdVhostThreads => Serving::vhost_user(qsd_vhost("threads"), socket, dir),
            Peer::VbdNbd => {
                let mut command = command(&tools.vbd);
                command.arg("attach").arg(file).arg("--nbd").arg(format!("unix:{at}"));
                Serving::nbd(command, socket, dir)
            }
            Peer::VbdVhost => {
                let mut command = command(&tools.vbd);
                command.arg("attach").arg(file).arg("--vhost-user").arg(&socket);
                Serving::vhost_user(command, socket, dir)
            }
        }
    }
}

/// A file that is being served; dropping it ends that.
pub(crate) struct Serving {
    pub(crate) target: Target,
    server: Option<Child>,
    device: Option<PathBuf>,
}

impl Serving {
    fn file(path: &Path, direct: bool) -> Self {
        Serving { target: Target::File { path: path.to_owned(), direct }, server: None, device: None }
    }

    fn through_loop(file: &Path, direct: bool) -> Result<Self> {
        let mut command = Command::new("losetup");
        if direct {
            command.arg("--direct-io=on");
        }
        let device = PathBuf::from(output(command.args(["--find", "--show"]).arg(file))?.trim());
        let target = Target::File { path: device.clone(), direct: true };
        Ok(Serving { target, server: None, device: Some(device) })
    }

    fn nbd(command: Command, socket: PathBuf, dir: &Path) -> Result<Self> {
        let mut serving = Self::spawn(command, Target::Nbd(socket.clone()), &socket, dir)?;
        serving.wait_until(dir, || UnixStream::connect(&socket).is_ok())?;
        Ok(serving)
    }

    /// The client of vhost-user connects again until the server listens: such a server may take one client only, and a
    /// trial would be that one.
    pub(crate) fn vhost_user(command: Command, socket: PathBuf, dir: &Path) -> Result<Self> {
        let mut serving = Self::spawn(command, Target::VhostUser(socket.clone()), &socket, dir)?;
        serving.wait_until(dir, || socket.exists())?;
        Ok(serving)
    }

    fn spawn(mut command: Command, target: Target, socket: &Path, dir: &Path) -> Result<Self> {
        let _ = std::fs::remove_file(socket);
        let log = File::create(dir.join("server.log"))?;
        let program = command.get_program().to_string_lossy().into_owned();
        let server = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {program}"))?;
        Ok(Serving { target, server: Some(server), device: None })
    }

    fn wait_until(&mut self, dir: &Path, ready: impl Fn() -> bool) -> Result<()> {
        let start = Instant::now();
        while !ready() {
            let ended = self.server.as_mut().map(Child::try_wait).transpose()?.flatten();
            if ended.is_some() || start.elapsed() > Duration::from_secs(10) {
                let said = std::fs::read_to_string(dir.join("server.log")).unwrap_or_default();
                bail!("the server does not serve: {}", said.trim());
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Where it serves vhost-user.
    pub(crate) fn socket(&self) -> Option<&Path> {
        match &self.target {
            Target::VhostUser(socket) => Some(socket),
            _ => None,
        }
    }

    /// The server, where it is a process.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.server.as_ref().map(Child::id)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            stop(server);
        }
        if let Some(device) = &self.device {
            let _ = Command::new("losetup").arg("--detach").arg(device).status();
        }
    }
}

/// Ends a server: politely, and after five seconds not so.
pub(crate) fn stop(server: &mut Child) {
    let _ = kill_process(Pid::from_child(server), Signal::TERM);
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        if !matches!(server.try_wait(), Ok(None)) {
            return;
        }
        thread::sleep(Duration::from_millis(2));
    }
    let _ = server.kill();
    let _ = server.wait();
}
