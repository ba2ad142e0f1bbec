//! Changes to a tree, and trees that would have them made elsewhere.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use vbd_fs::Tailor;

use super::image::{self, cat, has};
use super::setting::{MIB, Scratch, as_ordinary_user, build, options};

/// A tree as Debian's looks to tailoring.
fn debian(root: &Path) {
    for directory in [
        "etc/ssh",
        "etc/skel",
        "etc/network/interfaces.d",
        "usr/lib/systemd/system",
        "usr/bin",
        "usr/sbin",
        "home",
        "root",
        "var/lib/dbus",
        "var/lib/systemd",
    ] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    for (link, target) in [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib")] {
        symlink(target, root.join(link)).unwrap();
    }
    let units =
        ["multi-user.target", "serial-getty@.service", "systemd-networkd.service", "systemd-networkd.socket"];
    let units = units.map(|unit| format!("usr/lib/systemd/system/{unit}"));
    for name in units.iter().map(String::as_str).chain([
        "usr/bin/bash",
        "usr/bin/ssh-keygen",
        "var/lib/systemd/random-seed",
    ]) {
        fs::write(root.join(name), b"").unwrap();
    }
    for (name, text) in [
        ("etc/hostname", "old\n"),
        ("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 old\n"),
        ("etc/fstab", "# empty\n"),
        ("etc/passwd", "root:x:0:0:root:/root:/bin/bash\nold:x:1000:1000::/home/old:/bin/sh"),
        ("etc/shadow", "root:*:19000:0:99999:7:::\nold:*:19000:0:99999:7:::\n"),
        ("etc/group", "root:x:0:\nsudo:x:27:\nold:x:1000:\n"),
        ("etc/gshadow", "root:*::\nsudo:*::\nold:!::\n"),
        ("etc/skel/.profile", "# mine\n"),
        ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
        ("var/lib/dbus/machine-id", "0123456789abcdef0123456789abcdef\n"),
        ("etc/ssh/ssh_host_rsa_key", "secret"),
        ("etc/ssh/ssh_host_rsa_key.pub", "public"),
        ("etc/ssh/sshd_config", "# kept\n"),
        ("etc/network/interfaces", "source /etc/network/interfaces.d/*\n"),
        ("etc/motd", "hello"),
    ] {
        fs::write(root.join(name), text).unwrap();
    }
}

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ ada@host";

const ALL: &str = r#"
hostname = "vm1.example.org"
fstab = ["/dev/vda:/", "/dev/vdb:swap"]
serial-console = "ttyS0"
network = "dhcp-networkd"
reset-identity = true
remove = ["/etc/network", "/etc/absent"]

[[user]]
name = "ada"
ssh-keys = ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ ada@host"]
groups = ["sudo"]

[[user]]
name = "root"
password-hash = "$6$salt$hash"
ssh-keys = ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ ada@host"]

[[write]]
path = "/etc/new/dir/file"
text = "written"
mode = 0o600

[[append]]
path = "/etc/motd"
text = "world"
"#;

fn all_of_it() {
    let scratch = Scratch::new();
    let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
    debian(&tree);
    let host = scratch.path("host");
    fs::create_dir(&host).unwrap();
    fs::write(host.join("one"), b"1").unwrap();
    symlink("one", host.join("two")).unwrap();
    let mut options = options(32 * MIB, &tree);
    options.tailor = Tailor::from_toml(ALL).unwrap();
    options.tailor.copy_in = vec![format!("{}:/srv/host", host.display()).parse().unwrap()];
    build(&file, &options).unwrap();
    image::check(&file);

    assert_eq!(cat(&file, "/etc/hostname"), "vm1.example.org\n");
    assert_eq!(cat(&file, "/etc/hosts"), "127.0.0.1 localhost\n127.0.1.1\tvm1.example.org vm1\n");
    assert!(
        cat(&file, "/etc/fstab")
            .ends_with("/dev/vda\t/\text4\terrors=remount-ro\t0\t1\n/dev/vdb\tnone\tswap\tsw\t0\t0\n")
    );
    let passwd = cat(&file, "/etc/passwd");
    assert!(passwd.ends_with("/home/old:/bin/sh\nada:x:1001:1001::/home/ada:/bin/bash\n"), "{passwd}");
    let shadow = cat(&file, "/etc/shadow");
    assert!(shadow.starts_with("root:$6$salt$hash:19000:") && shadow.contains("\nada:*:"), "{shadow}");
    assert_eq!(cat(&file, "/etc/group"), "root:x:0:\nsudo:x:27:ada\nold:x:1000:\nada:x:1001:\n");
    assert_eq!(cat(&file, "/etc/gshadow"), "root:*::\nsudo:*::ada\nold:!::\nada:!::\n");
    for (path, mode, owner) in [
        ("/home/ada", 0o700, 1001),
        ("/home/ada/.profile", 0o644, 1001),
        ("/home/ada/.ssh", 0o700, 1001),
        ("/home/ada/.ssh/authorized_keys", 0o600, 1001),
        ("/root/.ssh/authorized_keys", 0o600, 0),
        ("/etc/hostname", 0o644, 0),
        ("/etc/new", 0o755, 0),
        ("/etc/new/dir/file", 0o600, 0),
        ("/srv/host/one", 0o644, 0),
    ] {
        let entry = image::entry(&file, path);
        assert_eq!((entry.mode, entry.uid, entry.gid), (mode, owner, owner), "{path}");
    }
    assert_eq!(cat(&file, "/home/ada/.ssh/authorized_keys"), format!("{KEY}\n"));
    let target = |path: &str| String::from_utf8(image::entry(&file, path).content).unwrap();
    let wants = "/etc/systemd/system/getty.target.wants/serial-getty@ttyS0.service";
    assert_eq!(target(wants), "/usr/lib/systemd/system/serial-getty@.service");
    let wants = "/etc/systemd/system/multi-user.target.wants";
    assert_eq!(
        target(&format!("{wants}/systemd-networkd.service")),
        "/usr/lib/systemd/system/systemd-networkd.service"
    );
    assert_eq!(
        target(&format!("{wants}/ssh-host-keys.service")),
        "/etc/systemd/system/ssh-host-keys.service"
    );
    assert!(cat(&file, "/etc/systemd/network/80-dhcp.network").contains("DHCP=yes"));
    assert_eq!(cat(&file, "/etc/machine-id"), "");
    for gone in [
        "/var/lib/dbus/machine-id",
        "/etc/ssh/ssh_host_rsa_key",
        "/etc/ssh/ssh_host_rsa_key.pub",
        "/var/lib/systemd/random-seed",
        "/etc/network",
    ] {
        assert!(!has(&file, gone), "{gone}");
    }
    assert!(has(&file, "/etc/ssh/sshd_config"));
    assert_eq!(
        (cat(&file, "/etc/new/dir/file"), cat(&file, "/etc/motd")),
        ("written\n".to_owned(), "hello\nworld\n".to_owned())
    );
    assert_eq!((cat(&file, "/srv/host/one"), target("/srv/host/two")), ("1".to_owned(), "one".to_owned()));
    // The source is as it was.
    assert_eq!(fs::read_to_string(tree.join("etc/hostname")).unwrap(), "old\n");
    assert!(tree.join("etc/ssh/ssh_host_rsa_key").exists());
}

#[test]
fn a_tree_is_made_one_machines() {
    all_of_it();
}

#[test]
fn an_ordinary_user_makes_a_tree_one_machines() {
    as_ordinary_user("tailoring::an_ordinary_user_makes_a_tree_one_machines", all_of_it);
}

/// Every file of the host's that a link of the tree leads to stays as it is, and no new one appears.
fn led_out() {
    let scratch = Scratch::new();
    let (tree, file, outside) = (scratch.path("tree"), scratch.path("disk"), scratch.path("outside"));
    debian(&tree);
    fs::create_dir_all(outside.join("ssh")).unwrap();
    fs::create_dir_all(outside.join("home")).unwrap();
    let precious = ["hostname", "hosts", "passwd", "machine-id", "motd", "ssh/ssh_host_rsa_key"];
    for name in precious {
        fs::write(outside.join(name), b"precious").unwrap();
    }
    let up = format!("{}{}", "../".repeat(30), outside.strip_prefix("/").unwrap().display());
    let replace = |name: &str, target: &str| {
        let path = tree.join(name);
        if path.is_dir() {
            fs::remove_dir_all(&path).unwrap()
        } else {
            drop(fs::remove_file(&path))
        }
        symlink(target, path).unwrap();
    };
    replace("etc/hostname", &format!("{}/hostname", outside.display()));
    replace("etc/hosts", &format!("{up}/hosts"));
    replace("etc/machine-id", "../../../../../../../../proc/self/cwd/machine-id");
    replace("etc/motd", &format!("{up}/motd"));
    replace("etc/fstab", "/etc/real-fstab");
    fs::write(tree.join("etc/real-fstab"), b"").unwrap();
    replace("etc/group", "../loop");
    replace("loop", "etc/group");
    replace("etc/ssh", &format!("{}/ssh", outside.display()));
    let mut options = options(32 * MIB, &tree);
    let tailor = |text: &str| Tailor::from_toml(text).unwrap();
    options.tailor = tailor("hostname = 'vm1'\nreset-identity = true\nfstab = ['/dev/vda:/']\n");
    options.tailor.append = vec!["/etc/motd=more".parse().unwrap()];
    build(&file, &options).unwrap();
    for name in precious {
        assert_eq!(fs::read(outside.join(name)).unwrap(), b"precious", "{name}");
    }
    // Links to nothing became files, one that leads to a file in the tree was followed there.
    assert_eq!(cat(&file, "/etc/hostname"), "vm1\n");
    assert_eq!(cat(&file, "/etc/motd"), "more\n");
    assert_eq!(
        (image::entry(&file, "/etc/fstab").kind, cat(&file, "/etc/real-fstab").lines().count()),
        ('l', 2)
    );

    // Directories that lead out are nowhere in the tree, and a loop is no file.
    fs::remove_file(&file).unwrap();
    replace("home", &format!("{}/home", outside.display()));
    options.tailor = tailor("[[user]]\nname = 'ada'\n");
    let error = build(&file, &options).unwrap_err().to_string();
    assert!(error.contains("/etc/group") && error.contains("symbolic links"), "{error}");
    fs::remove_file(tree.join("etc/group")).unwrap();
    let error = build(&file, &options).unwrap_err().to_string();
    assert!(error.contains("/home"), "{error}");
    options.tailor = Tailor::default();
    options.tailor.write = vec!["/etc/ssh/evil=x".parse().unwrap()];
    let error = build(&file, &options).unwrap_err().to_string();
    assert!(error.contains("/etc/ssh"), "{error}");
    assert_eq!(
        super::setting::names(&outside),
        ["home", "hostname", "hosts", "machine-id", "motd", "passwd", "ssh"]
    );
    assert_eq!(super::setting::names(&outside.join("ssh")), ["ssh_host_rsa_key"]);
    assert_eq!(super::setting::names(&outside.join("home")), Vec::<String>::new());
    assert_eq!(scratch.names(), ["outside", "tree"]);
}

#[test]
fn no_link_leads_out_of_a_tree() {
    led_out();
}

#[test]
fn no_link_leads_an_ordinary_user_out_of_a_tree() {
    as_ordinary_user("tailoring::no_link_leads_an_ordinary_user_out_of_a_tree", led_out);
}

#[test]
fn changes_that_do_not_fit_the_tree_are_named() {
    let scratch = Scratch::new();
    let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::write(tree.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
    for (text, expected) in [
        ("serial-console = 'ttyS0'", "serial-console: the tree has neither systemd nor /etc/inittab"),
        ("network = 'dhcp-networkd'", "the tree has no systemd-networkd"),
        ("network = 'dhcp-interfaces'", "the tree has no ifupdown"),
        ("[[user]]\nname = 'ada'\ngroups = ['sudo']", "user ada: the tree has no group sudo"),
        ("[[user]]\nname = 'ada'\nuid = 0", "the number 0 is another user's"),
        ("[[user]]\nname = 'root'\nuid = 7", "exists with another number"),
        ("copy-in = ['/nonexistent:/x']", "cannot read /nonexistent: No such file"),
        ("[[write]]\npath = '/etc'\ntext = 'x'", "/etc: is no file in the tree"),
        ("[[append]]\npath = '/etc/passwd/x'\ntext = 'x'", "/etc/passwd is no directory in the tree"),
    ] {
        let mut options = options(16 * MIB, &tree);
        options.tailor = Tailor::from_toml(text).unwrap();
        let error = build(&file, &options).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        assert_eq!(scratch.names(), ["tree"]);
    }
}

#[test]
fn values_that_no_tree_takes_are_refused_at_once() {
    for (text, expected) in [
        ("hostnam = 'x'", "line 1"),
        ("hostname = 'a\\nb'", "hostname"),
        ("fstab = ['/dev/vda']", "no mount point"),
        ("network = 'magic'", "dhcp-networkd"),
        ("[[user]]\nname = 'Ada'", "no user's"),
        ("[[user]]\nname = 'a:b'", "no user's"),
        ("[[user]]\nname = 'ada'\npassword-hash = 'secret'", "openssl passwd"),
        ("[[user]]\nname = 'ada'\npassword-hash = \"$6$x:0:0\"", "openssl passwd"),
        ("[[user]]\nname = 'ada'\nssh-keys = ['-----BEGIN OPENSSH PRIVATE KEY-----']", "private key"),
        ("[[user]]\nname = 'ada'\nssh-keys = ['hello']", "no public SSH key"),
        ("[[user]]\nname = 'ada'\nshell = 'bash'", "absolute path"),
        ("remove = ['/']", "by its path from /"),
        ("[[write]]\npath = 'etc/x'\ntext = ''", "by its path from /"),
    ] {
        let error = Tailor::from_toml(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

#[test]
fn ifupdown_gets_an_interface_of_its_own() {
    let scratch = Scratch::new();
    let (tree, file) = (scratch.path("tree"), scratch.path("disk"));
    debian(&tree);
    let mut options = options(32 * MIB, &tree);
    options.tailor.network = Some("dhcp-interfaces:ens3".parse().unwrap());
    build(&file, &options).unwrap();
    assert_eq!(cat(&file, "/etc/network/interfaces.d/ens3"), "allow-hotplug ens3\niface ens3 inet dhcp\n");
    assert_eq!(cat(&file, "/etc/network/interfaces"), "source /etc/network/interfaces.d/*\n");
}
