//! Images that QEMU makes, and some that it does not, read through disks and compared; and what is refused.
#![allow(clippy::cast_possible_truncation, reason = "disks of tests are small")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use vbd_core::{Disk, ErrorKind, ExtentKind, Operation};
use vbd_foreign::{Foreign, ForeignOptions, Format};
use vbd_ring::EngineKind;
use vbd_testing::client::{Ask, Client};
use vbd_testing::{Random, seeds};

fn on_disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn qemu(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect("QEMU's tools are installed");
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

const SIZE: usize = (9 << 20) + 3 * 512;

/// A disk with data, holes and zeroes, some of it easy to compress.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    let mut random = Random::new(11);
    for byte in &mut bytes[1 << 20..(2 << 20) + 1000] {
        *byte = random.next_u64() as u8;
    }
    bytes[4 << 20..5 << 20].fill(7);
    bytes[SIZE - 700..].fill(9);
    bytes
}

/// Every image that QEMU makes of these formats, and ours to read.
const MADE: [(Format, &str, &str); 9] = [
    (Format::Vmdk, "vmdk", "subformat=monolithicSparse"),
    (Format::Vmdk, "vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    (Format::Vmdk, "vmdk", "subformat=streamOptimized"),
    (Format::Vdi, "vdi", "static=off"),
    (Format::Vdi, "vdi", "static=on"),
    (Format::Vhdx, "vhdx", "subformat=dynamic"),
    (Format::Vhdx, "vhdx", "subformat=fixed"),
    (Format::Vhdx, "vhdx", "subformat=dynamic,block_size=1M"),
    (Format::Vhdx, "vhdx", "subformat=dynamic,block_size=256M"),
];

fn made(dir: &Path, format: &str, options: &str, content: &[u8]) -> PathBuf {
    let (raw, path) = (dir.join("raw"), dir.join(format!("image.{format}")));
    std::fs::write(&raw, content).unwrap();
    let arguments = ["convert", "-f", "raw", "-O", format, "-o", options];
    qemu("qemu-img", &[&arguments[..], &[raw.to_str().unwrap(), path.to_str().unwrap()]].concat());
    path
}

fn open(path: &Path, format: Format) -> (Arc<Foreign>, Client) {
    let disk = Foreign::new(ForeignOptions::new(path, format));
    let session = disk.open().unwrap_or_else(|error| panic!("{error}"));
    let client = Client::on_disk(EngineKind::Auto, &session);
    (disk, client)
}

fn refused(path: &Path, format: Format) -> vbd_core::Error {
    let disk = Foreign::new(ForeignOptions::new(path, format));
    disk.open().err().unwrap_or_else(|| panic!("{} was opened", path.display()))
}

/// Reads ranges anywhere, also parts of sectors into memory that is not aligned, and looks whether holes are zeroes.
fn compare(client: &Client, wanted: &[u8], name: &str) {
    assert!(client.read(0, wanted.len() as u64) == wanted, "{name}: all of it");
    let mut random = Random::new(5);
    for _ in 0..60 {
        let len = 1 + random.index(*random.clone().one_of(&[511, 5000, 300_000]));
        let at = random.index(wanted.len() - len);
        let mut ask = Ask::new(Operation::Read, at as u64, len as u64);
        (ask.piece, ask.skew) = (*random.one_of(&[usize::MAX, 1536]), *random.one_of(&[0, 3]));
        let answer = client.ask(ask);
        answer.result.unwrap();
        assert!(answer.data == wanted[at..at + len], "{name}: {len} bytes at {at}");
    }
    let mut at = 0;
    while at < wanted.len() {
        let answer = client.ask(Ask::new(Operation::Extents, at as u64, (wanted.len() - at) as u64));
        answer.result.unwrap();
        for extent in answer.extents {
            let end = at + extent.len as usize;
            assert!(extent.len > 0 && end <= wanted.len(), "{name}: an extent of {} at {at}", extent.len);
            let is_zero = wanted[at..end].iter().all(|byte| *byte == 0);
            assert!(extent.kind == ExtentKind::Data || is_zero, "{name}: data at {at} called a hole");
            at = end;
        }
    }
}

#[test]
fn images_of_qemu_are_read() {
    for (number, (format, name, options)) in MADE.into_iter().enumerate() {
        let dir = if number % 2 == 0 { on_disk() } else { in_memory() };
        // QEMU's VDI has whole MiB only behind its back: sizes are kept to sectors.
        let mut wanted = content();
        let path = made(dir.path(), name, options, &wanted);
        let (disk, client) = open(&path, format);
        let (geometry, capabilities) = disk.inspect().unwrap();
        assert!(capabilities.read_only && !capabilities.grow);
        assert!(geometry.size >= SIZE as u64 && geometry.size < SIZE as u64 + (1 << 20), "{}", geometry.size);
        wanted.resize(geometry.size as usize, 0);
        compare(&client, &wanted, options);
        let write = Ask::write(0, vec![1; 512]);
        assert_eq!(client.kind(write), Some(ErrorKind::ReadOnly));
        let beyond = Ask::new(Operation::Read, geometry.size - 512, 1024);
        assert_eq!(client.kind(beyond), Some(ErrorKind::OutOfRange));
        assert_eq!(client.kind(Ask::new(Operation::Flush, 0, 0)), None);
    }
}

#[test]
fn an_image_that_was_written_in_place_is_read() {
    for (format, name, options) in MADE {
        if options.contains("streamOptimized") {
            continue;
        }
        let dir = in_memory();
        let path = made(dir.path(), name, options, &content());
        let text = path.to_str().unwrap();
        let commands = ["-c", "write -P 3 7M 70k", "-c", "write -z 1M 128k", "-c", "write -P 4 512 512"];
        qemu("qemu-io", &[&["-f", name][..], &commands, &[text]].concat());
        let (disk, client) = open(&path, format);
        let mut wanted = content();
        wanted.resize(disk.inspect().unwrap().0.size as usize, 0);
        wanted[7 << 20..][..70 << 10].fill(3);
        wanted[1 << 20..][..128 << 10].fill(0);
        wanted[512..1024].fill(4);
        compare(&client, &wanted, options);
    }
}

/// As VMware exports them: what the header says comes last, in a footer (QEMU writes none, and reads them).
#[test]
fn a_stream_with_a_footer() {
    let dir = in_memory();
    let path = made(dir.path(), "vmdk", "subformat=streamOptimized", &content());
    let mut bytes = std::fs::read(&path).unwrap();
    let len = bytes.len().next_multiple_of(512);
    bytes.resize(len, 0);
    // Markers: 0 ends the stream, 3 announces the footer.
    let marker = |sectors: u64, kind: u32| {
        let mut marker = vec![0; 512];
        marker[..8].copy_from_slice(&sectors.to_le_bytes());
        marker[12..16].copy_from_slice(&kind.to_le_bytes());
        marker
    };
    let footer = bytes[..512].to_vec();
    bytes[56..64].fill(0xff);
    bytes.extend([marker(1, 3), footer, marker(0, 0)].concat());
    std::fs::write(&path, &bytes).unwrap();
    let (_, client) = open(&path, Format::Vmdk);
    compare(&client, &content(), "with a footer");
    drop(client);
    let text = path.to_str().unwrap();
    qemu("qemu-img", &["compare", "-f", "vmdk", "-F", "raw", text, dir.path().join("raw").to_str().unwrap()]);
    // Cut short, the stream has no footer.
    std::fs::write(&path, &bytes[..bytes.len() - 512]).unwrap();
    let error = refused(&path, Format::Vmdk);
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("footer"), "{error}");
}

#[test]
fn damaged_compressed_grains_are_errors_and_no_others() {
    let dir = in_memory();
    let path = made(dir.path(), "vmdk", "subformat=streamOptimized", &content());
    let mut bytes = std::fs::read(&path).unwrap();
    // The first grain: behind its marker, which begins with its sector (1 MiB).
    let at = bytes.windows(8).position(|window| window == 2048u64.to_le_bytes()).unwrap();
    bytes[at + 300] ^= 0xff;
    std::fs::write(&path, &bytes).unwrap();
    let (_, client) = open(&path, Format::Vmdk);
    assert_eq!(client.kind(Ask::new(Operation::Read, 1 << 20, 4096)), Some(ErrorKind::Corrupt));
    assert_eq!(client.read(4 << 20, 1 << 20), vec![7; 1 << 20]);
}

#[test]
fn what_cannot_be_read_says_why() {
    let dir = in_memory();
    let refuse = |name: &str, options: &str, format: Format, mark: &str| {
        let path = made(dir.path(), name, options, &content());
        let error = refused(&path, format);
        assert!(
            error.kind() == ErrorKind::Unsupported && error.to_string().contains(mark),
            "{mark}: {error}"
        );
    };
    refuse("vmdk", "subformat=monolithicFlat", Format::Vmdk, "several files (monolithicFlat)");
    refuse("vmdk", "subformat=twoGbMaxExtentSparse", Format::Vmdk, "several files (twoGbMaxExtentSparse)");
    // A delta, which names its parent.
    let base = made(dir.path(), "vmdk", "subformat=monolithicSparse", &content());
    let delta = dir.path().join("delta.vmdk");
    let backing = format!("backing_file={},backing_fmt=vmdk", base.display());
    qemu("qemu-img", &["create", "-q", "-f", "vmdk", "-o", &backing, delta.to_str().unwrap()]);
    let error = refused(&delta, Format::Vmdk);
    assert!(error.to_string().contains("delta of another disk"), "{error}");
    // One format for another.
    for format in [Format::Vdi, Format::Vhdx] {
        let error = refused(&base, format);
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("is no"), "{error}");
    }
    let error = refused(&dir.path().join("raw"), Format::Vmdk);
    assert!(error.to_string().contains("is no vmdk image"), "{error}");
    let error = refused(&dir.path().join("missing"), Format::Vdi);
    assert!(error.to_string().contains("cannot open"), "{error}");
}

/// As a program leaves it that is killed: the header names a log, and the table of blocks may not be written yet.
#[test]
fn a_vhdx_that_was_not_closed_is_read_as_it_is_after_a_repair() {
    for options in ["subformat=dynamic", "subformat=dynamic,block_size=1M"] {
        let dir = in_memory();
        let path = made(dir.path(), "vhdx", options, &content());
        let text = path.to_str().unwrap();
        let commands = ["-c", "write -P 3 7M 70k", "-c", "write -P 4 3M 512", "-c", "abort"];
        let killed = Command::new("qemu-io").args(["-f", "vhdx"]).args(commands).arg(text).output().unwrap();
        assert!(!killed.status.success());
        let mut bytes = std::fs::read(&path).unwrap();
        // QEMU names the log in the header, writes it, writes the tables, and names no log any more: all that again, up to
        // where the log was written.
        let log = u64::from_le_bytes(bytes[(64 << 10) + 72..][..8].try_into().unwrap());
        let log = usize::try_from(log).unwrap();
        let entries = bytes[log..log + (1 << 20)].chunks(4096).filter(|sector| sector.starts_with(b"loge"));
        // Each session numbers its entries from 1 on; the file has only grown.
        let number = |entry: &[u8], at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
        let last = entries.max_by_key(|entry| (number(entry, 56), number(entry, 16))).unwrap();
        let guid = last[32..48].to_vec();
        for at in [64 << 10, 128 << 10] {
            bytes[at + 48..at + 64].copy_from_slice(&guid);
            bytes[at + 4..at + 8].fill(0);
            let crc = crc32c::crc32c(&bytes[at..at + 4096]);
            bytes[at + 4..at + 8].copy_from_slice(&crc.to_le_bytes());
        }
        let bat = u64::from_le_bytes(bytes[(192 << 10) + 32..][..8].try_into().unwrap());
        let bat = usize::try_from(bat).unwrap();
        assert!(bytes[bat..bat + 4096] != [0; 4096]);
        bytes[bat..bat + 4096].fill(0);
        std::fs::write(&path, &bytes).unwrap();
        let repaired = dir.path().join("repaired.vhdx");
        std::fs::copy(&path, &repaired).unwrap();
        qemu("qemu-img", &["check", "-q", "-r", "all", "-f", "vhdx", repaired.to_str().unwrap()]);
        let mut wanted = content();
        wanted[7 << 20..][..70 << 10].fill(3);
        wanted[3 << 20..][..512].fill(4);
        for path in [&path, &repaired] {
            let (disk, client) = open(path, Format::Vhdx);
            wanted.resize(disk.inspect().unwrap().0.size as usize, 0);
            compare(&client, &wanted, options);
        }
        assert!(std::fs::read(&path).unwrap() == bytes, "the file stays as it is");
    }
}

#[test]
fn a_vhdx_without_the_log_that_its_header_names_is_refused() {
    let dir = in_memory();
    let path = made(dir.path(), "vhdx", "subformat=dynamic", &content());
    let good = std::fs::read(&path).unwrap();
    let with = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = good.clone();
        for at in [64 << 10, 128 << 10] {
            let header = &mut bytes[at..at + 4096];
            change(header);
            header[4..8].fill(0);
            let crc = crc32c::crc32c(header);
            header[4..8].copy_from_slice(&crc.to_le_bytes());
        }
        std::fs::write(&path, bytes).unwrap();
    };
    with(&|header| header[48..64].fill(7));
    let error = refused(&path, Format::Vhdx);
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("log"), "{error}");
    with(&|header| {
        header[48..64].fill(7);
        header[68..72].copy_from_slice(&(128u32 << 20).to_le_bytes());
    });
    let error = refused(&path, Format::Vhdx);
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("64 MiB"), "{error}");
    with(&|header| header[66] = 2);
    let error = refused(&path, Format::Vhdx);
    assert!(error.to_string().contains("the version is 2"), "{error}");
    with(&|_| ());
    assert_eq!(open(&path, Format::Vhdx).1.read(4 << 20, 1 << 20), vec![7; 1 << 20]);
    // One header may be damaged, not both.
    let mut bytes = good.clone();
    bytes[(64 << 10) + 100] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(open(&path, Format::Vhdx).1.read(4 << 20, 1 << 20), vec![7; 1 << 20]);
    bytes[(128 << 10) + 100] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let error = refused(&path, Format::Vhdx);
    assert!(error.to_string().contains("checksum of both headers"), "{error}");
}

#[test]
fn a_truncated_image_is_an_error_where_it_is_missing() {
    for (format, name, options, missing) in [
        (Format::Vmdk, "vmdk", "subformat=monolithicSparse", 64 << 10),
        (Format::Vdi, "vdi", "static=off", 1 << 20),
        (Format::Vhdx, "vhdx", "subformat=dynamic,block_size=1M", 1 << 20),
    ] {
        let dir = in_memory();
        let path = made(dir.path(), name, options, &content());
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(path.metadata().unwrap().len() - missing).unwrap();
        let (disk, client) = open(&path, format);
        let size = disk.inspect().unwrap().0.size;
        assert_eq!(
            client.kind(Ask::new(Operation::Read, size - 512, 512)),
            Some(ErrorKind::Corrupt),
            "{options}"
        );
        assert_eq!(client.read(4 << 20, 4096), [7; 4096], "{options}");
        file.set_len(300).unwrap();
        drop(client);
        drop(disk);
        assert_eq!(refused(&path, format).kind(), ErrorKind::Corrupt, "{options}");
    }
}

/// Numbers in headers and tables replaced by others: nothing panics, whatever is opened.
#[test]
fn changed_images_are_answered() {
    let dir = in_memory();
    let small = vec![5; 70_000];
    let mut opened = 0;
    for (format, name, options) in MADE {
        let path = made(dir.path(), name, options, &small);
        let mut good = std::fs::read(&path).unwrap();
        good.truncate(10 << 20);
        for seed in seeds(40) {
            let mut random = Random::new(seed);
            let mut bytes = good.clone();
            for _ in 0..1 + random.below(3) {
                let limit = *random.one_of(&[512, 4096, 512, bytes.len()]);
                let at = random.index(limit / 4) * 4;
                let value =
                    *random.one_of(&[0, 1, 2, 3, 7, 0xff, 1 << 12, 1 << 20, 1 << 31, u32::MAX, u32::MAX - 1]);
                bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            if random.once_in(8) {
                bytes.truncate(random.index(bytes.len()));
            }
            if bytes.is_empty() {
                continue;
            }
            vbd_foreign::fuzz(&bytes);
            std::fs::write(&path, &bytes).unwrap();
            let disk = Foreign::new(ForeignOptions::new(&path, format));
            let Ok(session) = disk.open() else { continue };
            opened += 1;
            let client = Client::on_disk(EngineKind::Auto, &session);
            let len = session.geometry().size.min(1 << 20);
            let _ = client.ask(Ask::new(Operation::Read, 0, len));
            let _ = client.ask(Ask::new(Operation::Extents, 0, session.geometry().size));
        }
    }
    assert!(opened > 50, "{opened} opened");
}

/// What the fuzzer starts from: `VBD_WRITE_CORPUS=1` writes it anew. Of a VHDX only the parts that count.
#[test]
fn the_corpus_holds_images_that_open() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/foreign");
    if std::env::var_os("VBD_WRITE_CORPUS").is_some() {
        for (name, format, options) in [
            ("vmdk", "vmdk", "subformat=monolithicSparse"),
            ("vmdk-stream", "vmdk", "subformat=streamOptimized"),
            ("vdi", "vdi", "static=off"),
            ("vhdx-parts", "vhdx", "subformat=dynamic,block_size=1M"),
            ("vhdx-log", "vhdx", "subformat=dynamic,block_size=1M"),
        ] {
            let dir = in_memory();
            let path = made(dir.path(), format, options, &[5; 4096]);
            let bytes = std::fs::read(&path).unwrap();
            let kept = match format {
                "vhdx" if name == "vhdx-log" => bytes[1 << 20..(1 << 20) + 16384].to_vec(),
                "vhdx" => {
                    let part = |at: usize, len: usize| bytes[at..at + len].to_vec();
                    let mut regions = part(192 << 10, 256);
                    // Where they are put together again.
                    regions[32..40].copy_from_slice(&(3u64 << 20).to_le_bytes());
                    regions[64..72].copy_from_slice(&(2u64 << 20).to_le_bytes());
                    let metadata = u64::from_le_bytes(part((192 << 10) + 64, 8).try_into().unwrap()) as usize;
                    let bat = u64::from_le_bytes(part((192 << 10) + 32, 8).try_into().unwrap()) as usize;
                    let items = part(metadata + (64 << 10), 128);
                    [regions, part(metadata, 512), items, part(bat, 64)].concat()
                }
                // Grains are not needed; of a stream, the first is.
                _ => bytes[..bytes.len().min(24 << 10)].to_vec(),
            };
            std::fs::write(corpus.join(name), kept).unwrap();
        }
    }
    let mut opened = 0;
    for path in vbd_testing::corpus::entries(&corpus) {
        let bytes = std::fs::read(&path).unwrap();
        let formats = [Format::Vmdk, Format::Vdi, Format::Vhdx];
        let is_open = |format| vbd_foreign::read(format, &bytes[..], bytes.len() as u64).is_ok();
        opened += usize::from(formats.into_iter().any(is_open));
        if path.ends_with("vhdx-parts") {
            assert!(vbd_foreign::opens_parts(&bytes), "the parts of a VHDX");
        }
    }
    assert!(opened >= 3, "{opened}");
}
