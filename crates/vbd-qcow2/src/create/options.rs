//! What a new image is to be like, and which wishes do not go together.

use std::path::PathBuf;

use super::CreateError;
use crate::format::{Compression, RefcountWidth, limit};

/// The version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Version {
    /// The first, which QEMU calls compatibility level 0.10.
    V2,
    /// The present one, which QEMU calls compatibility level 1.1.
    #[default]
    V3,
}

/// Room that is set aside for guest data when an image is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// None.
    #[default]
    Off,
    /// Every cluster has its place; the file has holes there.
    Metadata,
    /// Every cluster has its place, and the filesystem keeps the room for it.
    Falloc,
    /// Every cluster has its place, and zeros were written to it.
    Full,
}

/// The file that has what a new image does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its name as it is written into the image: relative names are relative to the image.
    pub name: Vec<u8>,
    /// Its format, such as `raw` or `qcow2`. An image without it makes others guess, so it is no option.
    pub format: String,
}

/// The file that holds guest data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Its name as it is written into the image: relative names are relative to the image.
    pub path: PathBuf,
    /// Whether it always reads as a raw image.
    pub raw: bool,
    /// Whether the file that is there is used with what is in it; otherwise one is made.
    pub keep: bool,
}

/// What a new image is to be like. `CreateOptions { size, ..Default::default() }` is what QEMU makes without options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the virtual disk; rounded up to whole sectors of 512 bytes.
    pub size: u64,
    /// The version of the format.
    pub version: Version,
    /// Bytes in a cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Bits of a reference count: a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Whether clusters have subclusters.
    pub extended_l2: bool,
    /// How clusters are compressed, where they are.
    pub compression: Compression,
    /// The backing file.
    pub backing: Option<Backing>,
    /// The external data file.
    pub data_file: Option<DataFile>,
    /// The LUKS header with its key material, if guest data is to be encrypted.
    pub luks_header: Option<Vec<u8>>,
    /// Room that is set aside for guest data.
    pub preallocation: Preallocation,
    /// Whether a file that is there is replaced.
    pub replace: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        CreateOptions {
            size: 0,
            version: Version::V3,
            cluster_size: 65_536,
            refcount_bits: 16,
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            luks_header: None,
            preallocation: Preallocation::Off,
            replace: false,
        }
    }
}

impl CreateOptions {
    /// Whether an image can be like that.
    ///
    /// # Errors
    ///
    /// What does not go together is said, with what to change. It is what QEMU refuses, too.
    pub fn validate(&self) -> Result<(), CreateError> {
        let refuse = |reason: String| Err(CreateError::Refused(reason));
        let bits = self.cluster_size.trailing_zeros();
        if !self.cluster_size.is_power_of_two() || !limit::CLUSTER_BITS.contains(&bits) {
            let size = self.cluster_size;
            return refuse(format!(
                "a cluster size of {size}: it is a power of two from 512 to 2 MiB (2097152)"
            ));
        }
        if RefcountWidth::from_bits(self.refcount_bits).is_err() {
            let bits = self.refcount_bits;
            return refuse(format!("refcounts of {bits} bits: it is 1, 2, 4, 8, 16, 32 or 64"));
        }
        if self.size > limit::SIZE {
            return refuse(format!("a disk of {} bytes: it has at most {}", self.size, limit::SIZE));
        }
        if self.version == Version::V2 {
            let wishes = [
                (self.lazy_refcounts, "lazy refcounts"),
                (self.refcount_bits != 16, "refcounts of other than 16 bits"),
                (self.extended_l2, "subclusters (extended L2 entries)"),
                (self.compression != Compression::Zlib, "compression other than zlib"),
                (self.data_file.is_some(), "an external data file"),
                (self.luks_header.is_some(), "LUKS encryption"),
            ];
            if let Some((_, wish)) = wishes.iter().find(|(wished, _)| *wished) {
                return refuse(format!("version 2 of the format has no {wish}; make version 3"));
            }
        }
        if self.extended_l2 && bits < limit::EXTENDED_L2_CLUSTER_BITS {
            return refuse("subclusters (extended L2 entries) take clusters of at least 16 KiB".to_owned());
        }
        if let Some(backing) = &self.backing {
            if self.preallocation != Preallocation::Off && !self.extended_l2 {
                return refuse(
                    "a preallocated cluster hides what the backing file has; leave out one of the two, or use \
                     subclusters (extended L2 entries)"
                        .to_owned(),
                );
            }
            if self.data_file.as_ref().is_some_and(|data| data.raw) {
                return refuse(
                    "a raw external data file has all of the disk, so there can be no backing file"
                        .to_owned(),
                );
            }
            if backing.name.is_empty()
                || backing.name.len() > limit::BACKING_NAME as usize
                || backing.name.contains(&0)
            {
                return refuse(format!(
                    "the name of a backing file has 1 to {} bytes, none of them 0",
                    limit::BACKING_NAME
                ));
            }
            if backing.format.is_empty() {
                return refuse("the format of the backing file is missing; say which it is".to_owned());
            }
        }
        if let Some(data) = &self.data_file {
            if data.path.as_os_str().is_empty() {
                return refuse("the name of the external data file is missing".to_owned());
            }
            if data.keep && self.preallocation != Preallocation::Off {
                return refuse(
                    "an external data file that is there is not preallocated; leave that out".to_owned(),
                );
            }
        }
        if let Some(header) = &self.luks_header
            && (header.is_empty() || header.len() as u64 > limit::CRYPTO_BYTES)
        {
            return refuse(format!(
                "a LUKS header has at most {} bytes, this one {}",
                limit::CRYPTO_BYTES,
                header.len()
            ));
        }
        if self.luks_header.is_some() && self.data_file.as_ref().is_some_and(|data| data.raw) {
            return refuse(
                "what is encrypted does not read as a raw image; leave out one of the two".to_owned(),
            );
        }
        Ok(())
    }
}
