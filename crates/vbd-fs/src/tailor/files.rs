//! Files removed, copied in, written and added to, in that order.

use std::path::Path;

use super::systemd::end_line;
use super::{Attributes, Kind, Root, Tailor, Text, make_directories, put, text};
use crate::error::Context;
use crate::{Error, Meta, Result, walk};

pub(super) fn apply(tailor: &Tailor, root: &mut dyn Root) -> Result<()> {
    for path in &tailor.remove {
        remove(root, path)?;
    }
    for copy in &tailor.copy_in {
        copy_in(root, &copy.from, &copy.to, true)?;
    }
    for Text { path, text, mode } in &tailor.write {
        let mut text = text.clone();
        end_line(&mut text);
        put(root, path, text.as_bytes(), mode.unwrap_or(0o644))?;
    }
    for Text { path, text: more, mode } in &tailor.append {
        let mut text = text(root, path)?.unwrap_or_default();
        end_line(&mut text);
        text.push_str(more);
        end_line(&mut text);
        put(root, path, text.as_bytes(), mode.unwrap_or(0o644))?;
    }
    Ok(())
}

/// Removes a path with all below; what is not there is removed already.
fn remove(root: &mut dyn Root, path: &str) -> Result<()> {
    match root.look_at_link(path)? {
        None => Ok(()),
        Some(Attributes { kind: Kind::Directory, .. }) => {
            for name in root.list(path)? {
                let name = name.to_str().ok_or_else(|| Error::tailor(path, "has a name that is no text"))?;
                remove(root, &format!("{path}/{name}"))?;
            }
            root.remove(path)
        }
        Some(_) => root.remove(path),
    }
}

/// Copies a file or a directory of the host's; it becomes root's, with its modes and times. A link that is named is
/// followed, one in a directory is copied as a link.
fn copy_in(root: &mut dyn Root, from: &Path, to: &str, follow: bool) -> Result<()> {
    let look = if follow { std::fs::metadata } else { std::fs::symlink_metadata };
    let kind = look(from).at("read", from)?;
    if let Some((above, _)) = to.trim_end_matches('/').rsplit_once('/') {
        make_directories(root, above)?;
    }
    if kind.is_symlink() {
        let target = std::fs::read_link(from).at("read", from)?;
        let target = target.to_str().ok_or_else(|| Error::tailor(to, "links to a name that is no text"))?;
        return root.symlink(to, target);
    }
    if kind.is_dir() {
        if !matches!(root.look(to)?, Some(Attributes { kind: Kind::Directory, .. })) {
            let mode = std::os::unix::fs::PermissionsExt::mode(&kind.permissions()) & 0o7777;
            root.make_directory(to, &Meta::root(mode))?;
        }
        let mut names = Vec::new();
        for entry in std::fs::read_dir(from).at("read", from)? {
            names.push(entry.at("read", from)?.file_name());
        }
        names.sort();
        for name in names {
            let text = name.to_str().ok_or_else(|| Error::tailor(to, format!("{name:?} is no text")))?;
            copy_in(root, &from.join(&name), &format!("{to}/{text}"), false)?;
        }
        return Ok(());
    }
    if !kind.is_file() {
        return Err(Error::tailor(to, format!("{} is neither file, directory nor link", from.display())));
    }
    let (mut file, stat) = walk::open_regular(from)?;
    // `FILE:/etc/` means into that directory.
    let to = match (to.ends_with('/') || is_directory(root, to)?, from.file_name().and_then(|n| n.to_str())) {
        (true, Some(name)) => format!("{}/{name}", to.trim_end_matches('/')),
        _ => to.to_owned(),
    };
    let meta = Meta { uid: 0, gid: 0, ..stat.meta() };
    root.write(&to, &mut file, &meta)
}

fn is_directory(root: &dyn Root, path: &str) -> Result<bool> {
    Ok(matches!(root.look(path)?, Some(Attributes { kind: Kind::Directory, .. })))
}
