//! Shared memory that is truncated under us: the connection it belongs to is lost, and nobody else notices.
//!
//! The kernel sends SIGBUS to a thread that touches a mapped page which the file no longer has. The handler looks the
//! address up in a registry that it can read without locks, puts zeroed memory in the mapping's place, marks the owner
//! as lost and shuts its socket down. The thread goes on, reads zeroes, and the connection's own thread cleans up.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Who is told when memory vanishes: one for each connection.
pub(crate) struct Owner {
    lost: AtomicBool,
    socket: OwnedFd,
}

impl Owner {
    /// `socket` is shut down when memory vanishes, which wakes the connection's thread.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Owner { lost: AtomicBool::new(false), socket }
    }

    /// Whether memory of this connection has vanished.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    fn lose(&self) {
        self.lost.store(true, Ordering::SeqCst);
        // SAFETY: shutdown(2) is async-signal-safe, and the descriptor is open as long as `self`.
        unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_RDWR) };
    }
}

const SLOTS: usize = 64;

/// A mapping that may vanish. `base` is 0 while the slot is free, and is written last.
struct Slot {
    base: AtomicUsize,
    len: AtomicUsize,
    owner: AtomicPtr<Owner>,
}

/// Slots are never freed, so that the handler can walk them at any time.
struct Block {
    slots: [Slot; SLOTS],
    next: AtomicPtr<Block>,
}

impl Block {
    const fn new() -> Self {
        let slots = [const {
            Slot { base: AtomicUsize::new(0), len: AtomicUsize::new(0), owner: AtomicPtr::new(null_mut()) }
        }; SLOTS];
        Block { slots, next: AtomicPtr::new(null_mut()) }
    }
}

static FIRST: Block = Block::new();
static REGISTER: Mutex<()> = Mutex::new(());
static PREVIOUS: OnceLock<Option<libc::sigaction>> = OnceLock::new();

fn blocks() -> impl Iterator<Item = &'static Block> {
    std::iter::successors(Some(&FIRST), |block| {
        // SAFETY: null, or a block that was leaked by `Watched::new`.
        unsafe { block.next.load(Ordering::Acquire).as_ref() }
    })
}

/// A mapping in the registry, until dropped. Drop it before the memory is unmapped.
pub(crate) struct Watched {
    slot: &'static Slot,
    /// Kept for the handler, which has its address.
    _owner: Arc<Owner>,
}

impl Watched {
    /// Watches `len` bytes at `base`, page-aligned both, which must be a mapping of their own.
    ///
    /// # Errors
    /// The signal handler cannot be installed.
    pub(crate) fn new(base: usize, len: usize, owner: Arc<Owner>) -> io::Result<Self> {
        install()?;
        let _guard = REGISTER.lock().unwrap_or_else(PoisonError::into_inner);
        let free =
            blocks().flat_map(|block| &block.slots).find(|slot| slot.base.load(Ordering::Relaxed) == 0);
        let slot = free.unwrap_or_else(|| {
            let block: &'static Block = Box::leak(Box::new(Block::new()));
            let last = blocks().last().unwrap_or(&FIRST);
            last.next.store(std::ptr::from_ref(block).cast_mut(), Ordering::Release);
            &block.slots[0]
        });
        slot.len.store(len, Ordering::Relaxed);
        slot.owner.store(Arc::as_ptr(&owner).cast_mut(), Ordering::Relaxed);
        slot.base.store(base, Ordering::Release);
        Ok(Watched { slot, _owner: owner })
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _guard = REGISTER.lock().unwrap_or_else(PoisonError::into_inner);
        self.slot.base.store(0, Ordering::Release);
    }
}

/// Installs the handler once a process.
fn install() -> io::Result<()> {
    let previous = PREVIOUS.get_or_init(|| {
        // SAFETY: all zeroes is a valid sigaction; the handler does only what a signal handler may.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            let mut previous: libc::sigaction = std::mem::zeroed();
            let failed = libc::sigaction(libc::SIGBUS, &raw const action, &raw mut previous) != 0;
            (!failed).then_some(previous)
        }
    });
    match previous {
        Some(_) => Ok(()),
        None => Err(io::Error::other("the SIGBUS handler cannot be installed")),
    }
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo; errno is this thread's own and is put back.
    unsafe {
        let errno = *libc::__errno_location();
        let served = replace((*info).si_addr() as usize);
        *libc::__errno_location() = errno;
        if !served {
            pass_on(signal, info, context);
        }
    }
}

/// Puts zeroed memory in the place of the mapping that holds `address`; false if it is none of ours.
fn replace(address: usize) -> bool {
    for slot in blocks().flat_map(|block| &block.slots) {
        let base = slot.base.load(Ordering::Acquire);
        let len = slot.len.load(Ordering::Relaxed);
        let owner = slot.owner.load(Ordering::Relaxed);
        let inside = base != 0 && address >= base && address - base < len;
        // Looked at again, for the case that the slot changed hands in between.
        if !inside || slot.base.load(Ordering::SeqCst) != base {
            continue;
        }
        let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the range is one mapping of ours, held by whoever faulted in it; mmap(2) is only a system call. The
        // owner is held by the mapping's entry.
        unsafe {
            if libc::mmap(base as *mut _, len, access, flags, -1, 0) == libc::MAP_FAILED {
                return false;
            }
            (*owner).lose();
        }
        return true;
    }
    false
}

/// A fault that is not ours goes to who was there before.
///
/// # Safety
/// Called from the signal handler with its own arguments.
unsafe fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS.get().and_then(Option::as_ref);
    // SAFETY: the previous handler is called as the kernel would; with the default action restored, the fault comes
    // again and ends the process as it should.
    unsafe {
        match previous {
            Some(action) if action.sa_sigaction > libc::SIG_IGN => {
                if action.sa_flags & libc::SA_SIGINFO != 0 {
                    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(action.sa_sigaction);
                    handler(signal, info, context);
                } else {
                    let handler: extern "C" fn(libc::c_int) = std::mem::transmute(action.sa_sigaction);
                    handler(signal);
                }
            }
            _ => {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}
