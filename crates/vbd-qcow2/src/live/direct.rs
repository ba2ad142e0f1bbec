//! Reading an image on the thread that asks, where nobody writes to it: for jobs that read all of a disk. Several threads
//! read, and decompress, at once.

use std::sync::{Arc, PoisonError};

use vbd_core::{Error, ErrorKind, Operation, Reader, Result, Session};
use vbd_ring::sync::Mutex;

use super::image::Image;
use super::io::{bytes, corrupt};
use super::map::{Span, Table, index_of, span};
use super::session::Qcow2Session;
use crate::format::Compressed;
use crate::pack::unpack;

/// A way to read an image.
pub(super) struct Direct {
    session: Arc<Qcow2Session>,
    backing: Option<Arc<dyn Reader>>,
    data_file: Option<Arc<dyn Reader>>,
    /// Held while a table is read.
    loading: Mutex<()>,
}

impl Direct {
    /// The way to read an image, if there is one to read all that it stands on.
    pub(super) fn new(session: Arc<Qcow2Session>) -> Option<Arc<Self>> {
        let image = session.image();
        // What is encrypted is decrypted by channels alone.
        if !image.read_only || !image.backend.can_read_cached() || image.encrypted.is_some() {
            return None;
        }
        let reader = |session: &Option<Arc<dyn Session>>| match session {
            Some(session) => session.clone().reader().map(Some),
            None => Some(None),
        };
        let (backing, data_file) = (reader(&image.below.session())?, reader(&image.data_file)?);
        Some(Arc::new(Direct { session, backing, data_file, loading: Mutex::default() }))
    }

    fn image(&self) -> &Image {
        self.session.image()
    }

    /// The table that maps an offset; `None` where there is none.
    fn table(&self, offset: u64) -> Result<Option<Arc<Table>>> {
        let image = self.image();
        let (index, l1) = (offset >> image.layout.l2_span_bits(), image.l1());
        if l1.get(index).offset() == 0 {
            return Ok(None);
        }
        if let Some(table) = image.tables.get(index) {
            return Ok(Some(table));
        }
        let _turn = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = image.tables.get(index) {
            return Ok(Some(table));
        }
        let bad = |message: String| corrupt(format!("the image is corrupt: {message}"));
        let place = l1.get(index).decode(&image.layout);
        let place = place.map_err(|error| bad(format!("entry {index} of the L1 table: {error}")))?;
        let Some(place) = place else { return Ok(None) };
        if place.checked_add(image.layout.cluster_size()).is_none_or(|end| end > image.backend.size()) {
            return Err(bad(format!("L2 table {index} is at {place:#x}, beyond the end of the file")));
        }
        let mut read = vec![0; image.layout.cluster_len()];
        image.backend.read_cached(place, &mut read)?;
        let table = Arc::new(image.looked_at(index, &read));
        image.tables.add(&table);
        Ok(Some(table))
    }

    /// What a range of at most `most` bytes is mapped to, and for how many bytes.
    fn span(&self, offset: u64, most: u64) -> Result<(Span, u64)> {
        let layout = &self.image().layout;
        let covered = 1u64 << layout.l2_span_bits();
        let mut most = most.min(covered - (offset & (covered - 1)));
        let Some(table) = self.table(offset)? else { return Ok((Span::Below, most)) };
        if table.suspect {
            let entry = table.get(layout, index_of(layout, offset));
            if let Some(fault) = self.image().fault_of(entry) {
                let cluster = offset >> layout.cluster_bits;
                let message =
                    format!("the image is corrupt: the entry of the disk's cluster {cluster}: {fault}");
                return Err(corrupt(message));
            }
            most = most.min(layout.cluster_size() - (offset & layout.offset_mask()));
        }
        Ok(span(layout, &table, offset, most))
    }

    /// Guest clusters; what is missing of the last one of a file that was cut off reads as zeroes.
    fn read_data(&self, host: u64, buffer: &mut [u8]) -> Result<()> {
        if let Some(data) = &self.data_file {
            return data.read(host, buffer);
        }
        let backend = &self.image().backend;
        let there = bytes(backend.size().saturating_sub(host)).min(buffer.len());
        buffer[there..].fill(0);
        if there == 0 { Ok(()) } else { backend.read_cached(host, &mut buffer[..there]) }
    }

    /// What the image behind has, and zeroes where that ends.
    fn read_below(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let there = bytes(self.image().backing_size().saturating_sub(offset)).min(buffer.len());
        buffer[there..].fill(0);
        match &self.backing {
            Some(backing) if there > 0 => backing.read(offset, &mut buffer[..there]),
            _ => Ok(()),
        }
    }

    /// A part of a compressed cluster, `skip` bytes into it.
    fn read_compressed(&self, cluster: Compressed, skip: u64, buffer: &mut [u8]) -> Result<()> {
        let image = self.image();
        let end = cluster.end().min(image.backend.size());
        let len = end.checked_sub(cluster.offset).filter(|len| *len > 0);
        let len = len.ok_or_else(|| corrupt("a compressed cluster is beyond the end of the file"))?;
        let mut packed = vec![0; bytes(len)];
        image.backend.read_cached(cluster.offset, &mut packed)?;
        let size = image.layout.cluster_len();
        let result = if buffer.len() == size {
            unpack(image.compression, &packed, buffer)
        } else {
            let mut whole = vec![0; size];
            unpack(image.compression, &packed, &mut whole)
                .map(|()| buffer.copy_from_slice(&whole[bytes(skip)..][..buffer.len()]))
        };
        result.map_err(|error| {
            let message = format!("the compressed cluster at {:#x} cannot be read: {error}", cluster.offset);
            corrupt(message)
        })
    }

    fn read_all(&self, mut offset: u64, mut buffer: &mut [u8]) -> Result<()> {
        while !buffer.is_empty() {
            let (span, len) = self.span(offset, buffer.len() as u64)?;
            let (part, rest) = std::mem::take(&mut buffer).split_at_mut(bytes(len));
            match span {
                Span::Data { host, .. } => self.read_data(host, part)?,
                Span::Zero { .. } => part.fill(0),
                Span::Below => self.read_below(offset, part)?,
                Span::Compressed { cluster, skip } => self.read_compressed(cluster, skip, part)?,
                Span::Bad(error) => return Err(corrupt(format!("the image is corrupt: {error}"))),
            }
            offset += len;
            buffer = rest;
        }
        Ok(())
    }
}

impl Reader for Direct {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let (size, len) = (self.image().size(), buffer.len() as u64);
        let result = if offset.checked_add(len).is_none_or(|end| end > size) {
            Err(Error::new(ErrorKind::OutOfRange, format!("the disk ends at {size}")))
        } else {
            self.read_all(offset, buffer)
        };
        result.map_err(|error| error.at(Operation::Read, offset, len).of(self.session.label()))
    }
}
