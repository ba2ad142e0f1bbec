//! Guest memory: mapped regions, and addresses of guest and front-end turned into pointers.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use vbd_core::IoVec;

use crate::sigbus::{Owner, Watched};

/// FUSE can hold a page fault for as long as it likes, and a reactor with it.
const FUSE_SUPER_MAGIC: i64 = 0x6573_5546;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// A shared mapping of a file; unmapped when the last user is gone.
pub(crate) struct Mapping {
    base: *mut u8,
    len: usize,
    /// First byte that was asked for, from `base`.
    delta: usize,
    watched: Option<Watched>,
}

// SAFETY: the memory is shared with other processes anyway; all access is through raw pointers, atomics and volatile
// copies, and the mapping itself is only changed on drop.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` on.
    ///
    /// # Errors
    /// The file cannot be mapped, or lies on a filesystem in user space.
    pub(crate) fn new(file: impl AsFd, offset: u64, len: u64, owner: &Arc<Owner>) -> io::Result<Arc<Self>> {
        let kind = rustix::fs::fstatfs(&file)?;
        if kind.f_type == FUSE_SUPER_MAGIC {
            return Err(io::Error::other("memory on a FUSE filesystem cannot be trusted"));
        }
        // SAFETY: sysconf(3) has no conditions.
        let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
        let page = match kind.f_type == HUGETLBFS_MAGIC {
            true => u64::try_from(kind.f_bsize).unwrap_or(page).max(page),
            false => page,
        };
        let too_large = || io::Error::from_raw_os_error(libc::EOVERFLOW);
        let delta = offset % page;
        let whole = len.checked_add(delta).and_then(|len| len.checked_next_multiple_of(page));
        let len = usize::try_from(whole.ok_or_else(too_large)?).map_err(|_| too_large())?;
        // SAFETY: a new mapping at an address that the kernel picks overlaps nothing.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::SHARED | rustix::mm::MapFlags::NORESERVE,
                file,
                offset - delta,
            )?
        };
        let delta = usize::try_from(delta).map_err(|_| too_large())?;
        let mut mapping = Mapping { base: base.cast(), len, delta, watched: None };
        mapping.watched = Some(Watched::new(mapping.base as usize, len, owner.clone())?);
        Ok(Arc::new(mapping))
    }

    /// The first byte that was asked for.
    pub(crate) fn start(&self) -> *mut u8 {
        self.base.wrapping_add(self.delta)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.watched = None;
        // SAFETY: the mapping is ours, and this was its last user.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}

/// A part of guest memory. Lengths and addresses in bytes.
#[derive(Clone)]
pub(crate) struct Region {
    /// Guest-physical address.
    pub(crate) guest: u64,
    pub(crate) len: u64,
    /// Address in the front-end, in which it names the rings.
    pub(crate) user: u64,
    pub(crate) mapping: Arc<Mapping>,
}

impl Region {
    fn host(&self, offset: u64) -> *mut u8 {
        // Inside the mapping, which fits the address space.
        self.mapping.start().wrapping_add(usize::try_from(offset).unwrap_or(0))
    }
}

/// All regions at one moment. Requests keep the one they were made with until they complete.
#[derive(Clone, Default)]
pub(crate) struct Memory {
    /// By guest address; they do not overlap.
    regions: Vec<Region>,
}

/// Most regions of a guest: what libvhost-user offers.
pub(crate) const MOST_REGIONS: usize = 509;

impl Memory {
    /// Regions in any order.
    ///
    /// # Errors
    /// They overlap, or there are too many.
    pub(crate) fn new(mut regions: Vec<Region>) -> Result<Self, &'static str> {
        if regions.len() > MOST_REGIONS {
            return Err("too many memory regions");
        }
        regions.sort_unstable_by_key(|region| region.guest);
        let ends = regions.iter().map(|region| region.guest.checked_add(region.len));
        let starts = regions.iter().skip(1).map(|region| region.guest).chain([u64::MAX]);
        if !ends.zip(starts).all(|(end, start)| end.is_some_and(|end| end <= start)) {
            return Err("memory regions overlap");
        }
        Ok(Memory { regions })
    }

    /// The same and one region more.
    pub(crate) fn with(&self, region: Region) -> Result<Self, &'static str> {
        Memory::new(self.regions.iter().cloned().chain([region]).collect())
    }

    /// The same without a region.
    pub(crate) fn without(&self, guest: u64, user: u64, len: u64) -> Result<Self, &'static str> {
        let same = |region: &Region| (region.guest, region.user, region.len) == (guest, user, len);
        if !self.regions.iter().any(same) {
            return Err("no such memory region");
        }
        Ok(Memory { regions: self.regions.iter().filter(|region| !same(region)).cloned().collect() })
    }

    /// A pointer to `len` bytes at a front-end address, all in one region.
    pub(crate) fn user(&self, address: u64, len: u64) -> Option<*mut u8> {
        self.regions.iter().find_map(|region| {
            let offset = address.checked_sub(region.user)?;
            (offset.checked_add(len)? <= region.len).then(|| region.host(offset))
        })
    }

    /// A pointer to `len` bytes at a guest address, all in one region.
    #[inline]
    pub(crate) fn guest(&self, address: u64, len: u64) -> Option<*mut u8> {
        let region = self.region(address)?;
        let offset = address - region.guest;
        (len <= region.len - offset).then(|| region.host(offset))
    }

    /// Appends the pieces that `len` bytes at a guest address consist of; false if some are not there.
    #[inline]
    pub(crate) fn pieces(&self, address: u64, len: u64, into: &mut Vec<IoVec>) -> bool {
        let (mut address, mut len) = (address, len);
        while len > 0 {
            let Some(region) = self.region(address) else { return false };
            let offset = address - region.guest;
            let part = len.min(region.len - offset);
            let Ok(iov_len) = usize::try_from(part) else { return false };
            into.push(IoVec { iov_base: region.host(offset).cast(), iov_len });
            len -= part;
            if len > 0 {
                let Some(next) = address.checked_add(part) else { return false };
                address = next;
            }
        }
        true
    }

    /// The guest address of a pointer that this memory gave.
    pub(crate) fn address_of(&self, pointer: *const u8) -> Option<u64> {
        let pointer = pointer as u64;
        self.regions.iter().find_map(|region| {
            let offset = pointer.checked_sub(region.mapping.start() as u64)?;
            (offset < region.len).then(|| region.guest + offset)
        })
    }

    #[inline]
    fn region(&self, address: u64) -> Option<&Region> {
        // Guests have a handful of regions, most often one or two.
        let region = match self.regions.as_slice() {
            few if few.len() <= 8 => few.iter().rev().find(|region| region.guest <= address)?,
            many => &many[many.partition_point(|region| region.guest <= address).checked_sub(1)?],
        };
        (address - region.guest < region.len).then_some(region)
    }
}

/// Copies 16 bytes once, so that what is checked is what is used: the guest may change them at any time.
///
/// # Safety
/// `from` is valid for 16 bytes.
#[inline]
pub(crate) unsafe fn load16(from: *const u8) -> [u64; 2] {
    // SAFETY: by the contract of this function; alignment is looked at.
    unsafe {
        if from.addr().is_multiple_of(8) {
            let from = from.cast::<u64>();
            return [u64::from_le(from.read_volatile()), u64::from_le(from.add(1).read_volatile())];
        }
        let mut bytes = [0u8; 16];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = from.add(index).read_volatile();
        }
        let value = u128::from_le_bytes(bytes);
        #[allow(clippy::cast_possible_truncation, reason = "the two halves")]
        [value as u64, (value >> 64) as u64]
    }
}
