//! Images made by QEMU and by other programs, images that are damaged, and what is refused.
#![allow(clippy::cast_possible_truncation, reason = "disks of tests are small")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use support::{Shape, as_qemu_reads, client, image, in_memory, problems, qemu, raw_parent, read_all};
use vbd_core::{Disk, ErrorKind};
use vbd_vhd::create::CreateOptions;
use vbd_vhd::format::{FOOTER_LEN, Footer, HEADER_LEN, Head, Kind, SizeRule};
use vbd_vhd::{Vhd, VhdOptions, check, create, repair};

fn head(path: &Path) -> Head {
    let file = File::open(path).unwrap();
    Head::read(&file, file.metadata().unwrap().len()).unwrap()
}

/// Makes an image with qemu-img; its path.
fn made_by_qemu(dir: &Path, options: &str, size: &str) -> std::path::PathBuf {
    let path = dir.join("qemu.vhd");
    qemu("qemu-img", &["create", "-q", "-f", "vpc", "-o", options, path.to_str().unwrap(), size]);
    path
}

fn virtual_size(path: &Path) -> u64 {
    let info = qemu("qemu-img", &["info", "--output=json", "-f", "vpc", path.to_str().unwrap()]);
    let (_, rest) = info.rsplit_once("\"virtual-size\": ").unwrap();
    rest.split(',').next().unwrap().trim().parse().unwrap()
}

#[test]
fn images_of_qemu_are_read_and_written_and_read_by_qemu() {
    for options in [
        "subformat=dynamic",
        "subformat=fixed",
        "subformat=dynamic,force_size=on",
        "subformat=fixed,force_size=on",
    ] {
        let dir = in_memory();
        let path = made_by_qemu(dir.path(), options, "11M");
        let write = ["-f", "vpc", "-c", "write -P 7 1M 3M", "-c", "write -P 9 7340032 512"];
        qemu("qemu-io", &[&write[..], &[path.to_str().unwrap()]].concat());
        assert_eq!(problems(&path), [""; 0], "{options}");
        let size = virtual_size(&path);
        let disk = Vhd::new(VhdOptions::new(&path));
        assert_eq!(disk.inspect().unwrap().0.size, size, "{options}");
        let mut wanted = vec![0; size as usize];
        wanted[1 << 20..4 << 20].fill(7);
        wanted[7_340_032..][..512].fill(9);
        assert!(read_all(&disk) == wanted, "{options}: what QEMU wrote");
        let queue = client(&disk);
        for (at, byte, len) in [(512, 3, 70_000), (5 << 20, 4, 4096), (10 << 20, 5, 1 << 20)] {
            queue.write(at, vec![byte; len]);
            wanted[at as usize..][..len].fill(byte);
        }
        drop(queue);
        drop(disk);
        assert_eq!(problems(&path), [""; 0], "{options}");
        assert!(as_qemu_reads(&path) == wanted, "{options}: what QEMU reads then");
        // And QEMU goes on where we stopped.
        qemu("qemu-io", &["-f", "vpc", "-c", "write -P 11 8M 1M", path.to_str().unwrap()]);
        wanted[8 << 20..9 << 20].fill(11);
        assert!(read_all(&Vhd::new(VhdOptions::new(&path))) == wanted, "{options}: what QEMU wrote then");
    }
}

#[test]
fn qemu_sees_the_exact_size_of_new_images() {
    let dir = in_memory();
    for (number, size) in [512, 1 << 20, (1 << 20) + 512, 3 << 30, 2040 << 30].into_iter().enumerate() {
        for fixed in [false, true] {
            let path = dir.path().join(format!("{number}-{fixed}"));
            create(&path, &CreateOptions { fixed, ..CreateOptions::new(size) }).unwrap();
            assert_eq!(virtual_size(&path), size);
            assert_eq!(head(&path).size(SizeRule::Maker).unwrap(), size);
            assert_eq!(problems(&path), [""; 0]);
        }
    }
}

#[test]
fn the_maker_decides_which_size_counts() {
    let dir = in_memory();
    let path = dir.path().join("disk.vhd");
    let size = 10_000_384;
    create(&path, &CreateOptions { fixed: true, ..CreateOptions::new(size) }).unwrap();
    let by_geometry = vbd_vhd::format::chs_bytes(head(&path).footer.geometry);
    assert!(by_geometry < size, "they differ: {by_geometry}");
    let file = File::options().write(true).open(&path).unwrap();
    for (creator, wanted) in [
        (b"qem2", size),
        (b"vpc ", by_geometry),
        (b"qemu", by_geometry),
        (b"win ", size),
        (b"tap\0", size),
        (b"CTXS", size),
        (b"wa\0\0", size),
        // QEMU takes these for Virtual PC's; VirtualBox goes by the size.
        (b"vbox", size),
    ] {
        let mut footer: Footer = head(&path).footer;
        footer.creator = *creator;
        file.write_all_at(&footer.encode(), size).unwrap();
        assert_eq!(Vhd::new(VhdOptions::new(&path)).inspect().unwrap().0.size, wanted, "{creator:?}");
        if creator != b"vbox" {
            assert_eq!(virtual_size(&path), wanted, "{creator:?} as QEMU has it");
        }
    }
    let told = VhdOptions { size_rule: SizeRule::Geometry, ..VhdOptions::new(&path) };
    assert_eq!(Vhd::new(told).inspect().unwrap().0.size, by_geometry);
}

/// As Hyper-V leaves them: only sectors that were written have their bits.
#[test]
fn a_dynamic_disk_with_sectors_that_are_not_there() {
    let dir = in_memory();
    let (options, _) = image(dir.path(), Shape::Dynamic(64 << 10), 256 << 10);
    let disk = Vhd::new(options.clone());
    client(&disk).write(64 << 10, vec![5; 64 << 10]);
    drop(disk);
    let file = File::options().read(true).write(true).open(&options.path).unwrap();
    let head = head(&options.path);
    let table = head.table(&file).unwrap();
    let bitmap_at = u64::from(table[1]) * 512;
    // Sectors 8 to 15 and 127 alone.
    let mut bits = [0; 16];
    (bits[1], bits[15]) = (0xff, 1);
    file.write_all_at(&bits, bitmap_at).unwrap();
    let mut wanted = vec![0; 256 << 10];
    wanted[(64 << 10) + 4096..][..4096].fill(5);
    wanted[(128 << 10) - 512..][..512].fill(5);
    assert_eq!(check(&file).unwrap().partial, 1);
    let read_only = VhdOptions { read_only: true, ..options.clone() };
    assert!(read_all(&Vhd::new(read_only)) == wanted);
    let disk = Vhd::new(options.clone());
    let queue = client(&disk);
    let (zeroes, range) = (vbd_core::Operation::WriteZeroes, ((64 << 10) + 2048, 4096));
    queue.ask(vbd_testing::client::Ask::new(zeroes, range.0, range.1)).result.unwrap();
    wanted[range.0 as usize..][..4096].fill(0);
    assert!(queue.read(0, 256 << 10) == wanted, "zeroes");
    assert_eq!(check(&file).unwrap().partial, 1, "zeroes place nothing");
    queue.write((64 << 10) + 700, vec![6; 100]);
    wanted[(64 << 10) + 700..][..100].fill(6);
    assert!(queue.read(0, 256 << 10) == wanted, "what lay under sectors that were not there stays away");
    assert_eq!(check(&file).unwrap().partial, 0);
    drop(queue);
    drop(disk);
    assert!(as_qemu_reads(&options.path) == wanted);
}

#[test]
fn a_parent_is_named_and_asked_for() {
    let dir = in_memory();
    let (options, content) = image(dir.path(), Shape::OverVhd(64 << 10), 256 << 10);
    let file = File::open(&options.path).unwrap();
    let head = head(&options.path);
    assert_eq!(head.footer.kind, Kind::Differencing);
    let names = head.parent_names(&file).unwrap();
    assert_eq!(names[0].path, "./base.vhd");
    assert!(names.iter().all(|name| name.relative));
    let without = Vhd::new(VhdOptions { parent: None, ..options.clone() });
    let error = without.open().err().unwrap();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("no parent"), "{error}");
    let mut wrong = options.parent.clone().unwrap();
    wrong.unique_id = Some([1; 16]);
    let error = Vhd::new(VhdOptions { parent: Some(wrong), ..options.clone() }).open().err().unwrap();
    assert!(error.to_string().contains("unique ids differ"), "{error}");
    assert!(read_all(&Vhd::new(options.clone())) == content);
    // The parent is shared with other readers while the child is open, and nobody writes to it.
    let disk = Vhd::new(options);
    let session = disk.open().unwrap();
    let base = dir.path().join("base.vhd");
    let mut writer = VhdOptions::new(&base);
    writer.lease_wait = std::time::Duration::ZERO;
    assert_eq!(Vhd::new(writer).open().err().unwrap().kind(), ErrorKind::Busy);
    let reader = Vhd::new(VhdOptions { read_only: true, ..VhdOptions::new(&base) });
    assert!(reader.open().is_ok());
    drop(session);
}

#[test]
fn damaged_footers_are_repaired_from_each_other() {
    let dir = in_memory();
    let (options, _) = image(dir.path(), Shape::Dynamic(64 << 10), 256 << 10);
    let mut wanted = vec![0; 256 << 10];
    wanted[..1000].fill(3);
    let disk = Vhd::new(options.clone());
    client(&disk).write(0, vec![3; 1000]);
    drop(disk);
    let len = options.path.metadata().unwrap().len();
    for (at, cut, mark) in [
        (len - 100, None, "the footer at the end"),
        (100, None, "copy at the start is damaged"),
        (0, Some(len - 512), "the footer at the end"),
    ] {
        let file = File::options().read(true).write(true).open(&options.path).unwrap();
        match cut {
            Some(len) => file.set_len(len).unwrap(),
            None => file.write_all_at(b"damage", at).unwrap(),
        }
        let found = problems(&options.path);
        assert!(found.len() == 1 && found[0].contains(mark), "{found:?}");
        assert!(read_all(&Vhd::new(VhdOptions { read_only: true, ..options.clone() })) == wanted);
        let report = repair(&file).unwrap();
        assert!(report.is_clean() && report.repaired.len() == 1, "{report:?}");
        assert_eq!(options.path.metadata().unwrap().len(), len);
        assert!(read_all(&Vhd::new(options.clone())) == wanted);
    }
    // Both: nothing to go by.
    let file = File::options().read(true).write(true).open(&options.path).unwrap();
    file.write_all_at(b"damage", 100).unwrap();
    file.write_all_at(b"damage", len - 100).unwrap();
    let error = repair(&file).unwrap_err().to_string();
    assert!(error.contains("checksum"), "{error}");
}

#[test]
fn tables_that_cannot_be_are_found_and_not_written_to() {
    let dir = in_memory();
    let (options, _) = image(dir.path(), Shape::Dynamic(64 << 10), 256 << 10);
    let disk = Vhd::new(options.clone());
    client(&disk).write(0, vec![3; 192 << 10]);
    drop(disk);
    let file = File::options().read(true).write(true).open(&options.path).unwrap();
    let good = head(&options.path).table(&file).unwrap();
    let entry_at = |block: u64| head(&options.path).header.unwrap().table_offset + block * 4;
    for (entry, mark) in [
        (good[0], "block 1 has the same place as block 0"),
        (good[0] + 1, "block 1 has the same place as block 0"),
        (0, "the same place as the footer's copy"),
        (3, "the same place as the table of blocks"),
        (u32::MAX - 1, "which is not in the file"),
    ] {
        file.write_all_at(&entry.to_be_bytes(), entry_at(1)).unwrap();
        let found = problems(&options.path);
        assert!(found.iter().any(|problem| problem.contains(mark)), "{entry}: {found:?}");
        let error = Vhd::new(options.clone()).open().err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{entry}: {error}");
        assert!(!repair(&file).unwrap().is_clean(), "not guessed at");
        let read_only = Vhd::new(VhdOptions { read_only: true, ..options.clone() });
        let queue = client(&read_only);
        assert_eq!(queue.read(0, 512), [3; 512], "other blocks are read");
        if entry == u32::MAX - 1 {
            let read = vbd_testing::client::Ask::new(vbd_core::Operation::Read, 64 << 10, 512);
            assert_eq!(queue.kind(read), Some(ErrorKind::Corrupt));
        }
    }
    file.write_all_at(&good[1].to_be_bytes(), entry_at(1)).unwrap();
    file.set_len(options.path.metadata().unwrap().len() - 4096).unwrap();
    assert!(problems(&options.path).iter().any(|problem| problem.contains("not in the file")));
    assert!(Vhd::new(options).open().is_err());
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let dir = in_memory();
    let (options, _) = image(dir.path(), Shape::Dynamic(64 << 10), 256 << 10);
    let file = File::options().read(true).write(true).open(&options.path).unwrap();
    let header = head(&options.path).header.unwrap();
    let change = |mark: &str, change: &dyn Fn(&mut vbd_vhd::format::DynamicHeader)| {
        let mut header = header.clone();
        change(&mut header);
        file.write_all_at(&header.encode(), FOOTER_LEN as u64).unwrap();
        let error = Vhd::new(options.clone()).open().err().unwrap();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains(mark), "{mark}: {error}");
    };
    change("the block size is 65535", &|header| header.block_size = 65535);
    change("the block size is 512", &|header| header.block_size = 512);
    change("the table offset is 1537", &|header| header.table_offset += 1);
    change("truncated", &|header| header.table_offset = 1 << 40);
    change("number of table entries is 3", &|header| header.entries = 3);
    change("number of table entries is 4294967295", &|header| header.entries = u32::MAX);
    let mut bytes = [0; HEADER_LEN];
    file.read_exact_at(&mut bytes, FOOTER_LEN as u64).unwrap();
    bytes[500] ^= 1;
    file.write_all_at(&bytes, FOOTER_LEN as u64).unwrap();
    let error = Vhd::new(options).open().err().unwrap();
    assert!(error.to_string().contains("header's checksum"), "{error}");
}

#[test]
fn what_is_no_vhd_is_refused() {
    let dir = in_memory();
    let path = dir.path().join("raw");
    for len in [1u64, 511, 512, 1 << 20] {
        std::fs::write(&path, vec![0; len as usize]).unwrap();
        let error = Vhd::new(VhdOptions::new(&path)).open().err().unwrap();
        assert!(error.to_string().contains("is no VHD"), "{error}");
    }
    // The guest of a fixed disk may write what it likes to its start.
    let (options, _) = image(dir.path(), Shape::Dynamic(64 << 10), 256 << 10);
    let evil = std::fs::read(&options.path).unwrap();
    let fixed = dir.path().join("fixed.vhd");
    create(&fixed, &CreateOptions { fixed: true, ..CreateOptions::new(256 << 10) }).unwrap();
    let disk = Vhd::new(VhdOptions::new(&fixed));
    client(&disk).write(0, evil.clone());
    drop(disk);
    let content = read_all(&Vhd::new(VhdOptions::new(&fixed)));
    assert!(content[..evil.len()] == evil);
    // Cut off: then nothing says that it is a fixed disk.
    File::options().write(true).open(&fixed).unwrap().set_len(256 << 10).unwrap();
    assert!(Vhd::new(VhdOptions::new(dir.path().join("none"))).open().is_err());
}

#[test]
fn creation_is_refused_with_the_reason() {
    let dir = in_memory();
    let path = dir.path().join("new.vhd");
    let refused = |options: &CreateOptions, mark: &str| {
        let error = create(&path, options).unwrap_err().to_string();
        assert!(error.contains(mark), "{error}");
        assert!(!path.exists());
    };
    refused(&CreateOptions::new(0), "multiple of 512");
    refused(&CreateOptions::new(1000), "multiple of 512");
    refused(&CreateOptions::new((2040 << 30) + 512), "2040 GiB");
    refused(&CreateOptions { block_size: 3 << 20, ..CreateOptions::new(512) }, "power of two");
    refused(&CreateOptions { preallocate: true, ..CreateOptions::new(512) }, "only a fixed VHD");
    create(&path, &CreateOptions::new(512)).unwrap();
    let error = create(&path, &CreateOptions::new(512)).unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
    create(&path, &CreateOptions { replace: true, fixed: true, ..CreateOptions::new(1024) }).unwrap();
    assert_eq!(head(&path).footer.kind, Kind::Fixed);
    let _ = raw_parent(&path);
}

/// Many queues write to the same new blocks at once, each its own sectors.
#[test]
fn queues_place_blocks_at_once() {
    for shape in [Shape::Dynamic(32 << 10), Shape::OverRaw(32 << 10, 1 << 20)] {
        let dir = in_memory();
        let (options, mut wanted) = image(dir.path(), shape, 2 << 20);
        let disk = Vhd::new(options.clone());
        let queues: Vec<_> = (0..4).map(|_| client(&disk)).collect();
        std::thread::scope(|scope| {
            for (number, queue) in queues.iter().enumerate() {
                scope.spawn(move || {
                    for step in 0..256 {
                        let sector = (step * 37 % 1024) * 4 + number as u64;
                        queue.write(sector * 512, vec![100 + number as u8; 512]);
                    }
                });
            }
        });
        for number in 0..queues.len() {
            for step in 0..256usize {
                let sector = (step * 37 % 1024) * 4 + number;
                wanted[sector * 512..][..512].fill(100 + number as u8);
            }
        }
        assert!(queues.iter().all(|queue| queue.read(0, 2 << 20) == wanted), "{shape:?}");
        drop(queues);
        drop(disk);
        assert_eq!(problems(&options.path), [""; 0]);
        assert!(read_all(&Vhd::new(options)) == wanted, "{shape:?} opened anew");
    }
}

/// Bytes changed anywhere, the checksums made right again: whatever comes of it, nothing panics, and what opens can be
/// read or says why not.
#[test]
fn changed_images_are_answered() {
    use vbd_testing::{Random, seeds};
    let dir = in_memory();
    let (options, _) = image(dir.path(), Shape::OverRaw(4096, 32 << 10), 64 << 10);
    let disk = Vhd::new(options.clone());
    let queue = client(&disk);
    queue.write(0, vec![3; 10_000]);
    queue.write(40 << 10, vec![4; 700]);
    drop(queue);
    drop(disk);
    let good = std::fs::read(&options.path).unwrap();
    let sum = |bytes: &mut [u8], field: usize| {
        bytes[field..field + 4].fill(0);
        let sum = bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
        bytes[field..field + 4].copy_from_slice(&(!sum).to_be_bytes());
    };
    let mut opened = 0;
    for seed in seeds(400) {
        let mut random = Random::new(seed);
        let mut bytes = good.clone();
        for _ in 0..1 + random.below(3) {
            // Where the numbers are.
            let at = *random.one_of(&[
                8,
                16,
                48,
                56,
                60,
                512 + 16,
                512 + 28,
                512 + 32,
                512 + 576,
                1536,
                1540,
                1544,
            ]);
            let value =
                *random.one_of(&[0, 1, 2, 3, 4, 8, 0xff, 1 << 12, 1 << 16, 1 << 31, u32::MAX, u32::MAX - 1]);
            let to = at + random.index(3) * 4;
            bytes[to..to + 4].copy_from_slice(&value.to_be_bytes());
        }
        if random.once_in(4) {
            bytes.truncate(random.index(bytes.len()));
            bytes.resize(bytes.len().max(1536), 0);
        }
        let end = bytes.len() - FOOTER_LEN;
        let start: [u8; FOOTER_LEN] = bytes[..FOOTER_LEN].try_into().unwrap();
        sum(&mut bytes[..FOOTER_LEN], 64);
        if !random.once_in(3) {
            bytes[end..].copy_from_slice(&start);
            sum(&mut bytes[end..], 64);
        }
        sum(&mut bytes[FOOTER_LEN..FOOTER_LEN + HEADER_LEN], 36);
        vbd_vhd::fuzz(&bytes);
        std::fs::write(&options.path, &bytes).unwrap();
        for read_only in [true, false] {
            let disk = Vhd::new(VhdOptions { read_only, ..options.clone() });
            let Ok(session) = disk.open() else { continue };
            opened += 1;
            let size = session.geometry().size.min(64 << 10);
            let queue = client(&disk);
            let read = vbd_testing::client::Ask::new(vbd_core::Operation::Read, 0, size);
            let _ = queue.ask(read);
            if !read_only {
                let _ = queue.ask(vbd_testing::client::Ask::write(size / 2, vec![1; 512]));
            }
        }
    }
    assert!(opened > 100, "{opened} opened");
}

/// What the fuzzer starts from: `VBD_WRITE_CORPUS=1` writes it anew.
#[test]
fn the_corpus_holds_every_kind() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/vhd");
    if std::env::var_os("VBD_WRITE_CORPUS").is_some() {
        for (name, shape) in [
            ("fixed", Shape::Fixed),
            ("dynamic", Shape::Dynamic(4096)),
            ("differencing", Shape::OverRaw(4096, 4096)),
        ] {
            let dir = in_memory();
            let (options, _) = image(dir.path(), shape, 16 << 10);
            let disk = Vhd::new(options.clone());
            client(&disk).write(4096, vec![3; 700]);
            drop(disk);
            std::fs::copy(&options.path, corpus.join(name)).unwrap();
        }
    }
    let mut kinds = Vec::new();
    for path in vbd_testing::corpus::entries(&corpus) {
        let bytes = std::fs::read(path).unwrap();
        if let Ok(head) = Head::read(&bytes[..], bytes.len() as u64) {
            kinds.push(head.footer.kind);
        }
    }
    for kind in [Kind::Fixed, Kind::Dynamic, Kind::Differencing] {
        assert!(kinds.contains(&kind), "{kind}");
    }
}
