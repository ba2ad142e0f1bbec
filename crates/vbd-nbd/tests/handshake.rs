//! The handshake, as a client of raw bytes sees it.

mod common;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{Client, IHAVEOPT, MAGIC, Memory, Style, serve, serve_disk, string, until};
use vbd_nbd::{ExportOptions, Options};

const ERR_UNSUP: u32 = (1 << 31) + 1;
const ERR_POLICY: u32 = (1 << 31) + 2;
const ERR_INVALID: u32 = (1 << 31) + 3;
const ERR_UNKNOWN: u32 = (1 << 31) + 6;
const ERR_TOO_BIG: u32 = (1 << 31) + 9;
const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;

#[test]
fn exports_are_listed_by_name_with_their_descriptions() {
    let served = serve(Options::default());
    for (name, description) in [("one", "the first"), ("two", "")] {
        let options = ExportOptions { read_only: false, description: description.into() };
        served.server.add_export(name, Memory::new(4096), options).unwrap();
    }
    let mut client = served.connect();
    let (replies, last) = client.ask(3, &[]);
    assert_eq!(last, 1);
    let listed = replies;
    assert_eq!(listed, [(2, [string("one"), b"the first".to_vec()].concat()), (2, string("two"))]);
    // The empty name means the only export, and there are two.
    assert_eq!(client.ask(6, &[&string("")[..], &[0, 0]].concat()).1, ERR_UNKNOWN);
    served.server.remove_export("one", Duration::ZERO).unwrap();
    assert_eq!(client.ask(6, &[&string("")[..], &[0, 0]].concat()).1, 1);
}

#[test]
fn info_tells_all_that_is_asked_for_and_takes_no_lease() {
    let disk = Memory::new(1 << 20);
    let served = serve(Options::default());
    let options = ExportOptions { read_only: true, description: "a disk".into() };
    served.server.add_export("disk", disk.clone(), options).unwrap();
    let mut client = served.connect();
    let wanted = [0u16, 3, 1, 2, 3, 77].map(u16::to_be_bytes).concat();
    let (mut replies, last) = client.ask(6, &[&string("")[..], &wanted[2..]].concat());
    assert_eq!(last, ERR_INVALID, "three are announced, and there is one more");
    assert!(replies.is_empty());
    let wanted = [5u16, 0, 1, 2, 3, 77].map(u16::to_be_bytes).concat();
    (replies, _) = client.ask(6, &[&string("")[..], &wanted].concat());
    let find = |kind: u16| {
        let found = replies.iter().find(|(_, data)| data[..2] == kind.to_be_bytes());
        found.map(|(_, data)| data[2..].to_vec())
    };
    let export = find(0).unwrap();
    assert_eq!(export[..8], (1u64 << 20).to_be_bytes());
    // Flags, read-only, flush, FUA, multi-conn, cache: no trim, no zeroes, and no DF without structured replies.
    assert_eq!(export[8..], 0b101_0000_1111u16.to_be_bytes());
    assert_eq!(find(1).unwrap(), b"disk");
    assert_eq!(find(2).unwrap(), b"a disk");
    assert_eq!(find(3).unwrap(), [1u32, 4096, 32 << 20].map(u32::to_be_bytes).concat());
    assert_eq!(find(77), None);
    assert_eq!(disk.sessions.load(Ordering::SeqCst), 0, "nothing was opened");
    client.go(Style::Simple, "disk").unwrap();
    assert_eq!(disk.sessions.load(Ordering::SeqCst), 1);
    drop(client);
    until("the release of the disk", || disk.sessions.load(Ordering::SeqCst) == 0);
}

#[test]
fn old_clients_choose_by_export_name_with_or_without_zeroes() {
    let served = serve_disk(Memory::new(4096));
    for (flags, zeroes) in [(0u32, 124), (2, 0), (3, 0)] {
        let mut client = Client::new(UnixStream::connect(&served.socket).unwrap());
        client.bytes(18);
        client.send(&flags.to_be_bytes());
        client.option(1, b"disk");
        assert_eq!(client.u64(), 4096);
        let export_flags = client.u16();
        assert_eq!(export_flags & 0b1_1110_1101, 0b1_0110_1101, "{export_flags:b}");
        assert_eq!(client.bytes(zeroes), vec![0; zeroes]);
        assert_eq!(client.read(0, 4096), vec![0; 4096]);
    }
    let mut client = served.connect();
    client.option(1, b"another");
    assert!(client.is_closed());
}

#[test]
fn a_client_that_is_not_fixed_may_only_choose() {
    let served = serve_disk(Memory::new(4096));
    let mut client = Client::new(UnixStream::connect(&served.socket).unwrap());
    client.bytes(18);
    client.send(&0u32.to_be_bytes());
    client.option(3, &[]);
    assert!(client.is_closed());
}

#[test]
fn unknown_client_flags_and_wrong_magic_end_the_connection() {
    let served = serve_disk(Memory::new(4096));
    let mut client = Client::new(UnixStream::connect(&served.socket).unwrap());
    assert_eq!((client.u64(), client.u64(), client.u16()), (MAGIC, IHAVEOPT, 3));
    client.send(&7u32.to_be_bytes());
    assert!(client.is_closed());

    let mut client = served.connect();
    client.send(&[0x55; 16]);
    assert!(client.is_closed());
}

#[test]
fn options_that_are_unknown_malformed_or_too_long_are_refused_and_the_next_is_served() {
    let served = serve_disk(Memory::new(4096));
    let mut client = served.connect();
    assert_eq!(client.ask(4, &[]).1, ERR_UNSUP);
    assert_eq!(client.ask(4711, &[1; 1000]).1, ERR_UNSUP);
    assert_eq!(client.ask(3, b"data").1, ERR_INVALID);
    assert_eq!(client.ask(5, &[]).1, ERR_POLICY, "no certificates");
    assert_eq!(client.ask(7, &[]).1, ERR_INVALID);
    assert_eq!(client.ask(7, &[255, 255, 255, 255, 0, 0]).1, ERR_INVALID);
    assert_eq!(client.ask(7, &[&string("\u{0}x")[..], &[0, 0]].concat()).1, ERR_UNKNOWN);
    assert_eq!(client.ask(7, &[&[0, 0, 0, 2, 0xff, 0xfe][..], &[0, 0]].concat()).1, ERR_INVALID, "not UTF-8");
    assert_eq!(client.ask(10, &[&string("disk")[..], &[0; 4]].concat()).1, ERR_INVALID, "not structured");
    assert_eq!(client.ask(8, &[]).1, 1);
    assert_eq!(
        client.ask(10, &[&string("disk")[..], &[0, 0, 0, 9], &string("base:")].concat()).1,
        ERR_INVALID
    );
    assert_eq!(client.ask(10, &[&string("none")[..], &[0; 4]].concat()).1, ERR_UNKNOWN);
    // A megabyte of data for an option is skipped, not kept.
    assert_eq!(client.ask(3, &vec![7; 1 << 20]).1, ERR_TOO_BIG);
    assert_eq!(client.ask(11, &[]).1, 1);
    assert_eq!(client.ask(8, &[]).1, ERR_EXT_HEADER_REQD);
    assert_eq!(client.go(Style::Extended, "disk").unwrap().0, 4096);
}

#[test]
fn a_name_of_four_gibibytes_ends_the_connection() {
    let served = serve_disk(Memory::new(4096));
    let mut client = served.connect();
    client.send(&[&IHAVEOPT.to_be_bytes()[..], &1u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat());
    assert!(client.is_closed());
}

#[test]
fn contexts_are_listed_and_selected() {
    let served = serve_disk(Memory::new(4096));
    let mut client = served.connect();
    assert_eq!(client.ask(8, &[]).1, 1);
    let queries = |queries: &[&str]| {
        let count = u32::try_from(queries.len()).unwrap().to_be_bytes();
        let queries: Vec<_> = queries.iter().flat_map(|query| string(query)).collect();
        [&string("disk")[..], &count, &queries].concat()
    };
    let context = |id: u32| vec![(4, [&id.to_be_bytes()[..], b"base:allocation"].concat())];
    assert_eq!(client.ask(9, &queries(&[])), (context(0), 1));
    assert_eq!(client.ask(9, &queries(&["base:"])), (context(0), 1));
    assert_eq!(client.ask(9, &queries(&["x-none:", "qemu:dirty-bitmap:a"])), (vec![], 1));
    assert_eq!(client.ask(10, &queries(&["x:y", "base:allocation"])), (context(1), 1));
    // The last selection counts, and this one selects nothing.
    assert_eq!(client.ask(10, &queries(&["base:"])), (vec![], 1));
    client.style = Style::Structured;
    assert_eq!(client.ask(7, &[&string("disk")[..], &[0, 0]].concat()).1, 1);
    assert_eq!(client.command(7, 0, 0, 4096, &[]).error, 22);
}

#[test]
fn abort_is_acknowledged_and_a_client_that_dawdles_is_cut_off() {
    let served = serve_disk(Memory::new(4096));
    let mut client = served.connect();
    client.option(2, b"whatever");
    assert_eq!(client.option_reply(2), (1, vec![]));
    assert!(client.is_closed());

    let served = serve(Options { handshake: Duration::from_millis(50), ..Options::default() });
    let mut client = served.connect();
    client.stream.write_all(&IHAVEOPT.to_be_bytes()[..5]).unwrap();
    assert!(client.is_closed());
}

#[test]
fn half_an_option_and_a_hang_up_leave_nothing_behind() {
    let served = serve_disk(Memory::new(4096));
    let mut client = served.connect();
    client.send(&IHAVEOPT.to_be_bytes());
    until("a client", || served.server.status().clients.len() == 1);
    drop(client);
    until("its end", || served.server.status().clients.is_empty());
}

#[test]
fn what_follows_go_at_once_is_served() {
    let served = serve_disk(Memory::new(4096));
    let mut client = served.connect();
    let go = [&string("disk")[..], &[0, 0]].concat();
    let mut both = [&IHAVEOPT.to_be_bytes()[..], &7u32.to_be_bytes(), &10u32.to_be_bytes(), &go].concat();
    both.extend([&0x25609513u32.to_be_bytes()[..], &[0, 0, 0, 0], &[9; 8], &[0; 8], &[0, 0, 2, 0]].concat());
    client.send(&both);
    assert_eq!(client.option_reply(7).0, 3);
    assert_eq!(client.option_reply(7).0, 1);
    let cookie = u64::from_be_bytes([9; 8]);
    assert_eq!(client.reply(cookie, 512, 0).data, vec![0; 512]);
}
