//! `vbd ls`, `cat`, `find`, `df`, `du`, `diff`, partitions, and disks in use.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;

use serde_json::Value;
use vbd_image::lease::{Lease, Mode, Options};

use crate::common::refused;
use crate::support::{command, disk, is_root, ok, run, tree, vbd};

fn prepared() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    tree(&directory.path().join("tree"));
    disk(directory.path(), "tree", "disk", &["-L", "root", "-m", "1"]);
    directory
}

fn json(arguments: &[&str], directory: &Path) -> Value {
    serde_json::from_str(&ok(arguments, directory)).unwrap()
}

fn lines(arguments: &[&str], directory: &Path) -> Vec<String> {
    ok(arguments, directory).lines().map(str::to_owned).collect()
}

#[test]
fn listings() {
    let directory = prepared();
    let path = directory.path();
    assert_eq!(lines(&["ls", "disk:/etc"], path), ["deep", "hostname", "nothing", "ä ?[2J"]);
    assert_eq!(lines(&["ls", "-a", "disk:/empty"], path), [".", ".."]);
    assert_eq!(lines(&["ls", "disk:/empty"], path), [""; 0]);
    assert_eq!(lines(&["ls", "-d", "disk:/etc"], path), ["etc"]);
    assert_eq!(lines(&["ls", "-R", "disk:/etc/deep"], path), [".", "er", "er/data"]);
    let long = ok(&["ls", "-l", "disk"], path);
    for part in [
        "drwxr-xr-x",
        "prw-r-----",
        " -> etc/hostname\n",
        "3000000  2001-09-09 01:46:40  sparse",
        "1969-12-31 23:59:55  zz-same",
    ] {
        assert!(long.contains(part), "{part:?} is not in: {long}");
    }
    assert!(ok(&["ls", "-l", "disk:/etc"], path).contains("-rwsr-sr-x"));
    if is_root() {
        assert!(long.contains("259, 70000"), "{long}");
    }
    // The whole listing by its first name or by nothing is the same.
    assert_eq!(ok(&["ls", "disk"], path), ok(&["ls", "disk:"], path));

    let found = json(&["ls", "--json", "disk:/etc/hostname"], path);
    let entry = &found[0];
    assert_eq!(entry["path"], "hostname");
    assert_eq!(
        (entry["type"].as_str(), entry["links"].as_u64(), entry["size"].as_u64()),
        (Some("file"), Some(2), Some(4))
    );
    assert_eq!(entry["mtime"], "1969-12-31T23:59:55.000000000Z");
    assert_eq!(entry["attributes"][0]["name"], "user.note");
    assert_eq!(entry["attributes"][0]["value_hex"], "6100620a");

    refused(&vbd(&["ls", "disk:/etc/hostname/x"], path), 1, &["disk:/etc/hostname/x: is not a directory"]);
    refused(&vbd(&["ls", "gone:/"], path), 1, &["gone: there is no such file"]);
    refused(&vbd(&["ls"], path), 2, &["<IMAGE:/PATH>"]);
}

#[test]
fn contents() {
    let directory = prepared();
    let path = directory.path();
    assert_eq!(ok(&["cat", "disk:/link", "disk:/etc/hostname"], path), "vm1\nvm1\n");
    let sparse = run(env!("CARGO_BIN_EXE_vbd"), &["cat", "disk:/sparse"], path);
    assert!(sparse == fs::read(path.join("tree/sparse")).unwrap());
    refused(&vbd(&["cat", "disk:/etc"], path), 1, &["disk:/etc: is a directory, not a file"]);
    refused(&vbd(&["cat", "disk:/far"], path), 1, &["disk:/far: there is no such file or directory"]);
}

#[test]
fn finding() {
    let directory = prepared();
    let path = directory.path();
    let find = |tests: &[&str]| lines(&[&["find", "disk:/"], tests].concat(), path);
    assert_eq!(find(&["-name", "h*", "-type", "f"]), ["/etc/hostname"]);
    assert_eq!(find(&["-type", "l"]), ["/far", "/link"]);
    assert_eq!(find(&["-size", "+1M"]), ["/etc/deep/er/data", "/sparse"]);
    assert_eq!(find(&["-empty", "-type", "d"]), ["/empty", "/lost+found"]);
    assert_eq!(find(&["-perm", "-6000"]), ["/etc/nothing"]);
    assert_eq!(
        find(&["-path", "/etc/*", "!", "-type", "f", "-mindepth", "2"]),
        ["/etc/deep", "/etc/deep/er"]
    );
    assert_eq!(find(&["-maxdepth", "1", "-links", "2", "-name", "z*"]), ["/zz-same"]);
    assert_eq!(find(&["-newer", "/etc", "-type", "p"]), ["/fifo"]);
    assert_eq!(find(&["-mtime", "+3000", "-type", "l"]), ["/link"]);
    assert_eq!(
        ok(&["find", "disk:/etc/deep", "-print0"], path),
        "/etc/deep\0/etc/deep/er\0/etc/deep/er/data\0"
    );
    let found = json(&["find", "--json", "disk", "-type", "p"], path);
    assert_eq!((found[0]["path"].as_str(), found.as_array().unwrap().len()), (Some("/fifo"), 1));
    refused(&vbd(&["find", "disk", "-exec", "rm"], path), 2, &["-exec: is no test that is known"]);
    refused(&vbd(&["find", "disk", "-newer", "/gone"], path), 1, &["/gone: there is no such file"]);
}

#[test]
fn room() {
    let directory = prepared();
    let path = directory.path();
    let found = json(&["df", "--json", "disk"], path);
    assert_eq!((found[0]["label"].as_str(), found[0]["size"].as_u64()), (Some("root"), Some(64 << 20)));
    let number = |name: &str| found[0][name].as_u64().unwrap();
    assert_eq!(number("used") + number("free"), number("size"));
    assert!(number("available") < number("free") && number("inodes_used") > 20);
    assert!(ok(&["df", "disk"], path).contains("root"));

    // What e2fsck counts, without the journal and the filesystem's own inodes.
    let stat = run("debugfs", &["-R", "stat /etc/deep/er/data", "disk"], path);
    let stat = String::from_utf8(stat).unwrap();
    let blocks: u64 =
        stat.split_once("Blockcount: ").unwrap().1.split_whitespace().next().unwrap().parse().unwrap();
    let files = json(&["du", "-a", "--json", "disk:/etc"], path);
    let size = |name: &str| {
        let found = files.as_array().unwrap().iter().find(|object| object["path"] == name).unwrap();
        found["size"].as_u64().unwrap()
    };
    assert_eq!(size("deep/er/data"), blocks * 512);
    assert_eq!(size("deep"), size("deep/er/data") + 2 * 1024);
    assert!(size(".") > size("deep"));
    let sum = json(&["du", "-s", "--apparent-size", "--json", "disk:/"], path);
    // Each file once, whatever its names.
    assert_eq!(sum[0]["size"].as_u64().unwrap(), 4 + 1_200_000 + 4 + 7 + 3_000_000 + 12 + 200);
    let depth = lines(&["du", "-d", "1", "--bytes", "disk:/etc"], path);
    assert!(depth[0].ends_with("  deep") && depth[1].ends_with("  .") && depth.len() == 2, "{depth:?}");
}

#[test]
fn differences() {
    let directory = prepared();
    let path = directory.path();
    let other = path.join("other");
    run("cp", &["-a", "tree", "other"], path);
    let content = || fs::read(other.join("etc/deep/er/data")).unwrap();
    let mut changed = content();
    changed[777_777] ^= 1;
    let times = fs::metadata(other.join("etc/deep/er/data")).unwrap().modified().unwrap();
    fs::write(other.join("etc/deep/er/data"), changed).unwrap();
    File::options().write(true).open(other.join("etc/deep/er/data")).unwrap().set_modified(times).unwrap();
    fs::remove_file(other.join("link")).unwrap();
    fs::write(other.join("link"), "no link").unwrap();
    fs::remove_dir(other.join("empty")).unwrap();
    fs::write(other.join("new"), "").unwrap();
    fs::remove_file(other.join("zz-same")).unwrap();
    run("cp", &["-a", "other/etc/hostname", "other/zz-same"], path);
    rustix::fs::setxattr(other.join("sparse"), "user.more", b"x", rustix::fs::XattrFlags::empty()).unwrap();
    disk(path, "other", "second", &[]);

    let output = vbd(&["diff", "--ignore", "times", "disk", "second"], path);
    assert_eq!(output.status.code(), Some(1));
    let expected = "- /empty (directory)\n\
        ~ /etc/deep/er/data: content, from byte 777777 on\n\
        ~ /link: kind symbolic link -> file\n\
        + /new (file)\n\
        ~ /sparse: attribute user.more none -> 1 bytes\n";
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        said.contains("~ /zz-same: hard links\n") || said.contains("~ /etc/hostname: hard links\n"),
        "{said}"
    );
    let rest: String =
        said.lines().filter(|line| !line.ends_with("hard links")).map(|line| format!("{line}\n")).collect();
    assert_eq!(rest, expected);
    assert!(output.stderr.is_empty());

    assert_eq!(ok(&["diff", "disk", "disk"], path), "");
    assert_eq!(ok(&["diff", "disk:/etc/deep", "disk:/etc/deep"], path), "");
    assert_eq!(vbd(&["diff", "-q", "disk", "second"], path).status.code(), Some(1));
    let found = vbd(&["diff", "--json", "disk:/sparse", "second:/sparse"], path);
    let found: Value = serde_json::from_slice(&found.stdout).unwrap();
    assert_eq!(found[0]["difference"], "changed");
    assert_eq!(found[0]["changes"][0]["what"], "attribute user.more");
    refused(&vbd(&["diff", "disk", "gone"], path), 2, &["gone: there is no such file"]);
    refused(&vbd(&["diff", "disk", "second:/gone"], path), 2, &["second:/gone: there is no such file"]);
}

#[test]
fn partitions() {
    let directory = prepared();
    let path = directory.path();
    let whole = File::create(path.join("whole")).unwrap();
    whole.set_len(200 << 20).unwrap();
    let mut sfdisk = command("sfdisk", &["-q", "whole"], path);
    let mut child =
        sfdisk.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null()).spawn().unwrap();
    let table =
        b"label: gpt\nstart=2048,size=16384,type=U\nstart=20480,size=131072\nstart=200000,size=131072\n";
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), table).unwrap();
    assert!(child.wait().unwrap().success());
    let put = |seek: &str| {
        let seek = format!("seek={seek}");
        run("dd", &["if=disk", "of=whole", "bs=512", &seek, "conv=notrunc,sparse", "status=none"], path);
    };
    refused(&vbd(&["ls", "whole"], path), 1, &["none of its partitions has an ext2, ext3 or ext4"]);
    put("20480");
    // One alone can be read: it is meant.
    assert_eq!(ok(&["cat", "whole:/etc/hostname"], path), "vm1\n");
    assert_eq!(ok(&["cat", "--partition", "2", "whole:/etc/hostname"], path), "vm1\n");
    refused(
        &vbd(&["ls", "--partition", "1", "whole"], path),
        1,
        &["whole, partition 1: no ext2, ext3 or ext4"],
    );
    refused(&vbd(&["ls", "--partition", "9", "whole"], path), 1, &["it has no partition 9; it has 1, 2, 3"]);
    refused(&vbd(&["ls", "--partition", "1", "disk"], path), 1, &["no partition table"]);
    put("200000");
    refused(&vbd(&["ls", "whole"], path), 1, &["several partitions; name one with --partition: 2, 3"]);
    let found = json(&["df", "--json", "whole"], path);
    assert_eq!((found[0]["partition"].as_u64(), found[1]["partition"].as_u64()), (Some(2), Some(3)));
    assert_eq!(ok(&["diff", "--partition", "3", "whole", "whole"], path), "");
}

#[test]
fn a_disk_in_use_is_refused_by_the_name_of_its_user() {
    let directory = prepared();
    let path = directory.path();
    let image = path.join("disk");
    let file = File::open(&image).unwrap();
    let lease = Lease::acquire(file.as_fd(), &image, Mode::Write, Options::default()).unwrap();
    let holder = format!("(process {}", std::process::id());
    for arguments in [&["ls", "disk"][..], &["tar", "disk"], &["cp", "disk:/", "x"], &["df", "disk"]] {
        refused(&vbd(arguments, path), 1, &["cannot read disk: in use by", &holder, "--force-share"]);
    }
    assert_eq!(ok(&["cat", "--force-share", "disk:/etc/hostname"], path), "vm1\n");
    drop(lease);
    // Two that read are not in each other's way.
    let _reader = Lease::acquire(file.as_fd(), &image, Mode::Read, Options::default()).unwrap();
    assert_eq!(ok(&["cat", "disk:/etc/hostname"], path), "vm1\n");
}

#[test]
fn what_cannot_be_read_is_named() {
    let directory = prepared();
    let path = directory.path();
    fs::write(path.join("zeros"), vec![0; 1 << 20]).unwrap();
    refused(&vbd(&["ls", "zeros"], path), 1, &["zeros: no ext2, ext3 or ext4 filesystem is in its 1 MiB"]);
    let swap = [vec![0; 4086], b"SWAPSPACE2".to_vec(), vec![0; 1 << 20]].concat();
    fs::write(path.join("swap"), swap).unwrap();
    refused(&vbd(&["df", "swap"], path), 1, &["swap: it has swap, and only ext2, ext3 and ext4 can be read"]);
    let mut bytes = fs::read(path.join("disk")).unwrap();
    bytes[1024 + 0x78] ^= 1;
    fs::write(path.join("damaged"), bytes).unwrap();
    refused(&vbd(&["ls", "damaged"], path), 1, &["damaged: the superblock: the checksum is wrong"]);
    assert_eq!(ok(&["cat", "--ignore-checksums", "damaged:/etc/hostname"], path), "vm1\n");
}
