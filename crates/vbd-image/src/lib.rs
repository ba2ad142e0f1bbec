//! Image files: create, inspect, map, lock, and the raw format.

pub mod size;
