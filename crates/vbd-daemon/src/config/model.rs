//! What a configuration says, whichever language it was written in.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use vbd_fs::{BuildSpec, Tailor};
use vbd_image::size::Size;

use super::error::{Position, Warning};
use super::runtime::default_runtime_dir;
use super::ublk::Ublk;
use super::vdev::Vdev;

pub use vbd_formats::Format;

/// All that one process serves, and the bounds it keeps.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where sockets and records go.
    pub runtime_dir: PathBuf,
    /// Reactor threads; none means as many as the machine makes sensible.
    pub reactors: Option<NonZeroUsize>,
    /// Bounds that a mistake or a hostile client runs into.
    pub limits: Limits,
    /// The NBD server, when there is one.
    pub nbd: Option<NbdConfig>,
    /// The Xen domain whose file this was.
    pub domain: Option<Domain>,
    /// The disks, in the order of the file.
    pub disks: Vec<DiskConfig>,
    /// What was read and will not have the effect that it would have elsewhere.
    pub warnings: Vec<Warning>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            runtime_dir: default_runtime_dir(),
            reactors: None,
            limits: Limits::default(),
            nbd: None,
            domain: None,
            disks: Vec::new(),
            warnings: Vec::new(),
        }
    }
}

/// Bounds of one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most disks served at once, those added later included.
    pub max_devices: usize,
    /// The most queues that one disk offers.
    pub max_queues: u16,
}

impl Limits {
    /// What vhost-user-blk can number, and what is offered unless a limit says otherwise.
    pub const MAX_QUEUES: u16 = 128;
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_devices: 4096, max_queues: Self::MAX_QUEUES }
    }
}

/// The NBD server of the process: every disk with an export name is served by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdConfig {
    /// Where it listens; at least one.
    pub listen: Vec<NbdAddress>,
    /// Certificates; without them everything goes in the clear.
    pub tls: Option<TlsConfig>,
    /// The most clients connected at once.
    pub max_clients: usize,
    /// The most memory, in bytes, that the requests of all clients hold at once.
    pub memory: u64,
}

impl NbdConfig {
    /// The default of `max_clients`.
    pub const MAX_CLIENTS: usize = 128;
    /// The most addresses to listen on.
    pub const MAX_ADDRESSES: usize = 64;
    /// The default of `memory`.
    pub const MEMORY: u64 = 256 << 20;

    /// A server with the default bounds at these addresses.
    pub fn new(listen: Vec<NbdAddress>) -> Self {
        Self { listen, tls: None, max_clients: Self::MAX_CLIENTS, memory: Self::MEMORY }
    }
}

/// Where an NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NbdAddress {
    /// A unix socket, written `unix:PATH`.
    Unix(PathBuf),
    /// A TCP port, written `HOST:PORT`.
    Tcp {
        /// A name or an address (an IPv6 address without its brackets).
        host: String,
        /// The port.
        port: u16,
    },
}

impl NbdAddress {
    /// Whether only this machine can reach the address.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp { host, .. } => {
                host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
            }
        }
    }
}

impl FromStr for NbdAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let example = "write `unix:/run/vbd/nbd.sock`, `127.0.0.1:10809` or `[::1]:10809`";
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() || path.contains('\0') {
                return Err(format!("`{}` names no socket: {example}", text.escape_debug()));
            }
            return Ok(Self::Unix(path.into()));
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(|| format!("`{text}` has no port: {example}"))?;
        let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        if bracketed.is_none() && host.contains(':') {
            return Err(format!("`{text}`: an IPv6 address stands in brackets: {example}"));
        }
        let host = bracketed.unwrap_or(host);
        if host.is_empty() {
            return Err(format!("`{text}` has no host: write `0.0.0.0{text}` to listen on every address"));
        }
        match port.parse() {
            Ok(port) if port > 0 => Ok(Self::Tcp { host: host.to_owned(), port }),
            _ => Err(format!("`{port}` is no port: it is a number from 1 to 65535")),
        }
    }
}

impl fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// The certificates of the NBD server, as PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsConfig {
    /// The server's certificate with those that vouch for it.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Who signs clients' certificates; with it, a client without one is turned away.
    pub client_ca: Option<PathBuf>,
    /// Whether a client that does not ask for TLS is turned away.
    pub required: bool,
}

/// The Xen domain that the disks belong to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its UUID, as written.
    pub uuid: Option<String>,
}

/// One disk.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// What commands and clients call it; one disk has a name.
    pub name: String,
    /// The image file or block device.
    pub path: PathBuf,
    /// The image's format, told and never guessed.
    pub format: Format,
    /// Directories, besides its own, where the image may name files.
    pub allow_dirs: Vec<PathBuf>,
    /// The file with the key of an encrypted image.
    pub key_file: Option<PathBuf>,
    /// The descriptor with it, by the number that this process was given it by.
    pub key_fd: Option<i32>,
    /// Who may write.
    pub access: Access,
    /// What a Xen guest calls it.
    pub vdev: Option<Vdev>,
    /// The Xen domain, by name or number, that is served the disk as `vdev`; none when none is.
    pub xen: Option<String>,
    /// Whether the guest is to see a CD drive.
    pub cdrom: bool,
    /// How the host's page cache and the guest's flushes are used.
    pub cache: CacheMode,
    /// How many queues are offered; none for as many as the front-end and the limits allow.
    pub queues: Option<u16>,
    /// The socket of the vhost-user-blk device; none when there is to be no such device.
    pub vhost_user: Option<PathBuf>,
    /// The name of the NBD export; none when there is to be no export.
    pub nbd: Option<String>,
    /// The block device of the host itself; none when there is to be none.
    pub ublk: Option<Ublk>,
    /// What the guest reads as the disk's serial number; at most [`DiskConfig::MAX_SERIAL`] bytes.
    pub serial: String,
    /// Whether the guest is offered discard.
    pub discard: bool,
    /// How the image is made when there is none; without it, the image has to be there.
    pub create: Option<NewImage>,
    /// Xen's `direct-io-safe`, kept for the Xen front-end.
    pub direct_io_safe: bool,
    /// Where in the configuration file the disk begins; none for one that comes from elsewhere.
    pub position: Option<Position>,
}

impl DiskConfig {
    /// The longest serial number that virtio-blk can carry, in bytes.
    pub const MAX_SERIAL: usize = 20;
    /// The longest name, in bytes: an NBD export name may have 4096, a socket's file far fewer.
    pub const MAX_NAME: usize = 200;

    /// A raw disk that is read and written, with every other setting at its default and no front-end.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        let name = name.into();
        Self {
            serial: default_serial(&name),
            name,
            path: path.into(),
            format: Format::Raw,
            allow_dirs: Vec::new(),
            key_file: None,
            key_fd: None,
            access: Access::ReadWrite,
            vdev: None,
            xen: None,
            cdrom: false,
            cache: CacheMode::None,
            queues: None,
            vhost_user: None,
            nbd: None,
            ublk: None,
            discard: true,
            create: None,
            direct_io_safe: false,
            position: None,
        }
    }

    /// The name of a disk that was given none: its file's.
    pub fn default_name(path: &Path) -> Option<String> {
        path.file_name().map(|name| name.to_string_lossy().into_owned())
    }

    /// Why a text cannot name a disk, if it cannot: a name is a file's name and an export's, and is printed.
    pub fn check_name(name: &str) -> Result<(), String> {
        let bad = |c: char| c == '/' || c.is_control();
        if name.is_empty() || name == "." || name == ".." {
            Err(format!("`{name}` cannot name a disk"))
        } else if let Some(c) = name.chars().find(|&c| bad(c)) {
            Err(format!("a disk's name has no `{}` in it", c.escape_debug()))
        } else if name.len() > Self::MAX_NAME {
            Err(format!("a disk's name of {} bytes is too long: {} are allowed", name.len(), Self::MAX_NAME))
        } else {
            Ok(())
        }
    }

    /// Why a text cannot be a serial number, if it cannot (virtio 1.3, 5.2.6: 20 bytes of ASCII).
    pub fn check_serial(serial: &str) -> Result<(), String> {
        if serial.len() > Self::MAX_SERIAL {
            Err(format!("a serial number of {} bytes is too long: 20 are allowed", serial.len()))
        } else if serial.bytes().any(|b| !b.is_ascii_graphic() && b != b' ') {
            Err("a serial number has printable ASCII characters only".to_owned())
        } else {
            Ok(())
        }
    }
}

/// The serial number of a disk that was given none: what fits of its name.
pub fn default_serial(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_graphic() { c } else { '_' }).take(DiskConfig::MAX_SERIAL).collect()
}

/// How an image that is not there yet is made.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Its size.
    pub size: Size,
    /// The filesystem in it and what fills it; none for an image of zeroes.
    pub build: Option<BuildSpec>,
    /// What is changed in the filesystem; nothing without one.
    pub tailor: Tailor,
}

/// Who may write to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(clippy::enum_variant_names, reason = "everybody reads; the rest of the name is the difference")]
pub enum Access {
    /// The guest reads (`r`, `ro`).
    ReadOnly,
    /// The guest reads and writes, and is the only one (`w`, `rw`).
    ReadWrite,
    /// The guest reads and writes although others may, too (`w!`): for filesystems made for it.
    ReadWriteForce,
}

impl Access {
    /// Whether the guest may write.
    pub fn is_writable(self) -> bool {
        self != Self::ReadOnly
    }
}

impl FromStr for Access {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "r" | "ro" => Ok(Self::ReadOnly),
            "w" | "rw" => Ok(Self::ReadWrite),
            "w!" | "rw!" => Ok(Self::ReadWriteForce),
            _ => Err(format!(
                "unknown access `{name}`: it is `r`, `w`, or `w!` for a disk with several writers"
            )),
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadOnly => "r",
            Self::ReadWrite => "w",
            Self::ReadWriteForce => "w!",
        })
    }
}

/// How the host's page cache and the guest's flushes are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Around the page cache (O_DIRECT); durable when the guest flushes.
    #[default]
    None,
    /// Through the page cache; durable when the guest flushes.
    Writeback,
    /// Through the page cache; every write is durable when it completes.
    Writethrough,
}

impl FromStr for CacheMode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "none" => Ok(Self::None),
            "writeback" => Ok(Self::Writeback),
            "writethrough" => Ok(Self::Writethrough),
            _ => Err(format!("unknown cache mode `{name}`: it is `none`, `writeback` or `writethrough`")),
        }
    }
}

impl fmt::Display for CacheMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Writeback => "writeback",
            Self::Writethrough => "writethrough",
        })
    }
}
