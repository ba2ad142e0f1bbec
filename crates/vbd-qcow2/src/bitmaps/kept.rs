//! The bitmaps of an image that is served.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vbd_core::track::{Keeper, Named, Track};
use vbd_core::{Error, ErrorKind, Result, Session};

use super::{Held, are_valid, load_all, mark_in_use, store};
use crate::format::Header;
use crate::storage::Storage;

/// The bitmaps of an image, shared by the engine that serves it and [`vbd_core::track::Tracked`] in front of that, which
/// marks writes in them.
///
/// The engine begins with the image before anything is written and ends when everything is; in between the bitmaps are in
/// memory alone, and the file says so.
///
/// Clones are the same bitmaps.
#[derive(Clone, Debug, Default)]
pub struct Kept(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Of the image when it was opened, until the disk in front takes them.
    loaded: Vec<Held>,
    /// Those that only the file has: they cannot be believed, and stay as they are.
    aside: Vec<Held>,
    /// What is to be stored; none where nobody has given it back, so that the file keeps its marks.
    result: Option<Vec<Held>>,
    /// Whether the image can have bitmaps.
    able: bool,
}

impl Kept {
    /// None yet.
    pub fn new() -> Self {
        Kept::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the bitmaps out of an image that is opened for writing, and marks them as in use. Tells whether they stay
    /// valid, so that the header's bit for them is kept.
    ///
    /// Bitmaps that cannot be read are no reason not to serve the disk: they become void, which the log says.
    pub(crate) fn begin(&self, file: &impl Storage, header: &Header) -> bool {
        let mut state = self.state();
        *state = State { able: header.version >= 3, ..State::default() };
        if !are_valid(header) {
            return false;
        }
        let loaded = load_all(file, header).and_then(|held| mark_in_use(file, header).map(|()| held));
        match loaded {
            Ok(held) => {
                (state.loaded, state.aside) = held.into_iter().partition(|held| held.bits.is_some());
                for held in &state.aside {
                    tracing::warn!("bitmap \"{}\" was not saved: remove it, and make another", held.name);
                }
                true
            }
            Err(error) => {
                tracing::warn!("the image's bitmaps are void from now on: {error}");
                false
            }
        }
    }

    /// Stores the bitmaps in an image that was closed cleanly.
    pub(crate) fn end(&self, file: &impl Storage) -> Result<()> {
        let mut state = self.state();
        let Some(mut held) = state.result.take() else { return Ok(()) };
        held.append(&mut state.aside);
        let failed =
            |error: super::Error| Error::new(ErrorKind::Io, format!("bitmaps are not stored: {error}"));
        store(file, &held).map_err(failed)
    }
}

impl Keeper for Kept {
    fn opened(&self, session: &dyn Session, track: &Arc<Track>) -> Result<()> {
        let named = std::mem::take(&mut self.state().loaded).into_iter().filter_map(|held| {
            let bitmap = Arc::new(held.bits?);
            Some(Named { name: held.name, enabled: held.enabled, persistent: true, bitmap })
        });
        track.load(session.geometry().size, named.collect());
        Ok(())
    }

    fn changed(&self, _: &dyn Session, track: &Track) -> Result<()> {
        let persistent = track.named().iter().any(|named| named.persistent);
        if persistent && !self.state().able {
            return Err(Error::new(ErrorKind::Unsupported, "version 2 of qcow2 keeps no bitmaps"));
        }
        Ok(())
    }

    fn has_work(&self, _: &Track) -> bool {
        self.state().able
    }

    fn closed(&self, _: &dyn Session, track: &Track) {
        let held = |named: Named| {
            let granularity = named.bitmap.granularity();
            // Writes have ended, so this is all that was marked.
            let bits = named.bitmap.resized(named.bitmap.size()).ok();
            Held { name: named.name, granularity, enabled: named.enabled, bits, entry: None }
        };
        let kept = track.named().into_iter().filter(|named| named.persistent);
        self.state().result = Some(kept.map(held).collect());
    }
}
