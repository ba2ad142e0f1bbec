//! A layer on its way: read, unpacked and summed by threads of its own, applied by the one that has the tree.

use std::io::{self, Read};
use std::thread::{Scope, ScopedJoinHandle};

use super::digest::{Digest, Hashing, check, of_chunks};
use super::layer::Layered;
use super::{Image, Layer};
use crate::ahead::{Feed, Stream, forward, stream};
use crate::plan::Gather;
use crate::tar::{self, NamedAcl};
use crate::{Cancel, Error, Progress, Result, compress};

/// The threads of a layer, and what comes from them.
pub(super) struct Unpacking<'scope> {
    layer: &'scope Layer,
    stream: Stream,
    /// Gives the digest of what is stored, where it is another than that of the content.
    reader: ScopedJoinHandle<'scope, Result<Option<io::Result<Digest>>>>,
    /// Gives the digest of the content.
    digest: ScopedJoinHandle<'scope, io::Result<Digest>>,
}

impl<'scope> Unpacking<'scope> {
    pub(super) fn start(
        scope: &'scope Scope<'scope, '_>,
        image: &'scope Image,
        layer: &'scope Layer,
        (shown, cancel): (String, Cancel),
    ) -> Unpacking<'scope> {
        let ((feed, stream), (copy, content)) = (stream(), stream());
        let reader = scope.spawn(move || image.read(layer, (&shown, &cancel), vec![feed, copy]));
        let digest = scope.spawn(move || of_chunks(content.chunks()));
        Unpacking { layer, stream, reader, digest }
    }

    /// Applies the layer to a tree.
    pub(super) fn apply(
        mut self,
        shown: &str,
        gather: &mut Gather<'_>,
        progress: &mut dyn Progress,
    ) -> Result<Vec<NamedAcl>> {
        let unpacked = tar::unpack(&mut self.stream, shown, &mut Layered::new(gather), progress);
        if progress.cancelled() {
            return Err(Error::Interrupted);
        }
        self.stream.drain();
        let (stored, content) = (joined(self.reader)?, joined(self.digest));
        let cannot = |e: io::Error| Error::Archive {
            archive: shown.to_owned(),
            entry: String::new(),
            reason: e.to_string(),
        };
        // A wrong digest explains whatever else is wrong, that of what is stored most of all.
        match &stored {
            Some(Ok(stored)) => check(stored, self.layer.stored.as_ref()).map_err(cannot)?,
            Some(Err(error)) => return Err(cannot(io::Error::new(error.kind(), error.to_string()))),
            None => {}
        }
        let content = content.map_err(cannot)?;
        if stored.is_none() {
            check(&content, self.layer.stored.as_ref()).map_err(cannot)?;
        }
        check(&content, self.layer.content.as_ref()).map_err(cannot)?;
        unpacked
    }
}

/// What a thread came to; it panics where the thread did.
fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

impl Image {
    /// Reads and unpacks a layer for `feeds`; the digest of what is stored, where that is packed.
    fn read(
        &self,
        layer: &Layer,
        (shown, cancel): (&str, &Cancel),
        feeds: Vec<Feed>,
    ) -> Result<Option<io::Result<Digest>>> {
        let mut reader = self.blobs.open(&layer.blob, cancel)?;
        let mut start = [0; 6];
        let length = {
            let mut start = &mut start[..];
            io::copy(&mut reader.by_ref().take(6), &mut start)
                .map_err(|e| Error::io(format!("cannot read {shown}"), e))?
        };
        let start = &start[..usize::try_from(length).unwrap_or(0)];
        let mut reader = start.chain(reader);
        if compress::is_plain(start) {
            forward(&mut reader, feeds);
            return Ok(None);
        }
        let mut stored = Hashing::new(reader);
        forward(&mut compress::open(&mut stored, shown)?, feeds);
        Ok(Some(stored.drain().map(|()| stored.found())))
    }
}
