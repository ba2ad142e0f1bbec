//! A disk with the programs that guests need and busybox has not.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

use crate::{Scratch, cache_dir, run_ok};

const PROGRAMS: [&str; 6] =
    ["/usr/bin/fio", "/sbin/mke2fs", "/sbin/e2fsck", "/sbin/resize2fs", "/sbin/losetup", "/sbin/blkdiscard"];
const LIMIT: Duration = Duration::from_secs(120);

/// Where the tools disk has the program `name`; whole paths, since busybox would run an applet of its own.
pub(crate) fn tool_path(name: &str) -> Option<&'static str> {
    PROGRAMS.into_iter().find(|path| path.rsplit('/').next() == Some(name))
}

/// An ext4 image of the host's fio and e2fsprogs with their libraries, made once in `target/vm`.
///
/// # Errors
/// When a program is missing here, or the image cannot be made.
pub fn tools_disk() -> Result<PathBuf> {
    let cache = cache_dir()?;
    // By what is in it, so that one made before a program was added is not taken.
    let disk = cache.join(format!("tools-{}.ext4", PROGRAMS.len()));
    let lock = File::create(cache.join("tools.lock"))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    if !disk.exists() {
        let tree = tempfile::tempdir_in(&cache)?;
        let root = tree.path().join("root");
        fill(&root)?;
        let unfinished = tree.path().join("tools.ext4");
        let (root, image) = (root.to_string_lossy(), unfinished.to_string_lossy());
        run_ok(
            "/sbin/mke2fs",
            ["-q", "-t", "ext4", "-O", "^has_journal", "-d", &root, &image, "256M"],
            LIMIT,
        )?;
        fs::rename(&unfinished, &disk)?;
    }
    Ok(disk)
}

fn fill(root: &Path) -> Result<()> {
    let mut files = BTreeSet::new();
    for program in PROGRAMS {
        files.insert(program.to_owned());
        files.extend(libraries(program)?);
    }
    for file in files {
        let to = root.join(&file[1..]);
        fs::create_dir_all(to.parent().context("a file has a directory")?)?;
        fs::copy(&file, &to).with_context(|| format!("copying {file}"))?;
    }
    for dir in ["dev", "proc", "sys", "tmp", "mnt"] {
        fs::create_dir_all(root.join(dir))?;
    }
    Ok(())
}

/// What a program needs to be loaded, the loader too.
fn libraries(program: &str) -> Result<Vec<String>> {
    let said = run_ok("ldd", [program], LIMIT).with_context(|| format!("the libraries of {program}"))?;
    // `libc.so.6 => /lib/libc.so.6 (0x…)`, and `/lib64/ld-linux-x86-64.so.2 (0x…)` for the loader.
    Ok(said.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect())
}

/// An ext4 image of a vbd with its libraries, all in one directory, the loader as `ld.so`.
///
/// # Errors
/// When it cannot be made.
pub(crate) fn vbd_disk(scratch: &Scratch, program: &Path) -> Result<PathBuf> {
    let root = scratch.path("vbd-root");
    fs::create_dir_all(&root)?;
    let program = program.to_string_lossy().into_owned();
    // Without what a debugger reads: it is most of it.
    let to = root.join("vbd").to_string_lossy().into_owned();
    run_ok("strip", ["-o", &to, &program], LIMIT)?;
    for library in libraries(&program)? {
        let name = Path::new(&library).file_name().context("a library has a name")?;
        let name = if name.to_string_lossy().starts_with("ld-linux") { "ld.so".as_ref() } else { name };
        fs::copy(&library, root.join(name)).with_context(|| format!("copying {library}"))?;
    }
    let image = scratch.path("vbd.ext4");
    let (from, to) = (root.to_string_lossy(), image.to_string_lossy());
    run_ok("/sbin/mke2fs", ["-q", "-t", "ext4", "-O", "^has_journal", "-d", &from, &to, "128M"], LIMIT)?;
    Ok(image)
}
