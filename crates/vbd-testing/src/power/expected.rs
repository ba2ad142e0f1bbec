//! What a guest may find on its disk after a power cut.
#![allow(clippy::cast_possible_truncation, reason = "disks of tests are small")]

use std::ops::Range;

/// The unit in which content is told apart, in bytes.
pub const SECTOR: usize = 512;

/// Names the content of a sector: 0 for zeroes, else what [`fill`] makes of it.
pub type Stamp = u64;

/// Fills whole sectors, the first of which is `sector`, with the content of this name.
pub fn fill(stamp: Stamp, sector: u64, buffer: &mut [u8]) {
    if stamp == 0 {
        return buffer.fill(0);
    }
    for (sector, piece) in (sector..).zip(buffer.chunks_mut(SECTOR)) {
        for (index, word) in piece.chunks_mut(16).enumerate() {
            let mark = stamp.rotate_left(index as u32);
            word[..8].copy_from_slice(&mark.to_le_bytes());
            word[8..].copy_from_slice(&sector.to_le_bytes());
        }
    }
}

/// The name of a sector's content; none where it is no whole content, or one of another sector.
pub fn stamp_of(sector: u64, content: &[u8]) -> Option<Stamp> {
    let stamp = u64::from_le_bytes(content.get(..8)?.try_into().ok()?);
    let mut whole = [0; SECTOR];
    fill(stamp, sector, &mut whole);
    (whole == content).then_some(stamp)
}

/// A change of the disk by its guest. Times are those of a recording.
#[derive(Clone, Debug)]
struct Write {
    sectors: Range<u64>,
    stamp: Stamp,
    /// Durable when it ends.
    fua: bool,
    /// What was there before may still be.
    advice: bool,
    begun: usize,
    ended: Option<usize>,
}

/// What was done to a disk, and so what it may hold.
#[derive(Clone, Default)]
pub struct Expected {
    writes: Vec<Write>,
    flushes: Vec<(usize, usize)>,
    first: Vec<Stamp>,
}

impl Expected {
    /// A disk whose sectors have these contents, durably.
    pub fn new(first: Vec<Stamp>) -> Self {
        Expected { first, ..Expected::default() }
    }

    /// A write of whole sectors begins: its number.
    pub fn write(&mut self, sectors: Range<u64>, stamp: Stamp, fua: bool, now: usize) -> usize {
        self.writes.push(Write { sectors, stamp, fua, advice: false, begun: now, ended: None });
        self.writes.len() - 1
    }

    /// The same for a discard, after which there are zeroes or what was there before.
    pub fn discard(&mut self, sectors: Range<u64>, now: usize) -> usize {
        self.writes.push(Write { sectors, stamp: 0, fua: false, advice: true, begun: now, ended: None });
        self.writes.len() - 1
    }

    /// A write has ended well.
    pub fn ended(&mut self, number: usize, now: usize) {
        self.writes[number].ended = Some(now);
    }

    /// A flush that began and ended at these times has ended well.
    pub fn flushed(&mut self, begun: usize, ended: usize) {
        self.flushes.push((begun, ended));
    }

    /// Compares a disk's content with what it may be where the power goes at this time.
    ///
    /// # Errors
    /// The first sector that is wrong, what it holds, and what it may.
    pub fn check_cut(&self, content: &[u8], at: usize) -> Result<(), String> {
        self.is_whole(content)?;
        self.check(0, content, &View { since: at, until: at, cut: true })
    }

    /// The same where it does not go: what has ended is seen, flushed or not.
    ///
    /// # Errors
    /// As [`check_cut`](Self::check_cut).
    pub fn check_now(&self, content: &[u8], at: usize) -> Result<(), String> {
        self.is_whole(content)?;
        self.check(0, content, &View { since: at, until: at, cut: false })
    }

    /// Compares what was read between two times, from this sector on.
    ///
    /// # Errors
    /// As [`check_cut`](Self::check_cut).
    pub fn check_read(&self, first: u64, content: &[u8], begun: usize, ended: usize) -> Result<(), String> {
        self.check(first, content, &View { since: begun, until: ended, cut: false })
    }

    /// The disk is larger from now on: zeroes.
    pub fn grow(&mut self, sectors: usize) {
        self.first.resize(sectors, 0);
    }

    /// Its sectors.
    pub fn sectors(&self) -> u64 {
        self.first.len() as u64
    }

    fn is_whole(&self, content: &[u8]) -> Result<(), String> {
        let bytes = self.first.len() * SECTOR;
        if content.len() == bytes {
            Ok(())
        } else {
            Err(format!("{} bytes instead of {bytes}", content.len()))
        }
    }

    fn check(&self, first: u64, content: &[u8], view: &View) -> Result<(), String> {
        let base = first as usize;
        let range = first..first + (content.len() / SECTOR) as u64;
        let floor = self.floor(&range, view);
        let found: Vec<Option<Stamp>> =
            (first..).zip(content.chunks(SECTOR)).map(|(sector, piece)| stamp_of(sector, piece)).collect();
        let is_first = |at: usize| floor[at].is_none() && found[at] == Some(self.first[base + at]);
        let mut right: Vec<bool> = (0..found.len()).map(is_first).collect();
        for write in self.writes.iter().filter(|write| write.begun < view.until) {
            for at in write.within(&range) {
                right[at] |= found[at] == Some(write.stamp) && !write.is_over(floor[at]);
            }
        }
        let Some(wrong) = right.iter().position(|right| !right) else { return Ok(()) };
        let (sector, head) = (base + wrong, &content[wrong * SECTOR..][..16]);
        let allowed = self.allowed(sector, floor[wrong], view.until);
        Err(format!(
            "sector {sector} holds {:x?} ({head:02x?}), and may hold {allowed:x?} at {}",
            found[wrong], view.until
        ))
    }

    /// When the last write began that each sector must show, if there is one: what ended before that is over.
    fn floor(&self, range: &Range<u64>, view: &View) -> Vec<Option<usize>> {
        let mut floor = vec![None; (range.end - range.start) as usize];
        let flushed = |ended| self.flushes.iter().any(|flush| ended <= flush.0 && flush.1 <= view.since);
        let holds = |write: &&Write| {
            let is_durable = |ended| ended <= view.since && (!view.cut || write.fua || flushed(ended));
            !write.advice && write.begun < view.since && write.ended.is_some_and(is_durable)
        };
        for write in self.writes.iter().filter(holds) {
            for at in write.within(range) {
                floor[at] = floor[at].max(Some(write.begun));
            }
        }
        floor
    }

    fn allowed(&self, sector: usize, floor: Option<usize>, until: usize) -> Vec<Stamp> {
        let mut allowed = if floor.is_none() { vec![self.first[sector]] } else { Vec::new() };
        let here = |write: &&Write| {
            write.begun < until && write.sectors.contains(&(sector as u64)) && !write.is_over(floor)
        };
        allowed.extend(self.writes.iter().filter(here).map(|write| write.stamp));
        allowed
    }
}

/// When somebody looks.
struct View {
    /// What was there by then must be seen.
    since: usize,
    /// What had begun by then may be.
    until: usize,
    /// The power goes: only what is durable must.
    cut: bool,
}

impl Write {
    /// Its sectors that lie in a range, counted from there.
    fn within(&self, range: &Range<u64>) -> Range<usize> {
        let start = self.sectors.start.clamp(range.start, range.end);
        let end = self.sectors.end.clamp(start, range.end);
        (start - range.start) as usize..(end - range.start) as usize
    }

    /// Whether one that must be seen came after it.
    fn is_over(&self, floor: Option<usize>) -> bool {
        self.ended.is_some_and(|ended| floor.is_some_and(|floor| ended <= floor))
    }
}
