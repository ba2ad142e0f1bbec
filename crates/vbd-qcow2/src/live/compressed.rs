//! Compressed clusters.

use std::sync::Arc;

use vbd_core::memory::copy;
use vbd_core::{IoVec, Result};

use super::channel::Qcow2Channel;
use super::io::{bytes, corrupt};
use super::read::Target;
use crate::format::{Compressed, Compression};
use crate::pack::unpack;

/// A compressed cluster that was read, decompressed.
pub(super) struct Last {
    cluster: Compressed,
    data: Arc<Vec<u8>>,
}

impl Qcow2Channel {
    /// Reads a part of a compressed cluster, `skip` bytes into it, into a part of the memory.
    pub(super) async fn read_compressed(
        &self,
        cluster: Compressed,
        skip: u64,
        (at, len): (u64, u64),
        target: &Target,
    ) -> Result<()> {
        let data = self.decompressed(cluster).await?;
        let part = &data[bytes(skip)..bytes(skip + len)];
        let flat = IoVec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
        // SAFETY: the guard keeps the memory valid, and the flat side is only read.
        unsafe { copy(flat, &target.memory, bytes(at), true) };
        Ok(())
    }

    async fn decompressed(&self, cluster: Compressed) -> Result<Arc<Vec<u8>>> {
        if let Some(last) = &*self.last.borrow()
            && last.cluster == cluster
        {
            return Ok(last.data.clone());
        }
        let age = self.age.get();
        let end = cluster.end().min(self.image.backend.size());
        let len = end.checked_sub(cluster.offset).filter(|len| *len > 0);
        let len = len.ok_or_else(|| corrupt("a compressed cluster is beyond the end of the file"))?;
        let read = self.io.read(cluster.offset, bytes(len)).await?;
        let (compression, size) = (self.image.compression, self.image.layout.cluster_len());
        // Milliseconds for a large cluster: not on a thread that others wait for.
        let data = self.io.local.unblock(move || decompress(compression, &read, size)).await;
        let data = Arc::new(data.map_err(|error| {
            let message = format!("the compressed cluster at {:#x} cannot be read: {error}", cluster.offset);
            corrupt(message)
        })?);
        if self.age.get() == age {
            *self.last.borrow_mut() = Some(Last { cluster, data: data.clone() });
        }
        Ok(data)
    }
}

/// The cluster of `size` bytes that these bytes begin with the compressed form of.
pub(crate) fn decompress(compression: Compression, data: &[u8], size: usize) -> std::io::Result<Vec<u8>> {
    let mut cluster = vec![0; size];
    unpack(compression, data, &mut cluster)?;
    Ok(cluster)
}
