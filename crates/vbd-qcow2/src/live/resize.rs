//! Growing a disk, and what is done when an image is closed.

use std::sync::Arc;

use vbd_core::memory::Buffer;
use vbd_core::{Error, ErrorKind, Guard, Result};

use super::commit::Quiet;
use super::counts::Run;
use super::image::Image;
use super::io::{Io, bytes};
use super::map::L1;
use crate::format::{at, limit};

impl Image {
    /// Makes room for a larger disk, on disk. It is the caller's to let anybody see it.
    pub(super) async fn grow(self: &Arc<Self>, io: &Io, size: u64) -> Result<()> {
        self.check_writable()?;
        let alone = self.members.exclusive().await;
        let old = self.size();
        if size == old {
            return Ok(());
        }
        let entries = self.layout.l1_entries(size);
        if size > limit::SIZE || entries * 8 > limit::L1_BYTES {
            let most = (limit::L1_BYTES / 8) << self.layout.l2_span_bits();
            let message = format!(
                "{size} bytes are more than clusters of {} bytes can map, {most}; convert the image to larger clusters",
                self.layout.cluster_size()
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if let Some(data) = self.data_file.as_ref().filter(|data| data.geometry().size < size) {
            data.grow(size)?;
        }
        let turn = Quiet::new(self).await;
        self.commit_now(io, turn.guard()).await?;
        if entries > self.l1().len() as u64 {
            self.lengthen_l1(io, entries, turn.guard()).await?;
        }
        self.write_header_field(io, at::SIZE, &size.to_be_bytes()).await?;
        self.sync_file(io).await?;
        self.header().size = size;
        drop((turn, alone));
        Ok(())
    }

    /// Moves the L1 table to where it may be longer. Nobody else changes anything meanwhile.
    async fn lengthen_l1(self: &Arc<Self>, io: &Io, entries: u64, turn: Guard) -> Result<()> {
        let size = self.layout.cluster_size();
        let old = self.l1();
        let (old_offset, old_len) = (self.header().l1_offset, old.len() as u64 * 8);
        let run = self.allocate_table(io, self.layout.clusters(entries * 8)).await?;
        let mut lost = Lost { image: self, run, begun: false };
        let moved: Result<()> = async {
            let mut table: Vec<u64> = old.entries().map(|entry| entry.0).collect();
            table.resize(bytes(entries), 0);
            let mut buffer = Buffer::new(bytes(run.count * size));
            for (bytes, entry) in buffer.bytes_mut().chunks_exact_mut(8).zip(&table) {
                bytes.copy_from_slice(&entry.to_be_bytes());
            }
            io.write(run.start * size, buffer, turn.clone()).await?;
            self.write_counts(io).await?;
            self.sync_file(io).await?;
            let count = u32::try_from(entries).unwrap_or(u32::MAX);
            let fields = [&count.to_be_bytes()[..], &(run.start * size).to_be_bytes()[..]].concat();
            lost.begun = true;
            self.write_header_field(io, at::L1, &fields).await?;
            self.sync_file(io).await?;
            let mut header = self.header();
            (header.l1_entries, header.l1_offset) = (count, run.start * size);
            drop(header);
            self.set_l1(L1::new(table.into_iter()));
            Ok(())
        }
        .await;
        moved?;
        std::mem::forget(lost);
        let first = old_offset / size;
        self.free(first..first + self.layout.clusters(old_len));
        Ok(())
    }

    /// The part of a disk that grew to `size` where something else than zeroes may show: where a longer image behind it has
    /// something, and what was behind its end in its last cluster, if it was larger once.
    pub(super) fn newly_visible(&self, old: u64, size: u64) -> Option<(u64, u64)> {
        let rest = old.next_multiple_of(self.layout.cluster_size()).min(size);
        let end = size.min(self.backing_size()).max(rest);
        (end > old).then(|| (old, end - old))
    }

    /// Ends the file behind its last cluster, with the next sync; false if it ends there.
    pub(super) async fn trim(&self, io: &Io) -> Result<bool> {
        if self.backend.is_block_device() {
            return Ok(false);
        }
        let Some(end) = self.counts.state().end() else { return Ok(false) };
        let end = self.whole_blocks(self.last_used(io, end).await? * self.layout.cluster_size());
        let trims = end < self.backend.size();
        if trims {
            let backend = self.backend.clone();
            io.local.unblock(move || backend.trim(end)).await?;
        }
        Ok(trims)
    }
}

/// A new place of a table. Where it fails before the header could lead there, its clusters are free again; later, nobody
/// can say where the table is, and nothing more is written.
struct Lost<'a> {
    image: &'a Image,
    run: Run,
    begun: bool,
}

impl Drop for Lost<'_> {
    fn drop(&mut self) {
        if self.begun {
            self.image.progress.lose();
        } else {
            self.image.give_back(self.run);
        }
    }
}
