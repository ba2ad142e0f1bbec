//! What the storage asks of offsets, lengths and memory.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

/// BLKSSZGET, linux/fs.h.
const BLKSSZGET: libc::c_ulong = 0x1268;
/// BLKGETSIZE64, linux/fs.h.
pub(super) const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

/// Alignment in bytes, powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of memory addresses.
    pub memory: u64,
    /// Of file offsets and of the length of every piece.
    pub offset: u64,
}

impl Alignment {
    /// Anything goes: the page cache takes it.
    pub(super) const ANY: Alignment = Alignment { memory: 1, offset: 1 };

    /// What O_DIRECT on this descriptor asks: STATX_DIOALIGN (Linux 6.1) where the filesystem tells, the logical block
    /// for a block device, and else a page, which every filesystem takes.
    pub(super) fn of(fd: BorrowedFd<'_>) -> Alignment {
        let stat = statx(fd);
        if let Some(stat) = &stat
            && stat.stx_mask & libc::STATX_DIOALIGN != 0
            && stat.stx_dio_offset_align.is_power_of_two()
            && stat.stx_dio_mem_align.is_power_of_two()
        {
            return Alignment {
                memory: u64::from(stat.stx_dio_mem_align),
                offset: u64::from(stat.stx_dio_offset_align),
            };
        }
        let mut sector = 0i32;
        // SAFETY: BLKSSZGET writes one int; on anything but a block device it fails.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), BLKSSZGET, &raw mut sector) };
        match u64::try_from(sector) {
            Ok(sector) if result == 0 && sector.is_power_of_two() => {
                Alignment { memory: sector, offset: sector }
            }
            _ => Alignment { memory: 4096, offset: 4096 },
        }
    }

    /// Whether a range can go to the storage as it is.
    pub(super) fn fits(self, offset: u64, len: u64) -> bool {
        (offset | len) & (self.offset - 1) == 0
    }

    /// Whether a piece of memory can.
    pub(super) fn fits_memory(self, piece: &libc::iovec) -> bool {
        piece.iov_base.addr() as u64 & (self.memory - 1) == 0 && piece.iov_len as u64 & (self.offset - 1) == 0
    }
}

/// The block that the filesystem or device allocates and frees, in bytes.
pub(super) fn preferred_block(fd: BorrowedFd<'_>) -> u32 {
    let size = statx(fd).map_or(4096, |stat| stat.stx_blksize);
    if size.is_power_of_two() && (512..=1 << 20).contains(&size) { size } else { 4096 }
}

fn statx(fd: BorrowedFd<'_>) -> Option<libc::statx> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    let mask = libc::STATX_BASIC_STATS | libc::STATX_DIOALIGN;
    // SAFETY: the path is an empty string, and the buffer has the size of the structure.
    let result =
        unsafe { libc::statx(fd.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, mask, stat.as_mut_ptr()) };
    // SAFETY: zeroed memory is a valid statx, and the kernel has filled it.
    (result == 0).then(|| unsafe { stat.assume_init() })
}
