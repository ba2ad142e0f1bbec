//! Memory of a queue: the driver's descriptors, mapped, and a buffer for each tag.

use std::io;
use std::os::fd::AsFd;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::abi::{DESCRIPTOR_LEN, Descriptor, MAX_DEPTH};

fn page() -> usize {
    rustix::param::page_size()
}

fn too_large() -> io::Error {
    io::Error::from_raw_os_error(libc::EOVERFLOW)
}

/// Memory that is unmapped when dropped.
struct Mapped {
    base: *mut u8,
    len: usize,
}

// SAFETY: only raw pointers to it are given out, and it is unmapped by its last owner.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and this was its last user.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}

/// What the driver writes of its requests, one entry a tag.
pub(crate) struct Descriptors {
    mapped: Mapped,
    depth: u16,
}

impl Descriptors {
    /// Maps those of a queue.
    pub(crate) fn map(file: impl AsFd, queue: u16, depth: u16) -> io::Result<Self> {
        let whole = |entries: usize| (entries * DESCRIPTOR_LEN).next_multiple_of(page());
        let offset = u64::from(queue) * u64::try_from(whole(MAX_DEPTH)).map_err(|_| too_large())?;
        let len = whole(usize::from(depth));
        // SAFETY: a new mapping at an address that the kernel picks overlaps nothing.
        let base = unsafe {
            let flags = MapFlags::SHARED | MapFlags::POPULATE;
            mmap(std::ptr::null_mut(), len, ProtFlags::READ, flags, file, offset)?
        };
        Ok(Descriptors { mapped: Mapped { base: base.cast(), len }, depth })
    }

    /// The one of a tag. The driver has written it before it completed the tag's command.
    pub(crate) fn get(&self, tag: u16) -> Option<Descriptor> {
        if tag >= self.depth {
            return None;
        }
        let at = self.mapped.base.wrapping_add(usize::from(tag) * DESCRIPTOR_LEN);
        // SAFETY: in the mapping, which begins on a page, so that entries of 24 bytes are aligned to 8.
        unsafe {
            Some(Descriptor {
                op_flags: at.cast::<u32>().read_volatile(),
                sectors: at.add(4).cast::<u32>().read_volatile(),
                start: at.add(8).cast::<u64>().read_volatile(),
            })
        }
    }
}

/// A buffer for each tag. Pages that no request has touched take no memory.
pub(crate) struct Buffers {
    mapped: Mapped,
    each: usize,
    depth: u16,
}

impl Buffers {
    /// So many of so many bytes.
    pub(crate) fn new(depth: u16, each: u32) -> io::Result<Self> {
        let each = usize::try_from(each).map_err(|_| too_large())?.next_multiple_of(page());
        let len = each.checked_mul(usize::from(depth)).ok_or_else(too_large)?;
        // SAFETY: a new mapping at an address that the kernel picks overlaps nothing.
        let base = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)?
        };
        let mapped = Mapped { base: base.cast(), len };
        // Most requests are short: a huge page for each would be held for the few that are not.
        // SAFETY: the advice is about our own mapping and changes none of its bytes.
        let _ = unsafe { madvise(mapped.base.cast(), len, Advice::LinuxNoHugepage) };
        Ok(Buffers { mapped, each, depth })
    }

    /// The buffer of a tag; aligned to a page.
    pub(crate) fn get(&self, tag: u16) -> *mut u8 {
        debug_assert!(tag < self.depth);
        self.mapped.base.wrapping_add(usize::from(tag) * self.each)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn buffers_do_not_overlap() {
        let buffers = Buffers::new(4, 10_000).expect("memory");
        for tag in 0..4 {
            // SAFETY: the buffer has this length.
            unsafe { buffers.get(tag).write_bytes(u8::try_from(tag).expect("small"), 10_000) };
            assert!(buffers.get(tag).addr().is_multiple_of(page()));
        }
        for tag in 0..4 {
            // SAFETY: as above.
            let bytes = unsafe { std::slice::from_raw_parts(buffers.get(tag), 10_000) };
            assert!(bytes.iter().all(|byte| u16::from(*byte) == tag));
        }
    }

    #[test]
    fn descriptors_are_read_where_the_driver_puts_them() {
        // A file in the driver's place.
        let queue = (MAX_DEPTH * DESCRIPTOR_LEN).next_multiple_of(page());
        let mut bytes = vec![0; queue * 2];
        let entry = queue + 3 * DESCRIPTOR_LEN;
        bytes[entry..entry + 4].copy_from_slice(&7u32.to_ne_bytes());
        bytes[entry + 4..entry + 8].copy_from_slice(&8u32.to_ne_bytes());
        bytes[entry + 8..entry + 16].copy_from_slice(&9u64.to_ne_bytes());
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&bytes).expect("it is written");
        let descriptors = Descriptors::map(&file, 1, 4).expect("a mapping");
        assert_eq!(descriptors.get(3), Some(Descriptor { op_flags: 7, sectors: 8, start: 9 }));
        assert_eq!(descriptors.get(4), None);
    }
}
