use std::path::Path;

use proptest::prelude::*;
use vbd_fs::{Filesystem, Source, Tailor};

use super::told;
use crate::config::{Access, CacheMode, Config, NbdAddress, NbdConfig, Ublk, toml};

fn read(text: &str) -> Config {
    toml::parse(text, Path::new("/etc/vbd/vm1.toml")).unwrap_or_else(|e| panic!("{e}"))
}

fn refused(text: &str) -> String {
    told(&toml::parse(text, Path::new("/etc/vbd/vm1.toml")).expect_err(text))
}

#[test]
fn one_disk_needs_a_path_alone() {
    let config = read("runtime-dir = '/r'\n[[disk]]\npath = 'images/vm1.img'\n");
    let [disk] = &config.disks[..] else { panic!("one disk") };
    assert_eq!(disk.path, Path::new("/etc/vbd/images/vm1.img"));
    assert_eq!((disk.name.as_str(), disk.serial.as_str()), ("vm1.img", "vm1.img"));
    assert_eq!((disk.access, disk.cache, disk.queues), (Access::ReadWrite, CacheMode::None, None));
    assert_eq!(disk.vhost_user.as_deref(), Some(Path::new("/r/vm1.img.sock")));
    assert_eq!((disk.nbd.as_deref(), disk.discard, disk.cdrom), (None, true, false));
    assert_eq!(disk.position.unwrap().line, 2);
    assert!(config.warnings.is_empty());
}

#[test]
fn keys_of_encrypted_disks() {
    let disk = |more: &str| format!("runtime-dir = '/r'\n[[disk]]\npath = 'a'\nformat = 'qcow2'\n{more}\n");
    let config = read(&disk("key-file = 'key'"));
    assert_eq!(config.disks[0].key_file.as_deref(), Some(Path::new("/etc/vbd/key")));
    let config = read(&disk("key-fd = 3"));
    assert_eq!((config.disks[0].key_fd, &config.disks[0].key_file), (Some(3), &None));
    assert!(refused(&disk("key-fd = -1")).contains("-1 is no descriptor"));
    assert!(refused(&disk("key-fd = 3\nkey-file = 'key'")).contains("leave out one of the two"));
}

#[test]
fn everything_at_once() {
    let config = read(
        r#"
runtime-dir = "run"
reactors = 2

[limits]
max-devices = 3
max-queues = 8

[nbd]
listen = ["unix:nbd.sock", "[::1]:10809"]
max-clients = 5
memory = "64M"
tls = { certificate = "c.pem", key = "/k.pem", client-ca = "ca.pem", required = false }

[[disk]]
name = "root"
path = "/srv/root"
format = "raw"
access = "w!"
vdev = "xvda"
cache = "writethrough"
queues = 8
vhost-user = "/run/root.sock"
nbd = "export"
serial = "ABC 1"
discard = false
direct-io-safe = true

[[disk]]
path = "/srv/cd.iso"
cdrom = true
vhost-user = false

[[disk]]
path = "/srv/log"
nbd = false
ublk = 7
"#,
    );
    assert_eq!(config.runtime_dir, Path::new("/etc/vbd/run"));
    assert_eq!(
        (config.reactors.unwrap().get(), config.limits.max_devices, config.limits.max_queues),
        (2, 3, 8)
    );
    let nbd = config.nbd.unwrap();
    let unix = NbdAddress::Unix("/etc/vbd/nbd.sock".into());
    assert_eq!(nbd.listen, [unix, NbdAddress::Tcp { host: "::1".into(), port: 10809 }]);
    assert_eq!((nbd.max_clients, nbd.memory), (5, 64 << 20));
    let tls = nbd.tls.unwrap();
    assert_eq!(
        (tls.certificate.as_path(), tls.key.as_path()),
        (Path::new("/etc/vbd/c.pem"), Path::new("/k.pem"))
    );
    assert_eq!((tls.client_ca.as_deref(), tls.required), (Some(Path::new("/etc/vbd/ca.pem")), false));
    let [root, cd, log] = &config.disks[..] else { panic!("three disks") };
    assert_eq!(
        (root.name.as_str(), root.access, root.cache),
        ("root", Access::ReadWriteForce, CacheMode::Writethrough)
    );
    assert_eq!((root.vdev.unwrap().number(), root.queues, root.serial.as_str()), (51712, Some(8), "ABC 1"));
    assert_eq!(root.vhost_user.as_deref(), Some(Path::new("/run/root.sock")));
    assert_eq!((root.nbd.as_deref(), root.discard, root.direct_io_safe), (Some("export"), false, true));
    assert_eq!(
        (cd.access, cd.vhost_user.as_deref(), cd.nbd.as_deref()),
        (Access::ReadOnly, None, Some("cd.iso"))
    );
    assert_eq!((log.nbd.as_deref(), log.ublk, root.ublk), (None, Some(Ublk::Number(7)), None));
}

#[test]
fn a_missing_image_can_be_made() {
    assert!(read("[[disk]]\npath = 'a'").disks[0].create.is_none());
    let config = read("[[disk]]\npath = 'a'\nsize = 2147484672");
    let empty = config.disks[0].create.as_ref().unwrap();
    assert_eq!(
        (empty.size.bytes(), empty.build.is_none(), empty.tailor == Tailor::default()),
        (2147484672, true, true)
    );
    let config = read(
        r#"
[[disk]]
path = "vm1.img"
size = "2G"
[disk.build]
from = "root.tar.zst"
filesystem = "ext3"
[disk.tailor]
hostname = "vm1"
fstab = ["/dev/vda:/"]
copy-in = ["motd:/etc/motd", "/abs:/etc/abs"]
[[disk.tailor.user]]
name = "me"
ssh-key-files = ["me.pub"]

[[disk]]
path = "vm2.img"
size = "1G"
build.from = "debian:bookworm"
"#,
    );
    let made = config.disks[0].create.as_ref().unwrap();
    let build = made.build.as_ref().unwrap();
    assert_eq!(build.from, Source::Path("/etc/vbd/root.tar.zst".into()));
    assert_eq!((build.filesystem, made.size.bytes()), (Filesystem::Ext3, 2 << 30));
    assert_eq!(made.tailor.hostname.as_deref(), Some("vm1"));
    let copied: Vec<_> = made.tailor.copy_in.iter().map(ToString::to_string).collect();
    assert_eq!(copied, ["/etc/vbd/motd:/etc/motd", "/abs:/etc/abs"]);
    assert_eq!(made.tailor.user[0].ssh_key_files, [Path::new("/etc/vbd/me.pub")]);
    let suite = config.disks[1].create.as_ref().unwrap().build.as_ref().unwrap();
    assert_eq!(suite.from.to_string(), "debian:bookworm");
}

#[test]
fn the_defaults_of_the_nbd_server() {
    let nbd = read("nbd.listen = 'localhost:1'\n[[disk]]\npath = '/a'").nbd.unwrap();
    assert_eq!((nbd.max_clients, nbd.memory, nbd.tls), (NbdConfig::MAX_CLIENTS, NbdConfig::MEMORY, None));
    let config = read("nbd.listen = '0.0.0.0:10809'");
    let warning = config.warnings[0].to_string();
    assert_eq!(
        warning,
        "1:14: whoever reaches 0.0.0.0:10809 can read and write the disks: [nbd.tls] would keep them out"
    );
}

#[test]
fn mistakes_have_a_line_a_column_and_a_remedy() {
    for (text, error) in [
        (
            "disk = 1",
            "1:8 invalid type: integer `1`, expected a table [[disk]], in two brackets, for each disk",
        ),
        (
            "[disk]\npath = '/a'",
            "1:1 invalid type: map, expected a table [[disk]], in two brackets, for each disk",
        ),
        ("disk = [1]", "1:9 invalid type: integer `1`, expected a table [[disk]]"),
        ("limits = 1", "1:10 invalid type: integer `1`, expected the table [limits]"),
        ("[[disk]\npath = '/a'", "1:8 unclosed array table, expected `]`"),
        ("[[disk]]\npth = '/a'", "2:1 unknown key `pth`"),
        ("[[disk]]\nname = 'a'", "1:1 missing key `path`"),
        ("[[disk]]\npath = ''", "2:8 an empty path names nothing"),
        ("[[disk]]\npath = '/'", "2:8 / names no file"),
        ("[[disk]]\npath = \"/a\\u0000\"", "2:8 a path has no NUL character in it"),
        ("[[disk]]\npath = '/a'\nname = 'b/c'", "3:8 a disk's name has no `/` in it"),
        ("[[disk]]\npath = '/a'\nformat = 'qed'", "3:10 format `qed` is not supported: `qemu-img convert"),
        (
            "[[disk]]\npath = '/a'\nformat = 'x'",
            "3:10 unknown format `x`: it is `raw`, `qcow2`, `vhd`, `vmdk`, `vdi`, `vhdx` or `luks`",
        ),
        ("[[disk]]\npath = '/a'\naccess = 'x'", "3:10 unknown access `x`: it is `r`, `w`, or `w!`"),
        (
            "[[disk]]\npath = '/a'\ncache = 'x'",
            "3:9 unknown cache mode `x`: it is `none`, `writeback` or `writethrough`",
        ),
        ("[[disk]]\npath = '/a'\nvdev = 'x'", "3:8 `x` names no virtual device"),
        ("[[disk]]\npath = '/a'\nqueues = 0", "3:10 0 queues cannot be had: it is a number from 1 to 128"),
        ("[[disk]]\npath = '/a'\nqueues = -1", "3:10 invalid value: integer `-1`, expected u16"),
        (
            "limits.max-queues = 2\n[[disk]]\npath = '/a'\nqueues = 3",
            "4:10 3 queues cannot be had: it is a number from 1 to 2",
        ),
        (
            "[[disk]]\npath = '/a'\nserial = 'abcdefghijklmnopqrstu'",
            "3:10 a serial number of 21 bytes is too long: 20 are allowed",
        ),
        ("[[disk]]\npath = '/a'\nserial = 'ä'", "3:10 a serial number has printable ASCII characters only"),
        (
            "[[disk]]\npath = '/a'\nnbd = true",
            "3:7 no NBD server listens: add [nbd] with `listen = \"unix:nbd.sock\"`",
        ),
        (
            "[[disk]]\npath = '/a'\nnbd = 1",
            "3:7 invalid type: integer `1`, expected true, false or a name in quotes",
        ),
        (
            "[[disk]]\npath = '/a'\nvhost-user = false",
            "1:1 nobody could use `a`: leave it `vhost-user`, `nbd` or `ublk`",
        ),
        ("reactors = 0", "1:12 invalid value: integer `0`, expected a nonzero usize"),
        ("nbd = {}", "1:7 missing key `listen`"),
        ("nbd.listen = []", "1:14 the NBD server listens nowhere: name an address, or leave out [nbd]"),
        ("nbd.listen = 'unix:'", "1:14 `unix:` names no socket"),
        ("nbd.listen = 'a'", "1:14 `a` has no port"),
        ("nbd.listen = ['a:1', 'b:0']", "1:22 `0` is no port: it is a number from 1 to 65535"),
        ("nbd.listen = ':1'", "1:14 `:1` has no host: write `0.0.0.0:1` to listen on every address"),
        ("nbd.listen = '::1:1'", "1:14 `::1:1`: an IPv6 address stands in brackets"),
        ("nbd = { listen = 'a:1', memory = 'x' }", "1:34 \"x\" is no size"),
        (
            "[[disk]]\npath = '/a'\n[[disk]]\npath = '/b/a'",
            "3:1 another disk is called `a`: give one of them another `name` (the first is in line 1)",
        ),
        (
            "limits.max-devices = 1\n[[disk]]\npath = '/a'\n[[disk]]\npath = '/b'",
            "4:1 2 disks are more than `max-devices` allows (1): raise it in [limits]",
        ),
        (
            "[[disk]]\npath='/a'\nname='x'\n[[disk]]\npath='/a'\naccess='r'",
            "4:1 /a is the disk `x` (line 1) too",
        ),
        ("[[disk]]\npath = '/a'\nsize = '-1G'", "3:8 \"-1G\" is negative"),
        ("[[disk]]\npath = '/a'\nsize = 0", "3:8 a size of 0 makes no disk"),
        (
            "[[disk]]\npath = '/a'\nbuild = {from = '/'}",
            "3:9 an image is built in a file of a size: add `size = \"2G\"` to the disk",
        ),
        ("[[disk]]\npath = '/a'\nsize = '1G'\n[disk.build]\nform = '/'", "5:1 unknown key `form`"),
        ("[[disk]]\npath = '/a'\nsize = '1G'\n[disk.build]\nlabel = 'x'", "4:1 missing key `from`"),
        (
            "[[disk]]\npath = '/a'\nsize = '1G'\n[disk.build]\nfrom = 'debian:'",
            "5:8 debian:: \"\" is no suite's name",
        ),
        (
            "[[disk]]\npath = '/a'\nsize = '1G'\nbuild.from = '-'",
            "4:1 `from = \"-\"`: a configuration has no standard input, name a file",
        ),
        (
            "[[disk]]\npath = '/a'\ntailor.hostname = 'a'",
            "3:1 `tailor` changes a filesystem that is built here: add `build`",
        ),
        ("[[disk]]\npath = '/a'\nsize = '1G'\nbuild.from = '/'\n[disk.tailor]\nhostname = '-'", "5:1 "),
        (
            "[[disk]]\npath = '/a'\nsize = '1G'\nbuild.from = '/'\n[disk.tailor]\nfstab = ['x']",
            "6:9 \"x\": no mount point",
        ),
        (
            "[[disk]]\npath='/a'\nvhost-user='/s'\n[[disk]]\npath='/b'\nvhost-user='/s'",
            "4:1 another disk has the socket /s: set another with `vhost-user = \"...\"` (the first is in line 1)",
        ),
        (
            "nbd.listen='a:1'\n[[disk]]\npath='/a'\nnbd='x'\n[[disk]]\npath='/b'\nnbd='x'",
            "5:1 another disk is exported as `x`: name one of the exports with `nbd = \"...\"`",
        ),
        (
            "nbd.listen='unix:/s'\n[[disk]]\npath='/a'\nvhost-user='/s'",
            "2:1 the NBD server has the socket /s already: name another",
        ),
    ] {
        let told = refused(text);
        assert!(told.starts_with(error), "{text}\n  is:        {told}\n  should be: {error}");
    }
    let many = format!("nbd.listen = [{}]", "'a:1',".repeat(65));
    assert_eq!(refused(&many), "1:14 the NBD server listens on at most 64 addresses");
    let long = format!("runtime-dir = '/{}'\n[[disk]]\npath = '/a'", "x".repeat(120));
    let told = refused(&long);
    assert!(told.starts_with("2:1 the socket path /xxx") && told.contains("has 128 bytes"), "{told}");
}

/// What a build would refuse, the configuration refuses first, and tells where it is written.
#[test]
fn values_of_a_build_are_checked_where_they_are_written() {
    let disk = "[[disk]]\npath = '/a'\nsize = '1G'\n[disk.build]\nfrom = 'debian:bookworm'\n";
    for (line, error) in [
        ("label = 'a-label-of-18-byte'", "6:9 label \"a-label-of-18-byte\": at most 16 bytes"),
        ("label = 'ääääääääü'", "6:9 label \"ääääääääü\": at most 16 bytes"),
        ("label = \"a\\u0000\"", "6:9 label \"a\\0\": at most 16 bytes"),
        ("uuid = '9c9d'", "6:8 \"9c9d\" is no UUID (8-4-4-4-12 hexadecimal digits)"),
        ("uuid = '01234567-89ab-cdef-0123-456789abcdeg'", "6:8 "),
        ("live = true\nuuid = ''", "7:8 \"\" is no UUID"),
        ("reserved-percent = 51", "6:20 at most 50 percent of the blocks can be reserved"),
        ("inodes = 15", "6:10 the number of inodes is from 16 to 4294967295"),
        ("inodes = 4294967296", "6:10 the number of inodes is from 16 to 4294967295"),
        ("mirror = ''", "6:10 the mirror is empty, or starts with a dash"),
        ("mirror = '--x'", "6:10 the mirror is empty, or starts with a dash"),
        ("packages = ['a', 'b c']", "6:12 \"b c\": name components and packages one by one"),
        ("components = ['main,contrib']", "6:14 \"main,contrib\": name components and packages one by one"),
        ("variant = 'x'", "6:11 "),
        ("filesystem = 'ext5'", "6:14 "),
    ] {
        let told = refused(&format!("{disk}{line}\n"));
        assert!(told.starts_with(error), "{line}\n  is:        {told}\n  should be: {error}");
    }
    let inline = "[[disk]]\npath = '/a'\nsize = '1G'\nbuild = { from = '/', label = 'a-label-of-18-byte' }";
    assert_eq!(refused(inline), "4:31 label \"a-label-of-18-byte\": at most 16 bytes");
    for key in ["mirror = 'http://x'", "variant = 'apt'", "packages = ['a']", "components = ['main']"] {
        let text = format!("[[disk]]\npath = '/a'\nsize = '1G'\n[disk.build]\nfrom = '/srv'\n{key}");
        let error = "4:1 mirror, components, packages and variant are for debian:SUITE and ubuntu:SUITE, not for /srv";
        assert_eq!(refused(&text), error);
    }
    let good = "label = 'sixteen bytes ok'\nuuid = '01234567-89AB-cdef-0123-456789abcdef'\nreserved-percent = 50\n\
                inodes = 16\nmirror = 'http://deb.example'\ncomponents = ['main', 'contrib']\npackages = ['vim']\n";
    let config = read(&format!("{disk}{good}"));
    let spec = config.disks[0].create.as_ref().and_then(|image| image.build.as_ref()).expect("a build");
    assert_eq!((spec.label.as_deref(), spec.inodes), (Some("sixteen bytes ok"), Some(16)));
    assert_eq!(
        (&spec.components[..], &spec.packages[..]),
        (&["main", "contrib"].map(String::from)[..], &["vim".to_owned()][..])
    );
}

proptest! {
    #[test]
    fn any_text_is_answered(text in "(?s).{0,200}") {
        let _ = toml::parse(&text, Path::new("vm1.toml"));
    }

    #[test]
    fn any_value_is_answered(
        key in prop_oneof![
            Just("path"), Just("name"), Just("format"), Just("access"), Just("vdev"), Just("queues"), Just("nbd"),
            Just("vhost-user"), Just("serial"), Just("cache"), Just("size"), Just("build"), Just("tailor"),
        ],
        value in prop_oneof![
            "'[^'\n]{0,30}'", "-?[0-9]{1,22}", Just("true".to_owned()), Just("[]".to_owned()), Just("{}".to_owned()),
        ],
    ) {
        let _ = toml::parse(&format!("[[disk]]\npath = '/a'\n{key} = {value}\n"), Path::new("vm1.toml"));
    }
}
