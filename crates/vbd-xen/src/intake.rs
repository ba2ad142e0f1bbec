//! From ring entries to operations on the disk and back: everything of a queue that needs no reactor.

use std::collections::VecDeque;
use std::sync::Arc;

use vbd_core::{Guard, IoVec, Operation, SECTOR};

use crate::abi::{Asked, Entry, INDIRECT_PAGES, SEGMENTS_IN_PAGE, Segment, Status};
use crate::memory::{Chunks, Mapped, Memory, NotMapped, Persistent};
use crate::placement::{Placement, Policy};
use crate::record::Log;
use crate::ring::{Ring, Violation};
use crate::slots::{Done, Part, Slot, Steps};
use crate::sys::{Copy, PAGE};

/// What does not change while a queue runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Most segments of an indirect request.
    pub(crate) indirect: u16,
    pub(crate) read_only: bool,
    pub(crate) discard: bool,
    /// Longest discard in one operation, in bytes.
    pub(crate) most_discard: u64,
    /// Every write is to be durable: the front-end was not told of flushes.
    pub(crate) durable: bool,
    pub(crate) policy: Policy,
}

/// What taking has come to.
pub(crate) enum Step {
    /// A request was taken; it is in `ready`, answered, or waits for others.
    Taken,
    Nothing,
    Broken(Violation),
}

/// A barrier on its way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Barrier {
    None,
    /// For everything before it.
    Waits(u16),
    Runs(u16),
}

/// The state of a queue.
pub(crate) struct Core {
    pub(crate) ring: Ring,
    limits: Limits,
    memory: Arc<Memory>,
    guard: Guard,
    chunks: Chunks,
    persistent: Persistent,
    log: Log,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Requests that a predecessor took and did not answer.
    again: VecDeque<(u16, Entry)>,
    /// One that has to wait for own pages.
    stalled: Option<(u16, Entry)>,
    /// Some were given back since it had to.
    freed: bool,
    barrier: Barrier,
    /// Requests with an operation for the disk.
    pub(crate) ready: Vec<u16>,
    /// Copies to do before those are given to it, each with its request.
    copies: Vec<Copy>,
    copied_for: Vec<u16>,
    refused: Vec<u16>,
    /// Requests whose next operation is due.
    due: Vec<u16>,
    /// Reads whose data is to be copied out.
    reads: Vec<u16>,
    /// Answered, and not yet shown.
    unshown: Vec<u16>,
    /// Requests taken and not yet answered.
    pub(crate) out: usize,
    pub(crate) answered: u64,
    pub(crate) failed: u64,
    pub(crate) paused: bool,
    pub(crate) broken: bool,
    /// What is cancelled stays in the record.
    pub(crate) keep: bool,
}

// SAFETY: the pointers in it are into mappings that it holds, and one thread uses it at a time.
unsafe impl Send for Core {}

impl Core {
    pub(crate) fn new(
        ring: Ring,
        limits: Limits,
        memory: Arc<Memory>,
        chunks: Chunks,
        persistent: Persistent,
        log: Log,
        again: Vec<(usize, Entry)>,
    ) -> Core {
        let entries = u16::try_from(ring.entries()).unwrap_or(0);
        let again: VecDeque<_> =
            again.into_iter().map(|(slot, entry)| (u16::try_from(slot).unwrap_or(0), entry)).collect();
        let free = (0..entries).rev().filter(|slot| again.iter().all(|(taken, _)| taken != slot)).collect();
        Core {
            ring,
            limits,
            guard: memory.clone(),
            memory,
            chunks,
            persistent,
            log,
            slots: (0..entries).map(|_| Slot::default()).collect(),
            free,
            out: again.len(),
            again,
            stalled: None,
            freed: false,
            barrier: Barrier::None,
            ready: Vec::new(),
            copies: Vec::new(),
            copied_for: Vec::new(),
            refused: Vec::new(),
            due: Vec::new(),
            reads: Vec::new(),
            unshown: Vec::new(),
            answered: 0,
            failed: 0,
            paused: true,
            broken: false,
            keep: false,
        }
    }

    /// Whether new requests may be looked for.
    pub(crate) fn may_take(&self) -> bool {
        !self.broken
            && !self.paused
            && self.barrier == Barrier::None
            && self.stalled.is_none()
            && !self.free.is_empty()
    }

    /// Whether there is something to show.
    pub(crate) fn has_answers(&self) -> bool {
        !self.reads.is_empty() || !self.unshown.is_empty()
    }

    /// Whether there is something to do that needs no completion first.
    pub(crate) fn wants_turn(&self) -> bool {
        let barrier = matches!(self.barrier, Barrier::Waits(_)) && self.out == 1;
        let free = !self.paused && self.barrier == Barrier::None;
        // An answer that came at once, in the turn in which a request stalled, wakes nobody for that one.
        let old = if self.stalled.is_some() { self.freed } else { !self.again.is_empty() };
        !self.due.is_empty() || !self.ready.is_empty() || barrier || free && old
    }

    /// Takes a request, if there is one that may be taken: one that was taken before, or a `fresh` one.
    #[inline]
    pub(crate) fn next(&mut self, fresh: bool) -> Step {
        if self.paused || self.barrier != Barrier::None {
            return Step::Nothing;
        }
        if let Some((slot, entry)) = self.stalled.take().or_else(|| self.again.pop_front()) {
            self.begin(slot, &entry);
            return if self.stalled.is_some() { Step::Nothing } else { Step::Taken };
        }
        if !fresh || self.broken {
            return Step::Nothing;
        }
        let Some(&slot) = self.free.last() else { return Step::Nothing };
        let mut entry = Entry::EMPTY;
        match self.ring.take(&mut entry) {
            Ok(Some(words)) => {
                self.free.pop();
                self.log.taken(usize::from(slot), &entry, words, self.ring.consumed());
                self.out += 1;
                self.begin(slot, &entry);
                Step::Taken
            }
            Ok(None) => Step::Nothing,
            Err(violation) => Step::Broken(violation),
        }
    }

    /// Finds out what a request asks for, and where its data is.
    #[inline]
    fn begin(&mut self, number: u16, entry: &Entry) {
        let abi = self.ring.abi();
        let slot = &mut self.slots[usize::from(number)];
        slot.id = entry.id(abi);
        slot.operation = entry.operation();
        slot.segments.clear();
        slot.steps = Steps::None;
        let asked = entry.asked(abi);
        let (steps, sector) = (Self::steps(&asked), entry.sector(abi));
        let result = match asked {
            Asked::Unknown => Err(Status::Unsupported),
            Asked::Malformed => Err(Status::Error),
            Asked::Discard { sectors, secure } => self.discard(number, sector, sectors, secure),
            Asked::Indirect { segments, pages, .. } => self
                .indirect(number, segments, &pages)
                .and_then(|found| if found { self.data(number, steps, sector) } else { Ok(false) }),
            Asked::Read | Asked::Write | Asked::Barrier | Asked::Flush => {
                match entry.segments(abi, &mut slot.segments) {
                    Some(()) => self.data(number, steps, sector),
                    None => Err(Status::Error),
                }
            }
        };
        match result {
            Ok(true) if asked == Asked::Barrier => self.barrier = Barrier::Waits(number),
            Ok(true) => self.ready.push(number),
            Ok(false) => {
                self.drop_data(number);
                (self.stalled, self.freed) = (Some((number, *entry)), false);
            }
            Err(status) => self.answer(Done { slot: number, status }),
        }
    }

    fn steps(asked: &Asked) -> Steps {
        match asked {
            Asked::Read | Asked::Indirect { write: false, .. } => Steps::Read,
            Asked::Write | Asked::Indirect { write: true, .. } => Steps::Write { durable: false },
            Asked::Barrier | Asked::Flush => Steps::Flush { then_write: false },
            _ => Steps::None,
        }
    }

    fn discard(&mut self, number: u16, sector: u64, sectors: u64, secure: bool) -> Result<bool, Status> {
        // Whether old data is gone for good, no file can promise.
        if secure || !self.limits.discard {
            return Err(Status::Unsupported);
        }
        let len = sectors.checked_mul(SECTOR).ok_or(Status::Error)?;
        let slot = &mut self.slots[usize::from(number)];
        (slot.offset, slot.len) = (checked_offset(sector, len)?, len);
        if len == 0 {
            return Err(Status::Ok);
        }
        slot.steps = Steps::Discard;
        Ok(true)
    }

    /// Puts the data of a request somewhere; false if it has to wait for room.
    #[inline]
    fn data(&mut self, number: u16, steps: Steps, sector: u64) -> Result<bool, Status> {
        let slot = &mut self.slots[usize::from(number)];
        let len: usize = slot.segments.iter().map(|segment| segment.len()).sum();
        slot.reads = steps == Steps::Read;
        slot.steps = match steps {
            Steps::Flush { .. } => Steps::Flush { then_write: len > 0 },
            Steps::Write { .. } => Steps::Write { durable: self.limits.durable },
            other => other,
        };
        if steps != Steps::Read && len > 0 && self.limits.read_only {
            return Err(Status::Error);
        }
        if len == 0 {
            // A flush alone; it has no place.
            (slot.offset, slot.len) = (0, 0);
            return Ok(true);
        }
        (slot.offset, slot.len) = (checked_offset(sector, len as u64)?, len as u64);
        let into_grant = steps == Steps::Read;
        let segments = slot.segments.len();
        match self.limits.policy.choose(segments, false) {
            Placement::Persistent if self.hold(number)? => Ok(true),
            Placement::Persistent => match self.limits.policy.choose(segments, true) {
                Placement::Map => self.map(number, into_grant),
                _ => self.bounce(number, len, into_grant),
            },
            Placement::Copy => self.bounce(number, len, into_grant),
            Placement::Map => self.map(number, into_grant),
        }
    }

    /// Puts it into persistent pages; false if there is no room for more of them.
    #[inline]
    fn hold(&mut self, number: u16) -> Result<bool, Status> {
        // Every request that uses the memory is known here: then pages that none of them uses may be unmapped.
        let idle = Arc::strong_count(&self.memory) <= self.out + 1;
        let Slot { segments, pieces, regions, .. } = &mut self.slots[usize::from(number)];
        let references = segments.iter().map(|segment| segment.reference);
        pieces.clear();
        pieces.resize(segments.len(), IoVec { iov_base: std::ptr::null_mut(), iov_len: 0 });
        let held = self.persistent.hold(&self.memory, references, idle, regions, |index, page| {
            let segment = segments[index];
            pieces[index] =
                IoVec { iov_base: page.wrapping_add(segment.offset()).cast(), iov_len: segment.len() };
        });
        match held {
            Ok(()) => {
                merge(pieces);
                Ok(true)
            }
            Err(NotMapped::Full) => Ok(false),
            Err(NotMapped::Refused(error)) => Err(refused(&error)),
        }
    }

    /// Puts it into own pages; false if there are not enough free ones.
    fn bounce(&mut self, number: u16, len: usize, into_grant: bool) -> Result<bool, Status> {
        let Some(chunk) = self.chunks.take(len.div_ceil(PAGE)) else {
            return match (self.limits.policy.direct, self.out > 1) {
                (true, _) => self.map(number, into_grant),
                (false, true) => Ok(false),
                (false, false) => Err(Status::Error),
            };
        };
        let start = self.memory.arena.at(chunk);
        let slot = &mut self.slots[usize::from(number)];
        slot.chunk = Some(chunk);
        slot.pieces.clear();
        slot.pieces.push(IoVec { iov_base: start.cast(), iov_len: len });
        if !into_grant {
            push_copies(&slot.segments, start, false, &mut self.copies);
            self.copied_for.resize(self.copies.len(), number);
        }
        Ok(true)
    }

    /// Maps its pages for this request alone.
    fn map(&mut self, number: u16, into_grant: bool) -> Result<bool, Status> {
        let slot = &mut self.slots[usize::from(number)];
        let references: Vec<u32> = slot.segments.iter().map(|segment| segment.reference).collect();
        let mapping = self.memory.map(&references, into_grant).map_err(|error| refused(&error))?;
        slot.pieces.clear();
        slot.pieces.extend(slot.segments.iter().enumerate().map(|(index, segment)| IoVec {
            iov_base: mapping.start.wrapping_add(index * PAGE + segment.offset()).cast(),
            iov_len: segment.len(),
        }));
        merge(&mut slot.pieces);
        slot.mapped = Some(Arc::new(Mapped { memory: self.memory.clone(), mapping }));
        Ok(true)
    }

    /// Reads the segments of an indirect request; false if it has to wait for own pages.
    fn indirect(&mut self, number: u16, count: u16, pages: &[u32; INDIRECT_PAGES]) -> Result<bool, Status> {
        if count > self.limits.indirect {
            return Err(Status::Error);
        }
        let count = usize::from(count);
        let pages = &pages[..count.div_ceil(SEGMENTS_IN_PAGE)];
        if self.limits.policy.persistent {
            let idle = Arc::strong_count(&self.memory) <= self.out + 1;
            let slot = &mut self.slots[usize::from(number)];
            let mut at = [std::ptr::null_mut(); INDIRECT_PAGES];
            let references = pages.iter().copied();
            let held =
                self.persistent
                    .hold(&self.memory, references, idle, &mut slot.regions, |index, page| at[index] = page);
            match held {
                Ok(()) => {
                    // The regions stay held until the answer; they are not unmapped before these lines.
                    return read_segments(&at[..pages.len()], count, &mut slot.segments);
                }
                Err(NotMapped::Full) => {}
                Err(NotMapped::Refused(error)) => return Err(refused(&error)),
            }
        }
        let Some(chunk) = self.chunks.take(pages.len()) else {
            return if self.out > 1 { Ok(false) } else { Err(Status::Error) };
        };
        let start = self.memory.arena.at(chunk);
        let mut copies =
            [Copy { reference: 0, offset: 0, len: 0, own: start, into_grant: false, done: false };
                INDIRECT_PAGES];
        let mut at = [start; INDIRECT_PAGES];
        for (index, reference) in pages.iter().enumerate() {
            let left = (count - index * SEGMENTS_IN_PAGE).min(SEGMENTS_IN_PAGE) * 8;
            at[index] = start.wrapping_add(index * PAGE);
            copies[index].reference = *reference;
            copies[index].own = at[index];
            copies[index].len = u16::try_from(left).unwrap_or(0);
        }
        let copies = &mut copies[..pages.len()];
        // SAFETY: a page of the chunk for each.
        let result = unsafe { self.memory.grants.copy(copies) };
        let slot = &mut self.slots[usize::from(number)];
        let found = match result {
            Ok(()) if copies.iter().all(|copy| copy.done) => {
                read_segments(&at[..pages.len()], count, &mut slot.segments)
            }
            Ok(()) => Err(Status::Error),
            Err(error) => Err(refused(&error)),
        };
        self.chunks.give_back(chunk);
        found
    }

    /// Leaves to a successor what was not begun.
    pub(crate) fn leave(&mut self) {
        self.keep = true;
        self.out -= self.again.len() + usize::from(self.stalled.is_some());
        self.again.clear();
        self.stalled = None;
    }

    /// Makes ready what has become due: the next operations of requests that have several, and a barrier that has
    /// nothing before it any more.
    pub(crate) fn advance(&mut self) {
        if let Barrier::Waits(slot) = self.barrier
            && self.out == 1
        {
            self.barrier = Barrier::Runs(slot);
            self.ready.push(slot);
        }
        self.ready.append(&mut self.due);
    }

    /// Copies the data of all that is ready.
    pub(crate) fn copy_in(&mut self) {
        if self.copies.is_empty() {
            return;
        }
        // SAFETY: each is within the chunk of its request.
        if let Err(error) = unsafe { self.memory.grants.copy(&mut self.copies) } {
            refused(&error);
        }
        for (copy, slot) in self.copies.iter().zip(&self.copied_for) {
            if !copy.done && self.refused.last() != Some(slot) {
                self.refused.push(*slot);
            }
        }
        self.copies.clear();
        self.copied_for.clear();
    }

    /// The next operation of a request that is ready, with its memory; none where its data could not be had.
    #[inline]
    pub(crate) fn part(&mut self, number: u16) -> Option<(Part, Vec<IoVec>)> {
        if !self.refused.is_empty()
            && let Some(place) = self.refused.iter().position(|slot| *slot == number)
        {
            self.refused.swap_remove(place);
            self.answer(Done { slot: number, status: Status::Error });
            return None;
        }
        let slot = &mut self.slots[usize::from(number)];
        let part = slot.next_part(self.limits.most_discard)?;
        let memory = if crate::queue::transfers(part.operation) {
            std::mem::take(&mut slot.pieces)
        } else {
            Vec::new()
        };
        Some((part, memory))
    }

    /// What keeps a request's memory.
    #[inline]
    pub(crate) fn guard(&self, slot: u16) -> Guard {
        self.slots[usize::from(slot)].mapped.as_ref().unwrap_or(&self.guard).clone()
    }

    /// A request's vector has come back from the disk.
    #[inline]
    pub(crate) fn take_back(&mut self, slot: u16, operation: Operation, pieces: Vec<IoVec>) {
        if crate::queue::transfers(operation) {
            self.slots[usize::from(slot)].pieces = pieces;
        }
    }

    /// An operation of a request has come back.
    #[inline]
    pub(crate) fn completed(&mut self, done: Done) {
        let slot = &self.slots[usize::from(done.slot)];
        if done.status != Status::Ok {
            return self.answer(done);
        }
        if slot.steps != Steps::None {
            self.due.push(done.slot);
        } else if slot.chunk.is_some() && slot.reads {
            self.reads.push(done.slot);
        } else {
            self.answer(done);
        }
    }

    /// Copies to the domain what was read for it, and answers.
    pub(crate) fn copy_out(&mut self) {
        if self.reads.is_empty() {
            return;
        }
        let mut reads = std::mem::take(&mut self.reads);
        for number in &reads {
            let slot = &self.slots[usize::from(*number)];
            if let Some(chunk) = slot.chunk {
                push_copies(&slot.segments, self.memory.arena.at(chunk), true, &mut self.copies);
                self.copied_for.resize(self.copies.len(), *number);
            }
        }
        self.copy_in();
        for slot in reads.drain(..) {
            let failed = self.refused.iter().position(|refused| *refused == slot);
            let status = match failed {
                Some(place) => {
                    self.refused.swap_remove(place);
                    Status::Error
                }
                None => Status::Ok,
            };
            self.answer(Done { slot, status });
        }
        self.reads = reads;
    }

    fn drop_data(&mut self, number: u16) {
        let slot = &mut self.slots[usize::from(number)];
        if let Some(chunk) = slot.chunk.take() {
            self.chunks.give_back(chunk);
        }
        for region in slot.regions.drain(..) {
            self.persistent.release(region);
        }
        slot.mapped = None;
        slot.steps = Steps::None;
    }

    /// Puts a response into the ring; [`publish`](Self::publish) shows it.
    #[inline]
    fn answer(&mut self, done: Done) {
        self.drop_data(done.slot);
        self.freed = true;
        let slot = &self.slots[usize::from(done.slot)];
        self.log.answered(usize::from(done.slot), self.ring.produced());
        self.ring.put(slot.id, slot.operation, done.status);
        if let Barrier::Waits(barrier) | Barrier::Runs(barrier) = self.barrier
            && barrier == done.slot
        {
            self.barrier = Barrier::None;
        }
        self.unshown.push(done.slot);
        self.out -= 1;
        self.answered += 1;
        self.failed += u64::from(done.status != Status::Ok);
    }

    /// Shows the front-end what was answered, if anything was: whether it wants to be notified.
    #[inline]
    pub(crate) fn publish(&mut self) -> Option<bool> {
        if self.unshown.is_empty() {
            return None;
        }
        let notify = self.ring.publish();
        for slot in self.unshown.drain(..) {
            self.log.shown(usize::from(slot));
            self.free.push(slot);
        }
        Some(notify)
    }
}

/// The first byte of a range of sectors, if its end has a number, too.
#[inline]
fn checked_offset(sector: u64, len: u64) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR).filter(|offset| offset.checked_add(len).is_some());
    offset.ok_or(Status::Error)
}

#[cold]
fn refused(error: &std::io::Error) -> Status {
    tracing::debug!("a domain's pages cannot be used: {error}");
    Status::Error
}

/// One copy a segment, to or from `own` on.
fn push_copies(segments: &[Segment], own: *mut u8, into_grant: bool, copies: &mut Vec<Copy>) {
    let mut at = own;
    for segment in segments {
        let (offset, len) = (segment.offset(), segment.len());
        copies.push(Copy {
            reference: segment.reference,
            offset: u16::try_from(offset).unwrap_or(0),
            len: u16::try_from(len).unwrap_or(0),
            own: at,
            into_grant,
            done: false,
        });
        at = at.wrapping_add(len);
    }
}

/// Reads so many segments from these pages, each word once.
fn read_segments(pages: &[*mut u8], count: usize, into: &mut Vec<Segment>) -> Result<bool, Status> {
    for index in 0..count {
        #[allow(clippy::cast_ptr_alignment, reason = "at multiples of 8 in a page")]
        let at = pages[index / SEGMENTS_IN_PAGE].cast::<u32>().wrapping_add(index % SEGMENTS_IN_PAGE * 2);
        // SAFETY: in a page that the caller holds.
        let (reference, place) = unsafe { (at.read_volatile(), at.add(1).read_volatile()) };
        let segment = Segment::checked(u32::from_le(reference), u32::from_le(place));
        into.push(segment.ok_or(Status::Error)?);
    }
    Ok(true)
}

/// Makes one piece of those that follow each other in memory.
#[inline]
fn merge(pieces: &mut Vec<IoVec>) {
    if pieces.len() > 1 {
        pieces.dedup_by(|next, before| {
            let adjacent = before.iov_base.cast::<u8>().wrapping_add(before.iov_len) == next.iov_base.cast();
            if adjacent {
                before.iov_len += next.iov_len;
            }
            adjacent
        });
    }
}
