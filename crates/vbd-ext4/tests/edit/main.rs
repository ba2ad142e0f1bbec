//! Filesystems changed in place by vbd-ext4: held against e2fsck, the kernel, a model in memory, and power cuts.

mod failing;
mod grown;
mod hostile;
mod images;
mod model;
mod operations;
mod power;
mod properties;
mod quota;
mod refused;
mod shrunk;
