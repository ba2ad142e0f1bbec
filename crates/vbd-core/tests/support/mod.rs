//! Files for tests, and the clients that use them.
#![allow(dead_code, unused_imports, reason = "each test uses a part of it")]

use std::path::Path;
use std::sync::Arc;

use vbd_core::file::{Backend, Options};

pub(crate) use vbd_testing::client::{Answer, Ask, Client, channel_of_this_thread, is_closed};

/// A file of this length in `dir`, opened.
pub(crate) fn file(dir: &Path, len: u64, options: Options) -> Arc<Backend> {
    let path = dir.join("disk");
    std::fs::File::create(&path).and_then(|file| file.set_len(len)).expect("a file");
    Backend::open(&path, options).expect("openable")
}

/// A directory on a real disk, next to the build, where O_DIRECT works as the machine has it.
pub(crate) fn on_disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

/// A directory in memory.
pub(crate) fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a directory")
}

/// Waits for something that comes soon.
pub(crate) fn until(what: &str, done: impl Fn() -> bool) {
    for _ in 0..2000 {
        if done() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("{what} never came");
}
