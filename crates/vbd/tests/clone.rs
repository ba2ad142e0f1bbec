//! `vbd clone`: what a clone has of its own, what it shares, and what is never left behind.

mod common;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{names, refused};
use vbd_image::partition::{self, Format, Guid, Kind, Partition, Table, kind};
use vbd_testing::Mounted;

const MIB: u64 = 1 << 20;
const UUID: &str = "12345678-abcd-4321-8765-0123456789ab";
/// The ESP's and the root's own.
const PARTUUIDS: [u128; 2] = [0x11, 0x2222_2222_0000_4000_8000_0000_0000_0001];

fn vbd(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vbd")).args(arguments).output().unwrap()
}

/// What a verb prints that has to succeed.
#[track_caller]
fn done(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A program that has to succeed.
#[track_caller]
fn run(program: &str, arguments: &[&str]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    done(Command::new(program).env("PATH", path).args(arguments).output().unwrap())
}

/// The tree of a machine.
fn tree(directory: &Path) -> PathBuf {
    let tree = directory.join("tree");
    let partuuid = Guid(PARTUUIDS[1]);
    for (path, text) in [
        ("etc/hostname", "base\n".to_owned()),
        ("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 base\n".to_owned()),
        ("etc/machine-id", "0123456789abcdef0123456789abcdef\n".to_owned()),
        (
            "etc/fstab",
            format!("UUID={} / ext4 defaults 0 1\nPARTUUID={partuuid} /x ext4\n", UUID.to_uppercase()),
        ),
        ("etc/ssh/ssh_host_ed25519_key", "secret".to_owned()),
        ("etc/ssh/ssh_host_ed25519_key.pub", "public".to_owned()),
        ("etc/ssh/sshd_config", "Port 22\n".to_owned()),
        ("var/lib/systemd/random-seed", "seed".to_owned()),
        ("boot/grub/grub.cfg", format!("linux /vmlinuz root=UUID={UUID} ro\n")),
        ("large", "x".repeat(5 << 20)),
    ] {
        let path = tree.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    tree
}

fn base(directory: &Path, name: &str, options: &[&str]) -> PathBuf {
    let path = directory.join(name);
    let tree = tree(directory);
    let mut arguments = vec!["-qF", "-U", UUID, "-d", tree.to_str().unwrap()];
    arguments.extend(options);
    arguments.extend([path.to_str().unwrap(), "64M"]);
    run("mke2fs", &arguments);
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The UUID of the filesystem that a clone tells of, once.
fn uuid(told: &str) -> &str {
    told.split_once("UUID ").unwrap().1.trim()
}

#[test]
fn a_clone_is_another_machine() {
    for options in [&["-t", "ext4"][..], &["-t", "ext4", "-O", "metadata_csum_seed"], &["-t", "ext3"]] {
        let directory = tempfile::tempdir().unwrap();
        let base = base(directory.path(), "base", options);
        let before = fs::read(&base).unwrap();
        let new = directory.path().join("vm2");
        let clone = ["clone", text(&base), text(&new), "--hostname", "vm2.example.org", "--label", "second"];
        let told = done(vbd(&[&clone[..], &["--how", "copy"]].concat()));
        assert_eq!(fs::read(&base).unwrap(), before, "the base is left alone");
        let uuid = uuid(&told);
        assert_ne!(uuid, UUID);
        let shown = run("dumpe2fs", &["-h", text(&new)]);
        assert!(shown.contains(uuid) && shown.contains("second") && !shown.contains(UUID), "{shown}");
        run("e2fsck", &["-fn", text(&new)]);
        done(vbd(&["check", text(&new)]));

        let cat = |path: &str| done(vbd(&["cat", &format!("{}:{path}", text(&new))]));
        assert_eq!(cat("/etc/hostname"), "vm2.example.org\n");
        assert!(cat("/etc/hosts").contains("127.0.1.1\tvm2.example.org vm2"));
        assert_eq!(cat("/etc/machine-id"), "");
        let fstab = cat("/etc/fstab");
        assert!(fstab.starts_with(&format!("UUID={uuid} / ext4")), "{fstab}");
        assert_eq!(cat("/boot/grub/grub.cfg"), format!("linux /vmlinuz root=UUID={uuid} ro\n"));
        assert_eq!(cat("/large").len(), 5 << 20);
        let all = done(vbd(&["find", &format!("{}:/", text(&new))]));
        assert!(
            all.contains("sshd_config") && !all.contains("ssh_host") && !all.contains("random-seed"),
            "{all}"
        );
        // Another clone is another one once more.
        let third = directory.path().join("vm3");
        let told =
            done(vbd(&["clone", text(&base), text(&third), "--json", "--keep-identity", "--how", "copy"]));
        let json: serde_json::Value = serde_json::from_str(&told).unwrap();
        assert_ne!(json["filesystems"][0]["uuid"], uuid);
        let id = done(vbd(&["cat", &format!("{}:/etc/machine-id", text(&third))]));
        assert_eq!(id, "0123456789abcdef0123456789abcdef\n");
    }
}

#[test]
fn a_whole_disk_with_its_boot_entries() {
    let directory = tempfile::tempdir().unwrap();
    let root = base(directory.path(), "root", &["-t", "ext4"]);
    let esp = directory.path().join("esp");
    File::create(&esp).unwrap().set_len(34 * MIB).unwrap();
    run("mkfs.fat", &["-F", "32", text(&esp)]);
    let entry = directory.path().join("vm.conf");
    let partuuid = Guid(PARTUUIDS[1]);
    fs::write(&entry, format!("title vm\noptions root=PARTUUID={partuuid} ro\n")).unwrap();
    for arguments in [
        &["mmd", "::/loader", "::/loader/entries"][..],
        &["mcopy", text(&entry), "::/loader/entries/vm.conf"],
    ] {
        run(arguments[0], &[&["-i", text(&esp)], &arguments[1..]].concat());
    }

    let base = directory.path().join("base");
    let file = File::options().create_new(true).read(true).write(true).open(&base).unwrap();
    let size = 110 * MIB;
    file.set_len(size).unwrap();
    let mut table = Table::new(Format::Gpt(Guid(9)), 512);
    for (number, start, part, kind) in [(1, MIB, &esp, kind::ESP), (2, 40 * MIB, &root, kind::ROOT_X86_64)] {
        let bytes = fs::read(part).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, start).unwrap();
        table.partitions.push(Partition {
            number,
            start,
            size: bytes.len() as u64,
            kind: Kind::Gpt(kind),
            uuid: Some(Guid(PARTUUIDS[number as usize - 1])),
            name: format!("part {number}"),
            attributes: 0,
        });
    }
    table.write(&file, size).unwrap();

    for how in ["copy", "overlay"] {
        let mut new = directory.path().join(how);
        done(vbd(&["clone", text(&base), text(&new), "--hostname", "vm2", "--how", how]));
        if how == "overlay" {
            run("qemu-img", &["check", "-q", "-f", "qcow2", text(&new)]);
            done(vbd(&["check", "--format", "qcow2", text(&new)]));
            let raw = directory.path().join("raw");
            done(vbd(&["convert", "--from", "qcow2", text(&new), text(&raw)]));
            new = raw;
        }
        let file = File::open(&new).unwrap();
        let cloned = partition::read(&file, size).unwrap().unwrap();
        assert!(cloned.problems.is_empty() && cloned.format != table.format, "{cloned:?}");
        for (old, new) in table.partitions.iter().zip(&cloned.partitions) {
            assert_ne!(old.uuid, new.uuid);
            assert_eq!(
                (old.start, old.size, &old.name, old.kind),
                (new.start, new.size, &new.name, new.kind)
            );
        }
        let partuuid = cloned.partitions[1].uuid.unwrap().to_string();
        let fstab = done(vbd(&["cat", &format!("{}:/etc/fstab", text(&new))]));
        assert!(fstab.contains(&format!("PARTUUID={partuuid} /x")), "{fstab}");
        let entry = run("mtype", &["-i", &format!("{}@@{MIB}", text(&new)), "::/loader/entries/vm.conf"]);
        assert!(entry.contains(&format!("root=PARTUUID={partuuid} ro")), "{entry}");
        done(vbd(&["check", text(&new)]));
    }
}

/// XFS shares blocks. Needs root and a loop device.
#[test]
fn blocks_are_shared_where_that_is_possible() {
    let directory = tempfile::tempdir().unwrap();
    let xfs = directory.path().join("xfs");
    File::create(&xfs).unwrap().set_len(512 * MIB).unwrap();
    run("mkfs.xfs", &["-q", text(&xfs)]);
    let mounted = Mounted::new(&xfs, "rw");
    let base = base(directory.path(), "base", &["-t", "ext4"]);
    let inside = mounted.path().join("base");
    fs::copy(&base, &inside).unwrap();
    let new = mounted.path().join("new");
    let told = done(vbd(&["clone", text(&inside), text(&new)]));
    assert!(told.contains(": reflink of "), "{told}");
    run("e2fsck", &["-fn", text(&new)]);
    let map: serde_json::Value = serde_json::from_str(&done(vbd(&["map", "--json", text(&new)]))).unwrap();
    let shared = map["extents"].as_array().unwrap().iter().filter(|extent| extent["shared"] == true);
    let shared: u64 = shared.map(|extent| extent["length"].as_u64().unwrap()).sum();
    assert!(shared > 5 * MIB, "{shared} bytes are shared");
    // Images of formats, too, with all in them.
    let (image, other) = (mounted.path().join("image"), mounted.path().join("other"));
    done(vbd(&["convert", text(&inside), text(&image), "--to", "qcow2"]));
    let told = done(vbd(&["clone", text(&image), text(&other), "--format", "qcow2"]));
    assert!(told.contains(": reflink of "), "{told}");
    run("qemu-img", &["check", "-q", "-f", "qcow2", text(&other)]);
    done(vbd(&["check", text(&other), "--format", "qcow2"]));
    // From another filesystem it cannot be; a copy keeps the holes.
    let copy = directory.path().join("copy");
    refused(&vbd(&["clone", text(&inside), text(&copy), "--how", "reflink"]), 1, &["cannot be shared"]);
    let told = done(vbd(&["clone", text(&inside), text(&copy), "--how", "copy"]));
    assert!(told.contains(": sparse copy of "), "{told}");
    assert!(std::os::unix::fs::MetadataExt::blocks(&copy.metadata().unwrap()) * 512 < 20 * MIB);
}

#[test]
fn nothing_is_left_of_what_fails() {
    let directory = tempfile::tempdir().unwrap();
    let good = base(directory.path(), "base", &["-t", "ext4"]);
    let plain = base(directory.path(), "ext2", &["-t", "ext2"]);
    let new = directory.path().join("new");
    let list = names(directory.path());
    refused(&vbd(&["clone", text(&plain), text(&new)]), 1, &["no journal"]);
    refused(&vbd(&["clone", text(&good), text(&new), "--hostname", "a b"]), 1, &["hostname"]);
    refused(&vbd(&["clone", text(&good), text(&new), "--label", &"l".repeat(17)]), 1, &["16 bytes"]);
    refused(&vbd(&["clone", text(&good), text(&plain)]), 1, &["exists already", "--force"]);
    assert_eq!(names(directory.path()), list);
    // Somebody writes to the base.
    let file = File::options().read(true).write(true).open(&good).unwrap();
    let options = vbd_image::lease::Options::default();
    let lease = vbd_image::lease::Lease::acquire(
        std::os::fd::AsFd::as_fd(&file),
        &good,
        vbd_image::lease::Mode::Write,
        options,
    );
    let lease = lease.unwrap();
    refused(&vbd(&["clone", text(&good), text(&new)]), 1, &["in use"]);
    drop(lease);
    done(vbd(&["clone", text(&good), text(&new)]));
}

#[test]
fn a_clone_that_is_killed_is_whole_or_not_there() {
    let directory = tempfile::tempdir().unwrap();
    let base = base(directory.path(), "base", &["-t", "ext4"]);
    let new = directory.path().join("new");
    let mut killed = 0;
    for (how, format) in [("overlay", "qcow2"), ("copy", "raw")] {
        for delay in (0..80).step_by(5) {
            let arguments = ["clone", text(&base), text(&new), "--hostname", "vm2", "--how", how];
            let mut child = Command::new(env!("CARGO_BIN_EXE_vbd"))
                .args(arguments)
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(std::time::Duration::from_millis(delay));
            child.kill().unwrap();
            killed += u32::from(!child.wait().unwrap().success());
            let others = names(directory.path());
            assert!(!others.iter().any(|name| name.ends_with(".new")), "{others:?}");
            if new.exists() {
                done(vbd(&["check", text(&new), "--format", format]));
                let hostname = format!("{}:/etc/hostname", text(&new));
                assert_eq!(done(vbd(&["cat", &hostname, "--format", format])), "vm2\n");
                fs::remove_file(&new).unwrap();
            }
        }
    }
    assert!(killed > 0, "none was killed in time");
}
