//! Encrypted disks through the verbs: made, served, converted from; keys come from files and descriptors only.

mod common;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{names, refused};

fn vbd(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vbd")).args(arguments).current_dir(directory).output().unwrap()
}

#[track_caller]
fn done(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// QEMU's own view of the encrypted file.
fn qemu_io(directory: &Path, commands: &[&str]) {
    let image = ["--object", "secret,id=key,file=key", "--image-opts"];
    let file = "driver=luks,key-secret=key,file.filename=disk";
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    let output =
        Command::new("qemu-io").args(image).arg(file).args(commands).current_dir(directory).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !said.contains("failed"), "{said}{output:?}");
}

/// A disk of 4 MiB with its key, and a wrong one.
fn made() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_owned();
    fs::write(path.join("key"), "a passphrase").unwrap();
    fs::write(path.join("wrong"), "another").unwrap();
    done(&vbd(&path, &["create", "disk", "--format", "luks", "--size", "4M", "--key-file", "key"]));
    (directory, path)
}

struct Serving(Child);

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

#[test]
fn what_is_served_is_what_qemu_reads() {
    let (_guard, dir) = made();
    qemu_io(&dir, &["write -P 5 1M 64k"]);
    let arguments =
        ["attach", "disk", "--format", "luks", "--key-file", "/dev/stdin", "--nbd", "unix:socket"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_vbd"))
        .args(arguments)
        .current_dir(&dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"a passphrase").unwrap();
    let serving = Serving(child);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !dir.join("socket").exists() {
        assert!(Instant::now() < deadline, "it never served");
        std::thread::sleep(Duration::from_millis(10));
    }
    let socket = format!("nbd+unix:///disk?socket={}", dir.join("socket").display());
    let commands = ["-c", "read -P 5 1M 64k", "-c", "write -P 6 100 5000", "-c", "flush"];
    let output = Command::new("qemu-io").args(["-f", "raw"]).args(commands).arg(socket).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !said.contains("failed"), "{said}{output:?}");
    drop(serving);
    qemu_io(&dir, &["read -P 5 1M 64k", "read -P 6 100 5000"]);
}

#[test]
fn what_is_converted_is_what_qemu_wrote() {
    let (_guard, dir) = made();
    qemu_io(&dir, &["write -P 5 0 4M", "write -P 6 1M 64k"]);
    done(&vbd(&dir, &["convert", "disk", "plain", "--from", "luks", "--key-file", "key", "--verify"]));
    let mut wanted = vec![5; 4 << 20];
    wanted[1 << 20..][..64 << 10].fill(6);
    assert!(fs::read(dir.join("plain")).unwrap() == wanted);
    // Grown, the data is still where it was.
    done(&vbd(&dir, &["resize", "disk", "--format", "luks", "--key-file", "key", "+1M"]));
    qemu_io(&dir, &["read -P 6 1M 64k", "write -P 7 4M 1M"]);
}

/// Runs the verb with the file `key` as its descriptor 3.
fn with_descriptor(directory: &Path, command: &str) -> Output {
    let script = format!("exec \"$0\" {command} 3<key");
    let vbd = env!("CARGO_BIN_EXE_vbd");
    Command::new("sh").args(["-c", &script, vbd]).current_dir(directory).output().unwrap()
}

/// QEMU's own view of an encrypted qcow2 image.
fn qemu_io_qcow2(directory: &Path, file: &str, key: &str, commands: &[&str]) {
    let secret = format!("secret,id=key,file={key}");
    let image = format!("driver=qcow2,encrypt.format=luks,encrypt.key-secret=key,file.filename={file}");
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    let output = Command::new("qemu-io")
        .args(["--object", &secret, "--image-opts", &image])
        .args(commands)
        .current_dir(directory)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !said.contains("failed"), "{said}{output:?}");
}

#[test]
fn qcow2_images_are_encrypted_too() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    fs::write(dir.join("key"), "a passphrase").unwrap();
    fs::write(dir.join("other"), "another").unwrap();
    let made = "create disk.qcow2 --format qcow2 --encrypt --size 4M --key-fd 3";
    done(&with_descriptor(dir, made));
    qemu_io_qcow2(dir, "disk.qcow2", "key", &["write -P 5 1M 64k"]);
    done(&with_descriptor(dir, "convert disk.qcow2 plain --from qcow2 --key-fd 3"));
    let mut wanted = vec![0; 4 << 20];
    wanted[1 << 20..][..64 << 10].fill(5);
    assert!(fs::read(dir.join("plain")).unwrap() == wanted);

    let to = [
        "convert",
        "plain",
        "new.qcow2",
        "--to",
        "qcow2",
        "--encrypt",
        "--new-key-file",
        "other",
        "--verify",
    ];
    done(&vbd(dir, &to));
    qemu_io_qcow2(dir, "new.qcow2", "other", &["read -P 5 1M 64k", "read -P 0 0 1M"]);
    done(&vbd(dir, &["compare", "new.qcow2", "plain", "--format", "qcow2", "--key-file", "other"]));
    // What is checked needs no key.
    done(&vbd(dir, &["check", "new.qcow2", "--format", "qcow2"]));
    // From one key to another.
    let again =
        ["convert", "new.qcow2", "again.qcow2", "--from", "qcow2", "--key-file", "other", "--to", "qcow2"];
    done(&vbd(dir, &[&again[..], &["--encrypt", "--new-key-file", "key"]].concat()));
    qemu_io_qcow2(dir, "again.qcow2", "key", &["read -P 5 1M 64k"]);

    let size = |more: &[&str]| -> u64 {
        let told = done(&vbd(dir, &[&["measure", "plain", "--to", "qcow2", "--json"][..], more].concat()));
        let number = told.split("\"required\":").nth(1).unwrap().trim_start();
        number.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    };
    assert_eq!(size(&["--encrypt"]) - size(&[]), 2 << 20, "room for the key slots");
    let there = fs::metadata(dir.join("new.qcow2")).unwrap().len();
    assert!(there <= size(&["--encrypt"]), "{there}");

    let info = done(&vbd(dir, &["info", "new.qcow2"]));
    assert!(info.contains("encrypted"), "{info}");
    let create = ["create", "one.qcow2", "--format", "qcow2", "--size", "1M"];
    let create = |more: &[&str]| vbd(dir, &[&create[..], more].concat());
    refused(&create(&["--encrypt"]), 2, &["say --key-file FILE or --key-fd N"]);
    refused(&create(&["--key-file", "key"]), 2, &["say --encrypt"]);
    refused(&create(&["--encrypt", "--key-fd", "77"]), 1, &["cannot read the key from descriptor 77"]);
    let both = ["--encrypt", "--key-file", "key", "--key-fd", "3"];
    refused(&create(&both), 2, &["cannot be used with"]);
    refused(&vbd(dir, &[&to[..], &["--force", "--compress", "zstd"]].concat()), 2, &["leave out --compress"]);
    let wrong = ["convert", "new.qcow2", "no", "--from", "qcow2", "--key-file", "key"];
    refused(&vbd(dir, &wrong), 1, &["new.qcow2: the key is wrong"]);
    assert!(!dir.join("one.qcow2").exists() && !dir.join("no").exists());
}

#[test]
fn keys_are_added_and_taken_away() {
    for format in ["luks", "qcow2"] {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path();
        fs::write(dir.join("key"), "a passphrase").unwrap();
        fs::write(dir.join("other"), "another").unwrap();
        let encrypt: &[&str] = if format == "qcow2" { &["--encrypt"] } else { &[] };
        let create = ["create", "disk", "--format", format, "--size", "2M", "--key-file", "key"];
        done(&vbd(dir, &[&create[..], encrypt].concat()));
        let amend = |more: &[&str]| vbd(dir, &[&["amend", "disk", "--format", format][..], more].concat());
        let opens = |key: &str| {
            let convert = ["convert", "disk", "out", "--from", format, "--force", "--key-file", key];
            vbd(dir, &convert).status.success()
        };
        refused(&amend(&["--remove-key-file", "key"]), 1, &["disk: that is the last key"]);
        refused(&amend(&["--add-key-file", "other"]), 1, &["say a key that opens it, too"]);
        refused(&amend(&["--add-key-file", "other", "--key-file", "other"]), 1, &["the key is wrong"]);
        let told = done(&amend(&["--add-key-file", "other", "--key-file", "key"]));
        assert_eq!(told, "disk: key slot 1 takes the new key\n");
        assert!(opens("key") && opens("other"));
        refused(
            &amend(&["--remove-key-slot", "1", "--key-file", "other"]),
            1,
            &["is the one that the key opens"],
        );
        assert_eq!(done(&amend(&["--remove-key-file", "key"])), "disk: key slot 0 is free\n");
        assert!(!opens("key") && opens("other"));
        // Both at once, the new one first.
        let told =
            done(&amend(&["--add-key-file", "key", "--remove-key-file", "other", "--key-file", "other"]));
        assert_eq!(told, "disk: key slot 0 takes the new key\ndisk: key slot 1 is free\n", "{format}");
        assert!(opens("key") && !opens("other"));
        refused(&amend(&[]), 2, &["nothing is to be changed"]);
    }
}

#[test]
fn options_of_an_encrypted_image_change_without_its_key() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    fs::write(dir.join("key"), "a passphrase").unwrap();
    done(&vbd(
        dir,
        &["create", "disk", "--format", "qcow2", "--encrypt", "--size", "4M", "--key-file", "key"],
    ));
    qemu_io_qcow2(dir, "disk", "key", &["write -P 5 0 4M"]);
    let told = done(&vbd(
        dir,
        &["amend", "disk", "--format", "qcow2", "--lazy-refcounts", "on", "--refcount-bits", "32"],
    ));
    assert_eq!(told, "disk: reference counts have 32 bits now\ndisk: lazy refcounts are on now\n");
    let resize = ["resize", "disk", "--format", "qcow2", "--key-file", "key"];
    refused(&vbd(dir, &[&resize[..], &["1M"]].concat()), 1, &["say --shrink"]);
    done(&vbd(dir, &[&resize[..], &["--shrink", "1000K"]].concat()));
    done(&vbd(dir, &[&resize[..], &["2M"]].concat()));
    qemu_io_qcow2(dir, "disk", "key", &["read -P 5 0 1000k", "read -P 0 1000k 1048k"]);
    done(&vbd(dir, &["check", "disk", "--format", "qcow2"]));
    let raw = ["amend", "raw", "--compat", "3"];
    fs::write(dir.join("raw"), vec![0; 1 << 20]).unwrap();
    refused(&vbd(dir, &raw), 1, &["a raw image has no options"]);
}

#[test]
fn an_encrypted_qcow2_image_is_served() {
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path();
    fs::write(dir.join("key"), "a passphrase").unwrap();
    done(&vbd(
        dir,
        &["create", "disk", "--format", "qcow2", "--encrypt", "--size", "4M", "--key-file", "key"],
    ));
    let script = "exec \"$0\" attach disk --format qcow2 --key-fd 3 --nbd unix:socket 3<key";
    let child = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_vbd")])
        .current_dir(dir)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let serving = Serving(child);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !dir.join("socket").exists() {
        assert!(Instant::now() < deadline, "it never served");
        std::thread::sleep(Duration::from_millis(10));
    }
    let socket = format!("nbd+unix:///disk?socket={}", dir.join("socket").display());
    let commands =
        ["-c", "write -P 6 100 5000", "-c", "write -P 7 2M 1M", "-c", "write -z 2M 64k", "-c", "flush"];
    let output = Command::new("qemu-io").args(["-f", "raw"]).args(commands).arg(socket).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !said.contains("failed"), "{said}{output:?}");
    drop(serving);
    qemu_io_qcow2(dir, "disk", "key", &["read -P 6 100 5000", "read -P 0 2M 64k", "read -P 7 2112k 64k"]);
    done(&vbd(dir, &["check", "disk", "--format", "qcow2"]));
}

#[test]
fn keys_that_are_missing_or_wrong() {
    let (_guard, dir) = made();
    let before = names(&dir);
    let from = ["convert", "disk", "plain", "--from", "luks"];
    let convert = |more: &[&str]| vbd(&dir, &[&from[..], more].concat());
    refused(&convert(&[]), 1, &["disk: is encrypted with LUKS: say --key-file FILE"]);
    refused(&convert(&["--key-file", "wrong"]), 1, &["disk: the key is wrong: no key slot takes it"]);
    refused(&convert(&["--key-file", "none"]), 1, &["cannot read the key from none"]);
    let create = ["create", "new", "--format", "luks", "--size", "1M"];
    refused(&vbd(&dir, &create), 2, &["an encrypted disk needs a key: say --key-file FILE"]);
    refused(&vbd(&dir, &[&create[..], &["--backing", "disk"]].concat()), 2, &["--backing is for images"]);
    let to = ["convert", "disk", "new", "--from", "luks", "--key-file", "key", "--to", "luks"];
    refused(&vbd(&dir, &to), 2, &["nothing is converted to luks"]);
    fs::write(dir.join("raw"), vec![0; 1 << 20]).unwrap();
    refused(
        &vbd(&dir, &["resize", "raw", "--format", "luks", "--key-file", "key", "2M"]),
        1,
        &["not encrypted with LUKS"],
    );
    fs::remove_file(dir.join("raw")).unwrap();
    assert_eq!(names(&dir), before, "nothing is left behind");
}
