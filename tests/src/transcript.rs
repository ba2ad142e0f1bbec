//! What a process has said so far, and waiting for it to say something.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How much of the end of a transcript an error quotes, in bytes.
const QUOTED: usize = 2000;

#[derive(Default)]
struct Said {
    text: Vec<u8>,
    /// Everything before this has been waited for.
    read: usize,
    closed: bool,
}

/// The output of one process, collected by a thread as it comes.
#[derive(Clone, Default)]
pub struct Transcript {
    shared: Arc<(Mutex<Said>, Condvar)>,
}

impl Transcript {
    /// Collects all that `source` gives, until its end.
    pub fn of(mut source: impl Read + Send + 'static) -> Self {
        let transcript = Self::default();
        let writer = transcript.clone();
        thread::spawn(move || {
            let mut piece = [0; 4096];
            loop {
                let length = match source.read(&mut piece) {
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Ok(0) | Err(_) => break,
                    Ok(length) => length,
                };
                writer.said().text.extend_from_slice(&piece[..length]);
                writer.shared.1.notify_all();
            }
            writer.said().closed = true;
            writer.shared.1.notify_all();
        });
        transcript
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `text` is said after what was waited for before; gives what was said up to and with it.
    ///
    /// # Errors
    /// When `limit` passes first, or the process closes its output; the error quotes the last of it.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        let mut said = self.said();
        loop {
            let new = &said.text[said.read..];
            if let Some(at) = find(new, text.as_bytes()) {
                let upto = at + text.len();
                let found = String::from_utf8_lossy(&new[..upto]).into_owned();
                said.read += upto;
                return Ok(found);
            }
            let left = end.saturating_duration_since(Instant::now());
            if said.closed || left.is_zero() {
                let why = if said.closed { "the output ended" } else { "nothing came in time" };
                bail!("waited for {text:?}, but {why}; the last of it was:\n{}", tail(&said.text));
            }
            said = self.shared.1.wait_timeout(said, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for the end of the output, at most `limit`, and gives all of it.
    pub fn finish(&self, limit: Duration) -> String {
        let said = self.said();
        let (said, _) = self
            .shared
            .1
            .wait_timeout_while(said, limit, |said| !said.closed)
            .unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&said.text).into_owned()
    }

    /// What was said after what was waited for.
    pub fn unread(&self) -> String {
        let said = self.said();
        String::from_utf8_lossy(&said.text[said.read..]).into_owned()
    }

    /// All that was said so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.said().text).into_owned()
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

fn tail(text: &[u8]) -> String {
    String::from_utf8_lossy(&text[text.len().saturating_sub(QUOTED)..]).into_owned()
}
