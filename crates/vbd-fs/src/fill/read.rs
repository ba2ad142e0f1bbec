//! The threads that read files: each takes the next ones in order, and what it read waits for its turn.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, SeekFrom};

use super::base::Base;
use super::blocks::{Blocks, PIECE, Piece, SIZE};
use crate::entry::Xattr;
use crate::plan::{BLOCK, Body, Data, NameId, NodeId, Plan, Run};
use crate::sys;

/// Files that are read as one.
const FILES: usize = 256;
/// How many parts may be read before the first of them is written.
const AHEAD: u64 = 8;
/// Files from this size on share their blocks with the image, where they can: below, copying is as quick.
const SHARED: u64 = 64 << 10;
/// How often the wish to stop is looked at.
const TICK: Duration = Duration::from_millis(50);

/// What is read at once.
#[derive(Debug)]
pub(super) enum Item {
    /// Small files, by their numbers in the list.
    Files(Range<usize>),
    /// A part of a large one, and whether it is the last.
    Part { job: usize, range: Range<u64>, last: bool },
    /// One that is to share its blocks.
    Whole(usize),
}

/// What came of an item.
pub(super) struct Output {
    pub(super) item: Item,
    pub(super) blocks: Blocks,
    pub(super) files: Vec<Read>,
}

/// A file, or a part of one, that was read.
pub(super) struct Read {
    pub(super) job: usize,
    pub(super) pieces: Vec<Piece>,
    /// Bytes in the output's blocks.
    pub(super) held: usize,
    /// Bytes that were read.
    pub(super) read: u64,
    /// The CRC-32C of what is held.
    pub(super) sum: u32,
    pub(super) state: State,
}

pub(super) enum State {
    /// It is what it was when it was found.
    Read,
    /// It is not, and has to be read anew.
    Changed,
    Failed(io::Error),
}

/// Gives out what is to be read, in order.
struct Feeder<'a> {
    source: Source<'a>,
    jobs: &'a [NodeId],
    share: bool,
    at: usize,
    /// How far the large file at `at` was given out.
    within: u64,
    /// That file, if it has holes to be leapt over.
    sparse: Option<File>,
}

/// Where content is.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) plan: &'a Plan,
    pub(super) base: Option<&'a Base>,
    pub(super) spool: Option<&'a File>,
}

impl<'a> Source<'a> {
    pub(super) fn file(&self, node: NodeId) -> (u64, &'a Data) {
        match &self.plan.node(node).body {
            Body::File { size, data } => (*size, data),
            _ => (0, &Data::Hole),
        }
    }
}

impl Feeder<'_> {
    fn next(&mut self) -> Option<Item> {
        let job = self.at;
        let (size, data) = self.source.file(*self.jobs.get(job)?);
        let origin = matches!(data, Data::Origin(_));
        if origin && self.share && size >= SHARED {
            self.at += 1;
            return Some(Item::Whole(job));
        }
        if size > PIECE as u64 {
            return Some(self.part(job, size, data));
        }
        let (mut end, mut sum) = (job, 0);
        while end < self.jobs.len() && end - job < FILES {
            let (size, data) = self.source.file(self.jobs[end]);
            let whole = self.share && size >= SHARED && matches!(data, Data::Origin(_));
            let more = size.next_multiple_of(BLOCK);
            if whole || sum + more > PIECE as u64 {
                break;
            }
            sum += more;
            end += 1;
        }
        self.at = end;
        Some(Item::Files(job..end))
    }

    fn part(&mut self, job: usize, size: u64, data: &Data) -> Item {
        if self.within == 0 {
            self.sparse = self.with_holes(size, data);
        }
        let start = match &self.sparse {
            Some(file) => match rustix::fs::seek(file, SeekFrom::Data(self.within)) {
                Ok(start) => start - start % BLOCK,
                Err(rustix::io::Errno::NXIO) => size,
                // Whatever it is, reading will tell.
                Err(_) => self.within,
            },
            None => match data {
                // Holes may be as large as an archive says, and cost nothing.
                Data::Spooled(runs) => next_run(runs.as_slice(), self.within)
                    .map_or(size, |run| run.bytes().start.max(self.within)),
                _ => self.within,
            },
        };
        let start = start.clamp(self.within, size.max(self.within));
        let end = start.saturating_add(PIECE as u64).min(size).max(start);
        let last = end == size || start >= size;
        (self.at, self.within) = if last { (job + 1, 0) } else { (job, end) };
        if last {
            self.sparse = None;
        }
        Item::Part { job, range: start..end, last }
    }

    /// A file of the source that takes clearly less than its size.
    fn with_holes(&self, size: u64, data: &Data) -> Option<File> {
        let Data::Origin(origin) = data else { return None };
        let origin = self.source.plan.origin(*origin);
        if origin.stored + (PIECE as u64) >= size {
            return None;
        }
        self.source.base?.open_file(&self.source.plan.path(origin.name)).ok()
    }
}

struct Shared<'a> {
    feeder: Feeder<'a>,
    /// Numbers of the next item to be given out, and to be taken.
    next: u64,
    taken: u64,
    done: BTreeMap<u64, Output>,
    spare: Vec<Blocks>,
    ended: bool,
    stop: bool,
    failed: bool,
}

/// What the threads share.
pub(super) struct Reading<'a> {
    source: Source<'a>,
    jobs: &'a [NodeId],
    state: Mutex<Shared<'a>>,
    /// For the one who takes: something was read.
    ready: Condvar,
    /// For the threads: something was taken.
    room: Condvar,
}

/// What is next for the one who takes.
pub(super) enum Next {
    Output(Output),
    /// Not yet: look whether to stop.
    Wait,
    End,
}

impl<'a> Reading<'a> {
    pub(super) fn new(source: Source<'a>, jobs: &'a [NodeId], share: bool) -> Reading<'a> {
        let feeder = Feeder { source, jobs, share, at: 0, within: 0, sparse: None };
        let state = Shared {
            feeder,
            next: 0,
            taken: 0,
            done: BTreeMap::new(),
            spare: Vec::new(),
            ended: false,
            stop: false,
            failed: false,
        };
        Reading { source, jobs, state: Mutex::new(state), ready: Condvar::new(), room: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Shared<'a>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next output, in the order of the list.
    pub(super) fn next(&self) -> io::Result<Next> {
        let mut state = self.lock();
        if let Some(output) = {
            let taken = state.taken;
            state.done.remove(&taken)
        } {
            state.taken += 1;
            drop(state);
            self.room.notify_one();
            return Ok(Next::Output(output));
        }
        if state.failed {
            return Err(io::Error::other("a thread that reads files ended early"));
        }
        if state.ended && state.taken == state.next {
            return Ok(Next::End);
        }
        drop(self.ready.wait_timeout(state, TICK));
        Ok(Next::Wait)
    }

    /// Gives a buffer back.
    pub(super) fn spare(&self, blocks: Blocks) {
        self.lock().spare.push(blocks);
    }

    /// Ends the threads.
    pub(super) fn stop(&self) {
        self.lock().stop = true;
        self.room.notify_all();
    }

    /// What a thread does.
    pub(super) fn work(&self) {
        let _guard = Ending(self);
        let mut directory = None;
        loop {
            let mut state = self.lock();
            let (number, item, blocks) = loop {
                if state.stop || state.ended {
                    return;
                }
                if state.next < state.taken + AHEAD {
                    let Some(item) = state.feeder.next() else {
                        state.ended = true;
                        drop(state);
                        self.ready.notify_all();
                        self.room.notify_all();
                        return;
                    };
                    state.next += 1;
                    break (state.next - 1, item, state.spare.pop().unwrap_or_default());
                }
                state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            let output = self.read(item, blocks, &mut directory);
            let mut state = self.lock();
            let awaited = state.taken == number;
            state.done.insert(number, output);
            drop(state);
            if awaited {
                self.ready.notify_all();
            }
        }
    }

    fn read(&self, item: Item, mut blocks: Blocks, directory: &mut Option<(NodeId, OwnedFd)>) -> Output {
        blocks.clear();
        let mut files = Vec::new();
        let jobs = match &item {
            Item::Files(jobs) => jobs.clone(),
            Item::Part { job, .. } => *job..*job + 1,
            Item::Whole(_) => 0..0,
        };
        for job in jobs {
            let start = blocks.bytes.len();
            let part = match &item {
                Item::Part { range, .. } => Some(range.clone()),
                _ => None,
            };
            let (read, state) = match self.file(job, part, &mut blocks, directory) {
                Ok(done) => done,
                Err(error) => {
                    blocks.bytes.truncate(start);
                    blocks.pieces.clear();
                    (0, State::Failed(error))
                }
            };
            let pieces = std::mem::take(&mut blocks.pieces);
            let held = &blocks.bytes[start..];
            files.push(Read { job, pieces, held: held.len(), read, sum: crc32c::crc32c(held), state });
        }
        Output { item, blocks, files }
    }

    fn file(
        &self,
        job: usize,
        part: Option<Range<u64>>,
        blocks: &mut Blocks,
        directory: &mut Option<(NodeId, OwnedFd)>,
    ) -> io::Result<(u64, State)> {
        let start = blocks.bytes.len();
        let (size, data) = self.source.file(self.jobs[job]);
        let range = part.unwrap_or(0..size);
        let mut read = 0;
        match (data, self.source.base, self.source.spool) {
            (Data::Origin(origin), Some(base), _) => {
                let origin = self.source.plan.origin(*origin);
                let file = self.open(base, origin.name, directory)?;
                let got = read_range(&file, &range, &mut blocks.bytes);
                // What is now as it was when it was found was so all the time: it is looked at once, afterwards.
                let after = sys::stat_of(file.as_fd())?;
                let found = (origin.inode, origin.ctime, size);
                if !after.is_file() || (after.inode, after.ctime, after.size) != found {
                    blocks.bytes.truncate(start);
                    return Ok((0, State::Changed));
                }
                read = got?;
            }
            (Data::Bytes(bytes), ..) => {
                blocks.bytes.extend_from_slice(bytes);
                read = bytes.len() as u64;
            }
            (Data::Spooled(runs), _, Some(spool)) => read_spool(spool, runs.as_slice(), &range, blocks)?,
            _ => return Err(io::Error::other("content that is nowhere")),
        }
        blocks.seal(start, range.start / BLOCK)?;
        Ok((read, State::Read))
    }

    /// Opens a file in its directory, which is kept for the next one.
    fn open(&self, base: &Base, name: NameId, directory: &mut Option<(NodeId, OwnedFd)>) -> io::Result<File> {
        let plan = self.source.plan;
        let parent = plan.parent(name);
        let fd = match directory {
            Some((known, fd)) if *known == parent => fd,
            _ => &directory.insert((parent, base.open_directory(&plan.directory_path(parent))?)).1,
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(fd, OsStr::from_bytes(plan.name(name)), flags, Mode::empty());
        Ok(File::from(opened?))
    }
}

/// A thread that panics must not be waited for.
struct Ending<'a, 'b>(&'a Reading<'b>);

impl Drop for Ending<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().failed = true;
            self.0.ready.notify_all();
        }
    }
}

/// All extended attributes of an open file.
pub(super) fn attributes(file: &File) -> io::Result<Vec<Xattr>> {
    sys::xattrs_of(file.as_fd())
}

/// Appends what is in `range` of a file, or up to its end; returns how much that was.
fn read_range(file: &File, range: &Range<u64>, bytes: &mut Vec<u8>) -> io::Result<u64> {
    let start = bytes.len();
    let length = usize::try_from(range.end - range.start).unwrap_or(PIECE);
    bytes.reserve(length);
    while bytes.len() < start + length {
        let filled = bytes.len() - start;
        let room = &mut bytes.spare_capacity_mut()[..length - filled];
        match rustix::io::pread(file, room, range.start + filled as u64) {
            Ok(([], _)) => break,
            Ok((got, _)) => {
                let filled = filled + got.len();
                // SAFETY: the kernel has written that many bytes behind those that were there.
                unsafe { bytes.set_len(start + filled) };
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok((bytes.len() - start) as u64)
}

/// The first run that has something after `at` bytes of the file.
fn next_run(runs: &[Run], at: u64) -> Option<&Run> {
    runs.get(runs.partition_point(|run| run.bytes().end <= at))
}

/// Appends the blocks of `range`, holes as zeros.
fn read_spool(spool: &File, runs: &[Run], range: &Range<u64>, blocks: &mut Blocks) -> io::Result<()> {
    let start = blocks.bytes.len();
    let length = usize::try_from(range.end - range.start).unwrap_or(PIECE).next_multiple_of(SIZE);
    blocks.bytes.resize(start + length, 0);
    let end = range.start + length as u64;
    let first = runs.partition_point(|run| run.bytes().end <= range.start);
    for run in runs[first..].iter().take_while(|run| run.bytes().start < end) {
        let (from, until) = (run.bytes().start.max(range.start), run.bytes().end.min(end));
        if from < until {
            let at = start + usize::try_from(from - range.start).unwrap_or(0);
            let to = start + usize::try_from(until - range.start).unwrap_or(0);
            spool.read_exact_at(&mut blocks.bytes[at..to], run.block * BLOCK + (from - run.bytes().start))?;
        }
    }
    Ok(())
}
