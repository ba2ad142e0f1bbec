//! Feature bits and the configuration space (virtio 1.2, section 5.2.4).

use vbd_core::{Capabilities, Geometry, SECTOR};

use crate::request::MOST_SEGMENTS;

/// Feature bits that this device knows.
pub(crate) mod feature {
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const READ_ONLY: u64 = 1 << 5;
    pub(crate) const BLOCK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const CONFIG_WCE: u64 = 1 << 11;
    pub(crate) const MQ: u64 = 1 << 12;
    pub(crate) const DISCARD: u64 = 1 << 13;
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
    pub(crate) const LOG_ALL: u64 = 1 << 26;
    pub(crate) const INDIRECT: u64 = 1 << 28;
    pub(crate) const EVENT_INDEX: u64 = 1 << 29;
    pub(crate) const PROTOCOL: u64 = 1 << 30;
    pub(crate) const VERSION_1: u64 = 1 << 32;
}

/// Data segments in a request: what a queue of 128 entries has room for beside header and status.
pub(crate) const SEGMENTS: u16 = 126;

/// Bytes of the configuration space that have a meaning; what is read behind them is zero.
pub(crate) const LEN: usize = 60;
/// Where the cache mode is, the one byte that a guest may write.
pub(crate) const WRITEBACK: usize = 32;

/// The features to offer.
pub(crate) fn features(capabilities: &Capabilities) -> u64 {
    use feature::*;
    let always =
        SEG_MAX | BLOCK_SIZE | TOPOLOGY | MQ | LOG_ALL | INDIRECT | EVENT_INDEX | PROTOCOL | VERSION_1;
    let when = |condition: bool, bits: u64| if condition { bits } else { 0 };
    always
        | when(capabilities.write_cache, FLUSH | CONFIG_WCE)
        | when(capabilities.read_only, READ_ONLY)
        | when(!capabilities.read_only, WRITE_ZEROES)
        | when(!capabilities.read_only && capabilities.discard, DISCARD)
}

/// What the space is made from.
pub(crate) struct Space {
    pub(crate) geometry: Geometry,
    pub(crate) capabilities: Capabilities,
    pub(crate) writeback: bool,
    pub(crate) queues: u16,
    /// Entries of the smallest queue, where that is known.
    pub(crate) queue_size: Option<u16>,
}

impl Space {
    /// The space as bytes.
    pub(crate) fn encode(&self) -> [u8; LEN] {
        let geometry = &self.geometry;
        let block = geometry.block_size.max(512);
        let blocks = |bytes: u32| bytes / block;
        let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX);
        let exponent = (geometry.physical_block_size.max(block) / block).checked_ilog2().unwrap_or(0);
        let segments = self.queue_size.map_or(SEGMENTS, |size| size.saturating_sub(2).clamp(1, SEGMENTS));
        let most_segments = u32::try_from(MOST_SEGMENTS).unwrap_or(1);

        let mut bytes = [0; LEN];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &(geometry.size / SECTOR).to_le_bytes());
        put(12, &u32::from(segments).to_le_bytes());
        put(20, &block.to_le_bytes());
        put(24, &[u8::try_from(exponent).unwrap_or(0)]);
        // Alignment offset 0; smallest good transfer: a physical block.
        put(26, &(1u16 << exponent.min(15)).to_le_bytes());
        put(28, &blocks(geometry.optimal_size).to_le_bytes());
        put(WRITEBACK, &[u8::from(self.writeback)]);
        put(34, &self.queues.to_le_bytes());
        if !self.capabilities.read_only {
            put(36, &sectors(geometry.max_discard).to_le_bytes());
            put(40, &most_segments.to_le_bytes());
            put(44, &sectors(geometry.discard_granularity.into()).max(1).to_le_bytes());
            put(48, &sectors(geometry.max_zeroes).to_le_bytes());
            put(52, &most_segments.to_le_bytes());
            put(56, &[u8::from(self.capabilities.discard)]);
        }
        bytes
    }
}
