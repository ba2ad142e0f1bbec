//! `vbd du`.

use std::collections::HashSet;
use std::io::{self, BufWriter, Write};

use serde::Serialize;
use vbd_ext4::read::{FileType, Links};
use vbd_fs::inside::{Found, Step, Walk};
use vbd_image::size::Human;

use super::{Access, Target, ls, shown};
use crate::output;

/// Show how much room directories of a disk take.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The disk and a path in it, as vm1disk:/var; without a path its root
    #[arg(value_name = "IMAGE:/PATH")]
    target: Target,
    /// Files too
    #[arg(long, short, conflicts_with = "summarize")]
    all: bool,
    /// The sum alone
    #[arg(long, short, conflicts_with = "max_depth")]
    summarize: bool,
    /// No directories further down than this
    #[arg(long, short = 'd', value_name = "N")]
    max_depth: Option<usize>,
    /// The sizes of contents, instead of the room they take
    #[arg(long)]
    apparent_size: bool,
    /// Sizes in bytes
    #[arg(long, short)]
    bytes: bool,
    /// Print JSON, sizes in bytes
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    access: Access,
}

/// A line for programs.
#[derive(Serialize)]
struct Object {
    path: String,
    size: u64,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let opened = args.access.open(&args.target.image)?;
    let start = opened.find(&args.target, Links::Follow)?;
    let most = if args.summarize { 0 } else { args.max_depth.unwrap_or(usize::MAX) };
    let mut out = BufWriter::new(io::stdout().lock());
    let mut objects = Vec::new();
    let mut failed = 0;
    let mut show = |found: &Found, size: u64| -> anyhow::Result<()> {
        let path = if found.path.is_empty() { b"." } else { &found.path[..] };
        if args.json {
            objects.push(Object { path: shown::text(path), size });
        } else {
            let size = if args.bytes { size.to_string() } else { Human(size).to_string() };
            writeln!(out, "{size:>10}  {}", shown::plain(path)).or_else(ls::closed)?;
        }
        Ok(())
    };
    // The directories on the way down, each with the sum so far.
    let mut above: Vec<(Found, u64)> = Vec::new();
    // Files with several names count once.
    let mut counted = HashSet::new();
    for step in Walk::new(&opened.filesystem, start) {
        let (found, size) = match step {
            Ok(Step::Enter(found)) => {
                let inode = &found.inode;
                let directory = inode.file_type() == FileType::Directory;
                let again = !directory && inode.links() > 1 && !counted.insert(inode.number());
                let size = match args.apparent_size {
                    _ if again => 0,
                    true if directory => 0,
                    true => inode.size(),
                    false => opened.filesystem.allocated(inode),
                };
                if directory {
                    above.push((found, size));
                    continue;
                }
                if (args.all || found.depth == 0) && found.depth <= most {
                    show(&found, size)?;
                }
                (None, size)
            }
            Ok(Step::Leave) => match above.pop() {
                Some((found, size)) => (Some(found), size),
                None => continue,
            },
            Err(trouble) => {
                eprintln!("vbd: {trouble}");
                failed += 1;
                continue;
            }
        };
        if let Some((_, sum)) = above.last_mut() {
            *sum = sum.saturating_add(size);
        }
        if let Some(found) = found.filter(|found| found.depth <= most) {
            show(&found, size)?;
        }
    }
    out.flush().or_else(ls::closed)?;
    drop(out);
    if args.json {
        output::print_json(&objects)?;
    }
    if failed > 0 {
        anyhow::bail!("{failed} entries cannot be read");
    }
    Ok(())
}
