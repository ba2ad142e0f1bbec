//! The numbers of the NBD protocol (doc/proto.md of the NetworkBlockDevice project, with its extended headers), and
//! reading and writing them. Everything on the wire is big-endian.

use vbd_core::ErrorKind;

/// "NBDMAGIC", the first thing a server says.
pub(crate) const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT", the start of the newstyle handshake and of every option.
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// The start of every reply to an option.
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
pub(crate) const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flags of the server; the client answers with the same bits.
pub(crate) const FIXED_NEWSTYLE: u16 = 1 << 0;
pub(crate) const NO_ZEROES: u16 = 1 << 1;

/// The longest string (export name, message) in bytes.
pub(crate) const MAX_STRING: usize = 4096;
/// The longest payload of a read or write in bytes, as advertised.
pub(crate) const MAX_PAYLOAD: u32 = 32 << 20;
/// The longest header of a request in bytes.
pub(crate) const MAX_REQUEST: usize = 32;

/// Options of the handshake.
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
pub(crate) mod reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    const ERROR: u32 = 1 << 31;
    pub(crate) const ERR_UNSUP: u32 = ERROR + 1;
    pub(crate) const ERR_POLICY: u32 = ERROR + 2;
    pub(crate) const ERR_INVALID: u32 = ERROR + 3;
    pub(crate) const ERR_TLS_REQD: u32 = ERROR + 5;
    pub(crate) const ERR_UNKNOWN: u32 = ERROR + 6;
    pub(crate) const ERR_SHUTDOWN: u32 = ERROR + 7;
    pub(crate) const ERR_TOO_BIG: u32 = ERROR + 9;
    pub(crate) const ERR_EXT_HEADER_REQD: u32 = ERROR + 10;
}

/// Kinds of information about an export.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub(crate) mod export_flag {
    pub(crate) const HAS_FLAGS: u16 = 1 << 0;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(crate) const SEND_CACHE: u16 = 1 << 10;
    pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands of the transmission phase.
pub(crate) mod command {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub(crate) mod command_flag {
    pub(crate) const FUA: u16 = 1 << 0;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
    pub(crate) const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Chunks of structured and extended replies.
pub(crate) mod chunk {
    pub(crate) const DONE: u16 = 1 << 0;
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const BLOCK_STATUS_EXT: u16 = 6;
    pub(crate) const ERROR: u16 = (1 << 15) + 1;
}

/// The metadata context that every export has, and the number by which clients know it.
pub(crate) const BASE_ALLOCATION: &str = "base:allocation";
pub(crate) const BASE_ALLOCATION_ID: u32 = 1;

/// What the names of the contexts of dirty bitmaps begin with, as QEMU calls them.
pub(crate) const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// The first of the numbers by which clients know those.
pub(crate) const DIRTY_BITMAP_ID: u32 = 2;
/// The state of a dirty block there.
pub(crate) const DIRTY: u32 = 1 << 0;

/// States of base:allocation.
pub(crate) mod state {
    pub(crate) const HOLE: u32 = 1 << 0;
    pub(crate) const ZERO: u32 = 1 << 1;
}

/// An error as the protocol knows it: the number on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum NbdError {
    Perm = 1,
    Io = 5,
    Inval = 22,
    NoSpc = 28,
    Overflow = 75,
    NotSup = 95,
    Shutdown = 108,
}

impl NbdError {
    /// The one table from what the data path reports to what a client is told. The protocol has eight numbers, and
    /// ENOTSUP only for fast zeroes.
    pub(crate) fn from_kind(kind: ErrorKind, fast_only: bool) -> Self {
        match kind {
            ErrorKind::Io | ErrorKind::FlushLost | ErrorKind::Corrupt | ErrorKind::Busy => NbdError::Io,
            ErrorKind::NoSpace => NbdError::NoSpc,
            ErrorKind::OutOfRange => NbdError::Inval,
            ErrorKind::ReadOnly => NbdError::Perm,
            ErrorKind::Unsupported if fast_only => NbdError::NotSup,
            ErrorKind::Unsupported => NbdError::Inval,
            ErrorKind::Cancelled => NbdError::Shutdown,
        }
    }

    /// For a human being, where replies have room for it. Says nothing of the host.
    pub(crate) fn message(self) -> &'static str {
        match self {
            NbdError::Perm => "the export is read-only",
            NbdError::Io => "the storage has failed",
            NbdError::Inval => "the request is not valid for this export",
            NbdError::NoSpc => "no space left on the storage",
            NbdError::Overflow => "the request is too long",
            NbdError::NotSup => "this cannot be done fast",
            NbdError::Shutdown => "the server is stopping",
        }
    }
}

/// Which headers a connection uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Headers {
    /// 28 bytes asked, 16 answered.
    #[default]
    Simple,
    /// 28 bytes asked, answers in chunks with a header of 20 bytes.
    Structured,
    /// 32 bytes both ways, lengths of 64 bits.
    Extended,
}

/// The header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) flags: u16,
    pub(crate) command: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    /// Bytes of the export, or of the payload.
    pub(crate) len: u64,
}

impl Headers {
    /// How long the header of a request is.
    pub(crate) fn request_len(self) -> usize {
        if self == Headers::Extended { 32 } else { 28 }
    }

    /// Takes a request's header apart; none where its magic number is wrong.
    pub(crate) fn parse(self, bytes: &[u8]) -> Option<Header> {
        let mut reader = Reader(bytes);
        let magic = reader.u32()?;
        let (flags, command) = (reader.u16()?, reader.u16()?);
        let (cookie, offset) = (reader.u64()?, reader.u64()?);
        let (expected, len) = match self {
            Headers::Extended => (EXTENDED_REQUEST_MAGIC, reader.u64()?),
            _ => (REQUEST_MAGIC, u64::from(reader.u32()?)),
        };
        (magic == expected).then_some(Header { flags, command, cookie, offset, len })
    }
}

/// Takes numbers and strings from the front of a message; none where it is too short.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length of 32 bits and as many bytes of UTF-8.
    pub(crate) fn string(&mut self) -> Option<&'a str> {
        let len = usize::try_from(self.u32()?).ok()?;
        std::str::from_utf8(self.bytes(len)?).ok()
    }
}
