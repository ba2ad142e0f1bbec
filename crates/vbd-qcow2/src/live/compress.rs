//! Writing compressed clusters: compressed by whoever calls, placed one behind the other.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, PoisonError};

use vbd_core::memory::Buffer;
use vbd_core::{Error, ErrorKind, Result};
use vbd_ring::sync::mpsc::sync_channel;
use vbd_ring::sync::{Mutex, MutexGuard};
use vbd_ring::{Reactor, Remote, Settings};

use super::image::Image;
use super::io::{Io, bytes};
use super::map::{Entry, index_of};
use crate::format::{Compression, L2Entry, Subclusters};
use crate::pack::Packer;

/// Compressed clusters begin at sectors, so that none is written by reading what is beside it.
const SECTOR: u64 = 512;

/// The thread that writes for those that compress, and what is left of the clusters that it fills.
#[derive(Default)]
pub(super) struct Compressor(Mutex<Option<Writer>>);

struct Writer {
    io: Remote<Io>,
    _reactor: Reactor,
}

/// The rest of a cluster that compressed data is put into. It has a reference to the cluster, which so stays what it is.
#[derive(Clone, Copy, Default)]
pub(super) struct Rest {
    next: u64,
    end: u64,
}

impl Compressor {
    /// Ends the thread.
    pub(super) fn end(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn io(&self, image: &Arc<Image>) -> Result<Remote<Io>> {
        let mut writer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(writer) = &*writer {
            return Ok(writer.io.clone());
        }
        let failed = |error| Error::io("cannot start a thread for compressed clusters", error);
        let reactor = Reactor::spawn("vbd-qcow2", Settings::default()).map_err(failed)?;
        let backend = image.backend.clone();
        let io = Remote::new(&reactor.handle(), move |local, _| {
            let file = backend.channel(local, Arc::new(()));
            // Only clusters that are not encrypted are compressed.
            Ok(Rc::new(Io { local: local.clone(), file: file.clone(), data: file, apart: false }))
        });
        let io = io.map_err(|error| Error::new(ErrorKind::Io, error))?;
        *writer = Some(Writer { io: io.clone(), _reactor: reactor });
        Ok(io)
    }

    /// Compresses a cluster and writes it; false where it does not become shorter.
    pub(super) fn write(&self, image: &Arc<Image>, offset: u64, data: &[u8]) -> Result<bool> {
        let size = image.layout.cluster_size();
        let whole = data.len() as u64 == size || offset + data.len() as u64 == image.size();
        if !offset.is_multiple_of(size) || !whole || data.len() as u64 > size || offset >= image.size() {
            let message = format!("only whole clusters of {size} bytes can be written compressed");
            return Err(Error::new(ErrorKind::OutOfRange, message));
        }
        if image.read_only || image.data_file.is_some() || image.encrypted.is_some() {
            return Err(Error::new(ErrorKind::Unsupported, "this image takes no compressed clusters"));
        }
        let mut cluster = data.to_vec();
        cluster.resize(bytes(size), 0);
        let Some(compressed) = compress(image.compression, &cluster)? else { return Ok(false) };
        let (sender, receiver) = sync_channel(1);
        let task = image.clone();
        self.io(image)?.post(move |io| {
            let io = Io::clone(io);
            io.local.clone().spawn(async move {
                let result = task.write_compressed(&io, offset, &compressed).await;
                task.commit_if_much(&io);
                let _ = sender.send(result);
            });
        });
        let gone = || Error::new(ErrorKind::Cancelled, "the disk is being closed");
        receiver.recv().unwrap_or_else(|_| Err(gone())).map(|()| true)
    }
}

impl Image {
    async fn write_compressed(self: &Arc<Self>, io: &Io, offset: u64, data: &[u8]) -> Result<()> {
        self.check_writable()?;
        let cluster = offset >> self.layout.cluster_bits;
        let len = data.len() as u64;
        let host = self.place_compressed(io, len).await?;
        let mut buffer = Buffer::new(data.len().next_multiple_of(bytes(SECTOR)));
        buffer.bytes_mut()[..data.len()].copy_from_slice(data);
        let entry = L2Entry::compressed(&self.layout, host, len);
        let written = io.write(host, buffer, Arc::new(())).await;
        let entry = match (entry, written) {
            (Some(entry), Ok(())) => Entry { cluster: entry, parts: Subclusters::NONE },
            (entry, written) => {
                self.free(
                    host >> self.layout.cluster_bits..((host + len - 1) >> self.layout.cluster_bits) + 1,
                );
                written?;
                debug_assert!(entry.is_none());
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "the file is too long for compressed clusters",
                ));
            }
        };
        let _turn = self.clusters.lock(cluster..cluster + 1).await;
        let l1 = self.l1();
        let table = self.own_table(io, &l1, offset).await?;
        let index = index_of(&self.layout, offset);
        let old = table.get(&self.layout, index);
        self.set_entries(&table, index, &[entry]);
        self.free(self.referred(old));
        Ok(())
    }

    /// Room for compressed data, each cluster of which has a reference more.
    async fn place_compressed(&self, io: &Io, len: u64) -> Result<u64> {
        let size = self.layout.cluster_size();
        let taken = len.next_multiple_of(SECTOR);
        let _turn = self.packing.lock(0..1).await;
        let rest = *self.rest();
        if taken <= rest.end - rest.next && self.refer_to(io, rest.next / size).await.is_ok() {
            self.rest().next += taken;
            return Ok(rest.next);
        }
        let run = self.allocate(io, 1).await?;
        let start = run.start * size;
        // A cluster that follows the one before takes the end of what begins there.
        let begins = rest.end > rest.next && rest.end == start;
        let place =
            if begins && self.refer_to(io, rest.next / size).await.is_ok() { rest.next } else { start };
        let held = self.refer_to(io, run.start).await.is_ok();
        self.end_packing();
        if held {
            *self.rest() = Rest { next: place + taken, end: start + size };
        }
        Ok(place)
    }

    /// Gives up the room that is left.
    pub(super) fn end_packing(&self) {
        let rest = std::mem::take(&mut *self.rest());
        if let Some(last) = rest.end.checked_sub(1) {
            let cluster = last >> self.layout.cluster_bits;
            self.free(cluster..cluster + 1);
        }
    }

    fn rest(&self) -> MutexGuard<'_, Rest> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The compressed form of a cluster, where that is shorter by a sector at least.
fn compress(compression: Compression, cluster: &[u8]) -> Result<Option<Vec<u8>>> {
    thread_local! {
        static PACKERS: RefCell<[Option<Packer>; 2]> = const { RefCell::new([None, None]) };
    }
    let kind = match compression {
        Compression::Zlib => 0,
        Compression::Zstd => 1,
    };
    let packed = PACKERS.with_borrow_mut(|packers| {
        let packer = match &mut packers[kind] {
            Some(packer) => packer,
            none => none.insert(Packer::new(compression)?),
        };
        let mut data = Vec::new();
        Ok(packer.pack(cluster, &mut data)?.map(|_| data))
    });
    packed.map_err(|error: std::io::Error| Error::io("cannot compress", error))
}
