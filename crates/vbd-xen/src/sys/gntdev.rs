//! Granted pages by /dev/xen/gntdev.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Mutex, PoisonError};

use rustix::mm::{MapFlags, ProtFlags};

use super::{Copy, GrantTable, Grants, Mapping, PAGE, ioctl_number};

pub(super) const DEVICE: &str = "/dev/xen/gntdev";

/// Reserves a place for pages; as many references follow, each a domain and a number.
#[repr(C)]
struct MapHead {
    count: u32,
    pad: u32,
    index: u64,
}

#[repr(C)]
struct Unmap {
    index: u64,
    count: u32,
    pad: u32,
}

#[repr(C)]
struct UnmapNotify {
    index: u64,
    action: u32,
    port: u32,
}

/// One copy. An end is an address, or a page of a domain: reference, offset, domain.
#[repr(C)]
struct Segment {
    source: u64,
    target: u64,
    len: u16,
    flags: u16,
    status: i16,
}

#[repr(C)]
struct GrantCopy {
    count: u32,
    segments: *mut Segment,
}

// The size in the number is that of the structure with one reference.
const MAP: libc::c_ulong = ioctl_number(b'G', 0, size_of::<MapHead>() + 8);
const UNMAP: libc::c_ulong = ioctl_number(b'G', 1, size_of::<Unmap>());
const UNMAP_NOTIFY: libc::c_ulong = ioctl_number(b'G', 7, size_of::<UnmapNotify>());
const COPY: libc::c_ulong = ioctl_number(b'G', 8, size_of::<GrantCopy>());

const SEND_EVENT: u32 = 2;
const SOURCE_IS_GRANT: u16 = 1;
const TARGET_IS_GRANT: u16 = 2;

/// The kernel's grants.
pub(super) struct Device;

impl Grants for Device {
    fn open(&self, domid: u16) -> io::Result<Box<dyn GrantTable>> {
        let file = File::options().read(true).write(true).open(DEVICE)?;
        Ok(Box::new(Table { file, domid, segments: Mutex::default() }))
    }
}

struct Table {
    file: File,
    domid: u16,
    /// For the next copies.
    segments: Mutex<Vec<Segment>>,
}

impl Table {
    fn foreign(&self, reference: u32, offset: u16) -> u64 {
        u64::from(reference) | u64::from(offset) << 32 | u64::from(self.domid) << 48
    }

    fn forget(&self, index: u64, count: usize) -> io::Result<()> {
        let unmap = Unmap { index, count: u32::try_from(count).unwrap_or(0), pad: 0 };
        // SAFETY: the structure is what the call reads.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), UNMAP, &raw const unmap) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl GrantTable for Table {
    fn map(&self, references: &[u32], writable: bool) -> io::Result<Mapping> {
        let count = u32::try_from(references.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // In words of 64 bits, for the alignment: count and padding, index, then domain and reference.
        let mut words = vec![u64::from(count), 0];
        words.extend(references.iter().map(|reference| u64::from(self.domid) | u64::from(*reference) << 32));
        // SAFETY: as many references follow as the head says.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), MAP, words.as_mut_ptr()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let index = words[1];
        let access = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let len = references.len() * PAGE;
        // SAFETY: a new mapping, anywhere.
        let mapped = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, self.file.as_fd(), index)
        };
        match mapped {
            Ok(start) => Ok(Mapping { start: start.cast(), pages: references.len(), index }),
            Err(error) => {
                // What was reserved stays so until the file is closed, should this fail, too.
                let _ = self.forget(index, references.len());
                Err(error.into())
            }
        }
    }

    fn notify_on_unmap(&self, mapping: &Mapping, port: u32) -> io::Result<()> {
        let notify = UnmapNotify { index: mapping.index, action: SEND_EVENT, port };
        // SAFETY: the structure is what the call reads.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), UNMAP_NOTIFY, &raw const notify) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    // SAFETY: the contract is the trait's.
    unsafe fn unmap(&self, mapping: Mapping) -> io::Result<()> {
        // SAFETY: the caller says that it is a mapping of this table that nobody uses.
        unsafe { rustix::mm::munmap(mapping.start.cast(), mapping.pages * PAGE)? };
        self.forget(mapping.index, mapping.pages)
    }

    // SAFETY: the contract is the trait's.
    unsafe fn copy(&self, copies: &mut [Copy]) -> io::Result<()> {
        let mut segments = self.segments.lock().unwrap_or_else(PoisonError::into_inner);
        segments.clear();
        segments.extend(copies.iter().map(|copy| {
            let (own, grant) = (copy.own.addr() as u64, self.foreign(copy.reference, copy.offset));
            let (source, target, flags) =
                if copy.into_grant { (own, grant, TARGET_IS_GRANT) } else { (grant, own, SOURCE_IS_GRANT) };
            // A status that none of them ends with, should the call stop half-way.
            Segment { source, target, len: copy.len, flags, status: 1 }
        }));
        let count = u32::try_from(segments.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let call = GrantCopy { count, segments: segments.as_mut_ptr() };
        // SAFETY: as many segments as it says; the caller vouches for own memory.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), COPY, &raw const call) };
        let error = io::Error::last_os_error();
        for (copy, segment) in copies.iter_mut().zip(&*segments) {
            copy.done = result >= 0 && segment.status == 0;
        }
        if result < 0 { Err(error) } else { Ok(()) }
    }
}
