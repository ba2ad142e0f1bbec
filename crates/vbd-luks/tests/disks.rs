//! Encrypted disks that QEMU and cryptsetup make, and our own, read and written by all.
#![allow(clippy::cast_possible_truncation, reason = "disks of tests are small")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vbd_core::file::Fault;
use vbd_core::{Disk, ErrorKind, Event, Flags, Operation};
use vbd_image::raw::{Raw, RawOptions};
use vbd_luks::{FormatOptions, Hash, Header, KeyBits, Luks, LuksError, LuksOptions, Secret, format};
use vbd_ring::{EngineKind, Op};
use vbd_testing::client::{Ask, Client};
use vbd_testing::{Random, seeds};

const KEY: &str = "a passphrase";

fn on_disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("installed");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn key_file(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join(format!("key-{}", text.len()));
    std::fs::write(&path, text).unwrap();
    path
}

fn luks(path: &Path, key: &str) -> Arc<Luks> {
    with(RawOptions::new(path), key)
}

fn with(raw: RawOptions, key: &str) -> Arc<Luks> {
    let (path, secret) = (raw.path.clone(), Secret::new(key.as_bytes().to_vec()));
    Luks::new(LuksOptions { inner: Raw::new(raw), path, secret })
}

fn client(disk: &Arc<Luks>) -> Client {
    Client::on_disk(EngineKind::Auto, &disk.open().unwrap_or_else(|error| panic!("{error}")))
}

/// QEMU's words for an encrypted file and its key.
fn as_qemu(dir: &Path, path: &Path) -> [String; 3] {
    let secret = format!("secret,id=key,file={}", key_file(dir, KEY).display());
    let image = format!("driver=luks,key-secret=key,file.filename={}", path.display());
    ["--object".into(), secret, image]
}

/// What QEMU reads.
fn read_by_qemu(dir: &Path, path: &Path) -> Vec<u8> {
    let [object, secret, image] = as_qemu(dir, path);
    let raw = dir.join("as-qemu-reads");
    let to = raw.to_str().unwrap();
    run("qemu-img", &["convert", &object, &secret, "--image-opts", &image, "-O", "raw", to]);
    std::fs::read(raw).unwrap()
}

/// A disk of our own making with so many bytes of data.
fn made(dir: &Path, options: &FormatOptions, size: u64) -> PathBuf {
    let path = dir.join("luks");
    let header = format(&Secret::new(KEY.into()), options).unwrap();
    std::fs::write(&path, &header).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(header.len() as u64 + size).unwrap();
    path
}

fn quick() -> FormatOptions {
    FormatOptions { iterations: Some(1000), ..FormatOptions::default() }
}

#[test]
fn disks_of_qemu_are_read_and_written() {
    for options in ["cipher-alg=aes-256,hash-alg=sha256", "cipher-alg=aes-128,hash-alg=sha1"] {
        let dir = on_disk();
        let path = dir.path().join("disk");
        let [object, secret, image] = as_qemu(dir.path(), &path);
        let options = format!("key-secret=key,iter-time=10,{options}");
        let text = path.to_str().unwrap();
        run("qemu-img", &["create", "-q", &object, &secret, "-f", "luks", "-o", &options, text, "3M"]);
        let write = ["-c", "write -P 7 1000k 300k", "-c", "write -P 8 512 512"];
        run("qemu-io", &[&[object.as_str(), &secret, "--image-opts", &image][..], &write].concat());
        let disk = luks(&path, KEY);
        assert_eq!(disk.inspect().unwrap().0.size, 3 << 20, "{options}");
        let queue = client(&disk);
        let mut wanted = queue.read(0, 3 << 20);
        assert!(wanted[1000 << 10..][..300 << 10].iter().all(|byte| *byte == 7), "{options}");
        assert!(wanted[512..1024].iter().all(|byte| *byte == 8), "{options}");
        for (at, byte, len) in [(0, 1, 100), (2_000_003, 2, 500_000), (70_000, 3, 65_536)] {
            queue.write(at, vec![byte; len]);
            wanted[at as usize..][..len].fill(byte);
        }
        drop(queue);
        drop(disk);
        assert!(read_by_qemu(dir.path(), &path) == wanted, "{options}");
    }
}

#[test]
fn our_headers_are_taken_by_qemu_and_cryptsetup() {
    for (key_bits, hash) in
        [(KeyBits::Bits256, Hash::Sha256), (KeyBits::Bits128, Hash::Sha1), (KeyBits::Bits256, Hash::Sha512)]
    {
        let dir = on_disk();
        let options = FormatOptions { key_bits, hash, ..quick() };
        let path = made(dir.path(), &options, 1 << 20);
        let disk = luks(&path, KEY);
        let mut content = vec![0; 1 << 20];
        let mut random = Random::new(3);
        content.iter_mut().for_each(|byte| *byte = random.next_u64() as u8);
        client(&disk).write(0, content.clone());
        drop(disk);
        assert!(read_by_qemu(dir.path(), &path) == content, "{options:?}");
        let (text, key) = (path.to_str().unwrap(), key_file(dir.path(), KEY));
        let key = key.to_str().unwrap();
        run("cryptsetup", &["luksOpen", "--test-passphrase", "--key-file", key, text]);
        // A second passphrase, added by cryptsetup.
        let second = key_file(dir.path(), "another");
        let more = ["--pbkdf-force-iterations", "1000", "--key-file", key];
        run("cryptsetup", &[&["luksAddKey", "-q"][..], &more, &[text, second.to_str().unwrap()]].concat());
        assert!(client(&luks(&path, "another")).read(0, 1 << 20) == content, "{options:?}");
        let probed = Header::read(&std::fs::File::open(&path).unwrap()).unwrap().describe();
        assert!(probed.starts_with("LUKS1, aes-xts-plain64"), "{probed}");
    }
}

/// What cryptsetup encrypts in place, with each way of deriving keys, and both sizes of sectors.
#[test]
fn disks_of_cryptsetup_are_read() {
    for (options, described) in [
        ("--type luks2 --pbkdf pbkdf2 --hash sha512 --pbkdf-force-iterations 1000", "sectors of 512 bytes"),
        (
            "--type luks2 --pbkdf argon2id --pbkdf-force-iterations 4 --pbkdf-memory 4096 --sector-size 4096",
            "LUKS2, aes-xts-plain64, 256 bits, sectors of 4096 bytes",
        ),
        ("--type luks2 --pbkdf argon2i --pbkdf-force-iterations 4 --pbkdf-memory 4096 -s 256", "128 bits"),
    ] {
        let dir = on_disk();
        let path = dir.path().join("disk");
        let mut content = vec![0; 4 << 20];
        let mut random = Random::new(9);
        content.iter_mut().for_each(|byte| *byte = random.next_u64() as u8);
        // Room for the header is taken from the end, which is moved to the start.
        let mut plain = content.clone();
        plain.resize((4 << 20) + (32 << 20), 0);
        std::fs::write(&path, plain).unwrap();
        let key = key_file(dir.path(), KEY);
        let options: Vec<&str> = options.split(' ').collect();
        let how = [
            "reencrypt",
            "--encrypt",
            "-q",
            "--reduce-device-size",
            "32M",
            "--key-file",
            key.to_str().unwrap(),
        ];
        run("cryptsetup", &[&how[..], &options, &[path.to_str().unwrap()]].concat());
        let disk = luks(&path, KEY);
        let inspected = disk.inspect().unwrap().0;
        let queue = client(&disk);
        assert!(queue.read(0, 4 << 20) == content, "{options:?}");
        assert!(inspected.size >= 4 << 20 && inspected == disk.inspect().unwrap().0, "{inspected:?}");
        // Across sectors, and back.
        queue.write(4000, vec![5; 9000]);
        content[4000..13_000].fill(5);
        assert!(queue.read(0, 4 << 20) == content, "{options:?}");
        drop(queue);
        let header = Header::read(&std::fs::File::open(&path).unwrap()).unwrap();
        assert!(header.describe().contains(described), "{}", header.describe());
        let error = luks(&path, "wrong").open().err().unwrap();
        assert!(error.kind() == ErrorKind::Unsupported || error.kind() == ErrorKind::Busy, "{error}");
        drop(disk);
        let error = luks(&path, "wrong").open().err().unwrap();
        assert!(error.to_string().contains("the key is wrong"), "{error}");
    }
}

/// LUKS1 of cryptsetup, as QEMU reads it too.
#[test]
fn disks_of_cryptsetup_are_read_by_qemu_and_us() {
    for (options, described) in [
        ("--hash sha256 -s 512", "LUKS1, aes-xts-plain64, 256 bits, sha256"),
        ("--hash sha1 -s 256", "LUKS1, aes-xts-plain64, 128 bits, sha1"),
    ] {
        let dir = on_disk();
        let path = dir.path().join("disk");
        std::fs::File::create(&path).unwrap().set_len((2 << 20) + (1 << 20)).unwrap();
        let key = key_file(dir.path(), KEY);
        let how = ["luksFormat", "-q", "--type", "luks1", "--pbkdf-force-iterations", "1000", "--key-file"];
        let options: Vec<&str> = options.split(' ').collect();
        let what = [key.to_str().unwrap(), path.to_str().unwrap()];
        run("cryptsetup", &[&how[..], &what, &options].concat());
        let disk = luks(&path, KEY);
        let queue = client(&disk);
        queue.write(700, vec![6; 100_000]);
        let content = queue.read(0, 1 << 20);
        drop(queue);
        drop(disk);
        assert!(read_by_qemu(dir.path(), &path) == content, "{described}");
        let header = Header::read(&std::fs::File::open(&path).unwrap()).unwrap();
        assert_eq!(header.describe(), described);
    }
}

#[test]
fn a_damaged_first_header_of_luks2_is_made_good_by_the_second() {
    let dir = on_disk();
    let path = dir.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(18 << 20).unwrap();
    let key = key_file(dir.path(), KEY);
    let how = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", key.to_str().unwrap()];
    run(
        "cryptsetup",
        &[&["luksFormat", "-q", "--type", "luks2"][..], &how, &[path.to_str().unwrap()]].concat(),
    );
    let disk = luks(&path, KEY);
    client(&disk).write(0, vec![5; 5000]);
    drop(disk);
    let good = std::fs::read(&path).unwrap();
    for at in [1usize, 300, 5000] {
        let mut bytes = good.clone();
        bytes[at] ^= 0x20;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(client(&luks(&path, KEY)).read(0, 5000), [5; 5000], "byte {at}");
        bytes[0x4000 + at] ^= 0x20;
        std::fs::write(&path, &bytes).unwrap();
        assert!(luks(&path, KEY).open().is_err(), "byte {at} of both");
    }
}

fn asks(size: u64) -> impl Strategy<Value = Ask> {
    let operation = prop_oneof![
        4 => Just(Operation::Read),
        5 => Just(Operation::Write),
        1 => Just(Operation::Flush),
        1 => Just(Operation::Discard),
        2 => Just(Operation::WriteZeroes),
        1 => Just(Operation::Extents),
    ];
    let range = (0..size).prop_flat_map(move |start| {
        let most = size - start;
        (Just(start), prop_oneof![3 => 1..=most.min(6000), 1 => 1..=most])
    });
    let aligned = any::<bool>();
    (operation, range, aligned, any::<u8>(), any::<bool>(), prop_oneof![Just(usize::MAX), Just(1536)])
        .prop_map(|(operation, (start, len), aligned, byte, fua, piece)| {
            let (offset, len) =
                if aligned { (start / 512 * 512, len.next_multiple_of(512)) } else { (start, len) };
            let data = if operation == Operation::Write { vec![byte; len as usize] } else { Vec::new() };
            let flags = Flags { fua, ..Flags::default() };
            Ask { data, flags, piece, ..Ask::new(operation, offset, len) }
        })
}

/// Random operations through two queues, at the edges of sectors and within them, against a vector of bytes.
#[test]
fn random_operations() {
    const SIZE: u64 = 1 << 20;
    let dir = on_disk();
    let one = made(dir.path(), &quick(), SIZE);
    let two = dir.path().join("two");
    std::fs::File::create(&two).unwrap().set_len((16 << 20) + SIZE).unwrap();
    let key = key_file(dir.path(), KEY);
    let how = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--sector-size", "4096"];
    let what = ["--key-file", key.to_str().unwrap(), two.to_str().unwrap()];
    run("cryptsetup", &[&["luksFormat", "-q", "--type", "luks2"][..], &how, &what].concat());
    for path in [one, two] {
        let disk = luks(&path, KEY);
        let clients = [client(&disk), client(&disk)];
        assert_eq!(disk.inspect().unwrap().0.size, SIZE);
        let model = std::cell::RefCell::new(clients[0].read(0, SIZE));
        let config =
            Config { cases: 60, max_shrink_iters: 0, failure_persistence: None, ..Config::default() };
        let run = TestRunner::new(config).run(&prop::collection::vec(asks(SIZE - 512), 1..12), |asks| {
            let mut model = model.borrow_mut();
            for (index, ask) in asks.into_iter().enumerate() {
                let answer = clients[index % 2].ask(ask.clone());
                answer.result.map_err(|error| TestCaseError::fail(error.to_string()))?;
                let range = &mut model[ask.offset as usize..][..ask.len as usize];
                match ask.operation {
                    Operation::Read => prop_assert!(answer.data == range, "{ask:?} differs"),
                    Operation::Write => range.copy_from_slice(&ask.data),
                    Operation::WriteZeroes => range.fill(0),
                    _ => {}
                }
            }
            Ok(())
        });
        run.unwrap_or_else(|error| panic!("{error}"));
        let model = model.into_inner();
        assert!(clients[1].read(0, SIZE) == model, "the end differs");
        drop(clients);
        drop(disk);
        assert!(client(&luks(&path, KEY)).read(0, SIZE) == model, "opened anew");
    }
}

/// Queues that write parts of the same sectors at once lose nothing.
#[test]
fn parts_of_sectors_at_once() {
    let dir = on_disk();
    let path = made(dir.path(), &quick(), 1 << 20);
    let disk = luks(&path, KEY);
    let queues: Vec<_> = (0..4).map(|_| client(&disk)).collect();
    std::thread::scope(|scope| {
        for (number, queue) in queues.iter().enumerate() {
            scope.spawn(move || {
                for step in 0..200u64 {
                    queue.write(step % 50 * 512 + number as u64 * 128, vec![number as u8 + 1; 128]);
                }
            });
        }
    });
    let wanted: Vec<u8> = (0..50 * 512).map(|at| (at % 512 / 128 + 1) as u8).collect();
    assert!(queues[0].read(0, 50 * 512) == wanted);
}

#[test]
fn what_the_disk_below_says_is_passed_on() {
    let dir = on_disk();
    let path = made(dir.path(), &quick(), 1 << 20);
    let mut raw = RawOptions::new(&path);
    raw.faults = Some(Arc::new(|op: &Op| {
        matches!(op, Op::Write { .. } | Op::Sync).then_some(Fault::Fail(libc::ENOSPC))
    }));
    let disk = with(raw, KEY);
    let queue = client(&disk);
    assert_eq!(queue.kind(Ask::write(0, vec![1; 512])), Some(ErrorKind::NoSpace));
    assert_eq!(queue.kind(Ask::write(100, vec![1; 3])), Some(ErrorKind::NoSpace));
    assert_eq!(queue.kind(Ask::new(Operation::Flush, 0, 0)), Some(ErrorKind::NoSpace));
    let zeroes = Ask {
        flags: Flags { fast_only: true, ..Flags::default() },
        ..Ask::new(Operation::WriteZeroes, 0, 512)
    };
    assert_eq!(queue.kind(zeroes), Some(ErrorKind::Unsupported));
    assert_eq!(queue.kind(Ask::new(Operation::Read, (1 << 20) - 512, 1024)), Some(ErrorKind::OutOfRange));
    drop(queue);
    drop(disk);
    let read_only = with(RawOptions { read_only: true, ..RawOptions::new(&path) }, KEY);
    assert_eq!(client(&read_only).kind(Ask::write(0, vec![1; 512])), Some(ErrorKind::ReadOnly));
    drop(read_only);
    // Growing: watchers are told the size of the data.
    let disk = luks(&path, KEY);
    let (sender, receiver) = std::sync::mpsc::channel();
    let _watching = disk.watch(Box::new(move |event| sender.send(event).expect("somebody looks")));
    let session = disk.open().unwrap();
    session.grow(2 << 20).unwrap();
    assert_eq!(receiver.recv().unwrap(), Event::Resized(2 << 20));
    assert_eq!(session.geometry().size, 2 << 20);
    assert_eq!(client(&disk).kind(Ask::write((2 << 20) - 700, vec![1; 700])), None);
}

#[test]
fn keys_come_from_files_and_descriptors() {
    let dir = on_disk();
    let path = key_file(dir.path(), "one\ntwo\n");
    assert_eq!(Secret::from_file(&path).unwrap().bytes(), b"one\ntwo\n", "newlines belong to it");
    let descriptor = std::fs::File::open(&path).unwrap().into();
    assert_eq!(Secret::from_descriptor(descriptor).unwrap().bytes(), b"one\ntwo\n");
    assert_eq!(format!("{:?}", Secret::from_file(&path).unwrap()), "Secret");
    std::fs::write(&path, "").unwrap();
    assert!(Secret::from_file(&path).unwrap_err().to_string().contains("empty"));
    std::fs::File::options().write(true).open(&path).unwrap().set_len((8 << 20) + 1).unwrap();
    assert!(Secret::from_file(&path).unwrap_err().to_string().contains("8 MiB"));
    assert!(matches!(Secret::from_file(&dir.path().join("none")), Err(LuksError::Key { .. })));
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let secret = Secret::new(KEY.into());
    let good = format(&secret, &quick()).unwrap();
    let refused = |at: usize, bytes: &[u8], mark: &str| {
        let mut header = good.clone();
        header[at..at + bytes.len()].copy_from_slice(bytes);
        let result = Header::read(&header[..]).and_then(|read| read.unlock(&header[..], &secret));
        let error = result.err().unwrap_or_else(|| panic!("{mark} was taken")).to_string();
        assert!(error.contains(mark), "{error}");
    };
    refused(0, b"LUKX", "not encrypted with LUKS");
    refused(7, &[3], "the version is 3");
    refused(8, b"serpent\0", "the cipher is serpent-xts-plain64");
    refused(40, b"cbc-essiv:sha256\0", "the cipher is aes-cbc-essiv:sha256");
    refused(72, b"ripemd160\0", "the hash is ripemd160");
    refused(108, &[0, 0, 0, 48], "the key's length is 48");
    refused(208, &[0, 0, 0, 1], "neither in use nor free");
    refused(212, &[0, 0, 0, 0], "number of iterations is 0");
    refused(212, &[0xff; 4], "number of iterations is 4294967295");
    refused(248, &[0xff; 4], "cut off");
    refused(252, &[0xff; 4], "material cannot be");
    refused(208, &0xdeadu32.to_be_bytes(), "the key is wrong");
    refused(5000, &[1], "the key is wrong");
    let error = Header::read(&good[..300]).err().unwrap().to_string();
    assert!(error.contains("cut off"), "{error}");
}

/// Headers changed anywhere, JSON too: nothing panics. Costs stay as they are, which are bounded but may be minutes.
#[test]
fn changed_headers_are_answered() {
    let dir = on_disk();
    let path = dir.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(17 << 20).unwrap();
    let key = key_file(dir.path(), KEY);
    let how = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", key.to_str().unwrap()];
    run(
        "cryptsetup",
        &[&["luksFormat", "-q", "--type", "luks2"][..], &how, &[path.to_str().unwrap()]].concat(),
    );
    let two = std::fs::read(&path).unwrap()[..0x8000].to_vec();
    let one = format(&Secret::new(KEY.into()), &quick()).unwrap();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/luks");
    if std::env::var_os("VBD_WRITE_CORPUS").is_some() {
        std::fs::write(corpus.join("luks1"), &one[..592]).unwrap();
        std::fs::write(corpus.join("luks2"), &two[..0x4000]).unwrap();
    }
    for name in ["luks1", "luks2"] {
        let bytes = std::fs::read(corpus.join(name)).unwrap();
        assert!(Header::read(&bytes[..]).is_ok(), "{name}");
    }
    let mut read = 0;
    for seed in seeds(3000) {
        let mut random = Random::new(seed);
        let mut bytes = if random.once_in(2) { one[..592].to_vec() } else { two.clone() };
        for _ in 0..1 + random.below(3) {
            let limit = *random.one_of(&[592, 4096 + 1500]);
            let at = random.index(bytes.len().min(limit));
            bytes[at] = *random.one_of(&[0, 1, b'0', b'9', b'"', b'}', 0x7f, 0xff]);
        }
        if bytes.len() > 592 {
            for at in [0usize, 0x4000] {
                let header = &mut bytes[at..at + 0x4000];
                header[448..512].fill(0);
                let digest = sha2_256(header);
                header[448..480].copy_from_slice(&digest);
            }
        }
        vbd_luks::fuzz(&bytes);
        read += usize::from(Header::read(&bytes[..]).is_ok());
    }
    assert!(read > 500, "{read} could be read");
}

fn sha2_256(bytes: &[u8]) -> Vec<u8> {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).to_vec()
}
