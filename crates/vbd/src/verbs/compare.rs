//! `vbd compare`.

use std::path::PathBuf;

use serde::Serialize;
use vbd_core::file::Cache;
use vbd_formats::{Format, ImageSpec};
use vbd_image::size::Human;
use vbd_jobs::Image;

use super::image::{GateArgs, KeyArgs};
use crate::Exit;
use crate::output::{print, print_json};
use crate::progress::{Bar, stop_on_signals};

/// Compare what guests read from two images, whatever their formats. Exits with 1 if that differs, with 2 if it cannot be
/// compared.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// An image
    first: PathBuf,
    /// Another one
    second: PathBuf,
    /// The format of the first, raw unless said; it is never guessed
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// The format of the second, raw unless said
    #[arg(long, value_name = "FORMAT")]
    second_format: Option<Format>,
    /// Take different sizes for a difference; otherwise the rest of the longer one has to be zeroes
    #[arg(long)]
    strict: bool,
    /// Look at images that are in use, too: what is read may be of no single moment
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    gate: GateArgs,
    #[command(flatten)]
    key: KeyArgs,
}

/// What was found, for programs.
#[derive(Serialize)]
struct Object {
    equal: bool,
    /// The first byte that differs.
    offset: Option<u64>,
    sizes: (u64, u64),
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match compare(&args) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Exit(1).into()),
        Err(error) => Err(error.context(Exit(2))),
    }
}

fn compare(args: &Args) -> anyhow::Result<bool> {
    let secret = args.key.secret()?;
    let open = |file: &PathBuf, format, option| -> anyhow::Result<Image> {
        let format = super::format_of(file, format, option)?;
        let (gate, secret) = (args.gate.gate(), secret.clone());
        // All of it is read once, and often it is in the page cache already.
        let cache = Cache::Writeback;
        let spec = ImageSpec { share: args.force, cache, gate, secret, ..ImageSpec::new(file, format) };
        Ok(Image::open(&spec.read_only())?)
    };
    let first = open(&args.first, args.format, "--format")?;
    let second = open(&args.second, args.second_format, "--second-format")?;
    let bar = Bar::new(stop_on_signals());
    let result = vbd_jobs::compare(&first, &second, 8, &bar);
    bar.clear();
    let compared = result?;
    let sizes_differ = compared.sizes.0 != compared.sizes.1;
    let offset = compared.difference.map(|difference| difference.offset);
    let equal = offset.is_none() && !(args.strict && sizes_differ);
    if args.json {
        print_json(&Object { equal, offset, sizes: compared.sizes })?;
        return Ok(equal);
    }
    let sizes = format!("{} and {}", Human(compared.sizes.0), Human(compared.sizes.1));
    let text = match offset {
        Some(offset) => format!("differ, first at byte {offset}\n"),
        None if sizes_differ && args.strict => format!("differ in size: {sizes}\n"),
        None if sizes_differ => format!("equal, but for zeroes at the end: {sizes}\n"),
        None => "equal\n".to_owned(),
    };
    print(&text)?;
    Ok(equal)
}
