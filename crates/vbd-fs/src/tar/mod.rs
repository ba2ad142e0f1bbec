//! Tar archives as a source: POSIX.1-2001 pax, ustar, GNU and the old format, read once from front to end.
//!
//! Nothing is guessed and nothing is skipped: an entry that cannot be kept as it is ends the build with its name. The
//! formats: POSIX.1-2017 `pax` for headers and records, the manual of GNU tar ("Basic Tar Format", "Storing Sparse
//! Files") for the rest.

mod acl;
mod content;
mod header;
mod input;
mod pax;

use std::io::Read;
use std::path::PathBuf;

use crate::archive::{about, damaged};
use crate::entry::{Counts, Entry, Meta, Node, Sink, Special, Time, Xattr};
use crate::fill::Discard;
use crate::plan::{Gather, Limit, Plan};
use crate::{Error, Progress, Result, Silent};

use content::Extents;
use header::Members;

pub use header::clean_path;
pub(crate) use input::TRUNCATED;

/// What one header, with those that describe it, says.
struct Member {
    path: PathBuf,
    meta: Meta,
    xattrs: Vec<Xattr>,
    named_acls: Vec<(&'static str, String)>,
    kind: Kind,
}

/// An ACL for users and groups by their names, whose numbers are in the archive's own passwd(5) and group(5).
pub(crate) struct NamedAcl {
    pub(crate) path: PathBuf,
    attribute: &'static str,
    text: String,
}

impl NamedAcl {
    /// The attribute, by the names in these files.
    pub(crate) fn resolve(&self, archive: &str, passwd: &str, group: &str) -> Result<Option<Xattr>> {
        let number = |who, name: &str| {
            let text = if who == acl::Who::User { passwd } else { group };
            let line = text.lines().find(|line| line.split(':').next() == Some(name))?;
            line.split(':').nth(2)?.parse().ok()
        };
        let value = acl::binary(&self.text, pax::is_access(self.attribute), &number);
        let value = value.map_err(|reason| {
            let remedy = "pack it with --xattrs --xattrs-include='*' as well";
            damaged(archive, &self.path, format!("{reason}; {remedy}"))
        })?;
        Ok(value.map(|value| (self.attribute.into(), value)))
    }
}

enum Kind {
    Directory,
    File { size: u64, extents: Extents },
    Symlink(PathBuf),
    HardLink(PathBuf),
    Device(Special, u32, u32),
}

/// Sends the entries of a tar to `sink`, but for the ACLs that are returned. Reads to the end of `reader`, past the
/// archive's own.
///
/// # Errors
///
/// The first entry that is damaged, hostile (absolute, `..`, through a link) or of an unknown type, by its name.
pub(crate) fn unpack(
    reader: &mut dyn Read,
    archive: &str,
    sink: &mut dyn Sink,
    progress: &mut dyn Progress,
) -> Result<Vec<NamedAcl>> {
    let mut named: Vec<NamedAcl> = Vec::new();
    let mut members = Members::new(reader);
    loop {
        if progress.cancelled() {
            return Err(Error::Interrupted);
        }
        let member = match members.next() {
            Ok(Some(member)) => member,
            Ok(None) => return Ok(named),
            Err(bad) => return Err(bad.named(archive)),
        };
        let Member { path, meta, xattrs, named_acls, kind } = member;
        named.retain(|acl| acl.path != path);
        let mut data;
        let node = match &kind {
            Kind::Directory => Node::Directory,
            Kind::File { size, extents } => {
                data = content::Data::new(members.input(), extents);
                Node::File { size: *size, content: &mut data }
            }
            Kind::Symlink(target) => Node::Symlink(target),
            Kind::HardLink(target) => Node::HardLink(target.clone()),
            Kind::Device(kind, major, minor) => Node::Device { kind: *kind, major: *major, minor: *minor },
        };
        let added = sink.add(Entry { path: &path, meta, xattrs: &xattrs, node }, progress);
        if let Some(reason) = members.input().failure() {
            return Err(damaged(archive, &path, reason));
        }
        added.map_err(|e| about(e, archive, &path))?;
        let acl = |(attribute, text)| NamedAcl { path: path.clone(), attribute, text };
        named.extend(named_acls.into_iter().map(acl));
    }
}

/// Reads a tar to its end and counts what is in it, writing nothing. For checking an archive, and for fuzzing: it must
/// end without a panic whatever it reads.
///
/// # Errors
///
/// As for a build from that archive.
pub fn check(mut reader: impl Read) -> Result<Counts> {
    let root = Meta { mode: 0o755, ..Meta::default() };
    let mut contents = Discard;
    let limit = Limit { inodes: u32::MAX.into(), bytes: u64::MAX };
    let mut gather = Gather::new(Plan::new(root, None), &mut contents, None, limit, Time::default());
    unpack(&mut reader, "archive", &mut gather, &mut Silent)?;
    Ok(gather.plan.counts())
}
