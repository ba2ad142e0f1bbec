//! `vbd build`.

use std::path::PathBuf;

use anyhow::Context;
use vbd_fs::oci::Machine;
use vbd_fs::tailor::{CopyIn, Mount, Network, Text, User};
use vbd_fs::{
    BuildOptions, BuildSpec, Filesystem, ImageSize, JournalSize, Owner, Report, Sharing, Source, Tailor,
    Time, Variant,
};
use vbd_image::size::{Human, Size};

use crate::UsageError;
use crate::progress::{Bar, stop_on_signals};

use super::disk::DiskArgs;

/// Make a disk file with a filesystem in it, filled from a tree, an archive or a suite.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file to make
    file: PathBuf,
    /// Its size: bytes, or with K, M, G, T (1024) or KB, MB, GB, TB (1000), as 2G or 1.5T; or auto, auto+20%, auto+500M:
    /// as small as holds the content, and some more
    #[arg(long, short, value_name = "SIZE", allow_hyphen_values = true)]
    size: ImageSize,
    /// With --size auto, no smaller than this
    #[arg(long, value_name = "SIZE")]
    min_size: Option<Size>,
    /// With --size auto, an error where more is needed
    #[arg(long, value_name = "SIZE")]
    max_size: Option<Size>,
    /// What to fill it with: a directory, a tar or cpio (plain, gz, xz, zst), a squashfs, - for one of these on standard
    /// input, debian:SUITE or ubuntu:SUITE, or a container image as oci:DIRECTORY docker-archive:FILE (and :NAME of
    /// several) or docker://NAME:TAG
    #[arg(long, value_name = "SOURCE", allow_hyphen_values = true)]
    from: Source,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
    /// Read the filesystem back and compare it with what it was made from
    #[arg(long)]
    verify: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    filesystem: FilesystemArgs,
    #[command(flatten)]
    disk: DiskArgs,
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
    /// Its UUID, instead of one derived from the content
    #[arg(long)]
    uuid: Option<String>,
    /// Percent of it that only the guest's root may fill
    #[arg(long, value_name = "PERCENT")]
    reserved: Option<u8>,
    /// How many inodes it has, that is, how many files it can hold
    #[arg(long, value_name = "NUMBER")]
    inodes: Option<u64>,
    /// Bytes for which there is one inode, instead of 16384
    #[arg(long, value_name = "BYTES")]
    bytes_per_inode: Option<Size>,
    /// The journal's size: auto, none, or as 64M
    #[arg(long, value_name = "SIZE", default_value_t)]
    journal: JournalSize,
    /// Mount options that the filesystem asks for by itself, with commas
    #[arg(long, value_name = "OPTIONS")]
    mount_options: Option<String>,
    /// The root directory's permission bits in octal, instead of the source's
    #[arg(long, value_name = "MODE", value_parser = octal)]
    root_mode: Option<u32>,
    /// The root directory's owner and group by number, instead of the source's
    #[arg(long, value_name = "UID:GID")]
    root_owner: Option<Owner>,
    /// Keep orphans in a file of their own; needs Linux 5.15 and e2fsprogs 1.47
    #[arg(long)]
    orphan_file: bool,
    /// Leave out what GRUB before 2.12 cannot read
    #[arg(long)]
    for_old_grub: bool,
    /// Make a file for swapping of this size, /swapfile, with a line in /etc/fstab
    #[arg(long, value_name = "SIZE")]
    swap_file: Option<Size>,
    /// Share blocks with the source where the host's filesystem can: auto, always or never
    #[arg(long, value_name = "WHEN", default_value_t)]
    reflink: Sharing,
    /// An argument more for mke2fs, for ext2 and ext3; may be given again
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
    /// Leave out what cannot be read, and list it, instead of giving up
    #[arg(long)]
    skip_unreadable: bool,
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
    /// The machine that a container image is for, such as linux/arm64, where there are several; this one otherwise
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<Machine>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Tailoring")]
pub(super) struct TailorArgs {
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
    pub(super) fn tailor(self) -> anyhow::Result<Tailor> {
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

/// The time that reproducible builds are made at, where one is given.
pub(crate) fn time() -> anyhow::Result<Option<Time>> {
    vbd_fs::source_date_epoch().map_err(|e| UsageError(e.to_string()).into())
}

fn size(size: ImageSize, least: Option<Size>, most: Option<Size>) -> anyhow::Result<ImageSize> {
    let (minimum, maximum) = (least.map(Size::bytes), most.map(Size::bytes));
    match size {
        ImageSize::Auto { spare, .. } => Ok(ImageSize::Auto { spare, minimum, maximum }),
        ImageSize::Fixed(_) if minimum.or(maximum).is_some() => {
            Err(UsageError("--min-size and --max-size go with --size auto".to_owned()).into())
        }
        fixed => Ok(fixed),
    }
}

/// Permission bits as chmod(1) takes them by number.
fn octal(text: &str) -> Result<u32, String> {
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| *mode <= 0o7777)
        .ok_or_else(|| "write it as 755 or 1777".to_owned())
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (filesystem, source) = (args.filesystem, args.source);
    let mut spec = BuildSpec {
        filesystem: filesystem.filesystem,
        label: filesystem.label,
        uuid: filesystem.uuid,
        reserved_percent: filesystem.reserved,
        inodes: filesystem.inodes,
        bytes_per_inode: filesystem.bytes_per_inode.map(Size::bytes),
        journal: filesystem.journal,
        mount_options: filesystem.mount_options,
        root_mode: filesystem.root_mode,
        root_owner: filesystem.root_owner,
        orphan_file: filesystem.orphan_file,
        for_old_grub: filesystem.for_old_grub,
        swap_file: filesystem.swap_file,
        reflink: filesystem.reflink,
        mkfs_args: filesystem.mkfs_args,
        exclude: source.exclude,
        live: source.live,
        skip_unreadable: source.skip_unreadable,
        mirror: source.mirror,
        components: source.components,
        packages: source.packages,
        variant: source.variant,
        platform: source.platform,
        ..BuildSpec::new(args.from)
    };
    let mut tailor = args.tailor.tailor()?;
    spec.disk = args.disk.disk(&mut tailor)?;
    let options = BuildOptions {
        size: size(args.size, args.min_size, args.max_size)?,
        spec,
        tailor,
        force: args.force,
        time: time()?,
        verify: args.verify,
        threads: None,
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
    for partition in &report.partitions {
        let kind = partition.filesystem.as_deref().map_or(String::new(), |kind| format!(", {kind}"));
        let id = partition.partuuid.as_deref().map_or(String::new(), |id| format!(", PARTUUID {id}"));
        println!("partition {}: {} {}{kind}{id}", partition.number, Human(partition.size), partition.kind);
    }
}
