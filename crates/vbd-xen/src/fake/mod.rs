//! A hypervisor made of plain memory, for tests: domains whose pages lie in a file in memory, event channels that are
//! eventfds, and a xenstore.

mod store;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::mm::{MapFlags, ProtFlags};

use crate::sys::{
    Copy, EventChannel, EventChannels, GrantTable, Grants, Mapping, OfTheSystem, PAGE, Platform, Threads,
};

pub use store::Tree;

/// Pages that all domains have together.
const PAGES: usize = 16384;

/// A hypervisor with its domains.
pub struct Hypervisor {
    memory: OwnedFd,
    start: *mut u8,
    next_page: AtomicUsize,
    grants: Mutex<HashMap<(u16, u32), Grant>>,
    channels: Mutex<HashMap<(u16, u32), Arc<Pair>>>,
    mapped: AtomicUsize,
    /// Mappings made so far.
    maps: AtomicUsize,
    /// Calls to copy made so far.
    copies: AtomicUsize,
    /// Calls to unmap that fail from now on.
    bad_unmaps: AtomicUsize,
    no_threads: AtomicBool,
    /// Its xenstore.
    pub store: Arc<Tree>,
}

// SAFETY: the pointer is to shared memory that lives as long as the value; what is there is read and written as other
// domains do it, without any promise.
unsafe impl Send for Hypervisor {}
// SAFETY: as above.
unsafe impl Sync for Hypervisor {}

#[derive(Clone, Copy)]
struct Grant {
    page: usize,
    writable: bool,
}

/// The two ends of a channel.
struct Pair {
    to_back: OwnedFd,
    to_front: OwnedFd,
    bound: Mutex<bool>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn eventfd() -> io::Result<OwnedFd> {
    let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
    Ok(rustix::event::eventfd(0, flags)?)
}

impl Hypervisor {
    /// One without domains.
    ///
    /// # Errors
    /// No memory.
    pub fn new() -> io::Result<Arc<Hypervisor>> {
        let memory = rustix::fs::memfd_create("domains", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&memory, (PAGES * PAGE) as u64)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, anywhere.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), PAGES * PAGE, access, MapFlags::SHARED, memory.as_fd(), 0)?
        };
        Ok(Arc::new(Hypervisor {
            memory,
            start: start.cast(),
            next_page: AtomicUsize::new(0),
            grants: Mutex::default(),
            channels: Mutex::default(),
            mapped: AtomicUsize::new(0),
            maps: AtomicUsize::new(0),
            copies: AtomicUsize::new(0),
            bad_unmaps: AtomicUsize::new(0),
            no_threads: AtomicBool::new(false),
            store: Arc::default(),
        }))
    }

    /// What a back-end in domain 0 uses of it.
    pub fn platform(self: &Arc<Self>) -> Platform {
        Platform {
            stores: Arc::new(store::Way(self.store.clone())),
            events: Arc::new(Ends(self.clone())),
            grants: Arc::new(Ends(self.clone())),
            threads: Arc::new(Ends(self.clone())),
        }
    }

    /// A page for a domain, full of zeroes.
    ///
    /// # Panics
    /// There are none left.
    pub fn page(&self) -> usize {
        let page = self.next_page.fetch_add(1, Ordering::Relaxed);
        assert!(page < PAGES, "the machine has no more memory");
        page
    }

    /// Where a page is.
    pub fn at(&self, page: usize) -> *mut u8 {
        assert!(page < PAGES);
        self.start.wrapping_add(page * PAGE)
    }

    /// A domain grants a page to domain 0.
    pub fn grant(&self, domid: u16, reference: u32, page: usize, writable: bool) {
        lock(&self.grants).insert((domid, reference), Grant { page, writable });
    }

    /// It takes a grant back.
    pub fn revoke(&self, domid: u16, reference: u32) {
        lock(&self.grants).remove(&(domid, reference));
    }

    /// A domain offers an event channel to domain 0.
    ///
    /// # Errors
    /// No descriptors.
    pub fn offer(&self, domid: u16, port: u32) -> io::Result<()> {
        let pair = Pair { to_back: eventfd()?, to_front: eventfd()?, bound: Mutex::new(false) };
        lock(&self.channels).insert((domid, port), Arc::new(pair));
        Ok(())
    }

    /// A domain notifies the other end of a channel.
    pub fn notify(&self, domid: u16, port: u32) {
        if let Some(pair) = lock(&self.channels).get(&(domid, port)) {
            let _ = rustix::io::write(&pair.to_back, &1u64.to_ne_bytes());
        }
    }

    /// A domain waits for a notification, so many milliseconds at most; whether there was one.
    pub fn wait(&self, domid: u16, port: u32, milliseconds: u32) -> bool {
        let pair = lock(&self.channels).get(&(domid, port)).cloned();
        let Some(pair) = pair else { return false };
        let mut fds = [rustix::event::PollFd::new(&pair.to_front, rustix::event::PollFlags::IN)];
        let time = rustix::event::Timespec { tv_sec: 0, tv_nsec: i64::from(milliseconds) * 1_000_000 };
        let ready = rustix::event::poll(&mut fds, Some(&time)).is_ok_and(|ready| ready > 0);
        if ready {
            let _ = rustix::io::read(&pair.to_front, &mut [0u8; 8]);
        }
        ready
    }

    /// Whether somebody has bound the other end of a channel.
    pub fn is_bound(&self, domid: u16, port: u32) -> bool {
        lock(&self.channels).get(&(domid, port)).is_some_and(|pair| *lock(&pair.bound))
    }

    /// Pages of domains that domain 0 has mapped now.
    pub fn mapped(&self) -> usize {
        self.mapped.load(Ordering::SeqCst)
    }

    /// Mappings made so far.
    pub fn maps(&self) -> usize {
        self.maps.load(Ordering::SeqCst)
    }

    /// Calls to copy made so far.
    pub fn copies(&self) -> usize {
        self.copies.load(Ordering::SeqCst)
    }

    /// So many of the next calls to unmap fail: their pages stay mapped until the way to them is closed.
    pub fn fail_unmaps(&self, count: usize) {
        self.bad_unmaps.store(count, Ordering::SeqCst);
    }

    /// Whether there are threads to be had in domain 0.
    pub fn set_threads(&self, there: bool) {
        self.no_threads.store(!there, Ordering::SeqCst);
    }

    fn find(&self, domid: u16, reference: u32, writable: bool) -> io::Result<usize> {
        match lock(&self.grants).get(&(domid, reference)) {
            Some(grant) if grant.writable || !writable => Ok(grant.page),
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }
}

impl Drop for Hypervisor {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), PAGES * PAGE) };
    }
}

/// Domain 0's ways to it.
struct Ends(Arc<Hypervisor>);

impl EventChannels for Ends {
    fn bind(&self, domid: u16, port: u32) -> io::Result<Box<dyn EventChannel>> {
        let pair = lock(&self.0.channels).get(&(domid, port)).cloned();
        let pair = pair.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        if std::mem::replace(&mut *lock(&pair.bound), true) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        // As with the real one, what happened before may have been missed.
        let _ = rustix::io::write(&pair.to_back, &1u64.to_ne_bytes());
        let fd = Arc::new(pair.to_back.try_clone()?);
        Ok(Box::new(Channel { pair, fd, port }))
    }
}

struct Channel {
    pair: Arc<Pair>,
    fd: Arc<OwnedFd>,
    port: u32,
}

impl EventChannel for Channel {
    fn descriptor(&self) -> Arc<OwnedFd> {
        self.fd.clone()
    }

    fn drain(&self) -> io::Result<()> {
        match rustix::io::read(&*self.fd, &mut [0u8; 8]) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn notify(&self) -> io::Result<()> {
        rustix::io::write(&self.pair.to_front, &1u64.to_ne_bytes())?;
        Ok(())
    }

    fn port(&self) -> u32 {
        self.port
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        *lock(&self.pair.bound) = false;
    }
}

impl Threads for Ends {
    fn start(&self, name: &'static str, work: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        if self.0.no_threads.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        OfTheSystem.start(name, work)
    }
}

impl Grants for Ends {
    fn open(&self, domid: u16) -> io::Result<Box<dyn GrantTable>> {
        Ok(Box::new(Table { hypervisor: self.0.clone(), domid, stuck: AtomicUsize::new(0) }))
    }
}

struct Table {
    hypervisor: Arc<Hypervisor>,
    domid: u16,
    /// Pages that could not be unmapped.
    stuck: AtomicUsize,
}

impl Drop for Table {
    fn drop(&mut self) {
        self.hypervisor.mapped.fetch_sub(*self.stuck.get_mut(), Ordering::SeqCst);
    }
}

impl GrantTable for Table {
    fn map(&self, references: &[u32], writable: bool) -> io::Result<Mapping> {
        let pages: Vec<usize> = references
            .iter()
            .map(|reference| self.hypervisor.find(self.domid, *reference, writable))
            .collect::<io::Result<_>>()?;
        let access = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let (len, memory) = (pages.len() * PAGE, self.hypervisor.memory.as_fd());
        // SAFETY: a new mapping, anywhere.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::empty(), MapFlags::PRIVATE)?
        };
        for (index, page) in pages.iter().enumerate() {
            let place = start.wrapping_byte_add(index * PAGE);
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            // SAFETY: over a part of what was just mapped.
            unsafe { rustix::mm::mmap(place, PAGE, access, flags, memory, (page * PAGE) as u64)? };
        }
        self.hypervisor.mapped.fetch_add(pages.len(), Ordering::SeqCst);
        self.hypervisor.maps.fetch_add(1, Ordering::SeqCst);
        Ok(Mapping { start: start.cast(), pages: pages.len(), index: 0 })
    }

    fn notify_on_unmap(&self, _mapping: &Mapping, _port: u32) -> io::Result<()> {
        Ok(())
    }

    // SAFETY: the contract is the trait's.
    unsafe fn unmap(&self, mapping: Mapping) -> io::Result<()> {
        // SAFETY: made by `map`, and the caller says that nobody uses it.
        unsafe { rustix::mm::munmap(mapping.start.cast(), mapping.pages * PAGE)? };
        let fails = self
            .hypervisor
            .bad_unmaps
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if fails.is_ok() {
            self.stuck.fetch_add(mapping.pages, Ordering::SeqCst);
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        self.hypervisor.mapped.fetch_sub(mapping.pages, Ordering::SeqCst);
        Ok(())
    }

    // SAFETY: the contract is the trait's.
    unsafe fn copy(&self, copies: &mut [Copy]) -> io::Result<()> {
        self.hypervisor.copies.fetch_add(1, Ordering::SeqCst);
        if copies.iter().any(|copy| usize::from(copy.offset) + usize::from(copy.len) > PAGE) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        for copy in copies {
            let page = self.hypervisor.find(self.domid, copy.reference, copy.into_grant);
            copy.done = page.is_ok();
            let Ok(page) = page else { continue };
            let grant = self.hypervisor.at(page).wrapping_add(copy.offset.into());
            let (from, to) = if copy.into_grant { (copy.own, grant) } else { (grant, copy.own) };
            // SAFETY: within a page, by the check above; the caller vouches for own memory.
            unsafe { std::ptr::copy(from, to, copy.len.into()) };
        }
        Ok(())
    }
}
