//! I/O on plain files and block devices: everything a format needs from the storage below.
//!
//! A [`Backend`] is an open file that many queues share; [`Backend::channel`] gives one of them its way to it.
//! Aligned requests go straight from guest memory to the ring ([`channel`]); what does not fit the storage's alignment,
//! is too long, or came back short, takes the slow path ([`transfer`], [`space`]).

mod alignment;
mod channel;
mod exclusion;
mod faults;
mod plain;
mod record;
mod space;
mod transfer;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vbd_ring::Local;

pub use alignment::Alignment;
pub use channel::FileChannel;
pub use faults::{Fault, Faults};
pub use record::{Change, Recorder};

use exclusion::Exclusion;

use crate::{Capabilities, Channel, Error, ErrorKind, Geometry, Guard, Operation, Result, SECTOR};

/// Whether the host's page cache stands between guest and storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// O_DIRECT where the filesystem has it; [`Backend::is_direct`] tells. A flush makes writes durable.
    #[default]
    None,
    /// Through the page cache. A flush makes writes durable.
    Writeback,
    /// Through the page cache; every write is durable when it completes.
    Writethrough,
}

/// How to open a file.
#[derive(Clone, Default)]
pub struct Options {
    /// Open for reading only.
    pub read_only: bool,
    /// Use of the page cache.
    pub cache: Cache,
    /// Do not give space back: discards are refused, zeroes are kept allocated.
    pub keep_space: bool,
    /// Errors to inject below the channel, for tests.
    pub faults: Option<Arc<dyn Faults>>,
}

/// The longest fallocate in one call, in bytes, so that none holds up the file for long.
const SPACE_STEP: u64 = 256 << 20;
/// The longest discard or write-zeroes that guests are told to ask for, in bytes.
const SPACE_MOST: u64 = 2 << 30;

/// An open file that queues share.
pub struct Backend {
    label: String,
    /// For data: O_DIRECT if it can be had.
    data: Arc<OwnedFd>,
    /// For the last block of a file whose size does not fit the alignment. The same as `data` without O_DIRECT.
    buffered: Arc<OwnedFd>,
    alignment: Alignment,
    direct: bool,
    in_memory: bool,
    block_device: bool,
    read_only: bool,
    cache: Cache,
    block: u32,
    /// Capacity in bytes: the file's size rounded up to a sector.
    size: AtomicU64,
    /// From here on, only the page cache can reach the bytes; a multiple of the alignment.
    tail: AtomicU64,
    writing: Exclusion,
    flush_failed: AtomicBool,
    can_punch: AtomicBool,
    can_zero: AtomicBool,
    faults: Option<Arc<dyn Faults>>,
}

impl Backend {
    /// Opens the file or block device at `path`. Takes no lease. A block device is opened for writing with O_EXCL, so
    /// that one which is mounted or otherwise in use is refused.
    ///
    /// # Errors
    /// The file cannot be opened, or is neither a regular file nor a block device, or is empty.
    pub fn open(path: &Path, options: Options) -> Result<Arc<Backend>> {
        let label = path.display().to_string();
        let open = |flags: i32| {
            File::options()
                .read(true)
                .write(!options.read_only)
                .custom_flags(libc::O_CLOEXEC | flags)
                .open(path)
        };
        let opened = |error| Error::io("cannot open", error).of(&label);
        let probe = File::options().read(true).custom_flags(libc::O_PATH).open(path).map_err(opened)?;
        let kind = probe.metadata().map_err(opened)?.file_type();
        let exclusive = if kind.is_block_device() && !options.read_only { libc::O_EXCL } else { 0 };
        if !kind.is_file() && !kind.is_block_device() {
            let what = if kind.is_dir() { "a directory" } else { "not a regular file" };
            let message = format!("is {what}; a disk is a regular file or a block device");
            return Err(Error::new(ErrorKind::Corrupt, message).of(label));
        }
        let buffered = open(exclusive).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => {
                Error::new(ErrorKind::Busy, "the block device is in use (mounted, or part of a volume)")
                    .of(&label)
            }
            _ => opened(error),
        })?;
        // Only what was probed may be served.
        if buffered.metadata().map_err(opened)?.ino() != probe.metadata().map_err(opened)?.ino() {
            return Err(Error::new(ErrorKind::Corrupt, "was replaced while it was opened").of(label));
        }
        let in_memory = is_in_memory(&buffered);
        let direct = match options.cache {
            // A file in memory has no storage below to go to directly.
            Cache::None if !in_memory => reopen_direct(&buffered, options.read_only).ok(),
            _ => None,
        };
        Self::new(label, buffered.into(), direct, in_memory, kind.is_block_device(), options)
    }

    fn new(
        label: String,
        buffered: OwnedFd,
        direct: Option<OwnedFd>,
        in_memory: bool,
        block_device: bool,
        options: Options,
    ) -> Result<Arc<Backend>> {
        let alignment = match &direct {
            Some(fd) => Alignment::of(fd.as_fd()),
            None => Alignment::ANY,
        };
        let buffered = Arc::new(buffered);
        let is_direct = direct.is_some();
        let backend = Backend {
            data: direct.map_or_else(|| buffered.clone(), Arc::new),
            block: alignment::preferred_block(buffered.as_fd()),
            buffered,
            alignment,
            direct: is_direct,
            in_memory,
            block_device,
            read_only: options.read_only,
            cache: options.cache,
            size: AtomicU64::new(0),
            tail: AtomicU64::new(0),
            writing: Exclusion::default(),
            flush_failed: AtomicBool::new(false),
            can_punch: AtomicBool::new(!options.keep_space),
            can_zero: AtomicBool::new(true),
            faults: options.faults,
            label,
        };
        backend.refresh()?;
        Ok(Arc::new(backend))
    }

    /// Takes the file's size as it is now.
    ///
    /// # Errors
    /// It cannot be told, or is 0.
    pub fn refresh(&self) -> Result<()> {
        let failed = |error| Error::io("cannot tell the size", error).of(&self.label);
        match self.file_len().map_err(failed)? {
            0 => {
                Err(Error::new(ErrorKind::Corrupt, "is empty; a disk has at least one sector")
                    .of(&self.label))
            }
            len => {
                self.set_size(len);
                Ok(())
            }
        }
    }

    /// Has the page cache drop what it holds of the file, where data passes it by. A direct write over a cached page
    /// cannot be started without waiting: the kernel hands each to a thread of its own, several times slower. A file
    /// that was just copied or built is cached whole.
    pub fn drop_cached(&self) {
        if self.direct {
            // Advice: where it is not taken, only time is lost. What is dirty is written out, and stays.
            let _ = rustix::fs::fadvise(&self.buffered, 0, None, rustix::fs::Advice::DontNeed);
        }
    }

    /// Capacity in bytes, a multiple of 512. A file's last, partial sector counts whole; its missing bytes read as
    /// zeroes, and a write to it completes the file's last sector.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Whether the page cache is passed by.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether the file lives in memory (tmpfs, ramfs): then I/O is done at once, without the ring.
    pub fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    /// What the storage asks of offsets, lengths and memory.
    pub fn alignment(&self) -> Alignment {
        self.alignment
    }

    /// Whether this is a block device.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// The descriptor that data goes through. A lock on it lasts, after a kill, until the last I/O has landed.
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        self.data.clone()
    }

    /// Whether [`read_cached`](Self::read_cached) gives what a channel would: not where errors are injected into channels.
    pub fn can_read_cached(&self) -> bool {
        self.faults.is_none()
    }

    /// Fills the buffer from an offset on, on this thread and through the page cache. What is missing of the file's last
    /// sector reads as zeroes.
    ///
    /// # Errors
    /// The range is not inside the file, or what the kernel says.
    pub fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let (at, len) = (offset, buffer.len() as u64);
        let failed = |error: Error| error.at(Operation::Read, at, len).of(&self.label);
        if offset.checked_add(len).is_none_or(|end| end > self.size()) {
            let message = format!("the file ends at {}", self.size());
            return Err(failed(Error::new(ErrorKind::OutOfRange, message)));
        }
        let (mut offset, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            match rustix::io::pread(&self.buffered, &mut *rest, offset) {
                Ok(0) if offset + SECTOR > self.size() => {
                    rest.fill(0);
                    break;
                }
                Ok(0) => {
                    return Err(failed(Error::new(ErrorKind::Io, format!("the file ends at {offset} now"))));
                }
                Ok(read) => {
                    rest = &mut rest[read..];
                    offset += read as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed(Error::io("cannot read", errno.into()))),
            }
        }
        Ok(())
    }

    /// Sizes as a disk tells them.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size(),
            block_size: 512,
            physical_block_size: self.block.max(512),
            optimal_size: 0,
            discard_granularity: self.block.max(512),
            max_discard: SPACE_MOST,
            max_zeroes: SPACE_MOST,
        }
    }

    /// Abilities as a disk tells them.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities_for(self.read_only)
    }

    /// The abilities this file would have if it were opened so.
    pub fn capabilities_for(&self, read_only: bool) -> Capabilities {
        Capabilities {
            read_only,
            write_cache: self.cache != Cache::Writethrough,
            discard: !read_only && self.can_punch.load(Ordering::Relaxed),
            fast_zeroes: !read_only && self.can_zero.load(Ordering::Relaxed),
            grow: !read_only,
        }
    }

    /// The way of one queue to this file. It keeps `owner` alive: whatever holds the file's lease.
    pub fn channel(self: Arc<Self>, local: &Local, owner: Guard) -> Rc<dyn Channel> {
        FileChannel::new(self, local, owner)
    }

    /// Makes the file larger. A block device cannot be; for one that has grown, this takes the new size over.
    ///
    /// # Errors
    /// See [`Session::grow`](crate::Session::grow).
    pub fn grow(&self, size: u64) -> Result<()> {
        let refuse = |message: String| Err(Error::new(ErrorKind::Unsupported, message).of(&self.label));
        let failed = |error| Error::io(format!("cannot grow to {size} bytes"), error).of(&self.label);
        if !size.is_multiple_of(SECTOR) {
            return refuse(format!("{size} bytes are no multiple of 512"));
        }
        if size < self.size() {
            return refuse(format!(
                "{size} bytes are less than the {} it has; a disk only grows",
                self.size()
            ));
        }
        if self.read_only {
            return refuse("is open for reading only".into());
        }
        if self.block_device {
            let len = self.file_len().map_err(failed)?;
            if size > len {
                return refuse(format!("the device has {len} bytes; grow the volume first"));
            }
        } else {
            let seen = self.begun(|| Change::Length(size));
            let result = rustix::fs::ftruncate(&self.buffered, size);
            self.ended(seen, result.map_or_else(|error| -error.raw_os_error(), |()| 0));
            result.map_err(|error| failed(error.into()))?;
        }
        self.set_size(size);
        Ok(())
    }

    /// Cuts the file off at `len` bytes, above 0, where it is longer: for a format whose file has more than it needs. No
    /// request is under way beyond that. A block device stays as it is.
    ///
    /// # Errors
    /// The file cannot be cut.
    pub fn trim(&self, len: u64) -> Result<()> {
        if self.block_device || self.read_only || len == 0 || len >= self.size() {
            return Ok(());
        }
        let seen = self.begun(|| Change::Length(len));
        let result = rustix::fs::ftruncate(&self.buffered, len);
        self.ended(seen, result.map_or_else(|error| -error.raw_os_error(), |()| 0));
        let failed = |error: rustix::io::Errno| {
            Error::io(format!("cannot cut it to {len} bytes"), error.into()).of(&self.label)
        };
        result.map_err(failed)?;
        self.set_size(len);
        Ok(())
    }

    fn set_size(&self, len: u64) {
        let size = len.next_multiple_of(SECTOR);
        let whole = len / SECTOR * SECTOR;
        // The tail first: a request that sees the new size must not take the old tail for the direct path.
        self.tail.store(whole / self.alignment.offset * self.alignment.offset, Ordering::Release);
        self.size.store(size, Ordering::Release);
        if self.alignment.offset > SECTOR || self.tail.load(Ordering::Acquire) < size {
            // Sectors are what guests write: some of them have to be read before.
            self.writing.lock_all();
        }
    }

    fn file_len(&self) -> io::Result<u64> {
        if !self.block_device {
            return Ok(rustix::fs::fstat(&self.buffered)?.st_size.cast_unsigned());
        }
        let mut bytes = 0u64;
        // SAFETY: BLKGETSIZE64 writes one u64.
        if unsafe { libc::ioctl(self.buffered.as_raw_fd(), alignment::BLKGETSIZE64, &raw mut bytes) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(bytes)
    }
}

/// Opens the same file once more with O_DIRECT, by its descriptor so that it cannot be another one.
fn reopen_direct(file: &File, read_only: bool) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = libc::O_CLOEXEC | libc::O_DIRECT;
    Ok(File::options().read(true).write(!read_only).custom_flags(flags).open(path)?.into())
}

fn is_in_memory(file: &File) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    rustix::fs::fstatfs(file).is_ok_and(|stat| matches!(stat.f_type, TMPFS | RAMFS))
}
