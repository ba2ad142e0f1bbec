//! The sidecar as a file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::format::{self, Contents};
use super::{SidecarError, path_of};

/// The longest sidecar that is read, in bytes: all bitmaps that it can have, and their names.
const LONGEST: u64 = (1 << 30) + (1 << 24);

/// Between two steps: where the power may fail. Tests look at what there is then.
pub(super) fn step() {
    #[cfg(test)]
    super::tests::step();
}

pub(super) struct Place {
    pub(super) path: PathBuf,
}

impl Place {
    pub(super) fn of(image: &Path) -> Self {
        Place { path: path_of(image) }
    }

    fn io(&self, doing: &'static str) -> impl FnOnce(io::Error) -> SidecarError + use<'_> {
        SidecarError::io(&self.path, doing)
    }

    fn open(&self, write: bool) -> io::Result<File> {
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = OpenOptions::new().read(true).write(write).custom_flags(flags).open(&self.path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
        }
        Ok(file)
    }

    /// What it says; none where there is no such file.
    pub(super) fn read(&self) -> Result<Option<Contents>, SidecarError> {
        let file = match self.open(false) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.io("open it")(error)),
        };
        let mut bytes = Vec::new();
        file.take(LONGEST).read_to_end(&mut bytes).map_err(self.io("read it"))?;
        let contents = Contents::parse(&bytes);
        contents.map(Some).map_err(|error| SidecarError::Format { path: self.path.clone(), error })
    }

    /// Says, durably, that marks may be missing from now on.
    pub(super) fn set_in_use(&self) -> Result<(), SidecarError> {
        // One byte, so that there is no state in between.
        let set = |file: File| {
            file.write_all_at(&[1], format::IN_USE)?;
            file.sync_data()
        };
        step();
        self.open(true).and_then(set).map_err(self.io("write to it"))
    }

    /// Puts this in its place, durably: the old or the new, whatever happens.
    pub(super) fn replace(&self, contents: &Contents) -> Result<(), SidecarError> {
        let mut draft = self.path.clone().into_os_string();
        draft.push(".new");
        let draft = PathBuf::from(draft);
        let write = || {
            // One that was left behind, or that somebody has put there to have another file written to.
            match fs::remove_file(&draft) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
            let bytes = contents.encode();
            let (first, second) = bytes.split_at(bytes.len() / 2);
            for half in [first, second] {
                file.write_all(half)?;
                step();
            }
            file.sync_all()?;
            step();
            fs::rename(&draft, &self.path)?;
            step();
            self.sync_directory()
        };
        write().map_err(self.io("write it"))
    }

    /// Takes it away, durably.
    pub(super) fn remove(&self) -> Result<(), SidecarError> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => {
                step();
                self.sync_directory()
            }
        }
        .map_err(self.io("remove it"))
    }

    fn sync_directory(&self) -> io::Result<()> {
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    }
}
