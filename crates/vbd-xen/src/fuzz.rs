//! Entries for fuzzing: a ring and its pages, and keys of xenstore.

use std::collections::HashMap;
use std::sync::Arc;

use vbd_core::{IoVec, Operation};

use crate::abi::{Abi, HEADER, Status};
use crate::fake::Hypervisor;
use crate::intake::{Core, Limits, Step};
use crate::keys::{self, Bounds};
use crate::memory::{Arena, Chunks, Memory, Pages, Persistent};
use crate::placement::Policy;
use crate::record::{Log, Record};
use crate::ring::Ring;
use crate::slots::Done;
use crate::sys::{PAGE, wire};

const DOMID: u16 = 1;
/// References of the domain's pages: some for reading only.
const FIRST: u32 = 16;
const GRANTED: u32 = 16;

/// Reads or writes the first and last byte of each piece: memory that is not there ends the process.
fn touch(pieces: &[IoVec], operation: Operation) {
    for piece in pieces {
        assert!(piece.iov_len > 0 && piece.iov_len.is_multiple_of(512));
        for at in [0, piece.iov_len - 1] {
            let byte = piece.iov_base.cast::<u8>().wrapping_add(at);
            // SAFETY: what is under test gives memory that is valid.
            unsafe {
                match operation {
                    Operation::Read => byte.write_volatile(0x5a),
                    _ => drop(std::hint::black_box(byte.read_volatile())),
                }
            }
        }
    }
}

/// Serves a ring whose entries and whose pages come from `data`.
///
/// # Panics
/// That is the point: when a request is lost, answered twice, or gets memory that is not its own.
pub fn fuzz_ring(data: &[u8]) {
    let Some((control, image)) = data.split_at_checked(6) else { return };
    let hypervisor = Hypervisor::new().expect("memory");
    let abi = if control[0] & 1 == 0 { Abi::Wide } else { Abi::Narrow };
    let policy = Policy { persistent: control[0] & 2 != 0, direct: control[0] & 4 != 0 };
    let ring_page = hypervisor.page();
    hypervisor.grant(DOMID, 8, ring_page, true);
    let (entries, rest) = image.split_at(image.len().min(PAGE - HEADER));
    let put = |page: usize, offset: usize, bytes: &[u8]| {
        // SAFETY: within a page of the hypervisor.
        unsafe { std::ptr::copy(bytes.as_ptr(), hypervisor.at(page).add(offset), bytes.len()) };
    };
    put(ring_page, HEADER, entries);
    for index in 0..GRANTED {
        let page = hypervisor.page();
        hypervisor.grant(DOMID, FIRST + index, page, index % 4 != 3);
        if let Some(bytes) = rest.chunks(256).nth(index as usize) {
            put(page, 0, bytes);
        }
    }
    let produced = u32::from_le_bytes([control[1], control[2], control[3], control[4]]);
    put(ring_page, 0, &produced.to_le_bytes());

    let pages = Arc::<Pages>::default();
    let table = hypervisor.platform().grants.open(DOMID).expect("it opens");
    let memory = Memory::new(table, Arena::new(64).expect("memory"), pages.clone());
    let mapping = memory.map(&[8], true).expect("it is granted");
    // SAFETY: mapped in `memory`, which the core holds.
    let ring = unsafe { Ring::new(mapping.start, 1, abi, None) };
    let record = Record::create(None, 1, 1, ring.entries()).expect("memory");
    let limits = Limits {
        indirect: 32,
        read_only: control[0] & 8 != 0,
        discard: control[0] & 16 == 0,
        most_discard: 1 << 20,
        durable: control[0] & 32 != 0,
        policy,
    };
    let persistent = Persistent::new(usize::from(control[5] % 32), 7, pages);
    let mut core =
        Core::new(ring, limits, memory, Chunks::new(64), persistent, Log::new(record, 0), Vec::new());
    core.paused = false;
    let mut running = Vec::new();
    for turn in 0..400u32 {
        let taken = matches!(core.next(true), Step::Taken);
        core.advance();
        core.copy_in();
        for slot in std::mem::take(&mut core.ready) {
            let Some((part, pieces)) = core.part(slot) else { continue };
            assert!(part.offset.checked_add(part.len).is_some());
            assert!((part.offset | part.len).is_multiple_of(512));
            if matches!(part.operation, Operation::Read | Operation::Write) {
                assert_eq!(pieces.iter().map(|piece| piece.iov_len as u64).sum::<u64>(), part.len);
                assert!(!(limits.read_only && part.operation == Operation::Write));
            }
            touch(&pieces, part.operation);
            running.push((slot, part.operation, pieces, core.guard(slot)));
        }
        // Some stay for a while.
        if (!taken || turn % 3 == 0) && !running.is_empty() {
            let index = turn as usize % running.len();
            let (slot, operation, pieces, guard) = running.swap_remove(index);
            touch(&pieces, operation);
            core.take_back(slot, operation, pieces);
            drop(guard);
            core.completed(Done { slot, status: if turn % 7 == 6 { Status::Error } else { Status::Ok } });
        }
        core.copy_out();
        core.publish();
        if !taken && running.is_empty() && !core.wants_turn() {
            break;
        }
    }
    assert!(core.out > 0 || core.ring.produced() == core.ring.consumed(), "each is answered once");
    assert!(core.out == 0 || !running.is_empty() || core.wants_turn(), "nothing is forgotten");
}

/// Reads keys, paths and messages that come from `data`: lines of `key=value`.
///
/// # Panics
/// When something comes out of them that is out of bounds.
pub fn fuzz_store(data: &[u8]) {
    let mut received = data.to_vec();
    while let Ok(Some(message)) = wire::decode(&mut received) {
        assert!(message.payload.len() <= wire::PAYLOAD);
        assert!(wire::texts(&message.payload).all(|text| !text.contains('\0')));
    }
    let mut map = HashMap::new();
    for line in data.split(|byte| *byte == b'\n') {
        let at = line.iter().position(|byte| *byte == b'=');
        if let Some((key, value)) = at.map(|at| line.split_at(at)) {
            map.insert(String::from_utf8_lossy(key).into_owned(), value[1..].to_vec());
        }
        let line = String::from_utf8_lossy(line);
        if let Some((domid, devid)) = keys::device_in(&line, "/local/domain/0/backend", "vbd") {
            assert!(line.contains(&devid.to_string()) && domid < 0x7ff0);
        }
    }
    let bounds = Bounds { queues: 4, order: 4 };
    let offer = keys::offer(|key| Ok(map.get(key).cloned()), bounds).expect("nothing is lost");
    match offer {
        Ok(offer) => {
            assert!((1..=4).contains(&offer.queues.len()));
            assert!(offer.pages().is_power_of_two() && offer.pages() <= 16);
            assert!(offer.queues.iter().all(|queue| queue.references.len() == offer.pages()));
        }
        Err(problem) => assert!(problem.len() < 4 * wire::PAYLOAD && !problem.chars().any(char::is_control)),
    }
    for value in map.values() {
        assert!(!keys::clean(value).chars().any(char::is_control));
    }
}
