//! `vbd convert`: an image made anew in another format, or as another file.
//!
//! The new image grows under a name of its own beside the one that it is to have, `.vbd-NAME.convert`, and gets its name
//! when it is whole and durable. A job that was interrupted, by a kill or a power cut too, leaves that file and a journal
//! that says how far it is; the next may go on from there.
//!
//! Raw and qcow2 images are written as files, in one go ([`fill`](crate::fill)); others, and those that have something set
//! aside or elsewhere, by the engine that would serve them ([`copy`](crate::copy)).

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use vbd_core::Client;
use vbd_core::file::Cache;
use vbd_formats::{Format, ImageSpec, NewImage, Repair};
use vbd_image::create;

use crate::copy::Copy;
use crate::fill::Fill;
use crate::image::Image;
use crate::journal::{FileId, Journal, sync_directory};
use crate::ranges::lock;
use crate::target::Target;
use crate::{Error, Progress, Result, compare};

/// How often what was written is made durable and noted.
const NOTE_EVERY: Duration = Duration::from_secs(5);
/// Threads unless told otherwise: enough requests to keep storage busy.
const THREADS: usize = 8;

/// What to do with what an interrupted job has left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Leftover {
    /// Refuse, and say so.
    #[default]
    Refuse,
    /// Go on from there.
    Resume,
    /// Begin anew.
    Restart,
}

/// How to convert.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// What is made; its size is the source's.
    pub target: NewImage,
    /// Threads that read and write.
    pub threads: usize,
    /// Write in the order of the disk, so that the new image holds it in order.
    pub ordered: bool,
    /// Compress what becomes shorter by it; the image says how. For formats that have that.
    pub compress: bool,
    /// Read the new image back and compare it with the source.
    pub verify: bool,
    /// What to do with what an interrupted job has left.
    pub leftover: Leftover,
    /// Make the new image durable before it gets its name. Without that a power cut soon after can leave a file of that
    /// name with anything in it, and a job that was interrupted cannot go on.
    pub durable: bool,
}

impl ConvertOptions {
    /// The defaults for an image of this kind.
    pub fn new(target: NewImage) -> Self {
        ConvertOptions {
            target,
            threads: THREADS,
            ordered: true,
            compress: false,
            verify: false,
            leftover: Leftover::default(),
            durable: true,
        }
    }
}

/// What a conversion has done. Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conversion {
    /// The disk's size.
    pub size: u64,
    /// What was written; the rest are zeroes, or what the backing file has.
    pub written: u64,
    /// Where it went on from; 0 where it began anew.
    pub resumed_at: u64,
}

/// Makes the image `target` with the content of `source`.
///
/// # Errors
/// The source cannot be read, the target cannot be made, or the job was stopped. What there is of the new image stays
/// for the next time, except where it could not be begun.
pub fn convert(
    source_spec: &ImageSpec,
    target: &Path,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Conversion> {
    let files = sources(source_spec)?;
    // All of it is read once, and often it is in the page cache already.
    let spec = ImageSpec { read_only: true, cache: Cache::Writeback, ..source_spec.clone() };
    let source = Image::open(&spec)?;
    let mut image = options.target.clone();
    image.size = source.size();
    create::may_publish(target, image.replace)?;
    if options.compress && image.secret.is_some() {
        let message = "what is encrypted is not compressed too: leave out one of the two";
        return Err(Error::Refused(format!("{}: {message}", target.display())));
    }
    let base = base(&image, target, source_spec)?;
    let draft =
        Draft { way: if Target::fits(&image) { Way::File } else { Way::Engine }, ..Draft::new(target) };
    // The key is not shown: a draft of another one is not unlocked by this.
    let what = format!("{image:?}, compressed: {}, {:?}", options.compress, draft.way);
    let (done, journal) = draft.begin(Journal::new(files, what), options.leftover, &image)?;
    let work = Work {
        source: &source,
        base: base.as_deref(),
        image: &image,
        draft: &draft,
        spec: ImageSpec {
            lease_wait: Duration::ZERO,
            gate: image.gate(target, &source_spec.gate)?,
            secret: image.secret.clone(),
            ..ImageSpec::new(&draft.path, image.format())
        },
        options,
        progress,
    };
    let filled = match draft.way {
        Way::File => work.file(done, journal),
        Way::Engine => work.engine(done, journal),
    };
    let written = filled.map_err(|error| draft.left(target, error))?;
    create::publish(&draft.path, target, image.replace)?;
    // A journal without its draft would do no harm.
    let _ = fs::remove_file(&draft.journal);
    if options.durable {
        sync_directory(target).map_err(Error::io(target, "make its name durable"))?;
    }
    Ok(Conversion { size: source.size(), written, resumed_at: done })
}

/// A conversion under way.
struct Work<'a> {
    source: &'a Client,
    base: Option<&'a Client>,
    image: &'a NewImage,
    draft: &'a Draft,
    /// How the draft is opened as an image.
    spec: ImageSpec,
    options: &'a ConvertOptions,
    progress: &'a dyn Progress,
}

impl Work<'_> {
    /// Writes the draft as a file.
    fn file(&self, done: u64, journal: Journal) -> Result<u64> {
        let options = self.options;
        let target = Target::open(&self.draft.path, self.image, done, options.durable)?;
        let fill = Fill {
            source: self.source,
            target: &target,
            base: self.base,
            threads: options.threads,
            // A raw image has its order in itself.
            ordered: options.ordered && self.image.format() != Format::Raw,
            compress: options.compress,
        };
        let save = || target.save();
        let keeper = Keeper::new(&save, self.draft, journal, options.durable);
        let written =
            fill.run(self.progress, &|low| keeper.reached(low)).inspect_err(|_| keeper.note_what_can_be())?;
        self.progress.step("flushing", 0);
        target.finish()?;
        if options.verify {
            // Its lease is the reader's.
            drop(target);
            self.verify(&*Image::open(&self.spec.clone().read_only())?)?;
        }
        Ok(written)
    }

    /// Has the engine of the draft's format write it.
    fn engine(&self, done: u64, journal: Journal) -> Result<u64> {
        let options = self.options;
        // A new image has no bitmaps that would have to see this.
        let made = Image::of(vbd_formats::open(&self.spec)?)?;
        let save = || Ok(made.flush()?);
        let keeper = Keeper::new(&save, self.draft, journal, options.durable);
        let copy = Copy {
            source: self.source,
            target: &made,
            base: self.base,
            threads: options.threads,
            ordered: options.ordered,
            compress: options.compress,
        };
        let written = copy
            .run(done, self.progress, &|low| keeper.reached(low))
            .inspect_err(|_| keeper.note_what_can_be())?;
        self.progress.step("flushing", 0);
        made.flush()?;
        if options.verify {
            self.verify(&made)?;
        }
        // Closed it is whole.
        drop(made);
        let path = &self.draft.path;
        let synced = fs::File::open(path).and_then(|file| file.sync_all());
        synced.map_err(Error::io(path, "make it durable"))?;
        Ok(written)
    }

    fn verify(&self, made: &Client) -> Result<()> {
        let compared = compare(self.source, made, self.options.threads, self.progress)?;
        match compared.difference {
            Some(difference) => {
                Err(Error::ReadsBackWrong { path: self.draft.path.clone(), offset: difference.offset })
            }
            None => Ok(()),
        }
    }
}

/// What the new image stands on, where it does.
fn base(image: &NewImage, target: &Path, source: &ImageSpec) -> Result<Option<Image>> {
    let Some((path, format)) = image.backing(target)? else { return Ok(None) };
    let gate = image.gate(target, &source.gate)?;
    Ok(Some(Image::open(&ImageSpec { gate, ..ImageSpec::new(path, format).read_only() })?))
}

/// Every file that the source is made of.
fn sources(source: &ImageSpec) -> Result<Vec<FileId>> {
    let links = vbd_formats::chain(&source.path, source.format, &source.gate)?;
    let files = links.iter().flat_map(|link| std::iter::once(&link.path).chain(&link.data_file));
    files.map(|path| FileId::of(path).map_err(Error::io(path, "look at it"))).collect()
}

/// How an image is written. What one has begun, the other cannot go on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    File,
    Engine,
}

/// The file that becomes the image.
struct Draft {
    path: PathBuf,
    journal: PathBuf,
    way: Way,
}

impl Draft {
    fn new(target: &Path) -> Self {
        let beside = |end: &str| {
            let mut name = OsString::from(".vbd-");
            name.push(target.file_name().unwrap_or_default());
            name.push(end);
            target.with_file_name(name)
        };
        Draft { path: beside(".convert"), journal: beside(".journal"), way: Way::Engine }
    }

    /// Makes the draft, or takes up the one that is there; tells how far it is.
    fn begin(&self, new: Journal, leftover: Leftover, image: &NewImage) -> Result<(u64, Journal)> {
        let exists = self.path.symlink_metadata().is_ok();
        match leftover {
            Leftover::Refuse if exists => {
                let message = "an interrupted conversion has left this: go on with --resume, or begin anew with --restart";
                return Err(Error::Refused(format!("{}: {message}", self.path.display())));
            }
            Leftover::Resume if exists => {
                // Only what was noted is durable. Without a journal nothing is.
                if let Some(old) = Journal::read(&self.journal)? {
                    if old.sources != new.sources || old.what != new.what {
                        let message = if old.sources != new.sources {
                            "the source has changed since"
                        } else {
                            "it was begun with other options"
                        };
                        let path = self.path.display();
                        return Err(Error::Refused(format!("{path}: {message}: begin anew with --restart")));
                    }
                    self.mend(image)?;
                    return Ok((old.done, old));
                }
            }
            _ => {}
        }
        // The journal first: what it says is of the draft that is about to be replaced.
        match fs::remove_file(&self.journal) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(&self.journal, "remove it")(error));
            }
            _ => {}
        }
        match self.way {
            Way::File => Target::create(&self.path, image)?,
            Way::Engine => vbd_formats::create(&self.path, &NewImage { replace: true, ..image.clone() })?,
        }
        Ok((0, new))
    }

    /// Gives back what a kill or a power cut has left taken in the draft and not referred to.
    fn mend(&self, image: &NewImage) -> Result<()> {
        if image.format() == Format::Qcow2 && self.way == Way::Engine {
            vbd_formats::check(&ImageSpec::new(&self.path, Format::Qcow2), Some(Repair::All))?;
        }
        Ok(())
    }

    /// Says what is left, with an error after which the job can be taken up again.
    fn left(&self, target: &Path, error: Error) -> Error {
        let error = match error {
            Error::ReadsBackWrong { offset, .. } => Error::ReadsBackWrong { path: target.to_owned(), offset },
            other => other,
        };
        let done = matches!(Journal::read(&self.journal), Ok(Some(journal)) if journal.done > 0);
        if !done || matches!(error, Error::ReadsBackWrong { .. }) {
            let _ = fs::remove_file(&self.journal);
            let _ = fs::remove_file(&self.path);
            return error;
        }
        Error::Refused(format!(
            "{error}: what there is so far is in {}: go on with --resume",
            self.path.display()
        ))
    }
}

/// Notes now and then how far the job is.
struct Keeper<'a> {
    /// Makes durable what was written.
    save: &'a (dyn Fn() -> Result<()> + Sync),
    draft: &'a Draft,
    /// Whether there is anything to note: not of what is not to be durable.
    notes: bool,
    state: Mutex<Kept>,
}

struct Kept {
    journal: Journal,
    /// Below this all is written.
    low: u64,
    last: Instant,
}

impl<'a> Keeper<'a> {
    fn new(
        save: &'a (dyn Fn() -> Result<()> + Sync),
        draft: &'a Draft,
        journal: Journal,
        notes: bool,
    ) -> Self {
        let state = Kept { low: journal.done, journal, last: Instant::now() };
        Keeper { save, draft, notes, state: Mutex::new(state) }
    }

    /// Keeps what can be kept of a job that has failed. The reason is of more interest than whether that worked.
    fn note_what_can_be(&self) {
        if self.notes {
            let _ = self.note();
        }
    }

    fn reached(&self, low: u64) -> Result<()> {
        {
            let mut state = lock(&self.state);
            state.low = state.low.max(low);
            if !self.notes || state.last.elapsed() < NOTE_EVERY {
                return Ok(());
            }
            // The others go on; none of them does the same meanwhile.
            state.last = Instant::now();
        }
        self.note()
    }

    fn note(&self) -> Result<()> {
        let low = lock(&self.state).low;
        (self.save)()?;
        let mut state = lock(&self.state);
        if low > state.journal.done {
            state.journal.done = low;
            state.journal.write(&self.draft.journal)?;
        }
        Ok(())
    }
}
