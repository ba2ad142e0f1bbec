//! The normal way, with a driver that others wrote, on real files.

mod common;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{Ordering, fence};

use rustix::event::{PollFd, PollFlags, poll};
use vbd_image::raw::{Raw, RawOptions};
use vbd_ring::{EngineKind, Reactor, Settings};
use vbd_vhost_user::{Options, Server};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags as Blk, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags as Virtio,
};

struct Driver {
    // In this order: the queues lie in memory of the transport.
    queues: Vec<VirtioBlkQueue<'static, usize>>,
    kicks: Vec<Box<dyn QueueNotifier>>,
    calls: Vec<std::sync::Arc<EventFd>>,
    memory: Shared,
    transport: Box<VirtioBlkTransport>,
}

/// Memory that both sides see.
struct Shared {
    base: *mut u8,
    len: usize,
    file: OwnedFd,
}

impl Shared {
    fn new(len: usize) -> Self {
        let guest = common::frontend::Guest::new(0, len);
        let (file, base) = (guest.file.try_clone().unwrap(), guest.user(0) as *mut u8);
        // Requests borrow from it without end.
        std::mem::forget(guest);
        Shared { base, len, file }
    }

    fn slice(&self, at: usize, len: usize) -> &'static mut [u8] {
        assert!(at + len <= self.len);
        // SAFETY: the mapping lives as long as the process, and tests use each part for one request at a time.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(at), len) }
    }
}

impl Driver {
    fn connect(socket: &Path, queues: usize, features: Virtio) -> Self {
        let blk = Blk::MQ | Blk::RO | Blk::FLUSH | Blk::DISCARD | Blk::WRITE_ZEROES;
        let features = (Virtio::VERSION_1 | features).bits() | blk.bits();
        let mut transport: Box<VirtioBlkTransport> =
            Box::new(VhostUser::new(socket.to_str().unwrap(), features).unwrap());
        let memory = Shared::new(8 << 20);
        transport.map_mem_region(memory.base as usize, memory.len, memory.file.as_raw_fd(), 0).unwrap();
        let queues = VirtioBlkQueue::setup_queues(transport.as_mut(), queues, 64).unwrap();
        let kicks = (0..queues.len()).map(|index| transport.get_submission_notifier(index)).collect();
        let calls = (0..queues.len()).map(|index| transport.get_completion_fd(index)).collect();
        Driver { queues, kicks, calls, memory, transport }
    }

    /// Kicks a queue and waits for so many completions: contexts and results.
    fn finish(&mut self, queue: usize, count: usize) -> Vec<(usize, i32)> {
        self.kicks[queue].notify().unwrap();
        let mut done = Vec::new();
        loop {
            self.queues[queue].set_used_notif_enabled(true);
            fence(Ordering::SeqCst);
            done.extend(
                self.queues[queue].completions().map(|completion| (completion.context, completion.ret)),
            );
            if done.len() >= count {
                return done;
            }
            let call = &*self.calls[queue];
            let fd = call.as_fd();
            assert_eq!(
                poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&seconds(20))),
                Ok(1),
                "no interrupt"
            );
            let _ = call.read();
        }
    }
}

fn seconds(seconds: i64) -> rustix::event::Timespec {
    rustix::event::Timespec { tv_sec: seconds, tv_nsec: 0 }
}

struct Bench {
    _server: Server,
    _reactors: Vec<Reactor>,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(engine: EngineKind, read_only: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("disk")).unwrap();
        file.set_len(64 << 20).unwrap();
        let settings = Settings { engine, ..Settings::default() };
        let reactors: Vec<_> = (0..2).map(|_| Reactor::spawn("test", settings.clone()).unwrap()).collect();
        let handles = reactors.iter().map(Reactor::handle).collect();
        let disk = Raw::new(RawOptions { read_only, ..RawOptions::new(dir.path().join("disk")) });
        let server = Server::bind(dir.path().join("socket"), disk, handles, Options::default()).unwrap();
        Bench { _server: server, _reactors: reactors, dir }
    }

    fn connect(&self, queues: usize, features: Virtio) -> Driver {
        Driver::connect(&self.dir.path().join("socket"), queues, features)
    }
}

fn read_back(engine: EngineKind, features: Virtio) {
    let bench = Bench::new(engine, false);
    let mut driver = bench.connect(4, features);
    let config = driver.transport.get_config().unwrap();
    assert_eq!(u64::from(config.capacity), 131072);
    // Each queue its own quarter, eight requests at a time, many times around its ring.
    let place = |queue: usize, turn: usize, slot: usize| {
        let offset = (queue << 24) + (turn * 8 + slot) * 8192;
        (offset as u64, u8::try_from((queue * 61 + turn * 7 + slot) % 255).unwrap() + 1)
    };
    for turn in 0..50 {
        for queue in 0..4 {
            for slot in 0..8 {
                let (offset, byte) = place(queue, turn, slot);
                let buffer = driver.memory.slice((queue * 8 + slot) * 8192, 8192);
                buffer.fill(byte);
                driver.queues[queue].write(offset, buffer, slot).unwrap();
            }
        }
        for queue in 0..4 {
            let mut done = driver.finish(queue, 8);
            done.sort_unstable();
            assert_eq!(done, (0..8).map(|slot| (slot, 0)).collect::<Vec<_>>());
        }
    }
    driver.queues[0].flush(9).unwrap();
    assert_eq!(driver.finish(0, 1), [(9, 0)]);
    driver.queues[1].discard(0, 1 << 20, 1).unwrap();
    assert_eq!(driver.finish(1, 1), [(1, 0)]);
    driver.queues[2].write_zeroes(1 << 24, 8192, true, 2).unwrap();
    assert_eq!(driver.finish(2, 1), [(2, 0)]);
    for queue in 0..4 {
        for turn in 0..50 {
            for slot in 0..8 {
                let (offset, _) = place(queue, turn, slot);
                let buffer = driver.memory.slice(slot * 8192, 8192);
                driver.queues[queue].read(offset, buffer, slot).unwrap();
            }
            assert!(driver.finish(queue, 8).iter().all(|(_, result)| *result == 0));
            for slot in 0..8 {
                let (offset, byte) = place(queue, turn, slot);
                let zero = offset < 1 << 20 || offset == 1 << 24;
                let expected = if zero { 0 } else { byte };
                assert!(
                    driver.memory.slice(slot * 8192, 8192).iter().all(|byte| *byte == expected),
                    "{offset}"
                );
            }
        }
    }
    driver.queues[0].read(64 << 20, driver.memory.slice(0, 512), 0).unwrap();
    assert_ne!(driver.finish(0, 1)[0].1, 0);
}

#[test]
fn what_was_written_is_read_back() {
    read_back(EngineKind::Auto, Virtio::RING_EVENT_IDX | Virtio::RING_INDIRECT_DESC);
}

#[test]
fn without_event_index() {
    read_back(EngineKind::Auto, Virtio::empty());
}

#[test]
fn without_io_uring() {
    read_back(EngineKind::Threads, Virtio::RING_EVENT_IDX);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let bench = Bench::new(EngineKind::Auto, true);
    let mut driver = bench.connect(1, Virtio::RING_EVENT_IDX);
    assert_ne!(driver.transport.get_features() & Blk::RO.bits(), 0);
    let buffer = driver.memory.slice(0, 512);
    let refused = driver.queues[0].write(0, buffer, 0);
    if refused.is_ok() {
        assert_ne!(driver.finish(0, 1)[0].1, 0);
    }
    driver.queues[0].read(0, driver.memory.slice(0, 512), 1).unwrap();
    assert_eq!(driver.finish(0, 1), [(1, 0)]);
}
