//! The file that a new image is written to without an engine: raw, or a qcow2 image written in one go. Bytes go through
//! the page cache, and storage is kept busy meanwhile; one flush at the end makes all of it durable.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use vbd_formats::{Kind, NewImage};
use vbd_image::create::Draft;
use vbd_image::lease::{self, Lease, LeaseError, Mode};
use vbd_image::writeback;
use vbd_qcow2::{BuildError, Builder, CreateOptions, Packer};

use crate::ranges::lock;
use crate::{Error, Result};

/// The smallest run of zeroes that is left out of a raw image.
const RAW_UNIT: usize = 4096;
/// Bytes that are read and written at once: what a processor's cache holds from the one to the other.
const PIECE: usize = 1 << 20;

/// A new image that is being written.
pub(crate) struct Target {
    file: File,
    path: PathBuf,
    form: Form,
    start: u64,
    /// Whether it is to be durable in the end.
    durable: bool,
    /// Held by whoever writes: a filesystem lets one writer into a file at a time, and those that wait for it in the kernel
    /// keep a processor from reading, unpacking or compressing what comes next.
    writing: Mutex<()>,
    _lease: Lease,
}

enum Form {
    Raw,
    Qcow2(Box<Builder<File>>, Box<CreateOptions>),
}

/// A piece that is written: where it is in a thread's buffer, and where it goes in the file.
pub(crate) struct Piece {
    pub(crate) from: Range<usize>,
    pub(crate) to: u64,
}

/// What a new image is to be as qcow2's crate knows it.
fn options(image: &NewImage, options: &CreateOptions) -> CreateOptions {
    CreateOptions { size: image.size, replace: true, ..options.clone() }
}

impl Target {
    /// Whether images of this kind can be written so.
    pub(crate) fn fits(image: &NewImage) -> bool {
        match &image.kind {
            Kind::Raw { .. } => true,
            // What is encrypted is written by the engine alone.
            Kind::Qcow2(options) => image.secret.is_none() && Builder::<File>::fits(options),
            _ => false,
        }
    }

    /// Makes the empty file, over what an earlier job has left.
    pub(crate) fn create(path: &Path, image: &NewImage) -> Result<()> {
        match &image.kind {
            Kind::Qcow2(_) => Ok(Draft::new(path, true)?.publish()?),
            _ => Ok(vbd_formats::create(path, &NewImage { replace: true, ..image.clone() })?),
        }
    }

    /// Opens the file, of which all below `done` (bytes of the disk) is written; its lease is held from then on.
    pub(crate) fn open(path: &Path, image: &NewImage, done: u64, durable: bool) -> Result<Target> {
        let file = File::options().read(true).write(true).open(path).map_err(Error::io(path, "open it"))?;
        let wanted = lease::Options { wait: Duration::ZERO, ..lease::Options::default() };
        let lease = Lease::acquire(file.as_fd(), path, Mode::Write, wanted).map_err(|error| match error {
            LeaseError::Io { path, error } => Error::Io { path, doing: "lock it", error },
            other => Error::Refused(other.to_string()),
        })?;
        let unit = match &image.kind {
            Kind::Qcow2(kind) => kind.cluster_size,
            _ => RAW_UNIT as u64,
        };
        // Whole pieces: what is written of the next one is written again.
        let start = done / unit.max(PIECE as u64) * unit.max(PIECE as u64);
        let form = match &image.kind {
            Kind::Qcow2(kind) => {
                let kind = options(image, kind);
                let storage = file.try_clone().map_err(Error::io(path, "open it again"))?;
                let builder = if done == 0 {
                    Builder::new(storage, &kind)
                } else {
                    Builder::resume(storage, &kind, start)
                };
                Form::Qcow2(Box::new(builder.map_err(failed(path))?), Box::new(kind))
            }
            _ => Form::Raw,
        };
        Ok(Target {
            file,
            path: path.to_owned(),
            form,
            start,
            durable,
            writing: Mutex::default(),
            _lease: lease,
        })
    }

    /// Bytes of the disk that are read and written at once.
    pub(crate) fn piece(&self) -> usize {
        self.unit().max(PIECE)
    }

    /// From which offset of the disk on it is to be filled.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// The unit in bytes in which content is left out: all of it is zeroes, or what the base has.
    pub(crate) fn unit(&self) -> usize {
        match &self.form {
            Form::Raw => RAW_UNIT,
            Form::Qcow2(builder, _) => builder.layout().cluster_len(),
        }
    }

    /// What compresses for one thread.
    pub(crate) fn packer(&self) -> Result<Packer> {
        match &self.form {
            Form::Raw => Err(Error::Refused("the new image's format has no compression".to_owned())),
            Form::Qcow2(_, kind) => {
                Packer::new(kind.compression).map_err(Error::io(&self.path, "compress for it"))
            }
        }
    }

    /// Takes room for parts of a buffer that begins at `offset` of the disk: `plain` ones, and others in their compressed
    /// form, of that length. Parts are whole units. Gives where each compressed one goes, and where the others.
    pub(crate) fn place(
        &self,
        offset: u64,
        packed: &[(usize, usize)],
        plain: &[Range<usize>],
    ) -> Result<(Vec<u64>, Vec<Piece>)> {
        let Form::Qcow2(builder, _) = &self.form else {
            let piece = |part: &Range<usize>| Piece { from: part.clone(), to: offset + part.start as u64 };
            return Ok((Vec::new(), plain.iter().map(piece).collect()));
        };
        let bits = builder.layout().cluster_bits;
        let cluster = |at: usize| (offset + at as u64) >> bits;
        let packed: Vec<_> = packed.iter().map(|(at, len)| (cluster(*at), *len as u64)).collect();
        let size = builder.layout().cluster_size();
        let clusters = |part: &Range<usize>| {
            cluster(part.start)..(offset + part.end as u64).next_multiple_of(size) >> bits
        };
        let plain_clusters: Vec<_> = plain.iter().map(clusters).collect();
        let (hosts, placed) = builder.place(&packed, &plain_clusters).map_err(failed(&self.path))?;
        let end = plain.last().map_or(0, |part| part.end);
        let piece = |placed: vbd_qcow2::Placed| {
            let at = |cluster: u64| {
                usize::try_from((cluster << bits) - offset).expect("inside the buffer").min(end)
            };
            Piece { from: at(placed.clusters.start)..at(placed.clusters.end), to: placed.host }
        };
        Ok((hosts, placed.into_iter().map(piece).collect()))
    }

    /// Has a range of the disk, of whole units or to its end, read as zeroes whatever the base has.
    pub(crate) fn zero(&self, offset: u64, len: u64) -> Result<()> {
        // A raw image has no base, and begins as zeroes.
        let Form::Qcow2(builder, _) = &self.form else { return Ok(()) };
        let layout = builder.layout();
        let end = (offset + len).next_multiple_of(layout.cluster_size());
        builder.zero(offset >> layout.cluster_bits..end >> layout.cluster_bits).map_err(failed(&self.path))
    }

    /// Writes pieces of a buffer.
    pub(crate) fn write(&self, buffer: &[u8], pieces: &[Piece]) -> Result<()> {
        for piece in pieces {
            let bytes = &buffer[piece.from.clone()];
            {
                let _turn = lock(&self.writing);
                self.file.write_all_at(bytes, piece.to).map_err(Error::io(&self.path, "write to it"))?;
            }
            if self.durable {
                writeback::begin(&self.file, piece.to, bytes.len() as u64);
            }
        }
        Ok(())
    }

    /// Nothing below this offset of the disk will be written any more.
    pub(crate) fn settled(&self, below: u64) -> Result<()> {
        let Form::Qcow2(builder, _) = &self.form else { return Ok(()) };
        builder.settled(below).map_err(failed(&self.path))
    }

    /// Makes what was written durable, so that another job may go on from there.
    pub(crate) fn save(&self) -> Result<()> {
        if let Form::Qcow2(builder, _) = &self.form {
            builder.checkpoint().map_err(failed(&self.path))?;
        }
        self.sync()
    }

    /// Makes a whole image of it: durable, where it is to be.
    pub(crate) fn finish(&self) -> Result<()> {
        if let Form::Qcow2(builder, _) = &self.form {
            builder.finish().map_err(failed(&self.path))?;
        }
        if self.durable { self.sync() } else { Ok(()) }
    }

    fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(Error::io(&self.path, "make it durable"))
    }
}

fn failed(path: &Path) -> impl FnOnce(BuildError) -> Error {
    let path = path.to_owned();
    move |error| match error {
        BuildError::Io { doing, error } => Error::Io { path, doing, error },
        other => Error::Refused(format!("{}: {other}", path.display())),
    }
}
