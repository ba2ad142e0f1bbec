//! A copy of an image: its blocks shared where the filesystem below can, its data copied and its holes kept elsewhere.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

use crate::error::Context;
use crate::zeros::is_zero;
use crate::{Error, Progress, Result, Step};

/// Bytes that are copied between looks at a wish to stop.
const PIECE: u64 = 32 << 20;
/// Bytes that are read and written at once where the kernel cannot copy by itself.
const BUFFER: usize = 1 << 20;

/// How a new image comes from its base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// It shares all blocks of the file until one of either is written.
    Reflink,
    /// It reads from the base what was not written to it: the base must not change any more.
    Overlay,
    /// All data was copied; holes stayed holes.
    Copy,
}

impl std::fmt::Display for How {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            How::Reflink => "reflink",
            How::Overlay => "qcow2 overlay",
            How::Copy => "sparse copy",
        })
    }
}

/// Has `to`, which is empty, share all blocks of `from`. Whether that could be: they are on one filesystem that can.
pub fn share(from: &File, to: &File) -> bool {
    ioctl_ficlone(to, from).is_ok()
}

/// Fills `to`, which is empty, with the `size` bytes of a file that is called `path`: in the way that is wanted, or else the
/// better of the two that are possible.
///
/// # Errors
///
/// Those of the system; blocks are to be shared and cannot be.
pub fn copy(
    from: &File,
    size: u64,
    path: &Path,
    to: &File,
    wanted: Option<How>,
    progress: &mut dyn Progress,
) -> Result<How> {
    if wanted != Some(How::Copy) && share(from, to) {
        return Ok(How::Reflink);
    }
    if wanted == Some(How::Reflink) {
        let why = "its blocks cannot be shared with the new file: both have to be on one XFS or Btrfs";
        return Err(Error::Inside(format!("{}: {why}", path.display())));
    }
    to.set_len(size).at("set the size of the copy of", path)?;
    progress.step(Step::Write, Some(size));
    range(from, (0, size), to, 0, progress)
        .and_then(|whole| if whole { Ok(How::Copy) } else { Err(Error::Interrupted) })
}

/// Copies the data of a range of bytes to a place that reads as zeros, its holes left out. Whether it came to its end:
/// the caller may have wished to stop.
pub(crate) fn range(
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
