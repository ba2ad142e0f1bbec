//! Sockets without waiting: bytes as they are, or through TLS.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustls::ServerConnection;
use vbd_core::IoVec;

/// Ciphertext that is read from a socket at once, in bytes.
const CIPHERTEXT: usize = 64 << 10;
/// Plaintext that is taken for encryption at once, in bytes.
const PLAINTEXT: usize = 256 << 10;

/// What came of receiving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// So many bytes; more may be there.
    Bytes(usize),
    /// So many bytes, and no more at the moment.
    Last(usize),
    /// Nothing at the moment.
    Nothing,
    /// The peer has closed.
    Closed,
}

/// How bytes go through a connection's socket.
pub(crate) enum Transport {
    Plain,
    Tls(Box<Tls>),
}

/// A TLS session on the server's side.
pub(crate) struct Tls {
    session: ServerConnection,
    /// Ciphertext from the socket: `start..end` is still to be decrypted.
    incoming: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Tls {
    pub(crate) fn new(mut session: ServerConnection) -> Self {
        session.set_buffer_limit(Some(PLAINTEXT));
        Tls { session, incoming: vec![0; CIPHERTEXT].into(), start: 0, end: 0 }
    }

    fn receive(&mut self, fd: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Received> {
        loop {
            match self.session.reader().read(into) {
                // The peer has said goodbye.
                Ok(0) => return Ok(Received::Closed),
                Ok(count) => return Ok(Received::Bytes(count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if self.start == self.end {
                match receive(fd, &mut self.incoming)? {
                    Some(0) => return Ok(Received::Closed),
                    Some(count) => (self.start, self.end) = (0, count),
                    None => return Ok(Received::Nothing),
                }
            }
            let mut rest = &self.incoming[self.start..self.end];
            self.session.read_tls(&mut rest)?;
            self.start = self.end - rest.len();
            let processed = self.session.process_new_packets();
            // The handshake's answers, and alerts about what was wrong.
            let flushed = self.flush(fd);
            processed.map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
            flushed?;
        }
    }

    fn send(&mut self, fd: BorrowedFd<'_>, pieces: &[IoVec]) -> io::Result<usize> {
        let mut taken = 0;
        for piece in pieces {
            // SAFETY: the caller keeps the pieces valid.
            let bytes = unsafe { std::slice::from_raw_parts(piece.iov_base.cast::<u8>(), piece.iov_len) };
            let mut rest = bytes;
            while !rest.is_empty() {
                let count = self.session.writer().write(rest)?;
                taken += count;
                rest = &rest[count..];
                if count == 0 && !self.flush(fd)? {
                    return Ok(taken);
                }
            }
        }
        self.flush(fd)?;
        Ok(taken)
    }

    /// Sends ciphertext; false where the socket takes no more.
    fn flush(&mut self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        while self.session.wants_write() {
            match self.session.write_tls(&mut Socket(fd)) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

impl Transport {
    /// Receives into `into` without waiting.
    pub(crate) fn receive(&mut self, fd: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Received> {
        match self {
            Transport::Tls(tls) => tls.receive(fd, into),
            Transport::Plain => Ok(match receive(fd, into)? {
                None => Received::Nothing,
                Some(0) => Received::Closed,
                Some(count) if count < into.len() => Received::Last(count),
                Some(count) => Received::Bytes(count),
            }),
        }
    }

    /// Sends without waiting: how many bytes of the pieces are gone, 0 where the socket takes no more.
    ///
    /// # Safety
    /// The pieces are valid.
    pub(crate) unsafe fn send(&mut self, fd: BorrowedFd<'_>, pieces: &[IoVec]) -> io::Result<usize> {
        match self {
            Transport::Tls(tls) => tls.send(fd, pieces),
            // SAFETY: by this function's own contract.
            Transport::Plain => unsafe { send(fd, pieces) },
        }
    }

    /// Whether something that was taken is still to be sent.
    pub(crate) fn has_pending(&self) -> bool {
        matches!(self, Transport::Tls(tls) if tls.session.wants_write())
    }

    /// Sends what was taken; false where the socket takes no more.
    pub(crate) fn flush(&mut self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        match self {
            Transport::Tls(tls) => tls.flush(fd),
            Transport::Plain => Ok(true),
        }
    }

    /// Says goodbye, as far as that goes without waiting.
    pub(crate) fn close(&mut self, fd: BorrowedFd<'_>) {
        if let Transport::Tls(tls) = self {
            tls.session.send_close_notify();
            let _ = tls.flush(fd);
        }
        let _ = rustix::net::shutdown(fd, rustix::net::Shutdown::Both);
    }
}

/// recv(2): none where nothing is there.
fn receive(fd: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        // SAFETY: the buffer is borrowed for writing.
        let count =
            unsafe { libc::recv(fd.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), libc::MSG_DONTWAIT) };
        if let Ok(count) = usize::try_from(count) {
            return Ok(Some(count));
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            ErrorKind::Interrupted => {}
            ErrorKind::WouldBlock => return Ok(None),
            _ => return Err(error),
        }
    }
}

/// sendmsg(2): 0 where the socket takes no more.
///
/// # Safety
/// The pieces are valid.
unsafe fn send(fd: BorrowedFd<'_>, pieces: &[IoVec]) -> io::Result<usize> {
    // SAFETY: all zeroes is a message without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_ptr().cast_mut();
    message.msg_iovlen = pieces.len();
    loop {
        // SAFETY: the pieces are valid by this function's own contract, and only read.
        let count = unsafe {
            libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        };
        if let Ok(count) = usize::try_from(count) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            ErrorKind::Interrupted => {}
            ErrorKind::WouldBlock => return Ok(0),
            _ => return Err(error),
        }
    }
}

/// A socket as rustls writes to it.
struct Socket<'a>(BorrowedFd<'a>);

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let slices = &slices[..slices.len().min(64)];
        // SAFETY: an IoSlice is guaranteed to be an iovec, and what it borrows is valid.
        let sent = unsafe {
            send(self.0, std::slice::from_raw_parts(slices.as_ptr().cast::<IoVec>(), slices.len()))
        }?;
        if sent == 0 && slices.iter().any(|slice| !slice.is_empty()) {
            return Err(ErrorKind::WouldBlock.into());
        }
        Ok(sent)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
