//! `vbd edit`.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use vbd_ext4::edit::{Attributes, Ino, New};
use vbd_ext4::read::{FileType, Inode, Links};

use super::Target;
use super::change::{self, Changed, Changing};

/// The largest file that goes through an editor.
const TEXT: u64 = 64 << 20;

/// Edit a file in a disk, or give it new content.
///
/// The editor is $VISUAL, $EDITOR or vi, on a copy; the file in the disk is changed when it ends well, and the disk cannot be
/// used by others until then. A file that is there keeps its owner, permissions and attributes; a new one is root's, 0644.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file, as vm1disk:/etc/fstab; links are followed
    #[arg(value_name = "IMAGE:/PATH")]
    word: OsString,
    /// Take the new content from standard input
    #[arg(long, conflicts_with = "content_from")]
    stdin: bool,
    /// Take the new content from this file
    #[arg(long, value_name = "FILE")]
    content_from: Option<PathBuf>,
    #[command(flatten)]
    changing: Changing,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (image, targets) = change::targets(vec![args.word])?;
    let target = &targets[0];
    // Opened before the lease is taken: what is missing is told at once.
    let content: Option<Box<dyn Read>> = match &args.content_from {
        _ if args.stdin => Some(Box::new(io::stdin().lock())),
        Some(path) => Some(Box::new(File::open(path).with_context(|| path.display().to_string())?)),
        None => None,
    };
    let mut changed = args.changing.open(&image)?;
    let found = changed.look(target, Links::Follow)?;
    if let Some(inode) = &found
        && inode.file_type() != FileType::Regular
    {
        bail!("{}: is no regular file", target.shown());
    }
    match content {
        Some(mut content) => {
            let ino = file(&mut changed, target, found)?;
            changed.editor.set_content(ino, &mut content).map_err(Changed::failed(target))?;
        }
        None => {
            let before = match &found {
                Some(inode) => changed.editor.filesystem().read_all(inode, TEXT)?,
                None => Vec::new(),
            };
            let after = through_editor(target, &before)?;
            if after == before && found.is_some() {
                eprintln!("vbd: {}: unchanged", target.shown());
                return Ok(());
            }
            let ino = file(&mut changed, target, found)?;
            changed.editor.set_content(ino, &mut &after[..]).map_err(Changed::failed(target))?;
        }
    }
    changed.commit()
}

/// The file, made where it is not there.
fn file(changed: &mut Changed, target: &Target, found: Option<Inode>) -> anyhow::Result<Ino> {
    if let Some(inode) = found {
        return Ok(inode.number());
    }
    let place = changed.locate(target)?;
    if place.found.is_some() {
        bail!("{}: is a link to nothing; name what it leads to", target.shown());
    }
    let now = changed.now;
    let root = Attributes { mode: 0o644, uid: 0, gid: 0, atime: now, ctime: now, mtime: now, crtime: now };
    changed
        .editor
        .create(place.directory, &place.name, New::File, &root, &[])
        .map_err(Changed::failed(target))
}

/// What an editor makes of a text.
fn through_editor(target: &Target, text: &[u8]) -> anyhow::Result<Vec<u8>> {
    let directory =
        tempfile::Builder::new().prefix("vbd-edit-").tempdir().context("making a directory for a copy")?;
    // Its own name, for editors that go by it.
    let name = target.name().unwrap_or(b"file");
    let path = directory.path().join(std::ffi::OsStr::from_bytes(name));
    let mut copy =
        File::options().write(true).create_new(true).open(&path).context("making a copy to edit")?;
    copy.write_all(text).context("making a copy to edit")?;
    drop(copy);
    run_editor(&path)?;
    let mut text = Vec::new();
    let file = File::open(&path).context("reading the edited copy")?;
    file.take(TEXT + 1).read_to_end(&mut text).context("reading the edited copy")?;
    if text.len() as u64 > TEXT {
        bail!("the edited copy is larger than {} MiB; use --content-from", TEXT >> 20);
    }
    Ok(text)
}

fn run_editor(path: &Path) -> anyhow::Result<()> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let editor = set("VISUAL").or_else(|| set("EDITOR")).unwrap_or_else(|| "vi".into());
    // As git and crontab do: the variable may hold arguments.
    let mut script = editor.clone();
    script.push(" \"$1\"");
    let status = Command::new("sh").arg("-c").arg(&script).arg("sh").arg(path).status();
    let status = status.with_context(|| format!("starting {}", editor.display()))?;
    if !status.success() {
        bail!("{} ended with {status}; nothing was changed", editor.display());
    }
    Ok(())
}
