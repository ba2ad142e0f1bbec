//! A front-end written by hand, that can say what no decent one would.

use std::io::{Error, ErrorKind, IoSlice, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use vbd_testing::eventually;

pub(crate) mod code {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const SET_LOG_BASE: u32 = 6;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const GET_INFLIGHT_FD: u32 = 31;
    pub(crate) const SET_INFLIGHT_FD: u32 = 32;
    pub(crate) const RESET_DEVICE: u32 = 34;
    pub(crate) const ADD_MEM_REG: u32 = 37;
    pub(crate) const REM_MEM_REG: u32 = 38;
}

pub(crate) const LOG_ALL: u64 = 1 << 26;
pub(crate) const EVENT_INDEX: u64 = 1 << 29;
pub(crate) const INDIRECT: u64 = 1 << 28;
pub(crate) const FLUSH: u64 = 1 << 9;
const PROTOCOL: u64 = 1 << 30;
const VERSION_1: u64 = 1 << 32;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const TABLE: u16 = 4;

/// Guest memory, shared with the server.
pub(crate) struct Guest {
    pub(crate) file: OwnedFd,
    base: *mut u8,
    pub(crate) len: usize,
    /// Guest-physical address of its first byte.
    pub(crate) at: u64,
}

impl Guest {
    pub(crate) fn new(at: u64, len: usize) -> Self {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, len as u64).unwrap();
        Guest::of(file, at, len)
    }

    /// A file that exists.
    pub(crate) fn of(file: OwnedFd, at: u64, len: usize) -> Self {
        use rustix::mm::{MapFlags, ProtFlags, mmap};
        // SAFETY: a new mapping.
        let base = unsafe {
            mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0)
        };
        Guest { file, base: base.unwrap().cast(), len, at }
    }

    /// The front-end's address of a guest address.
    pub(crate) fn user(&self, address: u64) -> u64 {
        self.pointer(address) as u64
    }

    fn pointer(&self, address: u64) -> *mut u8 {
        let offset = (address - self.at) as usize;
        assert!(offset < self.len);
        self.base.wrapping_add(offset)
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        bytes.iter().enumerate().for_each(|(index, byte)| self.u8(address + index as u64).store(*byte, SEQ));
    }

    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        (0..len).map(|index| self.u8(address + index as u64).load(SEQ)).collect()
    }

    pub(crate) fn u8(&self, address: u64) -> &AtomicU8 {
        // SAFETY: inside the mapping.
        unsafe { AtomicU8::from_ptr(self.pointer(address)) }
    }

    pub(crate) fn u16(&self, address: u64) -> &AtomicU16 {
        // SAFETY: inside the mapping, at addresses that tests align.
        unsafe { AtomicU16::from_ptr(self.pointer(address).cast()) }
    }

    pub(crate) fn u32(&self, address: u64) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.pointer(address).cast()) }
    }

    pub(crate) fn u64(&self, address: u64) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.pointer(address).cast()) }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SAFETY: ours.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}

const SEQ: Ordering = Ordering::SeqCst;

/// The connection.
pub(crate) struct Frontend {
    pub(crate) socket: UnixStream,
}

const NEED_REPLY: u32 = 8;

impl Frontend {
    pub(crate) fn connect(path: &Path) -> Self {
        // Another process makes the socket first, and listens then.
        let mut socket = None;
        eventually("somebody listens", || {
            let connected = UnixStream::connect(path);
            let refused = |error: &Error| error.kind() == ErrorKind::ConnectionRefused;
            if !connected.as_ref().is_err_and(refused) {
                socket = Some(connected.unwrap());
            }
            socket.is_some()
        });
        let socket = socket.unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Frontend { socket }
    }

    pub(crate) fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let header = [request, 1 | flags, payload.len() as u32].map(u32::to_ne_bytes);
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let pieces = [IoSlice::new(header.as_flattened()), IoSlice::new(payload)];
        // A server that has given the connection up is seen when an answer is missing.
        let _ = sendmsg(&self.socket, &pieces, &mut control, SendFlags::NOSIGNAL);
    }

    /// The payload of the next message from the server; none if it has closed the connection.
    pub(crate) fn receive(&self) -> Option<Vec<u8>> {
        let mut header = [0; 12];
        if let Err(error) = (&self.socket).read_exact(&mut header) {
            assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "no answer, and the connection is open");
            return None;
        }
        let len = u32::from_ne_bytes(header[8..].try_into().unwrap()) as usize;
        let mut payload = vec![0; len];
        (&self.socket).read_exact(&mut payload).ok()?;
        Some(payload)
    }

    /// The payload and the descriptor of the next message.
    pub(crate) fn receive_file(&self) -> (Vec<u8>, OwnedFd) {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 512];
        let mut pieces = [std::io::IoSliceMut::new(&mut bytes)];
        let got = recvmsg(&self.socket, &mut pieces, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap().bytes;
        let file = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        (bytes[12..got].to_vec(), file.unwrap())
    }

    pub(crate) fn ask(&self, request: u32, payload: &[u8]) -> Option<Vec<u8>> {
        self.send(request, 0, payload, &[]);
        self.receive()
    }

    /// Sends a message and says whether the server has accepted it; none if it has closed the connection.
    pub(crate) fn tell(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Option<bool> {
        self.send(request, NEED_REPLY, payload, fds);
        self.receive().map(|answer| answer == [0; 8])
    }

    pub(crate) fn must(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.tell(request, payload, fds), Some(true), "message {request}");
    }

    /// Features, protocol features and memory, as a front-end does it.
    pub(crate) fn negotiate(&self, features: u64) -> u64 {
        let offered = self.ask(code::GET_FEATURES, &[]).unwrap();
        let offered = u64::from_ne_bytes(offered.try_into().unwrap());
        self.send(code::SET_OWNER, 0, &[], &[]);
        let protocol = self.ask(code::GET_PROTOCOL_FEATURES, &[]).unwrap();
        self.send(code::SET_PROTOCOL_FEATURES, 0, &protocol, &[]);
        let features = features | PROTOCOL | VERSION_1;
        self.must(code::SET_FEATURES, &(features & offered).to_ne_bytes(), &[]);
        offered
    }

    pub(crate) fn region(guest: &Guest) -> Vec<u8> {
        words(&[0, guest.at, guest.len as u64, guest.user(guest.at), 0])
    }

    pub(crate) fn share(&self, guest: &Guest) {
        self.must(code::ADD_MEM_REG, &Frontend::region(guest), &[guest.file.as_fd()]);
    }

    /// Starts a queue; the server's answer to its last message.
    pub(crate) fn start(&self, queue: &Queue, guest: &Guest) -> Option<bool> {
        self.start_at(queue, guest, 0)
    }

    pub(crate) fn start_at(&self, queue: &Queue, guest: &Guest, base: u32) -> Option<bool> {
        let index = u64::from(queue.index);
        self.must(code::SET_VRING_NUM, &halves(&[queue.index, queue.size.into()]), &[]);
        self.must(code::SET_VRING_BASE, &halves(&[queue.index, base]), &[]);
        self.tell(code::SET_VRING_ADDR, &queue.addresses(guest, 0), &[])?;
        self.must(code::SET_VRING_CALL, &words(&[index]), &[queue.call.as_fd()]);
        self.must(code::SET_VRING_ERR, &words(&[index]), &[queue.error.as_fd()]);
        self.must(code::SET_VRING_KICK, &words(&[index]), &[queue.kick.as_fd()]);
        self.tell(code::SET_VRING_ENABLE, &halves(&[queue.index, 1]), &[])
    }

    /// Stops a queue: the index of the next available entry.
    pub(crate) fn stop(&self, index: u32) -> Option<u32> {
        let answer = self.ask(code::GET_VRING_BASE, &halves(&[index, 0]))?;
        Some(u32::from_ne_bytes(answer[4..].try_into().unwrap()))
    }

    pub(crate) fn config(&self, offset: u32, len: u32) -> Vec<u8> {
        let mut payload = halves(&[offset, len, 0]);
        payload.resize(12 + len as usize, 0);
        self.ask(code::GET_CONFIG, &payload).unwrap()[12..].to_vec()
    }

    pub(crate) fn set_config(&self, offset: u32, bytes: &[u8]) -> Option<bool> {
        let mut payload = halves(&[offset, bytes.len() as u32, 0]);
        payload.extend_from_slice(bytes);
        self.tell(code::SET_CONFIG, &payload, &[])
    }

    pub(crate) fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.config(0, 8).try_into().unwrap()) * 512
    }

    /// Whether the server still answers.
    pub(crate) fn is_alive(&self) -> bool {
        self.ask(code::GET_FEATURES, &[]).is_some()
    }
}

pub(crate) fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

pub(crate) fn halves(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// A queue: descriptors, available ring and used ring at 0, 0x4000 and 0x8000 of its place in guest memory, and data
/// from 0x10000 on.
pub(crate) struct Queue {
    pub(crate) index: u32,
    pub(crate) size: u16,
    pub(crate) at: u64,
    pub(crate) kick: OwnedFd,
    pub(crate) call: OwnedFd,
    pub(crate) error: OwnedFd,
    available: std::cell::Cell<u16>,
    used: std::cell::Cell<u16>,
}

impl Queue {
    pub(crate) const PLACE: u64 = 0x20000;

    pub(crate) fn new(guest: &Guest, index: u32, size: u16) -> Self {
        let fd = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let at = guest.at + u64::from(index) * Queue::PLACE;
        let (available, used) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
        Queue { index, size, at, kick: fd(), call: fd(), error: fd(), available, used }
    }

    pub(crate) fn data(&self) -> u64 {
        self.at + 0x10000
    }

    pub(crate) fn available_ring(&self) -> u64 {
        self.at + 0x4000
    }

    pub(crate) fn used_ring(&self) -> u64 {
        self.at + 0x8000
    }

    pub(crate) fn addresses(&self, guest: &Guest, log: u64) -> Vec<u8> {
        let mut payload = halves(&[self.index, u32::from(log != 0)]);
        let user = |at| guest.user(at);
        payload.extend(words(&[user(self.at), user(self.used_ring()), user(self.available_ring()), log]));
        payload
    }

    pub(crate) fn describe(&self, guest: &Guest, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        put_descriptor(guest, self.at + 16 * u64::from(index), address, len, flags, next);
    }

    /// Puts a head into the available ring, without a kick.
    pub(crate) fn offer(&self, guest: &Guest, head: u16) {
        let at = self.available.get();
        guest.u16(self.available_ring() + 4 + 2 * u64::from(at % self.size)).store(head, SEQ);
        self.available.set(at.wrapping_add(1));
        guest.u16(self.available_ring() + 2).store(at.wrapping_add(1), SEQ);
    }

    pub(crate) fn kick(&self) {
        fence(SEQ);
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// A request of three descriptors from `head` on: header, data, status, in a place of its own.
    pub(crate) fn request(&self, guest: &Guest, head: u16, kind: u32, sector: u64, data: u64, len: u32) {
        let header = self.data() + 0x8000 + u64::from(head) * 32;
        guest.u32(header).store(kind, SEQ);
        guest.u64(header + 8).store(sector, SEQ);
        guest.u8(header + 16).store(0xff, SEQ);
        let reads = kind == 0 || kind == 8;
        self.describe(guest, head, header, 16, NEXT, head + 1);
        if len > 0 {
            self.describe(guest, head + 1, data, len, NEXT | if reads { WRITE } else { 0 }, head + 2);
            self.describe(guest, head + 2, header + 16, 1, WRITE, 0);
        } else {
            self.describe(guest, head + 1, header + 16, 1, WRITE, 0);
        }
        self.offer(guest, head);
    }

    pub(crate) fn status(&self, guest: &Guest, head: u16) -> u8 {
        guest.u8(self.data() + 0x8000 + u64::from(head) * 32 + 16).load(SEQ)
    }

    /// A request that is kicked and waited for; its status.
    pub(crate) fn round(&self, guest: &Guest, kind: u32, sector: u64, data: u64, len: u32) -> u8 {
        self.request(guest, 0, kind, sector, data, len);
        self.kick();
        assert_eq!(self.wait(guest, 1)[0].0, 0);
        self.status(guest, 0)
    }

    pub(crate) fn used_index(&self, guest: &Guest) -> u16 {
        guest.u16(self.used_ring() + 2).load(SEQ)
    }

    /// Used entries that have not been taken: head and length.
    pub(crate) fn completed(&self, guest: &Guest) -> Vec<(u32, u32)> {
        let mut entries = Vec::new();
        while self.used.get() != self.used_index(guest) {
            let entry = self.used_ring() + 4 + 8 * u64::from(self.used.get() % self.size);
            entries.push((guest.u32(entry).load(SEQ), guest.u32(entry + 4).load(SEQ)));
            self.used.set(self.used.get().wrapping_add(1));
        }
        entries
    }

    /// Waits for so many used entries, by the call eventfd.
    pub(crate) fn wait(&self, guest: &Guest, count: usize) -> Vec<(u32, u32)> {
        let mut entries = Vec::new();
        loop {
            let _ = rustix::io::read(&self.call, &mut [0; 8]);
            entries.extend(self.completed(guest));
            // Asks for an interrupt with the next entry, and looks again before it relies on that.
            guest.u16(self.available_ring() + 4 + 2 * u64::from(self.size)).store(self.used.get(), SEQ);
            fence(SEQ);
            entries.extend(self.completed(guest));
            if entries.len() >= count {
                return entries;
            }
            assert!(is_readable(&self.call, 20), "no interrupt; {} of {count} entries", entries.len());
        }
    }

    /// Waits until the server says that the queue is broken.
    pub(crate) fn wait_broken(&self) {
        assert!(is_readable(&self.error, 20), "the queue was not given up");
    }

    /// Pretends to be a driver that has been through so many entries.
    pub(crate) fn set_position(&self, available: u16, used: u16) {
        self.available.set(available);
        self.used.set(used);
    }
}

pub(crate) fn put_descriptor(guest: &Guest, at: u64, address: u64, len: u32, flags: u16, next: u16) {
    guest.u64(at).store(address, SEQ);
    guest.u32(at + 8).store(len, SEQ);
    guest.u16(at + 12).store(flags, SEQ);
    guest.u16(at + 14).store(next, SEQ);
}

pub(crate) fn is_readable(fd: &impl AsFd, seconds: i64) -> bool {
    let mut set = [PollFd::new(fd, PollFlags::IN)];
    poll(&mut set, Some(&Timespec { tv_sec: seconds, tv_nsec: 0 })).unwrap() == 1
}

/// A front-end with memory and one queue that runs.
pub(crate) struct Machine {
    pub(crate) frontend: Frontend,
    pub(crate) queue: Queue,
    pub(crate) guest: Guest,
}

impl Machine {
    pub(crate) fn start(path: &Path, features: u64) -> Self {
        let guest = Guest::new(0x1_0000_0000, 1 << 20);
        let frontend = Frontend::connect(path);
        frontend.negotiate(features);
        frontend.share(&guest);
        let queue = Queue::new(&guest, 0, 64);
        assert_eq!(frontend.start(&queue, &guest), Some(true));
        Machine { frontend, queue, guest }
    }

    pub(crate) fn round(&self, kind: u32, sector: u64, len: u32) -> u8 {
        self.queue.round(&self.guest, kind, sector, self.queue.data(), len)
    }
}
