//! What has to hold between the disks of one configuration.

use std::collections::HashMap;
use std::hash::Hash;
use std::path::Path;

use super::error::{ConfigError, Position, Source, whole_file};
use super::model::{Config, DiskConfig, NbdAddress};

/// The longest path of a unix socket, in bytes: `sun_path` less its final NUL (unix(7)).
pub(super) const MAX_SOCKET_PATH: usize = 107;

/// Checks all of it.
pub(super) fn all(config: &Config, source: &Source<'_>) -> Result<(), ConfigError> {
    count(config, source)?;
    for disk in &config.disks {
        DiskConfig::check_name(&disk.name).map_err(|message| at(source.file, disk, message))?;
        if let Some(socket) = &disk.vhost_user {
            socket_path(socket).map_err(|message| at(source.file, disk, message))?;
        }
    }
    // One domain has each device once; a TOML file may serve many machines.
    if config.domain.is_some() {
        unique(
            config,
            source.file,
            |disk| disk.vdev.map(|vdev| vdev.number()),
            |number| {
                let vdev =
                    config.disks.iter().filter_map(|disk| disk.vdev).find(|vdev| vdev.number() == number);
                let vdev = vdev.map(|vdev| vdev.to_string()).unwrap_or_default();
                format!("the guest has a `{vdev}` already: give this disk another device")
            },
        )?;
    }
    unique(
        config,
        source.file,
        |disk| Some(disk.name.clone()),
        |name| format!("another disk is called `{name}`: give one of them another `name`"),
    )?;
    unique(
        config,
        source.file,
        |disk| disk.nbd.clone(),
        |export| {
            format!("another disk is exported as `{export}`: name one of the exports with `nbd = \"...\"`")
        },
    )?;
    unique(
        config,
        source.file,
        |disk| disk.vhost_user.clone(),
        |socket| {
            format!(
                "another disk has the socket {}: set another with `vhost-user = \"...\"`",
                socket.display()
            )
        },
    )?;
    unique(
        config,
        source.file,
        |disk| disk.ublk.and_then(super::Ublk::number),
        |number| format!("another disk is ublk{number}: choose another number, or `ublk = true` for any"),
    )?;
    sockets_of_both(config, source)?;
    one_writer(&config.disks, source.file, |disk| Some(disk.path.clone()))
}

/// Refuses a file that several disks use while one of them writes, unless every writer has `w!`. `identity`
/// says which file a disk is.
pub(super) fn one_writer<K: Eq + Hash>(
    disks: &[DiskConfig],
    file: &Path,
    identity: impl Fn(&DiskConfig) -> Option<K>,
) -> Result<(), ConfigError> {
    let mut users: HashMap<K, &DiskConfig> = HashMap::new();
    for disk in disks {
        let Some(key) = identity(disk) else { continue };
        let Some(first) = users.get(&key) else {
            users.insert(key, disk);
            continue;
        };
        let claims = |d: &DiskConfig| d.access == super::Access::ReadWrite;
        if claims(first) || claims(disk) {
            let message = format!(
                "{} is the disk `{}`{} too, and two users of a disk that one writes to destroy it: \
                 serve it once, make both read-only (`r`), or mean it with `w!` for every writer",
                disk.path.display(),
                first.name,
                there(first.position),
            );
            return Err(at(file, disk, message));
        }
        // The one that may write stands for all of them.
        if disk.access.is_writable() {
            users.insert(key, disk);
        }
    }
    Ok(())
}

/// Why no socket can have this path, if none can.
pub(super) fn socket_path(path: &Path) -> Result<(), String> {
    let length = path.as_os_str().len();
    if length > MAX_SOCKET_PATH {
        return Err(format!(
            "the socket path {} has {length} bytes and the system allows {MAX_SOCKET_PATH}: \
             set a shorter `runtime-dir` or name the socket",
            path.display()
        ));
    }
    Ok(())
}

fn count(config: &Config, source: &Source<'_>) -> Result<(), ConfigError> {
    let limit = config.limits.max_devices;
    match config.disks.get(limit) {
        None => Ok(()),
        Some(first_too_many) => {
            let disks = config.disks.len();
            let message =
                format!("{disks} disks are more than `max-devices` allows ({limit}): raise it in [limits]");
            Err(at(source.file, first_too_many, message))
        }
    }
}

fn sockets_of_both(config: &Config, source: &Source<'_>) -> Result<(), ConfigError> {
    for address in config.nbd.iter().flat_map(|nbd| &nbd.listen) {
        let NbdAddress::Unix(path) = address else { continue };
        socket_path(path).map_err(|message| whole_file(source.file, message, None))?;
        let same = |disk: &&DiskConfig| disk.vhost_user.as_ref() == Some(path);
        if let Some(disk) = config.disks.iter().find(same) {
            let message = format!("the NBD server has the socket {} already: name another", path.display());
            return Err(at(source.file, disk, message));
        }
    }
    Ok(())
}

fn unique<K: Eq + Hash + Clone>(
    config: &Config,
    file: &Path,
    key: impl Fn(&DiskConfig) -> Option<K>,
    message: impl Fn(K) -> String,
) -> Result<(), ConfigError> {
    let mut seen: HashMap<K, &DiskConfig> = HashMap::new();
    for disk in &config.disks {
        let Some(key) = key(disk) else { continue };
        if let Some(first) = seen.insert(key.clone(), disk) {
            return Err(at(file, disk, format!("{}{}", message(key), there_in_brackets(first.position))));
        }
    }
    Ok(())
}

fn at(file: &Path, disk: &DiskConfig, message: String) -> ConfigError {
    ConfigError { position: disk.position, ..whole_file(file, message, None) }
}

fn there(position: Option<Position>) -> String {
    position.map(|p| format!(" (line {})", p.line)).unwrap_or_default()
}

fn there_in_brackets(position: Option<Position>) -> String {
    position.map(|p| format!(" (the first is in line {})", p.line)).unwrap_or_default()
}
