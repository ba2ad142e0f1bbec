//! The configuration: TOML, or an xm/xl domain file as it is.
//!
//! Both are read into one [`Config`], in which every default is filled in and every name, socket and file is
//! known to be used once. Nothing is opened or made here, except that [`load`] looks whether two paths are
//! one file.

mod check;
mod error;
pub mod fuzz;
mod model;
mod runtime;
#[cfg(test)]
mod tests;
pub mod toml;
mod ublk;
mod vdev;
pub mod xl;
pub mod xl_disk;
mod xl_grammar;

use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

pub use error::{ConfigError, Position, Warning};
pub use model::{
    Access, CacheMode, Config, DiskConfig, Domain, Format, Limits, NbdAddress, NbdConfig, NewImage,
    TlsConfig, default_serial,
};
pub use runtime::{default_runtime_dir, prepare_runtime_dir};
pub use ublk::Ublk;
pub use vdev::{Vdev, VdevError};

/// The largest configuration file, in bytes: some 50,000 disks.
const MAX_FILE: u64 = 16 << 20;

/// Reads a configuration file: TOML if it is called `*.toml`, an xm/xl domain file otherwise.
///
/// # Errors
/// The file cannot be read, or what is wrong in it, with line and column.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let bytes = read(path)?;
    let is_toml = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("toml"));
    let text = std::str::from_utf8(&bytes).map_err(|e| {
        let good = String::from_utf8_lossy(&bytes[..e.valid_up_to()]);
        error::Source::new(path, &good).error(good.len(), "a byte that is not UTF-8: save the file as UTF-8")
    })?;
    let config = if is_toml { toml::parse(text, path)? } else { xl::parse(text, path)? };
    // What two paths hide (symbolic links, `..`), the filesystem knows.
    check::one_writer(&config.disks, path, |disk| {
        let about = std::fs::metadata(&disk.path).ok()?;
        let is_device = about.file_type().is_block_device();
        Some(if is_device { (None, about.rdev()) } else { (Some(about.dev()), about.ino()) })
    })?;
    Ok(config)
}

fn read(path: &Path) -> Result<Vec<u8>, ConfigError> {
    let failed = |e| error::whole_file(path, "the configuration cannot be read", Some(e));
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(error::whole_file(path, "this is no configuration: it has more than 16 MiB", None));
    }
    Ok(bytes)
}

/// Where a disk's vhost-user socket is unless it is told another place: `NAME.sock` in the runtime directory.
pub fn vhost_user_socket(runtime_dir: &Path, name: &str) -> PathBuf {
    runtime_dir.join(format!("{name}.sock"))
}
