//! A disk that a job works on.

use std::sync::Arc;

use vbd_core::{Client, Disk};
use vbd_formats::ImageSpec;
use vbd_ring::{Reactor, Settings};

use crate::{Error, Result};

/// An open disk, its lease held, with a reactor of its own.
pub struct Image {
    client: Client,
    disk: Arc<dyn Disk>,
    // Last: the channels of the above are given back on it.
    _reactor: Reactor,
}

impl Image {
    /// Opens an image with all that it names. Where it is written to, its dirty bitmaps see that.
    ///
    /// # Errors
    /// See [`vbd_formats::open`] and [`Disk::open`].
    pub fn open(spec: &ImageSpec) -> Result<Self> {
        Self::of(if spec.read_only { vbd_formats::open(spec)? } else { vbd_formats::open_tracked(spec)? })
    }

    /// Opens a disk.
    ///
    /// # Errors
    /// See [`Disk::open`].
    pub fn of(disk: Arc<dyn Disk>) -> Result<Self> {
        let reactor = Reactor::spawn("vbd-job", Settings::default())
            .map_err(|error| Error::Refused(format!("cannot start a thread for the disk: {error}")))?;
        let client = Client::new(&reactor.handle(), disk.open()?)?;
        Ok(Image { client, disk, _reactor: reactor })
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }
}

impl std::ops::Deref for Image {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}
