//! Entries for fuzzing: the two machines that read what clients send, without sockets, reactors and disks.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use vbd_core::bitmap::Bitmap;
use vbd_core::track::{Named, Track};
use vbd_core::{Capabilities, Extent, ExtentKind, Geometry, IoVec, Operation, Request, Result, Sink};

use crate::command::{Terms, export_info};
use crate::memory::{Account, Pool, Total};
use crate::negotiation::{Catalogue, Negotiation, Step, TlsMode};
use crate::outbox::Outbox;
use crate::protocol::Headers;
use crate::transmission::{Dirty, Transmission, Turn};

const GEOMETRY: Geometry = Geometry {
    size: 8 << 20,
    block_size: 512,
    physical_block_size: 4096,
    optimal_size: 0,
    discard_granularity: 4096,
    max_discard: 1 << 20,
    max_zeroes: 1 << 20,
};

const CAPABILITIES: Capabilities =
    Capabilities { read_only: false, write_cache: true, discard: true, fast_zeroes: true, grow: false };

struct Names;

impl Catalogue for Names {
    fn list(&self) -> Vec<(String, String)> {
        vec![("disk".into(), "a disk".into()), ("other".into(), String::new())]
    }

    fn find(&self, name: &str) -> Option<(String, String)> {
        self.list().into_iter().find(|(known, _)| known == name || name.is_empty())
    }

    fn bitmaps(&self, name: &str) -> Vec<String> {
        if name == "disk" { vec!["b".into(), "qemu:".into()] } else { Vec::new() }
    }

    fn is_stopping(&self) -> bool {
        false
    }
}

/// What a client says during the handshake. The first byte chooses the TLS mode, the second how the rest is cut.
pub fn negotiation(data: &[u8]) {
    let [mode, cut, rest @ ..] = data else { return };
    let mode = [TlsMode::Off, TlsMode::Offered, TlsMode::Required][usize::from(*mode) % 3];
    let mut out = Vec::new();
    let mut negotiation = Negotiation::new(mode, &mut out);
    let mut parts = rest.chunks(usize::from(*cut).max(1));
    loop {
        out.clear();
        let mut step = negotiation.advance(&Names, &mut out);
        if let Step::Inspect(name) | Step::Open(name) = &step {
            let info = export_info(&GEOMETRY, &CAPABILITIES, false);
            let answer = if name == "disk" { Ok(info) } else { Err("no such disk") };
            step = negotiation.answer(answer, &mut out);
        }
        assert!(out.len() < 4096, "an option is answered briefly");
        match step {
            Step::Again => {}
            Step::Input => match parts.next() {
                Some(part) => negotiation.feed(part),
                None => return,
            },
            Step::StartTls => negotiation.secured(),
            Step::Transmission => {
                let agreed = negotiation.finish();
                assert!(agreed.rest.len() <= rest.len());
                let contexts = agreed.allocation || !agreed.bitmaps.is_empty();
                assert!(!contexts || agreed.headers != Headers::Simple);
                assert!(agreed.bitmaps.len() <= 2);
                return;
            }
            Step::Close | Step::Inspect(_) | Step::Open(_) => return,
        }
    }
}

/// Requests that have come back from a disk.
#[derive(Default)]
struct Back(RefCell<Vec<(Request, Result<()>)>>);

impl Sink for Back {
    fn complete(self: Rc<Self>, request: Request, result: Result<()>) {
        self.0.borrow_mut().push((request, result));
    }
}

/// Answers a request as a disk would whose extents alternate.
fn answer(mut request: Request) {
    let end = request.offset + request.len;
    assert!(end <= GEOMETRY.size && request.offset < end.max(1));
    match request.operation {
        Operation::Extents => {
            let kinds = [ExtentKind::Data, ExtentKind::Hole, ExtentKind::Hole, ExtentKind::Zero];
            let mut left = request.len;
            for kind in kinds.into_iter().cycle() {
                let len = left.min(64 << 10);
                request.extents.push(Extent { len, kind });
                left -= len;
                if left == 0 {
                    break;
                }
            }
        }
        Operation::Read | Operation::Write => {
            let len: usize = request.memory.iter().map(|piece| piece.iov_len).sum();
            assert_eq!(len as u64, request.len, "the memory is as long as the range");
        }
        Operation::Discard | Operation::WriteZeroes => {
            assert!(request.len > 0 && request.len <= GEOMETRY.max_discard);
        }
        Operation::Flush => {}
    }
    request.complete(Ok(()));
}

/// One with many runs, and one that is not there any more.
fn bitmaps() -> Vec<Dirty> {
    let track = Track::new(GEOMETRY.size);
    let bitmap = Bitmap::new(GEOMETRY.size, 512).expect("a bitmap");
    (0..bitmap.bits()).step_by(3).for_each(|bit| bitmap.mark(bit * 512, 512));
    let bitmap = Arc::new(bitmap);
    track.load(GEOMETRY.size, vec![Named { name: "b".into(), enabled: true, persistent: false, bitmap }]);
    let dirty = |(id, name): (u32, &str)| Dirty { id, name: name.into(), track: track.clone() };
    [(2, "b"), (3, "gone")].into_iter().map(dirty).collect()
}

/// What a client says after the handshake. The first byte chooses what was agreed on, the second how the rest is cut.
pub fn commands(data: &[u8]) {
    let [agreed, cut, rest @ ..] = data else { return };
    let headers = [Headers::Simple, Headers::Structured, Headers::Extended][usize::from(*agreed) % 3];
    let read_only = agreed & 64 != 0;
    let allocation = headers != Headers::Simple && agreed & 128 == 0;
    let bitmaps = if headers != Headers::Simple && agreed & 32 != 0 { bitmaps() } else { Vec::new() };
    let terms = Terms {
        headers,
        allocation,
        bitmaps: !bitmaps.is_empty(),
        ..Terms::new(&GEOMETRY, &CAPABILITIES, read_only)
    };
    let total = Total::new(4 << 20);
    let account = Account::new(Rc::new(Pool::default()), total.clone(), 2 << 20, Arc::default());
    let mut transmission = Transmission::new(terms, account);
    transmission.bitmaps = bitmaps;
    let mut outbox = Outbox::default();
    let back = Rc::new(Back::default());
    let turn = Turn { sink: back.clone(), now: Instant::now() };
    let mut parts = rest.chunks(usize::from(*cut).max(1) * 16);
    let mut waiting: &[u8] = &[];
    loop {
        if waiting.is_empty() {
            waiting = parts.next().unwrap_or_default();
        }
        let taken = transmission.take(waiting, &turn, &mut outbox);
        waiting = &waiting[taken..];
        let ready = std::mem::take(&mut transmission.ready);
        let worked = taken > 0 || !ready.is_empty();
        ready.into_iter().for_each(answer);
        for (request, result) in back.0.take() {
            transmission.complete(request, result, &turn, &mut outbox);
        }
        let sent = drain(&mut outbox);
        if !worked && sent == 0 {
            break;
        }
    }
    transmission.end(&mut outbox);
    assert!(transmission.is_idle(), "all that was taken is done");
    drop((transmission, outbox));
    assert_eq!(total.used(), 0, "all memory is given back");
}

/// Sends everything, in odd portions.
fn drain(outbox: &mut Outbox) -> usize {
    let mut sum = 0;
    while !outbox.is_empty() {
        let mut pieces = [IoVec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 3];
        let count = outbox.pieces(&mut pieces);
        let sent: usize = pieces[..count].iter().map(|piece| piece.iov_len).sum();
        let sent = if sent > 1 { sent / 2 + 1 } else { sent };
        outbox.sent(sent);
        sum += sent;
    }
    sum
}
