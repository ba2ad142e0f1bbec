//! `vbd attach`.

use std::path::PathBuf;
use std::str::FromStr;

use vbd_daemon::config::{
    Access, CacheMode, Config, DiskConfig, Format, Limits, NbdAddress, NbdConfig, TlsConfig, Ublk, Vdev,
    VdevError,
};
use vbd_daemon::xen;

use super::serving;
use crate::UsageError;

/// Serve a file as a disk, in the foreground, until SIGTERM or Ctrl-C.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file or block device
    file: PathBuf,
    /// The disk's name, in messages and as NBD export (default: the file's name)
    #[arg(long)]
    name: Option<String>,
    /// Serve it as a vhost-user-blk device on this socket
    #[arg(long, value_name = "SOCK")]
    vhost_user: Option<PathBuf>,
    /// Serve it as an NBD export at unix:SOCK or HOST:PORT; may be given several times
    #[arg(long, value_name = "ADDRESS")]
    nbd: Vec<NbdAddress>,
    /// Give it to a Xen domain that runs here, as this device (vm1,xvdb), until this process stops
    #[arg(long, value_name = "DOMAIN,VDEV", conflicts_with_all = ["vhost_user", "nbd", "ublk"])]
    xen: Option<Place>,
    /// Make it a block device of this host, /dev/ublkbN: of this number, or any (Linux 6.0). The device that a killed
    /// vbd has left waiting is taken up again
    #[arg(long, value_name = "N", num_args = 0..=1, value_parser = clap::value_parser!(u32).range(..=i64::from(Ublk::MAX)))]
    #[expect(clippy::option_option, reason = "not said, said, said with a number")]
    ublk: Option<Option<u32>>,
    /// Guests can only read
    #[arg(long)]
    read_only: bool,
    /// Queues offered to a vhost-user guest, or of the block device
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(Limits::MAX_QUEUES)))]
    queues: Option<u16>,
    /// Use of the host's page cache: none (O_DIRECT), writeback, writethrough
    #[arg(long, value_name = "MODE", default_value_t = CacheMode::None)]
    cache: CacheMode,
    /// The format of the file, raw unless said; it is never guessed
    #[arg(long)]
    format: Option<Format>,
    /// A directory, besides the file's own, where it may name backing files and data files; may be given again
    #[arg(long, value_name = "DIR")]
    allow_dir: Vec<PathBuf>,
    #[command(flatten)]
    key: super::image::KeyArgs,
    /// Write although others may use the file, as Xen's `w!`: for cluster filesystems
    #[arg(long, conflicts_with = "read_only")]
    force_lease: bool,
    /// The serial number that the guest reads, up to 20 characters (default: from the name)
    #[arg(long)]
    serial: Option<String>,
    /// Keep the space that the guest discards
    #[arg(long)]
    no_discard: bool,
    /// NBD over TLS: the server's certificate, with its chain (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// NBD over TLS: the certificate's private key (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// NBD over TLS: turn away clients without a certificate that this one has signed (PEM)
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_client_ca: Option<PathBuf>,
    /// NBD over TLS: serve clients that do not ask for it, too
    #[arg(long, requires = "tls_cert")]
    tls_optional: bool,
    #[command(flatten)]
    serving: serving::Args,
}

/// A device of a domain.
#[derive(Clone)]
struct Place {
    domain: String,
    vdev: Vdev,
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (domain, vdev) = text.rsplit_once(',').filter(|(domain, _)| !domain.is_empty()).ok_or_else(|| {
            format!("`{text}` names no device of a domain: write `vm1,xvdb`, the domain and what it calls the disk")
        })?;
        Ok(Place {
            domain: domain.to_owned(),
            vdev: vdev.parse().map_err(|error: VdevError| error.to_string())?,
        })
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let listeners = vbd_daemon::passed_listeners().map_err(UsageError)?;
    let exported = !args.nbd.is_empty() || !listeners.is_empty();
    if args.vhost_user.is_none() && !exported && args.ublk.is_none() && args.xen.is_none() {
        let message = "nothing to serve the disk on: say --vhost-user SOCK, --nbd unix:SOCK, --nbd HOST:PORT, --ublk or --xen DOMAIN,VDEV";
        return Err(UsageError(message.to_owned()).into());
    }
    if args.tls_cert.is_some() && !exported {
        return Err(UsageError("TLS is for NBD: say --nbd HOST:PORT".to_owned()).into());
    }
    let name = args.name.or_else(|| DiskConfig::default_name(&args.file));
    let name = name.ok_or_else(|| UsageError(format!("{}: say --name NAME", args.file.display())))?;
    DiskConfig::check_name(&name).map_err(|message| UsageError(format!("--name: {message}")))?;
    if let Some(serial) = &args.serial {
        DiskConfig::check_serial(serial).map_err(|message| UsageError(format!("--serial: {message}")))?;
    }

    let format = super::format_of(&args.file, args.format, "--format")?;
    let mut disk = DiskConfig::new(&name, args.file);
    disk.format = format;
    disk.allow_dirs = args.allow_dir;
    (disk.key_file, disk.key_fd) = (args.key.key_file, args.key.key_fd);
    disk.access = match (args.read_only, args.force_lease) {
        (true, _) => Access::ReadOnly,
        (false, false) => Access::ReadWrite,
        (false, true) => Access::ReadWriteForce,
    };
    disk.cache = args.cache;
    disk.queues = args.queues;
    disk.discard = !args.no_discard;
    disk.serial = args.serial.unwrap_or(disk.serial);
    disk.vhost_user = args.vhost_user;
    disk.nbd = exported.then_some(name);
    let xen = args.xen.map(|place| {
        (disk.xen, disk.vdev) = (Some(place.domain), Some(place.vdev));
        let options = xen::Options::new(xen::Serves::Configured { attach: true });
        xen::Options { queues: args.queues.unwrap_or(options.queues), ..options }
    });
    disk.ublk = args.ublk.map(|number| number.map_or(Ublk::Any, Ublk::Number));

    let tls = args.tls_cert.zip(args.tls_key).map(|(certificate, key)| TlsConfig {
        certificate,
        key,
        client_ca: args.tls_client_ca,
        required: !args.tls_optional,
    });
    for address in &args.nbd {
        if !address.is_local() && tls.is_none() {
            eprintln!(
                "vbd: whoever reaches {address} can read and write the disk: --tls-cert and --tls-key would keep them out"
            );
        }
    }
    let nbd = exported.then(|| NbdConfig { tls, ..NbdConfig::new(args.nbd) });
    let config = Config { nbd, disks: vec![disk], ..Config::default() };
    serving::serve(args.serving, config, listeners, xen, true)
}
