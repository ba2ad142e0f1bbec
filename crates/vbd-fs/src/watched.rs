//! Archives that come slowly.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::Cancel;

/// A file or pipe whose reader can be stopped while it waits.
pub(crate) struct Watched {
    pub(crate) file: File,
    /// Who may want to stop it.
    pub(crate) cancel: [Cancel; 2],
}

impl Read for Watched {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let tick = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        loop {
            if self.cancel.iter().any(Cancel::requested) {
                return Err(io::Error::other("interrupted"));
            }
            let mut fds = [PollFd::from_borrowed_fd(self.file.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&tick)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return self.file.read(buffer),
                Err(e) => return Err(e.into()),
            }
        }
    }
}
