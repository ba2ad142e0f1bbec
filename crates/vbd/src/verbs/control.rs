//! What the verbs that speak to serving processes have in common: finding the process that serves a disk.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use vbd_daemon::config::default_runtime_dir;
use vbd_daemon::control::{Client, DiskInfo, client::ClientError, find};

/// Which processes to ask.
#[derive(clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    /// A control socket, or a runtime directory with several (default: this user's runtime directory)
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Where to look without `control`.
    #[arg(skip)]
    default: Option<PathBuf>,
}

/// A disk and the process that serves it.
pub(crate) struct Found {
    pub(crate) client: Client,
    pub(crate) disk: DiskInfo,
}

impl Args {
    /// The same, with another place to look where none was named.
    pub(crate) fn or(self, default: &Path) -> Self {
        Args { default: Some(default.to_owned()), ..self }
    }

    /// Clients of the processes that serve now.
    fn clients(&self) -> anyhow::Result<Vec<Client>> {
        let directory = match &self.control {
            Some(path) if !path.is_dir() => return Ok(vec![Client::new(path)]),
            Some(path) => path.clone(),
            None => self.default.clone().unwrap_or_else(default_runtime_dir),
        };
        let sockets = find::sockets(&directory);
        let sockets =
            sockets.with_context(|| format!("{}: looking for control sockets", directory.display()))?;
        Ok(sockets.into_iter().map(Client::new).collect())
    }

    /// What each of them answers. One that ends meanwhile is left out, unless it was named.
    pub(crate) fn ask<T>(
        &self,
        question: impl Fn(&Client) -> Result<T, ClientError>,
    ) -> anyhow::Result<Vec<(Client, T)>> {
        let mut answers = Vec::new();
        for client in self.clients()? {
            match question(&client) {
                Ok(answer) => answers.push((client, answer)),
                Err(error) if self.control.as_ref().is_some_and(|path| !path.is_dir()) => {
                    return Err(error.into());
                }
                Err(error @ ClientError::Unreachable { .. }) => tracing::debug!("{error}"),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(answers)
    }

    /// All disks of all of them.
    pub(crate) fn disks(&self) -> anyhow::Result<Vec<Found>> {
        let answers = self.ask(Client::disks)?.into_iter();
        let found = answers.flat_map(|(client, disks)| {
            disks.into_iter().map(move |disk| Found { client: client.clone(), disk })
        });
        Ok(found.collect())
    }

    /// The disk of this name; `None` where there is none.
    pub(crate) fn find(&self, name: &str) -> anyhow::Result<Option<Found>> {
        self.only(name, |disk| disk.name == name)
    }

    /// The disk that is this file, if it is served.
    pub(crate) fn find_file(&self, file: &Path) -> anyhow::Result<Option<Found>> {
        let same = |disk: &DiskInfo| match (disk.path.canonicalize(), file.canonicalize()) {
            (Ok(served), Ok(file)) => served == file,
            _ => false,
        };
        self.only(&file.display().to_string(), same)
    }

    fn only(&self, what: &str, chosen: impl Fn(&DiskInfo) -> bool) -> anyhow::Result<Option<Found>> {
        let mut found = self.disks()?;
        found.retain(|found| chosen(&found.disk));
        if found.len() > 1 {
            let sockets: Vec<_> =
                found.iter().map(|f| format!("--control {}", f.client.socket().display())).collect();
            bail!("{} processes serve {what}: say which, {}", found.len(), sockets.join(" or "));
        }
        Ok(found.pop())
    }
}

/// No process serves a disk of that name.
pub(crate) fn unknown(name: &str) -> anyhow::Error {
    anyhow::anyhow!("no disk called `{name}` is served: `vbd list` shows those that are")
}
