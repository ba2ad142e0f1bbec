//! `vbd rebase` and `vbd flatten`.

use std::path::PathBuf;

use vbd_formats::{Format, Gate, ImageSpec};
use vbd_image::size::Human;
use vbd_jobs::{Flattened, NewBacking};

use super::image::ImageArgs;
use super::job::{self, PaceArgs};
use super::target::{self, Target};
use crate::UsageError;
use crate::output::print;
use crate::progress::{Bar, stop_on_signals};

/// Threads that copy.
const THREADS: usize = 8;

/// Put an image on another backing file, with what guests read from it unchanged: what differs between the old and the
/// new is copied into the image first.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The image; nobody may be using it
    file: PathBuf,
    /// The file that it is to stand on. The name is written into the image, and a relative one begins where that is
    #[arg(long, value_name = "FILE")]
    backing: PathBuf,
    /// The format of that file, raw unless said; it is never guessed
    #[arg(long, value_name = "FORMAT")]
    backing_format: Option<Format>,
    /// Change the name alone, and copy nothing: for a file that was moved, or is known to hold the same
    #[arg(long = "unsafe")]
    without_copy: bool,
    #[command(flatten)]
    image: ImageArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut spec = args.image.spec(&args.file)?;
    let path = args.file.parent().unwrap_or(std::path::Path::new("")).join(&args.backing);
    let format = match (args.backing_format, args.without_copy) {
        // The file need not be there yet.
        (None, true) => {
            let message = "say --backing-format: the file is not looked at with --unsafe";
            return Err(UsageError(message.to_owned()).into());
        }
        (told, _) => super::format_of(&path, told, "--backing-format")?,
    };
    let new = NewBacking { name: args.backing.into_os_string(), format };
    if args.without_copy {
        vbd_jobs::rebase_unsafe(&spec, Some(&new))?;
        return Ok(());
    }
    // Whoever names the file here allows it.
    let mut allowed = spec.gate.allowed().to_vec();
    allowed.extend(path.canonicalize().ok().and_then(|path| path.parent().map(std::path::Path::to_owned)));
    spec.gate = Gate::new(allowed);
    let text = move_to(&spec, Some(&new))?;
    Ok(print(&format!("{}: stands on {} now{text}\n", spec.path.display(), path.display()))?)
}

/// Copy all that an image reads from its backing files into it, so that it stands on none; while guests use the disk,
/// if it is served.
#[derive(clap::Args)]
pub(crate) struct FlattenArgs {
    #[command(flatten)]
    target: target::Args,
    #[command(flatten)]
    pace: PaceArgs,
}

pub(crate) fn flatten(args: FlattenArgs) -> anyhow::Result<()> {
    let text = match args.target.find()? {
        Target::Served(found) => {
            let bar = Bar::new(stop_on_signals());
            let job = found.client.flatten(&found.disk.name, args.pace.served())?;
            let done = job::wait(&found.client, job, &bar);
            bar.clear();
            let Flattened { copied } = done?;
            format!(", {} copied", Human(copied))
        }
        Target::File(file) => {
            args.pace.file()?;
            move_to(&args.target.spec(&file)?, None)?
        }
    };
    Ok(print(&format!("{}: stands on no other image now{text}\n", args.target.name()))?)
}

fn move_to(spec: &ImageSpec, new: Option<&NewBacking>) -> anyhow::Result<String> {
    let bar = Bar::new(stop_on_signals());
    let result = vbd_jobs::rebase(spec, new, THREADS, &bar);
    bar.clear();
    Ok(format!(", {} copied", Human(result?)))
}
