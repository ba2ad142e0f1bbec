//! A connection to xenstored: its socket, or the kernel's device where xenstored is in another domain.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::wire::{self, Message, kind};
use super::{Store, Stores, WatchEvent};

/// Where xenstored listens.
pub(super) const SOCKETS: [&str; 2] = ["/run/xenstored/socket", "/var/run/xenstored/socket"];
/// The kernel's way to it.
pub(super) const DEVICES: [&str; 2] = ["/dev/xen/xenbus", "/proc/xen/xenbus"];
/// After this xenstored is as good as gone.
const PATIENCE: Duration = Duration::from_secs(10);
/// Attempts of a transaction that others get in the way of.
const ATTEMPTS: u32 = 100;

/// xenstored, wherever it is.
pub(super) struct Xenstored;

impl Stores for Xenstored {
    fn connect(&self) -> io::Result<Box<dyn Store>> {
        let mut last = io::Error::from_raw_os_error(libc::ENOENT);
        for path in SOCKETS {
            match UnixStream::connect(path) {
                Ok(stream) => return Ok(Box::new(Connection::new(stream.into())?)),
                Err(error) => last = named(path, &error),
            }
        }
        for path in DEVICES {
            match std::fs::File::options().read(true).write(true).open(path) {
                Ok(file) => return Ok(Box::new(Connection::new(file.into())?)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => last = named(path, &error),
            }
        }
        Err(last)
    }
}

fn named(path: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{path}: {error}"))
}

struct Connection {
    fd: OwnedFd,
    received: Vec<u8>,
    events: VecDeque<WatchEvent>,
    request: u32,
}

impl Connection {
    fn new(fd: OwnedFd) -> io::Result<Connection> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Connection { fd, received: Vec::new(), events: VecDeque::new(), request: 0 })
    }

    fn wait(&self, what: PollFlags, until: Instant) -> io::Result<()> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "xenstored does not answer"));
        }
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&self.fd, what)], timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let until = Instant::now() + PATIENCE;
        while !bytes.is_empty() {
            match rustix::io::write(&self.fd, bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(rustix::io::Errno::AGAIN) => self.wait(PollFlags::OUT, until)?,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// A message, if one has arrived. Events are put aside.
    fn receive(&mut self) -> io::Result<Option<Message>> {
        let mut ended = false;
        loop {
            if let Some(message) = wire::decode(&mut self.received)? {
                if message.kind != kind::WATCH_EVENT {
                    return Ok(Some(message));
                }
                let mut texts = wire::texts(&message.payload);
                if let (Some(path), Some(token)) = (texts.next(), texts.next()) {
                    self.events.push_back(WatchEvent { path, token });
                }
                continue;
            }
            if ended {
                return Ok(None);
            }
            let mut buffer = [0; 4096];
            match rustix::io::read(&self.fd, &mut buffer) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "xenstored has ended")),
                Ok(len) => self.received.extend(&buffer[..len]),
                Err(rustix::io::Errno::AGAIN) => ended = true,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn ask(&mut self, kind: u32, transaction: u32, parts: &[&[u8]]) -> io::Result<Vec<u8>> {
        self.request = self.request.wrapping_add(1);
        let request = self.request;
        self.send(&wire::encode(kind, request, transaction, parts)?)?;
        let until = Instant::now() + PATIENCE;
        loop {
            match self.receive()? {
                Some(answer) if answer.request != request => {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "xenstored answers what was not asked",
                    ));
                }
                Some(answer) if answer.kind == kind::ERROR => return Err(wire::error(&answer.payload)),
                Some(answer) => return Ok(answer.payload),
                None => self.wait(PollFlags::IN, until)?,
            }
        }
    }

    fn ask_path(&mut self, kind: u32, transaction: u32, path: &str) -> io::Result<Option<Vec<u8>>> {
        seen(self.ask(kind, transaction, &[path.as_bytes(), b"\0"]))
    }

    /// Names that do not fit into one message, part by part.
    fn list_parts(&mut self, path: &str) -> io::Result<Option<Vec<String>>> {
        let (mut names, mut generation, mut offset) = (Vec::new(), None, 0usize);
        loop {
            let place = offset.to_string();
            let parts = [path.as_bytes(), b"\0", place.as_bytes(), b"\0"];
            let Some(answer) = seen(self.ask(kind::DIRECTORY_PART, 0, &parts))? else { return Ok(None) };
            let mut texts = wire::texts(&answer);
            let now = texts.next();
            if generation.is_some() && generation != now {
                // It has changed meanwhile.
                (names, generation, offset) = (Vec::new(), None, 0);
                continue;
            }
            generation = now;
            let before = offset;
            for name in texts {
                if name.is_empty() {
                    return Ok(Some(names));
                }
                offset += name.len() + 1;
                names.push(name);
            }
            if offset == before {
                return Ok(Some(names));
            }
        }
    }

    /// Does `work` in a transaction, again where others got in between.
    fn transaction<T>(&mut self, mut work: impl FnMut(&mut Self, u32) -> io::Result<T>) -> io::Result<T> {
        for _ in 0..ATTEMPTS {
            let started = self.ask(kind::TRANSACTION_START, 0, &[b"\0"])?;
            let number = started.strip_suffix(b"\0").unwrap_or(&started);
            let number = std::str::from_utf8(number).ok().and_then(|number| number.parse().ok());
            let number = number.ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "a transaction without a number")
            })?;
            let result = work(self, number);
            let end: &[u8] = if result.is_ok() { b"T\0" } else { b"F\0" };
            match (self.ask(kind::TRANSACTION_END, number, &[end]), result) {
                (Ok(_), result) => return result,
                (Err(error), Ok(_)) if is(&error, libc::EAGAIN) => {}
                (Err(error), _) => return Err(error),
            }
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "others write all the time"))
    }

    fn write_all(&mut self, transaction: u32, entries: &[(String, String)]) -> io::Result<()> {
        for (path, value) in entries {
            self.ask(kind::WRITE, transaction, &[path.as_bytes(), b"\0", value.as_bytes()])?;
        }
        Ok(())
    }
}

/// An answer about a key, if there is one to be seen. A driver domain may not see all of another domain's keys, and each
/// domain decides who sees those of its front-end.
fn seen(answer: io::Result<Vec<u8>>) -> io::Result<Option<Vec<u8>>> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if is(&error, libc::ENOENT) || is(&error, libc::EACCES) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is(error: &io::Error, number: i32) -> bool {
    error.raw_os_error() == Some(number)
}

impl Store for Connection {
    fn read(&mut self, path: &str) -> io::Result<Option<Vec<u8>>> {
        self.ask_path(kind::READ, 0, path)
    }

    fn list(&mut self, path: &str) -> io::Result<Option<Vec<String>>> {
        match self.ask_path(kind::DIRECTORY, 0, path) {
            Ok(answer) => {
                Ok(answer.map(|answer| wire::texts(&answer).filter(|name| !name.is_empty()).collect()))
            }
            Err(error) if is(&error, libc::E2BIG) => self.list_parts(path),
            Err(error) => Err(error),
        }
    }

    fn write(&mut self, entries: &[(String, String)]) -> io::Result<()> {
        self.transaction(|store, transaction| store.write_all(transaction, entries))
    }

    fn write_if(&mut self, guard: &str, entries: &[(String, String)]) -> io::Result<bool> {
        self.transaction(|store, transaction| {
            let there = store.ask_path(kind::READ, transaction, guard)?.is_some();
            if there {
                store.write_all(transaction, entries)?;
            }
            Ok(there)
        })
    }

    fn remove(&mut self, path: &str) -> io::Result<()> {
        match self.ask(kind::RM, 0, &[path.as_bytes(), b"\0"]) {
            Err(error) if is(&error, libc::ENOENT) => Ok(()),
            answer => answer.map(|_| ()),
        }
    }

    fn watch(&mut self, path: &str, token: &str) -> io::Result<()> {
        match self.ask(kind::WATCH, 0, &[path.as_bytes(), b"\0", token.as_bytes(), b"\0"]) {
            Err(error) if is(&error, libc::EEXIST) => Ok(()),
            answer => answer.map(|_| ()),
        }
    }

    fn unwatch(&mut self, path: &str, token: &str) -> io::Result<()> {
        self.ask(kind::UNWATCH, 0, &[path.as_bytes(), b"\0", token.as_bytes(), b"\0"]).map(|_| ())
    }

    fn event(&mut self) -> io::Result<Option<WatchEvent>> {
        if self.events.is_empty() && self.receive()?.is_some() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "xenstored answers what was not asked"));
        }
        Ok(self.events.pop_front())
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
#[path = "xenstore_tests.rs"]
mod tests;
