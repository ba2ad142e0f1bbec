//! Why a job did not succeed.

use std::path::{Path, PathBuf};

use vbd_image::create::CreateError;

/// Results of jobs.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a job did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A disk did not do what it was asked.
    #[error(transparent)]
    Disk(#[from] vbd_core::Error),
    /// A new file could not be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// Something on the way failed.
    #[error("{}: cannot {doing}: {error}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What failed.
        doing: &'static str,
        /// What the kernel said.
        error: std::io::Error,
    },
    /// It was asked to stop.
    #[error("stopped")]
    Cancelled,
    /// What is asked for cannot be done, for the reason that the text gives.
    #[error("{0}")]
    Refused(String),
    /// What was written reads back as something else.
    #[error("{}: reads back wrong at byte {offset}: the storage does not keep what is written to it", .path.display())]
    ReadsBackWrong {
        /// The file.
        path: PathBuf,
        /// The first byte that differs.
        offset: u64,
    },
}

impl Error {
    pub(crate) fn io(path: &Path, doing: &'static str) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |error| Error::Io { path, doing, error }
    }
}
