//! `mke2fs -d`, and `debugfs` for what it leaves out.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use vbd_image::size::Human;

use super::{Builder, Format, Superblock};
use crate::error::Context;
use crate::meter::{Geometry, Room};
use crate::process::{Running, e2fsprogs};
use crate::sys::{self, View};
use crate::tree::Unstaged;
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

/// Runs a program of e2fsprogs; its complaints say "the image" rather than how it got at it.
fn run(
    command: &mut Command,
    progress: &mut dyn Progress,
    tick: impl FnMut(&mut dyn Progress),
) -> Result<String> {
    Running::start(command, "e2fsprogs")?.wait(progress, tick).map_err(|e| match e {
        Error::Tool { program, status, stderr } => {
            Error::Tool { program, status, stderr: stderr.replace(IMAGE, "the image") }
        }
        other => other,
    })
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
        run(&mut command, progress, |_| {}).map_err(|e| match e {
            Error::Tool { stderr, .. } if stderr.contains("Not enough space") => {
                Error::Invalid(format!("{} are too few for {}", Human(size), format.filesystem))
            }
            other => other,
        })?;
        let superblock = Superblock::read(&image, 0).at("read the filesystem made in", scratch)?;
        Ok((superblock.geometry(), superblock.free))
    }

    fn write(
        &self,
        format: &Format,
        image: &File,
        tree: &Path,
        unstaged: &[Unstaged],
        scratch: &Path,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let mut command = mke2fs(format, image)?;
        command.arg("-d").arg(tree).arg(IMAGE);
        let mut seen = 0;
        run(&mut command, progress, |progress| {
            let now = image.metadata().map_or(0, |m| m.blocks() * 512);
            progress.advance(now.saturating_sub(seen));
            seen = seen.max(now);
        })?;
        let mut script = root_attributes(tree)?;
        for (number, one) in unstaged.iter().enumerate() {
            let value = scratch.join(format!("value{number}"));
            std::fs::write(&value, &one.xattr.1).at("write", &value)?;
            script.push_str(&set_attribute(one, &value)?);
        }
        debugfs(image, &script, scratch, progress)
    }
}

/// mke2fs gives the root directory attributes of its own: these are the tree's.
fn root_attributes(tree: &Path) -> Result<String> {
    let dir = File::open(tree).at("open", tree)?;
    let stat = sys::stat_at(dir.as_fd(), "".as_ref(), View::Library).at("look at", tree)?;
    // Seconds as mke2fs writes them, without those beyond 32 bits.
    let seconds = stat.mtime.seconds.clamp(i32::MIN.into(), i32::MAX.into());
    let mode = 0o40000 | stat.mode & 0o7777;
    let mut script = format!("set_inode_field / mode 0{mode:o}\n");
    for (field, value) in [
        ("uid", i64::from(stat.uid)),
        ("gid", i64::from(stat.gid)),
        ("atime", seconds),
        ("mtime", seconds),
        ("ctime", seconds),
    ] {
        let at = if field.ends_with("time") { "@" } else { "" };
        script.push_str(&format!("set_inode_field / {field} {at}{value}\n"));
    }
    Ok(script)
}

/// The command that sets an attribute to what is in the file `value`.
fn set_attribute(one: &Unstaged, value: &Path) -> Result<String> {
    let path = Path::new("/").join(&one.path);
    let quoted = |text: &OsStr| {
        let text = text.to_str().filter(|text| !text.contains(['\n', '\0']))?;
        Some(format!("\"{}\"", text.replace('"', "\"\"")))
    };
    let words = [value.as_os_str(), path.as_os_str(), &one.xattr.0].map(quoted);
    match words {
        [Some(value), Some(path), Some(name)] => Ok(format!("ea_set -f {value} {path} {name}\n")),
        _ => {
            let name = one.xattr.0.display();
            let reason = format!(
                "has a name that debugfs cannot take, and its attribute {name} is too large for fakeroot; build as root"
            );
            Err(Error::Source { path: one.path.clone(), reason })
        }
    }
}

/// Runs commands of debugfs, of which each must be silent: it ends well whatever went wrong.
fn debugfs(image: &File, script: &str, scratch: &Path, progress: &mut dyn Progress) -> Result<()> {
    let path = scratch.join("script");
    std::fs::write(&path, script).at("write", &path)?;
    let mut command = e2fsprogs("debugfs");
    command.stdin(image.try_clone().at("open", Path::new("the image"))?);
    command.args(["-w", "-f"]).arg(&path).arg(IMAGE);
    let said = run(&mut command, progress, |_| {})?;
    let complaints: Vec<&str> = said.lines().filter(|line| !line.starts_with("debugfs ")).collect();
    if complaints.is_empty() {
        return Ok(());
    }
    let stderr = complaints.join("; ");
    Err(Error::Tool { program: "debugfs".to_owned(), status: "it complained".to_owned(), stderr })
}

/// Whether mke2fs failed because the tree is larger than the filesystem.
pub(crate) fn is_full(error: &Error) -> bool {
    matches!(error, Error::Tool { program, stderr, .. }
        if program == "mke2fs" && (stderr.contains("Could not allocate") || stderr.contains("No free space")))
}
