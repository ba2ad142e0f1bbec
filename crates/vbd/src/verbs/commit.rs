//! `vbd commit`.

use vbd_image::size::Human;
use vbd_jobs::Committed;

use super::job::{self, PaceArgs};
use super::target::{self, Target};
use crate::output::print;
use crate::progress::{Bar, stop_on_signals};

/// Write what an image holds into the backing file that it stands on. Other images that stand on the same file are
/// destroyed by that.
///
/// Of a disk that is served, while guests go on: then the image holds nothing more than what they write from there on. A
/// file that nobody serves keeps what it holds; afterwards nobody needs it. Whenever this is interrupted the image is
/// whole.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    target: target::Args,
    #[command(flatten)]
    pace: PaceArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let bar = Bar::new(stop_on_signals());
    let done = match args.target.find()? {
        Target::Served(found) => {
            let job = found.client.commit(&found.disk.name, args.pace.served())?;
            job::wait(&found.client, job, &bar)
        }
        Target::File(file) => {
            args.pace.file()?;
            vbd_jobs::commit(&args.target.spec(&file)?, 8, &bar).map_err(anyhow::Error::from)
        }
    };
    bar.clear();
    let Committed { into, written } = done?;
    let name = args.target.name();
    Ok(print(&format!("{name}: {} written to {}\n", Human(written), into.display()))?)
}
