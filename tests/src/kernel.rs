//! Debian's 6.12 cloud kernel, unpacked and not installed.

use std::cmp::Reverse;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use crate::{cache_dir, run, run_ok};

/// A download and an unpacking each end within this.
const LIMIT: Duration = Duration::from_secs(300);

/// A kernel that guests boot, with its modules.
#[derive(Clone, Debug)]
pub struct Kernel {
    dir: PathBuf,
}

impl Kernel {
    /// Takes the kernel from `target/vm/kernel`; the first time, downloads the newest 6.12 cloud kernel
    /// among apt's sources and unpacks it there, which needs no root.
    ///
    /// # Errors
    /// When apt knows of no such kernel, or the download fails.
    pub fn get() -> Result<Self> {
        let cache = cache_dir()?;
        let kernel = Self { dir: cache.join("kernel") };
        let lock = File::create(cache.join("kernel.lock"))?;
        flock(&lock, FlockOperation::LockExclusive)?;
        if !kernel.dir.exists() {
            let unpacked = tempfile::tempdir_in(&cache)?;
            download(unpacked.path())?;
            fs::rename(unpacked.path(), &kernel.dir)?;
        }
        Ok(kernel)
    }

    /// Whether it was downloaded before.
    pub fn is_cached() -> Result<bool> {
        Ok(cache_dir()?.join("kernel").exists())
    }

    /// The kernel's image.
    ///
    /// # Errors
    /// When the cached directory is not whole.
    pub fn image(&self) -> Result<PathBuf> {
        only(&self.dir.join("boot"), "vmlinuz-")
    }

    /// The bytes of the module `name`, unpacked.
    ///
    /// # Errors
    /// When this kernel has no such module.
    pub fn module(&self, name: &str) -> Result<Vec<u8>> {
        let modules = only(&self.dir.join("lib/modules"), "")?;
        let order = fs::read_to_string(modules.join("modules.order"))?;
        // modules.order says `kernel/…/virtio_blk.ko`; the file carries the suffix of its compression.
        let wanted = format!("/{name}.ko");
        let Some(path) = order.lines().find(|line| line.ends_with(&wanted)) else {
            bail!("{}: no module {name}", modules.display());
        };
        let packed = modules.join(format!("{path}.xz"));
        let output =
            std::process::Command::new("xz").args(["--decompress", "--stdout"]).arg(&packed).output()?;
        if !output.status.success() {
            bail!("unpacking {}: {}", packed.display(), String::from_utf8_lossy(&output.stderr));
        }
        Ok(output.stdout)
    }
}

/// Downloads a kernel package and unpacks it into `dir`.
fn download(dir: &Path) -> Result<()> {
    let names = run_ok("apt-cache", ["pkgnames", "linux-image-6.12."], LIMIT)?;
    let mut packages: Vec<&str> = names.lines().filter(|name| name.ends_with("-cloud-amd64")).collect();
    packages.sort_by_cached_key(|name| Reverse(version(name)));
    let mut why = String::from("apt's sources have none (`cargo xtask setup` adds the suite that does)");
    for package in packages {
        // The sandbox user may not write here; root downloads as itself.
        let script =
            "cd \"$1\" && apt-get -o APT::Sandbox::User=root -q download \"$2\" && dpkg-deb -x ./*.deb .";
        let arguments = ["-c", script, "sh", &dir.to_string_lossy(), package];
        let finished = run("sh", arguments, LIMIT)?;
        if finished.status.success() {
            return remove_archive(dir);
        }
        why = finished.stderr;
    }
    bail!("no 6.12 cloud kernel could be downloaded: {why}")
}

fn remove_archive(dir: &Path) -> Result<()> {
    let archive = fs::read_dir(dir)?.filter_map(Result::ok).map(|entry| entry.path());
    for path in archive.filter(|path| path.extension().is_some_and(|extension| extension == "deb")) {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// The numbers in a package's name, in their order: 6.12.100 is newer than 6.12.95.
fn version(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

/// The one entry of `dir` whose name begins with `prefix`.
fn only(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    bail!("{}: nothing named {prefix}* (remove target/vm to make it anew)", dir.display())
}
