//! What hostile memory goes through, as one call: for the fuzzer and for property tests.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vbd_core::{IoVec, Operation};

use crate::chain::Intake;
use crate::inflight::{Inflight, Tracker};
use crate::memory::{Mapping, Memory, Region};
use crate::request::{Action, Limits, Status, decide};
use crate::ring::{Addresses, Ring};
use crate::sigbus::Owner;

/// Guest memory: two regions that adjoin in the guest and not here, and a hole behind them.
const GUEST: u64 = 0x1_0000;
const FIRST: u64 = 0x1_0000;
const SECOND: u64 = 0x1000;

thread_local! {
    static FILE: (OwnedFd, Arc<Owner>) = {
        let file = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
        rustix::fs::ftruncate(&file, 0x2_0000).expect("room");
        let (socket, _) = std::os::unix::net::UnixStream::pair().expect("sockets");
        (file, Arc::new(Owner::new(socket.into())))
    };
}

fn region(guest: u64, offset: u64, len: u64) -> Region {
    FILE.with(|(file, owner)| {
        let mapping = Mapping::new(file, offset, len, owner).expect("a mapping");
        Region { guest, len, user: guest, mapping }
    })
}

fn fill(at: *mut u8, len: usize, bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(len)];
    // SAFETY: callers pass a mapping of at least `len` bytes, which nobody else uses.
    unsafe {
        at.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        at.add(bytes.len()).write_bytes(0, len - bytes.len());
    }
}

/// Takes requests from a ring whose every byte comes from `data`, and checks that nothing of what comes out of it
/// lies outside of guest memory.
///
/// # Panics
/// That is the point: when something does.
pub fn fuzz_virtqueue(data: &[u8]) {
    let Some((control, image)) = data.split_at_checked(4) else { return };
    let first = region(GUEST, 0, FIRST);
    let second = region(GUEST + FIRST, 2 * FIRST - SECOND, SECOND);
    let places = [(first.mapping.start(), FIRST), (second.mapping.start(), SECOND)];
    let (head, tail) = image.split_at(image.len().min(0x1_0000));
    fill(places[0].0, 0x1_0000, head);
    fill(places[1].0, 0x1000, tail);
    let inside = |piece: &IoVec| {
        let (start, len) = (piece.iov_base as u64, piece.iov_len as u64);
        let mut places = places.iter().map(|(base, len)| (*base as u64, *len));
        places.any(|(base, size)| start >= base && start + len <= base + size)
    };

    let size = 1u16 << (control[0] % 9);
    let addresses = Addresses { descriptors: GUEST, available: GUEST + 0x1000, used: GUEST + 0x2000 };
    let memory = Arc::new(Memory::new(vec![first, second]).expect("they do not overlap"));
    let ring = Ring::new(&memory, addresses, size).expect("it fits");
    let base = u16::from_le_bytes([control[2], control[3]]);
    let mut intake = Intake::new(ring, memory, base, control[1] & 1 != 0);
    let limits = Limits { discard: 1 << 20, zeroes: 1 << 20, serial: *b"fuzz-fuzz-fuzz-fuzz-" };
    let (mut parts, mut used) = (Vec::new(), 0u16);
    let mut busy = vec![false; usize::from(size)];
    for turn in 0..1024u32 {
        let mut pieces = Vec::new();
        let Ok(Some((chain, _))) = intake.take(&mut pieces) else { return };
        assert!(!std::mem::replace(&mut busy[usize::from(chain.head)], true), "a head was taken twice");
        assert!(pieces.iter().all(inside), "a piece is outside of memory");
        assert!(inside(&IoVec { iov_base: chain.status.cast(), iov_len: 1 }));
        let sum = |pieces: &[IoVec]| pieces.iter().map(|piece| piece.iov_len as u64).sum::<u64>();
        assert_eq!(sum(&pieces[..chain.split]), chain.readable);
        assert_eq!(sum(&pieces[chain.split..]), chain.writable);

        match decide(&chain, &mut pieces, &limits, &mut parts) {
            Action::One(part) => {
                if matches!(part.operation, Operation::Read | Operation::Write) {
                    assert_eq!(sum(&pieces), part.len);
                }
                parts.push(part);
            }
            Action::Several => assert!(parts.len() > 1),
            Action::Answer(status, written) => assert!(written == 0 || status == Status::Ok),
        }
        for part in parts.drain(..) {
            assert!(part.offset.checked_add(part.len).is_some());
            assert!((part.offset | part.len).is_multiple_of(512));
        }
        intake.ring().put_used(used, chain.head, 1);
        used = used.wrapping_add(1);
        intake.ring().publish(used);
        // Some stay in flight.
        if turn % 4 != 3 {
            intake.give_back(chain.head);
            busy[usize::from(chain.head)] = false;
        }
    }
}

/// Reads an in-flight region whose every byte comes from `data`.
///
/// # Panics
/// When it gives heads that no ring has, or one of them twice.
pub fn fuzz_inflight(data: &[u8]) {
    let Some((control, image)) = data.split_at_checked(5) else { return };
    let mapping = region(GUEST, 0, FIRST).mapping;
    fill(mapping.start(), 0x1_0000, image);
    let size = 1u16 << (control[0] % 8);
    let all = Arc::new(Inflight::new(mapping, FIRST, 1, size).expect("it fits"));
    let _ = all.writeback();
    let mut tracker = Tracker::new(all, 0, size).expect("it has one queue");
    let used = u16::from_le_bytes([control[1], control[2]]);
    let base = u16::from_le_bytes([control[3], control[4]]);
    if let Ok(Some(heads)) = tracker.recover(used, base) {
        let mut sorted = heads.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), heads.len());
        assert!(heads.iter().all(|head| *head < size));
        for head in heads {
            tracker.done(head);
        }
        tracker.published(used.wrapping_add(1));
        assert_eq!(tracker.recover(used.wrapping_add(1), base), Ok(Some(Vec::new())));
    }
}
