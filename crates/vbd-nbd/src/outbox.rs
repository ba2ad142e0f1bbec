//! What waits to be sent: headers, and payloads that are sent from where they are.

use std::collections::VecDeque;

use vbd_core::IoVec;

use crate::memory::Buffer;
use crate::protocol::{
    EXTENDED_REPLY_MAGIC, Headers, NbdError, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk,
};

/// The longest header with the fixed part of its payload: an extended reply with an offset.
const MOST_HEAD: usize = 40;

/// What follows a header.
pub(crate) enum Payload {
    None,
    Text(&'static str),
    /// Messages of the handshake.
    Bytes(Vec<u8>),
    /// So many bytes of a buffer.
    Data(Buffer, usize),
}

impl Payload {
    fn bytes(&self) -> &[u8] {
        match self {
            Payload::None => &[],
            Payload::Text(text) => text.as_bytes(),
            Payload::Bytes(bytes) => bytes,
            Payload::Data(buffer, len) => &buffer.bytes()[..*len],
        }
    }
}

struct Message {
    head: [u8; MOST_HEAD],
    head_len: usize,
    payload: Payload,
}

/// Messages in the order in which they are sent.
#[derive(Default)]
pub(crate) struct Outbox {
    messages: VecDeque<Message>,
    /// Bytes of the first message that are gone.
    sent: usize,
}

/// The request that a reply is about.
#[derive(Clone, Copy)]
pub(crate) struct About {
    pub(crate) headers: Headers,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
}

impl Outbox {
    pub(crate) fn len(&self) -> usize {
        self.messages.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// Forgets everything, as nobody is there to receive it.
    pub(crate) fn clear(&mut self) {
        self.messages.clear();
        self.sent = 0;
    }

    /// Bytes without a header.
    pub(crate) fn raw(&mut self, payload: Payload) {
        self.messages.push_back(Message { head: [0; MOST_HEAD], head_len: 0, payload });
    }

    /// A command without data is done.
    pub(crate) fn done(&mut self, about: About) {
        match about.headers {
            // Shorter than a chunk, and allowed for what has no data.
            Headers::Simple | Headers::Structured => self.simple(about.cookie, 0, Payload::None),
            Headers::Extended => self.chunk(about, chunk::DONE, chunk::NONE, &[], 0, Payload::None),
        }
    }

    /// A read is done that has sent all its data, or had none to send.
    pub(crate) fn none(&mut self, about: About) {
        match about.headers {
            Headers::Simple => self.simple(about.cookie, 0, Payload::None),
            _ => self.chunk(about, chunk::DONE, chunk::NONE, &[], 0, Payload::None),
        }
    }

    /// A command has failed.
    pub(crate) fn error(&mut self, about: About, error: NbdError) {
        if about.headers == Headers::Simple {
            return self.simple(about.cookie, error as u32, Payload::None);
        }
        let message = error.message();
        let len = u16::try_from(message.len()).unwrap_or(0).to_be_bytes();
        let fixed = [&(error as u32).to_be_bytes()[..], &len].concat();
        self.chunk(about, chunk::DONE, chunk::ERROR, &fixed, message.len(), Payload::Text(message));
    }

    /// `len` bytes from `offset` on, of which `payload` has the first; [`raw`](Self::raw) adds others.
    pub(crate) fn data(&mut self, about: About, last: bool, offset: u64, len: usize, payload: Payload) {
        if about.headers == Headers::Simple {
            return self.simple(about.cookie, 0, payload);
        }
        let flags = if last { chunk::DONE } else { 0 };
        self.chunk(about, flags, chunk::OFFSET_DATA, &offset.to_be_bytes(), len, payload);
    }

    /// What a range consists of in one of the contexts, as descriptors that `payload` has.
    pub(crate) fn status(&mut self, about: About, last: bool, fixed: &[u8], len: usize, payload: Payload) {
        let kind = match about.headers {
            Headers::Extended => chunk::BLOCK_STATUS_EXT,
            _ => chunk::BLOCK_STATUS,
        };
        let flags = if last { chunk::DONE } else { 0 };
        self.chunk(about, flags, kind, fixed, len, payload);
    }

    fn simple(&mut self, cookie: u64, error: u32, payload: Payload) {
        let mut head = Head::new();
        head.put(&SIMPLE_REPLY_MAGIC.to_be_bytes());
        head.put(&error.to_be_bytes());
        head.put(&cookie.to_be_bytes());
        self.push(head, payload);
    }

    /// A chunk whose payload is `fixed` and `len` more bytes.
    fn chunk(&mut self, about: About, flags: u16, kind: u16, fixed: &[u8], len: usize, payload: Payload) {
        let len = fixed.len() + len;
        let mut head = Head::new();
        if about.headers == Headers::Extended {
            head.put(&EXTENDED_REPLY_MAGIC.to_be_bytes());
            head.put(&flags.to_be_bytes());
            head.put(&kind.to_be_bytes());
            head.put(&about.cookie.to_be_bytes());
            head.put(&about.offset.to_be_bytes());
            head.put(&(len as u64).to_be_bytes());
        } else {
            head.put(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
            head.put(&flags.to_be_bytes());
            head.put(&kind.to_be_bytes());
            head.put(&about.cookie.to_be_bytes());
            head.put(&u32::try_from(len).expect("payloads are bounded").to_be_bytes());
        }
        head.put(fixed);
        self.push(head, payload);
    }

    fn push(&mut self, head: Head, payload: Payload) {
        self.messages.push_back(Message { head: head.bytes, head_len: head.len, payload });
    }

    /// Fills `pieces` with what is to be sent next; says how many. They are valid until the outbox is changed.
    pub(crate) fn pieces(&self, pieces: &mut [IoVec]) -> usize {
        let parts = self
            .messages
            .iter()
            .flat_map(|message| [&message.head[..message.head_len], message.payload.bytes()]);
        let (mut skip, mut count) = (self.sent, 0);
        for part in parts {
            let gone = skip.min(part.len());
            skip -= gone;
            let part = &part[gone..];
            if part.is_empty() {
                continue;
            }
            let Some(piece) = pieces.get_mut(count) else { break };
            *piece = IoVec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
            count += 1;
        }
        count
    }

    /// So many bytes are gone; buffers that were sent are free again.
    pub(crate) fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        while let Some(message) = self.messages.front() {
            let len = message.head_len + message.payload.bytes().len();
            if self.sent < len {
                break;
            }
            self.sent -= len;
            self.messages.pop_front();
        }
    }
}

struct Head {
    bytes: [u8; MOST_HEAD],
    len: usize,
}

impl Head {
    fn new() -> Self {
        Head { bytes: [0; MOST_HEAD], len: 0 }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
}
