//! `vbd build`.

use std::path::PathBuf;

use anyhow::Context;
use vbd_fs::tailor::{CopyIn, Mount, Network, Text, User};
use vbd_fs::{BuildOptions, BuildSpec, Filesystem, Report, Source, Tailor, Variant};
use vbd_image::size::{Human, Size};

use crate::UsageError;
use crate::progress::{Bar, stop_on_signals};

/// Make a disk file with a filesystem in it, filled from a tree, an archive or a suite.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file to make
    file: PathBuf,
    /// Its size: bytes, or with K, M, G, T (1024) or KB, MB, GB, TB (1000), as 2G or 1.5T
    #[arg(long, short, value_name = "SIZE", allow_hyphen_values = true)]
    size: Size,
    /// What to fill it with: a directory, a tar (plain, gz, xz, zst), - for a tar on standard input, debian:SUITE or
    /// ubuntu:SUITE
    #[arg(long, value_name = "SOURCE", allow_hyphen_values = true)]
    from: Source,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    filesystem: FilesystemArgs,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    tailor: TailorArgs,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Filesystem")]
struct FilesystemArgs {
    /// ext2, ext3 or ext4
    #[arg(long, value_name = "TYPE", default_value_t)]
    filesystem: Filesystem,
    /// Its label, at most 16 bytes
    #[arg(long)]
    label: Option<String>,
    /// Its UUID, instead of a random one
    #[arg(long)]
    uuid: Option<String>,
    /// Percent of it that only the guest's root may fill
    #[arg(long, value_name = "PERCENT")]
    reserved: Option<u8>,
    /// How many inodes it has, that is, how many files it can hold
    #[arg(long, value_name = "NUMBER")]
    inodes: Option<u64>,
    /// An argument more for mke2fs; may be given again
    #[arg(long = "mkfs-arg", value_name = "ARG", allow_hyphen_values = true)]
    mkfs_args: Vec<String>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Source")]
struct SourceArgs {
    /// A path in the directory to leave out, with *, ? and ** as in a shell; may be given again
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Take files that change while they are read as found, and list them, instead of giving up
    #[arg(long)]
    live: bool,
    /// The suite's mirror, instead of the one in the host's apt sources
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
    /// The suite's components, with commas; main alone by default
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    components: Vec<String>,
    /// Packages to install, with commas; may be given again
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    packages: Vec<String>,
    /// How much to install: essential, apt, minbase, important (the default) or standard
    #[arg(long)]
    variant: Option<Variant>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Tailoring")]
struct TailorArgs {
    /// A TOML file with the keys of a `[tailor]` table; the options add to it
    #[arg(long, value_name = "FILE")]
    tailor: Option<PathBuf>,
    /// The machine's name
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// A line of fstab as `DEVICE:/MOUNTPOINT[:TYPE[:OPTIONS]]` or `DEVICE:swap`; may be given again
    #[arg(long, value_name = "ENTRY")]
    fstab: Vec<Mount>,
    /// A user to make, or to change
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// A file with public SSH keys for the user (or for root, without --user); may be given again
    #[arg(long, value_name = "FILE")]
    ssh_key: Vec<PathBuf>,
    /// The user's password as `openssl passwd -6` prints it
    #[arg(long, value_name = "HASH", requires = "user")]
    password_hash: Option<String>,
    /// A group of the image for the user to be in, such as sudo; may be given again
    #[arg(long = "user-group", value_name = "NAME", requires = "user")]
    user_groups: Vec<String>,
    /// Root's password as `openssl passwd -6` prints it
    #[arg(long, value_name = "HASH")]
    root_password_hash: Option<String>,
    /// A serial line to log in on, such as ttyS0 or hvc0
    #[arg(long, value_name = "NAME")]
    serial_console: Option<String>,
    /// dhcp-networkd, dhcp-interfaces or dhcp-interfaces:NAME
    #[arg(long, value_name = "HOW")]
    network: Option<Network>,
    /// Remove machine-id, SSH host keys and random seed; the machine makes its own when it starts
    #[arg(long)]
    reset_identity: bool,
    /// A path in the image to remove; may be given again
    #[arg(long, value_name = "PATH")]
    remove: Vec<String>,
    /// A file or directory to copy into the image; may be given again
    #[arg(long, value_name = "HOST:IMAGE")]
    copy_in: Vec<CopyIn>,
    /// A file of the image to write; may be given again
    #[arg(long, value_name = "PATH=TEXT")]
    write: Vec<Text>,
    /// A file of the image to add text to; may be given again
    #[arg(long, value_name = "PATH=TEXT")]
    append: Vec<Text>,
}

impl TailorArgs {
    fn tailor(self) -> anyhow::Result<Tailor> {
        let mut tailor = match &self.tailor {
            Some(file) => {
                let text = std::fs::read_to_string(file)
                    .with_context(|| format!("cannot read {}", file.display()))?;
                Tailor::from_toml(&text).with_context(|| file.display().to_string())?
            }
            None => Tailor::default(),
        };
        tailor.hostname = self.hostname.or(tailor.hostname);
        tailor.fstab.extend(self.fstab);
        let mut root = User { password_hash: self.root_password_hash, ..root() };
        match self.user {
            Some(name) => tailor.user.push(User {
                name,
                ssh_key_files: self.ssh_key,
                password_hash: self.password_hash,
                groups: self.user_groups,
                ..User::default()
            }),
            None => root.ssh_key_files = self.ssh_key,
        }
        if root != self::root() {
            tailor.user.push(root);
        }
        tailor.serial_console = self.serial_console.or(tailor.serial_console);
        tailor.network = self.network.or(tailor.network);
        tailor.reset_identity |= self.reset_identity;
        tailor.remove.extend(self.remove);
        tailor.copy_in.extend(self.copy_in);
        tailor.write.extend(self.write);
        tailor.append.extend(self.append);
        Ok(tailor)
    }
}

fn root() -> User {
    User { name: "root".to_owned(), ..User::default() }
}

/// How this program is started to do an ordinary user's part of a build.
pub(crate) fn helper() -> anyhow::Result<Vec<PathBuf>> {
    let this = std::env::current_exe().context("cannot find this program")?;
    Ok(vec![this, PathBuf::from("__build-stage")])
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let FilesystemArgs { filesystem, label, uuid, reserved, inodes, mkfs_args } = args.filesystem;
    let SourceArgs { exclude, live, mirror, components, packages, variant } = args.source;
    let spec = BuildSpec {
        filesystem,
        label,
        uuid,
        reserved_percent: reserved,
        inodes,
        mkfs_args,
        exclude,
        live,
        mirror,
        components,
        packages,
        variant,
        ..BuildSpec::new(args.from)
    };
    let options = BuildOptions {
        size: args.size.bytes(),
        spec,
        tailor: args.tailor.tailor()?,
        force: args.force,
        helper: helper()?,
    };
    let mut bar = Bar::new(stop_on_signals());
    let built = vbd_fs::build(&args.file, &options, &mut bar);
    bar.clear();
    let report = built.map_err(|e| match e {
        vbd_fs::Error::Invalid(text) => UsageError(text).into(),
        other => anyhow::Error::from(other),
    })?;
    for warning in &report.warnings {
        eprintln!("vbd: warning: {warning}");
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

fn print(report: &Report) {
    let counts = &report.counts;
    println!(
        "{}: {}, {} of it on the disk",
        report.path.display(),
        Human(report.size),
        Human(report.allocated)
    );
    let label = if report.label.is_empty() { String::new() } else { format!(" {:?}", report.label) };
    println!("{}{label} {}, {} free", report.filesystem, report.uuid, Human(report.free_bytes));
    println!(
        "{} files with {}, {} directories, {} symlinks, {} hard links, {} special files",
        counts.files,
        Human(counts.bytes),
        counts.directories,
        counts.symlinks,
        counts.hard_links,
        counts.special
    );
}
