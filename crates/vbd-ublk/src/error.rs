//! Why there is no device.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a device cannot be had, or does not end as it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel has no driver, or it is not loaded.
    #[error(
        "/dev/ublk-control is not there, so this kernel has no ublk driver: `modprobe ublk_drv` loads it where it is \
         a module (Linux 6.0 or later, built with CONFIG_BLK_DEV_UBLK)"
    )]
    NoDriver,
    /// The driver cannot be used.
    #[error("{}: {source}: ublk devices are root's unless udev gives this node to others", .path.display())]
    Denied {
        /// The driver's node.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The reactors have no io_uring.
    #[error("ublk needs io_uring, which cannot be had here: {0}")]
    NoUring(String),
    /// The driver refuses a command.
    #[error("{}: the driver refuses {command}: {source}", name(.device))]
    Refused {
        /// The command.
        command: &'static str,
        /// The device's number; none for one that has none yet.
        device: Option<u32>,
        /// Why.
        source: io::Error,
    },
    /// The server before was killed, and the disk does not keep what it had not flushed.
    #[error(
        "ublk{id}: the server before this one was killed, and writes that it had not flushed to this image are lost: delete the \
         device (`vbd detach`), and start anew what used it"
    )]
    Lost {
        /// The device's number.
        id: u32,
    },
    /// The driver does not answer.
    #[error(
        "{}: the driver has not answered {command} within {} s: `dmesg` may tell why; another device whose end hangs \
         blocks all others", name(.device), .within.as_secs()
    )]
    Late {
        /// The command.
        command: &'static str,
        /// The device's number; none for one that has none yet.
        device: Option<u32>,
        /// How long it was waited for.
        within: Duration,
    },
    /// Somebody serves the device.
    #[error("ublk{id}: process {pid} serves this device: choose another number, or none")]
    InUse {
        /// The device.
        id: u32,
        /// Its server.
        pid: i32,
    },
    /// The device that waits for its server is another disk's.
    #[error("ublk{id}: this device waits for the server of another file: choose another number, or none")]
    Foreign {
        /// The device.
        id: u32,
    },
    /// The device that waits for its server is not as the disk is now.
    #[error("ublk{id}: this device waits for its disk as it was before, {why}")]
    Changed {
        /// The device.
        id: u32,
        /// What is different, and what to do.
        why: String,
    },
    /// A node of the device cannot be used.
    #[error("{}: {source}", .path.display())]
    Node {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The disk cannot be opened.
    #[error("{0}")]
    Disk(#[from] vbd_core::Error),
    /// A queue cannot be started.
    #[error("ublk{id}: queue {queue}: {why}")]
    Queue {
        /// The device.
        id: u32,
        /// The queue.
        queue: u16,
        /// Why.
        why: String,
    },
    /// The storage has not answered when the time was up.
    #[error("ublk{id}: {why}")]
    Unfinished {
        /// The device.
        id: u32,
        /// What is left.
        why: String,
    },
    /// An option has a value that it cannot have.
    #[error("{0}")]
    Option(&'static str),
}

fn name(device: &Option<u32>) -> String {
    device.map_or_else(|| "ublk".to_owned(), |id| format!("ublk{id}"))
}
