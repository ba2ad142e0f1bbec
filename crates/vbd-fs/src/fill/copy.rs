//! Content on its way into the image: read by several threads, placed in one order, written in large pieces.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use super::base::{Base, is_gone, unreadable};
use super::blocks::{Blocks, SIZE, block_number, each_part};
use super::read::{Item, Next, Output, Read, Reading, Source, State, attributes};
use super::share;
use super::store::{Allocate, Extent, Nowhere, Store, assign};
use crate::entry::{Content as _, Meta, Xattr};
use crate::error::Context;
use crate::plan::{BLOCK, Body, Data, NodeId, Plan, Run, push_run};
use crate::sys::{self, Stat};
use crate::walk::FileData;
use crate::{Cancel, Error, Progress, Result};

/// How often a file that changes while it is read is read.
const TRIES: u32 = 3;

/// How content is copied.
pub(crate) struct Way<'a> {
    pub(crate) base: Option<&'a Base>,
    pub(crate) spool: Option<&'a File>,
    pub(crate) threads: usize,
    /// The directory of the image, where blocks are to be shared with the source.
    pub(crate) share: Option<&'a Path>,
}

/// How many threads read where nobody says it.
pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, NonZeroUsize::get).clamp(2, 8)
}

/// What is to change in the plan.
struct Outcome {
    node: NodeId,
    /// Nothing, where the file is gone.
    data: Option<Data>,
    /// Size and attributes, where they are not those that were found first.
    fresh: Option<Box<(u64, Meta, Vec<Xattr>)>>,
}

/// Places the content of every file of the plan that has no blocks of the image yet, in the order of their paths.
/// Returns lines for the report. Whether all of it had room, the store knows.
///
/// # Errors
///
/// The files that cannot be read, all of them; one that keeps changing; what goes wrong in writing.
pub(crate) fn copy<A: Allocate>(
    plan: &mut Plan,
    way: &Way<'_>,
    store: &mut Store<A>,
    progress: &mut dyn Progress,
) -> Result<Vec<String>> {
    let (outcomes, warnings) = place(plan, way, store, progress)?;
    for Outcome { node, data, fresh } in outcomes {
        let Some(data) = data else {
            while let Some(name) = plan.any_name(node) {
                plan.unlink(name);
            }
            continue;
        };
        if let Some((size, old)) = plan.file_mut(node) {
            *old = data;
            if let Some(fresh) = &fresh {
                *size = fresh.0;
            }
        }
        if let Some(fresh) = fresh {
            plan.set(node, fresh.1, &fresh.2);
        }
    }
    Ok(warnings)
}

/// As [`copy`], but nothing is written and the plan stays: how many blocks are missing, the store knows.
///
/// # Errors
///
/// As [`copy`].
pub(crate) fn count(
    plan: &Plan,
    way: &Way<'_>,
    store: &mut Store<Nowhere>,
    progress: &mut dyn Progress,
) -> Result<()> {
    place(plan, way, store, &mut Quiet(progress)).map(drop)
}

/// Passes on the wish to stop alone.
struct Quiet<'a>(&'a mut dyn Progress);

impl Progress for Quiet<'_> {
    fn cancel(&self) -> Cancel {
        self.0.cancel()
    }
}

fn place<A: Allocate>(
    plan: &Plan,
    way: &Way<'_>,
    store: &mut Store<A>,
    progress: &mut dyn Progress,
) -> Result<(Vec<Outcome>, Vec<String>)> {
    let jobs = jobs(plan);
    let source = Source { plan, base: way.base, spool: way.spool };
    let share = way.share.is_some_and(|directory| can_share(&source, &jobs, directory));
    let reading = Reading::new(source, &jobs, share);
    let mut copier = Copier {
        source,
        jobs: &jobs,
        store,
        outcomes: Vec::with_capacity(jobs.len()),
        large: None,
        unreadable: Vec::new(),
        warnings: Vec::new(),
        blocks: Blocks::default(),
        runs: Vec::new(),
    };
    std::thread::scope(|scope| {
        for _ in 0..way.threads.min(jobs.len()) {
            scope.spawn(|| reading.work());
        }
        let result = if jobs.is_empty() { Ok(()) } else { copier.run(&reading, progress) };
        reading.stop();
        result
    })?;
    let Copier { outcomes, mut unreadable, mut warnings, .. } = copier;
    if !unreadable.is_empty() {
        unreadable.sort();
        return Err(Error::unreadable(unreadable));
    }
    warnings.sort();
    Ok((outcomes, warnings))
}

/// The files that have content to be placed, each once.
fn jobs(plan: &Plan) -> Vec<NodeId> {
    let mut seen = vec![false; plan.nodes()];
    let mut jobs = Vec::new();
    for (_, children) in plan.directories() {
        for name in children {
            let node = plan.target(name);
            let waits = matches!(
                &plan.node(node).body,
                Body::File { data: Data::Origin(_) | Data::Bytes(_) | Data::Spooled(_), .. }
            );
            if waits && !std::mem::replace(&mut seen[node.index()], true) {
                jobs.push(node);
            }
        }
    }
    jobs
}

/// Tries it with the first file that is large enough.
fn can_share(source: &Source<'_>, jobs: &[NodeId], directory: &Path) -> bool {
    let large = jobs.iter().find_map(|&node| match source.file(node) {
        (BLOCK.., Data::Origin(origin)) => {
            source.base?.open_file(&source.plan.path(source.plan.origin(*origin).name)).ok()
        }
        _ => None,
    });
    large.is_some_and(|sample| share::can_share(&sample, directory))
}

struct Copier<'a, A> {
    source: Source<'a>,
    jobs: &'a [NodeId],
    store: &'a mut Store<A>,
    outcomes: Vec<Outcome>,
    /// The runs and the sum of the large file whose parts are coming, unless it must be read anew.
    large: Option<Option<(Vec<Run>, u32)>>,
    unreadable: Vec<(PathBuf, String)>,
    warnings: Vec<String>,
    blocks: Blocks,
    /// Those of the file that is being placed.
    runs: Vec<Run>,
}

impl<A: Allocate> Copier<'_, A> {
    fn run(&mut self, reading: &Reading<'_>, progress: &mut dyn Progress) -> Result<()> {
        loop {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            match reading.next().at("read", Path::new("the source"))? {
                Next::End => return Ok(()),
                Next::Wait => {}
                Next::Output(output) => {
                    let blocks = self.take(output, progress)?;
                    reading.spare(blocks);
                }
            }
        }
    }

    fn take(&mut self, output: Output, progress: &mut dyn Progress) -> Result<Blocks> {
        let Output { item, blocks, files } = output;
        match item {
            Item::Files(_) => self.files(&blocks, files, progress)?,
            Item::Part { last, .. } => {
                for read in files {
                    self.part(&blocks, read, last, progress)?;
                }
            }
            Item::Whole(job) => self.whole(job, progress)?,
        }
        Ok(blocks)
    }

    /// Places small files, all that are good at once.
    fn files(&mut self, blocks: &Blocks, files: Vec<Read>, progress: &mut dyn Progress) -> Result<()> {
        let mut good: Vec<Read> = Vec::with_capacity(files.len());
        let (mut start, mut end) = (0, 0);
        for read in files {
            let held = end..end + read.held;
            end = held.end;
            progress.advance(read.read);
            match &read.state {
                State::Read => good.push(read),
                _ => {
                    self.place(&blocks.bytes[start..held.start], &mut good)?;
                    start = held.end;
                    let job = read.job;
                    self.again(job, read.state, progress)?;
                }
            }
        }
        self.place(&blocks.bytes[start..end], &mut good)
    }

    fn place(&mut self, bytes: &[u8], files: &mut Vec<Read>) -> Result<()> {
        let extents = self.store.place(bytes)?;
        let room = extents.is_some();
        let (mut extents, mut rest) = (extents.unwrap_or_default().into_iter(), Extent::default());
        let mut at = 0;
        for read in files.drain(..) {
            let held = &bytes[at..at + read.held];
            self.store.note_part(read.sum, &read.pieces);
            at += read.held;
            self.runs.clear();
            if room {
                assign(&read.pieces, &mut extents, &mut rest, &mut self.runs);
            }
            let sum = self.store.sum(0, held, &read.pieces);
            self.store.keep_sum(&self.runs, sum);
            let (node, data) = (self.jobs[read.job], Some(self.store.data(&self.runs)));
            self.outcomes.push(Outcome { node, data, fresh: None });
        }
        Ok(())
    }

    fn part(&mut self, blocks: &Blocks, read: Read, last: bool, progress: &mut dyn Progress) -> Result<()> {
        progress.advance(read.read);
        let mut large = self.large.take().unwrap_or_else(|| Some((Vec::new(), 0)));
        if !matches!(read.state, State::Read)
            && let Some((runs, _)) = large.take()
        {
            self.store.release_runs(&runs);
        }
        if let Some((runs, sum)) = &mut large {
            *sum = self.store.sum(*sum, &blocks.bytes, &read.pieces);
            self.store.note_part(read.sum, &read.pieces);
            if let Some(extents) = self.store.place(&blocks.bytes)? {
                assign(&read.pieces, &mut extents.into_iter(), &mut Extent::default(), runs);
            }
        }
        if !last {
            self.large = Some(large);
            return Ok(());
        }
        match large {
            Some((runs, sum)) => {
                self.store.keep_sum(&runs, sum);
                let (node, data) = (self.jobs[read.job], Some(self.store.data(&runs)));
                self.outcomes.push(Outcome { node, data, fresh: None });
                Ok(())
            }
            None => self.again(read.job, read.state, progress),
        }
    }

    /// Reads a file that did not come as it should, in one go and at once.
    fn again(&mut self, job: usize, state: State, progress: &mut dyn Progress) -> Result<()> {
        let node = self.jobs[job];
        let (Data::Origin(origin), Some(base)) = (self.source.file(node).1, self.source.base) else {
            let State::Failed(error) = state else { return Ok(()) };
            return Err(Error::io("cannot read content that was kept", error));
        };
        let path = self.source.plan.path(self.source.plan.origin(*origin).name);
        if let State::Failed(error) = state {
            return self.trouble(base, node, &path, &error);
        }
        for attempt in 2.. {
            let file = match base.open_file(&path) {
                Ok(file) => file,
                Err(error) => return self.trouble(base, node, &path, &error),
            };
            let looked = stat(&file).and_then(|stat| Ok((stat, attributes(&file)?)));
            let (stat, xattrs) = match looked {
                Ok(looked) => looked,
                Err(error) => return self.trouble(base, node, &path, &error),
            };
            if !stat.is_file() {
                self.warnings.push(base.changed(&path, "it was replaced while it was read")?);
                self.outcomes.push(Outcome { node, data: None, fresh: None });
                return Ok(());
            }
            let mut content = FileData::new(&file, stat.size);
            let (store, mut runs, mut sum) = (&mut *self.store, Vec::new(), 0);
            let read = each_part(&mut content, &mut self.blocks, |part, read| {
                if progress.cancelled() {
                    return Err(Error::Interrupted);
                }
                sum = store.sum(sum, &part.bytes, &part.pieces);
                store.place_part(part, &mut runs)?;
                progress.advance(read);
                Ok(())
            })?;
            if let Err(error) = read {
                self.store.release_runs(&runs);
                let error = content.failed.take().unwrap_or(error);
                return self.trouble(base, node, &path, &error);
            }
            let meta = base.meta(&stat);
            let same = unchanged(&file, &stat);
            if !same && attempt < TRIES {
                self.store.release_runs(&runs);
                continue;
            }
            if !same {
                let what = format!("it changed while it was read, {TRIES} times");
                self.warnings.push(base.changed(&path, &what)?);
            }
            self.store.keep_sum(&runs, sum);
            let data = Some(self.store.data(&runs));
            self.outcomes.push(Outcome { node, data, fresh: Some(Box::new((stat.size, meta, xattrs))) });
            return Ok(());
        }
        Ok(())
    }

    fn trouble(&mut self, base: &Base, node: NodeId, path: &Path, error: &io::Error) -> Result<()> {
        if is_gone(error) {
            self.warnings.push(base.changed(path, "it was removed or replaced while it was read")?);
        } else if base.skip_unreadable {
            self.warnings.push(format!("{}: left out: cannot be read: {error}", base.shown(path).display()));
        } else {
            self.unreadable.push((base.shown(path), unreadable(error)));
        }
        self.outcomes.push(Outcome { node, data: None, fresh: None });
        Ok(())
    }

    /// Has the image share a file's whole blocks, and copies the rest.
    fn whole(&mut self, job: usize, progress: &mut dyn Progress) -> Result<()> {
        let node = self.jobs[job];
        let (size, Data::Origin(origin)) = self.source.file(node) else { return Ok(()) };
        let Some(base) = self.source.base else { return Ok(()) };
        let origin = self.source.plan.origin(*origin);
        let path = self.source.plan.path(origin.name);
        let opened = base.open_file(&path).and_then(|file| Ok((stat(&file)?, file)));
        let (found, file) = match opened {
            Ok(opened) => opened,
            Err(error) => return self.again(job, State::Failed(error), progress),
        };
        if !found.is_file() || (found.inode, found.ctime, found.size) != (origin.inode, origin.ctime, size) {
            return self.again(job, State::Changed, progress);
        }
        let mut runs = Vec::new();
        let shared = self.share(&file, size, &mut runs, progress)?;
        if !shared || !unchanged(&file, &found) {
            self.store.release_runs(&runs);
            return self.again(job, State::Changed, progress);
        }
        let data = Some(self.store.data(&runs));
        self.outcomes.push(Outcome { node, data, fresh: None });
        Ok(())
    }

    /// Shares what can be; false where the filesystem will not, or the file cannot be read.
    fn share(
        &mut self,
        file: &File,
        size: u64,
        runs: &mut Vec<Run>,
        progress: &mut dyn Progress,
    ) -> Result<bool> {
        self.store.note(&size.to_le_bytes());
        let mut content = FileData::new(file, size);
        let mut next = 0;
        while let Ok(Some(extent)) = content.next_extent() {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            let first = (extent.start / BLOCK).max(next);
            // The last block of the file may be a part of one, which cannot be shared.
            let end = if extent.end == size { size / BLOCK } else { extent.end.div_ceil(BLOCK) };
            if end > first && !self.share_blocks(file, first, end, runs)? {
                return Ok(false);
            }
            next = next.max(end);
            progress.advance(extent.end - extent.start);
            if extent.end == size && !size.is_multiple_of(BLOCK) {
                let mut tail = vec![0; SIZE];
                let length = usize::try_from(size % BLOCK).unwrap_or(0);
                let read =
                    std::os::unix::fs::FileExt::read_exact_at(file, &mut tail[..length], size - size % BLOCK);
                if read.is_err() {
                    return Ok(false);
                }
                let mut part = Blocks { bytes: tail, pieces: Vec::new() };
                part.seal(0, size / BLOCK).at("place the end of", Path::new("a file"))?;
                self.store.place_part(&part, runs)?;
            }
        }
        Ok(content.failed.is_none())
    }

    fn share_blocks(&mut self, file: &File, first: u64, end: u64, runs: &mut Vec<Run>) -> Result<bool> {
        let Some(extents) = self.store.allocate(end - first)? else { return Ok(true) };
        let mut logical = first;
        for (block, count) in extents {
            let at = self.store.position(block);
            let shared = share::share(file, logical * BLOCK, count * BLOCK, self.store.file(), at);
            let numbers = block_number(logical + count).ok().zip(u32::try_from(count).ok());
            let (Ok(()), Some((after, count32))) = (shared, numbers) else {
                self.store.allocator.release((block, count));
                return Ok(false);
            };
            push_run(runs, Run { logical: after - count32, count: count32, block });
            logical += count;
        }
        Ok(true)
    }
}

fn stat(file: &File) -> io::Result<Stat> {
    sys::stat_of(file.as_fd())
}

/// Whether a file is still what it was before.
fn unchanged(file: &File, before: &Stat) -> bool {
    stat(file).is_ok_and(|now| now.is_as(before))
}
