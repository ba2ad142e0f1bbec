//! What is in a VHD file, as structures. The specification is Microsoft's "Virtual Hard Disk Image Format
//! Specification", version 1.0; sections are named by their titles. Numbers are big-endian.
//!
//! A fixed disk is its content and a footer. A dynamic or differencing one begins with a copy of the footer and a
//! header, has a table (BAT) with the place of each block, then the blocks, each behind a bitmap of its sectors, and ends
//! with the footer.

mod footer;
mod head;
mod header;
mod locator;
mod size;

pub(crate) use footer::time_stamp;
pub use footer::{FOOTER_LEN, Footer, Kind};
pub use head::{FooterPlace, Head};
pub use header::{DynamicHeader, HEADER_LEN};
pub use locator::{LOCATORS, Locator, ParentName};
pub(crate) use locator::{encode_url, encode_windows};
pub use size::{MOST_BYTES, SizeRule, chs, chs_bytes};

/// The unit of everything in a VHD: a sector of 512 bytes.
pub const SECTOR: u64 = 512;

/// The entry of a block that has no place.
pub const UNUSED: u32 = u32::MAX;

/// The most entries of a BAT that are taken into memory (64 MiB).
pub const MOST_ENTRIES: u32 = 1 << 24;

/// Why bytes are no VHD that can be used.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// There is no footer.
    #[error("is no VHD: neither its end nor its start has the mark \"conectix\"")]
    NotVhd,
    /// Both footers are damaged.
    #[error(
        "the footer's checksum is {found:#010x} and should be {wanted:#010x}, and there is no good copy of it"
    )]
    FooterChecksum {
        /// What is there.
        found: u32,
        /// What the bytes add up to.
        wanted: u32,
    },
    /// A value that is not allowed.
    #[error("{field} is {found}; {allowed}")]
    Value {
        /// The field, as the specification names it.
        field: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// The header is damaged.
    #[error("the dynamic disk header's checksum is {found:#010x} and should be {wanted:#010x}")]
    HeaderChecksum {
        /// What is there.
        found: u32,
        /// What the bytes add up to.
        wanted: u32,
    },
    /// The file ends too early.
    #[error("the file has {len} bytes, and {what} needs {needed}: it was truncated")]
    Truncated {
        /// What does not fit.
        what: &'static str,
        /// The file's length.
        len: u64,
        /// Where that would end.
        needed: u64,
    },
    /// It cannot be read.
    #[error("cannot read it: {0}")]
    Io(#[from] std::io::Error),
}

impl FormatError {
    fn value(field: &'static str, found: impl ToString, allowed: &'static str) -> Self {
        FormatError::Value { field, found: found.to_string(), allowed }
    }
}

/// The one's complement of the sum of all bytes outside the checksum itself ("Hard Disk Footer Format", Checksum).
fn checksum(bytes: &[u8], field: std::ops::Range<usize>) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    !sum(bytes).wrapping_sub(sum(&bytes[field]))
}
