//! Images of other programs, to be read and converted from: VMDK, VDI and VHDX.
//!
//! Each format gives a [`Layout`]: where each block of the disk is in the file. Its tables are read when
//! the image is opened, with bounds, and stay in memory; the rest is the same for all ([`Foreign`]).

mod bytes;
mod channel;
mod disk;
mod error;
pub mod layout;
pub mod vdi;
pub mod vhdx;
pub mod vmdk;

use std::fmt;

use vbd_image::ReadAt;

pub use disk::{Foreign, ForeignOptions};
pub use error::FormatError;
use layout::Layout;

/// The formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// VMware's: one file, sparse or compressed for streams.
    Vmdk,
    /// VirtualBox's.
    Vdi,
    /// Hyper-V's second.
    Vhdx,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Vmdk => "vmdk",
            Format::Vdi => "vdi",
            Format::Vhdx => "vhdx",
        })
    }
}

/// Reads the tables of an image of `len` bytes.
///
/// # Errors
/// It is no such image, one that cannot be read here, or damaged; or it cannot be read at all.
pub fn read(
    format: Format,
    source: &(impl ReadAt + ?Sized),
    len: u64,
) -> Result<Box<dyn Layout>, FormatError> {
    Ok(match format {
        Format::Vmdk => Box::new(vmdk::Vmdk::read(source, len)?),
        Format::Vdi => Box::new(vdi::Vdi::read(source, len)?),
        Format::Vhdx => Box::new(vhdx::Vhdx::read(source, len)?),
    })
}

/// What the fuzzer calls: a whole file, as each of the formats; and the parts of a VHDX, whose file would be large.
pub fn fuzz(bytes: &[u8]) {
    for format in [Format::Vmdk, Format::Vdi, Format::Vhdx] {
        walk(format, bytes);
    }
    walk(Format::Vhdx, &vhdx::assemble(bytes));
    vhdx::fuzz_log(bytes);
    let _ = vmdk::unpack(bytes, 65536);
}

/// Looks where the first blocks are.
fn walk(format: Format, bytes: &[u8]) {
    let Ok(layout) = read(format, bytes, bytes.len() as u64) else { return };
    let (size, mut at) = (layout.size(), 0);
    for _ in 0..64 {
        if at >= size {
            break;
        }
        let (_, len) = layout::find(&*layout, at, size - at);
        assert!(len > 0 && len <= size - at, "a run of {len} at {at} of {size}");
        at += len;
    }
}

/// Whether the parts of a VHDX, as [`fuzz`] takes them, make one that can be read: a corpus that does not would reach little.
pub fn opens_parts(bytes: &[u8]) -> bool {
    let file = vhdx::assemble(bytes);
    read(Format::Vhdx, &file[..], file.len() as u64).is_ok()
}
