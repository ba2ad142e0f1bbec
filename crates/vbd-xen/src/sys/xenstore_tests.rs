//! The connection to xenstored, with a peer that follows a script.

use std::io::{Read, Write};
use std::thread::JoinHandle;

use super::super::wire::{HEADER, encode};
use super::*;

/// What the peer expects, and what it answers: messages of a kind with a payload, the last of which is the answer.
struct Turn {
    kind: u32,
    transaction: u32,
    payload: &'static [u8],
    answer: Answer,
}

enum Answer {
    Same(&'static [u8]),
    Error(&'static [u8]),
    /// Events come first.
    Events(usize, &'static [u8]),
    /// The connection ends.
    End,
}

fn turn(kind: u32, transaction: u32, payload: &'static [u8], answer: Answer) -> Turn {
    Turn { kind, transaction, payload, answer }
}

fn peer(turns: Vec<Turn>) -> (Connection, JoinHandle<()>) {
    let (own, mut other) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || {
        for turn in turns {
            let mut header = [0u8; HEADER];
            other.read_exact(&mut header).unwrap();
            let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
            let mut payload = vec![0; word(12) as usize];
            other.read_exact(&mut payload).unwrap();
            assert_eq!((word(0), word(8)), (turn.kind, turn.transaction));
            assert_eq!(String::from_utf8_lossy(&payload), String::from_utf8_lossy(turn.payload));
            let answer = |kind, payload: &[u8]| encode(kind, word(4), 0, &[payload]).unwrap();
            let bytes = match turn.answer {
                Answer::Same(payload) => answer(turn.kind, payload),
                Answer::Error(name) => answer(kind::ERROR, name),
                Answer::Events(count, payload) => {
                    let event = encode(kind::WATCH_EVENT, 0, 0, &[b"path\0token\0"]).unwrap();
                    [event.repeat(count), answer(turn.kind, payload)].concat()
                }
                Answer::End => return,
            };
            // In two parts, as a stream may bring it.
            let (first, second) = bytes.split_at(bytes.len() / 2);
            other.write_all(first).unwrap();
            std::thread::sleep(Duration::from_millis(2));
            other.write_all(second).unwrap();
        }
    });
    (Connection::new(own.into()).unwrap(), thread)
}

#[test]
fn keys_that_are_there_and_that_are_not() {
    let (mut store, thread) = peer(vec![
        turn(kind::READ, 0, b"a/b\0", Answer::Same(b"value")),
        turn(kind::READ, 0, b"a/c\0", Answer::Error(b"ENOENT\0")),
        turn(kind::READ, 0, b"a/d\0", Answer::Error(b"EACCES\0")),
        turn(kind::DIRECTORY, 0, b"a\0", Answer::Same(b"b\0c\0")),
        turn(kind::DIRECTORY, 0, b"x\0", Answer::Error(b"ENOENT\0")),
        turn(kind::DIRECTORY, 0, b"y\0", Answer::Error(b"EACCES\0")),
        turn(kind::RM, 0, b"x\0", Answer::Error(b"ENOENT\0")),
        turn(kind::RM, 0, b"y\0", Answer::Error(b"EACCES\0")),
    ]);
    assert_eq!(store.read("a/b").unwrap().as_deref(), Some(&b"value"[..]));
    assert_eq!(store.read("a/c").unwrap(), None);
    assert_eq!(store.read("a/d").unwrap(), None, "what may not be seen is not there");
    assert_eq!(store.list("a").unwrap().unwrap(), ["b", "c"]);
    assert_eq!(store.list("x").unwrap(), None);
    assert_eq!(store.list("y").unwrap(), None);
    store.remove("x").unwrap();
    assert_eq!(store.remove("y").unwrap_err().raw_os_error(), Some(libc::EACCES));
    thread.join().unwrap();
}

#[test]
fn events_between_answers_are_kept() {
    let (mut store, thread) = peer(vec![
        turn(kind::WATCH, 0, b"path\0token\0", Answer::Same(b"OK\0")),
        turn(kind::READ, 0, b"a\0", Answer::Events(3, b"1")),
    ]);
    store.watch("path", "token").unwrap();
    assert_eq!(store.read("a").unwrap().as_deref(), Some(&b"1"[..]));
    thread.join().unwrap();
    let event = WatchEvent { path: "path".into(), token: "token".into() };
    for _ in 0..3 {
        assert_eq!(store.event().unwrap(), Some(event.clone()));
    }
    assert!(store.event().is_err(), "the peer has ended");
}

#[test]
fn a_transaction_that_others_came_into_is_repeated() {
    let (mut store, thread) = peer(vec![
        turn(kind::TRANSACTION_START, 0, b"\0", Answer::Same(b"7\0")),
        turn(kind::READ, 7, b"guard\0", Answer::Same(b"")),
        turn(kind::WRITE, 7, b"a\x001", Answer::Same(b"OK\0")),
        turn(kind::TRANSACTION_END, 7, b"T\0", Answer::Error(b"EAGAIN\0")),
        turn(kind::TRANSACTION_START, 0, b"\0", Answer::Same(b"8\0")),
        turn(kind::READ, 8, b"guard\0", Answer::Error(b"ENOENT\0")),
        turn(kind::TRANSACTION_END, 8, b"T\0", Answer::Same(b"OK\0")),
    ]);
    assert!(!store.write_if("guard", &[("a".into(), "1".into())]).unwrap(), "it went meanwhile");
    thread.join().unwrap();
}

#[test]
fn a_transaction_that_fails_is_given_up() {
    let (mut store, thread) = peer(vec![
        turn(kind::TRANSACTION_START, 0, b"\0", Answer::Same(b"7\0")),
        turn(kind::WRITE, 7, b"a\x001", Answer::Error(b"ENOSPC\0")),
        turn(kind::TRANSACTION_END, 7, b"F\0", Answer::Same(b"OK\0")),
    ]);
    let error = store.write(&[("a".into(), "1".into())]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    thread.join().unwrap();
}

#[test]
fn a_directory_of_many_parts() {
    let (mut store, thread) = peer(vec![
        turn(kind::DIRECTORY, 0, b"d\0", Answer::Error(b"E2BIG\0")),
        turn(kind::DIRECTORY_PART, 0, b"d\x000\0", Answer::Same(b"5\0one\0two\0")),
        // It has changed: once more.
        turn(kind::DIRECTORY_PART, 0, b"d\x008\0", Answer::Same(b"6\0three\0\0")),
        turn(kind::DIRECTORY_PART, 0, b"d\x000\0", Answer::Same(b"6\0one\0two\0")),
        turn(kind::DIRECTORY_PART, 0, b"d\x008\0", Answer::Same(b"6\0three\0\0")),
    ]);
    assert_eq!(store.list("d").unwrap().unwrap(), ["one", "two", "three"]);
    thread.join().unwrap();
}

#[test]
fn a_peer_that_ends() {
    let (mut store, thread) = peer(vec![turn(kind::READ, 0, b"a\0", Answer::End)]);
    assert_eq!(store.read("a").unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    thread.join().unwrap();
}
