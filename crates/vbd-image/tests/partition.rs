//! Partition tables, compared with what other programs make and read, and damaged.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use proptest::prelude::*;
use vbd_image::partition::{
    ALIGNMENT, BOOTABLE, Format, Guid, Kind, Layout, Misfit, Table, Wish, kind, read,
};

const MIB: u64 = 1 << 20;
const DISK: Guid = Guid(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10);

fn wish(size: Option<u64>, kind: Kind, number: u8, name: &str) -> Wish {
    let uuid = matches!(kind, Kind::Gpt(_)).then_some(Guid(u128::from(number)));
    Wish { size, kind, uuid, name: name.to_owned(), attributes: 0 }
}

fn gpt(sector: u64) -> Layout {
    Layout { format: Format::Gpt(DISK), sector }
}

const MBR: Layout = Layout { format: Format::Mbr(0xDEAD_BEEF), sector: 512 };

fn usual() -> [Wish; 3] {
    [
        wish(Some(3 * MIB + 1), Kind::Gpt(kind::ESP), 1, "esp"),
        wish(Some(MIB), Kind::Gpt(kind::SWAP), 2, "swap ä"),
        wish(None, Kind::Gpt(kind::ROOT_X86_64), 3, "root"),
    ]
}

fn disk(path: &Path, size: u64) -> File {
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(size).unwrap();
    file
}

fn program(name: &str, arguments: &[&str], path: &Path, input: &str) -> String {
    let mut child = Command::new(name)
        .args(arguments)
        .arg(path)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{name}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
fn other_programs_read_a_gpt() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let size = 64 * MIB + 512;
    let file = disk(&path, size);
    let table = gpt(512).place(size, &usual()).unwrap();
    table.write(&file, size).unwrap();

    let verdict = program("sgdisk", &["--verify"], &path, "");
    assert!(verdict.contains("No problems found"), "{verdict}");
    assert_eq!(program("sfdisk", &["--verify", "--quiet"], &path, ""), "");
    let dump: serde_json::Value = serde_json::from_str(&program("sfdisk", &["--json"], &path, "")).unwrap();
    let dump = &dump["partitiontable"];
    assert_eq!((&dump["label"], &dump["id"]), (&"gpt".into(), &DISK.to_string().to_uppercase().into()));
    let listed = dump["partitions"].as_array().unwrap();
    let listed: Vec<_> = listed
        .iter()
        .map(|p| {
            let text = |key: &str| p[key].as_str().unwrap().to_lowercase();
            (
                p["start"].as_u64().unwrap() * 512,
                p["size"].as_u64().unwrap() * 512,
                text("type"),
                text("uuid"),
                text("name"),
            )
        })
        .collect();
    let ours: Vec<_> = table
        .partitions
        .iter()
        .map(|p| {
            let Kind::Gpt(kind) = p.kind else { panic!("{:?}", p.kind) };
            (p.start, p.size, kind.to_string(), p.uuid.unwrap().to_string(), p.name.clone())
        })
        .collect();
    assert_eq!(listed, ours);
    assert_eq!(ours.iter().map(|p| (p.0 / MIB, p.1 / MIB)).collect::<Vec<_>>(), [(1, 4), (5, 1), (6, 57)]);
}

#[test]
fn what_other_programs_write_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let size = 64 * MIB;
    let file = disk(&path, size);
    program(
        "sfdisk",
        &["--quiet"],
        &path,
        "label: dos\nlabel-id: 0xdeadbeef\n,8M,83,*\n,,E\n,4M,82\n,4M,83\n,,83\n",
    );
    let table = read(&file, size).unwrap().unwrap();
    assert_eq!(table.format, Format::Mbr(0xDEAD_BEEF));
    let listed: Vec<_> =
        table.partitions.iter().map(|p| (p.number, p.start / MIB, p.size / MIB, p.kind)).collect();
    let kind = Kind::Mbr;
    assert_eq!(
        listed,
        [
            (1, 1, 8, kind(0x83)),
            (2, 9, 55, kind(0x05)),
            (5, 10, 4, kind(0x82)),
            (6, 15, 4, kind(0x83)),
            (7, 20, 44, kind(0x83))
        ]
    );
    assert_eq!(table.partitions[0].attributes, BOOTABLE);
    assert_eq!(table.partuuid(&table.partitions[3]).as_deref(), Some("deadbeef-06"));
    assert_eq!(table.check(size), Err(Misfit::Logical(2)));

    program(
        "sgdisk",
        &["--zap-all", "--new=3:2048:+8M", "--new=7:0:0", "--typecode=7:8304", "--change-name=7:top"],
        &path,
        "",
    );
    let table = read(&file, size).unwrap().unwrap();
    assert_eq!((table.problems.as_slice(), table.valid, table.sector), (&[][..], true, 512));
    let listed: Vec<_> =
        table.partitions.iter().map(|p| (p.number, p.start / MIB, p.name.as_str())).collect();
    assert_eq!(listed, [(3, 1, ""), (7, 9, "top")]);
    assert_eq!(table.partitions[1].kind, Kind::Gpt(kind::ROOT_X86_64));
}

#[test]
fn sectors_of_4_kib() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let size = 16 * MIB;
    let file = disk(&path, size);
    let table = gpt(4096).place(size, &usual()).unwrap();
    table.write(&file, size).unwrap();
    assert_eq!(read(&file, size).unwrap().unwrap(), table);
    // A loop device is the one thing that tells other programs of such sectors; it takes root.
    if rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists() {
        let device = program("losetup", &["--find", "--show", "--sector-size", "4096"], &path, "");
        let device = Path::new(device.trim());
        let verdict = program("sgdisk", &["--verify"], device, "");
        program("losetup", &["--detach"], device, "");
        assert!(verdict.contains("No problems found"), "{verdict}");
    }
}

#[test]
fn the_backup_stands_in() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let size = 16 * MIB;
    let file = disk(&path, size);
    let table = gpt(512).place(size, &usual()).unwrap();
    table.write(&file, size).unwrap();

    file.write_all_at(&[0xAA], 1024 + 40).unwrap();
    let found = read(&file, size).unwrap().unwrap();
    assert_eq!((&found.partitions, found.valid), (&table.partitions, true));
    assert_eq!(found.problems, ["has a damaged first copy; the backup at the disk's end is used"]);

    file.write_all_at(&[0; 512], 512).unwrap();
    let found = read(&file, size).unwrap().unwrap();
    assert_eq!(found.partitions, table.partitions);
    assert_eq!(found.problems, ["has lost its first copy; the backup at the disk's end is used"]);

    // Written anew it is whole again, on a larger disk too.
    file.set_len(2 * size).unwrap();
    found.write(&file, 2 * size).unwrap();
    assert_eq!(read(&file, 2 * size).unwrap().unwrap(), table);
    assert!(program("sgdisk", &["--verify"], &path, "").contains("No problems found"));

    file.set_len(3 * size).unwrap();
    let found = read(&file, 3 * size).unwrap().unwrap();
    assert_eq!(found.problems, ["has its backup before the disk's end: the disk has grown"]);
}

#[test]
fn boot_code_stays() {
    let directory = tempfile::tempdir().unwrap();
    let size = 16 * MIB;
    let file = disk(&directory.path().join("disk"), size);
    file.write_all_at(&[0x90; 440], 0).unwrap();
    MBR.place(size, &[wish(None, Kind::Mbr(0x83), 0, "")]).unwrap().write(&file, size).unwrap();
    let mut code = [0; 440];
    file.read_exact_at(&mut code, 0).unwrap();
    assert_eq!(code, [0x90; 440]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let big = [wish(Some(u64::MAX), Kind::Gpt(kind::LINUX), 1, "")];
    assert!(matches!(gpt(512).place(16 * MIB, &big), Err(Misfit::Outside { number: 1, .. })));
    assert_eq!(gpt(512).place(4096, &[]), Err(Misfit::Small(4096)));
    assert_eq!(gpt(1024).place(16 * MIB, &[]), Err(Misfit::Sector(1024)));
    let five: Vec<_> = (0..5).map(|_| wish(Some(MIB), Kind::Mbr(0x83), 0, "")).collect();
    assert_eq!(MBR.place(16 * MIB, &five), Err(Misfit::Logical(5)));
    let long = [wish(Some(MIB), Kind::Gpt(kind::LINUX), 1, &"x".repeat(37))];
    assert_eq!(gpt(512).place(16 * MIB, &long), Err(Misfit::Name(1)));
    let mixed = [wish(Some(MIB), Kind::Mbr(0x83), 1, "")];
    assert_eq!(gpt(512).place(16 * MIB, &mixed), Err(Misfit::Kind(1)));
    let mut table = gpt(512).place(16 * MIB, &usual()).unwrap();
    table.partitions[1].start = ALIGNMENT;
    assert_eq!(table.check(16 * MIB), Err(Misfit::Overlap(1, 2)));
    table.partitions[1].number = u32::MAX;
    assert_eq!(table.check(16 * MIB), Err(Misfit::Number(u32::MAX, 256)));
}

/// A small disk with the table, in memory.
fn in_memory(table: &Table, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    for (offset, part) in table.encode(size).unwrap() {
        let offset = usize::try_from(offset).unwrap();
        bytes[offset..offset + part.len()].copy_from_slice(&part);
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Tables of any kind, written and read: the same.
    #[test]
    fn written_is_read(
        sizes in prop::collection::vec(1u64..64, 1..20),
        name in "\\PC{0,18}",
        gaps in prop::collection::vec(0u64..8, 20),
        wide in any::<bool>(),
        old in any::<bool>(),
        seed in any::<u128>(),
    ) {
        let sector = if wide && !old { 4096 } else { 512 };
        let format = if old { Format::Mbr(7) } else { Format::Gpt(Guid(seed)) };
        let mut table = Table::new(format, sector);
        let mut start = 40 * sector;
        for (index, size) in sizes.iter().take(if old { 4 } else { 20 }).enumerate() {
            start += gaps[index] * sector;
            let number = u32::try_from(index).unwrap() * if old { 1 } else { 13 } + 1;
            table.partitions.push(vbd_image::partition::Partition {
                number,
                start,
                size: size * sector,
                kind: if old { Kind::Mbr(0x83) } else { Kind::Gpt(Guid(seed | 1)) },
                uuid: (!old).then_some(Guid(seed ^ u128::from(number))),
                name: if old { String::new() } else { name.clone() },
                attributes: if index == 0 { BOOTABLE } else { 0 },
            });
            start += size * sector;
        }
        let size = start + 80 * sector;
        // Of a long table the first partitions may be in the way.
        prop_assume!(table.check(size).is_ok());
        let bytes = in_memory(&table, size);
        prop_assert_eq!(read(&bytes[..], size).unwrap().unwrap(), table);
    }

    /// Words of extreme values anywhere in a table: no panic, and what may be written again reads the same.
    #[test]
    fn damage_never_panics(
        wide in any::<bool>(),
        old in any::<bool>(),
        damage in prop::collection::vec(
            (0usize..6000, prop_oneof![Just(u64::MAX), Just(0), Just(1 << 63), Just(0x0000_0001_0000_0001), any::<u64>()], 1usize..=8),
            0..8,
        ),
    ) {
        let size = 2 * MIB + 65_536;
        let sector = if wide && !old { 4096 } else { 512 };
        let table = if old {
            MBR.place(size, &[wish(Some(MIB), Kind::Mbr(0x05), 0, "")]).or_else(|_| {
                MBR.place(size, &[wish(None, Kind::Mbr(0x83), 0, "")])
            })
        } else {
            gpt(sector).place(size, &[wish(None, Kind::Gpt(kind::LINUX), 1, "one")])
        };
        let mut bytes = in_memory(&table.unwrap(), size);
        for (place, word, width) in damage {
            bytes[place..place + width].copy_from_slice(&word.to_le_bytes()[..width]);
        }
        vbd_image::partition::fuzz(&bytes);
    }
}
