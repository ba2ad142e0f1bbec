//! Messages of xenstore (xen/io/xs_wire.h): a header of four words and at most 4096 bytes.

use std::io;

/// Bytes of a header.
pub(crate) const HEADER: usize = 16;
/// Most bytes behind it.
pub(crate) const PAYLOAD: usize = 4096;

/// What a message is.
pub(crate) mod kind {
    pub(crate) const DIRECTORY: u32 = 1;
    pub(crate) const READ: u32 = 2;
    pub(crate) const WATCH: u32 = 4;
    pub(crate) const UNWATCH: u32 = 5;
    pub(crate) const TRANSACTION_START: u32 = 6;
    pub(crate) const TRANSACTION_END: u32 = 7;
    pub(crate) const WRITE: u32 = 11;
    pub(crate) const RM: u32 = 13;
    pub(crate) const WATCH_EVENT: u32 = 15;
    pub(crate) const ERROR: u32 = 16;
    pub(crate) const DIRECTORY_PART: u32 = 22;
}

/// A message from xenstored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) kind: u32,
    pub(crate) request: u32,
    pub(crate) payload: Vec<u8>,
}

/// A message to xenstored.
///
/// # Errors
/// It is too long.
pub(crate) fn encode(kind: u32, request: u32, transaction: u32, parts: &[&[u8]]) -> io::Result<Vec<u8>> {
    let len: usize = parts.iter().map(|part| part.len()).sum();
    let Some(short) = u32::try_from(len).ok().filter(|_| len <= PAYLOAD) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "longer than a message of xenstore may be"));
    };
    let mut message = Vec::with_capacity(HEADER + len);
    for word in [kind, request, transaction, short] {
        message.extend(word.to_ne_bytes());
    }
    parts.iter().for_each(|part| message.extend(*part));
    Ok(message)
}

/// Takes the first message off what has been received, if it is whole.
///
/// # Errors
/// It is no message.
pub(crate) fn decode(received: &mut Vec<u8>) -> io::Result<Option<Message>> {
    let Some(header) = received.first_chunk::<HEADER>() else { return Ok(None) };
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let (kind, request, len) = (word(0), word(4), word(12) as usize);
    if len > PAYLOAD {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is longer than it may be"));
    }
    let Some(payload) = received.get(HEADER..HEADER + len) else { return Ok(None) };
    let message = Message { kind, request, payload: payload.to_vec() };
    received.drain(..HEADER + len);
    Ok(Some(message))
}

/// Texts that each end with a zero byte; what does not end so is left out.
pub(crate) fn texts(payload: &[u8]) -> impl Iterator<Item = String> + '_ {
    let whole = payload.iter().rposition(|byte| *byte == 0).map_or(0, |last| last + 1);
    let texts = payload[..whole].split_inclusive(|byte| *byte == 0);
    texts.map(|text| String::from_utf8_lossy(&text[..text.len() - 1]).into_owned())
}

/// The error that xenstored names.
pub(crate) fn error(payload: &[u8]) -> io::Error {
    let name = payload.strip_suffix(b"\0").unwrap_or(payload);
    let number = match name {
        b"ENOENT" => libc::ENOENT,
        b"EAGAIN" => libc::EAGAIN,
        b"EACCES" => libc::EACCES,
        b"EPERM" => libc::EPERM,
        b"EINVAL" => libc::EINVAL,
        b"EEXIST" => libc::EEXIST,
        b"ENOSPC" => libc::ENOSPC,
        b"E2BIG" => libc::E2BIG,
        b"EBUSY" => libc::EBUSY,
        b"EROFS" => libc::EROFS,
        b"ENOMEM" => libc::ENOMEM,
        b"ENOSYS" => libc::ENOSYS,
        b"EISCONN" => libc::EISCONN,
        _ => libc::EIO,
    };
    io::Error::from_raw_os_error(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_in_pieces() {
        let sent = [
            encode(kind::READ, 7, 0, &[b"a/b\0"]).unwrap(),
            encode(kind::WATCH_EVENT, 0, 0, &[b"path\0", b"token\0"]).unwrap(),
        ]
        .concat();
        let (mut received, mut messages) = (Vec::new(), Vec::new());
        for byte in sent {
            received.push(byte);
            messages.extend(decode(&mut received).unwrap());
        }
        assert!(received.is_empty());
        assert_eq!(messages[0], Message { kind: kind::READ, request: 7, payload: b"a/b\0".to_vec() });
        assert_eq!(texts(&messages[1].payload).collect::<Vec<_>>(), ["path", "token"]);
    }

    #[test]
    fn nothing_longer_than_it_may_be() {
        assert!(encode(kind::WRITE, 0, 0, &[&[0; PAYLOAD + 1]]).is_err());
        let mut header = encode(kind::READ, 0, 0, &[]).unwrap();
        header[12..].copy_from_slice(&4097u32.to_ne_bytes());
        assert!(decode(&mut header).is_err());
    }

    #[test]
    fn texts_that_do_not_end_are_left_out() {
        assert_eq!(texts(b"a\0\0bc").collect::<Vec<_>>(), ["a", ""]);
        assert_eq!(texts(b"abc").count(), 0);
    }
}
