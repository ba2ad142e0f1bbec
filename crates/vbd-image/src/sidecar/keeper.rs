//! Keeps a raw image's bitmaps in its sidecar.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vbd_core::track::{Keeper, Named, Track};
use vbd_core::{Error, ErrorKind, Result, Session};

use super::format::Contents;
use super::place::{Place, step};
use super::{Identity, SidecarError, path_of, tell, told};

/// The sidecar of an image that is served.
pub struct Sidecar {
    image: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Number and generation of the file there is, which says that it is in use.
    held: Option<([u8; 16], u64)>,
    /// Why there are no bitmaps, where there are some that cannot be used.
    refused: Option<String>,
}

impl Sidecar {
    /// That of this image, which is a raw one.
    pub fn new(image: impl Into<PathBuf>) -> Box<Self> {
        Box::new(Sidecar { image: image.into(), state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the list with `in_use`, or takes the file away where nothing is to be kept.
    fn write(
        &self,
        state: &mut State,
        bitmaps: Vec<Named>,
        size: u64,
        in_use: bool,
    ) -> Result<(), SidecarError> {
        let place = Place::of(&self.image);
        if bitmaps.is_empty() {
            if state.held.take().is_some() {
                place.remove()?;
            }
            return Ok(());
        }
        let (id, generation) = match state.held {
            Some((id, generation)) => (id, generation),
            None => (random().map_err(SidecarError::io("/dev/urandom".as_ref(), "read it"))?, 0),
        };
        let generation = generation + 1;
        // Before the file: one that is in use may be a generation behind its image.
        tell(&self.image, id, generation);
        step();
        // What was written last, and the generation, must not come back older than it is said to be here.
        let flushed = File::open(&self.image).and_then(|file| file.sync_all());
        flushed.map_err(SidecarError::io(&self.image, "flush it"))?;
        let identity = Identity::of(&self.image, size, id, generation)?;
        place.replace(&Contents { in_use, identity, bitmaps })?;
        state.held = Some((id, generation));
        Ok(())
    }
}

fn random() -> std::io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// What the sidecar of an image says, if it is this image's: an error says why not. All blocks are marked where it is in
/// use, or was when the host stopped.
fn load(image: &Path, size: u64) -> Result<Option<Contents>, SidecarError> {
    let place = Place::of(image);
    let Some(mut contents) = place.read()? else { return Ok(None) };
    let identity = &contents.identity;
    let stale = |why: String| SidecarError::Stale { path: place.path.clone(), why };
    let told = told(image);
    if contents.in_use {
        // Of the image the state of then is not known, only that it is this one.
        if told.is_some_and(|(id, _)| id != identity.id) {
            return Err(stale("it belongs to another image".into()));
        }
        for named in &mut contents.bitmaps {
            named.bitmap = resized(named, size)?;
            named.bitmap.mark_all();
        }
    } else {
        let now = Identity::of(image, size, identity.id, identity.generation)?;
        identity.fits(&now, told).map_err(stale)?;
    }
    Ok(Some(contents))
}

fn resized(named: &Named, size: u64) -> Result<Arc<vbd_core::bitmap::Bitmap>, SidecarError> {
    let bitmap = named.bitmap.resized(size);
    let error = |error| SidecarError::Format {
        path: named.name.clone().into(),
        error: super::FormatError::Bitmap(error),
    };
    bitmap.map(Arc::new).map_err(error)
}

/// The bitmaps of an image that nobody has open for writing; those of one that is are kept by whoever has.
///
/// # Errors
/// There are none, or they are not this image's as it is now.
pub fn list(image: &Path, size: u64) -> Result<Contents, SidecarError> {
    load(image, size)?.ok_or_else(|| SidecarError::None(image.to_owned()))
}

/// Makes bitmaps that do not fit their image any more of use again: every block is marked in all of them. Nobody may
/// have the image open for writing.
///
/// # Errors
/// There are none, or none that can be read.
pub fn reset(image: &Path, size: u64) -> Result<(), SidecarError> {
    let Some(mut contents) = Place::of(image).read()? else {
        return Err(SidecarError::None(image.to_owned()));
    };
    for named in &mut contents.bitmaps {
        named.bitmap = resized(named, size)?;
        named.bitmap.mark_all();
    }
    let sidecar = Sidecar::new(image);
    let mut state = sidecar.state();
    // A number of its own: the one it had may be another image's.
    sidecar.write(&mut state, contents.bitmaps, size, false)
}

fn failed(error: &SidecarError) -> Error {
    Error::new(ErrorKind::Io, error.to_string())
}

impl Keeper for Sidecar {
    fn opened(&self, session: &dyn Session, track: &Arc<Track>) -> Result<()> {
        let mut state = self.state();
        *state = State::default();
        let size = session.geometry().size;
        let contents = match load(&self.image, size) {
            Ok(None) => return Ok(()),
            Ok(Some(contents)) => contents,
            Err(error) => {
                // A machine that starts is worth more than its bitmaps, which whoever wants them will miss.
                tracing::warn!("{error}");
                state.refused = Some(error.to_string());
                return Ok(());
            }
        };
        if contents.in_use {
            let path = path_of(&self.image);
            tracing::warn!("{}: was not closed, so everything counts as changed", path.display());
        }
        Place::of(&self.image).set_in_use().map_err(|error| failed(&error))?;
        state.held = Some((contents.identity.id, contents.identity.generation));
        track.load(size, contents.bitmaps);
        Ok(())
    }

    fn changed(&self, session: &dyn Session, track: &Track) -> Result<()> {
        let mut state = self.state();
        if let Some(why) = &state.refused {
            return Err(Error::new(ErrorKind::Corrupt, why.clone()));
        }
        let size = session.geometry().size;
        self.write(&mut state, persistent(track), size, true).map_err(|error| failed(&error))
    }

    fn has_work(&self, track: &Track) -> bool {
        self.state().held.is_some() || track.named().iter().any(|named| named.persistent)
    }

    fn closed(&self, session: &dyn Session, track: &Track) {
        let mut state = self.state();
        if state.refused.is_some() {
            return;
        }
        let size = session.geometry().size;
        if let Err(error) = self.write(&mut state, persistent(track), size, false) {
            // It says that it is in use, and so that everything may have changed.
            tracing::error!("{error}");
        }
    }
}

fn persistent(track: &Track) -> Vec<Named> {
    track.named().into_iter().filter(|named| named.persistent).collect()
}
