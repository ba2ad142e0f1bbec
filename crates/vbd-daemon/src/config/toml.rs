//! The configuration in TOML. What each key means is in `docs/configuration.md`.

use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use toml::Spanned;
use vbd_fs::{BuildSpec, Tailor};
use vbd_image::size::Size;

use super::error::{ConfigError, Source};
use super::model::{
    Access, CacheMode, Config, DiskConfig, Format, Limits, NbdAddress, NbdConfig, NewImage, TlsConfig,
};
use super::ublk::Ublk;
use super::vdev::Vdev;
use super::{check, vhost_user_socket};

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct FileTable {
    runtime_dir: Option<PathText>,
    reactors: Option<NonZeroUsize>,
    #[serde(default)]
    limits: LimitsTable,
    nbd: Option<NbdTable>,
    #[serde(default)]
    disk: DiskTables,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", expecting = "the table [limits]")]
struct LimitsTable {
    max_devices: Option<NonZeroUsize>,
    max_queues: Option<Spanned<u16>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", expecting = "the table [nbd]")]
struct NbdTable {
    listen: Spanned<Addresses>,
    tls: Option<TlsTable>,
    max_clients: Option<NonZeroUsize>,
    memory: Option<Size>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", expecting = "the table [nbd.tls]")]
struct TlsTable {
    certificate: PathText,
    key: PathText,
    client_ca: Option<PathText>,
    required: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", expecting = "a table [[disk]]")]
struct DiskTable {
    path: Spanned<PathText>,
    name: Option<Spanned<String>>,
    format: Option<Told<Format>>,
    #[serde(default)]
    allow_dirs: Vec<PathText>,
    key_file: Option<PathText>,
    key_fd: Option<Spanned<i32>>,
    access: Option<Told<Access>>,
    vdev: Option<Told<Vdev>>,
    cdrom: Option<bool>,
    cache: Option<Told<CacheMode>>,
    queues: Option<Spanned<u16>>,
    vhost_user: Option<Switch>,
    nbd: Option<Spanned<Switch>>,
    #[serde(default, deserialize_with = "Ublk::read")]
    ublk: Option<Ublk>,
    serial: Option<Spanned<String>>,
    discard: Option<bool>,
    direct_io_safe: Option<bool>,
    size: Option<Size>,
    build: Option<Spanned<BuildSpec>>,
    tailor: Option<Spanned<Tailor>>,
}

/// Reads a configuration. Relative paths in it are relative to the directory of `file`, which is not read.
///
/// # Errors
/// What is wrong, with its place: TOML that does not parse, unknown keys, values out of their bounds, disks
/// that exclude each other.
pub fn parse(text: &str, file: &Path) -> Result<Config, ConfigError> {
    let source = Source::new(file, text);
    let table: FileTable =
        toml::from_str(text).map_err(|e| source.error_in(e.span(), in_our_words(e.message())))?;
    let mut config = Config { reactors: table.reactors, ..Config::default() };
    if let Some(dir) = table.runtime_dir {
        config.runtime_dir = dir.below(file);
    }
    config.limits = limits(&table.limits, &source)?;
    config.nbd = table.nbd.map(|table| nbd(table, &source, &mut config)).transpose()?;
    config.disks =
        table.disk.0.into_iter().map(|table| disk(table, &source, &config)).collect::<Result<_, _>>()?;
    check::all(&config, &source)?;
    Ok(config)
}

/// serde speaks of fields where TOML has keys.
fn in_our_words(message: &str) -> String {
    message.replace("unknown field", "unknown key").replace("missing field", "missing key")
}

fn limits(table: &LimitsTable, source: &Source<'_>) -> Result<Limits, ConfigError> {
    let mut limits = Limits::default();
    if let Some(max_devices) = table.max_devices {
        limits.max_devices = max_devices.get();
    }
    if let Some(max_queues) = &table.max_queues {
        limits.max_queues = queues(max_queues, Limits::MAX_QUEUES, source)?;
    }
    Ok(limits)
}

fn queues(queues: &Spanned<u16>, most: u16, source: &Source<'_>) -> Result<u16, ConfigError> {
    match *queues.get_ref() {
        count if (1..=most).contains(&count) => Ok(count),
        count => Err(source.error(
            queues.span().start,
            format!("{count} queues cannot be had: it is a number from 1 to {most}"),
        )),
    }
}

/// The descriptor of a key, which nothing else gives.
fn key_descriptor(
    number: Option<Spanned<i32>>,
    has_file: bool,
    source: &Source<'_>,
) -> Result<Option<i32>, ConfigError> {
    let Some(number) = number else { return Ok(None) };
    let at = number.span().start;
    match number.into_inner() {
        _ if has_file => Err(source.error(at, "`key-file` says where the key is: leave out one of the two")),
        number if number < 0 => Err(source.error(at, format!("{number} is no descriptor"))),
        number => Ok(Some(number)),
    }
}

fn nbd(table: NbdTable, source: &Source<'_>, config: &mut Config) -> Result<NbdConfig, ConfigError> {
    let at = table.listen.span().start;
    let addresses = table.listen.into_inner().read(at).map_err(|(message, at)| source.error(at, message))?;
    if addresses.is_empty() {
        return Err(source.error(at, "the NBD server listens nowhere: name an address, or leave out [nbd]"));
    }
    if addresses.len() > NbdConfig::MAX_ADDRESSES {
        let message = format!("the NBD server listens on at most {} addresses", NbdConfig::MAX_ADDRESSES);
        return Err(source.error(at, message));
    }
    let mut listen = Vec::with_capacity(addresses.len());
    for (mut address, at) in addresses {
        if let NbdAddress::Unix(path) = &mut address {
            *path = below(source.file, path);
            check::socket_path(path).map_err(|message| source.error(at, message))?;
        } else if !address.is_local() && table.tls.is_none() {
            let message = format!(
                "whoever reaches {address} can read and write the disks: [nbd.tls] would keep them out"
            );
            config.warnings.push(source.warning(at, message));
        }
        if listen.contains(&address) {
            return Err(source.error(at, format!("the NBD server listens on {address} already")));
        }
        listen.push(address);
    }
    let defaults = NbdConfig::new(listen);
    Ok(NbdConfig {
        tls: table.tls.map(|tls| TlsConfig {
            certificate: tls.certificate.below(source.file),
            key: tls.key.below(source.file),
            client_ca: tls.client_ca.map(|ca| ca.below(source.file)),
            required: tls.required.unwrap_or(true),
        }),
        max_clients: table.max_clients.map_or(defaults.max_clients, NonZeroUsize::get),
        memory: table.memory.map_or(defaults.memory, Size::bytes),
        ..defaults
    })
}

fn disk(table: Spanned<DiskTable>, source: &Source<'_>, config: &Config) -> Result<DiskConfig, ConfigError> {
    let at = table.span().start;
    let table = table.into_inner();
    let path_at = table.path.span().start;
    let path = table.path.into_inner().below(source.file);
    let (name, name_at) = match table.name {
        Some(name) => (name.get_ref().clone(), name.span().start),
        None => match DiskConfig::default_name(&path) {
            Some(name) => (name, path_at),
            None => return Err(source.error(path_at, format!("{} names no file", path.display()))),
        },
    };
    DiskConfig::check_name(&name).map_err(|message| source.error(name_at, message))?;
    let defaults = DiskConfig::new(name.clone(), path);
    let serial = match table.serial {
        None => defaults.serial.clone(),
        Some(serial) => {
            DiskConfig::check_serial(serial.get_ref())
                .map_err(|message| source.error(serial.span().start, message))?;
            serial.into_inner()
        }
    };
    let vhost_user = match table.vhost_user.unwrap_or(Switch::On) {
        Switch::On => Some(vhost_user_socket(&config.runtime_dir, &name)),
        Switch::Off => None,
        Switch::Named(socket) => Some(below(source.file, Path::new(&socket))),
    };
    let nbd_at = table.nbd.as_ref().map(|nbd| nbd.span().start);
    let nbd = match (table.nbd.map(Spanned::into_inner), nbd_at) {
        (Some(Switch::Off), _) => None,
        (Some(_), Some(at)) if config.nbd.is_none() => {
            return Err(
                source.error(at, "no NBD server listens: add [nbd] with `listen = \"unix:nbd.sock\"`")
            );
        }
        (Some(Switch::Named(export)), _) => Some(export),
        (Some(Switch::On) | None, _) => config.nbd.is_some().then(|| name.clone()),
    };
    if vhost_user.is_none() && nbd.is_none() && table.ublk.is_none() {
        let message = format!("nobody could use `{name}`: leave it `vhost-user`, `nbd` or `ublk`");
        return Err(source.error(at, message));
    }
    let create = new_image(table.size, table.build, table.tailor, source)?;
    let cdrom = table.cdrom.unwrap_or(false);
    let access = table.access.map(|access| access.0);
    Ok(DiskConfig {
        format: table.format.map_or(defaults.format, |format| format.0),
        allow_dirs: table.allow_dirs.into_iter().map(|dir| dir.below(source.file)).collect(),
        key_fd: key_descriptor(table.key_fd, table.key_file.is_some(), source)?,
        key_file: table.key_file.map(|key| key.below(source.file)),
        access: access.unwrap_or(if cdrom { Access::ReadOnly } else { Access::ReadWrite }),
        vdev: table.vdev.map(|vdev| vdev.0),
        cdrom,
        cache: table.cache.map(|cache| cache.0).unwrap_or_default(),
        queues: table.queues.map(|count| queues(&count, config.limits.max_queues, source)).transpose()?,
        vhost_user,
        nbd,
        ublk: table.ublk,
        serial,
        discard: table.discard.unwrap_or(defaults.discard),
        create,
        direct_io_safe: table.direct_io_safe.unwrap_or(false),
        position: Some(source.position(at)),
        ..defaults
    })
}

/// What `size`, `build` and `tailor` say together; their paths begin where the configuration is.
fn new_image(
    size: Option<Size>,
    build: Option<Spanned<BuildSpec>>,
    tailor: Option<Spanned<Tailor>>,
    source: &Source<'_>,
) -> Result<Option<NewImage>, ConfigError> {
    let of = |span: Range<usize>, message: &str| Err(source.error(span.start, message));
    let tailor = match (tailor, &build) {
        (Some(tailor), None) => {
            return of(tailor.span(), "`tailor` changes a filesystem that is built here: add `build`");
        }
        (tailor, _) => tailor.map(|table| tailored(table, source)).transpose()?,
    };
    let build = match (build, size) {
        (Some(build), None) => {
            return of(
                build.span(),
                "an image is built in a file of a size: add `size = \"2G\"` to the disk",
            );
        }
        (Some(build), Some(_)) => {
            let span = build.span();
            let mut spec = build.into_inner();
            spec.check().map_err(|e| source.error(span.start, e.to_string()))?;
            if let Some(disk) = &mut spec.disk {
                disk.begin_paths_at(source.file.parent().unwrap_or(Path::new("")));
            }
            match &mut spec.from {
                vbd_fs::Source::Stdin => {
                    return of(span, "`from = \"-\"`: a configuration has no standard input, name a file");
                }
                vbd_fs::Source::Path(path) => *path = below(source.file, path),
                vbd_fs::Source::Image(image) => image.path = below(source.file, &image.path),
                vbd_fs::Source::Registry(_) | vbd_fs::Source::Suite { .. } => {}
            }
            Some(spec)
        }
        (None, _) => None,
    };
    Ok(size.map(|size| NewImage { size, build, tailor: tailor.unwrap_or_default() }))
}

fn tailored(table: Spanned<Tailor>, source: &Source<'_>) -> Result<Tailor, ConfigError> {
    let at = table.span().start;
    let mut tailor = table.into_inner();
    tailor.check().map_err(|e| source.error(at, e.to_string()))?;
    let copied = tailor.copy_in.iter_mut().map(|copy| &mut copy.from);
    let keys = tailor.user.iter_mut().flat_map(|user| &mut user.ssh_key_files);
    for path in copied.chain(keys) {
        *path = below(source.file, path);
    }
    Ok(tailor)
}

/// A path as the configuration has it: relative ones begin where the configuration is.
fn below(file: &Path, path: &Path) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).join(path)
}

/// A path that a system call could take.
struct PathText(String);

impl PathText {
    fn below(&self, file: &Path) -> PathBuf {
        below(file, Path::new(&self.0))
    }
}

impl<'de> Deserialize<'de> for PathText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)? {
            path if path.is_empty() => Err(D::Error::custom("an empty path names nothing")),
            path if path.contains('\0') => Err(D::Error::custom("a path has no NUL character in it")),
            path => Ok(Self(path)),
        }
    }
}

/// A value that is written as a text.
struct Told<T>(T);

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Told<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map(Self).map_err(D::Error::custom)
    }
}

/// A front-end of a disk: as usual, not at all, or under a name of its own.
enum Switch {
    On,
    Off,
    Named(String),
}

impl<'de> Deserialize<'de> for Switch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SwitchVisitor;
        impl Visitor<'_> for SwitchVisitor {
            type Value = Switch;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false or a name in quotes")
            }

            fn visit_bool<E>(self, on: bool) -> Result<Switch, E> {
                Ok(if on { Switch::On } else { Switch::Off })
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Switch, E> {
                match name {
                    "" => Err(E::custom("an empty name: write true, false or a name")),
                    name if name.contains('\0') => Err(E::custom("a name has no NUL character in it")),
                    name => Ok(Switch::Named(name.to_owned())),
                }
            }
        }
        deserializer.deserialize_any(SwitchVisitor)
    }
}

/// Every `[[disk]]`.
#[derive(Default)]
struct DiskTables(Vec<Spanned<DiskTable>>);

impl<'de> Deserialize<'de> for DiskTables {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DisksVisitor;
        impl<'de> Visitor<'de> for DisksVisitor {
            type Value = DiskTables;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table [[disk]], in two brackets, for each disk")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<DiskTables, A::Error> {
                let mut disks = Vec::new();
                while let Some(disk) = list.next_element()? {
                    disks.push(disk);
                }
                Ok(DiskTables(disks))
            }
        }
        deserializer.deserialize_seq(DisksVisitor)
    }
}

/// One address or a list of them.
enum Addresses {
    One(String),
    Several(Vec<Spanned<String>>),
}

impl Addresses {
    /// The addresses with the bytes at which they are written; a single one is at `start`.
    fn read(self, start: usize) -> Result<Vec<(NbdAddress, usize)>, (String, usize)> {
        let texts = match self {
            Self::One(text) => vec![(text, start)],
            Self::Several(texts) => {
                texts.into_iter().map(|t| (t.get_ref().clone(), t.span().start)).collect()
            }
        };
        let read = |(text, at): (String, usize)| match text.parse() {
            Ok(address) => Ok((address, at)),
            Err(message) => Err((message, at)),
        };
        texts.into_iter().map(read).collect()
    }
}

impl<'de> Deserialize<'de> for Addresses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AddressesVisitor;
        impl<'de> Visitor<'de> for AddressesVisitor {
            type Value = Addresses;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address such as \"unix:nbd.sock\" or \"127.0.0.1:10809\", or a list of them")
            }

            fn visit_str<E>(self, address: &str) -> Result<Addresses, E> {
                Ok(Addresses::One(address.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Addresses, A::Error> {
                let mut addresses = Vec::new();
                while let Some(address) = list.next_element()? {
                    addresses.push(address);
                }
                Ok(Addresses::Several(addresses))
            }
        }
        deserializer.deserialize_any(AddressesVisitor)
    }
}
