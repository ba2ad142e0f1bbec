//! Changes that a killed process has left: noted while an image is written to, and made again when it is opened.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vbd_core::Result;

use super::image::Image;
use super::io::{Io, corrupt};
use super::log::{self, Identity, Note};
use super::map::{Entry, Table, index_of};
use crate::format::{L1Entry, L2Entry, Subclusters, at, autoclear};

impl Image {
    /// Begins to note changes, before the first one. Where that cannot be done it is said once, and changes are not
    /// noted.
    pub(super) async fn start_log(&self, io: &Io) {
        let _turn = self.log_starting.lock(0..1).await;
        if self.log_started.load(Ordering::Acquire) {
            return;
        }
        if let Err(error) = self.try_start_log(io, 0).await {
            tracing::warn!(
                "{}: changes cannot be noted beside the image ({error}), so if this process is killed, writes that were \
                 not flushed are lost to a guest that goes on",
                self.label
            );
        }
        self.log_started.store(true, Ordering::Release);
    }

    async fn try_start_log(&self, io: &Io, after: u64) -> Result<()> {
        // A file that has no name yet goes with this process: nobody could find notes of it.
        if std::fs::metadata(&self.path).is_ok_and(|metadata| metadata.nlink() == 0) {
            return Ok(());
        }
        let (Some(path), Some(identity)) = (log::path_of(&self.path), Identity::of(&self.path)) else {
            return Err(corrupt("it is no file of its own"));
        };
        if self.layout.version < 3 {
            return Err(corrupt("version 2 of the format has no place to say so"));
        }
        let failed = |error| vbd_core::Error::io(path.display().to_string(), error);
        self.log.start(&path, identity, after).map_err(failed)?;
        let written = self.set_notes(io, true).await;
        written.inspect_err(|_| self.log.end())
    }

    /// Says in the image that there are notes beside it, or none.
    async fn set_notes(&self, io: &Io, notes: bool) -> Result<()> {
        let features = {
            let header = self.header();
            if notes { header.autoclear | autoclear::NOTES } else { header.autoclear & !autoclear::NOTES }
        };
        self.write_header_field(io, at::FEATURES + 16, &features.to_be_bytes()).await?;
        self.header().autoclear = features;
        Ok(())
    }

    /// Ends the notes of an image that is closed and has everything.
    pub(super) async fn end_log(&self, io: &Io) -> Result<()> {
        if !self.log.is_on() && self.header().autoclear & autoclear::NOTES == 0 {
            return Ok(());
        }
        self.set_notes(io, false).await?;
        self.sync_file(io).await?;
        self.log.end();
        Ok(())
    }

    /// Makes the changes again that a process has noted which did not close the image, and commits.
    pub(super) async fn replay(self: &Arc<Self>, io: &Io) -> Result<()> {
        let (Some(path), Some(identity)) = (log::path_of(&self.path), Identity::of(&self.path)) else {
            return Ok(());
        };
        let left = log::left(&path, &identity).map_err(|error| {
            let message = format!("{}: cannot read what a killed process has left", path.display());
            vbd_core::Error::io(message, error)
        })?;
        if self.header().autoclear & autoclear::NOTES == 0 {
            if left.is_some_and(|(_, notes)| !notes.is_empty()) {
                let message = format!(
                    "a process that served it was killed, and somebody else has written to it since: its last changes are \
                     lost; remove {} to go on without them",
                    path.display()
                );
                return Err(corrupt(message));
            }
            return Ok(());
        }
        if self.read_only {
            if left.is_some_and(|(_, notes)| !notes.is_empty()) {
                let message = "a process that served it was killed; open it for writing once, so that its last changes are made";
                return Err(corrupt(message));
            }
            return Ok(());
        }
        let Some((generation, notes)) = left else {
            // From before the host was started, or from elsewhere: as after a power cut.
            let _ = std::fs::remove_file(&path);
            return self.set_notes(io, false).await;
        };
        if !notes.is_empty() {
            tracing::warn!(
                "{}: a process that served it was killed; {} changes are made again",
                self.label,
                notes.len()
            );
            self.make_again(io, notes).await?;
            self.commit(io).await?;
        }
        self.try_start_log(io, generation).await?;
        self.log_started.store(true, Ordering::Release);
        Ok(())
    }

    async fn make_again(self: &Arc<Self>, io: &Io, notes: Vec<Note>) -> Result<()> {
        let mut entries = BTreeMap::new();
        for note in notes {
            match note {
                Note::Table { index, entry, old } => self.place_table(io, index, L1Entry(entry), old).await?,
                // What the last one says counts: the others may lead to clusters that are something else by now.
                Note::Entry { cluster, entry: (entry, parts) } => {
                    entries.insert(cluster, Entry { cluster: L2Entry(entry), parts: Subclusters(parts) });
                }
            }
        }
        for (cluster, entry) in entries {
            self.place_entry(io, cluster, entry).await?;
        }
        Ok(())
    }

    /// Leads an entry of the L1 table to its table again, which is written where that has not happened.
    async fn place_table(&self, io: &Io, index: u64, entry: L1Entry, old: u64) -> Result<()> {
        let (l1, layout) = (self.l1(), &self.layout);
        let place = entry.decode(layout).ok().flatten();
        let size = layout.cluster_size();
        let inside =
            |offset: u64| layout.is_aligned(offset) && offset.saturating_add(size) <= self.backend.size();
        let (Some(place), true) =
            (place.filter(|place| inside(*place)), inside(old) && index < l1.len() as u64)
        else {
            return Err(damaged());
        };
        if l1.get(index).offset() == place {
            return Ok(());
        }
        let content = if old == 0 {
            vec![0; layout.cluster_len()]
        } else {
            io.read(old, layout.cluster_len()).await?.to_vec()
        };
        let table = Arc::new(Table::new(index, &content, false));
        self.use_cluster(io, place >> layout.cluster_bits).await?;
        self.counts.state().metadata.insert(place >> layout.cluster_bits);
        self.tables.add(&table);
        (0..table.pieces()).for_each(|piece| table.dirty.mark(piece));
        table.listed.store(true, Ordering::SeqCst);
        let mut pending = self.pending();
        pending.tables.push(table);
        l1.set(index, entry.with_copied(true));
        pending.l1.insert(index, true);
        let before = old >> layout.cluster_bits;
        if old != 0 {
            pending.freed.push(before);
        }
        drop(pending);
        self.progress.changed();
        Ok(())
    }

    /// Sets an entry again.
    async fn place_entry(&self, io: &Io, cluster: u64, entry: Entry) -> Result<()> {
        let l1 = self.l1();
        let offset = cluster.checked_shl(self.layout.cluster_bits).ok_or_else(damaged)?;
        let table = self.table(io, &l1, offset).await?.ok_or_else(damaged)?;
        let index = index_of(&self.layout, offset);
        let old = table.get(&self.layout, index);
        if old == entry {
            return Ok(());
        }
        if self.is_faulty(entry) {
            return Err(damaged());
        }
        let (before, after) = (self.referred(old), self.referred(entry));
        let mut copied = entry.cluster.copied();
        for cluster in after.clone() {
            self.use_cluster(io, cluster).await?;
            copied = self.count_of(io, cluster).await? == 1;
        }
        let new = Entry { cluster: entry.cluster.with_copied(copied), ..entry };
        self.set_entries(&table, index, &[new]);
        if before != after {
            self.free(before);
        }
        Ok(())
    }

    /// Makes sure that a cluster is counted.
    async fn use_cluster(&self, io: &Io, cluster: u64) -> Result<()> {
        self.load_count(io, cluster).await?;
        self.counts.state().use_again(cluster).then_some(()).ok_or_else(damaged)
    }
}

fn damaged() -> vbd_core::Error {
    corrupt(
        "what a killed process has noted beside the image does not fit it; remove the file .NAME.changes to go on without",
    )
}
