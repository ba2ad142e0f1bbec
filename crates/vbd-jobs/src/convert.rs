//! `vbd convert`: an image made anew in another format, or as another file.
//!
//! The new image grows under a name of its own beside the one that it is to have, `.vbd-NAME.convert`, and gets its name
//! when it is whole and durable. A job that was interrupted, by a kill or a power cut too, leaves that file and a journal
//! that says how far it is; the next may go on from there.

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
use crate::image::Image;
use crate::journal::{FileId, Journal, sync_directory};
use crate::ranges::lock;
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
    /// The new image's use of the page cache.
    pub cache: Cache,
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
            cache: Cache::None,
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
    let source = Image::open(&ImageSpec { read_only: true, ..source_spec.clone() })?;
    let mut image = options.target.clone();
    image.size = source.size();
    create::may_publish(target, image.replace)?;
    if options.compress && image.secret.is_some() {
        let message = "what is encrypted is not compressed too: leave out one of the two";
        return Err(Error::Refused(format!("{}: {message}", target.display())));
    }
    let base = base(&image, target, source_spec)?;
    let draft = Draft::new(target);
    // The key is not shown: a draft of another one is not unlocked by this.
    let journal = Journal::new(files, format!("{image:?}, compressed: {}", options.compress));
    let (done, journal) = draft.begin(journal, options.leftover, &image)?;
    let spec = ImageSpec {
        cache: options.cache,
        lease_wait: Duration::ZERO,
        gate: image.gate(target, &source_spec.gate)?,
        secret: image.secret.clone(),
        ..ImageSpec::new(&draft.path, image.format())
    };
    let fill = || -> Result<u64> {
        // A new image has no bitmaps that would have to see this.
        let made = Image::of(vbd_formats::open(&spec)?)?;
        let keeper = Keeper::new(&made, &draft, journal);
        let copy = Copy {
            source: &source,
            target: &made,
            base: base.as_deref(),
            threads: options.threads,
            // A raw image has its order in itself.
            ordered: options.ordered && image.format() != Format::Raw,
            compress: options.compress,
        };
        let written = copy.run(done, progress, &|low| keeper.reached(low)).inspect_err(|_| {
            // What can be kept is kept; the reason is of more interest than whether that worked.
            let _ = keeper.note();
        })?;
        progress.step("flushing", 0);
        made.flush()?;
        if options.verify {
            let compared = compare(&source, &made, options.threads, progress)?;
            if let Some(difference) = compared.difference {
                return Err(Error::ReadsBackWrong { path: target.to_owned(), offset: difference.offset });
            }
        }
        Ok(written)
    };
    let written = fill().map_err(|error| draft.left(error))?;
    // The image is closed now, and with that whole.
    fs::File::open(&draft.path)
        .and_then(|file| file.sync_all())
        .map_err(Error::io(target, "make it durable"))?;
    create::publish(&draft.path, target, image.replace)?;
    // A journal without its draft would do no harm.
    let _ = fs::remove_file(&draft.journal);
    sync_directory(target).map_err(Error::io(target, "make its name durable"))?;
    Ok(Conversion { size: source.size(), written, resumed_at: done })
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

/// The file that becomes the image.
struct Draft {
    path: PathBuf,
    journal: PathBuf,
}

impl Draft {
    fn new(target: &Path) -> Self {
        let beside = |end: &str| {
            let mut name = OsString::from(".vbd-");
            name.push(target.file_name().unwrap_or_default());
            name.push(end);
            target.with_file_name(name)
        };
        Draft { path: beside(".convert"), journal: beside(".journal") }
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
        vbd_formats::create(&self.path, &NewImage { replace: true, ..image.clone() })?;
        Ok((0, new))
    }

    /// Gives back what a kill or a power cut has left taken in the draft and not referred to.
    fn mend(&self, image: &NewImage) -> Result<()> {
        if image.format() == Format::Qcow2 {
            vbd_formats::check(&ImageSpec::new(&self.path, Format::Qcow2), Some(Repair::All))?;
        }
        Ok(())
    }

    /// Says what is left, with an error after which the job can be taken up again.
    fn left(&self, error: Error) -> Error {
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
    target: &'a Client,
    draft: &'a Draft,
    state: Mutex<Kept>,
}

struct Kept {
    journal: Journal,
    /// Below this all is written.
    low: u64,
    last: Instant,
}

impl<'a> Keeper<'a> {
    fn new(target: &'a Client, draft: &'a Draft, journal: Journal) -> Self {
        let state = Kept { low: journal.done, journal, last: Instant::now() };
        Keeper { target, draft, state: Mutex::new(state) }
    }

    fn reached(&self, low: u64) -> Result<()> {
        {
            let mut state = lock(&self.state);
            state.low = state.low.max(low);
            if state.last.elapsed() < NOTE_EVERY {
                return Ok(());
            }
            // The others go on; none of them does the same meanwhile.
            state.last = Instant::now();
        }
        self.note()
    }

    fn note(&self) -> Result<()> {
        let low = lock(&self.state).low;
        self.target.flush()?;
        let mut state = lock(&self.state);
        if low > state.journal.done {
            state.journal.done = low;
            state.journal.write(&self.draft.journal)?;
        }
        Ok(())
    }
}
