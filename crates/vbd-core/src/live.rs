//! What the format of an open disk can do beyond reading and writing: snapshots inside the image, and telling its own
//! content from that of the images behind it.

use std::time::SystemTime;

use crate::{Error, ErrorKind, Result};

/// A snapshot that is kept inside an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its number, as the image has it; unique there.
    pub id: String,
    /// Its name; unique where this program made it.
    pub name: String,
    /// When it was made.
    pub date: SystemTime,
    /// The disk's size then, in bytes.
    pub size: u64,
    /// How many bytes of a machine's state it carries; 0 for one of the disk alone.
    pub state: u64,
}

/// Where the content of a part of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// In this image.
    Data,
    /// This image says that it reads as zeroes.
    Zero,
    /// This image says nothing: the one behind it decides, or it reads as zeroes.
    Below,
}

/// A part of a disk, as [`Live::layer`] tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerExtent {
    /// Bytes from here on.
    pub len: u64,
    /// Where they are.
    pub layer: Layer,
}

/// Work on an open disk while its queues go on. All calls block: none may be made on a reactor's thread.
pub trait Live: Send + Sync {
    /// The snapshots inside the image, oldest first.
    ///
    /// # Errors
    /// What reading them meets.
    fn snapshots(&self) -> Result<Vec<Snapshot>>;

    /// Keeps the disk's content as it is now under this name.
    ///
    /// # Errors
    /// There is one of that name, the image cannot hold another, or there is no room.
    fn create_snapshot(&self, name: &str) -> Result<Snapshot>;

    /// Gives the disk the content that it had at a snapshot, named by its number or name. What it holds now is lost.
    ///
    /// # Errors
    /// There is no such snapshot, or the disk had another size then.
    fn apply_snapshot(&self, snapshot: &str) -> Result<()>;

    /// Forgets a snapshot, named by its number or name, and gives back what only it needed.
    ///
    /// # Errors
    /// There is no such snapshot, or what changing the image meets.
    fn delete_snapshot(&self, snapshot: &str) -> Result<()>;

    /// Tells which image holds a range (bytes): covers it from its start, at least one extent, perhaps not all.
    ///
    /// # Errors
    /// The range is not inside the disk, or what reading the tables meets.
    fn layer(&self, offset: u64, len: u64) -> Result<Vec<LayerExtent>>;

    /// The size in bytes of the units that can be written compressed; none where the format has no compression.
    fn compressed_unit(&self) -> Option<u64> {
        None
    }

    /// Writes a whole unit compressed; the last one of a disk may be shorter. Compression is done on the calling thread:
    /// several threads may call at once. False where the data does not become shorter, and nothing was written: it is to
    /// be written as usual.
    ///
    /// # Errors
    /// The range is no unit, or what writing meets.
    fn write_compressed(&self, offset: u64, data: &[u8]) -> Result<bool> {
        let _ = (offset, data);
        Err(Error::new(ErrorKind::Unsupported, "this format has no compression"))
    }
}
