//! `vbd diff`.

use std::io::{self, BufWriter, Write};

use serde::Serialize;
use vbd_ext4::read::Links;
use vbd_formats::Format;
use vbd_fs::inside::compare::{self, Change, Difference, Options, Side};

use super::{Access, Target, ls, shown};
use crate::progress::stop_on_signals;
use crate::{Exit, output};

/// Compare two disks, or parts of them: entries, what they are, what is in them. Exits with 1 if they differ, with 2 if
/// they cannot be compared.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A disk and a path in it, as vm1disk:/etc; without a path its root
    #[arg(value_name = "IMAGE:/PATH")]
    first: Target,
    /// Another one
    #[arg(value_name = "IMAGE:/PATH")]
    second: Target,
    /// Leave out times or owners, with a comma between them for both
    #[arg(long, value_name = "WHAT", value_delimiter = ',')]
    ignore: Vec<Ignored>,
    /// Print nothing
    #[arg(long, short, conflicts_with = "json")]
    quiet: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The format of the second disk; that of the first unless said
    #[arg(long, value_name = "FORMAT")]
    second_format: Option<Format>,
    #[command(flatten)]
    access: Access,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Ignored {
    /// When contents were changed last
    Times,
    /// Owners and groups
    Owners,
}

/// A difference for programs.
#[derive(Serialize)]
struct Object {
    path: String,
    #[serde(flatten)]
    difference: Difference,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match differences(&args) {
        Ok(0) => Ok(()),
        Ok(_) => Err(Exit(1).into()),
        Err(error) => Err(error.context(Exit(2))),
    }
}

fn differences(args: &Args) -> anyhow::Result<u64> {
    let first = args.access.open(&args.first.image)?;
    let second = match args.second_format {
        Some(format) => args.access.of_format(format).open(&args.second.image)?,
        None => args.access.open(&args.second.image)?,
    };
    let left = first.find(&args.first, Links::Follow)?;
    let right = second.find(&args.second, Links::Follow)?;
    let options = Options {
        ignore_times: args.ignore.contains(&Ignored::Times),
        ignore_owners: args.ignore.contains(&Ignored::Owners),
        cancel: stop_on_signals(),
    };
    let mut objects = Vec::new();
    let mut out = BufWriter::new(io::stdout().lock());
    let mut found = |path: &[u8], difference: Difference| {
        if args.json {
            objects.push(Object { path: format!("/{}", shown::text(path)), difference });
        } else if !args.quiet {
            writeln!(out, "{}", line(path, &difference))
                .or_else(ls::closed)
                .map_err(|error| vbd_fs::Error::Io { what: "standard output".to_owned(), error })?;
        }
        Ok(())
    };
    let left = Side { filesystem: &first.filesystem, root: &left };
    let right = Side { filesystem: &second.filesystem, root: &right };
    let count = compare::compare(left, right, &options, &mut found)?;
    out.flush().or_else(ls::closed)?;
    drop(out);
    if args.json {
        output::print_json(&objects)?;
    }
    Ok(count)
}

/// A line for people: what only the first has, what only the second has, what differs and in what.
fn line(path: &[u8], difference: &Difference) -> String {
    let path = shown::plain(path);
    match difference {
        Difference::Removed { kind } => format!("- /{path} ({kind})"),
        Difference::Added { kind } => format!("+ /{path} ({kind})"),
        Difference::Changed { changes } => {
            let changes = changes.iter().map(change).collect::<Vec<_>>().join(", ");
            format!("~ /{path}: {}", changes.replace(char::is_control, "?"))
        }
    }
}

fn change(Change { what, from, to }: &Change) -> String {
    match (from, to) {
        (None, None) => what.clone(),
        (from, to) => {
            let [from, to] =
                [from, to].map(|side| side.as_deref().filter(|text| !text.is_empty()).unwrap_or("none"));
            format!("{what} {from} -> {to}")
        }
    }
}
