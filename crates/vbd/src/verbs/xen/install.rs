//! `vbd xen install`.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};

use crate::output::print;

/// Every file that this verb writes has this in its second line; others are not touched.
const OURS: &str = "# vbd: installed by `vbd xen install`";
const BLOCK_VBD: &str = include_str!("../../../../../contrib/xen/block-vbd");
const BLOCK: &str = include_str!("../../../../../contrib/xen/block");
const DEVICE_MODEL: &str = include_str!("../../../../../contrib/xen/device-model");
const UNIT: &str = include_str!("../../../../../contrib/systemd/vbd-xen.service");
/// Where xl looks for block scripts.
const SCRIPTS: &str = "etc/xen/scripts";
/// Where the command is, for what is installed.
const COMMAND: &str = "/usr/bin/vbd";

/// Put the block script where xl looks for it, and a service for systemd.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Install below this directory, for packages
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// Take the place of xl's own block script, so that unchanged lines (file:/path,sda1,w) are served by vbd; it
    /// stays, as block.xen, for everything that is no file
    #[arg(long)]
    files: bool,
    /// Overwrite files that are not vbd's
    #[arg(long)]
    force: bool,
    /// Take away what was installed
    #[arg(long, conflicts_with = "files")]
    remove: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let scripts = args.root.join(SCRIPTS);
    let live = args.root == Path::new("/");
    if live && !scripts.is_dir() {
        bail!("/{SCRIPTS} is not there: is Xen's toolstack (xen-utils) installed here?");
    }
    let (block, original) = (scripts.join("block"), scripts.join("block.xen"));
    // A package's own directory, or the administrator's.
    let units = args.root.join(if live { "etc/systemd/system" } else { "usr/lib/systemd/system" });
    let (unit, model) = (units.join("vbd-xen.service"), args.root.join("usr/lib/vbd/xen-device-model"));
    let mut done = Vec::new();
    if args.remove {
        if is_ours(&block)? {
            remove(&block, &mut done)?;
            put_back(&block, &original, live, &mut done)?;
        }
        for file in [scripts.join("block-vbd"), model, unit] {
            if is_ours(&file)? {
                remove(&file, &mut done)?;
            }
        }
        return report(&done);
    }

    let command = if live { std::env::current_exe()?.display().to_string() } else { COMMAND.to_owned() };
    let serve =
        if args.files { format!("{command} xen serve --files") } else { format!("{command} xen serve") };
    let mut files = vec![
        (scripts.join("block-vbd"), BLOCK_VBD.to_owned(), 0o755),
        (model, DEVICE_MODEL.replace(COMMAND, &command), 0o755),
        (unit, UNIT.replace("/usr/bin/vbd xen serve", &serve), 0o644),
    ];
    if args.files {
        files.push((block.clone(), BLOCK.to_owned(), 0o755));
    }
    // All that could be refused, before anything is changed.
    for (path, ..) in &files {
        let moved = *path == block && !original.exists();
        if !args.force && !moved && path.exists() && !is_ours(path)? {
            bail!("{}: is not vbd's, and stays as it is: --force overwrites it", path.display());
        }
    }
    if args.files && block.exists() && !is_ours(&block)? && !original.exists() {
        divert(&block, &original, live, &mut done)?;
    }
    for (path, text, mode) in &files {
        write(path, text, *mode)?;
        done.push(format!("wrote {}", path.display()));
    }
    if live {
        done.push("now: systemctl daemon-reload && systemctl enable --now vbd-xen".to_owned());
    }
    report(&done)
}

fn report(done: &[String]) -> anyhow::Result<()> {
    if done.is_empty() {
        return Ok(print("nothing to do\n")?);
    }
    Ok(print(&(done.join("\n") + "\n"))?)
}

/// Whether a file is one that this verb wrote. One that is not there is not.
fn is_ours(path: &Path) -> anyhow::Result<bool> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).lines().take(2).any(|line| line == OURS)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// Whole or not at all: xl may run a script at any time.
fn write(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    let failed = || format!("writing {}", path.display());
    let dir = path.parent().with_context(failed)?;
    fs::create_dir_all(dir).with_context(failed)?;
    let name = path.file_name().with_context(failed)?.to_string_lossy().into_owned();
    let new = dir.join(format!(".{name}.new"));
    let written = fs::write(&new, text)
        .and_then(|()| fs::set_permissions(&new, fs::Permissions::from_mode(mode)))
        .and_then(|()| fs::rename(&new, path));
    written
        .inspect_err(|_| {
            // What could not be put in place is of no use.
            let _ = fs::remove_file(&new);
        })
        .with_context(failed)
}

fn remove(path: &Path, done: &mut Vec<String>) -> anyhow::Result<()> {
    fs::remove_file(path).with_context(|| format!("removing {}", path.display()))?;
    done.push(format!("removed {}", path.display()));
    Ok(())
}

/// Moves xl's script aside, so that the next upgrade of its package leaves ours in place.
fn divert(block: &Path, original: &Path, live: bool, done: &mut Vec<String>) -> anyhow::Result<()> {
    if !(live && dpkg_divert(&["--add"], original, block)?) {
        fs::rename(block, original).with_context(|| format!("renaming {}", block.display()))?;
    }
    done.push(format!("moved {} to {}", block.display(), original.display()));
    Ok(())
}

fn put_back(block: &Path, original: &Path, live: bool, done: &mut Vec<String>) -> anyhow::Result<()> {
    if live {
        dpkg_divert(&["--remove"], original, block)?;
    }
    if original.exists() {
        fs::rename(original, block).with_context(|| format!("renaming {}", original.display()))?;
    }
    done.push(format!("put {} back", block.display()));
    Ok(())
}

/// Tells dpkg; false where there is none.
fn dpkg_divert(how: &[&str], original: &Path, block: &Path) -> anyhow::Result<bool> {
    let mut divert = Command::new("dpkg-divert");
    divert.args(["--local", "--quiet", "--rename", "--divert"]).arg(original).args(how).arg(block);
    match divert.output() {
        Ok(output) if output.status.success() => Ok(true),
        Ok(output) => bail!("dpkg-divert: {}", String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).context("dpkg-divert"),
    }
}
