//! The transmission phase: bytes in, requests to a disk out; requests back in, replies out. It touches no socket and
//! no reactor.
//!
//! Long requests are cut into pieces of at most [`PIECE`] bytes, each with a buffer and a request of its own, so that
//! storage and socket work at the same time and no client needs more memory than a piece to move on.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use vbd_core::track::Track;
use vbd_core::{Flags, IoVec, Operation, Request, Result, SECTOR, Sink};

use crate::command::{Command, Kind, Terms, Verdict};
use crate::extents;
use crate::memory::{Account, Buffer, PIECE};
use crate::outbox::{About, Outbox, Payload};
use crate::protocol::{Header, Headers, MAX_REQUEST, NbdError};
use crate::slab::Slab;

/// The most commands of one client that are taken at once.
const MOST_COMMANDS: usize = 1024;
/// From here on, what is left of a payload is received into its buffer instead of being copied.
const DIRECT: usize = 8 << 10;
/// Room for the answer to a block status, in bytes.
const STATUS: usize = 64 << 10;

/// A part of a command that is one request.
struct Piece {
    command: u32,
    buffer: Option<Buffer>,
    offset: u64,
    len: usize,
    /// Which part of its command, for a read that is sent as a whole.
    index: usize,
}

enum Input {
    /// A header, of which so many bytes are there.
    Header(usize),
    /// A command that waits for memory.
    Start(u32),
    /// A read that is sent piece by piece, and nothing else meanwhile.
    Stream(u32),
    /// A payload of which a piece is being received.
    Fill { piece: u32, have: usize },
    /// A payload that nobody wants, and what is then answered.
    Skip(u64, About, NbdError),
    /// The client has said goodbye, or nonsense.
    Ended,
}

/// A dirty bitmap that the client wants to know of.
pub(crate) struct Dirty {
    /// The number by which it knows it.
    pub(crate) id: u32,
    pub(crate) name: String,
    pub(crate) track: Arc<Track>,
}

/// Who the requests of this turn come back to, and when it is.
pub(crate) struct Turn {
    pub(crate) sink: Rc<dyn Sink>,
    pub(crate) now: Instant,
}

/// One client's requests.
pub(crate) struct Transmission {
    terms: Terms,
    account: Rc<Account>,
    input: Input,
    head: [u8; MAX_REQUEST],
    commands: Slab<Command>,
    pieces: Slab<Piece>,
    /// Vectors of requests that came back, for others.
    vectors: Vec<Vec<IoVec>>,
    /// The last payload was long: the next may be, and is better received into its own buffer.
    long_payloads: bool,
    /// Requests for the disk.
    pub(crate) ready: Vec<Request>,
    /// Bitmaps that belong to the answer to a block status.
    pub(crate) bitmaps: Vec<Dirty>,
}

impl Transmission {
    pub(crate) fn new(terms: Terms, account: Rc<Account>) -> Self {
        Transmission {
            terms,
            account,
            input: Input::Header(0),
            head: [0; MAX_REQUEST],
            commands: Slab::default(),
            pieces: Slab::default(),
            vectors: Vec::new(),
            long_payloads: false,
            ready: Vec::new(),
            bitmaps: Vec::new(),
        }
    }

    /// Whether no command is being carried out.
    pub(crate) fn is_idle(&self) -> bool {
        self.pieces.len() == 0 && self.ready.is_empty()
    }

    /// Commands that are being carried out.
    pub(crate) fn under_way(&self) -> usize {
        self.commands.len()
    }

    /// Whether nothing more is read from the client.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.input, Input::Ended)
    }

    /// Takes nothing more. What has come of a payload is dropped; what waits for memory is given up.
    pub(crate) fn end(&mut self, out: &mut Outbox) {
        match std::mem::replace(&mut self.input, Input::Ended) {
            Input::Fill { piece, .. } => drop(self.pieces.take(piece)),
            Input::Start(index) | Input::Stream(index) => {
                let command = self.commands.get(index);
                command.taken = command.len;
                command.error.get_or_insert(NbdError::Shutdown);
                self.finish_if_done(index, out);
            }
            Input::Header(_) | Input::Skip(..) | Input::Ended => {}
        }
    }

    /// Whether bytes can be taken now. Where not, memory or room for commands is waited for.
    pub(crate) fn is_open(&mut self, turn: &Turn, out: &mut Outbox) -> bool {
        match self.input {
            Input::Ended => false,
            Input::Start(command) => self.start(command, turn, out) && self.has_room(out),
            Input::Stream(command) => {
                self.stream(command, turn);
                false
            }
            Input::Header(_) => self.has_room(out),
            _ => true,
        }
    }

    fn has_room(&self, out: &Outbox) -> bool {
        !self.has_ended() && self.commands.len() + out.len() < MOST_COMMANDS
    }

    /// Where the client's next bytes are best received: into the payload they belong to. Then
    /// [`filled`](Self::filled) is called.
    pub(crate) fn space(&mut self) -> Option<&mut [u8]> {
        let Input::Fill { piece, have } = self.input else { return None };
        let piece = self.pieces.get(piece);
        if piece.len - have < DIRECT {
            return None;
        }
        let end = piece.len;
        piece.buffer.as_mut().map(|buffer| &mut buffer.bytes_mut()[have..end])
    }

    /// So many bytes were received into [`space`](Self::space).
    pub(crate) fn filled(&mut self, bytes: usize, turn: &Turn, out: &mut Outbox) {
        if let Input::Fill { piece, have } = self.input {
            self.advance_fill(piece, have + bytes, turn, out);
        }
    }

    /// How many bytes are best read at once when there is no [`space`](Self::space).
    pub(crate) fn appetite(&self, most: usize) -> usize {
        if self.long_payloads { most.min(4096) } else { most }
    }

    /// Takes bytes from the client: how many. Fewer than given where memory or room lacks, or at the end.
    pub(crate) fn take(&mut self, bytes: &[u8], turn: &Turn, out: &mut Outbox) -> usize {
        let mut rest = bytes;
        while !rest.is_empty() && self.is_open(turn, out) {
            match self.input {
                Input::Header(have) => {
                    let need = self.terms.headers.request_len();
                    if have == 0 && rest.len() >= need {
                        let (head, others) = rest.split_at(need);
                        rest = others;
                        self.header(head, turn, out);
                        continue;
                    }
                    let count = rest.len().min(need - have);
                    self.head[have..have + count].copy_from_slice(&rest[..count]);
                    rest = &rest[count..];
                    self.input = Input::Header(have + count);
                    if have + count == need {
                        let head = self.head;
                        self.header(&head[..need], turn, out);
                    }
                }
                Input::Fill { piece: index, have } => {
                    let piece = self.pieces.get(index);
                    let count = rest.len().min(piece.len - have);
                    if let Some(buffer) = &mut piece.buffer {
                        buffer.bytes_mut()[have..have + count].copy_from_slice(&rest[..count]);
                    }
                    rest = &rest[count..];
                    self.advance_fill(index, have + count, turn, out);
                }
                Input::Skip(left, about, error) => {
                    let count = (rest.len() as u64).min(left);
                    rest = &rest[usize::try_from(count).unwrap_or(rest.len())..];
                    self.input = Input::Skip(left - count, about, error);
                    if left == count {
                        self.input = Input::Header(0);
                        out.error(about, error);
                    }
                }
                Input::Start(_) | Input::Stream(_) | Input::Ended => break,
            }
        }
        bytes.len() - rest.len()
    }

    fn header(&mut self, head: &[u8], turn: &Turn, out: &mut Outbox) {
        self.input = Input::Header(0);
        let Some(header) = self.terms.headers.parse(head) else { return self.end(out) };
        let about = self.about(&header);
        match self.terms.judge(&header) {
            Verdict::Disconnect => self.end(out),
            Verdict::Done if header.command == crate::protocol::command::READ => out.none(about),
            Verdict::Done => out.done(about),
            Verdict::Refuse(error) => out.error(about, error),
            Verdict::Skip(bytes, error) => self.input = Input::Skip(bytes, about, error),
            Verdict::Begin(command) => {
                if command.kind == Kind::Write {
                    self.long_payloads = command.len >= 64 << 10;
                }
                let command = self.commands.put(command);
                self.start(command, turn, out);
            }
        }
    }

    fn about(&self, header: &Header) -> About {
        About { headers: self.terms.headers, cookie: header.cookie, offset: header.offset }
    }

    /// Starts what can be started of a command; false while memory lacks, and then its connection reads nothing.
    fn start(&mut self, index: u32, turn: &Turn, out: &mut Outbox) -> bool {
        self.input = Input::Start(index);
        let command = self.commands.get(index);
        let started = match command.kind {
            Kind::Read if command.whole => self.start_whole_read(index, turn),
            Kind::Read => self.start_read(index, turn),
            Kind::Write => return self.start_fill(index),
            Kind::Status if self.terms.allocation => self.start_status(index, turn),
            Kind::Status => {
                self.tell_bitmaps(index, out);
                true
            }
            Kind::Flush | Kind::Quiet => {
                self.request(index, Operation::Flush, 0, 0, None, turn);
                true
            }
            Kind::Discard | Kind::Zero => {
                self.start_space(index, turn);
                true
            }
        };
        if started {
            self.input = Input::Header(0);
            self.finish_if_done(index, out);
        }
        started
    }

    fn start_read(&mut self, index: u32, turn: &Turn) -> bool {
        while self.commands.get(index).left() > 0 {
            let (offset, len) = self.commands.get(index).ahead().next_piece(PIECE);
            let Some(buffer) = self.account.buffer(len) else { return false };
            self.commands.get(index).next_piece(PIECE);
            self.read_piece(index, offset, len, buffer, turn);
        }
        true
    }

    /// A read whose reply is one message: all its memory at once, so that no two such reads wait for each other.
    fn start_whole_read(&mut self, index: u32, turn: &Turn) -> bool {
        let command = self.commands.get(index);
        let mut ahead = command.ahead();
        let lens = std::iter::from_fn(move || {
            (ahead.left() > 0).then(|| ahead.next_piece(PIECE)).map(|(_, len)| len)
        });
        let Some(buffers) = self.account.buffers(lens) else { return self.start_stream(index, turn) };
        for buffer in buffers {
            let (offset, len) = self.commands.get(index).next_piece(PIECE);
            self.read_piece(index, offset, len, buffer, turn);
        }
        true
    }

    /// A read for whose reply there is not enough memory. Others may never give theirs back, so once the client has
    /// nothing else it is done with the little that everybody may have.
    fn start_stream(&mut self, index: u32, turn: &Turn) -> bool {
        if self.commands.len() > 1 || !self.account.is_empty() {
            return false;
        }
        let command = self.commands.get(index);
        if command.headers != Headers::Simple {
            // "Do not fragment" may be refused; then the client asks for less.
            command.error = Some(NbdError::Overflow);
            command.taken = command.len;
            return true;
        }
        command.streamed = true;
        self.input = Input::Stream(index);
        self.stream(index, turn);
        false
    }

    /// Reads the next piece of a stream, if there is memory for it.
    fn stream(&mut self, index: u32, turn: &Turn) {
        let command = self.commands.get(index);
        if command.is_out() || command.left() == 0 {
            return;
        }
        let (offset, len) = command.ahead().next_piece(PIECE);
        if let Some(buffer) = self.account.buffer(len) {
            self.commands.get(index).next_piece(PIECE);
            self.read_piece(index, offset, len, buffer, turn);
        }
    }

    /// A piece of a stream is there, or has failed. Once something was sent there is no way to tell of an error but to
    /// hang up.
    fn streamed(&mut self, piece: Piece, out: &mut Outbox) {
        let command = self.commands.get(piece.command);
        let first = piece.index == 0;
        match piece.buffer {
            Some(buffer) if command.error.is_none() => {
                let data = Payload::Data(buffer, piece.len);
                match first {
                    true => out.data(command.about(), true, command.offset, 0, data),
                    false => out.raw(data),
                }
                command.answered = true;
                if !command.is_done() {
                    return;
                }
                self.end_stream(false);
            }
            _ => {
                command.taken = command.len;
                self.end_stream(!first);
            }
        }
        self.finish_if_done(piece.command, out);
    }

    fn end_stream(&mut self, hang_up: bool) {
        if matches!(self.input, Input::Stream(_)) {
            self.input = if hang_up { Input::Ended } else { Input::Header(0) };
        }
    }

    fn read_piece(&mut self, command: u32, offset: u64, len: usize, buffer: Buffer, turn: &Turn) {
        self.request(command, Operation::Read, offset, len, Some(buffer), turn);
    }

    /// Prepares the next piece of a write's payload.
    fn start_fill(&mut self, index: u32) -> bool {
        let command = self.commands.get(index);
        let (offset, len) = command.ahead().next_piece(PIECE);
        let Some(buffer) = self.account.buffer(len) else { return false };
        self.commands.get(index).next_piece(PIECE);
        let piece = self.put_piece(index, offset, len, Some(buffer));
        self.input = Input::Fill { piece, have: 0 };
        true
    }

    fn advance_fill(&mut self, index: u32, have: usize, turn: &Turn, out: &mut Outbox) {
        let piece = self.pieces.get(index);
        if have < piece.len {
            self.input = Input::Fill { piece: index, have };
            return;
        }
        let command = piece.command;
        self.push_request(index, Operation::Write, turn);
        self.input = Input::Header(0);
        if self.commands.get(command).left() > 0 {
            self.start(command, turn, out);
        }
    }

    fn start_status(&mut self, index: u32, turn: &Turn) -> bool {
        let Some(buffer) = self.account.buffer(STATUS) else { return false };
        let command = self.commands.get(index);
        let (offset, len) = (command.offset, command.len);
        command.taken = len;
        let piece = self.put_piece(index, offset, 0, Some(buffer));
        let (start, end) = (offset / SECTOR * SECTOR, (offset + len).next_multiple_of(SECTOR));
        self.push(piece, Operation::Extents, start, end - start, turn);
        true
    }

    /// Tells what the bitmaps say; that ends the answer.
    fn tell_bitmaps(&mut self, index: u32, out: &mut Outbox) {
        let command = self.commands.get(index);
        (command.taken, command.answered) = (command.len, true);
        let wide = command.headers == Headers::Extended;
        let asked = extents::Asked { start: 0, len: command.len, one: command.one_extent, wide };
        let (about, offset) = (command.about(), command.offset);
        for (left, dirty) in (0..self.bitmaps.len()).rev().zip(&self.bitmaps) {
            let bitmap = dirty.track.bitmap(&dirty.name).ok();
            let bitmap = bitmap.as_deref();
            // Where there is no memory for more, one descriptor will do.
            let (fixed, len, payload) = match self.account.buffer(STATUS) {
                Some(mut buffer) => {
                    let (fixed, len) = extents::dirty(dirty.id, bitmap, offset, asked, buffer.bytes_mut());
                    (fixed, len, Payload::Data(buffer, len))
                }
                None => {
                    let mut bytes = vec![0; 16];
                    let one = extents::Asked { one: true, ..asked };
                    let (fixed, len) = extents::dirty(dirty.id, bitmap, offset, one, &mut bytes);
                    bytes.truncate(len);
                    (fixed, len, Payload::Bytes(bytes))
                }
            };
            out.status(about, left == 0, fixed.bytes(), len, payload);
        }
    }

    /// The next step of a trim or of zeroes: one request at a time, none longer than the disk takes.
    fn start_space(&mut self, index: u32, turn: &Turn) {
        let most = self.terms.most_space(self.commands.get(index).kind);
        let command = self.commands.get(index);
        let offset = command.offset + command.taken;
        // Only the first step may begin within a sector.
        let len = command.left().min(most - offset % SECTOR);
        command.taken += len;
        let operation = match command.kind {
            Kind::Discard => Operation::Discard,
            _ => Operation::WriteZeroes,
        };
        let piece = self.put_piece(index, offset, 0, None);
        self.push(piece, operation, offset, len, turn);
    }

    /// A flush that nobody is told of, before the connection ends.
    pub(crate) fn flush_quietly(&mut self, turn: &Turn, out: &mut Outbox) {
        let command = self.commands.put(Command::quiet_flush(self.terms.headers));
        self.start(command, turn, out);
        self.end(out);
    }

    fn request(
        &mut self,
        command: u32,
        operation: Operation,
        offset: u64,
        len: usize,
        buffer: Option<Buffer>,
        turn: &Turn,
    ) {
        let piece = self.put_piece(command, offset, len, buffer);
        self.push_request(piece, operation, turn);
    }

    fn put_piece(&mut self, command: u32, offset: u64, len: usize, buffer: Option<Buffer>) -> u32 {
        let index = self.commands.get(command).piece_out();
        self.pieces.put(Piece { command, buffer, offset, len, index })
    }

    fn push_request(&mut self, piece: u32, operation: Operation, turn: &Turn) {
        let &mut Piece { offset, len, .. } = self.pieces.get(piece);
        self.push(piece, operation, offset, len as u64, turn);
    }

    fn push(&mut self, index: u32, operation: Operation, offset: u64, len: u64, turn: &Turn) {
        let piece = self.pieces.get(index);
        let flags = self.commands.get(piece.command).flags;
        let mut request = Request::new(operation, offset, len, turn.now, turn.sink.clone());
        request.flags = Flags { fua: flags.fua && operation.is_write(), ..flags };
        request.token = u64::from(index);
        request.memory = self.vectors.pop().unwrap_or_default();
        if matches!(operation, Operation::Read | Operation::Write)
            && let Some(buffer) = &piece.buffer
        {
            request.memory.push(buffer.piece(0, usize::try_from(len).expect("a piece")));
        }
        self.ready.push(request);
    }

    /// A request has come back.
    pub(crate) fn complete(
        &mut self,
        mut request: Request,
        result: Result<()>,
        turn: &Turn,
        out: &mut Outbox,
    ) {
        let Ok(index) = u32::try_from(request.token) else { return };
        request.memory.clear();
        self.vectors.push(std::mem::take(&mut request.memory));
        if let Err(error) = &result {
            error.log();
        }
        if request.operation == Operation::Extents && result.is_ok() {
            self.status_known(index, &request, out);
        }
        let result = result.map_err(|error| NbdError::from_kind(error.kind(), request.flags.fast_only));
        self.piece_done(index, result, turn, out);
    }

    fn status_known(&mut self, index: u32, request: &Request, out: &mut Outbox) {
        let piece = self.pieces.get(index);
        let Some(mut buffer) = piece.buffer.take() else { return };
        let command = self.commands.get(piece.command);
        let asked = extents::Asked {
            start: command.offset - request.offset,
            len: command.len,
            one: command.one_extent,
            wide: command.headers == Headers::Extended,
        };
        let (fixed, len) = extents::allocation(&request.extents, asked, buffer.bytes_mut());
        command.answered = true;
        let last = self.bitmaps.is_empty();
        out.status(command.about(), last, fixed.bytes(), len, Payload::Data(buffer, len));
        if !last {
            let command = piece.command;
            self.tell_bitmaps(command, out);
        }
    }

    fn piece_done(&mut self, index: u32, result: Result<(), NbdError>, turn: &Turn, out: &mut Outbox) {
        let piece = self.pieces.take(index);
        let command = self.commands.get(piece.command);
        command.piece_back();
        if let Err(error) = result {
            command.error.get_or_insert(error);
        }
        if command.streamed {
            return self.streamed(piece, out);
        }
        let more = command.left() > 0;
        match command.kind {
            Kind::Read if command.error.is_none() => {
                let Some(buffer) = piece.buffer else { return };
                if command.whole {
                    command.keep(piece.index, buffer, piece.len);
                } else {
                    let last = command.is_done();
                    command.answered |= last;
                    let data = Payload::Data(buffer, piece.len);
                    out.data(command.about(), last, piece.offset, piece.len, data);
                }
            }
            Kind::Discard | Kind::Zero if more && command.error.is_none() => {
                self.start_space(piece.command, turn);
            }
            Kind::Discard | Kind::Zero => command.taken = command.len,
            _ => {}
        }
        self.finish_if_done(piece.command, out);
    }

    fn finish_if_done(&mut self, index: u32, out: &mut Outbox) {
        if !self.commands.get(index).is_done() {
            return;
        }
        let command = self.commands.take(index);
        let about = command.about();
        match command.error {
            _ if command.answered || command.kind == Kind::Quiet => {}
            Some(error) => out.error(about, error),
            None if command.kind != Kind::Read => out.done(about),
            None => {
                let len = usize::try_from(command.len).expect("a payload");
                let mut parts = command.parts.into_iter().flatten();
                if let Some((buffer, part)) = parts.next() {
                    out.data(about, true, command.offset, len, Payload::Data(buffer, part));
                }
                parts.for_each(|(buffer, len)| out.raw(Payload::Data(buffer, len)));
            }
        }
    }
}
