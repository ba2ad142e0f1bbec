//! What is done inside of disks, in images of every format: the same as in a raw one, with images that others find whole.

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use common::{names, refused};
use serde_json::Value;

const UUID: &str = "12345678-abcd-4321-8765-0123456789ab";

struct Here(tempfile::TempDir);

impl Here {
    fn new() -> Self {
        Here(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.0.path()).env("PATH", path).stdin(Stdio::null());
        command.output().expect(program)
    }

    fn vbd(&self, arguments: &[&str]) -> Output {
        self.run(env!("CARGO_BIN_EXE_vbd"), arguments)
    }

    #[track_caller]
    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.vbd(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    #[track_caller]
    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(arguments)).unwrap()
    }

    #[track_caller]
    fn tool(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.run(program, arguments);
        assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The tree of a machine, and a raw disk of it that is one ext4.
    fn base(&self, name: &str) {
        let tree = self.path("tree");
        if !tree.exists() {
            for (path, text) in [
                ("etc/hostname", "base\n".to_owned()),
                ("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 base\n".to_owned()),
                ("etc/machine-id", "0123456789abcdef0123456789abcdef\n".to_owned()),
                ("etc/fstab", format!("UUID={UUID} / ext4 defaults 0 1\n")),
                ("etc/ssh/ssh_host_ed25519_key", "secret".to_owned()),
                ("etc/ssh/sshd_config", "Port 22\n".to_owned()),
                ("var/lib/systemd/random-seed", "seed".to_owned()),
                ("boot/grub/grub.cfg", format!("linux /vmlinuz root=UUID={UUID} ro\n")),
                ("large", "x".repeat(3 << 20)),
            ] {
                let path = tree.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
        }
        self.tool("mke2fs", &["-qF", "-t", "ext4", "-U", UUID, "-d", "tree", name, "64M"]);
    }

    /// What is in an image is whole for e2fsck, and the image for qemu-img where that knows it.
    #[track_caller]
    fn whole(&self, name: &str, options: &[&str]) {
        let format = options[1];
        if format == "qcow2" && options.len() == 2 {
            self.tool("qemu-img", &["check", "-q", "-f", format, name]);
        }
        if format == "raw" {
            self.tool("e2fsck", &["-fn", name]);
            return;
        }
        let mut convert = vec!["convert", name, "seen", "--force", "--from"];
        convert.extend(&options[1..]);
        self.ok(&convert);
        self.tool("e2fsck", &["-fn", "seen"]);
        fs::remove_file(self.path("seen")).unwrap();
    }
}

/// An image of each format with the same disk, and the options that open it.
fn images(here: &Here) -> Vec<(&'static str, Vec<&'static str>)> {
    here.base("raw");
    fs::write(here.path("key"), "a passphrase").unwrap();
    here.ok(&["convert", "raw", "qcow2", "--to", "qcow2"]);
    here.ok(&["convert", "raw", "small", "--to", "qcow2", "--cluster-size", "4K"]);
    fs::copy(here.path("raw"), here.path("below")).unwrap();
    here.ok(&["create", "middle", "--format", "qcow2", "--backing", "below"]);
    here.ok(&["create", "top", "--format", "qcow2", "--backing", "middle", "--backing-format", "qcow2"]);
    here.ok(&["convert", "raw", "vhd", "--to", "vhd"]);
    here.ok(&["create", "luks", "--format", "luks", "--size", "64M", "--key-file", "key"]);
    let opened = "driver=luks,key-secret=key,file.filename=luks";
    let (secret, to) = (["--object", "secret,id=key,file=key"], ["--target-image-opts", "raw", opened]);
    here.tool("qemu-img", &[&["convert", "-n", "-f", "raw"], &secret[..], &to].concat());
    let encrypted = ["--encrypt", "--new-key-file", "key"];
    here.ok(&[&["convert", "raw", "secret", "--to", "qcow2"], &encrypted[..]].concat());
    vec![
        ("raw", vec!["--format", "raw"]),
        ("qcow2", vec!["--format", "qcow2"]),
        ("small", vec!["--format", "qcow2"]),
        ("top", vec!["--format", "qcow2"]),
        ("vhd", vec!["--format", "vhd"]),
        ("luks", vec!["--format", "luks", "--key-file", "key"]),
        ("secret", vec!["--format", "qcow2", "--key-file", "key"]),
    ]
}

/// Changes of each verb that makes some.
fn change(here: &Here, name: &str, options: &[&str]) {
    let at = |path: &str| format!("{name}:{path}");
    fs::write(here.path("text"), "vm9\n").unwrap();
    let (hostname, srv, deep) = (at("/etc/hostname"), at("/srv"), at("/srv/a/b"));
    let (moved, link, gone) = (at("/moved"), at("/link"), at("/large"));
    for verb in [
        &["edit", &hostname, "--content-from", "text"][..],
        &["mkdir", "-p", &deep],
        &["cp", "tree", &srv],
        &["mv", &deep, &moved],
        &["ln", "-s", "moved", &link],
        &["chmod", "0700", &moved],
        &["chown", "12:34", &moved],
        &["rm", "-r", &gone],
        &["tailor", name, "--write", "/etc/motd=hello", "--append", "/etc/hosts=::1 me"],
    ] {
        here.ok(&[verb, options].concat());
    }
}

#[test]
fn every_format_is_changed_and_read_as_a_raw_disk_is() {
    let here = Here::new();
    let images = images(&here);
    let below = fs::read(here.path("below")).unwrap();
    let middle = fs::read(here.path("middle")).unwrap();
    // A key takes its time with every verb: one encrypted format has to do.
    for (name, options) in images.iter().filter(|(name, _)| *name != "secret") {
        change(&here, name, options);
        here.whole(name, options);
        let shown = |verb: &[&str]| here.ok(&[verb, &options[..]].concat());
        assert_eq!(shown(&["cat", &format!("{name}:/etc/hostname")]), "vm9\n");
        assert!(shown(&["ls", "-l", &format!("{name}:/")]).contains("moved"), "{name}");
        // Its options come first: the rest is the expression.
        let place = format!("{name}:/");
        let found = here.ok(&[&["find"], &options[..], &[place.as_str(), "-name", "sshd_config"]].concat());
        assert!(found.contains("/srv/tree/etc/ssh"), "{found}");
        assert!(shown(&["df", name]).contains("M"), "{name}");
        assert!(shown(&["du", "-s", &format!("{name}:/srv")]).contains("3 MiB"), "{name}");
        // All of it, against the raw disk with the same changes.
        let ignored = ["diff", "raw", name, "--ignore", "times", "--format", "raw", "--second-format"];
        assert_eq!(here.ok(&[&ignored[..], &options[1..]].concat()), "", "{name}");
        here.ok(&[&["tar", &format!("{name}:/srv"), "--output", "tar"], &options[..]].concat());
        here.tool("tar", &["-tf", "tar"]);
        let out = format!("out-{name}");
        here.ok(&[&["cp", &format!("{name}:/srv/tree"), &out], &options[..]].concat());
        here.tool("diff", &["-r", "tree", &out]);
        assert!(shown(&["check", name]).contains("clean: "), "{name}");
        assert_eq!(
            fs::read_dir(here.0.path())
                .unwrap()
                .filter(|entry| {
                    let name = entry.as_ref().unwrap().file_name().into_string().unwrap();
                    name.contains(".vbd") || name.contains(".changes")
                })
                .count(),
            0,
            "{:?}",
            names(here.0.path())
        );
    }
    assert!(
        fs::read(here.path("below")).unwrap() == below && fs::read(here.path("middle")).unwrap() == middle
    );
}

#[test]
fn formats_are_told_and_some_are_only_read() {
    let here = Here::new();
    here.base("raw");
    here.ok(&["convert", "raw", "qcow2", "--to", "qcow2"]);
    for verb in [&["ls", "qcow2"][..], &["rm", "qcow2:/large"], &["compact", "qcow2"], &["df", "qcow2"]] {
        refused(&here.vbd(verb), 1, &["say --format qcow2"]);
    }
    for (format, qemu) in [("vmdk", "vmdk"), ("vdi", "vdi"), ("vhdx", "vhdx")] {
        here.tool("qemu-img", &["convert", "-f", "raw", "-O", qemu, "raw", format]);
        assert_eq!(here.ok(&["cat", &format!("{format}:/etc/hostname"), "--format", format]), "base\n");
        assert!(here.ok(&["check", format, "--format", format]).contains("clean: "));
        let place = format!("{format}:/large");
        refused(&here.vbd(&["rm", &place, "--format", format]), 1, &["read only"]);
    }
    // A writer keeps others away.
    let file = fs::File::options().read(true).write(true).open(here.path("qcow2")).unwrap();
    let lease = vbd_image::lease::Lease::acquire(
        std::os::fd::AsFd::as_fd(&file),
        &here.path("qcow2"),
        vbd_image::lease::Mode::Write,
        vbd_image::lease::Options::default(),
    );
    let lease = lease.unwrap();
    refused(&here.vbd(&["ls", "qcow2", "--format", "qcow2"]), 1, &["in use", "--force-share"]);
    refused(&here.vbd(&["rm", "qcow2:/large", "--format", "qcow2"]), 1, &["in use"]);
    assert!(here.ok(&["ls", "qcow2", "--format", "qcow2", "--force-share"]).contains("large"));
    drop(lease);
}

#[test]
fn a_clone_is_an_overlay_with_an_identity_of_its_own() {
    let here = Here::new();
    let images = images(&here);
    fs::create_dir(here.path("elsewhere")).unwrap();
    for (name, options) in &images {
        let before = fs::read(here.path(name)).unwrap();
        let list = names(here.0.path());
        let new = format!("vm-{name}");
        let clone = ["clone", name, &new, "--hostname", "vm2", "--how", "overlay"];
        if ["luks", "secret"].contains(name) {
            refused(&here.vbd(&[&clone, &options[..]].concat()), 1, &["would not be"]);
            assert_eq!(names(here.0.path()), list);
            continue;
        }
        let told = here.ok(&[&clone, &options[..]].concat());
        assert!(told.contains(": qcow2 overlay of ") && told.contains("must not change"), "{told}");
        assert!(fs::read(here.path(name)).unwrap() == before, "{name}: the base is left alone");
        let new_names: Vec<String> =
            names(here.0.path()).into_iter().filter(|name| !list.contains(name)).collect();
        assert_eq!(new_names, [new.as_str()]);
        let size = here.path(&new).metadata().unwrap().blocks() * 512;
        assert!(size < 16 << 20, "{name}: {size}");

        here.whole(&new, &["--format", "qcow2"]);
        let info = here.tool("qemu-img", &["info", "--output=json", &new]);
        let info: Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["backing-filename"], *name);
        let told_format = if options[1] == "vhd" { "vpc" } else { options[1] };
        assert_eq!(info["backing-filename-format"], told_format);

        let cat = |path: &str| here.ok(&["cat", &format!("{new}:{path}"), "--format", "qcow2"]);
        let uuid = told.split_once("UUID ").unwrap().1.trim();
        assert_ne!(uuid, UUID);
        assert_eq!(cat("/etc/hostname"), "vm2\n");
        assert_eq!(cat("/etc/machine-id"), "");
        assert!(cat("/etc/fstab").starts_with(&format!("UUID={uuid} / ext4")));
        assert_eq!(cat("/boot/grub/grub.cfg"), format!("linux /vmlinuz root=UUID={uuid} ro\n"));
        assert_eq!(cat("/large").len(), 3 << 20);
        let all = here.ok(&["find", "--format", "qcow2", &format!("{new}:/")]);
        assert!(!all.contains("ssh_host") && !all.contains("random-seed"), "{all}");
        // And its own clone, which stands on both.
        let next = format!("next-{name}");
        let told = here.ok(&["clone", &new, &next, "--format", "qcow2", "--json", "--how", "overlay"]);
        let json: Value = serde_json::from_str(&told).unwrap();
        assert_eq!(json["format"], "qcow2");
        assert_ne!(json["filesystems"][0]["uuid"], uuid);
        here.whole(&next, &["--format", "qcow2"]);
        // From another directory it is named as a whole.
        let far = format!("elsewhere/{name}");
        here.ok(&[&["clone", name, &far, "--how", "overlay"], &options[..]].concat());
        refused(&here.vbd(&["ls", &far, "--format", "qcow2"]), 1, &["--allow-dir"]);
        assert!(here.ok(&["ls", &far, "--format", "qcow2", "--allow-dir", "."]).contains("large"));
    }
}

#[test]
fn a_clone_is_what_is_possible_and_what_is_asked_for() {
    let here = Here::new();
    for (name, options) in &images(&here) {
        if *name == "small" {
            continue;
        }
        let new = format!("copy-{name}");
        let copy = ["clone", name, &new, "--how", "copy"];
        let told = here.json(&[&copy, &options[..], &["--json"]].concat());
        assert_eq!((&told["how"], &told["format"]), (&"sparse copy".into(), &options[1].into()));
        here.whole(&new, options);
        let machine = format!("{new}:/etc/machine-id");
        assert_eq!(here.ok(&[&["cat", &machine], &options[..]].concat()), "");
        // What stands on others does not find them from elsewhere.
        if *name == "top" {
            fs::create_dir(here.path("far")).unwrap();
            let far = ["clone", "top", "far/new", "--how", "copy"];
            refused(&here.vbd(&[&far, &options[..]].concat()), 1, &["another directory"]);
            let told = here.ok(&[&["clone", "top", "far/new"], &options[..]].concat());
            assert!(told.contains("overlay"), "{told}");
        }
    }
    // Encrypted disks are copied with what encrypts them; nothing else is shared here.
    let told = here.json(&["clone", "luks", "new", "--format", "luks", "--key-file", "key", "--json"]);
    assert_ne!(told["how"], "qcow2 overlay");
    refused(&here.vbd(&["clone", "raw", "new"]), 1, &["exists already"]);
    here.tool("qemu-img", &["convert", "-f", "raw", "-O", "vmdk", "raw", "vmdk"]);
    let told = here.ok(&["clone", "vmdk", "from-vmdk", "--format", "vmdk"]);
    assert!(told.contains("overlay"), "{told}");
    here.whole("from-vmdk", &["--format", "qcow2"]);
    refused(&here.vbd(&["clone", "vmdk", "other", "--format", "vmdk", "--how", "copy"]), 1, &["read only"]);
    assert!(!here.path("other").exists());
}

#[test]
fn damage_inside_of_an_image_is_found() {
    let here = Here::new();
    here.base("raw");
    // The free blocks that the superblock tells, its checksum left alone.
    let damaged = ["-f", "qcow2", "-c", "write -P 1 1036 2"];
    here.ok(&["convert", "raw", "one", "--to", "qcow2"]);
    assert!(here.json(&["check", "one", "--format", "qcow2", "--json"])["clean"] == true);
    here.tool("qemu-io", &[&damaged[..], &["one"]].concat());
    let output = here.vbd(&["check", "one", "--format", "qcow2", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&json["clean"], &json["errors"]), (&false.into(), &0.into()));
    assert_eq!(json["filesystems"][0]["clean"], false);
    let output = here.vbd(&["check", "one", "--format", "qcow2"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("one: clean\n") && text.contains("the checksum is wrong"), "{text}");
    refused(&here.vbd(&["compact", "one", "--format", "qcow2"]), 1, &["damaged", "vbd check"]);
    // Where what it stands on is missing, the image itself is still looked at.
    here.ok(&["create", "over", "--format", "qcow2", "--backing", "one", "--backing-format", "qcow2"]);
    fs::rename(here.path("one"), here.path("away")).unwrap();
    let text = here.ok(&["check", "over", "--format", "qcow2"]);
    assert!(text.contains("not looked at") && text.contains("missing"), "{text}");
}

#[test]
fn space_is_given_back_and_images_grow() {
    let here = Here::new();
    here.base("raw");
    for (name, options) in [("qcow2", ["--format", "qcow2"]), ("vhd", ["--format", "vhd"])] {
        here.ok(&["convert", "raw", name, "--to", options[1]]);
        let at = |path: &str| format!("{name}:{path}");
        fs::write(here.path("noise"), vec![0x5a; 9 << 20]).unwrap();
        here.ok(&[&["cp", "noise", &at("/noise")], &options[..]].concat());
        here.ok(&[&["rm", &at("/noise")], &options[..]].concat());
        let content = |file: &str| {
            here.ok(&[&["tar", name, "--output", file], &options[..]].concat());
            fs::read(here.path(file)).unwrap()
        };
        let before = content("before");
        if name == "qcow2" {
            let json = here.json(&[&["compact", name, "--json"], &options[..]].concat());
            assert!(json["punched"].as_u64().unwrap() >= 8 << 20, "{json}");
            let size = here.path(name).metadata().unwrap().blocks() * 512;
            assert_eq!(json["allocated"], size);
            here.whole(name, &options);
            assert!(content("after") == before);
        }
        let told = here.ok(&[&["grow", name, "200M"], &options[..]].concat());
        assert!(told.contains("filesystem: 64 MiB -> 200 MiB"), "{told}");
        let json = here.json(&[&["df", name, "--json"], &options[..]].concat());
        assert_eq!(json[0]["size"], 200 << 20);
        here.whole(name, &options);
        assert!(content("after") == before);
        refused(&here.vbd(&[&["grow", name, "100M"], &options[..]].concat()), 1, &["vbd shrink"]);
        here.ok(&[&["grow", name, "+8M", "--file-only"], &options[..]].concat());
        let json = here.json(&[&["df", name, "--json"], &options[..]].concat());
        assert_eq!(json[0]["size"], 200 << 20);
        // Once more: the rest of it.
        here.ok(&[&["grow", name, "208M"], &options[..]].concat());
        here.whole(name, &options);
    }
}

#[test]
fn bitmaps_take_note_of_what_is_changed_inside() {
    let here = Here::new();
    here.base("raw");
    here.ok(&["convert", "raw", "qcow2", "--to", "qcow2"]);
    for (name, format) in [("raw", "raw"), ("qcow2", "qcow2")] {
        let on = ["--format", format];
        here.ok(&[&["bitmap", "add", name, "since"], &on[..]].concat());
        let marked = || {
            let list = here.json(&[&["bitmap", "list", name, "--json"], &on[..]].concat());
            list[0]["marked"].as_u64().unwrap()
        };
        assert_eq!(marked(), 0);
        fs::write(here.path("text"), "new").unwrap();
        let place = format!("{name}:/etc/motd");
        here.ok(&[&["edit", &place, "--content-from", "text"], &on[..]].concat());
        let after = marked();
        assert!(after > 0 && after < 32 << 20, "{name}: {after}");
        here.whole(name, &on);
    }
}
