//! The footer ("Hard Disk Footer Format").

use std::time::{Duration, SystemTime};

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FormatError, checksum, chs};

/// Bytes of a footer.
pub const FOOTER_LEN: usize = 512;

const COOKIE: [u8; 8] = *b"conectix";
const CHECKSUM: std::ops::Range<usize> = 64..68;
const VERSION: u32 = 0x0001_0000;
/// "Reserved. Must be set to 1", in the features.
const FEATURES: u32 = 2;
/// Where a fixed disk has no header.
const NO_OFFSET: u64 = u64::MAX;
/// Seconds from 1970 to 2000, where time stamps count from.
const EPOCH: u64 = 946_684_800;

/// What kind of disk a VHD is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All of its blocks are there, in order.
    Fixed,
    /// Blocks come when they are written.
    Dynamic,
    /// The same, and what is not there is its parent's.
    Differencing,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::Fixed => "fixed",
            Kind::Dynamic => "dynamic",
            Kind::Differencing => "differencing",
        })
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    cookie: [u8; 8],
    features: U32,
    version: U32,
    data_offset: U64,
    time_stamp: U32,
    creator: [u8; 4],
    creator_version: U32,
    creator_os: [u8; 4],
    original_size: U64,
    current_size: U64,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    kind: U32,
    checksum: U32,
    unique_id: [u8; 16],
    saved_state: u8,
    reserved: [u8; 427],
}

const _: () = assert!(size_of::<Raw>() == FOOTER_LEN);

/// A footer that was found good, or is to be written.
#[derive(Clone, PartialEq, Eq)]
pub struct Footer {
    /// Bit 0: the disk is to be deleted when the machine stops.
    pub features: u32,
    /// Where the dynamic disk header is, in bytes; all ones for a fixed disk.
    pub data_offset: u64,
    /// When it was made: seconds after 2000-01-01 UTC.
    pub time_stamp: u32,
    /// The program that made it.
    pub creator: [u8; 4],
    /// That program's version.
    pub creator_version: u32,
    /// That program's system.
    pub creator_os: [u8; 4],
    /// Bytes at first.
    pub original_size: u64,
    /// Bytes now.
    pub current_size: u64,
    /// Cylinders, heads, sectors for each track.
    pub geometry: (u16, u8, u8),
    /// The kind of disk.
    pub kind: Kind,
    /// What names the disk; a differencing disk names its parent by this.
    pub unique_id: [u8; 16],
    /// Not 0 where a machine that uses it is in a saved state.
    pub saved_state: u8,
    /// What the specification reserves, kept as it was.
    reserved: Box<[u8; 427]>,
}

impl std::fmt::Debug for Footer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "footer of a {} disk of {} bytes", self.kind, self.current_size)
    }
}

impl Footer {
    /// A footer of a new disk. `creator` "qem2" says, to QEMU too, that the size is what counts and not the geometry.
    pub fn new(kind: Kind, size: u64, unique_id: [u8; 16], now: SystemTime) -> Self {
        Footer {
            features: FEATURES,
            data_offset: if kind == Kind::Fixed { NO_OFFSET } else { FOOTER_LEN as u64 },
            time_stamp: time_stamp(now),
            creator: *b"qem2",
            creator_version: 0x0005_0003,
            creator_os: *b"Wi2k",
            original_size: size,
            current_size: size,
            geometry: chs(size / super::SECTOR),
            kind,
            unique_id,
            saved_state: 0,
            reserved: Box::new([0; 427]),
        }
    }

    /// Whether bytes begin as a footer does.
    pub fn has_mark(bytes: &[u8]) -> bool {
        bytes.starts_with(&COOKIE)
    }

    /// A footer from its bytes.
    ///
    /// # Errors
    /// They are no footer, it is damaged, or its version or kind is unknown.
    pub fn parse(bytes: &[u8; FOOTER_LEN]) -> Result<Self, FormatError> {
        let raw: Raw = zerocopy::transmute!(*bytes);
        if raw.cookie != COOKIE {
            return Err(FormatError::NotVhd);
        }
        let (found, wanted) = (raw.checksum.get(), checksum(bytes, CHECKSUM));
        if found != wanted {
            return Err(FormatError::FooterChecksum { found, wanted });
        }
        // The major version counts ("File Format Version").
        if raw.version.get() >> 16 != VERSION >> 16 {
            let found = format!("{:#010x}", raw.version.get());
            return Err(FormatError::value(
                "the file format version",
                found,
                "only 1.x (0x0001xxxx) is known",
            ));
        }
        let kind = match raw.kind.get() {
            2 => Kind::Fixed,
            3 => Kind::Dynamic,
            4 => Kind::Differencing,
            other => {
                return Err(FormatError::value(
                    "the disk type",
                    other,
                    "2 (fixed), 3 (dynamic) and 4 (differencing) are known",
                ));
            }
        };
        Ok(Footer {
            features: raw.features.get(),
            data_offset: raw.data_offset.get(),
            time_stamp: raw.time_stamp.get(),
            creator: raw.creator,
            creator_version: raw.creator_version.get(),
            creator_os: raw.creator_os,
            original_size: raw.original_size.get(),
            current_size: raw.current_size.get(),
            geometry: (raw.cylinders.get(), raw.heads, raw.sectors),
            kind,
            unique_id: raw.unique_id,
            saved_state: raw.saved_state,
            reserved: Box::new(raw.reserved),
        })
    }

    /// Its bytes, with the checksum.
    pub fn encode(&self) -> [u8; FOOTER_LEN] {
        let mut raw = Raw {
            cookie: COOKIE,
            features: self.features.into(),
            version: VERSION.into(),
            data_offset: self.data_offset.into(),
            time_stamp: self.time_stamp.into(),
            creator: self.creator,
            creator_version: self.creator_version.into(),
            creator_os: self.creator_os,
            original_size: self.original_size.into(),
            current_size: self.current_size.into(),
            cylinders: self.geometry.0.into(),
            heads: self.geometry.1,
            sectors: self.geometry.2,
            kind: match self.kind {
                Kind::Fixed => 2,
                Kind::Dynamic => 3,
                Kind::Differencing => 4u32,
            }
            .into(),
            checksum: 0.into(),
            unique_id: self.unique_id,
            saved_state: self.saved_state,
            reserved: *self.reserved,
        };
        raw.checksum = checksum(raw.as_bytes(), CHECKSUM).into();
        zerocopy::transmute!(raw)
    }

    /// The program that made it, as text.
    pub fn creator_name(&self) -> String {
        self.creator
            .iter()
            .map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { ' ' })
            .collect()
    }
}

/// A time as VHD counts it: seconds after 2000, as far as they can be told.
pub(crate) fn time_stamp(time: SystemTime) -> u32 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(EPOCH));
    since.map_or(0, |since| u32::try_from(since.as_secs()).unwrap_or(u32::MAX))
}
