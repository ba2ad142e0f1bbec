//! Commands: what a request's header asks for, whether it may, and how far it has come.

use vbd_core::{Capabilities, Flags, Geometry, SECTOR};

use crate::memory::{Buffer, PIECE};
use crate::negotiation::ExportInfo;
use crate::outbox::About;
use crate::protocol::{Header, Headers, MAX_PAYLOAD, NbdError, command, command_flag, export_flag};

/// A payload longer than this is not even skipped: its sender is cut off.
const MOST_SKIPPED: u64 = 2 * MAX_PAYLOAD as u64;

/// What holds for a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    pub(crate) headers: Headers,
    /// base:allocation was selected.
    pub(crate) allocation: bool,
    /// Dirty bitmaps were selected.
    pub(crate) bitmaps: bool,
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    /// Every write is to be durable when it completes.
    pub(crate) durable: bool,
    pub(crate) max_discard: u64,
    pub(crate) max_zeroes: u64,
}

impl Terms {
    pub(crate) fn new(geometry: &Geometry, capabilities: &Capabilities, read_only: bool) -> Self {
        Terms {
            headers: Headers::default(),
            allocation: false,
            bitmaps: false,
            size: geometry.size,
            read_only: read_only || capabilities.read_only,
            durable: !capabilities.write_cache,
            max_discard: geometry.max_discard,
            max_zeroes: geometry.max_zeroes,
        }
    }

    /// The longest discard or zeroes that the disk takes, in whole sectors.
    pub(crate) fn most_space(&self, kind: Kind) -> u64 {
        let most = if kind == Kind::Discard { self.max_discard } else { self.max_zeroes };
        (most / SECTOR * SECTOR).max(SECTOR)
    }
}

/// What a client is told of a disk.
pub(crate) fn export_info(geometry: &Geometry, capabilities: &Capabilities, read_only: bool) -> ExportInfo {
    let mut flags = export_flag::HAS_FLAGS
        | export_flag::SEND_FLUSH
        | export_flag::SEND_FUA
        | export_flag::SEND_CACHE
        | export_flag::CAN_MULTI_CONN;
    if read_only || capabilities.read_only {
        flags |= export_flag::READ_ONLY;
    } else {
        flags |= export_flag::SEND_WRITE_ZEROES | export_flag::SEND_FAST_ZERO;
        if capabilities.discard {
            flags |= export_flag::SEND_TRIM;
        }
    }
    let preferred = geometry.physical_block_size.clamp(4096, 1 << 20).next_power_of_two();
    ExportInfo { size: geometry.size, flags, preferred }
}

/// What becomes of a header.
pub(crate) enum Verdict {
    /// There is nothing to do.
    Done,
    Begin(Command),
    Refuse(NbdError),
    /// Refused when the payload that follows has been skipped.
    Skip(u64, NbdError),
    /// The client says goodbye, or cannot be followed any more.
    Disconnect,
}

/// The commands that are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    Zero,
    Status,
    /// A flush without a reply.
    Quiet,
}

impl Terms {
    /// Decides what to do about a header.
    pub(crate) fn judge(&self, header: &Header) -> Verdict {
        let extended = self.headers == Headers::Extended;
        // With extended headers a write has to say that it has a payload; QEMU up to 10 does not, and has one.
        let payload =
            header.command == command::WRITE || (extended && header.flags & command_flag::PAYLOAD_LEN != 0);
        if payload && header.len > MOST_SKIPPED {
            return Verdict::Disconnect;
        }
        match self.check(header) {
            Ok(verdict) => verdict,
            Err(error) if payload && header.len > 0 => Verdict::Skip(header.len, error),
            Err(error) => Verdict::Refuse(error),
        }
    }

    fn check(&self, header: &Header) -> Result<Verdict, NbdError> {
        use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, PAYLOAD_LEN, REQ_ONE};
        // FUA is allowed on every command; clients are known to set it on any.
        let (kind, allowed) = match header.command {
            command::READ if self.headers == Headers::Simple => (Some(Kind::Read), FUA),
            command::READ => (Some(Kind::Read), FUA | DF),
            command::WRITE => (Some(Kind::Write), FUA | PAYLOAD_LEN),
            command::FLUSH => (Some(Kind::Flush), FUA),
            command::TRIM => (Some(Kind::Discard), FUA),
            command::WRITE_ZEROES => (Some(Kind::Zero), FUA | NO_HOLE | FAST_ZERO),
            command::BLOCK_STATUS if self.allocation || self.bitmaps => (Some(Kind::Status), FUA | REQ_ONE),
            command::CACHE => (None, FUA),
            command::DISC => return Ok(Verdict::Disconnect),
            _ => return Err(NbdError::Inval),
        };
        let allowed = if self.headers == Headers::Extended { allowed } else { allowed & !PAYLOAD_LEN };
        if header.flags & !allowed != 0 {
            return Err(NbdError::Inval);
        }
        let changes = matches!(kind, Some(Kind::Write | Kind::Discard | Kind::Zero));
        if changes && self.read_only {
            return Err(NbdError::Perm);
        }
        if kind != Some(Kind::Flush) {
            let end = header.offset.checked_add(header.len).filter(|end| *end <= self.size);
            let grows = matches!(kind, Some(Kind::Write | Kind::Zero));
            end.ok_or(if grows { NbdError::NoSpc } else { NbdError::Inval })?;
        }
        if matches!(kind, Some(Kind::Read | Kind::Write)) && header.len > u64::from(MAX_PAYLOAD) {
            return Err(if kind == Some(Kind::Read) && self.headers != Headers::Simple {
                NbdError::Overflow
            } else {
                NbdError::Inval
            });
        }
        match kind {
            None => Ok(Verdict::Done),
            Some(Kind::Status) if header.len == 0 => Err(NbdError::Inval),
            Some(kind) => self.begin(header, kind),
        }
    }

    fn begin(&self, header: &Header, kind: Kind) -> Result<Verdict, NbdError> {
        let is_set = |flag| header.flags & flag != 0;
        let (mut offset, mut len) = (header.offset, header.len);
        let fast_only = is_set(command_flag::FAST_ZERO);
        match kind {
            Kind::Flush => (offset, len) = (0, 0),
            Kind::Discard => {
                // Advice: parts of sectors stay as they are.
                let start = offset.next_multiple_of(SECTOR);
                let end = (offset + len) / SECTOR * SECTOR;
                (offset, len) = (start, end.saturating_sub(start));
            }
            Kind::Zero if fast_only && !(offset | len).is_multiple_of(SECTOR) => {
                return Err(NbdError::NotSup);
            }
            _ => {}
        }
        if len == 0 && kind != Kind::Flush {
            return Ok(Verdict::Done);
        }
        let flags = Flags {
            fua: is_set(command_flag::FUA) || self.durable,
            may_unmap: kind == Kind::Zero && !is_set(command_flag::NO_HOLE),
            fast_only,
        };
        let unfragmented = self.headers == Headers::Simple || is_set(command_flag::DF);
        Ok(Verdict::Begin(Command {
            kind,
            headers: self.headers,
            cookie: header.cookie,
            asked: header.offset,
            offset,
            len,
            flags,
            one_extent: is_set(command_flag::REQ_ONE),
            whole: kind == Kind::Read && unfragmented && len > PIECE as u64,
            ..Command::quiet_flush(self.headers)
        }))
    }
}

/// A command that is being carried out.
pub(crate) struct Command {
    pub(crate) kind: Kind,
    pub(crate) headers: Headers,
    cookie: u64,
    /// The offset that the client named.
    asked: u64,
    /// The range that there is something to do about.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) flags: Flags,
    /// Block status of the first extent only.
    pub(crate) one_extent: bool,
    /// A read in pieces whose reply is one message.
    pub(crate) whole: bool,
    /// Bytes that pieces were made of.
    pub(crate) taken: u64,
    /// Pieces on their way.
    out: usize,
    /// Pieces so far.
    made: usize,
    pub(crate) error: Option<NbdError>,
    /// The last message of the reply is in the outbox.
    pub(crate) answered: bool,
    /// A whole read for which there was not enough memory: its pieces are sent one after the other.
    pub(crate) streamed: bool,
    /// The pieces of a whole read that are back.
    pub(crate) parts: Vec<Option<(Buffer, usize)>>,
}

impl Command {
    pub(crate) fn quiet_flush(headers: Headers) -> Self {
        Command {
            kind: Kind::Quiet,
            headers,
            cookie: 0,
            asked: 0,
            offset: 0,
            len: 0,
            flags: Flags::default(),
            one_extent: false,
            whole: false,
            taken: 0,
            out: 0,
            made: 0,
            error: None,
            answered: false,
            streamed: false,
            parts: Vec::new(),
        }
    }

    pub(crate) fn about(&self) -> About {
        About { headers: self.headers, cookie: self.cookie, offset: self.asked }
    }

    /// Bytes of which no piece was made.
    pub(crate) fn left(&self) -> u64 {
        self.len - self.taken
    }

    /// Where the next piece would be, without making it.
    pub(crate) fn ahead(&self) -> Ahead {
        Ahead { offset: self.offset + self.taken, left: self.left() }
    }

    /// The next piece: its offset and length.
    pub(crate) fn next_piece(&mut self, most: usize) -> (u64, usize) {
        let (offset, len) = self.ahead().next_piece(most);
        self.taken += len as u64;
        (offset, len)
    }

    /// Whether pieces are on their way.
    pub(crate) fn is_out(&self) -> bool {
        self.out > 0
    }

    /// One more piece is on its way; says which.
    pub(crate) fn piece_out(&mut self) -> usize {
        self.out += 1;
        self.made += 1;
        self.made - 1
    }

    pub(crate) fn piece_back(&mut self) {
        self.out -= 1;
    }

    pub(crate) fn is_done(&self) -> bool {
        self.out == 0 && self.left() == 0
    }

    /// Keeps a piece until all are there.
    pub(crate) fn keep(&mut self, index: usize, buffer: Buffer, len: usize) {
        if self.parts.len() <= index {
            self.parts.resize_with(index + 1, || None);
        }
        self.parts[index] = Some((buffer, len));
    }
}

/// What is still to be cut into pieces.
#[derive(Clone)]
pub(crate) struct Ahead {
    offset: u64,
    left: u64,
}

impl Ahead {
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// Cuts the next piece off, at most `most` bytes. Only the first may begin, and only the last may end, within a sector.
    pub(crate) fn next_piece(&mut self, most: usize) -> (u64, usize) {
        let offset = self.offset;
        let len = self.left.min(most as u64 - offset % SECTOR);
        self.offset += len;
        self.left -= len;
        (offset, usize::try_from(len).expect("at most a piece"))
    }
}
