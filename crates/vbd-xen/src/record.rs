//! The record of requests in flight: what a server needs that takes over a ring from one that was killed.
//!
//! Responses overwrite requests in the ring, and come in any order. So the ring alone does not tell which requests are
//! still to be answered. The record has a copy of each request that was taken, in a file that outlives the process; the
//! kernel keeps the pages, so nothing needs to be synced: it need not outlive the machine.
//!
//! The order of stores is the order in which a successor sees them, since it starts when the process is gone:
//! - taking: the copy, then `taken` in its state, then the count of consumed requests;
//! - answering: the number of the response, before the ring shows it. A successor drops requests whose response the ring
//!   shows, and carries out again those whose it does not. To do a request twice before it is answered is harmless:
//!   its pages are still the same.
//! - after showing: the state is `free`, so that numbers do not wrap around.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, compiler_fence};

use crate::abi::{Entry, WORDS};

const MAGIC: u32 = 0x7662_6401;
const FREE: u32 = 0;
const TAKEN: u32 = 1;
const ANSWERED: u32 = 2;

/// What the file begins with.
#[repr(C)]
struct Head {
    magic: AtomicU32,
    queues: AtomicU32,
    entries: AtomicU32,
    /// What xenstore has too: that the file belongs to this connection.
    name: [AtomicU32; 2],
    complete: AtomicU32,
    /// Writes were let through that only a flush makes outlive the process.
    unflushed: AtomicU32,
    pad: [AtomicU32; 9],
}

#[repr(C)]
struct QueueHead {
    consumed: AtomicU32,
    pad: [AtomicU32; 15],
}

#[repr(C)]
struct Place {
    state: AtomicU32,
    /// Running number of the request.
    index: AtomicU32,
    /// Running number of its response.
    response: AtomicU32,
    pad: AtomicU32,
    words: [AtomicU32; WORDS],
}

/// The memory of a device's record.
pub(crate) struct Record {
    start: *mut u8,
    len: usize,
    queues: u32,
    entries: u32,
    path: Option<PathBuf>,
}

// SAFETY: all access to the mapping is atomic, and it stays until the value is dropped.
unsafe impl Send for Record {}
// SAFETY: as above.
unsafe impl Sync for Record {}

impl Record {
    fn len(queues: u32, entries: u32) -> usize {
        let queue = size_of::<QueueHead>() + entries as usize * size_of::<Place>();
        size_of::<Head>() + queues as usize * queue
    }

    /// A new record, in a file if there is a path for it. `name` goes into it.
    ///
    /// # Errors
    /// The file cannot be made.
    pub(crate) fn create(
        path: Option<&Path>,
        name: u64,
        queues: u32,
        entries: u32,
    ) -> io::Result<Arc<Record>> {
        let len = Self::len(queues, entries);
        let file = path.map(|path| fresh_file(path, len)).transpose()?;
        let record = Self::map(file.as_ref(), len, queues, entries, path)?;
        let head = record.head();
        #[allow(clippy::cast_possible_truncation, reason = "halves")]
        for (to, half) in head.name.iter().zip([name as u32, (name >> 32) as u32]) {
            to.store(half, Ordering::Relaxed);
        }
        head.queues.store(queues, Ordering::Relaxed);
        head.entries.store(entries, Ordering::Relaxed);
        head.magic.store(MAGIC, Ordering::Release);
        Ok(record)
    }

    /// The record that another process has left.
    ///
    /// # Errors
    /// There is none, or it is another connection's.
    pub(crate) fn open(path: &Path, name: u64, queues: u32, entries: u32) -> io::Result<Arc<Record>> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = File::options().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
        let len = Self::len(queues, entries);
        let stranger = || io::Error::new(io::ErrorKind::InvalidData, "belongs to another connection");
        if file.metadata()?.len() != len as u64 {
            return Err(stranger());
        }
        let record = Self::map(Some(&file), len, queues, entries, Some(path))?;
        let head = record.head();
        let there = [&head.magic, &head.queues, &head.entries, &head.name[0], &head.name[1], &head.complete];
        #[allow(clippy::cast_possible_truncation, reason = "halves")]
        let wanted = [MAGIC, queues, entries, name as u32, (name >> 32) as u32, 1];
        if there.map(|word| word.load(Ordering::Acquire)) == wanted { Ok(record) } else { Err(stranger()) }
    }

    fn map(
        file: Option<&File>,
        len: usize,
        queues: u32,
        entries: u32,
        path: Option<&Path>,
    ) -> io::Result<Arc<Record>> {
        use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, anywhere.
        let start = unsafe {
            match file {
                Some(file) => mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, file.as_fd(), 0)?,
                None => mmap_anonymous(std::ptr::null_mut(), len, access, MapFlags::PRIVATE)?,
            }
        };
        Ok(Arc::new(Record { start: start.cast(), len, queues, entries, path: path.map(Path::to_owned) }))
    }

    fn head(&self) -> &Head {
        // SAFETY: the mapping begins with it; it is made of atomics, for which any bytes are valid.
        unsafe { &*self.start.cast::<Head>() }
    }

    /// Every queue has its part, and rings were taken from where it says: from now on a successor may use it.
    pub(crate) fn complete(&self) {
        self.head().complete.store(1, Ordering::Release);
    }

    /// Whether writes that completed were lost with the process that had taken them.
    pub(crate) fn is_lost(&self) -> bool {
        self.head().unflushed.load(Ordering::Acquire) == 1
    }

    /// Says that writes are let through which would be lost, or that all of them were flushed.
    pub(crate) fn set_unflushed(&self, on: bool) {
        self.head().unflushed.store(u32::from(on), Ordering::Release);
    }

    /// Takes the file away: the connection has ended.
    pub(crate) fn remove(&self) {
        self.head().complete.store(0, Ordering::Release);
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nobody is left to use it.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.len) };
    }
}

fn fresh_file(path: &Path, len: usize) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    // Allocated now: memory that cannot be had later would be a signal in the midst of a request.
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, len as u64)?;
    Ok(file)
}

/// One queue's part of a record. Used by one thread.
pub(crate) struct Log {
    record: Arc<Record>,
    queue: usize,
}

impl Log {
    pub(crate) fn new(record: Arc<Record>, queue: u32) -> Log {
        assert!(queue < record.queues);
        let each = size_of::<QueueHead>() + record.entries as usize * size_of::<Place>();
        Log { queue: size_of::<Head>() + queue as usize * each, record }
    }

    #[allow(clippy::cast_ptr_alignment, reason = "all parts are multiples of 64 bytes")]
    fn head(&self) -> &QueueHead {
        // SAFETY: within the mapping, by the bound on queues.
        unsafe { &*self.record.start.add(self.queue).cast() }
    }

    #[inline]
    #[allow(clippy::cast_ptr_alignment, reason = "all parts are multiples of 64 bytes")]
    fn place(&self, slot: usize) -> &Place {
        assert!(slot < self.record.entries as usize);
        // SAFETY: within the mapping, by the bound just checked.
        unsafe {
            let places = self.record.start.add(self.queue + size_of::<QueueHead>());
            &*places.cast::<Place>().add(slot)
        }
    }

    /// Where the ring is taken from.
    pub(crate) fn start(&self, consumed: u32) {
        self.head().consumed.store(consumed, Ordering::Release);
    }

    /// A request was taken, the one before `consumed`.
    #[inline]
    pub(crate) fn taken(&self, slot: usize, entry: &Entry, words: usize, consumed: u32) {
        let place = self.place(slot);
        for (to, word) in place.words.iter().zip(&entry.words[..words]) {
            to.store(*word, Ordering::Relaxed);
        }
        place.index.store(consumed.wrapping_sub(1), Ordering::Relaxed);
        compiler_fence(Ordering::Release);
        place.state.store(TAKEN, Ordering::Release);
        self.head().consumed.store(consumed, Ordering::Release);
    }

    /// Its response has this number; the ring does not show it yet.
    #[inline]
    pub(crate) fn answered(&self, slot: usize, response: u32) {
        let place = self.place(slot);
        place.response.store(response, Ordering::Relaxed);
        place.state.store(ANSWERED, Ordering::Release);
    }

    /// The ring shows its response.
    #[inline]
    pub(crate) fn shown(&self, slot: usize) {
        self.place(slot).state.store(FREE, Ordering::Release);
    }

    /// What a successor finds: how many requests were taken, and which of them are to be done again, oldest first, each
    /// with its place. The ring shows responses up to `published`.
    ///
    /// # Errors
    /// The record and the ring do not belong together.
    pub(crate) fn recover(&self, published: u32) -> Result<(u32, Vec<(usize, Entry)>), String> {
        let consumed = self.head().consumed.load(Ordering::Acquire);
        let entries = self.record.entries;
        let mut again = Vec::new();
        for slot in 0..entries as usize {
            let place = self.place(slot);
            let index = place.index.load(Ordering::Relaxed);
            let response = place.response.load(Ordering::Relaxed);
            let to_do = match place.state.load(Ordering::Acquire) {
                // One that was copied and not counted will be taken from the ring once more.
                TAKEN => index != consumed,
                ANSWERED => published.wrapping_sub(response).wrapping_sub(1) >= entries,
                _ => false,
            };
            if !to_do {
                self.shown(slot);
                continue;
            }
            place.state.store(TAKEN, Ordering::Release);
            let mut entry = Entry::EMPTY;
            for (to, word) in entry.words.iter_mut().zip(&place.words) {
                *to = word.load(Ordering::Relaxed);
            }
            again.push((consumed.wrapping_sub(index), slot, entry));
        }
        let out = consumed.wrapping_sub(published);
        if out > entries || out as usize != again.len() {
            return Err(format!(
                "its record knows {} requests in flight where the ring has {out}",
                again.len()
            ));
        }
        again.sort_by_key(|(age, ..)| std::cmp::Reverse(*age));
        Ok((consumed, again.into_iter().map(|(_, slot, entry)| (slot, entry)).collect()))
    }
}
