//! What a device is told to look like: `struct ublk_params` with its basic and discard parts.

use vbd_core::{Capabilities, Geometry, SECTOR};

use crate::abi::{get, put};

const BASIC: u32 = 1 << 0;
const DISCARD: u32 = 1 << 1;
const READ_ONLY: u32 = 1 << 0;
const VOLATILE_CACHE: u32 = 1 << 2;
const FUA: u32 = 1 << 3;
/// The part that every version of the driver has.
const LEN: usize = 64;

/// Parameters of a device, as far as they matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parameters {
    pub(crate) sectors: u64,
    pub(crate) read_only: bool,
    write_cache: bool,
    block_shift: u8,
    physical_shift: u8,
    optimal_shift: u8,
    max_sectors: u32,
    granularity: u32,
    max_discard: u32,
    max_zeroes: u32,
}

impl Parameters {
    /// For a disk, with reads and writes of `max_io` bytes at most.
    pub(crate) fn new(geometry: &Geometry, capabilities: Capabilities, max_io: u32) -> Self {
        let block_shift = shift(u64::from(geometry.block_size), 9);
        let physical_shift = shift(u64::from(geometry.physical_block_size), block_shift);
        let writable = !capabilities.read_only;
        let limit = |bytes: u64| {
            // In whole blocks, as the driver's requests are.
            let bytes = bytes.min(u64::from(u32::MAX) * SECTOR) >> block_shift << block_shift;
            if writable { u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX) } else { 0 }
        };
        Parameters {
            sectors: geometry.size / SECTOR,
            read_only: capabilities.read_only,
            write_cache: capabilities.write_cache,
            block_shift,
            physical_shift,
            optimal_shift: shift(u64::from(geometry.optimal_size), physical_shift),
            max_sectors: max_io / 512,
            granularity: geometry.discard_granularity.max(1 << block_shift),
            max_discard: if capabilities.discard { limit(geometry.max_discard) } else { 0 },
            max_zeroes: limit(geometry.max_zeroes),
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN];
        put(&mut bytes, 0, u32::to_ne_bytes(64));
        put(&mut bytes, 4, (BASIC | DISCARD).to_ne_bytes());
        let flag = |set, flag| if set { flag } else { 0 };
        let attributes = flag(self.read_only, READ_ONLY) | flag(self.write_cache, VOLATILE_CACHE | FUA);
        put(&mut bytes, 8, attributes.to_ne_bytes());
        put(&mut bytes, 12, [self.block_shift, self.physical_shift, self.optimal_shift, self.physical_shift]);
        put(&mut bytes, 16, self.max_sectors.to_ne_bytes());
        put(&mut bytes, 24, self.sectors.to_ne_bytes());
        put(&mut bytes, 44, self.granularity.to_ne_bytes());
        put(&mut bytes, 48, self.max_discard.to_ne_bytes());
        put(&mut bytes, 52, self.max_zeroes.to_ne_bytes());
        let segments: u16 = 1;
        put(&mut bytes, 56, segments.to_ne_bytes());
        bytes
    }

    /// What to send to be told those of a device.
    pub(crate) fn question() -> Vec<u8> {
        let mut bytes = vec![0; LEN];
        put(&mut bytes, 0, u32::to_ne_bytes(64));
        bytes
    }

    /// None where there are too few bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let attributes = u32::from_ne_bytes(get(bytes, 8)?);
        let [block_shift, physical_shift, optimal_shift, _] = get(bytes, 12)?;
        Some(Parameters {
            sectors: u64::from_ne_bytes(get(bytes, 24)?),
            read_only: attributes & READ_ONLY != 0,
            write_cache: attributes & VOLATILE_CACHE != 0,
            block_shift,
            physical_shift,
            optimal_shift,
            max_sectors: u32::from_ne_bytes(get(bytes, 16)?),
            granularity: u32::from_ne_bytes(get(bytes, 44)?),
            max_discard: u32::from_ne_bytes(get(bytes, 48)?),
            max_zeroes: u32::from_ne_bytes(get(bytes, 52)?),
        })
    }
}

/// The power of two that `size` is, rounded down, and not below `least`.
fn shift(size: u64, least: u8) -> u8 {
    u8::try_from(size.checked_ilog2().unwrap_or(0)).unwrap_or(0).max(least)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry {
            size: 1 << 30,
            block_size: 512,
            physical_block_size: 4096,
            optimal_size: 0,
            discard_granularity: 4096,
            max_discard: u64::MAX,
            max_zeroes: 1 << 31,
        }
    }

    fn capabilities() -> Capabilities {
        Capabilities { read_only: false, write_cache: true, discard: true, fast_zeroes: true, grow: true }
    }

    #[test]
    fn a_disk_as_the_driver_sees_it() {
        let parameters = Parameters::new(&geometry(), capabilities(), 1 << 19);
        let bytes = parameters.bytes();
        assert_eq!(Parameters::from_bytes(&bytes), Some(parameters));
        assert_eq!(bytes.len(), 64);
        // Write cache and FUA; 512-byte blocks on 4 KiB ones; 512 KiB in a request; 2 Mi sectors.
        assert_eq!(bytes[8..16], [12, 0, 0, 0, 9, 12, 12, 12]);
        assert_eq!(u32::from_ne_bytes(get(&bytes, 16).expect("there")), 1024);
        assert_eq!(parameters.sectors, 1 << 21);
        assert_eq!((parameters.max_discard, parameters.max_zeroes), (u32::MAX, 1 << 22));
    }

    #[test]
    fn what_a_disk_cannot_do_is_not_offered() {
        let none = Capabilities { discard: false, write_cache: false, ..capabilities() };
        let parameters = Parameters::new(&geometry(), none, 1 << 19);
        assert_eq!((parameters.max_discard, parameters.bytes()[8]), (0, 0));
        assert_ne!(parameters.max_zeroes, 0);
        let read_only = Capabilities { read_only: true, ..capabilities() };
        let parameters = Parameters::new(&geometry(), read_only, 1 << 19);
        assert_eq!((parameters.max_discard, parameters.max_zeroes), (0, 0));
        assert_eq!(parameters.bytes()[8] & 1, 1);
    }

    #[test]
    fn limits_are_whole_blocks() {
        let geometry = Geometry { block_size: 4096, max_zeroes: 10_000, ..geometry() };
        let parameters = Parameters::new(&geometry, capabilities(), 1 << 19);
        assert_eq!((parameters.max_zeroes, parameters.max_discard % 8), (16, 0));
    }
}
