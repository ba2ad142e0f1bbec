//! An ext4 filesystem filled from a plan: gathered from a source, tailored, measured, and then written in one pass.
//!
//! The content of a directory's files is read last, straight to its place; an archive's is placed while it streams, or
//! waits in a file without a name where the image's size is found from it.

mod base;
mod blocks;
mod copy;
mod emit;
mod identity;
mod read;
mod room;
mod scan;
mod share;
mod store;
mod swap;
mod verify;

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use vbd_ext4::format::Timestamp;
use vbd_ext4::write::{Journal, Layout, Settings, WriteError, Writer};
use vbd_image::size::Human;

use crate::archive::Archive;
use crate::entry::{Meta, Time};
use crate::error::Context;
use crate::meter::Room;
use crate::plan::{BLOCK, Gather, Limit, Plan};
use crate::spec::{JournalSize, Sharing};
use crate::tailor::Root as _;
use crate::tar::NamedAcl;
use crate::{BuildSpec, Counts, Error, Filesystem, ImageSize, Progress, Result, Shortage, Step, Tailor, oci};

pub(crate) use base::Base;
use copy::{Way, copy};
use identity::Identity;
pub(crate) use scan::Unwanted;
pub(crate) use store::Discard;
#[cfg(test)]
pub(crate) use store::Memory;
use store::{Allocate, Endless, Extent, Nowhere, Store};
use verify::Verify;

/// A size that is found is a whole number of these.
const MIB: u64 = 1 << 20;
/// How often a size is made larger by a part of it until it does: this makes it eighty times as large.
const GUESSES: u32 = 280;

/// What is to be made.
pub(crate) struct Making<'a> {
    pub(crate) spec: &'a BuildSpec,
    pub(crate) tailor: &'a Tailor,
    pub(crate) size: ImageSize,
    /// When it is made.
    pub(crate) now: Time,
    /// No entry is newer than this: set where the same build is to give the same bytes.
    pub(crate) latest: Option<Time>,
    /// The directory of the image.
    pub(crate) directory: &'a Path,
    /// Where files without a name are made.
    pub(crate) scratch: &'a Path,
    /// Bytes in the image before the filesystem.
    pub(crate) offset: u64,
    /// How many threads read.
    pub(crate) threads: Option<usize>,
    /// Whether it is read back and compared.
    pub(crate) verify: bool,
}

/// What it is made from.
pub(crate) enum Input {
    Directory(Base, Unwanted),
    /// A tar, cpio or squashfs with its name for messages.
    Archive(String, File),
    /// A container image.
    Image(oci::Image),
}

/// What was made.
pub(crate) struct Done {
    pub(crate) counts: Counts,
    pub(crate) warnings: Vec<String>,
}

/// Makes the filesystem in `image`, which reads as zeros where it is to be, and has its size where that is given.
///
/// # Errors
///
/// See [`Error`].
pub(crate) fn make(
    making: &Making<'_>,
    input: Input,
    image: &File,
    progress: &mut dyn Progress,
) -> Result<Done> {
    let made = Maker::new(making).and_then(|maker| maker.run(input, image, progress));
    // Whatever broke when it was stopped, that it was stopped is what counts.
    if progress.cancelled() { Err(Error::Interrupted) } else { made }
}

/// An error of the writer about the entry at `path`.
fn failed(path: &Path, error: WriteError) -> Error {
    match error {
        WriteError::NoBlocks { .. } | WriteError::NoInodes(_) => Error::NoRoom(Shortage::default()),
        WriteError::Io { source, .. } => Error::io("cannot write to the image", source),
        other => Error::Source { path: emit::shown(path), reason: format!("cannot be kept: {other}") },
    }
}

/// Gives out the blocks of the image.
struct Image(Writer);

impl Allocate for Image {
    const PLACED: bool = true;

    fn allocate(&mut self, blocks: u64) -> Result<Option<Vec<Extent>>> {
        match self.0.allocate(blocks) {
            Ok(runs) => Ok(Some(runs.iter().map(|run| (run.start, run.length)).collect())),
            Err(WriteError::NoBlocks { .. }) => Ok(None),
            Err(other) => Err(failed(Path::new(""), other)),
        }
    }

    fn gives_again(&self) -> bool {
        self.0.gives_again()
    }

    fn release(&mut self, (start, length): Extent) {
        self.0.release(vbd_ext4::write::Run { start, length });
    }
}

/// A plan that is complete but for content that is still to be placed.
struct Gathered {
    plan: Plan,
    warnings: Vec<String>,
    /// What of the source, and where it is, was not read yet.
    base: Option<Base>,
    /// Inodes and blocks beyond what there is room for.
    beyond: (u64, u64),
}

struct Maker<'a> {
    making: &'a Making<'a>,
    identity: Identity,
    settings: Settings,
}

impl<'a> Maker<'a> {
    fn new(making: &'a Making<'a>) -> Result<Maker<'a>> {
        let identity = Identity::new(making)?;
        let spec = making.spec;
        let mut settings = Settings::new(match making.size {
            ImageSize::Fixed(size) => size,
            // For measuring alone.
            ImageSize::Auto { .. } => 1 << 30,
        });
        settings.label = spec.label.clone().unwrap_or_default().into_bytes();
        settings.reserved_percent = spec.reserved_percent.map_or(settings.reserved_percent, f64::from);
        settings.inodes = spec.inodes;
        settings.bytes_per_inode = spec.bytes_per_inode.unwrap_or(settings.bytes_per_inode);
        settings.time = Timestamp { seconds: making.now.seconds, nanoseconds: making.now.nanoseconds };
        settings.journal = match spec.journal {
            JournalSize::Auto => Journal::Auto,
            JournalSize::None => Journal::None,
            JournalSize::Bytes(bytes) => Journal::Blocks(u32::try_from(bytes / BLOCK).unwrap_or(u32::MAX)),
        };
        settings.mount_options = spec.mount_options.clone().unwrap_or_default().into_bytes();
        settings.orphan_file = spec.orphan_file;
        identity.apply(&mut settings, spec.for_old_grub);
        Ok(Maker { making, identity, settings })
    }

    fn run(&self, input: Input, image: &File, progress: &mut dyn Progress) -> Result<Done> {
        let clone = || image.try_clone().at("open", Path::new("the image"));
        match self.making.size {
            ImageSize::Fixed(size) => {
                let layout = Layout::new(&self.settings).map_err(|e| self.no_layout(size, e))?;
                let mut store = self.store(layout.clone(), image)?;
                let gathered = self.gather(input, Some(&layout), &mut store, progress)?;
                // Zeros that the source stores are left out by copying alone.
                let tight = self.check(&gathered, &layout, &store, progress)?;
                let share = self.share().filter(|_| !tight);
                self.finish(gathered, layout, store, (None, share), progress)
            }
            ImageSize::Auto { .. } => {
                let spool =
                    tempfile::tempfile_in(self.making.scratch).at("make a file in", self.making.scratch)?;
                let held = spool.try_clone().at("open", Path::new("a file without a name"))?;
                let mut store = Store::new(spool, 0, Endless::default());
                let gathered = self.gather(input, None, &mut store, progress)?;
                crate::plan::Contents::flush(&mut store)?;
                let layout = self.smallest(&gathered)?;
                let length = self.making.offset + layout.settings().size;
                clone()?.set_len(length).at("set the size of", Path::new("the image"))?;
                let mut placed = self.store(layout.clone(), image)?;
                // The order in which content came is a part of what it is.
                placed.note(&store.digest());
                self.finish(gathered, layout, placed, (Some(held), self.share()), progress)
            }
        }
    }

    fn store(&self, layout: Layout, image: &File) -> Result<Store<Image>> {
        let clone = || image.try_clone().at("open", Path::new("the image"));
        let writer = Writer::new(layout, clone()?, self.making.offset);
        let writer = writer.map_err(|e| failed(Path::new(""), e))?;
        let mut store = Store::new(clone()?, self.making.offset, Image(writer));
        store.sums = self.making.verify.then(HashMap::new);
        Ok(store)
    }

    /// Fills a plan and tailors it. Where there is more than fits, what comes is counted, and not tailored.
    fn gather<A: Allocate>(
        &self,
        input: Input,
        layout: Option<&Layout>,
        store: &mut Store<A>,
        progress: &mut dyn Progress,
    ) -> Result<Gathered> {
        let making = self.making;
        let root = Meta { mode: 0o755, uid: 0, gid: 0, mtime: making.now };
        let mut plan = Plan::new(root, making.latest);
        let limit = layout.map_or(Limit { inodes: u32::MAX.into(), bytes: u64::MAX }, |layout| Limit {
            inodes: layout.free_inodes(),
            bytes: layout.bytes(),
        });
        let (plan, warnings, base, beyond) = match input {
            Input::Directory(base, unwanted) => {
                progress.step(Step::Measure, None);
                let warnings = scan::scan(&base, &unwanted, &mut plan, self.threads(), progress)?;
                let mut gather = Gather::new(plan, store, Some(&base), limit, making.now);
                self.tailor(&mut gather, progress)?;
                (gather.plan, warnings, Some(base), (0, 0))
            }
            Input::Archive(name, file) => {
                progress.step(Step::Read, None);
                let mut gather = Gather::new(plan, store, None, limit, making.now);
                let archive = Archive { name: &name, file, scratch: making.scratch };
                let named = archive.unpack(&mut gather, progress)?;
                gather.contents.flush()?;
                if gather.beyond == (0, 0) && !gather.contents.is_full() {
                    name_acls(&named, &name, &mut gather)?;
                    self.tailor(&mut gather, progress)?;
                }
                (gather.plan, Vec::new(), None, gather.beyond)
            }
            Input::Image(image) => {
                let mut gather = Gather::new(plan, store, None, limit, making.now);
                let named = image.unpack(&mut gather, self.threads(), progress)?;
                gather.contents.flush()?;
                if gather.beyond == (0, 0) && !gather.contents.is_full() {
                    name_acls(&named, "the image", &mut gather)?;
                    self.tailor(&mut gather, progress)?;
                }
                (gather.plan, Vec::new(), None, gather.beyond)
            }
        };
        let mut plan = plan;
        let (root, spec) = (plan.root(), making.spec);
        let mut meta = plan.node(root).meta;
        meta.mode = spec.root_mode.unwrap_or(meta.mode);
        if let Some(owner) = spec.root_owner {
            (meta.uid, meta.gid) = (owner.uid, owner.gid);
        }
        let xattrs = plan.xattrs(root).to_vec();
        plan.set(root, meta, &xattrs);
        plan.sort();
        if progress.cancelled() {
            return Err(Error::Interrupted);
        }
        Ok(Gathered { plan, warnings, base, beyond })
    }

    /// Makes the changes that were asked for.
    fn tailor(&self, gather: &mut Gather<'_>, progress: &mut dyn Progress) -> Result<()> {
        progress.step(Step::Tailor, None);
        self.making.tailor.apply(gather, Filesystem::Ext4)?;
        let size = self.making.spec.swap_file;
        size.map_or(Ok(()), |size| swap::add(gather, size.bytes(), self.making.now))
    }

    fn threads(&self) -> usize {
        self.making.threads.unwrap_or_else(copy::threads).max(1)
    }

    /// Whether blocks are shared with the source.
    fn share(&self) -> Option<&Path> {
        let wanted = match self.making.spec.reflink {
            // Shared blocks keep zeros that copying would leave out: the result would depend on the host.
            Sharing::Auto => self.making.latest.is_none(),
            Sharing::Always => true,
            Sharing::Never => false,
        };
        wanted.then_some(self.making.directory)
    }

    /// Fails where it does not fit; content is counted by reading it if that can make the difference, which is true then.
    fn check(
        &self,
        gathered: &Gathered,
        layout: &Layout,
        store: &Store<Image>,
        progress: &mut dyn Progress,
    ) -> Result<bool> {
        let nothing_more = store.missing == 0 && gathered.beyond == (0, 0);
        if nothing_more && room::is_ample(&gathered.plan, layout) {
            return Ok(false);
        }
        let needs = room::of(&gathered.plan, layout)?;
        let mut all = Room {
            blocks: needs.own.blocks + needs.content + store.missing + gathered.beyond.1,
            inodes: needs.own.inodes + gathered.beyond.0,
        };
        let fits = |room: &Room| room.blocks <= layout.free_blocks() && room.inodes <= layout.free_inodes();
        let tight = !fits(&all);
        if tight && needs.waiting > 0 {
            // Zeros that the source stores take no room.
            let file = store.file().try_clone().at("open", Path::new("the image"))?;
            let mut count = Store::new(file, self.making.offset, Nowhere);
            let way = self.way(gathered, None, None);
            copy::count(&gathered.plan, &way, &mut count, progress)?;
            all.blocks = all.blocks - needs.waiting + count.missing;
        }
        if fits(&all) { Ok(tight) } else { Err(self.shortage(all, layout)) }
    }

    fn way<'b>(
        &'b self,
        gathered: &'b Gathered,
        spool: Option<&'b File>,
        share: Option<&'b Path>,
    ) -> Way<'b> {
        Way { base: gathered.base.as_ref(), spool, threads: self.threads(), share }
    }

    fn finish(
        &self,
        gathered: Gathered,
        layout: Layout,
        mut store: Store<Image>,
        (spool, share): (Option<File>, Option<&Path>),
        progress: &mut dyn Progress,
    ) -> Result<Done> {
        let Gathered { mut plan, mut warnings, base, .. } = gathered;
        progress.step(Step::Read, Some(plan.counts().bytes));
        let way = Way { base: base.as_ref(), spool: spool.as_ref(), threads: self.threads(), share };
        warnings.extend(copy(&mut plan, &way, &mut store, progress)?);
        swap::place(&mut plan, &mut store)?;
        let full = |plan: &Plan, missing| -> Error {
            match room::of(plan, &layout) {
                Ok(needs) => {
                    let blocks = needs.own.blocks + needs.content + missing;
                    self.shortage(Room { blocks, inodes: needs.own.inodes }, &layout)
                }
                Err(error) => error,
            }
        };
        if store.missing > 0 {
            return Err(full(&plan, store.missing));
        }
        progress.step(Step::Write, None);
        crate::plan::Contents::flush(&mut store)?;
        let content = store.digest();
        let (sums, image) = (store.sums.take(), store.file().try_clone().at("open", Path::new("the image"))?);
        let mut writer = store.allocator.0;
        let tree = emit::emit(&plan, &mut writer, progress);
        let tree = tree.map_err(|e| if matches!(e, Error::NoRoom(_)) { full(&plan, 0) } else { e })?;
        let uuid = self.identity.uuid(&[tree, content]);
        match writer.finish(uuid) {
            Ok(_) => {}
            Err(WriteError::NoBlocks { .. }) => return Err(full(&plan, 0)),
            Err(error) => return Err(failed(Path::new(""), error)),
        }
        let counts = plan.counts();
        if let Some(sums) = sums {
            progress.step(Step::Verify, Some(counts.bytes));
            let verify = Verify { plan: &plan, sums: &sums, base: base.as_ref() };
            verify.run(image, self.making.offset, layout.settings().size, progress)?;
        }
        Ok(Done { counts, warnings })
    }

    fn no_layout(&self, size: u64, error: WriteError) -> Error {
        match error {
            WriteError::TooSmall { .. } => Error::Invalid(format!("{} are too few for ext4", Human(size))),
            other => Error::Invalid(other.to_string()),
        }
    }

    /// The filesystem as small as the size's wishes allow.
    fn smallest(&self, gathered: &Gathered) -> Result<Layout> {
        let ImageSize::Auto { spare, minimum, maximum } = self.making.size else {
            return Layout::new(&self.settings).map_err(|e| self.no_layout(self.settings.size, e));
        };
        let invalid = |e: WriteError| Error::Invalid(e.to_string());
        let measure = Layout::new(&self.settings).map_err(invalid)?;
        let needs = room::of(&gathered.plan, &measure)?;
        let blocks = needs.own.blocks + needs.content;
        let room = Room { blocks: blocks + spare.blocks(blocks, BLOCK), inodes: needs.own.inodes };
        // As many inodes as the content needs, however few its bytes are.
        let smallest = Layout::smallest(room.blocks, room.inodes, &self.settings).map_err(invalid)?;
        let usual = |size: u64| size / self.settings.bytes_per_inode;
        let sized = |size: u64| {
            let inodes = self.settings.inodes.unwrap_or(0).max(smallest.inodes()).max(usual(size));
            Layout::new(&Settings { size, inodes: Some(inodes), ..self.settings.clone() })
        };
        let mut size = smallest.bytes().next_multiple_of(MIB).max(minimum.unwrap_or(0));
        if let Some(maximum) = maximum.filter(|&maximum| size > maximum) {
            size = maximum;
        }
        loop {
            let fits =
                |layout: &Layout| room.blocks <= layout.free_blocks() && room.inodes <= layout.free_inodes();
            let layout = match sized(size) {
                Ok(layout) if fits(&layout) => return Ok(layout),
                Err(error) if Some(size) == maximum => return Err(self.no_layout(size, error)),
                other => other,
            };
            if let Some(maximum) = maximum.filter(|&maximum| size >= maximum) {
                let layout = layout.map_err(|e| self.no_layout(maximum, e))?;
                return Err(self.shortage(room, &layout));
            }
            size = (size + MIB).min(maximum.unwrap_or(u64::MAX));
        }
    }

    /// The smallest size, a whole number of MiB, that has so much free.
    fn holds(&self, room: Room) -> Result<u64> {
        let invalid = |e: WriteError| Error::Invalid(e.to_string());
        let smallest = Layout::smallest(room.blocks, room.inodes, &self.settings).map_err(invalid)?;
        let mut size = smallest.bytes().next_multiple_of(MIB);
        for _ in 0..GUESSES {
            let settings = Settings { size, ..self.settings.clone() };
            match Layout::new(&settings) {
                Ok(layout) if room.blocks <= layout.free_blocks() && room.inodes <= layout.free_inodes() => {
                    return Ok(size);
                }
                Ok(_) | Err(WriteError::TooSmall { .. } | WriteError::NoInodes(_)) => {}
                Err(error) => return Err(invalid(error)),
            }
            // Where inodes are what lacks, their number goes with the size.
            let step = (size / 64).next_multiple_of(MIB);
            size = size.saturating_add(step);
        }
        Err(Error::Invalid("no filesystem is as large as the source needs".to_owned()))
    }

    fn shortage(&self, room: Room, layout: &Layout) -> Error {
        Error::NoRoom(Shortage {
            needed_bytes: room.blocks * BLOCK,
            free_bytes: layout.free_blocks() * BLOCK,
            needed_inodes: room.inodes,
            free_inodes: layout.free_inodes(),
            size: layout.settings().size,
            enough: self.holds(room).ok(),
        })
    }
}

/// Sets ACLs for names, which only the tree can tell the numbers of.
fn name_acls(named: &[NamedAcl], archive: &str, gather: &mut Gather<'_>) -> Result<()> {
    if named.is_empty() {
        return Ok(());
    }
    let text = |gather: &Gather<'_>, path| -> Result<String> {
        Ok(String::from_utf8_lossy(&gather.read(path)?.unwrap_or_default()).into_owned())
    };
    let (passwd, group) = (text(gather, "/etc/passwd")?, text(gather, "/etc/group")?);
    for acl in named {
        if let (Some(xattr), Some(node)) = (acl.resolve(archive, &passwd, &group)?, gather.at(&acl.path)) {
            gather.plan.add_xattr(node, xattr);
        }
    }
    Ok(())
}
