//! A disk asked from ordinary threads.

use std::sync::Arc;
use std::time::Duration;

use vbd_core::client::{Ask, Buffer};
use vbd_core::file::{Cache, Fault};
use vbd_core::{Client, Disk, ErrorKind, ExtentKind, Operation};
use vbd_image::ReadAt;
use vbd_image::lease;
use vbd_image::raw::{Raw, RawOptions};
use vbd_ring::{Op, Reactor, Settings};

const SIZE: u64 = 64 << 20;

fn sparse(dir: &tempfile::TempDir) -> std::path::PathBuf {
    let path = dir.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    path
}

#[test]
fn what_threads_write_together_is_read_back_and_told_as_data() {
    let dir = tempfile::tempdir().unwrap();
    let reactor = Reactor::spawn("test", Settings::default()).unwrap();
    let disk = Raw::new(RawOptions::new(sparse(&dir)));
    let client = Client::new(&reactor.handle(), disk.open().unwrap()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let client = &client;
            scope.spawn(move || {
                let mut buffer = Buffer::new(1 << 16);
                buffer.fill(thread + 1);
                for round in 0..8 {
                    let offset = (u64::from(thread) * 8 + round) << 16;
                    client.write(offset, &mut buffer, 1 << 16).unwrap();
                }
            });
        }
    });
    client.flush().unwrap();
    let mut bytes = vec![0; 4 << 19];
    client.read_at(0, &mut bytes).unwrap();
    for (thread, part) in bytes.chunks(1 << 19).enumerate() {
        assert!(part.iter().all(|byte| usize::from(*byte) == thread + 1), "part {thread}");
    }
    // Across the edge of the bounce buffer, at odd offsets.
    let odd: Vec<u8> = (0..3 << 20).map(|n: u32| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    client.write_at(12_345_678, &odd).unwrap();
    let mut back = vec![0; odd.len()];
    assert_eq!(client.fill_at(12_345_678, &mut back).unwrap(), odd.len());
    assert!(back == odd);
    // As at the end of a file, what is beyond the disk is not there.
    assert_eq!(client.fill_at(SIZE - 5, &mut back).unwrap(), 5);

    let mut parts = Vec::new();
    let collect = |offset, len, kind| {
        parts.push((offset, len, kind));
        Ok::<_, vbd_core::Error>(())
    };
    client.parts(0, SIZE, collect).unwrap();
    assert_eq!(parts[0], (0, 4 << 19, ExtentKind::Data));
    assert_eq!(parts.iter().map(|(_, len, _)| len).sum::<u64>(), SIZE);
    assert!(parts.iter().any(|part| part.2 == ExtentKind::Hole));
    client.zero(0, SIZE, true).unwrap();
    client.read_at(12_345_678, &mut back).unwrap();
    assert!(back.iter().all(|byte| *byte == 0));
}

#[test]
fn several_requests_of_one_thread_are_under_way_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let reactor = Reactor::spawn("test", Settings::default()).unwrap();
    let disk = Raw::new(RawOptions::new(sparse(&dir)));
    let client = Client::new(&reactor.handle(), disk.open().unwrap()).unwrap();
    let pending: Vec<_> = (0..16u8)
        .map(|n| {
            let mut buffer = Buffer::new(4096);
            buffer.fill(n);
            client.start(Ask::new(Operation::Write, u64::from(n) << 12, 4096), Some(buffer))
        })
        .collect();
    for (n, pending) in pending.into_iter().enumerate() {
        let (buffer, result) = pending.wait();
        result.unwrap();
        assert_eq!(usize::from(buffer.unwrap()[0]), n);
    }
    let mut bytes = vec![0; 1 << 16];
    client.read_at(0, &mut bytes).unwrap();
    assert!(bytes.chunks(4096).enumerate().all(|(n, part)| part.iter().all(|b| usize::from(*b) == n)));
}

#[test]
fn errors_come_back_and_the_lease_ends_with_the_client() {
    let dir = tempfile::tempdir().unwrap();
    let path = sparse(&dir);
    let reactor = Reactor::spawn("test", Settings::default()).unwrap();
    let faults = |op: &Op| matches!(op, Op::Write { .. }).then_some(Fault::Fail(libc::ENOSPC));
    let disk = Raw::new(RawOptions {
        faults: Some(Arc::new(faults)),
        cache: Cache::Writeback,
        lease_wait: Duration::ZERO,
        ..RawOptions::new(&path)
    });
    let client = Client::new(&reactor.handle(), disk.open().unwrap()).unwrap();
    assert_eq!(client.write_at(0, &[1; 512]).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(client.read_at(SIZE - 1, &mut [0; 2]).unwrap_err().kind(), ErrorKind::OutOfRange);
    assert!(!lease::holders(&path).unwrap().is_empty());
    drop(client);
    assert!(lease::holders(&path).unwrap().is_empty());
}

#[test]
fn a_reactor_that_ends_leaves_no_thread_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let reactor = Reactor::spawn("test", Settings::default()).unwrap();
    let disk = Raw::new(RawOptions::new(sparse(&dir)));
    let session = disk.open().unwrap();
    let client = Client::new(&reactor.handle(), session.clone()).unwrap();
    let handle = reactor.handle();
    reactor.join();
    assert_eq!(client.flush().unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(client.read_at(0, &mut [0; 512]).unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(Client::new(&handle, session).err().unwrap().kind(), ErrorKind::Cancelled);
}
