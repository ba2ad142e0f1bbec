//! A domain's front-end, and the toolstack that gives it a disk.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

use vbd_xen::DeviceId;
use vbd_xen::fake::Hypervisor;

pub(crate) const READ: u8 = 0;
pub(crate) const WRITE: u8 = 1;
pub(crate) const BARRIER: u8 = 2;
pub(crate) const FLUSH: u8 = 3;
pub(crate) const DISCARD: u8 = 5;
pub(crate) const INDIRECT: u8 = 6;

pub(crate) const OK: i16 = 0;
pub(crate) const ERROR: i16 = -1;
pub(crate) const UNSUPPORTED: i16 = -2;

pub(crate) fn back(id: DeviceId) -> String {
    format!("/local/domain/0/backend/{id}")
}

pub(crate) fn front(id: DeviceId) -> String {
    format!("/local/domain/{}/device/vbd/{}", id.domid, id.devid)
}

/// What the toolstack writes for a new device.
pub(crate) fn create(hypervisor: &Hypervisor, id: DeviceId, changes: &[(&str, &str)]) {
    let (store, front, back) = (&hypervisor.store, front(id), back(id));
    store.set(&format!("/local/domain/{}/vm", id.domid), "/vm/6a8bb5a2-0f2b-4e4e-9d0a-7a3f3f6a0001");
    store.set(&format!("/local/domain/{}/name", id.domid), "guest");
    for (key, value) in [("backend", &*back), ("backend-id", "0"), ("device-type", "disk"), ("state", "1")] {
        store.set(&format!("{front}/{key}"), value);
    }
    let domid = id.domid.to_string();
    let mut keys: Vec<(&str, &str)> = vec![
        ("frontend-id", &domid),
        ("online", "1"),
        ("removable", "0"),
        ("state", "1"),
        ("dev", "xvda"),
        ("type", "phy"),
        ("mode", "w"),
        ("params", "/disks/a"),
        ("script", "/etc/xen/scripts/block-vbd"),
    ];
    keys.retain(|(key, _)| changes.iter().all(|(changed, _)| changed != key));
    for (key, value) in keys.iter().chain(changes) {
        store.set(&format!("{back}/{key}"), value);
    }
    // Last, so that the device is seen whole.
    store.set(&format!("{back}/frontend"), &front);
}

/// How a front-end connects.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// The 32-bit layout.
    pub(crate) narrow: bool,
    pub(crate) order: u32,
    pub(crate) queues: usize,
    pub(crate) persistent: bool,
}

pub(crate) const PLAIN: Shape = Shape { narrow: false, order: 0, queues: 1, persistent: false };

pub(crate) struct Ring {
    pub(crate) start: *mut u8,
    pub(crate) references: Vec<u32>,
    pub(crate) port: u32,
    pub(crate) produced: u32,
    pub(crate) consumed: u32,
    pub(crate) entries: u32,
}

// SAFETY: the pointer is into memory of the hypervisor, which the front-end holds.
unsafe impl Send for Ring {}

/// A page of the domain that is granted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    pub(crate) reference: u32,
    pub(crate) page: usize,
}

pub(crate) struct Frontend {
    pub(crate) hypervisor: Arc<Hypervisor>,
    pub(crate) id: DeviceId,
    pub(crate) shape: Shape,
    pub(crate) rings: Vec<Ring>,
    next_reference: u32,
    next_id: u64,
    /// The operation that the answer to each request has to name.
    asked: HashMap<u64, u8>,
    /// Answers that came for others.
    pub(crate) answers: HashMap<u64, (u8, i16)>,
}

impl Frontend {
    /// A front-end that has written nothing yet.
    pub(crate) fn new(hypervisor: &Arc<Hypervisor>, id: DeviceId, shape: Shape) -> Frontend {
        Frontend {
            hypervisor: hypervisor.clone(),
            id,
            shape,
            rings: Vec::new(),
            // Devices of one domain share its numbers.
            next_reference: 8 + id.devid.wrapping_sub(51712) * 1000,
            next_id: 1,
            asked: HashMap::new(),
            answers: HashMap::new(),
        }
    }

    /// A device made by the toolstack and connected.
    pub(crate) fn connected(hypervisor: &Arc<Hypervisor>, id: DeviceId, shape: Shape) -> Frontend {
        create(hypervisor, id, &[]);
        let mut frontend = Frontend::new(hypervisor, id, shape);
        frontend.wait_back("2");
        frontend.connect();
        frontend
    }

    pub(crate) fn set(&self, key: &str, value: &str) {
        self.hypervisor.store.set(&format!("{}/{key}", front(self.id)), value);
    }

    pub(crate) fn state(&self, state: &str) {
        self.set("state", state);
    }

    pub(crate) fn wait_back(&self, state: &str) {
        let path = format!("{}/state", back(self.id));
        assert_eq!(self.hypervisor.store.wait_for(&path, state).as_deref(), Some(state), "back-end's state");
    }

    /// Makes rings, writes their places, and waits for the back-end.
    pub(crate) fn connect(&mut self) {
        self.offer();
        self.state("3");
        self.wait_back("4");
        self.state("4");
    }

    /// Makes rings and writes their places.
    pub(crate) fn offer(&mut self) {
        let Shape { narrow, order, queues, persistent } = self.shape;
        self.rings.clear();
        self.set("protocol", if narrow { "x86_32-abi" } else { "x86_64-abi" });
        self.set("feature-persistent", if persistent { "1" } else { "0" });
        if queues > 1 {
            self.set("multi-queue-num-queues", &queues.to_string());
        }
        if order > 0 {
            self.set("ring-page-order", &order.to_string());
        }
        for queue in 0..queues {
            let pages: Vec<_> = (0..1 << order).map(|_| self.page(true)).collect();
            assert!(pages.windows(2).all(|pair| pair[0].page + 1 == pair[1].page));
            let prefix = if queues > 1 { format!("queue-{queue}/") } else { String::new() };
            for (index, page) in pages.iter().enumerate() {
                let key = if order > 0 { format!("ring-ref{index}") } else { "ring-ref".into() };
                self.set(&format!("{prefix}{key}"), &page.reference.to_string());
            }
            let port = self.next_reference;
            self.next_reference += 1;
            self.hypervisor.offer(self.id.domid, port).unwrap();
            self.set(&format!("{prefix}event-channel"), &port.to_string());
            let start = self.hypervisor.at(pages[0].page);
            let ring = Ring {
                start,
                references: pages.iter().map(|page| page.reference).collect(),
                port,
                produced: 0,
                consumed: 0,
                entries: 32 << order,
            };
            ring.word(1).store(1, Ordering::SeqCst);
            ring.word(3).store(1, Ordering::SeqCst);
            self.rings.push(ring);
        }
    }

    /// A fresh page, granted.
    pub(crate) fn page(&mut self, writable: bool) -> Page {
        let (reference, page) = (self.next_reference, self.hypervisor.page());
        self.next_reference += 1;
        self.hypervisor.grant(self.id.domid, reference, page, writable);
        Page { reference, page }
    }

    #[allow(clippy::mut_from_ref, reason = "the domain's memory, which the back-end reaches, too")]
    pub(crate) fn bytes(&self, page: Page) -> &mut [u8] {
        // SAFETY: the hypervisor's memory; tests do not use a page twice at a time.
        unsafe { std::slice::from_raw_parts_mut(self.hypervisor.at(page.page), 4096) }
    }

    pub(crate) fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id << 32 | 0x55
    }

    /// Puts an entry of a request with segments in it; shown by [`push`](Self::push).
    pub(crate) fn put(
        &mut self,
        ring: usize,
        operation: u8,
        id: u64,
        sector: u64,
        segments: &[(u32, u8, u8)],
    ) {
        let mut words = self.head(operation, segments.len() as u8, id, sector);
        for (reference, first, last) in segments {
            words.extend([*reference, u32::from(*first) | u32::from(*last) << 8]);
        }
        self.put_words(ring, &words);
    }

    pub(crate) fn head(&self, operation: u8, second: u8, id: u64, sector: u64) -> Vec<u32> {
        let mut words = vec![u32::from(operation) | u32::from(second) << 8];
        if !self.shape.narrow {
            words.push(0xdead_beef);
        }
        words.extend([id as u32, (id >> 32) as u32, sector as u32, (sector >> 32) as u32]);
        words
    }

    pub(crate) fn put_words(&mut self, ring: usize, words: &[u32]) {
        let at = if self.shape.narrow { 1 } else { 2 };
        let [operation, second, ..] = words[0].to_le_bytes();
        // An indirect request is answered as what it stands for.
        let operation = if operation == INDIRECT { second } else { operation };
        self.asked.insert(u64::from(words[at]) | u64::from(words[at + 1]) << 32, operation);
        let size = if self.shape.narrow { 108 } else { 112 };
        let ring = &mut self.rings[ring];
        let slot = (ring.produced % ring.entries) as usize;
        for (index, word) in words.iter().enumerate() {
            // SAFETY: in the ring.
            unsafe { ring.start.add(64 + slot * size + 4 * index).cast::<u32>().write_volatile(*word) };
        }
        ring.produced = ring.produced.wrapping_add(1);
    }

    /// Shows what was put, and notifies if the back-end wants that.
    pub(crate) fn push(&mut self, ring: usize) {
        let id = self.id;
        let ring = &mut self.rings[ring];
        let old = ring.word(0).load(Ordering::SeqCst);
        ring.word(0).store(ring.produced, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let event = ring.word(1).load(Ordering::SeqCst);
        if ring.produced.wrapping_sub(event) < ring.produced.wrapping_sub(old) {
            self.hypervisor.notify(id.domid, ring.port);
        }
    }

    /// Takes the answers that are there.
    pub(crate) fn reap(&mut self, ring: usize) -> Vec<(u64, u8, i16)> {
        let size = if self.shape.narrow { 108 } else { 112 };
        let ring = &mut self.rings[ring];
        let mut answers = Vec::new();
        let shown = ring.word(2).load(Ordering::SeqCst);
        while ring.consumed != shown {
            let slot = (ring.consumed % ring.entries) as usize;
            let at = ring.start.wrapping_add(64 + slot * size).cast::<u32>();
            // SAFETY: in the ring.
            let words = unsafe { [at.read_volatile(), at.add(1).read_volatile(), at.add(2).read_volatile()] };
            let id = u64::from(words[0]) | u64::from(words[1]) << 32;
            answers.push((id, words[2] as u8, (words[2] >> 16) as u16 as i16));
            ring.consumed = ring.consumed.wrapping_add(1);
        }
        ring.word(3).store(ring.consumed.wrapping_add(1), Ordering::SeqCst);
        fence(Ordering::SeqCst);
        answers
    }

    /// Waits for the answer to a request.
    pub(crate) fn wait(&mut self, ring: usize, id: u64) -> i16 {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            for (id, operation, status) in self.reap(ring) {
                assert_eq!(self.asked.remove(&id), Some(operation), "the operation of {id:#x}");
                assert!(self.answers.insert(id, (operation, status)).is_none(), "answered twice: {id:#x}");
            }
            if let Some((_, status)) = self.answers.remove(&id) {
                return status;
            }
            assert!(Instant::now() < until, "no answer to {id:#x}");
            self.hypervisor.wait(self.id.domid, self.rings[ring].port, 1);
        }
    }

    /// One request, from putting to answer.
    pub(crate) fn ask(&mut self, ring: usize, operation: u8, sector: u64, segments: &[(u32, u8, u8)]) -> i16 {
        let id = self.fresh_id();
        self.put(ring, operation, id, sector, segments);
        self.push(ring);
        self.wait(ring, id)
    }

    pub(crate) fn discard(&mut self, ring: usize, sector: u64, sectors: u64, flag: u8) -> i16 {
        let id = self.fresh_id();
        let mut words = self.head(DISCARD, flag, id, sector);
        words.extend([sectors as u32, (sectors >> 32) as u32]);
        self.put_words(ring, &words);
        self.push(ring);
        self.wait(ring, id)
    }

    /// An indirect request; the pages that describe its segments are made for it. Gives its id.
    pub(crate) fn put_indirect(
        &mut self,
        ring: usize,
        write: u8,
        sector: u64,
        segments: &[(u32, u8, u8)],
    ) -> u64 {
        let mut pages = Vec::new();
        for part in segments.chunks(512) {
            let page = self.page(true);
            for (index, (reference, first, last)) in part.iter().enumerate() {
                let bytes = self.bytes(page);
                bytes[index * 8..][..4].copy_from_slice(&reference.to_le_bytes());
                bytes[index * 8 + 4..][..4].copy_from_slice(&[*first, *last, 0, 0]);
            }
            pages.push(page.reference);
        }
        let id = self.fresh_id();
        let mut words = self.head(INDIRECT, write, id, sector);
        words[0] |= (segments.len() as u32) << 16;
        words.push(0);
        pages.resize(8, 0);
        words.extend(pages);
        self.put_words(ring, &words);
        id
    }

    /// Writes or reads through whole pages of its own, as many requests as that takes.
    pub(crate) fn write(&mut self, ring: usize, sector: u64, data: &[u8]) {
        for (index, part) in data.chunks(11 * 4096).enumerate() {
            let segments = self.fill(part);
            assert_eq!(self.ask(ring, WRITE, sector + index as u64 * 88, &segments), OK);
        }
    }

    /// Pages with this data.
    pub(crate) fn fill(&mut self, data: &[u8]) -> Vec<(u32, u8, u8)> {
        let mut segments = Vec::new();
        for part in data.chunks(4096) {
            let page = self.page(false);
            let writable = self.shape.persistent;
            self.hypervisor.grant(self.id.domid, page.reference, page.page, writable);
            self.bytes(page)[..part.len()].copy_from_slice(part);
            segments.push((page.reference, 0, (part.len() / 512 - 1) as u8));
        }
        segments
    }

    pub(crate) fn read(&mut self, ring: usize, sector: u64, len: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < len {
            let now = (len - data.len()).min(11 * 4096);
            let pages: Vec<_> = (0..now.div_ceil(4096)).map(|_| self.page(true)).collect();
            let mut left = now;
            let segments: Vec<_> = pages
                .iter()
                .map(|page| {
                    let part = left.min(4096);
                    left -= part;
                    (page.reference, 0, (part / 512 - 1) as u8)
                })
                .collect();
            assert_eq!(self.ask(ring, READ, sector + data.len() as u64 / 512, &segments), OK);
            for (page, (_, _, last)) in pages.iter().zip(&segments) {
                data.extend_from_slice(&self.bytes(*page)[..(usize::from(*last) + 1) * 512]);
            }
        }
        data
    }
}

impl Ring {
    /// One of the shared indices: req_prod, req_event, rsp_prod, rsp_event.
    pub(crate) fn word(&self, index: usize) -> &AtomicU32 {
        // SAFETY: at the ring's start, in memory that the front-end holds.
        unsafe { &*self.start.cast::<AtomicU32>().add(index) }
    }
}

/// Bytes that differ from place to place.
pub(crate) fn pattern(seed: u32, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        })
        .collect()
}
