//! `mke2fs -d`, and `debugfs` for what it leaves out.

use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use super::{Builder, Format, Superblock};
use crate::error::Context;
use crate::meter::{Geometry, Room};
use crate::process::{Running, e2fsprogs};
use crate::sys::{self, View};
use crate::{Error, Progress, Result};

/// The image as the program's standard input: it may have no name.
const IMAGE: &str = "/proc/self/fd/0";
/// Bytes in a block. mke2fs would take 1 KiB for small images, which aligns with no modern storage.
const BLOCK_SIZE: &str = "4096";
/// Bytes in an inode: room for dates after 2038 and for capabilities.
const INODE_SIZE: &str = "256";

/// Builds with the programs of e2fsprogs.
pub(crate) struct Mke2fs;

fn mke2fs(format: &Format, image: &File) -> Result<Command> {
    let mut command = e2fsprogs("mke2fs");
    command.stdin(image.try_clone().at("open", Path::new("the image"))?);
    command.args(["-q", "-F", "-t", format.filesystem.name(), "-b", BLOCK_SIZE, "-I", INODE_SIZE]);
    if let Some(label) = &format.label {
        command.args(["-L", label]);
    }
    if let Some(uuid) = &format.uuid {
        command.args(["-U", uuid]);
    }
    if let Some(percent) = format.reserved_percent {
        command.args(["-m", &percent.to_string()]);
    }
    if let Some(inodes) = format.inodes {
        command.args(["-N", &inodes.to_string()]);
    }
    command.args(&format.arguments);
    Ok(command)
}

impl Builder for Mke2fs {
    fn capacity(
        &self,
        format: &Format,
        size: u64,
        scratch: &Path,
        progress: &mut dyn Progress,
    ) -> Result<(Geometry, Room)> {
        let image = tempfile::tempfile_in(scratch).at("make a file in", scratch)?;
        image.set_len(size).at("make a file as large as the image in", scratch)?;
        let mut command = mke2fs(format, &image)?;
        command.arg(IMAGE);
        Running::start(&mut command, "e2fsprogs")?.wait(progress, |_| {})?;
        let superblock = Superblock::read(&image).at("read the filesystem made in", scratch)?;
        Ok((superblock.geometry(), superblock.free))
    }

    fn write(
        &self,
        format: &Format,
        image: &File,
        tree: &Path,
        scratch: &Path,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let mut command = mke2fs(format, image)?;
        command.arg("-d").arg(tree).arg(IMAGE);
        let mut seen = 0;
        Running::start(&mut command, "e2fsprogs")?.wait(progress, |progress| {
            let now = image.metadata().map_or(0, |m| m.blocks() * 512);
            progress.advance(now.saturating_sub(seen));
            seen = seen.max(now);
        })?;
        root_attributes(image, tree, scratch, progress)
    }
}

/// mke2fs gives the root directory attributes of its own: these are the tree's.
fn root_attributes(image: &File, tree: &Path, scratch: &Path, progress: &mut dyn Progress) -> Result<()> {
    let dir = File::open(tree).at("open", tree)?;
    let stat =
        sys::stat_at(std::os::fd::AsFd::as_fd(&dir), "".as_ref(), View::Library).at("look at", tree)?;
    // Seconds as mke2fs writes them, without those beyond 32 bits.
    let seconds = stat.mtime.seconds.clamp(i32::MIN.into(), i32::MAX.into());
    let mut script = String::new();
    let mode = 0o40000 | stat.mode & 0o7777;
    for (field, value) in [
        ("mode", format!("0{mode:o}")),
        ("uid", stat.uid.to_string()),
        ("gid", stat.gid.to_string()),
        ("atime", format!("@{seconds}")),
        ("mtime", format!("@{seconds}")),
        ("ctime", format!("@{seconds}")),
    ] {
        // Writing to a String cannot fail.
        let _ = writeln!(script, "set_inode_field / {field} {value}");
    }
    let path = scratch.join("root.debugfs");
    std::fs::write(&path, script).at("write", &path)?;
    let mut command = e2fsprogs("debugfs");
    command.stdin(image.try_clone().at("open", Path::new("the image"))?);
    command.args(["-w", "-f"]).arg(&path).arg(IMAGE);
    Running::start(&mut command, "e2fsprogs")?.wait(progress, |_| {})?;
    Ok(())
}

/// Whether mke2fs failed because the tree is larger than the filesystem.
pub(crate) fn is_full(error: &Error) -> bool {
    matches!(error, Error::Tool { program, stderr, .. }
        if program == "mke2fs" && (stderr.contains("Could not allocate") || stderr.contains("No free space")))
}
