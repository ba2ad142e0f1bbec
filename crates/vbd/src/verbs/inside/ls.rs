//! `vbd ls`.

use std::io::{self, BufWriter, Write};

use vbd_ext4::read::{FileType, Inode, Links};
use vbd_fs::inside::walk::sorted;
use vbd_fs::inside::{Step, Walk};

use super::shown::{self, Object};
use super::{Access, Opened, Target};
use crate::output::{self, Table};

/// List what is in a directory of a disk.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The disk and a path in it, as vm1disk:/etc; without a path its root
    #[arg(value_name = "IMAGE:/PATH")]
    target: Target,
    /// Kind, permissions, links, owner, group, size and time (UTC) of each
    #[arg(long, short)]
    long: bool,
    /// . and .. too
    #[arg(long, short)]
    all: bool,
    /// What is in directories in it, too
    #[arg(long, short = 'R')]
    recursive: bool,
    /// The directory itself, not what is in it
    #[arg(long, short, conflicts_with = "recursive")]
    directory: bool,
    /// Print JSON, sizes in bytes
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    access: Access,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let opened = args.access.open(&args.target.image)?;
    // As ls does: a link to a directory is looked into, unless what the link is was asked for.
    let links = if args.long || args.directory { Links::Keep } else { Links::Follow };
    let found = opened.find(&args.target, links)?;
    let name = args.target.name().map_or_else(|| b"/".to_vec(), <[u8]>::to_vec);
    if found.file_type() != FileType::Directory || args.directory {
        return show(&args, &opened, &[(name, found)]);
    }
    if !args.recursive {
        return show(&args, &opened, &list(&args, &opened, &found)?);
    }
    recursive(&args, &opened, found)
}

/// The entries of a directory. One that cannot be read is told, and the others are shown.
fn list(args: &Args, opened: &Opened, directory: &Inode) -> anyhow::Result<Vec<(Vec<u8>, Inode)>> {
    let filesystem = &opened.filesystem;
    let mut all = Vec::new();
    let mut failed = None;
    let mut entries = sorted(filesystem, directory)?;
    if args.all {
        let mut own = Vec::new();
        for entry in filesystem.entries(directory)?.take(2) {
            own.extend(Some(entry?).filter(|entry| entry.name == b"." || entry.name == b".."));
        }
        entries.splice(0..0, own);
    }
    for entry in entries {
        match filesystem.entry(&entry) {
            Ok(inode) => all.push((entry.name, inode)),
            Err(error) => {
                eprintln!("vbd: {}: {error}", shown::plain(&entry.name));
                failed = Some(error);
            }
        }
    }
    match failed {
        Some(error) if all.is_empty() => Err(error.into()),
        Some(_) => {
            show(args, opened, &all)?;
            anyhow::bail!("some entries cannot be read");
        }
        None => Ok(all),
    }
}

fn recursive(args: &Args, opened: &Opened, found: Inode) -> anyhow::Result<()> {
    let mut objects = Vec::new();
    let mut out = BufWriter::new(io::stdout().lock());
    let mut failed = 0;
    for step in Walk::new(&opened.filesystem, found) {
        let found = match step {
            Ok(Step::Enter(found)) => found,
            Ok(Step::Leave) => continue,
            Err(trouble) => {
                eprintln!("vbd: {trouble}");
                failed += 1;
                continue;
            }
        };
        let path = if found.path.is_empty() { b"." } else { &found.path[..] };
        if args.json {
            objects.push(Object::new(&opened.filesystem, path, &found.inode));
        } else if args.long {
            let line = line(opened, path, &found.inode);
            writeln!(out, "{}", line.join(" ")).or_else(closed)?;
        } else {
            writeln!(out, "{}", shown::plain(path)).or_else(closed)?;
        }
    }
    out.flush().or_else(closed)?;
    drop(out);
    if args.json {
        output::print_json(&objects)?;
    }
    if failed > 0 {
        anyhow::bail!("{failed} entries cannot be read");
    }
    Ok(())
}

/// A reader that has gone away has all it wants: the end of this program.
pub(super) fn closed(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::BrokenPipe { std::process::exit(0) } else { Err(error) }
}

fn show(args: &Args, opened: &Opened, entries: &[(Vec<u8>, Inode)]) -> anyhow::Result<()> {
    if args.json {
        let objects = entries.iter().map(|(name, inode)| Object::new(&opened.filesystem, name, inode));
        return output::print_json(&objects.collect::<Vec<_>>());
    }
    let mut text = String::new();
    if args.long {
        let mut table = Table::new(&["MODE", ">LINKS", ">OWNER", ">GROUP", ">SIZE", "CHANGED (UTC)", "NAME"]);
        for (name, inode) in entries {
            table.row(line(opened, name, inode));
        }
        text = table.render(0);
    } else {
        for (name, _) in entries {
            text += &shown::plain(name);
            text.push('\n');
        }
    }
    Ok(output::print(&text)?)
}

/// The columns of a long line.
fn line(opened: &Opened, name: &[u8], inode: &Inode) -> [String; 7] {
    let attributes = inode.attributes();
    let size = match inode.device() {
        Some((major, minor)) => format!("{major}, {minor}"),
        None => inode.size().to_string(),
    };
    let mut name = shown::plain(name);
    if inode.file_type() == FileType::Symlink {
        name += " -> ";
        match opened.filesystem.read_link(inode) {
            Ok(target) => name += &shown::plain(&target),
            Err(error) => {
                name.push('?');
                eprintln!("vbd: {error}");
            }
        }
    }
    let time = shown::time(attributes.mtime);
    let [links, uid, gid] =
        [inode.links().into(), attributes.uid, attributes.gid].map(|n: u32| n.to_string());
    [shown::mode(inode), links, uid, gid, size, time, name]
}
