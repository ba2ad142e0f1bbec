//! `vbd convert`.

use std::path::PathBuf;

use serde::Serialize;
use vbd_formats::{Format, ImageSpec, Kind};
use vbd_image::size::Human;
use vbd_jobs::{ConvertOptions, Leftover};
use vbd_luks::Secret;

use super::image::{Compress, GateArgs, KeyArgs, KindArgs};
use crate::UsageError;
use crate::output::{print, print_json};
use crate::progress::{Bar, stop_on_signals};

/// Make an image anew, in another format or as another file: as sparse as it can be, and only whole.
///
/// The new image takes its name when all of it is durable. One that was interrupted, by a power cut too, goes on with
/// --resume.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The image to read, with all that it stands on; nobody may be writing to it
    source: PathBuf,
    /// The file to make
    target: PathBuf,
    /// The format of the image that is read, raw unless said; it is never guessed
    #[arg(long, value_name = "FORMAT")]
    from: Option<Format>,
    /// The format of the new image
    #[arg(long, value_name = "FORMAT", default_value_t = Format::Raw)]
    to: Format,
    #[command(flatten)]
    kind: KindArgs,
    /// Replace an existing file, unless it is in use
    #[arg(long)]
    force: bool,
    /// Threads that read and write
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=64))]
    threads: u8,
    /// Write in whatever order is quickest, instead of the disk's
    #[arg(long)]
    unordered: bool,
    /// Compress what becomes shorter by it: zlib or zstd. For qcow2; such an image is read well, and written to as any other
    #[arg(long, value_name = "HOW", conflicts_with = "compression")]
    compress: Option<Compress>,
    /// Read the new image back and compare
    #[arg(long)]
    verify: bool,
    /// Leave it to the kernel when the new image reaches the storage: sooner done, and a power cut soon after may leave anything
    /// under its name
    #[arg(long, conflicts_with = "resume")]
    no_sync: bool,
    /// Go on where an interrupted conversion stopped
    #[arg(long, conflicts_with = "restart")]
    resume: bool,
    /// Begin anew where a conversion was interrupted
    #[arg(long)]
    restart: bool,
    /// Print JSON, sizes in bytes
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    gate: GateArgs,
    #[command(flatten)]
    key: KeyArgs,
    /// The file with the key that is to unlock the new image, with --encrypt; else the source's does
    #[arg(long, value_name = "FILE", requires = "encrypt", conflicts_with = "new_key_fd")]
    new_key_file: Option<PathBuf>,
    /// The descriptor with that key
    #[arg(long, value_name = "N", requires = "encrypt")]
    new_key_fd: Option<i32>,
}

/// What came of it, for programs.
#[derive(Serialize)]
struct Object {
    size: u64,
    written: u64,
    resumed_at: u64,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let format = super::format_of(&args.source, args.from, "--from")?;
    if args.to == Format::Luks {
        // What is left out as zeroes would read as noise there.
        let message =
            "nothing is converted to luks: convert to raw, then `cryptsetup reencrypt --encrypt` it";
        return Err(UsageError(message.to_owned()).into());
    }
    let secret = args.key.secret()?;
    let new_secret = Secret::from_either(args.new_key_file.as_deref(), args.new_key_fd)?;
    let new_secret = new_secret.or_else(|| secret.clone()).filter(|_| args.kind.encrypt);
    if args.kind.encrypt && new_secret.is_none() {
        let message = "an encrypted image needs a key: say --new-key-file FILE or --new-key-fd N";
        return Err(UsageError(message.to_owned()).into());
    }
    if args.kind.encrypt && args.compress.is_some() {
        let message = "what is encrypted is not compressed too: leave out --compress, or --encrypt";
        return Err(UsageError(message.to_owned()).into());
    }
    let source = ImageSpec { gate: args.gate.gate(), secret, ..ImageSpec::new(&args.source, format) };
    let mut image = args.kind.image(&args.target, args.to, args.force)?;
    image.secret = new_secret;
    match (&mut image.kind, args.compress) {
        (Kind::Qcow2(options), Some(how)) => {
            options.compression = how.into();
            options.validate().map_err(|error| UsageError(error.to_string()))?;
        }
        (_, Some(_)) => {
            return Err(
                UsageError(format!("--compress is for --to qcow2: {} has nothing of that", args.to)).into()
            );
        }
        _ => {}
    }
    let options = ConvertOptions {
        threads: args.threads.into(),
        ordered: !args.unordered,
        compress: args.compress.is_some(),
        verify: args.verify,
        durable: !args.no_sync,
        leftover: match (args.resume, args.restart) {
            (true, _) => Leftover::Resume,
            (_, true) => Leftover::Restart,
            _ => Leftover::Refuse,
        },
        ..ConvertOptions::new(image)
    };
    let bar = Bar::new(stop_on_signals());
    let result = vbd_jobs::convert(&source, &args.target, &options, &bar);
    bar.clear();
    let done = result?;
    if args.json {
        return print_json(&Object { size: done.size, written: done.written, resumed_at: done.resumed_at });
    }
    let resumed =
        if done.resumed_at > 0 { format!(" from {} on", Human(done.resumed_at)) } else { String::new() };
    let text = format!(
        "{}: {}, {} written{resumed}\n",
        args.target.display(),
        Human(done.size),
        Human(done.written)
    );
    Ok(print(&text)?)
}
