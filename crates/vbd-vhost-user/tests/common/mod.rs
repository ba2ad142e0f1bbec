//! Servers on a disk in memory.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::cast_possible_truncation, reason = "sizes of tests are small")]

pub(crate) mod frontend;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vbd_ring::{Reactor, Settings};
use vbd_vhost_user::{Options, Server};

use vbd_testing::{Behaviour, MemDisk};

/// A served disk with its reactors, and a place for sockets. In this order, so that the server goes first.
pub(crate) struct Bench {
    pub(crate) server: Option<Server>,
    pub(crate) disk: Arc<Behaviour>,
    pub(crate) reactors: Vec<Reactor>,
    pub(crate) path: PathBuf,
    pub(crate) dir: tempfile::TempDir,
}

pub(crate) fn options() -> Options {
    Options { drain: Duration::from_millis(200), open_within: Duration::from_secs(20), ..Options::default() }
}

impl Bench {
    pub(crate) fn new() -> Self {
        Bench::with(1 << 20, options())
    }

    pub(crate) fn with(size: usize, options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let reactors = (0..2).map(|_| Reactor::spawn("test", Settings::default()).unwrap()).collect();
        let disk = MemDisk::new(size);
        let mut bench =
            Bench { server: None, disk: disk.0.clone(), reactors, path: dir.path().join("socket"), dir };
        bench.server = Some(bench.serve("socket", disk, options));
        bench
    }

    /// Serves a disk at another socket, on the same reactors.
    pub(crate) fn serve(&self, name: &str, disk: MemDisk, options: Options) -> Server {
        let handles = self.reactors.iter().map(Reactor::handle).collect();
        Server::bind(self.dir.path().join(name), Arc::new(disk), handles, options).unwrap()
    }

    pub(crate) fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }
}
