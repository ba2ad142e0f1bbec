//! Names of one file: entries of the same device and inode, of which some have the data and others have none.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::header::Header;
use crate::entry::Meta;

/// More names of files with several are no honest archive's.
const NAMES: usize = 4 << 20;

/// Where the data of a file with several names is.
pub(super) enum Names {
    /// It has one name, or this is the first.
    New,
    /// With a name that came before.
    Before { first: PathBuf },
    /// With this one: the names that came before had none.
    Waiting(Vec<PathBuf>),
}

/// What is known of a file with several names.
struct Known {
    meta: Meta,
    kind: u32,
    device: (u32, u32),
    size: u64,
    paths: Vec<PathBuf>,
}

/// Files with several names in one archive.
#[derive(Default)]
pub(super) struct Links {
    files: HashMap<(u64, u64), Known>,
    /// Whose name a path is.
    paths: HashMap<PathBuf, (u64, u64)>,
}

/// Whether the format keeps the names of such an entry together: directories have many links and one name, and a
/// symbolic link comes with its target each time.
fn can_be_linked(header: &Header) -> bool {
    header.links > 1 && !matches!(header.mode & 0o170_000, 0o040_000 | 0o120_000)
}

impl Known {
    /// Inode numbers of the old format are cut to 18 bits: only what agrees in everything is the same file.
    fn is(&self, header: &Header, meta: Meta) -> bool {
        let sizes = self.size == header.size || self.size == 0 || header.size == 0;
        self.meta == meta && self.kind == header.mode && self.device == header.device && sizes
    }
}

impl Links {
    /// What is known of the file that a header is about, whose data comes now.
    pub(super) fn of(&mut self, header: &Header, meta: Meta) -> Result<Names, String> {
        if !can_be_linked(header) {
            return Ok(Names::New);
        }
        if self.paths.len() >= NAMES {
            return Err(format!("is one of more than {NAMES} names of files that have several"));
        }
        let Some(known) = self.files.get_mut(&header.identity).filter(|known| known.is(header, meta)) else {
            return Ok(Names::New);
        };
        let Some(first) = known.paths.first() else { return Ok(Names::New) };
        if known.size == 0 && header.size > 0 {
            return Ok(Names::Waiting(known.paths.clone()));
        }
        Ok(Names::Before { first: first.clone() })
    }

    /// Notes that a header's file has this name now.
    pub(super) fn note(&mut self, header: &Header, meta: Meta, path: &Path) -> Result<(), String> {
        if !can_be_linked(header) {
            return Ok(());
        }
        let fresh = || Known { meta, kind: header.mode, device: header.device, size: 0, paths: Vec::new() };
        let known = self.files.entry(header.identity).or_insert_with(fresh);
        if !known.is(header, meta) {
            *known = fresh();
        }
        known.size = known.size.max(header.size);
        known.paths.push(path.to_owned());
        self.paths.insert(path.to_owned(), header.identity);
        Ok(())
    }

    /// Another entry takes this name.
    pub(super) fn forget(&mut self, path: &Path) {
        if let Some(identity) = self.paths.remove(path)
            && let Some(known) = self.files.get_mut(&identity)
        {
            known.paths.retain(|name| name != path);
            if known.paths.is_empty() {
                self.files.remove(&identity);
            }
        }
    }
}
