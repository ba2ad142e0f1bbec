//! Where blocks lie that were copied away: in memory, and in a file past a bound.
//!
//! A log of slots, each as long as a block, given out in order. A segment of them is one piece of memory, and becomes one
//! write to the file when it is full and memory runs short: oldest first, so what guests wait for is memory as a rule.
//! A block is copied away once at most, so the log is never longer than the disk.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, PoisonError};
use std::task::{Poll, Waker};

use vbd_ring::sync::{Mutex, MutexGuard};
use vbd_ring::{IoVec, Local};

use crate::ask::{Ask, ask};
use crate::memory::Buffer;
use crate::{Channel, Error, ErrorKind, Guard, Operation, Result};

/// The bytes that go to the file at once.
pub(super) const SEGMENT: u64 = 256 << 10;
/// Blocks whose slots are looked up together.
const GROUP: u64 = 256;
/// Writes to the file at a time: guests use the storage, too.
const AT_ONCE: usize = 2;

/// What was copied away.
pub(super) struct Aside {
    /// The bytes of a slot.
    block: u64,
    /// The bytes of a segment: a multiple of that.
    segment: u64,
    /// The bytes of memory that may be taken; what is being filled comes on top.
    bound: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// For each group of blocks of the disk the number of each one's slot, from 1 on; 0 where it has none.
    slots: HashMap<u64, Box<[u32]>>,
    segments: Vec<Segment>,
    /// The number of the next slot.
    next: u64,
    /// Bytes of segments in memory.
    in_memory: u64,
    /// Full segments in memory, oldest first.
    full: VecDeque<usize>,
    /// How many are being written to the file.
    spilling: usize,
    /// Memory that was used before.
    spare: Vec<Arc<Buffer>>,
    waiting: Vec<Waker>,
    ended: bool,
}

struct Segment {
    memory: Option<Arc<Buffer>>,
    /// Slots that have not been given out, or whose content is not there yet.
    open: u64,
    /// Slots that are needed or may become so.
    live: u64,
    spilling: bool,
}

/// Where a block's old content is.
pub(super) enum Found {
    /// Nowhere: it was zeroes.
    Zeroes,
    /// In memory, from this byte of the buffer on.
    Memory(Arc<Buffer>, usize),
    /// In the file, from this byte on.
    File(u64),
}

/// Slots that were given out and have no content yet.
pub(super) struct Room {
    aside: Arc<Aside>,
    slots: Range<u64>,
    memory: Vec<Arc<Buffer>>,
    filled: bool,
}

impl Room {
    /// The memory to be filled, and what keeps it.
    pub(super) fn memory(&self) -> (Vec<IoVec>, Guard) {
        let Aside { block, segment, .. } = *self.aside;
        let (start, end) = (self.slots.start * block, self.slots.end * block);
        let mut pieces = Vec::new();
        let mut at = start;
        for buffer in &self.memory {
            let stop = (at / segment + 1) * segment;
            let stop = stop.min(end);
            let len = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
            pieces.push(buffer.piece(len(at % segment), len(stop - at)));
            at = stop;
        }
        let guard: Guard = match &*self.memory {
            [buffer] => buffer.clone(),
            several => Arc::new(several.to_vec()),
        };
        (pieces, guard)
    }

    /// The memory has the content of the disk's blocks from `offset` (bytes) on.
    pub(super) fn filled(mut self, offset: u64) {
        self.filled = true;
        let mut state = self.aside.state();
        let first = offset / self.aside.block;
        for (block, slot) in (first..).zip(self.slots.clone()) {
            let group = state.slots.entry(block / GROUP);
            let group = group.or_insert_with(|| vec![0; usize::try_from(GROUP).unwrap_or(0)].into());
            // No more slots are given out than have a number.
            group[index(block % GROUP)] = u32::try_from(slot + 1).unwrap_or(0);
        }
        drop(state);
        // The rest is done where it is dropped.
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut state = self.aside.state();
        for slot in self.slots.clone() {
            let number = self.aside.segment_of(slot);
            let segment = &mut state.segments[number];
            segment.open -= 1;
            let is_full = segment.open == 0;
            if !self.filled {
                segment.live -= 1;
            }
            if is_full && segment.live > 0 {
                state.full.push_back(number);
            }
            state.free_if_dead(&self.aside, number);
        }
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

impl State {
    /// Gives up the memory of a segment that nobody needs. True where it lies in the file instead.
    fn free_if_dead(&mut self, aside: &Aside, number: usize) -> bool {
        let segment = &mut self.segments[number];
        if segment.live > 0 || segment.open > 0 || segment.spilling {
            return false;
        }
        let Some(memory) = segment.memory.take() else { return true };
        self.give_back(aside, memory);
        self.full.retain(|full| *full != number);
        false
    }

    fn give_back(&mut self, aside: &Aside, mut memory: Arc<Buffer>) {
        self.in_memory -= aside.segment;
        // A read that was given up may still be under way: its guard is another owner.
        if self.spare.len() < 8 && Arc::get_mut(&mut memory).is_some() {
            self.spare.push(memory);
        }
        self.waiting.drain(..).for_each(Waker::wake);
    }

    /// The memory of a slot's segment; a new one where it is the first of it.
    fn segment(&mut self, aside: &Aside, number: usize) -> Option<Arc<Buffer>> {
        if number == self.segments.len() {
            let memory = self.spare.pop();
            let memory = memory.unwrap_or_else(|| Arc::new(Buffer::new(index(aside.segment))));
            self.in_memory += aside.segment;
            let slots = aside.segment / aside.block;
            self.segments.push(Segment { memory: Some(memory), open: slots, live: 0, spilling: false });
        }
        self.segments[number].memory.clone()
    }
}

/// A segment on its way to the file.
struct Spilling<'a> {
    aside: &'a Aside,
    number: usize,
    memory: Option<Arc<Buffer>>,
    written: bool,
}

impl Drop for Spilling<'_> {
    fn drop(&mut self) {
        // Or it could not be used again.
        self.memory = None;
        let mut state = self.aside.state();
        state.spilling -= 1;
        let segment = &mut state.segments[self.number];
        segment.spilling = false;
        if segment.live == 0 || self.written {
            if let Some(memory) = segment.memory.take() {
                state.give_back(self.aside, memory);
            }
        } else {
            state.full.push_front(self.number);
            state.waiting.drain(..).for_each(Waker::wake);
        }
    }
}

impl Aside {
    /// Slots of `block` bytes, and `bound` bytes of memory.
    pub(super) fn new(block: u64, bound: u64) -> Arc<Self> {
        Arc::new(Aside { block, segment: SEGMENT.max(block), bound, state: Mutex::default() })
    }

    /// The bytes that the file may need for a disk of this size.
    pub(super) fn most(block: u64, size: u64) -> u64 {
        size.next_multiple_of(SEGMENT.max(block))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn segment_of(&self, slot: u64) -> usize {
        index(slot * self.block / self.segment)
    }

    /// Nobody needs anything any more.
    pub(super) fn end(&self) {
        let mut state = self.state();
        state.ended = true;
        state.waiting.drain(..).for_each(Waker::wake);
    }

    /// Slots for so many blocks, when there is memory.
    pub(super) async fn room(self: &Arc<Self>, blocks: u64) -> Result<Room> {
        poll_fn(|context| {
            let mut state = self.state();
            if state.ended {
                return Poll::Ready(Err(Error::new(ErrorKind::Cancelled, "the backup has ended")));
            }
            // Where nothing can go to the file, waiting would help nobody.
            let hopeless = state.full.is_empty() && state.spilling == 0;
            if state.in_memory >= self.bound && !hopeless {
                state.waiting.push(context.waker().clone());
                return Poll::Pending;
            }
            let slots = state.next..state.next + blocks;
            if u32::try_from(slots.end).is_err() {
                let message = "more was overwritten than can be kept: back up when there is less to do";
                return Poll::Ready(Err(Error::new(ErrorKind::NoSpace, message)));
            }
            state.next = slots.end;
            let mut memory: Vec<Arc<Buffer>> = Vec::new();
            let mut last = None;
            for slot in slots.clone() {
                let number = self.segment_of(slot);
                let buffer = state.segment(self, number);
                state.segments[number].live += 1;
                if last != Some(number) {
                    // It has slots that were not given out until now, so it is in memory.
                    memory.extend(buffer);
                    last = Some(number);
                }
            }
            Poll::Ready(Ok(Room { aside: self.clone(), slots, memory, filled: false }))
        })
        .await
    }

    /// Whether memory runs short, and [`spill`](Self::spill) would help.
    pub(super) fn is_short(&self) -> bool {
        let state = self.state();
        state.in_memory * 2 > self.bound && !state.full.is_empty() && state.spilling < AT_ONCE && !state.ended
    }

    /// Writes full segments to the file until there is memory again.
    pub(super) async fn spill(&self, store: &Rc<dyn Channel>, local: &Local) -> Result<()> {
        while let Some(mut spilling) = self.next_to_spill() {
            let Some(memory) = spilling.memory.clone() else { continue };
            let at = spilling.number as u64 * self.segment;
            let write = Ask::transfer(Operation::Write, at, vec![memory.whole()], Some(memory));
            ask(store, write, local.now()).await?;
            spilling.written = true;
        }
        Ok(())
    }

    fn next_to_spill(&self) -> Option<Spilling<'_>> {
        let mut state = self.state();
        if state.in_memory * 2 <= self.bound || state.spilling >= AT_ONCE || state.ended {
            return None;
        }
        let number = state.full.pop_front()?;
        let segment = &mut state.segments[number];
        let memory = Some(segment.memory.clone()?);
        segment.spilling = true;
        state.spilling += 1;
        Some(Spilling { aside: self, number, memory, written: false })
    }

    /// Where the old content of the block with this byte is: that very byte.
    pub(super) fn find(&self, offset: u64) -> Found {
        let state = self.state();
        let block = offset / self.block;
        let slot = state.slots.get(&(block / GROUP)).map_or(0, |group| group[index(block % GROUP)]);
        let Some(slot) = u64::from(slot).checked_sub(1) else { return Found::Zeroes };
        let at = slot * self.block + offset % self.block;
        let segment = &state.segments[self.segment_of(slot)];
        match &segment.memory {
            Some(memory) => Found::Memory(memory.clone(), index(at % self.segment)),
            None => Found::File(at),
        }
    }

    /// Lets go of whole blocks. Gives the bytes that had been copied away, and parts of the file without content now.
    pub(super) fn forget(&self, range: Range<u64>) -> (u64, Vec<Range<u64>>) {
        let mut state = self.state();
        let (mut bytes, mut empty) = (0, Vec::new());
        for block in range.start / self.block..range.end.div_ceil(self.block) {
            let Some(group) = state.slots.get_mut(&(block / GROUP)) else { continue };
            let slot = std::mem::take(&mut group[index(block % GROUP)]);
            let Some(slot) = u64::from(slot).checked_sub(1) else { continue };
            bytes += self.block;
            let number = self.segment_of(slot);
            state.segments[number].live -= 1;
            if state.free_if_dead(self, number) {
                let at = number as u64 * self.segment;
                empty.push(at..at + self.segment);
            }
        }
        for group in range.start / self.block / GROUP..=range.end / self.block / GROUP {
            if state.slots.get(&group).is_some_and(|slots| slots.iter().all(|slot| *slot == 0)) {
                state.slots.remove(&group);
            }
        }
        (bytes, empty)
    }
}
