//! What can be done with an open image beyond reading and writing its disk.

use std::sync::Arc;

use vbd_core::{Commit, Error, ErrorKind, Layer, LayerExtent, Live, Result, Snapshot, Watch};

use super::image::Image;
use super::io::{Io, corrupt};
use super::map::Span;
use super::session::Qcow2Session;
use super::snapshot::told;

/// The most extents in one answer.
const MOST_EXTENTS: usize = 65_536;

impl Live for Qcow2Session {
    fn snapshots(&self) -> Result<Vec<Snapshot>> {
        self.named(|image, io| async move {
            let (snapshots, _) = image.snapshot_table(&io).await?;
            Ok(snapshots.iter().map(|snapshot| told(&image, snapshot)).collect())
        })
    }

    fn create_snapshot(&self, name: &str) -> Result<Snapshot> {
        let name = name.to_owned();
        self.named(|image, io| async move { image.create_snapshot(&io, &name).await })
    }

    fn apply_snapshot(&self, snapshot: &str) -> Result<()> {
        let wanted = snapshot.to_owned();
        self.named(|image, io| async move { image.apply_snapshot(&io, &wanted).await })
    }

    fn delete_snapshot(&self, snapshot: &str) -> Result<()> {
        let wanted = snapshot.to_owned();
        self.named(|image, io| async move { image.delete_snapshot(&io, &wanted).await })
    }

    fn layer(&self, offset: u64, len: u64) -> Result<Vec<LayerExtent>> {
        self.named(move |image, io| async move { layer(&image, &io, offset, len).await })
    }

    fn compressed_unit(&self) -> Option<u64> {
        let image = self.image();
        let can = !image.read_only && image.data_file.is_none() && image.encrypted.is_none();
        can.then(|| image.layout.cluster_size())
    }

    fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<bool> {
        self.compressor.write(self.image(), offset, data).map_err(|error| error.of(self.label()))
    }

    fn flatten(&self, watch: &dyn Watch) -> Result<u64> {
        self.flatten_while_served(watch).map_err(|error| error.of(self.label()))
    }

    fn commit(&self, commit: Commit, watch: &dyn Watch) -> Result<u64> {
        self.commit_while_served(commit, watch).map_err(|error| error.of(self.label()))
    }

    fn compact(&self, watch: &dyn Watch) -> Result<(u64, u64)> {
        self.compact_while_served(watch).map_err(|error| error.of(self.label()))
    }
}

impl Qcow2Session {
    /// Runs a task on the image; an error says which one.
    fn named<T, W, F>(&self, work: W) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + 'static,
        W: FnOnce(Arc<Image>, Io) -> F + Send + 'static,
    {
        self.run(work).map_err(|error| error.of(self.label()))
    }
}

async fn layer(image: &Arc<Image>, io: &Io, offset: u64, len: u64) -> Result<Vec<LayerExtent>> {
    let size = image.size();
    if offset.checked_add(len).is_none_or(|end| end > size) {
        return Err(Error::new(ErrorKind::OutOfRange, format!("the disk ends at {size}")));
    }
    let (l1, mut done) = (image.l1(), 0);
    let mut extents: Vec<LayerExtent> = Vec::new();
    while done < len && extents.len() < MOST_EXTENTS {
        let (span, part) = image.span(io, &l1, offset + done, len - done).await?;
        let layer = match span {
            Span::Data { .. } | Span::Compressed { .. } => Layer::Data,
            Span::Zero { .. } => Layer::Zero,
            Span::Below => Layer::Below,
            Span::Bad(error) => return Err(corrupt(error.to_string())),
        };
        match extents.last_mut() {
            Some(last) if last.layer == layer => last.len += part,
            _ => extents.push(LayerExtent { len: part, layer }),
        }
        done += part;
    }
    Ok(extents)
}
