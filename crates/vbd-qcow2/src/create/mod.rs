//! Making images: the header, the tables that a new image has, and room set aside in advance.

mod builder;
mod options;
mod plan;

use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vbd_image::create::Draft;
use vbd_image::size::Human;

pub use builder::{BuildError, Builder, Placed};
pub use options::{Backing, CreateOptions, DataFile, Preallocation, Version};
pub use plan::{Measure, Measured};

use crate::format::{self, L1Entry, L2Entry};
use crate::storage::Storage;
use plan::Plan;

/// Why an image was not made. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The options do not go together, or ask for what cannot be.
    #[error("{0}")]
    Refused(String),
    /// A file could not be made.
    #[error(transparent)]
    File(#[from] vbd_image::create::CreateError),
    /// The header cannot hold it.
    #[error(transparent)]
    Format(#[from] format::Error),
    /// There is less room than is to be set aside.
    #[error(
        "{}: {} are to be preallocated and {} are free; make room, or choose another preallocation",
        .path.display(), Human(*.wanted), Human(*.free)
    )]
    NoRoom {
        /// The file.
        path: PathBuf,
        /// What is to be set aside, in bytes.
        wanted: u64,
        /// What this user may still allocate there, in bytes.
        free: u64,
    },
    /// Anything else.
    #[error("{}: cannot {doing}: {error}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What failed.
        doing: &'static str,
        /// What the system said.
        error: std::io::Error,
    },
}

/// Makes an image, and the external data file where it is to have one. Both appear under their names when they are whole;
/// a file that is there is replaced only where the options say so, and never while somebody uses it.
///
/// Backing files are not looked at: their size, where the new disk is to have it, is the caller's to know.
///
/// # Errors
///
/// What [`CreateOptions::validate`] refuses; a file cannot be made or written.
pub fn create(path: &Path, options: &CreateOptions) -> Result<(), CreateError> {
    let plan = Plan::new(options)?;
    let draft = Draft::new(path, options.replace)?;
    let data = options.data_file.as_ref().map(|data| create_data(path, data, &plan, options)).transpose()?;
    let io = |path: &Path, doing| {
        let path = path.to_owned();
        move |error| CreateError::Io { path, doing, error }
    };
    write_tables(draft.file(), &plan, options).map_err(|error| match error {
        Failed::Io(error) => io(path, "write its tables")(error),
        Failed::Format(error) => error.into(),
    })?;
    if data.is_none() {
        reserve(draft.file(), path, plan.data_start, plan.data_bytes, options.preallocation)?;
    }
    draft.file().sync_data().map_err(io(path, "make it durable"))?;
    // The data file first: an image without one is of no use, the other way round nothing is wrong.
    if let Some(Some(data)) = data {
        data.publish()?;
    }
    draft.publish()?;
    Ok(())
}

/// The external data file, not yet under its name; `None` where the one that is there is to be used.
fn create_data(
    image: &Path,
    data: &DataFile,
    plan: &Plan,
    options: &CreateOptions,
) -> Result<Option<Draft>, CreateError> {
    // A relative name is relative to the image, as it will be when the image is opened.
    let path = image.parent().unwrap_or(Path::new("")).join(&data.path);
    let io = |doing| {
        let path = path.clone();
        move |error| CreateError::Io { path, doing, error }
    };
    if data.keep {
        let length = std::fs::metadata(&path).map_err(io("look at it"))?.len();
        if data.raw && length < plan.size {
            return Err(CreateError::Refused(format!(
                "{}: is {} long, which is shorter than the disk, {}; make the disk that size, or the file longer",
                path.display(),
                Human(length),
                Human(plan.size)
            )));
        }
        return Ok(None);
    }
    let draft = Draft::new(&path, options.replace)?;
    Storage::set_len(draft.file(), plan.size).map_err(io("set its size"))?;
    reserve(draft.file(), &path, 0, plan.size, options.preallocation)?;
    draft.file().sync_data().map_err(io("make it durable"))?;
    Ok(Some(draft))
}

/// Takes the room that guest data will need.
fn reserve(
    file: &std::fs::File,
    path: &Path,
    start: u64,
    length: u64,
    preallocation: Preallocation,
) -> Result<(), CreateError> {
    if !matches!(preallocation, Preallocation::Falloc | Preallocation::Full) || length == 0 {
        return Ok(());
    }
    let failed =
        |doing| move |errno: Errno| CreateError::Io { path: path.to_owned(), doing, error: errno.into() };
    let stat = rustix::fs::fstatvfs(file).map_err(failed("look at its filesystem"))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let no_room = || CreateError::NoRoom { path: path.to_owned(), wanted: length, free };
    if free < length {
        return Err(no_room());
    }
    match rustix::fs::fallocate(file, FallocateFlags::empty(), start, length) {
        Ok(()) => {}
        Err(Errno::NOSPC | Errno::DQUOT) => return Err(no_room()),
        // Writing everything takes the room as well.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) if preallocation == Preallocation::Full => {}
        Err(errno) => return Err(failed("preallocate")(errno)),
    }
    if preallocation == Preallocation::Full {
        let zeros = vec![0; 1 << 20];
        let mut at = start;
        while at < start + length {
            let part = usize::try_from(start + length - at).unwrap_or(zeros.len()).min(zeros.len());
            Storage::write_all_at(file, at, &zeros[..part]).map_err(|error| match error.raw_os_error() {
                Some(libc_errno::ENOSPC | libc_errno::EDQUOT) => no_room(),
                _ => CreateError::Io { path: path.to_owned(), doing: "write zeros", error },
            })?;
            at += part as u64;
        }
    }
    Ok(())
}

/// Error numbers, as the standard library gives them.
mod libc_errno {
    pub(super) const ENOSPC: i32 = rustix::io::Errno::NOSPC.raw_os_error();
    pub(super) const EDQUOT: i32 = rustix::io::Errno::DQUOT.raw_os_error();
}

/// Why the tables were not written.
pub(crate) enum Failed {
    Io(std::io::Error),
    Format(format::Error),
}

impl From<std::io::Error> for Failed {
    fn from(error: std::io::Error) -> Self {
        Failed::Io(error)
    }
}

/// How much of a table is put together at once, in bytes.
const BATCH: usize = 1 << 20;

/// Writes all that a new image holds but guest data. The storage is empty before.
fn write_tables<S: Storage + ?Sized>(
    storage: &S,
    plan: &Plan,
    options: &CreateOptions,
) -> Result<(), Failed> {
    let layout = plan.layout;
    let cluster = layout.cluster_size();
    let header = plan.header(options).encode().map_err(Failed::Format)?;
    storage.set_len(plan.end)?;
    let block = |index: u64| (plan.blocks_start + (index << layout.cluster_bits)).to_be_bytes();
    write_words(storage, cluster, plan.blocks, |index, bytes| bytes.extend(block(index)))?;
    // Every cluster up to the end is used once.
    let (used, per_block) = (plan.end >> layout.cluster_bits, layout.refcount_block_entries());
    let mut counts = vec![0; layout.cluster_len()];
    for index in 0..plan.blocks {
        counts.fill(0);
        let here = used.saturating_sub(index * per_block).min(per_block);
        for entry in 0..usize::try_from(here).expect("a block fits in memory") {
            layout.refcount_width.set(&mut counts, entry, 1);
        }
        storage.write_all_at(plan.blocks_start + (index << layout.cluster_bits), &counts)?;
    }
    if let Some(luks) = &options.luks_header {
        storage.write_all_at(plan.luks_start, luks)?;
    }
    let table =
        |index: u64| L1Entry::new(plan.l2_start + (index << layout.cluster_bits), true).0.to_be_bytes();
    write_words(storage, plan.l1_start, plan.l2_tables, |index, bytes| bytes.extend(table(index)))?;
    let data = |index: u64| {
        let host = plan.data_start + (index << layout.cluster_bits);
        // What was never written reads as zeroes only where nothing is decrypted, so such an image says that it does.
        let says_zero = options.luks_header.is_some() && !layout.extended_l2;
        let entry = if says_zero { L2Entry::zero(host, true) } else { L2Entry::data(host, true) };
        // No subcluster is allocated: the room is there, and the contents are still those of no cluster.
        let bitmap = layout.extended_l2.then_some([0; 8]);
        (entry.0.to_be_bytes(), bitmap)
    };
    let clusters = if plan.l2_tables > 0 { layout.clusters(plan.size) } else { 0 };
    write_words(storage, plan.l2_start, clusters, |index, bytes| {
        let (entry, bitmap) = data(index);
        bytes.extend(entry);
        bytes.extend(bitmap.into_iter().flatten());
    })?;
    storage.write_all_at(0, &header)?;
    Ok(())
}

/// Writes `count` entries that lie one behind the other from `start` on.
fn write_words<S: Storage + ?Sized>(
    storage: &S,
    start: u64,
    count: u64,
    mut entry: impl FnMut(u64, &mut Vec<u8>),
) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    let mut at = start;
    for index in 0..count {
        entry(index, &mut bytes);
        if bytes.len() >= BATCH {
            storage.write_all_at(at, &bytes)?;
            at += bytes.len() as u64;
            bytes.clear();
        }
    }
    storage.write_all_at(at, &bytes)
}

/// Makes an image in storage that is empty, for tests: without guest data, and without other files.
///
/// # Errors
///
/// Those of [`create`].
pub fn create_in<S: Storage + ?Sized>(storage: &S, options: &CreateOptions) -> Result<(), CreateError> {
    let plan = Plan::new(options)?;
    write_tables(storage, &plan, options).map_err(|error| match error {
        Failed::Io(error) => CreateError::Io { path: "the image".into(), doing: "write its tables", error },
        Failed::Format(error) => error.into(),
    })
}
