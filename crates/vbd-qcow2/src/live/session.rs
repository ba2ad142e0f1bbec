//! An image that is open: its lease is held until the last channel is gone and what was in memory is on the disk.

use std::rc::Rc;
use std::sync::{Arc, PoisonError};

use vbd_core::{
    Capabilities, Channel, Disk, Error, ErrorKind, Event, Flags, Geometry, Live, Reader, Result, Session,
    Statistics, Watchers,
};
use vbd_image::lease::Lease;
use vbd_ring::Local;
use vbd_ring::sync::{Mutex, MutexGuard};

use super::channel::Qcow2Channel;
use super::commit::Quiet;
use super::compress::Compressor;
use super::counts::Freed;
use super::direct::Direct;
use super::image::Image;
use super::io::Io;
use super::service::{self, Place};
use crate::bitmaps::Kept;

/// The longest discard or write-zeroes that guests are told to ask for, in bytes.
const MOST: u64 = 2 << 30;

/// What outlives sessions.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) statistics: Statistics,
    pub(super) watchers: Watchers,
    /// The image behind, for the next session. None once the image stands alone.
    backing: Mutex<Option<Arc<dyn Disk>>>,
}

impl Shared {
    pub(super) fn new(backing: Option<Arc<dyn Disk>>) -> Self {
        Shared { backing: Mutex::new(backing), ..Shared::default() }
    }

    pub(super) fn backing(&self) -> MutexGuard<'_, Option<Arc<dyn Disk>>> {
        self.backing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open image.
pub(super) struct Qcow2Session {
    image: Arc<Image>,
    shared: Arc<Shared>,
    pub(super) compressor: Compressor,
    bitmaps: Option<Kept>,
    _lease: Lease,
}

impl Qcow2Session {
    pub(super) fn new(
        image: Arc<Image>,
        shared: Arc<Shared>,
        bitmaps: Option<Kept>,
        lease: Lease,
    ) -> Arc<Self> {
        Arc::new(Qcow2Session { image, shared, compressor: Compressor::default(), bitmaps, _lease: lease })
    }

    pub(super) fn image(&self) -> &Arc<Image> {
        &self.image
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(super) fn label(&self) -> &str {
        &self.image.label
    }

    /// Runs a task on the image from outside of its queues.
    pub(super) fn run<T, W, F>(&self, work: W) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + 'static,
        W: FnOnce(Arc<Image>, Io) -> F + Send + 'static,
    {
        let image = self.image.clone();
        let place = Place {
            backend: image.backend.clone(),
            data_file: image.data_file.clone(),
            encrypted: image.encrypted.clone(),
            owner: Arc::new(()),
        };
        service::run(place, move |io| work(image, io))
    }
}

/// Sizes of an image as a disk tells them.
pub(super) fn geometry(size: u64, cluster_size: u64, physical: u32) -> Geometry {
    Geometry {
        size,
        block_size: 512,
        physical_block_size: physical,
        optimal_size: u32::try_from(cluster_size).unwrap_or(0),
        discard_granularity: u32::try_from(cluster_size).unwrap_or(0),
        max_discard: MOST,
        max_zeroes: MOST,
    }
}

impl Session for Qcow2Session {
    fn geometry(&self) -> Geometry {
        let image = &self.image;
        geometry(image.size(), image.layout.cluster_size(), image.backend.geometry().physical_block_size)
    }

    fn capabilities(&self) -> Capabilities {
        let image = &self.image;
        let file = image.backend.capabilities();
        Capabilities {
            read_only: image.read_only,
            write_cache: file.write_cache,
            discard: !image.read_only && !image.keep_space,
            fast_zeroes: !image.read_only && (image.layout.version >= 3 || file.fast_zeroes),
            grow: !image.read_only,
        }
    }

    fn channel(self: Arc<Self>, local: &Local) -> Result<Rc<dyn Channel>> {
        Ok(Qcow2Channel::new(self.image.clone(), self, local)?)
    }

    fn grow(&self, size: u64) -> Result<()> {
        let refuse = |message: String| Error::new(ErrorKind::Unsupported, message).of(&self.image.label);
        if !size.is_multiple_of(512) {
            return Err(refuse(format!("{size} bytes are no multiple of 512")));
        }
        if self.image.read_only {
            return Err(refuse("is open for reading only".into()));
        }
        let old = self.image.size();
        if size < old {
            return Err(refuse(format!("{size} bytes are less than the {old} it has; a disk only grows")));
        }
        let grown = self.run(move |image, io| async move {
            image.grow(&io, size).await?;
            // What a longer image behind has there was never part of this disk.
            if let Some((offset, len)) = image.newly_visible(old, size) {
                let channel = Qcow2Channel::new(image.clone(), Arc::new(()), &io.local)?;
                let flags = Flags { may_unmap: true, ..Flags::default() };
                channel.zero_range(offset, len, flags).await?;
                image.commit(&io).await?;
            }
            image.set_size(size);
            Ok(())
        });
        grown.map_err(|error| error.of(&self.image.label))?;
        self.shared.watchers.tell(Event::Resized(size));
        Ok(())
    }

    /// Where a new cluster is, is in memory alone until a commit; but it is noted beside the image, where that can be.
    fn keeps_unflushed(&self) -> bool {
        if self.image.read_only || !self.image.backend.capabilities().write_cache {
            return true;
        }
        let noted = self.run(|image, io| async move {
            image.start_log(&io).await;
            Ok(image.log.is_on())
        });
        noted.unwrap_or(false)
    }

    fn reader(self: Arc<Self>) -> Option<Arc<dyn Reader>> {
        Some(Direct::new(self)?)
    }

    fn live(&self) -> Option<&dyn Live> {
        Some(self)
    }
}

impl Drop for Qcow2Session {
    /// Brings to the disk what is in memory. Nobody uses the image any more.
    fn drop(&mut self) {
        self.compressor.end();
        let image = &self.image;
        if image.read_only || image.progress.check().is_err() {
            return;
        }
        let has_work = !image.progress.is_untouched() || image.counts.are_dirty() || image.log.is_on();
        if has_work && let Err(error) = self.run(|image, io| async move { image.close(&io).await }) {
            tracing::error!(
                "{}: cannot be closed cleanly: {error}; check it before it is used again",
                image.label
            );
            return;
        }
        if let Some(bitmaps) = &self.bitmaps
            && let Err(error) = bitmaps.end(&*image.backend)
        {
            tracing::error!("{}: {error}; its bitmaps say nothing from now on", image.label);
        }
    }
}

impl Image {
    /// Brings everything to the disk and gives back what is not needed.
    async fn close(self: &Arc<Self>, io: &Io) -> Result<()> {
        self.end_packing();
        loop {
            let turn = Quiet::new(self).await;
            if !self.progress.is_clean() {
                self.commit_now(io, turn.guard()).await?;
            }
            let clusters = {
                let mut pending = self.pending();
                let mut clusters = std::mem::take(&mut pending.reclaimable);
                clusters.append(&mut pending.orphans);
                clusters
            };
            if clusters.is_empty() {
                break;
            }
            self.reclaim(io, Freed::new(self, clusters)).await?;
        }
        // Counts that have fallen since, and the end of the file, whichever is there first.
        let fallen = self.counts.are_dirty();
        self.write_counts(io).await?;
        if self.trim(io).await? || fallen {
            self.sync_file(io).await?;
        }
        self.end_log(io).await
    }
}
