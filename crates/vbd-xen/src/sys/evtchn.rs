//! Event channels by /dev/xen/evtchn: one descriptor each, so that each waits in the ring of its reactor.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use super::{EventChannel, EventChannels, ioctl_number};

pub(super) const DEVICE: &str = "/dev/xen/evtchn";

/// The end of a channel that a domain offers.
#[repr(C)]
struct BindInterdomain {
    domain: u32,
    port: u32,
}

const BIND_INTERDOMAIN: libc::c_ulong = ioctl_number(b'E', 1, size_of::<BindInterdomain>());
const NOTIFY: libc::c_ulong = ioctl_number(b'E', 4, size_of::<u32>());

/// The kernel's event channels.
pub(super) struct Device;

impl EventChannels for Device {
    fn bind(&self, domid: u16, port: u32) -> io::Result<Box<dyn EventChannel>> {
        let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE)?;
        let bind = BindInterdomain { domain: domid.into(), port };
        // SAFETY: the structure is what the call reads.
        let own = unsafe { libc::ioctl(file.as_raw_fd(), BIND_INTERDOMAIN, &raw const bind) };
        let own = u32::try_from(own).map_err(|_| io::Error::last_os_error())?;
        Ok(Box::new(Channel { fd: Arc::new(file.into()), port: own }))
    }
}

/// A bound channel. Closing the descriptor unbinds it.
struct Channel {
    fd: Arc<OwnedFd>,
    port: u32,
}

impl EventChannel for Channel {
    fn descriptor(&self) -> Arc<OwnedFd> {
        self.fd.clone()
    }

    fn drain(&self) -> io::Result<()> {
        let mut ports = [0; 64];
        match rustix::io::read(&*self.fd, &mut ports) {
            // To write a port allows its next event.
            Ok(len) => rustix::io::write(&*self.fd, &ports[..len]).map(|_| ())?,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    fn notify(&self) -> io::Result<()> {
        // SAFETY: the call reads one number.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), NOTIFY, &raw const self.port) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn port(&self) -> u32 {
        self.port
    }
}
