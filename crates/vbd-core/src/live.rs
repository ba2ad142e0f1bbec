//! What the format of an open disk can do beyond reading and writing: snapshots inside the image, and telling its own
//! content from that of the images behind it.

use std::sync::Arc;
use std::time::SystemTime;

use crate::track::Track;
use crate::{Disk, Error, ErrorKind, Result};

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

/// Watches long work on an open disk, and sets its pace.
pub trait Watch: Sync {
    /// The next part begins: what it does ("copying"), and how many bytes it is about.
    fn step(&self, step: &str, total: u64);

    /// So many more bytes are done, of which `moved` were read and written. Blocks for as long as the work is to rest.
    ///
    /// # Errors
    /// The work is to stop.
    fn advance(&self, bytes: u64, moved: u64) -> Result<()>;
}

/// Where what an image holds is to be written.
#[derive(Clone)]
pub struct Commit {
    /// The image behind, for writing. It is opened while this image has not got it open.
    pub into: Arc<dyn Disk>,
    /// Sees the writes of all queues of the disk. Whoever has the bitmaps in front of an image puts it in.
    pub track: Option<Arc<Track>>,
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

    /// Copies into the image what it reads from those behind it, and then has it stand on none. What guests write
    /// meanwhile counts. Gives the bytes that were written. Stopped at any moment, the disk reads as before.
    ///
    /// # Errors
    /// There is nothing behind it, snapshots need what is there, or what reading and writing meets.
    fn flatten(&self, watch: &dyn Watch) -> Result<u64> {
        let _ = watch;
        Err(Error::new(ErrorKind::Unsupported, "images of this format stand on no others"))
    }

    /// Writes what the image holds to the one behind it, while guests go on, until that has all of the disk's content at one
    /// instant, durably. Then the image holds nothing. Gives the bytes that were written. Stopped at any moment, the
    /// image has what it had.
    ///
    /// # Errors
    /// There is nothing behind it, that cannot be written to, snapshots need what is there, or what reading and writing
    /// meets.
    fn commit(&self, commit: Commit, watch: &dyn Watch) -> Result<u64> {
        let _ = (commit, watch);
        Err(Error::new(ErrorKind::Unsupported, "images of this format stand on no others"))
    }

    /// Moves what is at the end of the file to where it is free before, gives the space of all that is free back, and cuts
    /// the file off behind what is left. Gives the file's length in bytes before and after.
    ///
    /// # Errors
    /// What reading and writing meets. The disk's content stays the same.
    fn compact(&self, watch: &dyn Watch) -> Result<(u64, u64)> {
        let _ = watch;
        Err(Error::new(ErrorKind::Unsupported, "images of this format cannot be compacted in themselves"))
    }
}
