//! What can be done with an open image beyond reading and writing its disk.

use std::sync::Arc;

use vbd_core::{Error, ErrorKind, Layer, LayerExtent, Live, Result, Snapshot};

use super::image::Image;
use super::io::{Io, corrupt};
use super::map::Span;
use super::session::Qcow2Session;

/// The most extents in one answer.
const MOST_EXTENTS: usize = 65_536;

impl Live for Qcow2Session {
    fn snapshots(&self) -> Result<Vec<Snapshot>> {
        Err(later())
    }

    fn create_snapshot(&self, _name: &str) -> Result<Snapshot> {
        Err(later())
    }

    fn apply_snapshot(&self, _snapshot: &str) -> Result<()> {
        Err(later())
    }

    fn delete_snapshot(&self, _snapshot: &str) -> Result<()> {
        Err(later())
    }

    fn layer(&self, offset: u64, len: u64) -> Result<Vec<LayerExtent>> {
        let label = self.label().to_owned();
        let told = self.run(move |image, io| async move { layer(&image, &io, offset, len).await });
        told.map_err(|error| error.of(label))
    }
}

fn later() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "snapshots inside an image cannot be changed here; use qemu-img snapshot",
    )
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
