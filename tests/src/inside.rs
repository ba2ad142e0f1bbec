//! vbd inside a guest.

use anyhow::{Context, Result};

use crate::Guest;

impl Guest {
    /// A verb of vbd with its arguments, as a line for [`Guest::sh`].
    pub fn vbd(line: &str) -> String {
        // Found in its own directory, with the libraries that it was linked to.
        format!("/vbd/ld.so --library-path /vbd /vbd/vbd {line}")
    }

    /// Starts `vbd attach` in the background, its control socket `/run/vbd.sock`; comes back when its disk is ready,
    /// with its process's number. What it says is in `/tmp/out` and `/tmp/err`.
    ///
    /// # Errors
    /// When it ends instead.
    pub fn attach(&mut self, arguments: &str) -> Result<u32> {
        self.background(&Self::vbd(&format!("attach {arguments} --control /run/vbd.sock")))
    }

    /// The same for any line that starts it.
    ///
    /// # Errors
    /// When it ends instead.
    pub fn background(&mut self, line: &str) -> Result<u32> {
        self.sh(&format!("rm -f /tmp/out; {line} >/tmp/out 2>/tmp/err & echo $! >/tmp/pid"))?;
        let wait = "for i in $(seq 600); do [ -s /tmp/out ] && break; kill -0 $(cat /tmp/pid) || break; sleep 0.1; done";
        self.sh(&format!("{wait}; cat /tmp/err; [ -s /tmp/out ]"))?;
        self.sh("cat /tmp/pid")?.trim().parse().context("a process's number")
    }

    /// Asks it to stop and waits for its end; gives its exit status.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&mut self, pid: u32) -> Result<i32> {
        let outcome = self.try_sh(&format!("kill -TERM {pid}; wait {pid}; echo $?; cat /tmp/err"))?;
        let (status, _) = outcome.output.split_once('\n').context("a status")?;
        status.parse().with_context(|| outcome.output.clone())
    }
}
