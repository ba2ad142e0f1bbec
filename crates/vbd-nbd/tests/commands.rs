//! The transmission phase, as a client of raw bytes sees it.

mod common;

use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{Memory, Style, serve, serve_disk, serve_with, until};
use vbd_core::filter::{Action, Filtered, Inject, Rule};
use vbd_core::{Capabilities, ErrorKind, Operation};
use vbd_nbd::{ExportOptions, Options};
use vbd_ring::EngineKind;

const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];
const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;
const ESHUTDOWN: u32 = 108;

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZERO: u16 = 6;
const STATUS: u16 = 7;

const FUA: u16 = 1;
const DF: u16 = 4;
const REQ_ONE: u16 = 8;
const FAST_ZERO: u16 = 16;
const PAYLOAD_LEN: u16 = 32;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from((at * 31 + at / 251) % 255 + 1).unwrap()).collect()
}

#[test]
fn what_was_written_is_read_in_any_size_and_style() {
    let disk = Memory::new(48 << 20);
    let served = serve_disk(disk.clone());
    for style in STYLES {
        let mut client = served.connect();
        assert_eq!(client.go(style, "disk").unwrap().0, 48 << 20);
        for len in [512, 4096, 65536, 1 << 20, (1 << 20) + 512, 5 << 20, 32 << 20] {
            let data = pattern(len);
            assert_eq!(client.write(0, 8192 + 512, &data), 0);
            assert!(disk.content()[8192 + 512..][..len] == data[..]);
            assert!(client.read(8192 + 512, len as u64) == data, "{len} bytes, {style:?}");
        }
    }
}

#[test]
fn without_io_uring_it_is_the_same() {
    let served = serve_with(Options::default(), EngineKind::Threads);
    served.server.add_export("disk", Memory::new(8 << 20), ExportOptions::default()).unwrap();
    for style in STYLES {
        let mut client = served.connect();
        client.go(style, "disk").unwrap();
        let data = pattern(5 << 20);
        assert_eq!(client.write(0, 700, &data), 0);
        assert!(client.read(700, 5 << 20) == data);
        assert_eq!(client.command(FLUSH, 0, 0, 0, &[]).error, 0);
    }
    assert_eq!(served.server.stop(Duration::from_secs(10)), 0);
}

#[test]
fn an_unfragmented_read_comes_in_one_chunk() {
    let disk = Memory::new(16 << 20);
    disk.bytes.lock().unwrap().copy_from_slice(&pattern(16 << 20));
    let served = serve_disk(disk.clone());
    let mut client = served.connect();
    client.go(Style::Structured, "disk").unwrap();
    let cookie = client.request(READ, DF, 512, 6 << 20, &[]);
    assert_eq!((client.u32(), client.u16(), client.u16(), client.u64()), (0x668e33ef, 1, 1, cookie));
    assert_eq!((client.u32(), client.u64()), (8 + (6 << 20), 512));
    assert!(client.bytes(6 << 20) == disk.content()[512..][..6 << 20]);
}

#[test]
fn parts_of_sectors_are_written_and_read() {
    for style in STYLES {
        let disk = Memory::new(4 << 20);
        disk.bytes.lock().unwrap().fill(0xee);
        let served = serve_disk(disk.clone());
        let mut client = served.connect();
        client.go(style, "disk").unwrap();
        let mut model = disk.content();
        for (offset, len) in [(3, 5), (511, 2), (512, 1), (1000, 3000), (77, 2 << 20), ((4 << 20) - 3, 3)] {
            let data = pattern(len);
            assert_eq!(client.write(0, offset as u64, &data), 0);
            model[offset..offset + len].copy_from_slice(&data);
            assert!(disk.content() == model, "{len} bytes at {offset}");
            assert!(client.read(offset as u64, len as u64) == data);
        }
        for (offset, len) in [(10, 20), (500, 1000), (2048, 512), (4095, 1 << 20)] {
            assert_eq!(client.command(ZERO, 0, offset as u64, len as u64, &[]).error, 0);
            model[offset..offset + len].fill(0);
            assert!(disk.content() == model, "{len} zeroes at {offset}");
        }
        // A trim keeps what it cannot give back whole.
        model[512..1024].fill(9);
        client.write(0, 512, &[9; 512]);
        assert_eq!(client.command(TRIM, 0, 100, 1000, &[]).error, 0);
        model[512..1024].fill(0);
        assert!(disk.content() == model);
        assert_eq!(client.command(ZERO, FAST_ZERO, 10, 20, &[]).error, ENOTSUP);
    }
}

#[test]
fn what_cannot_be_done_is_refused_and_the_connection_goes_on() {
    let end = 1u64 << 20;
    let served = serve_disk(Memory::new(1 << 20));
    for style in STYLES {
        let mut client = served.connect();
        client.go(style, "disk").unwrap();
        let cases = [
            (READ, 0, end, 512, EINVAL),
            (READ, 0, end - 512, 1024, EINVAL),
            (READ, 0, u64::MAX, 512, EINVAL),
            (READ, 1 << 9, 0, 512, EINVAL),
            (TRIM, 0, end, 512, EINVAL),
            (CACHE, 0, end, 512, EINVAL),
            (CACHE, 2, 0, 512, EINVAL),
            (ZERO, 0, end - 512, 1024, ENOSPC),
            (ZERO, 0, 0, u64::from(u32::MAX), ENOSPC),
            (8, 0, 0, 0, EINVAL),
            (0xffff, 0, 0, 512, EINVAL),
            (STATUS, 0, 0, 0, EINVAL),
            (STATUS, 0, end, 512, EINVAL),
        ];
        for (command, flags, offset, len, error) in cases {
            let reply = client.command(command, flags, offset, len, &[]);
            assert_eq!(reply.error, error, "{style:?}: {command} of {len} at {offset}");
        }
        assert_eq!(client.write(0, end - 512, &[1; 1024]), ENOSPC);
        assert_eq!(client.write(0, u64::MAX - 5, &[1; 512]), ENOSPC);
        assert_eq!(client.write(8, 0, &[1; 512]), EINVAL);
        // Nothing to do is done.
        for command in [READ, WRITE, TRIM, ZERO, CACHE] {
            assert_eq!(client.command(command, 0, 512, 0, &[]).error, 0);
        }
        assert_eq!(client.read(end - 512, 512), vec![0; 512]);
    }
}

#[test]
fn too_long_a_payload_is_skipped_and_an_absurd_one_ends_the_connection() {
    let served = serve_disk(Memory::new(40 << 20));
    for style in STYLES {
        let mut client = served.connect();
        client.go(style, "disk").unwrap();
        let len = (32 << 20) + 512;
        let error = if style == Style::Simple { EINVAL } else { EOVERFLOW };
        assert_eq!(client.command(READ, 0, 0, len, &[]).error, error);
        let payload = vec![1; usize::try_from(len).unwrap()];
        assert_eq!(client.write(0, 0, &payload), EINVAL);
        assert_eq!(client.read(0, 512), vec![0; 512], "nothing of it was written");
        client.request(WRITE, 0, 0, 0xffff_fe00, &[1; 512]);
        assert!(client.is_closed());
    }
    let mut client = served.connect();
    client.go(Style::Extended, "disk").unwrap();
    // A payload where none belongs is skipped too.
    let cookie = client.request(TRIM, PAYLOAD_LEN, 0, 4096, &[3; 4096]);
    assert_eq!(client.reply(cookie, 0, 0).error, EINVAL);
    assert_eq!(client.read(0, 512), vec![0; 512]);
    client.request(WRITE, 0, 0, 1 << 60, &[1; 512]);
    assert!(client.is_closed());
}

#[test]
fn extended_headers_take_ranges_beyond_32_bits() {
    // The disk takes a mebibyte at once, so this is some thousand requests below.
    let disk = Memory::new(64 << 20);
    disk.bytes.lock().unwrap().fill(5);
    let served = serve_disk(disk.clone());
    let mut client = served.connect();
    client.go(Style::Extended, "disk").unwrap();
    assert_eq!(client.command(ZERO, 0, 512, (64 << 20) - 512, &[]).error, 0);
    assert!(disk.content()[512..].iter().all(|byte| *byte == 0) && disk.content()[..512] == [5; 512]);
    assert_eq!(client.command(TRIM, 0, 0, 1 << 40, &[]).error, EINVAL);
    let reply = client.command(STATUS, 0, 0, 64 << 20, &[]);
    assert_eq!(reply.extents, [(512, 0), ((64 << 20) - 512, 3)]);
}

#[test]
fn block_status_merges_cuts_and_counts() {
    let disk = Memory::new(1 << 20);
    disk.bytes.lock().unwrap()[4096..12288].fill(1);
    let served = serve_disk(disk.clone());
    for style in [Style::Structured, Style::Extended] {
        let mut client = served.connect();
        client.go(style, "disk").unwrap();
        let mut status = |flags, offset, len| client.command(STATUS, flags, offset, len, &[]).extents;
        assert_eq!(status(0, 0, 1 << 20), [(4096, 3), (8192, 0), ((1 << 20) - 12288, 3)]);
        assert_eq!(status(REQ_ONE, 0, 1 << 20), [(4096, 3)]);
        assert_eq!(status(REQ_ONE, 512, 1024), [(1024, 3)]);
        assert_eq!(status(0, 4000, 200), [(96, 3), (104, 0)]);
        assert_eq!(status(0, 4097, 1), [(1, 0)]);
    }
}

#[test]
fn block_status_of_a_riddled_disk_is_bounded() {
    let disk = Memory::new(16 << 20);
    for sector in disk.bytes.lock().unwrap().chunks_mut(512).step_by(2) {
        sector.fill(1);
    }
    let served = serve_disk(disk.clone());
    let mut client = served.connect();
    client.go(Style::Extended, "disk").unwrap();
    let extents = client.command(STATUS, 0, 0, 16 << 20, &[]).extents;
    assert_eq!(extents.len(), 4096);
    assert!(extents.iter().enumerate().all(|(at, extent)| *extent == (512, if at % 2 == 0 { 0 } else { 3 })));
}

#[test]
fn fua_and_flush_reach_the_disk_and_write_through_makes_all_writes_durable() {
    let disk = Memory::new(1 << 20);
    let served = serve_disk(disk.clone());
    let mut client = served.connect();
    client.go(Style::Simple, "disk").unwrap();
    let durable = |disk: &Memory| disk.durable_writes.load(Ordering::SeqCst);
    client.write(0, 0, &[1; 512]);
    assert_eq!(durable(&disk), 0);
    client.write(FUA, 0, &[1; 512]);
    client.command(ZERO, FUA, 0, 512, &[]);
    client.command(TRIM, FUA, 0, 512, &[]);
    client.write(FUA, 7, &[1; 5]);
    assert_eq!(durable(&disk), 4);
    assert_eq!(client.command(READ, FUA, 0, 512, &[]).error, 0);
    assert_eq!(client.command(FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);

    let capabilities =
        Capabilities { read_only: false, write_cache: false, discard: false, fast_zeroes: true, grow: false };
    let disk = Memory::with(1 << 20, capabilities);
    let served = serve_disk(disk.clone());
    let mut client = served.connect();
    let (_, flags) = client.go(Style::Simple, "disk").unwrap();
    assert_eq!(flags & 1 << 5, 0, "no trim");
    client.write(0, 0, &[1; 512]);
    assert_eq!(durable(&disk), 1);
}

#[test]
fn a_read_only_export_changes_nothing() {
    let disk = Memory::new(1 << 20);
    let served = serve(Options::default());
    let options = ExportOptions { read_only: true, ..ExportOptions::default() };
    served.server.add_export("disk", disk.clone(), options).unwrap();
    let mut client = served.connect();
    let (_, flags) = client.go(Style::Structured, "disk").unwrap();
    assert_eq!(flags & 0b110_0010, 0b10);
    assert_eq!(client.write(0, 0, &[1; 4096]), EPERM);
    assert_eq!(client.command(TRIM, 0, 0, 4096, &[]).error, EPERM);
    assert_eq!(client.command(ZERO, 0, 0, 4096, &[]).error, EPERM);
    assert_eq!(client.command(FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!(disk.content(), vec![0; 1 << 20]);
}

#[test]
fn every_kind_of_error_has_its_number() {
    let table = [
        (ErrorKind::Io, 5),
        (ErrorKind::NoSpace, ENOSPC),
        (ErrorKind::OutOfRange, EINVAL),
        (ErrorKind::ReadOnly, EPERM),
        (ErrorKind::Unsupported, EINVAL),
        (ErrorKind::FlushLost, 5),
        (ErrorKind::Cancelled, ESHUTDOWN),
        (ErrorKind::Busy, 5),
        (ErrorKind::Corrupt, 5),
    ];
    let commands = [
        (READ, Operation::Read, 512),
        (WRITE, Operation::Write, 512),
        (FLUSH, Operation::Flush, 0),
        (TRIM, Operation::Discard, 512),
        (ZERO, Operation::WriteZeroes, 512),
        (STATUS, Operation::Extents, 512),
    ];
    let inject = Inject::new(vec![]);
    let served = serve_disk(Filtered::new(Memory::new(1 << 20), inject.clone()));
    for style in STYLES {
        let mut client = served.connect();
        client.go(style, "disk").unwrap();
        for (kind, error) in table {
            for (command, operation, len) in commands {
                if command == STATUS && style == Style::Simple {
                    continue;
                }
                inject.set(vec![Rule::always(operation, Action::Fail(kind))]);
                let payload: &[u8] = if command == WRITE { &[7; 512] } else { &[] };
                let reply = client.command(command, 0, 0, len, payload);
                assert_eq!((reply.error, reply.extents.len()), (error, 0), "{operation} {kind:?} {style:?}");
            }
            // One bad piece of many fails the whole.
            inject.set(vec![Rule {
                range: 2 << 10..3 << 10,
                ..Rule::always(Operation::Read, Action::Fail(kind))
            }]);
            assert_eq!(client.command(READ, 0, 0, 1 << 20, &[]).error, error);
        }
        inject.set(vec![Rule::always(Operation::WriteZeroes, Action::Fail(ErrorKind::Unsupported))]);
        assert_eq!(client.command(ZERO, FAST_ZERO, 0, 512, &[]).error, ENOTSUP);
        inject.set(vec![Rule { skip: 1, ..Rule::always(Operation::Read, Action::Fail(ErrorKind::Io)) }]);
        // The second mebibyte is beyond the first: an error after data was sent.
        let reply = client.command(READ, 0, 512, (1 << 20) - 512, &[]);
        assert_eq!(reply.error, 0, "one piece");
        inject.set(vec![]);
        assert_eq!(client.read(0, 512), vec![0; 512]);
    }
}

#[test]
fn a_long_read_that_fails_in_the_middle_ends_in_an_error() {
    let inject = Inject::new(vec![]);
    let served = serve_disk(Filtered::new(Memory::new(8 << 20), inject.clone()));
    for style in STYLES {
        let mut client = served.connect();
        client.go(style, "disk").unwrap();
        inject.set(vec![Rule {
            range: 3 << 20..(3 << 20) + 512,
            ..Rule::always(Operation::Read, Action::Fail(ErrorKind::Io))
        }]);
        assert_eq!(client.command(READ, 0, 0, 8 << 20, &[]).error, 5);
        assert_eq!(client.read(4 << 20, 4 << 20).len(), 4 << 20);
        inject.set(vec![Rule {
            range: 3 << 20..(3 << 20) + 512,
            ..Rule::always(Operation::Write, Action::Fail(ErrorKind::NoSpace))
        }]);
        assert_eq!(client.write(0, 0, &vec![1; 8 << 20]), ENOSPC);
        inject.set(vec![]);
    }
}

#[test]
fn requests_before_goodbye_are_answered_and_those_after_it_are_not() {
    let served = serve_disk(Memory::new(1 << 20));
    let mut client = served.connect();
    client.go(Style::Simple, "disk").unwrap();
    let first = client.request(WRITE, 0, 0, 4096, &[1; 4096]);
    client.request(DISC, 0, 0, 0, &[]);
    client.request(WRITE, 0, 0, 4096, &[2; 4096]);
    assert_eq!(client.reply(first, 0, 0).error, 0);
    assert!(client.is_closed());
}

#[test]
fn a_client_that_only_stops_sending_gets_its_replies() {
    let served = serve_disk(Memory::new(1 << 20));
    let mut client = served.connect();
    client.go(Style::Simple, "disk").unwrap();
    let cookies: Vec<_> = (0..8).map(|_| client.request(READ, 0, 0, 4096, &[])).collect();
    client.stream.shutdown(Shutdown::Write).unwrap();
    let mut found = Vec::new();
    for _ in &cookies {
        assert_eq!((client.u32(), client.u32()), (0x67446698, 0));
        found.push(client.u64());
        client.bytes(4096);
    }
    found.sort_unstable();
    assert_eq!(found, cookies);
    assert!(client.is_closed());
}

#[test]
fn a_hang_up_in_the_middle_of_anything_leaves_nothing_behind() {
    let disk = Memory::new(1 << 20);
    let served = serve_disk(disk.clone());
    let whole = {
        let mut bytes = vec![];
        bytes.extend(0x25609513u32.to_be_bytes());
        bytes.extend([0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0]);
        bytes.extend([7; 4096]);
        bytes
    };
    for cut in [1, 4, 27, 28, 29, 1000, 4096 + 27] {
        let mut client = served.connect();
        client.go(Style::Simple, "disk").unwrap();
        client.send(&whole[..cut]);
        drop(client);
    }
    until("the end of all clients", || served.server.status().clients.is_empty());
    until("the release of the disk", || disk.sessions.load(Ordering::SeqCst) == 0);
    assert_eq!(disk.content()[..4096], [0; 4096], "half a write is no write");
    // Replies nobody reads.
    let mut client = served.connect();
    client.go(Style::Simple, "disk").unwrap();
    for _ in 0..64 {
        client.request(READ, 0, 0, 1 << 20, &[]);
    }
    drop(client);
    until("the end of all clients", || served.server.status().clients.is_empty());
    assert_eq!(served.server.status().memory, 0);
}

#[test]
fn nonsense_instead_of_a_request_ends_the_connection() {
    let served = serve_disk(Memory::new(1 << 20));
    for style in STYLES {
        let mut client = served.connect();
        client.go(style, "disk").unwrap();
        client.send(&[0x42; 64]);
        assert!(client.is_closed());
    }
}

#[test]
fn requests_byte_by_byte_are_requests() {
    let served = serve_disk(Memory::new(1 << 20));
    let mut client = served.connect();
    client.go(Style::Simple, "disk").unwrap();
    let mut bytes = vec![];
    bytes.extend(0x25609513u32.to_be_bytes());
    bytes.extend([0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    bytes.extend([7; 512]);
    for byte in bytes {
        client.send(&[byte]);
    }
    assert_eq!(client.reply(9, 0, 0).error, 0);
    assert_eq!(client.read(0, 512), vec![7; 512]);
}

#[test]
fn a_client_counts_in_the_disks_statistics() {
    use vbd_core::Disk;
    let disk = Memory::new(1 << 20);
    let served = serve_disk(disk.clone());
    for _ in 0..2 {
        let mut client = served.connect();
        client.go(Style::Simple, "disk").unwrap();
        client.write(0, 0, &[1; 4096]);
        client.read(0, 8192);
        drop(client);
        until("its end", || served.server.status().clients.is_empty());
    }
    let queues = disk.statistics().snapshot();
    assert_eq!(queues.len(), 1, "one after the other counts as one");
    assert_eq!(queues[0].label, "nbd/0");
    let counts: Vec<_> = queues[0].operations.iter().map(|counts| (counts.count, counts.bytes)).collect();
    assert_eq!(counts[..2], [(2, 16384), (2, 8192)]);
}

#[test]
fn stopping_finishes_what_was_taken_flushes_and_releases() {
    let disk = Memory::new(1 << 20);
    let served = serve_disk(disk.clone());
    let mut client = served.connect();
    client.go(Style::Simple, "disk").unwrap();
    let mut idle = served.connect();
    *disk.held.lock().unwrap() = true;
    let cookie = client.request(WRITE, 0, 0, 4096, &[9; 4096]);
    client.send(&0x25609513u32.to_be_bytes());
    until("the write", || served.server.status().clients.iter().any(|client| client.export.is_some()));
    // The write may not have been taken when the stop is asked for; then it is not answered.
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| served.server.stop(Duration::from_secs(20)));
        *disk.held.lock().unwrap() = false;
        assert_eq!(stop.join().unwrap(), 0);
    });
    if disk.content()[0] == 9 {
        assert_eq!(client.reply(cookie, 0, 0).error, 0);
    }
    assert!(client.is_closed());
    assert!(idle.is_closed());
    assert_eq!(disk.sessions.load(Ordering::SeqCst), 0);
    assert!(disk.flushes.load(Ordering::SeqCst) >= 1);
    assert!(!served.socket.exists(), "the socket is gone");
}

#[test]
fn a_disk_that_hangs_does_not_hold_up_the_stop() {
    let disk = Memory::new(1 << 20);
    let served = serve_disk(disk.clone());
    let mut client = served.connect();
    client.go(Style::Simple, "disk").unwrap();
    client.write(0, 0, &[1; 512]);
    *disk.held.lock().unwrap() = true;
    client.request(WRITE, 0, 0, 4096, &[9; 4096]);
    client.request(READ, 0, 0, 4096, &[]);
    let late = served.server.stop(Duration::from_millis(100));
    assert_eq!(late, 1);
    *disk.held.lock().unwrap() = false;
    until("the release of the disk", || disk.sessions.load(Ordering::SeqCst) == 0);
}
