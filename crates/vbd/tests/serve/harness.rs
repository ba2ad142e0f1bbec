//! The command under test, each test in a directory and a runtime directory of its own.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Far more than anything here takes: only a server that hangs takes as long.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const MIB: u64 = 1 << 20;

/// How a command ended, and what it said.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    /// Checks that it succeeded, and gives what it said.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert!(self.status.success(), "{self:?}");
        self.stdout
    }

    /// Checks that it failed with this exit code and a message that has each of `words` in it.
    #[track_caller]
    pub(crate) fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.status.code(), Some(code), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is missing in: {}", self.stderr);
        }
    }

    /// What it said, as JSON.
    #[track_caller]
    pub(crate) fn json(self) -> serde_json::Value {
        serde_json::from_str(&self.ok()).expect("JSON")
    }
}

pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        let scratch = Scratch(tempfile::Builder::new().prefix("vbd").tempdir().unwrap());
        fs::create_dir(scratch.path("run")).unwrap();
        scratch
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The runtime directory of the commands.
    pub(crate) fn runtime(&self) -> PathBuf {
        self.path("run/vbd")
    }

    pub(crate) fn sparse(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        fs::File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vbd"));
        command.current_dir(self.0.path()).env("XDG_RUNTIME_DIR", self.path("run")).env_remove("VBD_LOG");
        command.env_remove("NOTIFY_SOCKET").stdin(Stdio::null());
        command
    }

    /// Runs a verb to its end.
    pub(crate) fn vbd<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Ended {
        run(self.command().args(arguments))
    }

    /// Starts a verb that serves, and waits until it has said `lines` lines.
    pub(crate) fn serve<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
        lines: usize,
    ) -> Server {
        Server::start(self.command().args(arguments), lines)
    }

    /// Serves a sparse file of 16 MiB over NBD, at `NAME.sock`.
    pub(crate) fn nbd(&self, name: &str, more: &[&str]) -> Server {
        let file = self.path(name);
        if !file.exists() {
            self.sparse(name, 16 * MIB);
        }
        let address = format!("unix:{name}.sock");
        let arguments = ["attach", name, "--nbd", &address].into_iter().chain(more.iter().copied());
        self.serve(arguments, 1)
    }

    /// The address of an export that [`nbd`](Self::nbd) serves.
    pub(crate) fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.path(&format!("{name}.sock")).display())
    }

    /// Runs commands of qemu-io on an export.
    pub(crate) fn qemu_io(&self, name: &str, commands: &[&str]) -> Ended {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]);
        commands.iter().for_each(|line| {
            command.args(["-c", line]);
        });
        run(command.arg(self.uri(name)))
    }

    /// The control sockets that there are.
    pub(crate) fn control_sockets(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.runtime()) else { return Vec::new() };
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("control-")).collect()
    }
}

/// Runs a command to its end; kills it when that takes too long.
pub(crate) fn run(command: &mut Command) -> Ended {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut server = Server::watch(child);
    let status = server.wait();
    let stdout = server.out.take().map(|out| out.iter().collect()).unwrap_or_default();
    Ended { status, stdout, stderr: server.stderr() }
}

/// A running process; killed when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) ready: Vec<String>,
    out: Option<Receiver<String>>,
    err: Option<JoinHandle<String>>,
}

impl Server {
    pub(crate) fn start(command: &mut Command, lines: usize) -> Self {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut server = Server::watch(child);
        for _ in 0..lines {
            let line = server.out.as_ref().and_then(|out| out.recv_timeout(PATIENCE).ok());
            let Some(line) = line else {
                let _ = server.child.kill();
                let stderr = server.stderr();
                panic!("not ready: {:?}: {stderr}", server.ready);
            };
            server.ready.push(line.trim_end().to_owned());
        }
        server
    }

    fn watch(mut child: Child) -> Self {
        let (sender, out) = channel();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            let mut line = String::new();
            while stdout.read_line(&mut line).is_ok_and(|read| read > 0) {
                let _ = sender.send(std::mem::take(&mut line));
            }
        });
        let mut stderr = child.stderr.take().unwrap();
        let err = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Server { child, ready: Vec::new(), out: Some(out), err: Some(err) }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            if Instant::now() > end {
                let _ = self.child.kill();
                panic!("it does not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks it to stop and waits for its end.
    pub(crate) fn stop(mut self) -> Ended {
        self.signal(Signal::TERM);
        let status = self.wait();
        let stdout = self.out.take().map(|out| out.iter().collect()).unwrap_or_default();
        Ended { status, stdout, stderr: self.stderr() }
    }

    /// Ends it as `kill -9` does.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn stderr(&mut self) -> String {
        self.err.take().map(|err| err.join().unwrap()).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a request to a control socket as it is, and gives the status and the body.
pub(crate) fn http(socket: &Path, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: vbd\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, body.to_owned())
}
