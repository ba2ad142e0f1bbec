//! A plan as the root that tailoring changes: no path and no link leads out of it.

use std::ffi::OsString;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use super::{Body, Data, Directory, Gather, NodeId};
use crate::entry::Content;
use crate::error::Context;
use crate::tailor::{Attributes, End, Kind, Names, Root, TEXT, follow};
use crate::{Error, Meta, Result, Silent};

/// Content up to this many bytes stays in memory.
const SMALL: usize = 1 << 16;

/// A place in the tree: a directory and a name in it, which may not exist yet. A directory that a path ends in by `..`,
/// and the root, have no name.
struct Place {
    directory: NodeId,
    name: Vec<u8>,
    found: Option<NodeId>,
}

impl Gather<'_> {
    fn find(&self, path: &str, follow_last: bool) -> io::Result<Place> {
        Ok(match follow(self, path, follow_last)? {
            End::Name(directory, name, found) => Place { directory, name, found },
            End::Directory(found) => Place { directory: found, name: Vec::new(), found: Some(found) },
        })
    }

    /// As [`Gather::find`], where nothing, or nothing above it, is no error.
    fn find_any(&self, path: &str, follow_last: bool) -> Result<Option<Place>> {
        match self.find(path, follow_last) {
            Ok(place) => Ok(Some(place)),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
            Err(e) => Err(e).at("find in the tree", Path::new(path)),
        }
    }

    fn look_with(&self, path: &str, follow_last: bool) -> Result<Option<Attributes>> {
        let found = self.find_any(path, follow_last)?.and_then(|place| place.found);
        Ok(found.map(|found| Attributes { kind: self.kind(&found), meta: self.plan.node(found).meta }))
    }

    fn place_to_make(&self, path: &str) -> Result<Place> {
        self.find(path, false).at("make in the tree", Path::new(path))
    }

    fn content_of(&self, node: NodeId) -> io::Result<Option<Vec<u8>>> {
        let Body::File { size, data } = &self.plan.node(node).body else { return Ok(None) };
        let Some(size) = usize::try_from(*size).ok().filter(|&size| size as u64 <= TEXT) else {
            return Ok(None);
        };
        match (data, self.source) {
            (Data::Hole, _) => Ok(Some(vec![0; size])),
            (Data::Bytes(bytes), _) => Ok(Some(bytes.to_vec())),
            (Data::Origin(origin), Some(source)) => {
                let path = self.plan.path(self.plan.origin(*origin).name);
                let mut content = Vec::new();
                source.open_file(&path)?.take(TEXT).read_to_end(&mut content)?;
                Ok(Some(content))
            }
            (Data::Origin(_), None) | (Data::Reserved(_), _) => Ok(None),
            (Data::Placed(_) | Data::Spooled(_), _) => self.contents.read(data, size).map(Some),
        }
    }

    /// Keeps what is read to its end: its size, and where it is.
    fn keep(&mut self, path: &Path, data: &mut dyn Read) -> Result<(u64, Data)> {
        let mut start = Vec::new();
        data.take(SMALL as u64 + 1).read_to_end(&mut start).at("read what becomes", path)?;
        if start.len() <= SMALL {
            return Ok((
                start.len() as u64,
                if start.is_empty() { Data::Hole } else { Data::Bytes(start.into()) },
            ));
        }
        let mut content = Stream { reader: start.chain(data), started: false, size: 0 };
        let data = self.contents.put(&mut content, path, &mut Silent)?;
        self.contents.flush()?;
        Ok((content.size, data))
    }
}

impl Names for Gather<'_> {
    type Directory = NodeId;
    type Found = NodeId;

    fn root(&self) -> io::Result<NodeId> {
        Ok(self.plan.root())
    }

    fn entry(&self, directory: &NodeId, name: &[u8]) -> io::Result<Option<NodeId>> {
        Ok(self.plan.lookup(*directory, name).map(|name| self.plan.target(name)))
    }

    fn kind(&self, found: &NodeId) -> Kind {
        match &self.plan.node(*found).body {
            Body::File { .. } => Kind::File,
            Body::Directory(_) => Kind::Directory,
            Body::Symlink(_) => Kind::Link,
            Body::Device { .. } => Kind::Special,
        }
    }

    fn target(&self, _: &NodeId, _: &[u8], found: &NodeId) -> io::Result<Vec<u8>> {
        match &self.plan.node(*found).body {
            Body::Symlink(target) => Ok(self.plan.text(*target).to_vec()),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }

    fn enter(&self, _: &NodeId, _: &[u8], found: &NodeId) -> io::Result<NodeId> {
        Ok(*found)
    }
}

impl Root for Gather<'_> {
    fn look(&self, path: &str) -> Result<Option<Attributes>> {
        self.look_with(path, true)
    }

    fn look_at_link(&self, path: &str) -> Result<Option<Attributes>> {
        self.look_with(path, false)
    }

    fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let Some(found) = self.find_any(path, true)?.and_then(|place| place.found) else { return Ok(None) };
        let content = self.content_of(found).at("read in the tree", Path::new(path))?;
        content.map(Some).ok_or_else(|| Error::tailor(path, "is no file of text in the tree"))
    }

    fn list(&self, path: &str) -> Result<Vec<OsString>> {
        let place = self.find(path, true).ok().and_then(|place| place.found);
        let Some(found) = place.filter(|&found| self.plan.node(found).is_directory()) else {
            let error = io::Error::from_raw_os_error(libc::ENOTDIR);
            return Err(Error::io(format!("cannot list {path} in the tree"), error));
        };
        let name = |name| OsString::from_vec(self.plan.name(name).to_vec());
        Ok(self.plan.children(found).into_iter().map(name).collect())
    }

    fn write(&mut self, path: &str, data: &mut dyn Read, meta: &Meta) -> Result<()> {
        let shown = Path::new(path);
        let place = match self.find_any(path, true)? {
            Some(place) if place.found.is_some() => place,
            // Nothing there, or a link to nothing: that is replaced rather than its target made.
            _ => {
                let place = self.place_to_make(path)?;
                self.make_way(place.directory, &place.name, shown)?;
                Place { found: None, ..place }
            }
        };
        if place.found.is_some_and(|found| !matches!(self.plan.node(found).body, Body::File { .. })) {
            return Err(Error::tailor(path, "is no file in the tree"));
        }
        let (size, data) = self.keep(shown, data)?;
        let Some(found) = place.found else {
            self.plan.add(place.directory, &place.name, *meta, &[], Body::File { size, data })?;
            return Ok(());
        };
        let xattrs = self.plan.xattrs(found).to_vec();
        self.plan.set(found, *meta, &xattrs);
        if let Some((old_size, old_data)) = self.plan.file_mut(found) {
            *old_size = size;
            let old = std::mem::replace(old_data, data);
            self.contents.release(&old);
        }
        Ok(())
    }

    fn make_directory(&mut self, path: &str, meta: &Meta) -> Result<()> {
        let place = self.place_to_make(path)?;
        if place.found.is_some() {
            let error = io::Error::from_raw_os_error(libc::EEXIST);
            return Err(error).at("make in the tree", Path::new(path));
        }
        self.plan.add(place.directory, &place.name, *meta, &[], Body::Directory(Directory::default()))?;
        Ok(())
    }

    fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        let place = self.place_to_make(path)?;
        if place.found.is_some_and(|found| self.plan.node(found).is_directory()) {
            return Err(Error::tailor(path, "is a directory in the tree"));
        }
        self.make_way(place.directory, &place.name, Path::new(path))?;
        let target = self.plan.add_text(target.as_bytes())?;
        self.plan.add(place.directory, &place.name, Meta::root(0o777), &[], Body::Symlink(target))?;
        Ok(())
    }

    fn remove(&mut self, path: &str) -> Result<()> {
        let at = "remove in the tree";
        let place = self.find(path, false).at(at, Path::new(path))?;
        let missing = place.found.is_none() || place.name.is_empty();
        if missing {
            return Err(io::Error::from_raw_os_error(libc::ENOENT)).at(at, Path::new(path));
        }
        self.make_way(place.directory, &place.name, Path::new(path))
    }
}

/// A stream as content: one extent, whose end shows when it is reached.
struct Stream<R> {
    reader: R,
    started: bool,
    size: u64,
}

impl<R: Read> Content for Stream<R> {
    fn next_extent(&mut self) -> io::Result<Option<Range<u64>>> {
        let first = !std::mem::replace(&mut self.started, true);
        Ok(first.then_some(0..u64::MAX))
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.reader.read(buffer)?;
        self.size += got as u64;
        Ok(got)
    }
}
