//! What is found in a disk: real filesystems beside what blkid says of them, headers made by hand, and hostile bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use proptest::prelude::*;
use vbd_image::probe::{Contents, Filesystem, TableKind, contents, filesystem_bytes, unclean_warning};

const MIB: u64 = 1 << 20;

/// Programs of the system's administrator are not on every user's path.
fn path_of_programs() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("PATH", path_of_programs());
    command
}

/// Make a filesystem in a new file of that size, or `None`, with a word to the reader, if there is no such program.
fn made(path: &Path, size: u64, command: &[&str]) -> Option<File> {
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(size).unwrap();
    let Ok(output) = program(command[0]).args(&command[1..]).arg(path).output() else {
        eprintln!("skipped: there is no {}", command[0]);
        return None;
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(file)
}

/// A tag of what blkid finds.
fn blkid(path: &Path, tag: &str) -> Option<String> {
    let output = program("blkid").args(["-p", "-o", "value", "-s", tag]).arg(path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    (!text.is_empty()).then_some(text)
}

fn only_filesystem(contents: Contents) -> Filesystem {
    assert_eq!(contents.table, None);
    contents.filesystem.expect("a filesystem")
}

#[test]
fn real_filesystems_are_what_blkid_says() {
    let directory = tempfile::tempdir().unwrap();
    let commands: [&[&str]; 7] = [
        &["mke2fs", "-q", "-t", "ext2", "-L", "my disk"],
        &["mke2fs", "-q", "-t", "ext3", "-b", "1024"],
        &["mke2fs", "-q", "-t", "ext4", "-L", "sixteen letters!"],
        &["mke2fs", "-q", "-t", "ext4", "-O", "^64bit,bigalloc", "-b", "4096"],
        &["mkfs.xfs", "-q", "-L", "volume"],
        &["mkfs.btrfs", "-q", "-L", "a label of more than sixteen letters"],
        &["mkswap", "-q", "-L", "swapping"],
    ];
    for (number, command) in commands.iter().enumerate() {
        let path = directory.path().join(number.to_string());
        let size = 320 * MIB;
        let Some(file) = made(&path, size, command) else { continue };
        let found = only_filesystem(contents(&file, size).unwrap());
        assert_eq!(Some(found.kind.to_owned()), blkid(&path, "TYPE"));
        assert_eq!(found.label, blkid(&path, "LABEL"), "{command:?}");
        assert_eq!(found.uuid, blkid(&path, "UUID"), "{command:?}");
        assert!(found.uuid.is_some());
        assert_eq!(found.size, Some(size), "{command:?}");
        if found.kind != "swap" {
            let free = found.free.unwrap();
            assert!(free < size && free > size / 2, "{command:?}: {free}");
        }
        if found.kind.starts_with("ext") {
            assert_eq!(found.clean, Some(true));
        }
        assert_eq!(found.trouble, None, "{command:?}");
    }
}

/// An encrypted disk as cryptsetup makes it; a file and no device mapper is enough for the header.
#[test]
fn real_luks_headers_are_what_blkid_says() {
    let directory = tempfile::tempdir().unwrap();
    let key = ["--key-file", "/dev/zero", "--keyfile-size", "32", "--pbkdf-force-iterations", "1000"];
    let luks2 = ["--type", "luks2", "--pbkdf", "pbkdf2", "--label", "a label of more than sixteen letters"];
    for (name, kind) in [("one", &["--type", "luks1"][..]), ("two", &luks2)] {
        let path = directory.path().join(name);
        let command = [&["cryptsetup", "luksFormat", "-q"], kind, &key].concat();
        let Some(file) = made(&path, 32 * MIB, &command) else { return };
        let found = only_filesystem(contents(&file, 32 * MIB).unwrap());
        assert_eq!((found.kind, blkid(&path, "TYPE").as_deref()), ("crypto_LUKS", Some("crypto_LUKS")));
        assert_eq!(found.label, blkid(&path, "LABEL"), "{name}");
        assert_eq!(found.label.is_some(), name == "two");
        assert_eq!(found.uuid, blkid(&path, "UUID"), "{name}");
        assert!(found.uuid.is_some_and(|uuid| uuid.len() == 36));
        assert_eq!((found.trouble, found.free), (None, None));
    }
}

#[test]
fn what_e2fsck_calls_free() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let file = made(&path, 64 * MIB, &["mke2fs", "-q", "-t", "ext4", "-b", "1024"]).expect("e2fsprogs");
    let output = program("dumpe2fs").arg("-h").arg(&path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Free blocks:")).unwrap();
    let free: u64 = line.trim().parse().unwrap();
    assert_eq!(contents(&file, 64 * MIB).unwrap().filesystem.unwrap().free, Some(free * 1024));
}

#[test]
fn a_filesystem_that_was_not_unmounted() {
    let directory = tempfile::tempdir().unwrap();
    let warning = |name: &str, kind: &str, offset: u64, byte: u8| {
        let path = directory.path().join(name);
        let file = made(&path, 16 * MIB, &["mke2fs", "-q", "-t", kind]).expect("e2fsprogs");
        assert_eq!(unclean_warning(&contents(&file, 16 * MIB).unwrap()), None);
        file.write_all_at(&[byte], 1024 + offset).unwrap();
        let found = contents(&file, 16 * MIB).unwrap();
        assert_eq!(found.filesystem.as_ref().unwrap().clean, Some(false));
        unclean_warning(&found).unwrap()
    };
    // The state and the incompatible features of the superblock: file types, extents, 64 bits, flexible groups; and
    // "recover" on top.
    assert_eq!(warning("a", "ext2", 58, 0), "the ext2 was not unmounted cleanly; run e2fsck");
    assert_eq!(warning("b", "ext3", 58, 3), "the ext3 has errors on record; run e2fsck");
    assert!(warning("c", "ext4", 96, 0xC6).starts_with("the ext4 was not unmounted cleanly; its journal"));
}

#[test]
fn a_filesystem_that_was_cut_off() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let file = made(&path, 16 * MIB, &["mke2fs", "-q", "-t", "ext4"]).expect("e2fsprogs");
    file.set_len(8 * MIB).unwrap();
    let found = contents(&file, 8 * MIB).unwrap();
    assert_eq!(unclean_warning(&found).unwrap(), "the ext4 is larger than what holds it");
}

/// Bytes at offsets, zeroes between them.
fn disk(length: usize, parts: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; length];
    for (offset, part) in parts {
        bytes[*offset..offset + part.len()].copy_from_slice(part);
    }
    bytes
}

const ID: [u8; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];

/// Headers of the formats that the machine's programs may not make, with type, label, UUID and size.
type Made = (Vec<u8>, &'static str, Option<&'static str>, Option<&'static str>, Option<u64>);

fn made_by_hand() -> Vec<Made> {
    let uuid = Some("01020304-0506-0708-090a-0b0c0d0e0f10");
    vec![
        (
            disk(
                4096,
                &[
                    (11, &[0, 2]),
                    (13, &[4]),
                    (19, &[0, 0, 0]),
                    (32, &[8, 0, 0, 0]),
                    (39, &[4, 3, 2, 1]),
                    (43, b"MY DISK    "),
                    (54, b"FAT16   "),
                    (510, b"\x55\xaa"),
                ],
            ),
            "vfat",
            Some("MY DISK"),
            Some("0102-0304"),
            Some(4096),
        ),
        (
            disk(
                4096,
                &[
                    (11, &[0, 2]),
                    (13, &[1]),
                    (32, &[8, 0, 0, 0]),
                    (48, &[1]),
                    (67, &[4, 3, 2, 1]),
                    (71, b"NO NAME    "),
                    (82, b"FAT32   "),
                    (510, b"\x55\xaa"),
                    (512, b"RRaA"),
                    (1000, &[2]),
                ],
            ),
            "vfat",
            None,
            Some("0102-0304"),
            Some(4096),
        ),
        (
            disk(
                4096,
                &[(3, b"EXFAT   "), (72, &[8]), (100, &[4, 3, 2, 1]), (108, &[9]), (510, b"\x55\xaa")],
            ),
            "exfat",
            None,
            Some("0102-0304"),
            Some(4096),
        ),
        (
            disk(4096, &[(3, b"NTFS    "), (11, &[0, 2]), (40, &[7]), (72, &[8, 7, 6, 5, 4, 3, 2, 1])]),
            "ntfs",
            None,
            Some("0102030405060708"),
            Some(3584),
        ),
        (
            disk(
                8192,
                &[
                    (1024, &[0x10, 0x20, 0xF5, 0xF2]),
                    (1040, &[12]),
                    (1060, &[2]),
                    (1132, &ID),
                    (1148, &[b'a', 0, 0xE4, 0]),
                ],
            ),
            "f2fs",
            Some("aä"),
            uuid,
            Some(8192),
        ),
        (
            disk(
                4096,
                &[
                    (1024, &[0xE2, 0xE1, 0xF5, 0xE0]),
                    (1036, &[9]),
                    (1060, &[8]),
                    (1072, &ID),
                    (1088, b"sixteen letters!"),
                ],
            ),
            "erofs",
            Some("sixteen letters!"),
            uuid,
            Some(4096),
        ),
        (disk(4096, &[(0, b"hsqs"), (28, &[4]), (40, &[0, 1])]), "squashfs", None, None, Some(256)),
        (
            disk(
                40_960,
                &[
                    (32_768, b"\x01CD001"),
                    (32_808, b"VOLUME                          "),
                    (32_848, &[20]),
                    (32_896, &[0, 8]),
                    (33_581, b"2026112214520700"),
                ],
            ),
            "iso9660",
            Some("VOLUME"),
            Some("2026-11-22-14-52-07-00"),
            Some(40_960),
        ),
        (
            disk(4096, &[(0, b"LUKS\xba\xbe\x00\x02"), (24, b"secret"), (168, b"dd2c6f85-3a9b")]),
            "crypto_LUKS",
            Some("secret"),
            Some("dd2c6f85-3a9b"),
            None,
        ),
        (
            disk(
                4096,
                &[
                    (512, b"LABELONE"),
                    (536, b"LVM2 001"),
                    (544, b"abcdefABCDEFabcdefABCDEF12345678"),
                    (576, &[0, 16]),
                ],
            ),
            "LVM2_member",
            None,
            Some("abcdef-ABCD-EFab-cdef-ABCD-EF12-345678"),
            Some(4096),
        ),
        (disk(512, &[(0, b"QFI\xfb")]), "qcow2", None, None, None),
    ]
}

#[test]
fn headers_made_by_hand() {
    for (bytes, kind, label, uuid, size) in made_by_hand() {
        let found = only_filesystem(filesystem_bytes(&bytes));
        let told = (found.kind, found.label.as_deref(), found.uuid.as_deref(), found.size);
        assert_eq!(told, (kind, label, uuid, size));
        assert_eq!(found.trouble, None, "{kind}");
    }
}

#[test]
fn a_dirty_fat_and_its_free_space() {
    let (mut bytes, ..) = made_by_hand().swap_remove(1);
    assert_eq!(filesystem_bytes(&bytes).filesystem.unwrap().free, Some(1024));
    bytes[65] = 1;
    let found = filesystem_bytes(&bytes);
    assert_eq!(unclean_warning(&found).unwrap(), "the vfat was not unmounted cleanly");
}

#[test]
fn labels_do_not_steer_the_terminal() {
    let (mut bytes, ..) = made_by_hand().swap_remove(0);
    bytes[43] = 0x1b;
    assert_eq!(filesystem_bytes(&bytes).filesystem.unwrap().label.unwrap(), "?Y DISK");
}

/// An entry of a boot record: type, first sector, number of sectors.
fn entry(kind: u8, first: u32, sectors: u32) -> Vec<u8> {
    [&[0x80, 0, 0, 0, kind, 0, 0, 0], &first.to_le_bytes()[..], &sectors.to_le_bytes()[..]].concat()
}

/// A disk of 64 KiB: a swap partition, one with a FAT, and an extended one with two logical ones.
fn mbr() -> Vec<u8> {
    let (fat, ..) = made_by_hand().swap_remove(0);
    let signature: &[u8] = b"\x55\xaa";
    disk(
        65_536,
        &[
            (440, &[4, 3, 2, 1]),
            (446, &entry(0x82, 8, 8)),
            (462, &entry(0x0C, 16, 8)),
            (478, &entry(0x05, 32, 64)),
            (510, signature),
            (16 * 512, &fat),
            (32 * 512 + 446, &entry(0x83, 4, 8)),
            (32 * 512 + 462, &entry(0x05, 16, 16)),
            (32 * 512 + 510, signature),
            (48 * 512 + 446, &entry(0x99, 4, 1000)),
            (48 * 512 + 510, signature),
        ],
    )
}

#[test]
fn a_partition_table_of_the_old_kind() {
    let table = filesystem_bytes(&mbr()).table.unwrap();
    assert_eq!((table.kind, table.uuid.as_deref()), (TableKind::Mbr, Some("01020304")));
    let listed: Vec<_> = table
        .partitions
        .iter()
        .map(|p| (p.number, p.start / 512, p.size / 512, p.kind.as_str(), p.fits))
        .collect();
    assert_eq!(
        listed,
        [
            (1, 8, 8, "Linux swap", true),
            (2, 16, 8, "FAT32", true),
            (3, 32, 64, "extended", true),
            (5, 36, 8, "Linux", true),
            (6, 52, 1000, "0x99", false),
        ]
    );
    assert_eq!(table.partitions[1].filesystem.as_ref().unwrap().label.as_deref(), Some("MY DISK"));
    assert_eq!(table.partitions[0].filesystem, None);
}

#[test]
fn a_chain_of_partitions_that_goes_back_ends() {
    let mut bytes = mbr();
    bytes[48 * 512 + 462..48 * 512 + 478].copy_from_slice(&entry(0x05, 0, 16));
    assert_eq!(filesystem_bytes(&bytes).table.unwrap().partitions.len(), 5);
}

#[test]
fn a_boot_sector_without_partitions_is_no_table() {
    assert_eq!(filesystem_bytes(&disk(4096, &[(510, b"\x55\xaa")])).table, None);
    let code = disk(4096, &[(446, b"boot code of some kind"), (510, b"\x55\xaa")]);
    assert_eq!(filesystem_bytes(&code).table, None);
}

/// The first sectors of a disk of 64 KiB with a GPT of four entries: header and entries, in
/// hexadecimal, with checksums by another program.
const GPT_HEADER: &str = "4546492050415254000001005c000000e102cd8d0000000001000000000000007f0000000000000028000000000000005700\
    0000000000000403020106050807090a0b0c0d0e0f1002000000000000000400000080000000bc6409f2";
const GPT_ENTRIES: &str = "28732ac11ff8d211ba4b00a0c93ec93b0102030405060708090a0b0c0d0e0f1028000000000000002f000000000000000000\
    0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000\
    00000000000000000000000000000000000000000000000000000000af3dc60f838472478e793d69d8477de4010203040506\
    0708090a0b0c0d0e0f1030000000000000005700000000000000000000000000000072006f006f0074002000e4";

fn gpt() -> Vec<u8> {
    let bytes = |hex: &str| -> Vec<u8> {
        (0..hex.len() / 2).map(|n| u8::from_str_radix(&hex[2 * n..2 * n + 2], 16).unwrap()).collect()
    };
    let (fat, ..) = made_by_hand().swap_remove(0);
    disk(
        65_536,
        &[
            (446, &entry(0xEE, 1, 127)),
            (510, b"\x55\xaa"),
            (512, &bytes(GPT_HEADER)),
            (1024, &bytes(GPT_ENTRIES)),
            (40 * 512, &fat),
        ],
    )
}

#[test]
fn a_partition_table_of_the_new_kind() {
    let mut bytes = gpt();
    let table = filesystem_bytes(&bytes).table.unwrap();
    assert_eq!((table.kind, table.valid), (TableKind::Gpt, true));
    assert_eq!(table.uuid.as_deref(), Some("01020304-0506-0708-090a-0b0c0d0e0f10"));
    let listed: Vec<_> = table
        .partitions
        .iter()
        .map(|p| (p.number, p.start / 512, p.size / 512, p.kind.as_str(), p.name.as_deref(), p.fits))
        .collect();
    assert_eq!(
        listed,
        [(1, 40, 8, "EFI system", None, true), (2, 48, 40, "Linux filesystem", Some("root ä"), true)]
    );
    assert_eq!(table.partitions[0].filesystem.as_ref().unwrap().label.as_deref(), Some("MY DISK"));

    bytes[1024 + 128 + 56] = b'R';
    let table = filesystem_bytes(&bytes).table.unwrap();
    assert!(!table.valid, "a checksum is wrong");
    assert_eq!(table.partitions[1].name.as_deref(), Some("Root ä"));
}

#[test]
fn nothing_to_find() {
    assert_eq!(filesystem_bytes(&[]), Contents::default());
    assert_eq!(filesystem_bytes(&[0xFF; 200_000]), Contents::default());
}

/// Disks with something in them, each to be damaged.
static SEEDS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let ext4 = disk(
        8192,
        &[
            (1028, &[8]),
            (1048, &[0]),
            (1080, &[0x53, 0xEF, 1, 0]),
            (1116, &[4, 0, 0, 0, 0xC2, 2]),
            (1144, b"label"),
        ],
    );
    let xfs = disk(4096, &[(0, b"XFSB\0\0\x10\0"), (8, &[0, 0, 0, 0, 0, 0, 0, 1])]);
    let btrfs = disk(70_000, &[(65_600, b"_BHRfS_M"), (65_648, &[0; 8]), (65_672, &[1])]);
    let swap = disk(4096, &[(1024, &[1]), (4086, b"SWAPSPACE2")]);
    let mut seeds = vec![ext4, xfs, btrfs, swap, mbr(), gpt()];
    seeds.extend(made_by_hand().into_iter().map(|made| made.0));
    seeds
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Whole words of extreme values at any place, headers above all, and the end cut off.
    #[test]
    fn damage_never_panics(
        seed in any::<prop::sample::Index>(),
        damage in prop::collection::vec(
            (any::<prop::sample::Index>(), prop_oneof![Just(u64::MAX), Just(0), Just(1 << 63), any::<u64>()], 1usize..=8, any::<bool>()),
            0..12,
        ),
        cut in prop_oneof![3 => Just(None), 1 => any::<prop::sample::Index>().prop_map(Some)],
    ) {
        let mut bytes = SEEDS[seed.index(SEEDS.len())].clone();
        for (place, word, width, near) in damage {
            let place = if near { place.index(2048) } else { place.index(bytes.len()) };
            let end = (place + width).min(bytes.len());
            if place < end {
                bytes[place..end].copy_from_slice(&word.to_le_bytes()[..end - place]);
            }
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len() + 1));
        }
        let found = filesystem_bytes(&bytes);
        let _ = unclean_warning(&found);
        serde_json::to_string(&found).unwrap();
    }

    #[test]
    fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
        filesystem_bytes(&bytes);
    }
}
