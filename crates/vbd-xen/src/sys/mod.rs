//! What a back-end needs, each behind a trait: xenstore, event channels and grants of Xen, and threads.
//!
//! [`Platform::open`] is the real thing, through the kernel's devices and xenstored's socket. The same back-end runs on
//! plain memory in tests.

mod evtchn;
mod gntdev;
pub(crate) mod wire;
mod xenstore;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use crate::server::Error;

/// The ways to Xen.
#[derive(Clone)]
pub struct Platform {
    /// Connections to xenstore.
    pub stores: Arc<dyn Stores>,
    /// Event channels.
    pub events: Arc<dyn EventChannels>,
    /// Granted pages.
    pub grants: Arc<dyn Grants>,
    /// Threads.
    pub threads: Arc<dyn Threads>,
}

impl Platform {
    /// The Xen that this machine runs under.
    ///
    /// # Errors
    /// There is none, xenstored does not run, or there is no permission on `/dev/xen`.
    pub fn open() -> Result<Platform, Error> {
        let hypervisor = std::fs::read_to_string("/sys/hypervisor/type").unwrap_or_default();
        let devices = [evtchn::DEVICE, gntdev::DEVICE];
        if hypervisor.trim() != "xen" && !devices.iter().any(|path| Path::new(path).exists()) {
            return Err(Error::NoXen("this machine does not run under Xen".into()));
        }
        for path in devices {
            match std::fs::File::options().read(true).write(true).open(path) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    let message =
                        format!("no permission to open {path}; run as root, or grant access by a udev rule");
                    return Err(Error::Permission(message));
                }
                Err(error) => {
                    let module = path.rsplit('/').next().unwrap_or_default();
                    return Err(Error::NoXen(format!(
                        "cannot open {path}: {error}; try: modprobe xen-{module}"
                    )));
                }
            }
        }
        let stores = Arc::new(xenstore::Xenstored);
        match stores.connect() {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return Err(Error::Permission(format!("no permission to speak with xenstored: {error}")));
            }
            Err(error) => {
                return Err(Error::NoXen(format!("xenstored does not answer: {error}; is it running?")));
            }
        }
        let (events, grants) = (Arc::new(evtchn::Device), Arc::new(gntdev::Device));
        Ok(Platform { stores, events, grants, threads: Arc::new(OfTheSystem) })
    }
}

/// The number of an ioctl that says no direction (`_IOC(_IOC_NONE, letter, number, size)`).
const fn ioctl_number(letter: u8, number: u8, size: usize) -> libc::c_ulong {
    (size as libc::c_ulong) << 16 | (letter as libc::c_ulong) << 8 | number as libc::c_ulong
}

/// Makes connections to xenstore.
pub trait Stores: Send + Sync {
    /// A new connection, without watches.
    ///
    /// # Errors
    /// xenstored does not run, or refuses.
    fn connect(&self) -> io::Result<Box<dyn Store>>;
}

/// A watch that has gone off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    /// What has changed, or the watched path itself.
    pub path: String,
    /// The watch's own name.
    pub token: String,
}

/// A connection to xenstore.
///
/// Errors: the connection is lost, or xenstored has refused; keys that are missing, or that this domain may not see, are
/// no errors, and the two are not told apart.
pub trait Store: Send {
    /// The value of a key; none where it does not exist.
    ///
    /// # Errors
    /// See above.
    fn read(&mut self, path: &str) -> io::Result<Option<Vec<u8>>>;

    /// The names below a path; none where it does not exist.
    ///
    /// # Errors
    /// See above.
    fn list(&mut self, path: &str) -> io::Result<Option<Vec<String>>>;

    /// Sets keys, all of them or none, in one transaction.
    ///
    /// # Errors
    /// See above.
    fn write(&mut self, entries: &[(String, String)]) -> io::Result<()>;

    /// Sets keys as [`write`](Self::write) does, if `guard` exists; false if it does not. A directory that the toolstack
    /// has removed must not come back by writing into it.
    ///
    /// # Errors
    /// See above.
    fn write_if(&mut self, guard: &str, entries: &[(String, String)]) -> io::Result<bool>;

    /// Removes a key with all below it; nothing where it does not exist.
    ///
    /// # Errors
    /// See above.
    fn remove(&mut self, path: &str) -> io::Result<()>;

    /// Tells of changes at and below a path from now on, and once at the start.
    ///
    /// # Errors
    /// See above.
    fn watch(&mut self, path: &str, token: &str) -> io::Result<()>;

    /// Takes a watch back.
    ///
    /// # Errors
    /// See above.
    fn unwatch(&mut self, path: &str, token: &str) -> io::Result<()>;

    /// The next watch that has gone off, without waiting.
    ///
    /// # Errors
    /// See above.
    fn event(&mut self) -> io::Result<Option<WatchEvent>>;

    /// Readable when [`event`](Self::event) may have something that it had not before.
    fn descriptor(&self) -> BorrowedFd<'_>;
}

/// Binds event channels.
pub trait EventChannels: Send + Sync {
    /// The own end of a channel that a domain has offered.
    ///
    /// # Errors
    /// There is no such channel, it is offered to somebody else, or it is taken.
    fn bind(&self, domid: u16, port: u32) -> io::Result<Box<dyn EventChannel>>;
}

/// A bound event channel; dropping it gives it back.
pub trait EventChannel: Send {
    /// Readable when the other end has notified.
    fn descriptor(&self) -> Arc<OwnedFd>;

    /// Takes notifications back and allows the next, without waiting.
    ///
    /// # Errors
    /// The descriptor does not work any more.
    fn drain(&self) -> io::Result<()>;

    /// Notifies the other end.
    ///
    /// # Errors
    /// The other end is gone.
    fn notify(&self) -> io::Result<()>;

    /// The own end's number, for [`GrantTable::notify_on_unmap`].
    fn port(&self) -> u32;
}

/// Starts threads.
pub trait Threads: Send + Sync {
    /// Has work done on a thread of its own, for which nobody waits.
    ///
    /// # Errors
    /// There is none to be had; nothing was done.
    fn start(&self, name: &'static str, work: Box<dyn FnOnce() + Send>) -> io::Result<()>;
}

/// Threads of the operating system.
pub(crate) struct OfTheSystem;

impl Threads for OfTheSystem {
    fn start(&self, name: &'static str, work: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        std::thread::Builder::new().name(name.into()).spawn(work).map(drop)
    }
}

/// Opens ways to granted pages.
pub trait Grants: Send + Sync {
    /// A way to the pages that this domain grants, for one queue.
    ///
    /// # Errors
    /// No resources.
    fn open(&self, domid: u16) -> io::Result<Box<dyn GrantTable>>;
}

/// Bytes in a page that is granted.
pub const PAGE: usize = 4096;

/// Granted pages, mapped one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mapping {
    /// Where they are in this process.
    pub start: *mut u8,
    /// How many.
    pub pages: usize,
    /// The kernel's name for them.
    pub index: u64,
}

// SAFETY: it only names memory; whoever reaches into it says why he may.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// One copy between a granted page and own memory; must not cross a page's end there.
#[derive(Clone, Copy, Debug)]
pub struct Copy {
    /// The granted page.
    pub reference: u32,
    /// First byte in it.
    pub offset: u16,
    /// Bytes.
    pub len: u16,
    /// Own memory.
    pub own: *mut u8,
    /// Into the granted page, or out of it.
    pub into_grant: bool,
    /// What became of it; set by [`GrantTable::copy`].
    pub done: bool,
}

/// The pages that one domain grants.
pub trait GrantTable: Send + Sync {
    /// Maps pages, one after the other, all of them or none.
    ///
    /// # Errors
    /// One of the references is not granted to this domain, or not for writing.
    fn map(&self, references: &[u32], writable: bool) -> io::Result<Mapping>;

    /// Has the other end of an event channel notified when this mapping goes away, however this process ends.
    ///
    /// # Errors
    /// The kernel cannot do that.
    fn notify_on_unmap(&self, mapping: &Mapping, port: u32) -> io::Result<()>;

    /// Takes a mapping back.
    ///
    /// # Errors
    /// The pages stay mapped as long as there is this table; nobody may use them all the same.
    ///
    /// # Safety
    /// It came from [`map`](Self::map) of this table, and nobody uses it any more.
    unsafe fn unmap(&self, mapping: Mapping) -> io::Result<()>;

    /// Copies; each tells for itself whether it was done.
    ///
    /// # Errors
    /// None was done.
    ///
    /// # Safety
    /// Own memory is valid for the lengths given.
    unsafe fn copy(&self, copies: &mut [Copy]) -> io::Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel() {
        assert_eq!(ioctl_number(b'G', 0, 24), 0x18_4700);
        assert_eq!(ioctl_number(b'E', 4, 4), 0x4_4504);
    }
}
