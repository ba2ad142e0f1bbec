//! A filesystem that was made in a file of its own, moved into its partition.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, copy_file_range, seek};
use rustix::io::Errno;

use crate::{Error, Progress, Result};

/// How much is copied between two looks at a wish to stop.
const STEP: u64 = 64 << 20;

/// Copies the data of `from`, extent by extent, to `to` from the offset `at` on; what is a hole stays one. The kernel
/// shares the blocks where the host's filesystem can.
pub(crate) fn copy(from: &File, to: &File, at: u64, progress: &mut dyn Progress) -> Result<()> {
    let failed = |e: io::Error| Error::io("cannot copy the filesystem into its partition", e);
    let mut offset = 0;
    loop {
        let start = match seek(from, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            Err(e) => return Err(failed(e.into())),
        };
        let end = seek(from, SeekFrom::Hole(start)).map_err(|e| failed(e.into()))?;
        offset = start;
        while offset < end {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            let length = (end - offset).min(STEP);
            let copied = piece(from, offset, to, at + offset, length).map_err(failed)?;
            progress.advance(copied);
            offset += copied;
        }
    }
}

/// Copies up to `length` bytes, at least one.
fn piece(from: &File, mut source: u64, to: &File, mut target: u64, length: u64) -> io::Result<u64> {
    let (start, wanted) = (source, usize::try_from(length).unwrap_or(usize::MAX));
    match copy_file_range(from, Some(&mut source), to, Some(&mut target), wanted) {
        Ok(copied) if copied > 0 => return Ok(copied as u64),
        Ok(_) | Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {}
        Err(e) => return Err(e.into()),
    }
    let mut buffer = vec![0; wanted.min(1 << 20)];
    let read = from.read_at(&mut buffer, start)?;
    if read == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    to.write_all_at(&buffer[..read], target)?;
    Ok(read as u64)
}
