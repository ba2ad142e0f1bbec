//! `vbd find`.

use std::ffi::OsString;
use std::io::{self, BufWriter, Write};

use vbd_ext4::read::Links;
use vbd_fs::inside::{Step, Walk};

use super::expression::Expression;
use super::shown::{self, Object};
use super::{Access, Target, ls};
use crate::{UsageError, output};

/// Find entries of a disk.
///
/// Tests, all of which have to hold; ! or -not before one turns it round: -name PATTERN, -iname PATTERN, -path PATTERN,
/// -type f|d|l|c|b|p|s, -size [+|-]N[c|k|M|G], -perm [-|/]MODE, -uid N, -gid N, -links [+|-]N, -inum N, -mtime [+|-]DAYS,
/// -newer /PATH, -empty. And -mindepth N, -maxdepth N, -print0.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    access: Access,
    /// Print JSON, sizes in bytes; before the disk, as all options of this kind
    #[arg(long)]
    json: bool,
    /// The disk and a path in it, as vm1disk:/etc; without a path its root
    #[arg(value_name = "IMAGE:/PATH")]
    target: Target,
    /// Tests, as find(1) has them
    #[arg(value_name = "TESTS", trailing_var_arg = true, allow_hyphen_values = true)]
    tests: Vec<OsString>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let expression = Expression::parse(&args.tests).map_err(UsageError)?;
    let opened = args.access.open(&args.target.image)?;
    let filesystem = &opened.filesystem;
    let start = opened.find(&args.target, Links::Keep)?;
    let tests = expression.ready(filesystem)?;
    let mut out = BufWriter::new(io::stdout().lock());
    let mut objects = Vec::new();
    let mut failed = 0;
    let mut walk = Walk::new(filesystem, start);
    let mut base = args.target.path.clone();
    while base.last() == Some(&b'/') {
        base.pop();
    }
    while let Some(step) = walk.next() {
        let found = match step {
            Ok(Step::Enter(found)) => found,
            Ok(Step::Leave) => continue,
            Err(trouble) => {
                eprintln!("vbd: {trouble}");
                failed += 1;
                continue;
            }
        };
        if found.depth >= tests.max_depth() {
            walk.prune();
        }
        let path = match (&base[..], &found.path[..]) {
            (b"", b"") => b"/".to_vec(),
            (base, b"") => base.to_vec(),
            (base, path) => [base, b"/", path].concat(),
        };
        let name = match found.depth {
            0 => args.target.name().unwrap_or(b"/").to_vec(),
            _ => found.name().to_vec(),
        };
        let holds = match tests.hold(&path, &name, &found) {
            Ok(holds) => holds,
            Err(error) => {
                eprintln!("vbd: {}: {error}", shown::plain(&path));
                failed += 1;
                continue;
            }
        };
        if !holds {
            continue;
        }
        if args.json {
            objects.push(Object::new(filesystem, &path, &found.inode));
        } else if tests.zero() {
            out.write_all(&path).and_then(|()| out.write_all(&[0])).or_else(ls::closed)?;
        } else {
            writeln!(out, "{}", shown::plain(&path)).or_else(ls::closed)?;
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
