//! Limits on clients and memory, and sockets that exist already.

mod common;

use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use common::{Client, Memory, Style, serve, until};
use tempfile::TempDir;
use vbd_nbd::{Error, ExportOptions, Listen, Options, Server};
use vbd_ring::{Reactor, Settings};

fn options() -> ExportOptions {
    ExportOptions::default()
}

#[test]
fn one_client_too_many_is_turned_away_and_let_in_later() {
    let served = serve(Options { max_clients: 2, ..Options::default() });
    served.server.add_export("disk", Memory::new(4096), options()).unwrap();
    let mut first = served.connect();
    let second = served.connect();
    let mut third = Client::new(UnixStream::connect(&served.socket).unwrap());
    assert!(third.is_closed());
    drop(second);
    until("room", || served.server.status().clients.len() == 1);
    served.connect().go(Style::Simple, "disk").unwrap();
    first.go(Style::Simple, "disk").unwrap();
}

#[test]
fn memory_is_bounded_by_not_reading_and_everybody_moves_on() {
    // Each client may have 1 MiB in any case, and all of them 32 MiB beyond.
    let served = serve(Options { memory: 32 << 20, memory_per_client: 16 << 20, ..Options::default() });
    served.server.add_export("disk", Memory::new(32 << 20), options()).unwrap();
    let mut greedy: Vec<_> = (0..4)
        .map(|_| {
            let mut client = served.connect();
            client.go(Style::Simple, "disk").unwrap();
            // 64 MiB of replies that are not read.
            let cookies: Vec<_> = (0..64).map(|_| client.request(0, 0, 0, 1 << 20, &[])).collect();
            (client, cookies)
        })
        .collect();
    until("much memory in use", || served.server.status().memory > 24 << 20);
    assert!(served.server.status().memory <= 32 << 20);
    // Nobody keeps this one from its mebibyte.
    let mut modest = served.connect();
    modest.go(Style::Structured, "disk").unwrap();
    assert_eq!(modest.write(0, 512, &vec![7; 5 << 20]), 0);
    assert!(modest.read(512, 5 << 20) == vec![7; 5 << 20]);
    // And all replies come in the end, the longest too, whose memory is had all at once.
    for (client, cookies) in &mut greedy {
        for _ in cookies {
            assert_eq!((client.u32(), client.u32()), (0x67446698, 0));
            client.u64();
            client.bytes(1 << 20);
        }
        assert_eq!(client.read(0, 32 << 20).len(), 32 << 20);
    }
    drop((greedy, modest));
    until("all memory back", || served.server.status().memory == 0);
}

#[test]
fn what_waits_for_memory_when_the_server_stops_is_given_up() {
    let served = serve(Options { memory_per_client: 2 << 20, ..Options::default() });
    served.server.add_export("disk", Memory::new(32 << 20), options()).unwrap();
    let mut client = served.connect();
    client.go(Style::Structured, "disk").unwrap();
    // As much as the socket holds, then two that have memory, then one that waits for it.
    for _ in 0..64 {
        client.request(0, 0, 0, 1 << 20, &[]);
    }
    until("memory in use", || served.server.status().memory == 1 << 20);
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| served.server.stop(Duration::from_secs(20)));
        let mut errors = Vec::new();
        loop {
            let mut header = [0; 20];
            if std::io::Read::read_exact(&mut client.stream, &mut header).is_err() {
                break;
            }
            let kind = u16::from_be_bytes([header[6], header[7]]);
            let len = u32::from_be_bytes([header[16], header[17], header[18], header[19]]);
            let payload = client.bytes(len as usize);
            if kind == (1 << 15) + 1 {
                errors.push(u32::from_be_bytes([payload[0], payload[1], payload[2], payload[3]]));
            }
        }
        assert_eq!(errors, [108], "the one that was taken, and none of those behind it");
        assert_eq!(stop.join().unwrap(), 0, "nobody had to be cut off");
    });
}

#[test]
fn a_thousand_requests_whose_replies_nobody_reads_are_enough() {
    let served = serve(Options::default());
    served.server.add_export("disk", Memory::new(1 << 20), options()).unwrap();
    let mut client = served.connect();
    client.go(Style::Structured, "disk").unwrap();
    client.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut header = vec![];
    header.extend(0x25609513u32.to_be_bytes());
    header.extend([0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    let many = header.repeat(1 << 20);
    // 28 MiB of nonsense: the server stops reading when its own answers are not read.
    assert!(std::io::Write::write_all(&mut client.stream, &many).is_err());
    drop(client);
    until("its end", || served.server.status().clients.is_empty());
}

#[test]
fn a_socket_that_answers_is_refused_a_dead_one_replaced_and_a_file_left_alone() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("nbd.sock");
    let reactor = Reactor::spawn("nbd", Settings::default()).unwrap();
    let bind = || Server::bind(Listen::Unix(path.clone()), Options::default(), vec![reactor.handle()]);
    let alive = UnixListener::bind(&path).unwrap();
    assert!(matches!(bind(), Err(Error::Alive { .. })));
    drop(alive);
    let server = bind().unwrap();
    assert_eq!(server.address(), format!("unix:{}", path.display()));
    assert!(matches!(bind(), Err(Error::Alive { .. })));
    // Somebody else's socket of this name is not ours to remove.
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    server.stop(Duration::from_secs(10));
    assert!(path.exists());
    drop(other);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(bind(), Err(Error::NotASocket { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    let missing = Listen::Unix(directory.path().join("no/such/directory.sock"));
    assert!(matches!(
        Server::bind(missing, Options::default(), vec![reactor.handle()]),
        Err(Error::Listen { .. })
    ));
}

#[test]
fn a_socket_that_was_passed_in_is_served_and_stays() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("nbd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let passed = listener.try_clone().unwrap();
    let reactor = Reactor::spawn("nbd", Settings::default()).unwrap();
    let server = Server::bind(Listen::Fd(passed.into()), Options::default(), vec![reactor.handle()]).unwrap();
    server.add_export("disk", Memory::new(4096), options()).unwrap();
    let mut client = Client::greeted(UnixStream::connect(&path).unwrap());
    client.go(Style::Simple, "disk").unwrap();
    assert_eq!(server.stop(Duration::from_secs(10)), 0);
    assert!(client.is_closed());
    assert!(path.exists(), "it is whoever made it that removes it");
    // It still listens: a successor can take it over without losing a client.
    UnixStream::connect(&path).unwrap();
}

#[test]
fn tcp_is_served_too_and_a_port_in_use_is_an_error() {
    let reactor = Reactor::spawn("nbd", Settings::default()).unwrap();
    let bind =
        |address: &str| Server::bind(Listen::Tcp(address.into()), Options::default(), vec![reactor.handle()]);
    let server = bind("127.0.0.1:0").unwrap();
    server.add_export("disk", Memory::new(1 << 20), options()).unwrap();
    let mut client = Client::greeted(std::net::TcpStream::connect(server.address()).unwrap());
    client.go(Style::Extended, "disk").unwrap();
    assert_eq!(client.write(0, 0, &vec![3; 1 << 20]), 0);
    assert!(client.read(0, 1 << 20) == vec![3; 1 << 20]);
    let status = server.status();
    assert!(status.clients[0].peer.starts_with("127.0.0.1:"), "{}", status.clients[0].peer);
    assert_eq!((status.exports[0].name.as_str(), status.exports[0].clients), ("disk", 1));
    let error = bind(server.address()).err().unwrap();
    assert!(error.to_string().contains(server.address()), "{error}");
}

#[test]
fn exports_have_names_of_their_own_and_leave_with_their_clients() {
    let served = serve(Options::default());
    let server = &served.server;
    server.add_export("a", Memory::new(4096), options()).unwrap();
    assert!(matches!(server.add_export("a", Memory::new(4096), options()), Err(Error::Taken { .. })));
    for name in ["", "a\0b", &"n".repeat(4097)] {
        assert!(matches!(server.add_export(name, Memory::new(4096), options()), Err(Error::Name { .. })));
    }
    server.add_export("b", Memory::new(4096), options()).unwrap();
    let (mut on_a, mut on_b) = (served.connect(), served.connect());
    on_a.go(Style::Simple, "a").unwrap();
    on_b.go(Style::Simple, "b").unwrap();
    assert_eq!(server.remove_export("a", Duration::from_secs(10)).unwrap(), 0);
    assert!(on_a.is_closed());
    assert_eq!(on_b.read(0, 512), vec![0; 512]);
    assert!(matches!(server.remove_export("a", Duration::ZERO), Err(Error::NoExport { .. })));
}
