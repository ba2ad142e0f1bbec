//! What a whole disk is in: a plain file, or whatever a caller has opened.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use vbd_ext4::edit::Storage;
use vbd_ext4::read::Source;
use vbd_image::ReadAt;
use vbd_image::lease::Lease;
use vbd_image::partition::Table;

/// Bytes of zeros that are written at once where no holes can be made.
const ZEROS: usize = 1 << 20;

/// A whole disk as whoever looks after it uses it, whatever it is kept in. Its size may grow, through [`grow`](Self::grow)
/// alone.
pub trait Device: Storage {
    /// Makes it larger; what is new reads as zeros.
    ///
    /// # Errors
    ///
    /// Those of the system; [`io::ErrorKind::Unsupported`] where it cannot grow.
    fn grow(&self, size: u64) -> io::Result<()>;

    /// Makes a range read as zeros, and gives its space back where that can be.
    ///
    /// # Errors
    ///
    /// Those of the system.
    fn zero(&self, range: Range<u64>) -> io::Result<()>;

    /// Gives the space of a range back, whose content nobody needs.
    ///
    /// # Errors
    ///
    /// Those of the system; [`io::ErrorKind::Unsupported`] where space cannot be given back.
    fn discard(&self, range: Range<u64>) -> io::Result<()>;

    /// Bytes of the blocks in which space is given back.
    ///
    /// # Errors
    ///
    /// Those of the system.
    fn unit(&self) -> io::Result<u64>;

    /// Bytes of storage that it takes.
    ///
    /// # Errors
    ///
    /// Those of the system.
    fn allocated(&self) -> io::Result<u64>;

    /// The file, where its bytes are those of the disk.
    fn plain(&self) -> Option<&File> {
        None
    }
}

/// A disk's bytes, for those who read at an offset.
pub(crate) struct Bytes<'a>(pub(crate) &'a dyn Device);

impl ReadAt for Bytes<'_> {
    fn fill_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = self.0.size().saturating_sub(offset);
        let length = usize::try_from(rest).unwrap_or(usize::MAX).min(buffer.len());
        self.0.read_exact_at(&mut buffer[..length], offset)?;
        Ok(length)
    }
}

/// Writes a partition table; each part of it is durable before the next, so that after a cut one copy is whole.
pub(crate) fn write_table(device: &dyn Device, table: &Table, size: u64) -> io::Result<()> {
    let parts = table.encode(size).map_err(|misfit| io::Error::new(io::ErrorKind::InvalidInput, misfit))?;
    for (offset, bytes) in parts {
        device.write_all_at(&bytes, offset)?;
        device.sync()?;
    }
    Ok(())
}

/// A file whose bytes are those of the disk.
#[derive(Debug)]
pub(crate) struct Plain {
    file: File,
    size: AtomicU64,
    /// Ends with it.
    _lease: Option<Lease>,
}

impl Plain {
    pub(crate) fn new(file: File, size: u64, lease: Option<Lease>) -> Plain {
        Plain { file, size: size.into(), _lease: lease }
    }

    fn within(&self, offset: u64, length: usize) -> io::Result<()> {
        match offset.checked_add(length as u64) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Source for Plain {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.within(offset, buffer.len())?;
        self.file.read_exact_at(buffer, offset)
    }
}

impl Storage for Plain {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.within(offset, bytes.len())?;
        self.file.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

impl Device for Plain {
    fn grow(&self, size: u64) -> io::Result<()> {
        self.file.set_len(size)?;
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }

    /// Where there is data: what is a hole stays one.
    fn zero(&self, range: Range<u64>) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let data = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) if data < range.end => data.max(at),
                Ok(_) | Err(Errno::NXIO) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let hole = seek(&self.file, SeekFrom::Hole(data))?;
            let until = hole.clamp(data + 1, range.end);
            match punch(&self.file, data..until) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    let zeros = vec![0; ZEROS];
                    let mut from = data;
                    while from < until {
                        let length = usize::try_from(until - from).unwrap_or(usize::MAX).min(ZEROS);
                        self.file.write_all_at(&zeros[..length], from)?;
                        from += length as u64;
                    }
                }
                other => other?,
            }
            at = until;
        }
        Ok(())
    }

    /// Whatever is a hole already: space that is set aside and was never written is given back too, which cannot be told
    /// from a hole by asking where data is.
    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        punch(&self.file, range)
    }

    fn unit(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blksize().max(512))
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    fn plain(&self) -> Option<&File> {
        Some(&self.file)
    }
}

/// Makes a hole of a range.
fn punch(file: &File, range: Range<u64>) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        match fallocate(file.as_fd(), flags, range.start, range.end - range.start) {
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Err(io::ErrorKind::Unsupported.into()),
            other => return Ok(other?),
        }
    }
}
