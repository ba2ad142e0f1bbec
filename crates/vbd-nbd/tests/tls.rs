//! TLS with certificates of the test's own, against libnbd's and QEMU's clients.

mod common;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{Client, Memory, Style, string};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use tempfile::TempDir;
use vbd_nbd::{Error, ExportOptions, Listen, Options, Server, TlsOptions};
use vbd_ring::{Reactor, Settings};

const ERR_TLS_REQD: u32 = (1 << 31) + 5;
const ERR_INVALID: u32 = (1 << 31) + 3;

/// A directory as libnbd and QEMU want it: ca-cert.pem, server-cert.pem, client-cert.pem and the keys.
fn certificates() -> TempDir {
    let directory = TempDir::new().unwrap();
    let mut ca = CertificateParams::new(vec![]).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(rcgen::DnType::CommonName, "test ca");
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let write = |name: &str, text: String| std::fs::write(directory.path().join(name), text).unwrap();
    write("ca-cert.pem", ca.pem());
    for (name, usage) in
        [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
    {
        let mut params =
            CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        write(&format!("{name}-cert.pem"), params.signed_by(&key, &ca).unwrap().pem());
        write(&format!("{name}-key.pem"), key.serialize_pem());
    }
    directory
}

fn tls(directory: &Path, required: bool, clients: bool) -> TlsOptions {
    TlsOptions {
        certificate: directory.join("server-cert.pem"),
        key: directory.join("server-key.pem"),
        client_ca: clients.then(|| directory.join("ca-cert.pem")),
        required,
    }
}

struct Served {
    server: Server,
    port: String,
    _reactor: Reactor,
}

fn serve(tls: TlsOptions) -> Served {
    let reactor = Reactor::spawn("nbd", Settings::default()).unwrap();
    let options = Options { tls: Some(tls), ..Options::default() };
    let server = Server::bind(Listen::Tcp("127.0.0.1:0".into()), options, vec![reactor.handle()]).unwrap();
    let disk = Memory::new(8 << 20);
    for (at, byte) in disk.bytes.lock().unwrap().iter_mut().enumerate() {
        *byte = u8::try_from(at / 4096 % 251).unwrap();
    }
    server.add_export("disk", disk, ExportOptions::default()).unwrap();
    let port = server.address().rsplit_once(':').unwrap().1.to_owned();
    Served { server, port, _reactor: reactor }
}

/// Runs a client; its standard output where it succeeds.
fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new("timeout").arg("60").arg(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match output.status.code() {
        Some(0) => Ok(text),
        Some(127) => panic!("{program} is not installed"),
        _ => Err(text + &String::from_utf8_lossy(&output.stderr)),
    }
}

#[test]
fn libnbd_copies_through_tls_and_is_known_by_its_certificate() {
    let directory = certificates();
    let served = serve(tls(directory.path(), true, true));
    let uri = |directory: &Path| {
        format!("nbds://localhost:{}/disk?tls-certificates={}", served.port, directory.display())
    };
    let info = run("nbdinfo", &[&uri(directory.path())]).unwrap();
    assert!(info.contains("newstyle-fixed with TLS"), "{info}");
    let copy = directory.path().join("copy");
    run("nbdcopy", &[&uri(directory.path()), &copy.to_string_lossy()]).unwrap();
    let copied = std::fs::read(&copy).unwrap();
    assert_eq!(copied.len(), 8 << 20);
    assert!(copied.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at / 4096 % 251));
    // Turned round, and back: a megabyte at a time both ways.
    let turned: Vec<u8> = copied.iter().map(|byte| !byte).collect();
    std::fs::write(&copy, &turned).unwrap();
    run("nbdcopy", &[&copy.to_string_lossy(), &uri(directory.path())]).unwrap();
    let again = directory.path().join("again");
    run("nbdcopy", &[&uri(directory.path()), &again.to_string_lossy()]).unwrap();
    assert!(std::fs::read(&again).unwrap() == turned);
    // A client without a certificate of ours is not let in.
    let stranger = TempDir::new().unwrap();
    std::fs::copy(directory.path().join("ca-cert.pem"), stranger.path().join("ca-cert.pem")).unwrap();
    run("nbdinfo", &["--size", &uri(stranger.path())]).unwrap_err();
    let impostor = certificates();
    std::fs::copy(directory.path().join("ca-cert.pem"), impostor.path().join("ca-cert.pem")).unwrap();
    run("nbdinfo", &["--size", &uri(impostor.path())]).unwrap_err();
    // Nor does one without TLS learn anything.
    run("nbdinfo", &["--list", &format!("nbd://localhost:{}", served.port)]).unwrap_err();
    assert_eq!(served.server.stop(Duration::from_secs(10)), 0);
}

#[test]
fn qemu_reads_and_writes_through_tls() {
    let directory = certificates();
    let served = serve(tls(directory.path(), true, false));
    let credentials = format!("tls-creds-x509,id=tls,endpoint=client,dir={}", directory.path().display());
    let image = format!(
        "driver=nbd,server.type=inet,server.host=localhost,server.port={},export=disk,tls-creds=tls",
        served.port
    );
    let arguments = ["--object", &credentials, "--image-opts", &image];
    let info = run("qemu-img", &[&["info"], &arguments[..]].concat()).unwrap();
    assert!(info.contains("8 MiB"), "{info}");
    let commands = ["-c", "read -P 1 4096 4096", "-c", "write -P 0x5a 1M 3M", "-c", "read -P 0x5a 1M 3M"];
    let said = run("qemu-io", &[&commands[..], &arguments[..]].concat()).unwrap();
    assert!(!said.contains("failed"), "{said}");
}

#[test]
fn without_tls_nothing_is_learned_where_it_is_required() {
    let directory = certificates();
    let served = serve(tls(directory.path(), true, false));
    let connect = || Client::greeted(std::net::TcpStream::connect(served.server.address()).unwrap());
    let mut client = connect();
    for option in [3, 8, 11, 9, 10, 4711] {
        assert_eq!(client.ask(option, &[]).1, ERR_TLS_REQD);
    }
    let name = [&string("disk")[..], &[0, 0]].concat();
    assert_eq!(client.ask(6, &name).1, ERR_TLS_REQD);
    assert_eq!(client.ask(7, &name).1, ERR_TLS_REQD);
    assert_eq!(client.ask(5, b"data").1, ERR_INVALID);
    client.option(1, b"disk");
    assert!(client.is_closed());
    // Plain text behind the request for TLS would pass for encrypted.
    let mut client = connect();
    let mut both = vec![];
    for option in [5u32, 3] {
        both.extend(common::IHAVEOPT.to_be_bytes());
        both.extend(option.to_be_bytes());
        both.extend([0; 4]);
    }
    client.send(&both);
    assert!(client.is_closed());
    // Nonsense instead of a TLS handshake.
    let mut client = connect();
    assert_eq!(client.ask(5, &[]).1, 1);
    client.send(&[0x42; 512]);
    let mut rest = Vec::new();
    let _ = std::io::Read::read_to_end(&mut client.stream, &mut rest);
    assert!(rest.len() < 64, "an alert at most");
}

#[test]
fn where_tls_is_offered_it_is_the_clients_choice() {
    let directory = certificates();
    let served = serve(tls(directory.path(), false, false));
    let mut client = Client::greeted(std::net::TcpStream::connect(served.server.address()).unwrap());
    client.go(Style::Structured, "disk").unwrap();
    assert_eq!(client.read(4096, 512), vec![1; 512]);
    let uri =
        format!("nbds://localhost:{}/disk?tls-certificates={}", served.port, directory.path().display());
    assert_eq!(run("nbdinfo", &["--size", &uri]).unwrap().trim(), (8 << 20).to_string());
}

#[test]
fn certificates_that_are_none_are_named() {
    let directory = certificates();
    let reactor = Reactor::spawn("nbd", Settings::default()).unwrap();
    let wrong = directory.path().join("wrong.pem");
    std::fs::write(&wrong, "not a certificate").unwrap();
    let good = tls(directory.path(), true, true);
    let cases = [
        TlsOptions { certificate: directory.path().join("missing.pem"), ..good.clone() },
        TlsOptions { certificate: wrong.clone(), ..good.clone() },
        TlsOptions { key: wrong.clone(), ..good.clone() },
        TlsOptions { client_ca: Some(wrong.clone()), ..good.clone() },
        TlsOptions { key: directory.path().join("client-key.pem"), ..good.clone() },
    ];
    for tls in cases {
        let options = Options { tls: Some(tls.clone()), ..Options::default() };
        let listen = Listen::Tcp("127.0.0.1:0".into());
        match Server::bind(listen, options, vec![reactor.handle()]) {
            Err(error @ Error::Certificate { .. }) => assert!(error.to_string().contains(".pem"), "{error}"),
            other => panic!("{tls:?} was taken: {:?}", other.err()),
        }
    }
}
