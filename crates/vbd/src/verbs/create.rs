//! `vbd create`.

use std::path::PathBuf;

use vbd_formats::{Format, Kind};
use vbd_image::size::Size;
use vbd_qcow2::{DataFile, Preallocation};

use super::image::{GateArgs, KeyArgs, KindArgs};
use crate::UsageError;

/// Make an empty disk file, sparse unless said otherwise.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file to make
    file: PathBuf,
    /// Its size: bytes, or with K, M, G, T (1024) or KB, MB, GB, TB (1000), as 2G or 1.5T. With --backing, that of the
    /// backing file unless said
    #[arg(long, short, value_name = "SIZE", allow_hyphen_values = true, required_unless_present = "backing")]
    size: Option<Size>,
    /// Allocate all of it now, so that the host cannot run out of room for it later; qcow2 knows `metadata` (places
    /// only), `falloc` (room, the default) and `full` (zeroes written)
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "falloc")]
    preallocate: Option<Preallocate>,
    /// Replace an existing file, unless it is in use
    #[arg(long)]
    force: bool,
    /// The format of the file
    #[arg(long, default_value_t = Format::Raw)]
    format: Format,
    #[command(flatten)]
    kind: KindArgs,
    /// Keep the guest's data in another file, named so in the image
    #[arg(long, value_name = "FILE")]
    data_file: Option<PathBuf>,
    /// Have that file read as a raw image
    #[arg(long, requires = "data_file")]
    data_file_raw: bool,
    #[command(flatten)]
    gate: GateArgs,
    #[command(flatten)]
    key: KeyArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Preallocate {
    /// Every cluster has its place, and the file has holes there
    Metadata,
    /// The filesystem keeps the room
    Falloc,
    /// Zeroes are written
    Full,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut image = args.kind.image(&args.file, args.format, args.force)?;
    match &mut image.kind {
        Kind::Raw { preallocate } => {
            *preallocate = match args.preallocate {
                None => false,
                Some(Preallocate::Falloc) => true,
                Some(_) => {
                    let message = "a raw file is allocated, or not: leave out what --preallocate is to be";
                    return Err(UsageError(message.to_owned()).into());
                }
            };
            if args.data_file.is_some() {
                let message = "--data-file is for --format qcow2: a raw file is its own data file";
                return Err(UsageError(message.to_owned()).into());
            }
        }
        Kind::Luks => {
            if args.preallocate.is_some() || args.data_file.is_some() {
                let message =
                    "an encrypted disk is not preallocated, and holds its data itself: leave that out";
                return Err(UsageError(message.to_owned()).into());
            }
        }
        Kind::Vhd(kind) => {
            kind.preallocate = match args.preallocate {
                None => false,
                Some(Preallocate::Falloc) if kind.fixed => true,
                Some(_) => {
                    let message = "a vhd is preallocated with --fixed --preallocate, and no other way";
                    return Err(UsageError(message.to_owned()).into());
                }
            };
            if args.data_file.is_some() {
                let message = "--data-file is for --format qcow2: a vhd holds its data itself";
                return Err(UsageError(message.to_owned()).into());
            }
        }
        Kind::Qcow2(options) => {
            options.preallocation = match args.preallocate {
                None => Preallocation::Off,
                Some(Preallocate::Metadata) => Preallocation::Metadata,
                Some(Preallocate::Falloc) => Preallocation::Falloc,
                Some(Preallocate::Full) => Preallocation::Full,
            };
            options.data_file =
                args.data_file.map(|path| DataFile { path, raw: args.data_file_raw, keep: false });
            options.validate().map_err(|error| UsageError(error.to_string()))?;
        }
    }
    let encrypt = args.kind.encrypt || args.format == Format::Luks;
    let usage = |message: &str| Err(UsageError(message.to_owned()).into());
    image.secret = args.key.secret()?;
    match (encrypt, &image.secret) {
        (true, None) => return usage("an encrypted disk needs a key: say --key-file FILE or --key-fd N"),
        // Whoever gives a key does not expect an image that anybody can read.
        (false, Some(_)) => {
            return usage("a key is for an encrypted disk: say --encrypt (qcow2), or --format luks");
        }
        _ => {}
    }
    let gate = image.gate(&args.file, &args.gate.gate())?;
    image.size = match args.size {
        Some(size) => size.bytes(),
        // Asked for where there is no backing file.
        None => vbd_formats::backing_size(&args.file, &image, &gate)?.unwrap_or_default(),
    };
    Ok(vbd_formats::create(&args.file, &image)?)
}
