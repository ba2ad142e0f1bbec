//! The connection to a server, and the memory that it may touch.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use virtio_driver::{
    VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};

/// A connected disk.
pub(crate) struct Device {
    pub(crate) transport: Box<VirtioBlkTransport>,
    /// Bytes.
    pub(crate) capacity: u64,
    pub(crate) read_only: bool,
}

impl Device {
    /// Connects, waiting up to `timeout` for the server to listen.
    pub(crate) fn connect(socket: &Path, timeout: Duration) -> anyhow::Result<Self> {
        let path = socket.to_str().context("the socket's path is not UTF-8")?;
        let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        let wanted = features.bits()
            | (VirtioBlkFeatureFlags::MQ | VirtioBlkFeatureFlags::RO | VirtioBlkFeatureFlags::FLUSH).bits();
        let deadline = Instant::now() + timeout;
        let transport: Box<VirtioBlkTransport> = loop {
            match VhostUser::new(path, wanted) {
                Ok(transport) => break Box::new(transport),
                Err(e) if not_there_yet(&e) && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(e) => return Err(e).with_context(|| format!("connect to {path}")),
            }
        };
        let config = transport.get_config().with_context(|| format!("read the configuration of {path}"))?;
        let sectors: u64 = config.capacity.into();
        let negotiated = VirtioBlkFeatureFlags::from_bits_truncate(transport.get_features());
        let read_only = negotiated.contains(VirtioBlkFeatureFlags::RO);
        Ok(Device { transport, capacity: sectors * 512, read_only })
    }

    /// Starts `count` queues that hold `depth` requests each.
    ///
    /// The queues live in memory of the transport: they must be gone before the device is.
    pub(crate) fn queues<C>(
        &mut self,
        count: u16,
        depth: u16,
    ) -> anyhow::Result<Vec<VirtioBlkQueue<'static, C>>> {
        // A request takes three descriptors: header, data, status. Guests use 128 or 256.
        let size = (3 * depth).next_power_of_two().max(128);
        VirtioBlkQueue::setup_queues(self.transport.as_mut(), count.into(), size)
            .with_context(|| format!("start {count} queue(s)"))
    }

    /// Shares `len` bytes of new memory with the server.
    pub(crate) fn share(&mut self, len: usize) -> anyhow::Result<Memory> {
        let memory = Memory::new(len).context("memory for the data")?;
        self.transport
            .map_mem_region(memory.base as usize, len, memory.file.as_raw_fd(), 0)
            .context("share memory with the server")?;
        Ok(memory)
    }
}

fn not_there_yet(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

/// A mapped memfd.
pub(crate) struct Memory {
    base: *mut u8,
    len: usize,
    file: std::os::fd::OwnedFd,
}

impl Memory {
    fn new(len: usize) -> io::Result<Self> {
        let file = memfd_create("vbd-load", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, len as u64)?;
        // SAFETY: a new mapping at an address that the kernel picks overlaps nothing.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
                &file,
                0,
            )?
        };
        Ok(Memory { base: base.cast(), len, file })
    }

    /// A pointer to the byte at `offset`, which is inside.
    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len);
        self.base.wrapping_add(offset)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and requests that name it hold a borrow of it (see `worker::Worker`).
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

// SAFETY: the memory is reached through raw pointers only; workers use disjoint parts of it.
unsafe impl Sync for Memory {}
