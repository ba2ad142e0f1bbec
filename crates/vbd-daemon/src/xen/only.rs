//! One process serves the domains of a host: two would both take the same devices.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::service::is_running;
use crate::supervisor::LEASE_WAIT;
use crate::{Fault, FaultKind};

/// How often it is looked whether the one before has gone.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The right to serve Xen's domains, until dropped or the process ends.
#[derive(Debug)]
pub(crate) struct OnlyOne {
    _lock: File,
}

impl OnlyOne {
    /// Takes it; `dir` is made where it is not there.
    ///
    /// # Errors
    /// Another process has it; the message says which and what to do.
    pub(crate) fn take(dir: &Path) -> Result<Self, Fault> {
        let path = dir.join("lock");
        let failed = |error: std::io::Error| Fault::failed(path.display(), error);
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        let lock = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let lock = lock.map_err(failed)?;
        // One that was killed has it until the kernel has taken its rings down.
        let deadline = Instant::now() + LEASE_WAIT;
        loop {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let pid = holder(&lock);
                    if pid.is_none_or(is_running) || Instant::now() >= deadline {
                        return Err(taken(pid));
                    }
                    std::thread::sleep(LOOK_AGAIN);
                }
                Err(error) => return Err(failed(error.into())),
            }
        }
        let note = || {
            lock.set_len(0)?;
            lock.write_all_at(format!("{}\n", std::process::id()).as_bytes(), 0)
        };
        note().map_err(failed)?;
        Ok(OnlyOne { _lock: lock })
    }
}

/// The process that has noted its number there.
fn holder(lock: &File) -> Option<u32> {
    let mut text = [0; 16];
    let length = lock.read_at(&mut text, 0).ok()?;
    std::str::from_utf8(&text[..length]).ok()?.trim().parse().ok()
}

fn taken(pid: Option<u32>) -> Fault {
    let pid = pid.map_or_else(|| "of an unknown number".to_owned(), |pid| pid.to_string());
    let message = format!(
        "process {pid} serves the domains of this host already: `vbd xen status` shows them, and `xl block-attach DOMAIN \
         'format=raw,vdev=xvdb,access=rw,script={},target=/path/to/file'` gives it another disk",
        super::SCRIPT
    );
    Fault::new(FaultKind::Exists, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_the_first_is() {
        let dir = tempfile::tempdir().unwrap();
        let xen = dir.path().join("vbd/xen");
        let first = OnlyOne::take(&xen).unwrap();
        let fault = OnlyOne::take(&xen).unwrap_err();
        assert_eq!(fault.kind, FaultKind::Exists);
        let own = format!("process {} serves", std::process::id());
        assert!(fault.message.contains(&own), "{}", fault.message);
        drop(first);
        OnlyOne::take(&xen).unwrap();
    }
}
