//! The bench that end-to-end tests and the demo stand on: a Debian kernel, a small guest that takes
//! commands, the programs that serve disks to it, and processes that never outlive their test.
//!
//! Everything downloaded or made once is kept in `target/vm`; everything a test makes lives in a
//! [`Scratch`] directory and goes with it.

mod control;
mod cpu;
mod guest;
mod initramfs;
mod inside;
mod kernel;
mod paths;
mod process;
mod scratch;
mod server;
mod tools;
mod transcript;

pub use cpu::cpu_time;
pub use guest::{Disk, Drive, Guest, Machine, Outcome};
pub use initramfs::Initramfs;
pub use kernel::Kernel;
pub use paths::{cache_dir, target_dir, vbd};
pub use process::{Finished, Process, command, run, run_ok};
pub use scratch::{Scratch, allocated};
pub use server::{Attach, Server};
pub use tools::tools_disk;
pub use transcript::Transcript;
