//! Changes to a tree that make it one machine's: names, users, consoles, networks, files.
//!
//! What is changed is said here; how a file is written is a [`Root`]'s.

mod accounts;
mod files;
mod follow;
mod fstab;
mod grub;
mod identity;
mod image;
mod network;
mod root;
mod systemd;
mod types;

use crate::{Error, Filesystem, Meta, Result};

pub(crate) use follow::{End, Names, follow};
pub(crate) use identity::check_hostname;
pub use image::ImageRoot;
pub use root::{Attributes, Kind, Root};
pub(crate) use root::{TEXT, TreeRoot};
pub use types::{CopyIn, Mount, Network, Tailor, Text, User};

impl Tailor {
    /// Reads the keys of a `[tailor]` table from a TOML file of their own.
    ///
    /// # Errors
    ///
    /// TOML that does not parse, keys that are not known and values that do not fit, with line and column.
    pub fn from_toml(text: &str) -> Result<Tailor> {
        let tailor: Tailor = toml::from_str(text).map_err(|e| Error::Invalid(e.to_string()))?;
        tailor.check()?;
        Ok(tailor)
    }

    /// Finds what cannot work in any tree.
    ///
    /// # Errors
    ///
    /// The first value that no tree takes.
    pub fn check(&self) -> Result<()> {
        if let Some(name) = &self.hostname {
            identity::check_hostname(name)?;
        }
        for user in &self.user {
            accounts::check(user)?;
        }
        if let Some(console) = &self.serial_console {
            systemd::check_console(console)?;
        }
        self.xen_boot.as_deref().map_or(Ok(()), grub::check)?;
        let paths = self.write.iter().chain(&self.append).map(|t| t.path.as_str());
        let paths = paths.chain(self.directories.iter().map(String::as_str));
        let paths = paths
            .chain(self.copy_in.iter().map(|c| c.to.as_str()))
            .chain(self.remove.iter().map(|r| r.as_str()));
        for path in paths {
            if !path.starts_with('/') || path.contains('\0') || path.trim_matches('/').is_empty() {
                return Err(Error::tailor(path, "name a file in the image by its path from /"));
            }
        }
        Ok(())
    }

    /// Makes the changes in `root`. `filesystem` is the one that `/` gets in fstab where no other is named.
    ///
    /// # Errors
    ///
    /// The first change that does not fit the tree, or that cannot be written.
    pub fn apply(&self, root: &mut dyn Root, filesystem: Filesystem) -> Result<()> {
        if self.reset_identity {
            identity::reset(root)?;
        }
        if let Some(name) = &self.hostname {
            identity::set_hostname(root, name)?;
        }
        if !self.fstab.is_empty() {
            put(root, "/etc/fstab", fstab::text(&self.fstab, filesystem).as_bytes(), 0o644)?;
        }
        for directory in &self.directories {
            make_directories(root, directory)?;
        }
        for user in &self.user {
            accounts::add(root, user)?;
        }
        if let Some(console) = &self.serial_console {
            systemd::serial_console(root, console)?;
        }
        if let Some(network) = &self.network {
            network::set(root, network)?;
        }
        files::apply(self, root)?;
        self.xen_boot.as_deref().map_or(Ok(()), |line| grub::write(root, line))
    }
}

/// Adds a line for a file that is swapped to, unless fstab has one.
///
/// # Errors
///
/// As [`Tailor::apply`].
pub(crate) fn add_swap_file(root: &mut dyn Root, path: &str) -> Result<()> {
    let old = text(root, "/etc/fstab")?.unwrap_or_default();
    let new = fstab::with_swap_file(&old, path);
    if new == old { Ok(()) } else { put(root, "/etc/fstab", new.as_bytes(), 0o644) }
}

/// Writes a whole file: with the attributes it has, or as root's with `mode`.
fn put(root: &mut dyn Root, path: &str, data: &[u8], mode: u32) -> Result<()> {
    let found = root.look(path)?;
    let meta = match found {
        Some(Attributes { kind: Kind::File, meta }) => Meta { mtime: Meta::root(0).mtime, ..meta },
        Some(_) => return Err(Error::tailor(path, "is no file in the tree")),
        None => {
            if let Some((directory, _)) = path.rsplit_once('/') {
                make_directories(root, directory)?;
            }
            Meta::root(mode)
        }
    };
    root.write(path, &mut &data[..], &meta)
}

/// Reads a file as text; nothing where there is none.
fn text(root: &dyn Root, path: &str) -> Result<Option<String>> {
    let Some(data) = root.read(path)? else { return Ok(None) };
    String::from_utf8(data).map(Some).map_err(|_| Error::tailor(path, "is no text in the tree"))
}

/// Makes a directory and those above it, where they are missing.
fn make_directories(root: &mut dyn Root, path: &str) -> Result<()> {
    let mut so_far = String::new();
    for name in path.split('/').filter(|name| !name.is_empty()) {
        so_far.push('/');
        so_far.push_str(name);
        match root.look(&so_far)? {
            Some(Attributes { kind: Kind::Directory, .. }) => {}
            Some(_) => return Err(Error::tailor(path, format!("{so_far} is no directory in the tree"))),
            None => root.make_directory(&so_far, &Meta::root(0o755))?,
        }
    }
    Ok(())
}

/// Whether there is anything at a path.
fn exists(root: &dyn Root, path: &str) -> Result<bool> {
    Ok(root.look(path)?.is_some())
}
