//! tools/vbd-load.
fn main() {}
