//! A machine with Xen, for tests: emulated, with a Debian dom0 and PV guests in it. `tests/xen-lab` builds and boots it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{Scratch, Transcript, run_ok, target_dir, vbd};

/// How long the packages may take to come: many times what they need.
const BUILD: Duration = Duration::from_secs(1200);

/// The lab, built.
pub struct XenLab {
    scripts: PathBuf,
    dir: PathBuf,
}

impl XenLab {
    /// The lab of this build directory (`target/xen-lab`), made if it is not there or its scripts have changed. That
    /// takes root, and packages from the network once.
    ///
    /// # Errors
    /// When it cannot be made; the error says what is missing.
    pub fn get() -> Result<Self> {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("xen-lab");
        let dir = target_dir().join("xen-lab");
        if rustix::process::geteuid().is_root() {
            let build = [Path::new("--with-qdisk"), &dir];
            run_ok(scripts.join("build"), build, BUILD).context("building the Xen lab")?;
        }
        ensure!(
            dir.join("images.stamp").exists(),
            "there is no Xen lab in {}, and making it takes root: sudo {} --with-qdisk {0}",
            dir.display(),
            scripts.join("build").display(),
        );
        Ok(Self { scripts, dir })
    }

    /// Boots the lab on a throw-away disk, where `tests/xen-lab/cases/CASE` runs beside the command under test.
    /// Gives the serial log.
    ///
    /// # Errors
    /// When the case fails, or takes longer than `limit`; the error carries the end of the log.
    pub fn run(&self, case: &str, more: &[&Path], limit: Duration) -> Result<String> {
        self.boot(&self.scripts.join("cases").join(case), vbd(), more, limit)
    }

    /// The comparison of `tests/xen-lab/bench`, as [`XenLab::run`], with the command to be measured.
    ///
    /// # Errors
    /// As [`XenLab::run`].
    pub fn bench(&self, vbd: &Path, more: &[&Path], limit: Duration) -> Result<String> {
        self.boot(&self.scripts.join("bench"), vbd, more, limit)
    }

    fn boot(&self, script: &Path, vbd: &Path, more: &[&Path], limit: Duration) -> Result<String> {
        let scratch = Scratch::new()?;
        let command = scratch.path("vbd");
        // Nine tenths of it are for debuggers, and dom0's disk is slow.
        run_ok("strip", ["-o".as_ref(), command.as_os_str(), vbd.as_os_str()], Duration::from_secs(60))?;
        let mut boot = crate::command(self.scripts.join("boot"));
        boot.arg(&self.dir).arg(script).arg(&command).args(more);
        boot.env("TIMEOUT", limit.as_secs().to_string());
        let mut process = crate::Process::spawn(boot)?;
        let status = process.wait(limit + Duration::from_secs(30))?;
        let log: Transcript = process.stdout.clone();
        let log = log.finish(Duration::from_secs(5));
        ensure!(status.success(), "{}: {status}\n{log}{}", script.display(), process.stderr.text());
        Ok(log)
    }
}
