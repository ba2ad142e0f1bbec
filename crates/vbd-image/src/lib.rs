//! Image files: create, inspect, map, lock, and the raw format.

pub mod clock;
pub mod create;
pub mod host;
pub mod info;
pub mod lease;
pub mod map;
pub mod open;
pub mod partition;
pub mod probe;
pub mod raw;
mod read_at;
pub mod sidecar;
pub mod size;
pub mod writeback;

pub use read_at::ReadAt;
