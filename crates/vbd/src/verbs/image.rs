//! Options that verbs on images of any format share.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use vbd_formats::{Format, Gate, ImageSpec, Kind, NewImage};
use vbd_image::size::Size;
use vbd_luks::Secret;
use vbd_qcow2::format::Compression;
use vbd_qcow2::{Backing, CreateOptions, Version};

use crate::UsageError;

/// Which image, and what it may name.
#[derive(clap::Args, Clone)]
pub(super) struct ImageArgs {
    /// The format of the file, raw unless said; it is never guessed
    #[arg(long)]
    pub(super) format: Option<Format>,
    #[command(flatten)]
    pub(super) gate: GateArgs,
    #[command(flatten)]
    pub(super) key: KeyArgs,
}

/// What unlocks an encrypted image.
#[derive(clap::Args, Clone)]
pub(super) struct KeyArgs {
    /// The file with the key of an encrypted image: all of its bytes
    #[arg(long, value_name = "FILE", conflicts_with = "key_fd")]
    pub(super) key_file: Option<PathBuf>,
    /// The descriptor with that key, which this process is given by number (`3<key`, or of a pipe)
    #[arg(long, value_name = "N")]
    pub(super) key_fd: Option<i32>,
}

impl KeyArgs {
    /// The key, where there is one.
    pub(super) fn secret(&self) -> anyhow::Result<Option<Secret>> {
        Ok(Secret::from_either(self.key_file.as_deref(), self.key_fd)?)
    }
}

/// What images may name.
#[derive(clap::Args, Clone)]
pub(super) struct GateArgs {
    /// A directory, besides the file's own, where it may name backing files and data files; may be given again
    #[arg(long, value_name = "DIR")]
    pub(super) allow_dir: Vec<PathBuf>,
}

impl GateArgs {
    pub(super) fn gate(&self) -> Gate {
        Gate::new(self.allow_dir.clone())
    }
}

impl ImageArgs {
    /// The format that was told, or raw, if the file does not look like something else.
    pub(super) fn format(&self, file: &Path) -> anyhow::Result<Format> {
        super::format_of(file, self.format, "--format")
    }

    /// The image that is named so.
    pub(super) fn spec(&self, file: &Path) -> anyhow::Result<ImageSpec> {
        let format = self.format(file)?;
        let secret = self.key.secret()?;
        Ok(ImageSpec { gate: self.gate.gate(), secret, ..ImageSpec::new(file, format) })
    }
}

/// How a new image is to be, beyond its format.
#[derive(clap::Args)]
#[command(next_help_heading = "Formats with clusters (qcow2, vhd)")]
pub(super) struct KindArgs {
    /// The image that it stands on: what is not written yet is read from there. The name is written into the new image,
    /// and a relative one begins where that is
    #[arg(long, value_name = "FILE")]
    pub(super) backing: Option<PathBuf>,
    /// The format of that image, raw unless said; it is never guessed
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<Format>,
    /// Bytes in a cluster, the unit of allocation: 512 to 2M, 64K by default; of a vhd's block, 2M by default
    #[arg(long, value_name = "SIZE")]
    cluster_size: Option<Size>,
    /// A vhd with all of its bytes in order, instead of one that grows
    #[arg(long)]
    fixed: bool,
    /// Bits of a reference count: 1, 2, 4, 8, 16 (the default), 32 or 64
    #[arg(long, value_name = "BITS")]
    refcount_bits: Option<u32>,
    /// The version of the format: 2, for programs before 2013, or 3
    #[arg(long, value_name = "VERSION", value_parser = clap::value_parser!(u32).range(2..=3))]
    compat: Option<u32>,
    /// Write reference counts late: allocating costs less, and after a crash they are counted anew
    #[arg(long)]
    lazy_refcounts: bool,
    /// Give each cluster 32 subclusters, of which each is allocated by itself
    #[arg(long)]
    extended_l2: bool,
    /// How clusters are compressed, where they are: zlib or zstd
    #[arg(long, value_name = "HOW")]
    compression: Option<Compress>,
    /// Encrypt what guests write, with LUKS and a new key
    #[arg(long)]
    pub(super) encrypt: bool,
}

/// A way to compress clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Compress {
    /// Deflate, which every program knows
    Zlib,
    /// Zstandard, faster and smaller
    Zstd,
}

impl From<Compress> for Compression {
    fn from(how: Compress) -> Self {
        match how {
            Compress::Zlib => Compression::Zlib,
            Compress::Zstd => Compression::Zstd,
        }
    }
}

impl KindArgs {
    /// The backing file's format, and its file as it will be found from the new image.
    fn backing(&self, image: &Path) -> anyhow::Result<Option<Backing>> {
        let Some(backing) = &self.backing else { return Ok(None) };
        let file = image.parent().unwrap_or(Path::new("")).join(backing);
        let format = super::format_of(&file, self.backing_format, "--backing-format")?;
        Ok(Some(Backing {
            name: backing.as_os_str().as_bytes().to_vec(),
            format: format.in_images().to_owned(),
        }))
    }

    /// A new image at `path`; its size is still to be set.
    pub(super) fn image(&self, path: &Path, format: Format, replace: bool) -> anyhow::Result<NewImage> {
        let mut image = NewImage { replace, ..NewImage::new(format, 0)? };
        match &mut image.kind {
            Kind::Qcow2(options) => {
                let defaults = CreateOptions::default();
                **options = CreateOptions {
                    version: if self.compat == Some(2) { Version::V2 } else { Version::V3 },
                    cluster_size: self.cluster_size.map_or(defaults.cluster_size, Size::bytes),
                    refcount_bits: self.refcount_bits.unwrap_or(defaults.refcount_bits),
                    lazy_refcounts: self.lazy_refcounts,
                    extended_l2: self.extended_l2,
                    compression: self.compression.map_or(defaults.compression, Compression::from),
                    backing: self.backing(path)?,
                    ..defaults
                };
                options.validate().map_err(|error| UsageError(error.to_string()))?;
                refuse(&[(self.fixed, "--fixed")], "vhd", format)?;
            }
            Kind::Vhd(kind) => {
                self.only_for_qcow2(format)?;
                kind.fixed = self.fixed;
                let block = self.cluster_size.map(|size| u32::try_from(size.bytes()));
                kind.block_size =
                    block.transpose().map_err(|_| UsageError("--cluster-size: at most 256M".to_owned()))?;
                kind.parent = match &self.backing {
                    Some(backing) => {
                        let file = path.parent().unwrap_or(Path::new("")).join(backing);
                        let format = super::format_of(&file, self.backing_format, "--backing-format")?;
                        Some((backing.clone(), format))
                    }
                    None => None,
                };
            }
            Kind::Raw { .. } | Kind::Luks => {
                self.only_for_qcow2(format)?;
                let given = [
                    (self.backing.is_some(), "--backing"),
                    (self.cluster_size.is_some(), "--cluster-size"),
                    (self.fixed, "--fixed"),
                ];
                refuse(&given, "qcow2 and vhd", format)?;
            }
        }
        Ok(image)
    }

    fn only_for_qcow2(&self, format: Format) -> anyhow::Result<()> {
        let given = [
            (self.refcount_bits.is_some(), "--refcount-bits"),
            (self.compat.is_some(), "--compat"),
            (self.lazy_refcounts, "--lazy-refcounts"),
            (self.extended_l2, "--extended-l2"),
            (self.compression.is_some(), "--compression"),
            (self.encrypt, "--encrypt"),
        ];
        refuse(&given, "qcow2", format)
    }
}

/// Refuses the first option that was given and is for other formats.
fn refuse(given: &[(bool, &str)], formats: &str, format: Format) -> anyhow::Result<()> {
    match given.iter().find(|(given, _)| *given) {
        Some((_, option)) => {
            let message = format!(
                "{option} is for images of the format {formats}: a {format} image has nothing of that"
            );
            Err(UsageError(message).into())
        }
        None => Ok(()),
    }
}

/// A size to change to: `2G`, or `+2G` for more than now.
#[derive(Clone, Copy, Debug)]
pub(super) enum NewSize {
    /// This.
    To(Size),
    /// More by this.
    By(Size),
}

impl FromStr for NewSize {
    type Err = vbd_image::size::SizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix('+') {
            Some(more) => Ok(NewSize::By(more.parse()?)),
            None => Ok(NewSize::To(text.parse()?)),
        }
    }
}
