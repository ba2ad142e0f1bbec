//! A copy of an image: its blocks shared where the filesystem below can, its data copied and its holes kept elsewhere.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

use super::Disk;
use crate::error::Context;
use crate::zeros::is_zero;
use crate::{Error, Progress, Result, Step};

/// Bytes that are copied between looks at a wish to stop.
const PIECE: u64 = 32 << 20;
/// Bytes that are read and written at once where the kernel cannot copy by itself.
const BUFFER: usize = 1 << 20;

/// How an image was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// The copy shares all blocks with the original until one of them is written.
    Reflink,
    /// All data was copied; holes stayed holes.
    Copy,
}

impl std::fmt::Display for How {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            How::Reflink => "reflink",
            How::Copy => "sparse copy",
        })
    }
}

/// Fills `to`, which is empty, with what is in the image.
pub(super) fn copy(disk: &Disk, to: &File, progress: &mut dyn Progress) -> Result<How> {
    if ioctl_ficlone(to, &disk.file).is_ok() {
        return Ok(How::Reflink);
    }
    to.set_len(disk.size).at("set the size of the copy of", &disk.path)?;
    progress.step(Step::Write, Some(disk.size));
    range(&disk.file, (0, disk.size), to, 0, progress)
        .and_then(|whole| if whole { Ok(How::Copy) } else { Err(Error::Interrupted) })
}

/// Copies the data of a range of bytes to a place that reads as zeros, its holes left out. Whether it came to its end:
/// the caller may have wished to stop.
pub(super) fn range(
    from: &File,
    (start, end): (u64, u64),
    to: &File,
    place: u64,
    progress: &mut dyn Progress,
) -> Result<bool> {
    let failed = |error: io::Error| Error::io("cannot copy the image", error);
    let mut at = start;
    while at < end {
        let (data, hole) = extent(from, at, end).map_err(|error| failed(error.into()))?;
        progress.advance(data - at);
        let mut next = data;
        while next < hole {
            let until = hole.min(next + PIECE);
            piece(from, to, (next, until), place + (next - start)).map_err(failed)?;
            progress.advance(until - next);
            next = until;
            if progress.cancelled() {
                return Ok(false);
            }
        }
        at = hole;
    }
    Ok(true)
}

/// The next data from a byte on; what has no holes is data.
fn extent(file: &File, at: u64, size: u64) -> rustix::io::Result<(u64, u64)> {
    let data = match seek(file, SeekFrom::Data(at)) {
        Ok(data) => data.clamp(at, size),
        Err(Errno::NXIO) => return Ok((size, size)),
        Err(Errno::INVAL) => return Ok((at, size)),
        Err(error) => return Err(error),
    };
    let hole = seek(file, SeekFrom::Hole(data))?.clamp(data, size);
    // The last bytes of a device need not be its file's.
    Ok((data, if hole == data { size } else { hole }))
}

fn piece(from: &File, to: &File, (start, end): (u64, u64), place: u64) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let (mut read, mut written) = (at, place + (at - start));
        let length = usize::try_from(end - at).unwrap_or(usize::MAX);
        match copy_file_range(from, Some(&mut read), to.as_fd(), Some(&mut written), length) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => at += length as u64,
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                return by_hand(from, to, (at, end), place + (at - start));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Copies through memory; zeros stay holes.
fn by_hand(from: &File, to: &File, (start, end): (u64, u64), place: u64) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    let mut at = start;
    while at < end {
        let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(BUFFER);
        from.read_exact_at(&mut buffer[..length], at)?;
        if !is_zero(&buffer[..length]) {
            to.write_all_at(&buffer[..length], place + (at - start))?;
        }
        at += length as u64;
    }
    Ok(())
}
