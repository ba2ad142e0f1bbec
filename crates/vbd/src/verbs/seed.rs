//! `vbd seed`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use vbd_fs::{LARGEST_SEED_FILE, Seed};
use vbd_image::size::Human;

use crate::UsageError;

/// Make a seed disk for cloud-init (NoCloud): a small disk that tells a distribution's cloud image its name and users.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file to make
    file: PathBuf,
    /// The machine's name
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// A user to make, who may use sudo; without one the image's own default user gets the keys
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// A file with public SSH keys for the user; may be given again
    #[arg(long, value_name = "FILE")]
    ssh_key: Vec<PathBuf>,
    /// The user's password as `openssl passwd -6` prints it
    #[arg(long, value_name = "HASH", requires = "user")]
    password_hash: Option<String>,
    /// The name of the instance; one that follows from the content by default
    #[arg(long, value_name = "ID")]
    instance_id: Option<String>,
    /// A file to be user-data as it is, instead of users and keys
    #[arg(long, value_name = "FILE", conflicts_with_all = ["user", "ssh_key", "password_hash"])]
    user_data: Option<PathBuf>,
    /// A file to be meta-data as it is, instead of instance and hostname
    #[arg(long, value_name = "FILE", conflicts_with_all = ["hostname", "instance_id"])]
    meta_data: Option<PathBuf>,
    /// A file to be network-config as it is
    #[arg(long, value_name = "FILE")]
    network_config: Option<PathBuf>,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// A file's content, which must not be larger than a text.
fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let size = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?.len();
    if size > LARGEST_SEED_FILE {
        let (size, most) = (Human(size), Human(LARGEST_SEED_FILE));
        return Err(UsageError(format!(
            "{}: {size} is too large for a seed disk, at most {most}",
            path.display()
        ))
        .into());
    }
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn keys(paths: &[PathBuf]) -> anyhow::Result<Vec<String>> {
    let mut keys = Vec::new();
    for path in paths {
        let text =
            String::from_utf8(read(path)?).with_context(|| format!("{} is no text", path.display()))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        keys.extend(lines.map(str::to_owned));
    }
    Ok(keys)
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let whole = |path: &Option<PathBuf>| path.as_deref().map(read).transpose();
    let seed = Seed {
        hostname: args.hostname,
        user: args.user,
        ssh_keys: keys(&args.ssh_key)?,
        password_hash: args.password_hash,
        instance_id: args.instance_id,
        user_data: whole(&args.user_data)?,
        meta_data: whole(&args.meta_data)?,
        network_config: whole(&args.network_config)?,
    };
    let time = super::build::time()?.unwrap_or_default();
    let report = seed.write(&args.file, args.force, time).map_err(|e| match e {
        vbd_fs::Error::Invalid(_) | vbd_fs::Error::Tailor { .. } => UsageError(e.to_string()).into(),
        other => anyhow::Error::from(other),
    })?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        let instance = report.instance_id.map_or(String::new(), |id| format!(", instance {id}"));
        println!(
            "{}: {}, a seed for cloud-init (NoCloud){instance}",
            report.path.display(),
            Human(report.size)
        );
    }
    Ok(())
}
