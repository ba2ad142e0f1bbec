//! `vbd measure`.

use std::path::PathBuf;

use serde::Serialize;
use vbd_formats::{Format, ImageSpec, Kind};
use vbd_image::size::{Human, Size};

use super::image::{GateArgs, KeyArgs, KindArgs};
use crate::UsageError;
use crate::output::{print, print_json};

/// Say how large a new image would be: with what an image holds now, and when all of it was written.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The image whose content it would have
    #[arg(required_unless_present = "size", conflicts_with = "size")]
    file: Option<PathBuf>,
    /// The size of an empty disk, instead of an image
    #[arg(long, short, value_name = "SIZE")]
    size: Option<Size>,
    /// The format of the image, raw unless said; it is never guessed
    #[arg(long, value_name = "FORMAT")]
    from: Option<Format>,
    /// The format of the new image
    #[arg(long, value_name = "FORMAT", default_value_t = Format::Raw)]
    to: Format,
    /// Print JSON, sizes in bytes
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    kind: KindArgs,
    #[command(flatten)]
    gate: GateArgs,
    #[command(flatten)]
    key: KeyArgs,
}

/// What was found, for programs.
#[derive(Serialize)]
struct Object {
    required: u64,
    full: u64,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if args.kind.backing.is_some() {
        return Err(UsageError("what a backing file would save is not measured".to_owned()).into());
    }
    let mut image = args.kind.image("".as_ref(), args.to, false)?;
    let source = match &args.file {
        Some(file) => {
            let format = super::format_of(file, args.from, "--from")?;
            let secret = args.key.secret()?;
            Some(ImageSpec { gate: args.gate.gate(), secret, ..ImageSpec::new(file, format) })
        }
        None => None,
    };
    if let (Kind::Qcow2(options), true) = (&mut image.kind, args.kind.encrypt) {
        // As long as one with a key.
        let len = vbd_luks::header_len(&vbd_luks::FormatOptions::default());
        options.luks_header = Some(vec![0; usize::try_from(len).unwrap_or(0)]);
        options.validate().map_err(|error| UsageError(error.to_string()))?;
    }
    image.size = args.size.map_or(0, Size::bytes);
    let measured = vbd_jobs::measure(source.as_ref(), image)?;
    if args.json {
        return print_json(&Object { required: measured.required, full: measured.full });
    }
    let text = format!("required      {}\nfully written {}\n", both(measured.required), both(measured.full));
    Ok(print(&text)?)
}

fn both(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", Human(bytes))
}
