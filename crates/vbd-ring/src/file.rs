//! Descriptors as a reactor knows them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::{Rc, Weak};
use std::sync::Arc;

/// A descriptor that operations can be submitted on, registered with the ring where a slot was free. Cheap to clone.
#[derive(Clone)]
pub struct FileHandle(Rc<Inner>);

struct Inner {
    fd: Arc<OwnedFd>,
    registered: Option<Registered>,
}

struct Registered {
    slot: u32,
    unregister: Weak<dyn Unregister>,
}

/// Takes a slot back when the last handle to it is gone.
pub(crate) trait Unregister {
    fn unregister(&self, slot: u32);
}

impl FileHandle {
    pub(crate) fn new(fd: Arc<OwnedFd>, registered: Option<(u32, Weak<dyn Unregister>)>) -> Self {
        let registered = registered.map(|(slot, unregister)| Registered { slot, unregister });
        FileHandle(Rc::new(Inner { fd, registered }))
    }

    /// The slot in the ring's table, if there is one.
    pub(crate) fn slot(&self) -> Option<u32> {
        self.0.registered.as_ref().map(|registered| registered.slot)
    }

    pub(crate) fn raw(&self) -> i32 {
        self.0.fd.as_raw_fd()
    }

    /// The descriptor itself, for what the ring cannot do.
    pub fn descriptor(&self) -> Arc<OwnedFd> {
        self.0.fd.clone()
    }
}

impl AsFd for FileHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(registered) = &self.registered
            && let Some(ring) = registered.unregister.upgrade()
        {
            ring.unregister(registered.slot);
        }
    }
}
