//! `vbd backups`.

use std::path::PathBuf;

use vbd_image::clock::rfc3339;
use vbd_image::size::Human;
use vbd_jobs::backup::{Chain, Listed, Store, Use, verify};

use crate::output::{Table, print, print_json};
use crate::progress::{Bar, stop_on_signals};

/// The backups in a store: show them, make sure that they can be read, take old ones away.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Show the backups, oldest first
    List {
        /// The store
        store: PathBuf,
        /// Only those of this disk
        #[arg(long)]
        disk: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Read every chunk that backups need and compare it with its name; of chains, every part of every image
    Verify {
        /// The store
        store: PathBuf,
        /// Only those of this disk
        #[arg(long)]
        disk: Option<String>,
        /// Only this one
        #[arg(long, value_name = "NAME", requires = "disk")]
        backup: Option<String>,
        /// Threads that read
        #[arg(long, value_name = "N", default_value_t = 2)]
        threads: usize,
    },
    /// Take all but the last backups of each disk away, and what none needs any more
    Prune {
        /// The store
        store: PathBuf,
        /// How many of each disk stay
        #[arg(long, value_name = "N")]
        keep: usize,
        /// Only those of this disk
        #[arg(long)]
        disk: Option<String>,
    },
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.action {
        Action::List { store, disk, json } => {
            let list = match Chain::is_one(&store) {
                true => Chain::open(&store)?.list(disk.as_deref())?,
                false => Store::open(&store, Use::Shared)?.list(disk.as_deref())?,
            };
            if json {
                return print_json(&list);
            }
            let mut table = Table::new(&["DISK", "BACKUP", "TIME", ">SIZE", ">READ", ">STORED", "SINCE"]);
            for Listed { size, about } in list {
                let time = rfc3339(i64::try_from(about.milliseconds / 1000).unwrap_or(i64::MAX));
                let [size, read, stored] = [size, about.read, about.stored].map(|n| Human(n).to_string());
                table.row([
                    about.disk,
                    about.name,
                    time,
                    size,
                    read,
                    stored,
                    about.parent.unwrap_or_default(),
                ]);
            }
            Ok(print(&table.render(0))?)
        }
        Action::Verify { store, disk, backup, .. } if Chain::is_one(&store) => {
            let chain = Chain::open(&store)?;
            let list = chain.list(disk.as_deref())?.into_iter();
            let list = list.filter(|one| backup.as_ref().is_none_or(|name| *name == one.about.name));
            let bar = Bar::new(stop_on_signals());
            let (mut backups, mut bytes) = (0, 0);
            for Listed { about, .. } in list {
                let manifest = chain.manifest(&about.disk, &about.name)?;
                bytes += chain.verify(&manifest, &bar).inspect_err(|_| bar.clear())?;
                backups += 1;
            }
            bar.clear();
            if backups == 0 {
                anyhow::bail!("{}: has no such backup", chain.path().display());
            }
            let bytes = Human(bytes);
            Ok(print(&format!("{backups} backups: {bytes} in images are what they were\n"))?)
        }
        Action::Verify { store, disk, backup, threads } => {
            let store = Store::open(&store, Use::Shared)?;
            let list = store.list(disk.as_deref())?.into_iter();
            let list = list.filter(|one| backup.as_ref().is_none_or(|name| *name == one.about.name));
            let manifests = list
                .map(|one| store.manifest(&one.about.disk, &one.about.name))
                .collect::<Result<Vec<_>, _>>()?;
            if manifests.is_empty() {
                anyhow::bail!("{}: has no such backup", store.path().display());
            }
            let bar = Bar::new(stop_on_signals());
            let checked = verify(&store, &manifests, threads, &bar);
            bar.clear();
            let checked = checked?;
            let (backups, chunks, bytes) = (checked.backups, checked.chunks, Human(checked.bytes));
            Ok(print(&format!("{backups} backups: {chunks} chunks, {bytes}, are what they were\n"))?)
        }
        Action::Prune { store, .. } if Chain::is_one(&store) => {
            anyhow::bail!(
                "{}: holds chains of images, of which each needs those before it: begin a new one, and remove the old \
                 images and their .backup files together",
                store.display()
            );
        }
        Action::Prune { store, keep, disk } => {
            let store = Store::open(&store, Use::Alone)?;
            let list = store.list(disk.as_deref())?;
            let mut remove = Vec::new();
            for (index, one) in list.iter().enumerate() {
                let later =
                    list[index + 1..].iter().filter(|other| other.about.disk == one.about.disk).count();
                if later >= keep {
                    remove.push((one.about.disk.clone(), one.about.name.clone()));
                }
            }
            let freed = store.prune(&remove)?;
            Ok(print(&format!("{} backups taken away, {} freed\n", remove.len(), Human(freed)))?)
        }
    }
}
