//! Which blocks of a disk change, and what they were before: dirty bitmaps and copy-before-write.
//!
//! [`Track`] stands directly before a format and sees every write, zeroes and discard when it is submitted: a block is
//! marked before it can change, and stays marked where the request fails.
//!
//! # An instant
//!
//! Bitmaps begin and end, and a backup is taken, at one instant for all queues, while guests write. What is to be done
//! with writes is a configuration with a number; every write looks at the number, and the instant is the moment when it
//! changes. A guest that has seen one write end and then submits another cannot have the first after the instant and
//! the second before it, on any queue. Writes from before the instant that are still under way are waited for: each
//! holds a ticket until it ends, and what was marked or is on the disk is looked at only when the last of them is gone.
//! Guests do not wait for that, except for those that want to overwrite what a backup still needs.

mod aside;
mod channel;
mod disk;
mod frozen;
mod preserve;

use std::ops::Range;
use std::sync::{Arc, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use vbd_ring::sync::atomic::{AtomicU64, Ordering};
use vbd_ring::sync::{Condvar, Mutex, MutexGuard};
use vbd_ring::{Handle, Local};

use crate::Session;
use crate::bitmap::{Bitmap, BitmapError};

pub(crate) use channel::Ticket;
use preserve::Preserve;

pub use disk::{Keeper, Tracked};
pub use frozen::{Freeze, Frozen};

/// The longest that writes under way are waited for.
const SETTLE: Duration = Duration::from_secs(30);
/// The most bitmaps of a disk: each costs every write a little.
pub const MOST_BITMAPS: usize = 64;
/// The longest name of a bitmap in bytes, as in qcow2.
pub const LONGEST_NAME: usize = 1023;

/// Why something cannot be done with the bitmaps of a disk.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// There is none of that name.
    #[error("there is no bitmap `{0}`")]
    Unknown(String),
    /// There is one already.
    #[error("there is a bitmap `{0}` already")]
    Exists(String),
    /// The name is none.
    #[error("`{0}` is no name for a bitmap: 1 to {LONGEST_NAME} bytes without control characters")]
    Name(String),
    /// There are as many as there can be.
    #[error("a disk has at most {MOST_BITMAPS} bitmaps: remove one first")]
    TooMany,
    /// The bitmap cannot be made.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
    /// Writes under way did not end.
    #[error("writes of before have not ended within {} s; nothing was changed", SETTLE.as_secs())]
    Unsettled,
    /// A backup needs it.
    #[error("a backup of this disk is running: wait until it has ended, or end it")]
    Busy,
}

/// A bitmap as it is listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// The bytes that one bit stands for.
    pub granularity: u64,
    /// Whether writes are marked in it.
    pub enabled: bool,
    /// Bytes in blocks that are marked.
    pub marked: u64,
    /// Whether it is kept when the disk is closed.
    pub persistent: bool,
}

/// A bitmap with its name.
#[derive(Clone, Debug)]
pub struct Named {
    /// The name.
    pub name: String,
    /// Whether writes are marked in it.
    pub enabled: bool,
    /// Whether it is kept when the disk is closed.
    pub persistent: bool,
    /// The marks.
    pub bitmap: Arc<Bitmap>,
}

impl Named {
    /// One without marks.
    fn empty(name: &str, size: u64, granularity: u64, persistent: bool) -> Result<Named, BitmapError> {
        let bitmap = Arc::new(Bitmap::new(size, granularity)?);
        Ok(Named { name: name.to_owned(), enabled: true, persistent, bitmap })
    }
}

/// What is done with every write: replaced as a whole.
#[derive(Default)]
struct Config {
    marks: Vec<Arc<Bitmap>>,
    preserve: Option<Arc<Preserve>>,
}

/// Writes of one configuration: how many channels may still have some under way.
#[derive(Default)]
struct Phase {
    open: Mutex<usize>,
    ended: Condvar,
}

impl Phase {
    fn lock(&self) -> MutexGuard<'_, usize> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no write of this configuration is under way; false where that takes too long.
    fn wait(&self, until: Instant) -> bool {
        let mut open = self.lock();
        while *open > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            open = self.ended.wait_timeout(open, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

struct State {
    size: u64,
    named: Vec<Named>,
    /// What a running backup needs.
    preserve: Option<Arc<Preserve>>,
    config: Arc<Config>,
    phase: Arc<Phase>,
    /// Those of before whose writes may not have ended.
    earlier: Vec<Arc<Phase>>,
    reactors: Vec<(Handle, usize)>,
}

/// The bitmaps of a disk, over all its channels.
pub struct Track {
    /// Of the configuration that counts.
    generation: AtomicU64,
    state: Mutex<State>,
    /// One change at a time.
    changing: Mutex<()>,
    /// The disk behind.
    inner: OnceLock<Weak<dyn Session>>,
}

impl State {
    /// From the next instant on, what this backup needs is preserved.
    fn take_on(&mut self, preserve: &Arc<Preserve>) -> Result<(), TrackError> {
        if self.preserve.is_some() {
            return Err(TrackError::Busy);
        }
        self.preserve = Some(preserve.clone());
        Ok(())
    }

    /// The instant: from here on this list counts.
    fn publish(&mut self, generation: &AtomicU64) {
        let marks = self.named.iter().filter(|named| named.enabled).map(|named| named.bitmap.clone());
        self.config = Arc::new(Config { marks: marks.collect(), preserve: self.preserve.clone() });
        let phase = std::mem::take(&mut self.phase);
        self.earlier.push(phase);
        self.earlier.retain(|phase| *phase.lock() > 0);
        generation.fetch_add(1, Ordering::SeqCst);
    }
}

impl Track {
    /// Without bitmaps, for a disk of `size` bytes.
    pub fn new(size: u64) -> Arc<Self> {
        let state = State {
            size,
            named: Vec::new(),
            preserve: None,
            config: Arc::default(),
            phase: Arc::default(),
            earlier: Vec::new(),
            reactors: Vec::new(),
        };
        Arc::new(Track {
            generation: AtomicU64::new(0),
            state: Mutex::new(state),
            changing: Mutex::default(),
            inner: OnceLock::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change_lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bitmaps there are.
    pub fn list(&self) -> Vec<Info> {
        // Counting takes time: not with the lock that channels may wait for.
        let named = self.named();
        let info = |named: Named| Info {
            granularity: named.bitmap.granularity(),
            enabled: named.enabled,
            marked: named.bitmap.marked_bytes(),
            persistent: named.persistent,
            name: named.name,
        };
        named.into_iter().map(info).collect()
    }

    /// All bitmaps as they are now. Those that are enabled change while they are looked at.
    pub fn named(&self) -> Vec<Named> {
        self.state().named.clone()
    }

    /// The marks of one bitmap as they are now; see [`named`](Self::named).
    ///
    /// # Errors
    /// There is none of that name.
    pub fn bitmap(&self, name: &str) -> Result<Arc<Bitmap>, TrackError> {
        let state = self.state();
        let named = state.named.iter().find(|named| named.name == name);
        named.map(|named| named.bitmap.clone()).ok_or_else(|| TrackError::Unknown(name.to_owned()))
    }

    /// Puts these in place of all there are, for a disk of `size` bytes: before it has channels.
    pub fn load(&self, size: u64, named: Vec<Named>) {
        let _changing = self.change_lock();
        self.state().size = size;
        self.publish(named);
    }

    /// A new bitmap, in which every write that begins from now on is marked.
    ///
    /// # Errors
    /// The name is taken or is none, the granularity is none, there are too many, or writes under way do not end.
    pub fn add(&self, name: &str, granularity: u64, persistent: bool) -> Result<(), TrackError> {
        self.change(|size, named| {
            check_new(name, named)?;
            named.push(Named::empty(name, size, granularity, persistent)?);
            Ok(())
        })
    }

    /// Takes a bitmap away.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn remove(&self, name: &str) -> Result<(), TrackError> {
        self.change(|_, named| {
            let index = position(named, name)?;
            named.remove(index);
            Ok(())
        })
    }

    /// Marks writes in a bitmap from now on, or leaves it as it is.
    ///
    /// # Errors
    /// There is none of that name, or writes under way do not end.
    pub fn enable(&self, name: &str, enabled: bool) -> Result<(), TrackError> {
        self.change(|_, named| {
            let index = position(named, name)?;
            named[index].enabled = enabled;
            Ok(())
        })
    }

    /// Takes every mark away that was made until now.
    ///
    /// # Errors
    /// There is none of that name, or writes under way do not end.
    pub fn clear(&self, name: &str) -> Result<(), TrackError> {
        self.change(|size, named| {
            let index = position(named, name)?;
            let old = &named[index];
            let fresh = Named::empty(name, size, old.bitmap.granularity(), old.persistent)?;
            named[index] = Named { enabled: old.enabled, ..fresh };
            Ok(())
        })
    }

    /// Marks in `into` what is marked in each of `from`.
    ///
    /// # Errors
    /// There is none of that name, or writes under way do not end.
    pub fn merge(&self, into: &str, from: &[String]) -> Result<(), TrackError> {
        let _changing = self.change_lock();
        let target = self.bitmap(into)?;
        let sources = from.iter().map(|name| self.bitmap(name)).collect::<Result<Vec<_>, _>>()?;
        // A write that has marked neither yet will be in both, or in the one it belongs to.
        sources.iter().for_each(|source| target.merge(source));
        Ok(())
    }

    /// At one instant: the bitmap `retire` gets no more marks and goes from the list, and `start` begins, with this
    /// granularity. What was marked in `retire` is given once no write of before is under way.
    ///
    /// # Errors
    /// As for [`add`](Self::add) and [`remove`](Self::remove); everything is as it was then.
    pub fn switch(
        &self,
        retire: Option<&str>,
        start: Option<(&str, u64, bool)>,
    ) -> Result<Option<Named>, TrackError> {
        let mut retired = None;
        self.change(|size, named| {
            if let Some(name) = retire {
                let index = position(named, name)?;
                retired = Some(named.remove(index));
            }
            if let Some((name, granularity, persistent)) = start {
                check_new(name, named)?;
                named.push(Named::empty(name, size, granularity, persistent)?);
            }
            Ok(())
        })?;
        Ok(retired)
    }

    /// Puts a bitmap that [`switch`](Self::switch) gave back in its place, with all that was marked in `since` until
    /// now, which goes.
    ///
    /// # Errors
    /// As for [`switch`](Self::switch).
    pub fn restore(&self, retired: Named, since: Option<&str>) -> Result<(), TrackError> {
        // Never without one of the two: first both, then the merge, then the one.
        let name = retired.name.clone();
        self.change(|size, named| {
            check_new(&retired.name, named)?;
            let bitmap = Arc::new(retired.bitmap.resized(size)?);
            named.push(Named { bitmap, ..retired });
            Ok(())
        })?;
        let Some(since) = since else { return Ok(()) };
        self.merge(&name, &[since.to_owned()])?;
        self.remove(since)
    }

    /// The disk becomes larger: before anybody can write there.
    ///
    /// # Errors
    /// A bitmap would become too large, or writes under way do not end.
    pub fn grow(&self, size: u64) -> Result<(), TrackError> {
        let _changing = self.change_lock();
        let before = self.named();
        if self.state().size >= size {
            return Ok(());
        }
        let mut after = before.clone();
        for named in &mut after {
            named.bitmap = Arc::new(named.bitmap.resized(size)?);
        }
        self.publish(after.clone());
        let settled = self.settle();
        // Marks that were made in the old ones after they were copied.
        for (old, new) in before.iter().zip(&after) {
            new.bitmap.merge(&old.bitmap);
        }
        settled.then(|| self.state().size = size).ok_or(TrackError::Unsettled)
    }

    /// Does what changes the content of a range (bytes) without a write: its blocks are marked before and after, and there
    /// is no instant meanwhile.
    fn changes<T>(&self, range: Range<u64>, work: impl FnOnce() -> T) -> Result<T, TrackError> {
        let _changing = self.change_lock();
        if self.state().preserve.is_some() {
            return Err(TrackError::Busy);
        }
        let mark = || {
            let config = self.state().config.clone();
            config.marks.iter().for_each(|bitmap| bitmap.mark(range.start, range.end - range.start));
        };
        mark();
        let done = work();
        mark();
        Ok(done)
    }

    /// Changes the list at one instant, and waits for the writes of before. Where those do not end, the list is as it
    /// was, with all marks made meanwhile.
    fn change(
        &self,
        edit: impl FnOnce(u64, &mut Vec<Named>) -> Result<(), TrackError>,
    ) -> Result<(), TrackError> {
        self.change_locked(&self.change_lock(), edit)
    }

    /// The same for whoever has said that it changes something.
    fn change_locked(
        &self,
        _changing: &MutexGuard<'_, ()>,
        edit: impl FnOnce(u64, &mut Vec<Named>) -> Result<(), TrackError>,
    ) -> Result<(), TrackError> {
        let (size, before) = {
            let state = self.state();
            (state.size, state.named.clone())
        };
        let mut after = before.clone();
        edit(size, &mut after)?;
        self.publish(after.clone());
        if self.settle() {
            return Ok(());
        }
        // What was written meanwhile is not known where a bitmap was off the list: all of it, then.
        for old in before.iter().filter(|old| old.enabled) {
            match after.iter().find(|new| new.name == old.name && new.enabled) {
                Some(new) if Arc::ptr_eq(&new.bitmap, &old.bitmap) => {}
                _ => old.bitmap.mark_all(),
            }
        }
        self.publish(before);
        Err(TrackError::Unsettled)
    }

    /// The instant: from here on this list counts.
    fn publish(&self, named: Vec<Named>) {
        let mut state = self.state();
        state.named = named;
        state.publish(&self.generation);
    }

    /// A backup needs nothing any more.
    fn thaw(&self, preserve: &Arc<Preserve>) {
        let mut state = self.state();
        if state.preserve.take_if(|running| Arc::ptr_eq(running, preserve)).is_some() {
            state.publish(&self.generation);
        }
    }

    /// The disk behind, while it is open.
    fn inner(&self) -> Option<Arc<dyn Session>> {
        self.inner.get()?.upgrade()
    }

    /// Waits until no write from before the last instant is under way; false where that takes too long.
    fn settle(&self) -> bool {
        let (earlier, reactors) = {
            let state = self.state();
            (state.earlier.clone(), state.reactors.clone())
        };
        // Channels that are idle would notice with their next write only.
        for (handle, _) in reactors {
            handle.post(|_| channel::refresh_all());
        }
        let until = Instant::now() + SETTLE;
        earlier.iter().all(|phase| phase.wait(until))
    }

    /// Counts a reactor in, or out where its last channel is gone.
    fn count(&self, local: &Local, more: bool) {
        let mut state = self.state();
        let handle = local.handle();
        match state.reactors.iter_mut().find(|(other, _)| *other == handle) {
            Some((_, count)) if more => *count += 1,
            Some((_, count)) => *count -= 1,
            None if more => state.reactors.push((handle, 1)),
            None => {}
        }
        state.reactors.retain(|(_, count)| *count > 0);
    }
}

fn position(named: &[Named], name: &str) -> Result<usize, TrackError> {
    let index = named.iter().position(|named| named.name == name);
    index.ok_or_else(|| TrackError::Unknown(name.to_owned()))
}

fn check_new(name: &str, named: &[Named]) -> Result<(), TrackError> {
    if name.is_empty() || name.len() > LONGEST_NAME || name.contains(char::is_control) {
        return Err(TrackError::Name(name.escape_debug().to_string()));
    }
    if named.iter().any(|named| named.name == name) {
        return Err(TrackError::Exists(name.to_owned()));
    }
    if named.len() >= MOST_BITMAPS {
        return Err(TrackError::TooMany);
    }
    Ok(())
}
