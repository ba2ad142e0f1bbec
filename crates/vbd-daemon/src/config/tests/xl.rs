use std::path::Path;

use proptest::prelude::*;

use super::told;
use crate::config::{Access, Config, NbdAddress, xl};

fn read(text: &str) -> Config {
    xl::parse(text, Path::new("/etc/xen/vm1.cfg")).unwrap_or_else(|e| panic!("{e}"))
}

fn refused(text: &str) -> String {
    told(&xl::parse(text, Path::new("/etc/xen/vm1.cfg")).expect_err(text))
}

fn paths(config: &Config) -> Vec<&str> {
    config.disks.iter().map(|disk| disk.path.to_str().unwrap()).collect()
}

#[test]
fn a_domain_file_as_it_is() {
    let config = read(
        r#"# -*- mode: python; -*-
kernel  = "/boot/vmlinuz-2.6-xenU"   # the kernel
memory  = 128
name    = "vm1"
uuid = "06ed00fe-1162-4fc4-b5d8-11993ee4a8b9"
vif     = [ 'mac=00:16:3e:00:00:11, bridge=xenbr0' ]
cpus    = [ [0, 1],
            2, ]   # trailing comma
disk    = [ 'file:/full/path/to/vm1disk,sda1,w',  # the root
            # a volume
            "phy:/dev/vg/swap,sda2,w",
            'format=raw,vdev=hdc,access=ro,devtype=cdrom,target=/iso/a,b.iso',
            ',hdd:cdrom,r',
          ];
root    = "/dev/sda1 ro"; extra = 'console=\'hvc0\''
vnc=1
on_crash = 'restart'"#,
    );
    let domain = config.domain.as_ref().unwrap();
    assert_eq!(domain.name, "vm1");
    assert_eq!(domain.uuid.as_deref(), Some("06ed00fe-1162-4fc4-b5d8-11993ee4a8b9"));
    assert_eq!(paths(&config), ["/full/path/to/vm1disk", "/dev/vg/swap", "/iso/a,b.iso"]);
    let [root, swap, iso] = &config.disks[..] else { panic!("three disks") };
    assert_eq!((root.name.as_str(), root.access), ("vm1-sda1", Access::ReadWrite));
    assert_eq!(root.vhost_user, Some(config.runtime_dir.join("vm1-sda1.sock")));
    assert_eq!(root.nbd.as_deref(), Some("vm1-sda1"));
    assert_eq!(root.vdev.unwrap().number(), 2049);
    assert_eq!(root.position.unwrap().to_string(), "9:14");
    assert_eq!((swap.name.as_str(), swap.cdrom), ("vm1-sda2", false));
    assert_eq!((iso.access, iso.cdrom), (Access::ReadOnly, true));
    let nbd = config.nbd.as_ref().unwrap();
    assert_eq!(nbd.listen, [NbdAddress::Unix(config.runtime_dir.join("vm1-nbd.sock"))]);
    let [warning] = &config.warnings[..] else { panic!("one warning: {:?}", config.warnings) };
    assert_eq!(warning.to_string(), "13:14: hdd is an empty drive: nothing is served for it");
}

#[test]
fn lines_that_name_the_script_of_vbd() {
    let config = read(
        "disk = [ 'script=block-vbd,vdev=xvda,target=/srv/a',
                  'script=/etc/xen/scripts/block-vbd,vdev=xvdb,target=w!:/srv/b' ]",
    );
    assert_eq!(paths(&config), ["/srv/a", "/srv/b"]);
    let accesses: Vec<_> = config.disks.iter().map(|disk| disk.access).collect();
    assert_eq!(accesses, [Access::ReadWrite, Access::ReadWriteForce]);
    let error = refused("disk = [ 'script=block-vbd,vdev=xvda,target=vg/root' ]");
    assert!(error.contains("no absolute path"), "{error}");
}

#[test]
fn what_plain_python_had() {
    let config = read(
        "\u{feff}Name = 'x'\r\nname = 'vm2'\r\nxen_platform_pci = True\r\n\
         doc = '''several\nlines ' of \"it\" '''\n\
         disk = [ 'phy:vg/a,xvda,w', \\\n 'tap:aio:/b\\x41\\101\\\\,xvdb,r' ]\n\n;;\n",
    );
    assert_eq!(config.domain.as_ref().unwrap().name, "vm2");
    assert_eq!(paths(&config), ["/dev/vg/a", "/bAA\\"]);
}

#[test]
fn lists_grow_and_are_replaced() {
    let config = read("disk = ['/a,,xvda']\ndisk += ['/b,,xvdb']\n");
    assert_eq!(paths(&config), ["/a", "/b"]);
    let config = read("disk = ['/a,,xvda']\n  disk = ['/b,,xvdb']\n");
    assert_eq!(paths(&config), ["/b"]);
    let warning = config.warnings[0].to_string();
    assert_eq!(
        warning,
        "2:3: `disk` is set again: the disks above are not used (`disk += [...]` would add to them)"
    );
}

#[test]
fn a_file_without_a_name_gives_its_own() {
    assert_eq!(read("disk = ['/a,,xvda']").disks[0].name, "vm1-xvda");
    let empty = read("");
    assert_eq!((empty.disks.len(), empty.nbd.is_none()), (0, true));
    assert_eq!(empty.warnings[0].to_string(), "1:1: no `disk = [...]` in this file: nothing is served");
}

#[test]
fn what_has_no_effect_is_said() {
    let warnings = |disk: &str| -> Vec<String> {
        read(&format!("disk = ['{disk}']")).warnings.iter().map(ToString::to_string).collect()
    };
    assert!(warnings("/a,raw,xvda,w,discard,direct-io-safe,backendtype=phy").is_empty());
    assert_eq!(
        warnings("phy:vg/a,xvda,w"),
        ["1:14: a relative target is below /dev, as for xl: `vg/a` is /dev/vg/a"]
    );
    assert_eq!(warnings("/a,,hdc,w,cdrom"), ["1:18: a CD drive is read-only, whatever is asked for"]);
    assert_eq!(
        warnings("/a,,xvda,backend=stor"),
        ["1:27: backend `stor` is passed over: vbd serves this disk here"]
    );
    assert_eq!(warnings("/a,,xvda,untrusted"), ["1:10: `untrusted` has no effect here"]);
}

#[test]
fn mistakes_have_a_line_a_column_and_a_remedy() {
    for (text, error) in [
        ("name = 'a'\n)", "2:1 `)` begins no setting: write `name = value`"),
        ("name 'a'", "1:6 `name` is followed by `'`, not by `=`: write `name = value`"),
        ("name", "1:5 `name` is followed by the end of the file, not by `=`: write `name = value`"),
        (
            "name =\n'a'",
            "1:7 a value is missing before the end of the line: write a text in quotes, a number or a list in `[...]`",
        ),
        ("name = 'a\nb'", "1:8 this text has no end: close it with `'`"),
        ("name = '''a\nb'", "1:8 this text has no end: close it with `'''`"),
        ("a = 1\ndisk = [ '/a,,xvda'", "2:8 this list has no end: close it with `]`"),
        (
            "disk = [ '/a,,xvda'\n  '/b,,xvdb' ]",
            "2:3 `'` follows a value directly: a `,` or a `]` belongs here",
        ),
        (
            "name = 'a' 'b'",
            "1:12 `'` follows a value directly: the next setting begins on a line of its own, or after `;`",
        ),
        (
            "name = 'a' memory = 1",
            "1:12 `memory` cannot stand behind a value: the next setting begins on a line of its own, or after `;`",
        ),
        (
            "name = 'a' + 'b'",
            "1:12 `+` would have to be computed, and Python is not run: write the value out",
        ),
        (
            "disk = [ 'phy:/dev/%s,xvda,w' % name ]",
            "1:31 `%` would have to be computed, and Python is not run: write the value out",
        ),
        (
            "kernel = arch + 'x'",
            "1:10 `arch` would have to be computed: write the value out, a text in quotes (`\"arch\"`)",
        ),
        (
            "vif = ( 'a', 'b' )",
            "1:7 this is Python, which is not run: write a text in quotes, a number or a list in `[...]`",
        ),
        (
            "# x\nimport os, re",
            "2:1 `import` is Python, which is not run: write out the values that the program would set",
        ),
        (
            "x = 1\nif x == 1:\n  y = 2",
            "2:1 `if` is Python, which is not run: write out the values that the program would set",
        ),
        (
            "name = 'a\\q'",
            "1:10 `\\q` stands for no character here: write `\\\\` for a backslash, and others as they are",
        ),
        (
            "name = 'ä\\xe4'",
            "1:10 `\\x` stands for no character here: write `\\\\` for a backslash, and others as they are",
        ),
        ("a = -", "1:5 `-` without a number behind it"),
        ("name = ['a']", "1:8 `name` is one text: write `name = \"vm1\"`"),
        ("name = 'a/b'\ndisk = ['/a,,xvda']", "1:9 a disk's name has no `/` in it"),
        (
            "disk = '/a,,xvda'",
            "1:9 `disk` is a list: write `disk = [ 'TARGET,raw,xvda,w' ]`, also for one disk",
        ),
        ("disk = [ 1 ]", "1:10 a disk is a text in quotes"),
        (
            "disk = [\n 'file:/a,xvda,x' ]",
            "2:16 unknown access `x`: it is `r`, `w`, or `w!` for a disk with several writers",
        ),
        (
            "disk = [ 'file:/\\x41\\'ä,xvda,x' ]",
            "1:30 unknown access `x`: it is `r`, `w`, or `w!` for a disk with several writers",
        ),
        (
            "disk = [ 'tap:qcow:/a,xvda,w' ]",
            "1:15 format `qcow` is not supported: `qemu-img convert -f qcow -O raw IMAGE NEW` makes a raw image of it",
        ),
        (
            "disk = [ 'nbd:host,xvda,w' ]",
            "1:11 script `block-nbd` would make sense of the target, and vbd runs no scripts: name a file or a device",
        ),
        (
            "disk = [ '/a,,xvda',\n '/b,,d0p0' ]",
            "2:3 the guest has a `xvda` already: give this disk another device (the first is in line 1)",
        ),
        (
            "disk = [ '/a,,xvda',\n '/./a,,xvdb,r' ]",
            "2:3 /./a is the disk `vm1-xvda` (line 1) too, and two users of a disk that one writes to destroy it: \
             serve it once, make both read-only (`r`), or mean it with `w!` for every writer",
        ),
    ] {
        assert_eq!(refused(text), error, "{text}");
    }
    let deep = format!("x = {}1{}", "[".repeat(17), "]".repeat(17));
    assert_eq!(refused(&deep), "1:21 lists are nested more than 16 deep");
    let error = xl::parse("name", Path::new("/etc/xen/vm1.cfg")).unwrap_err().to_string();
    assert!(error.starts_with("/etc/xen/vm1.cfg:1:5: `name` is followed"), "{error}");
}

#[test]
fn readers_share_a_file_and_so_does_whoever_means_it() {
    for disks in [
        "'/a,,xvda,r', '/a,,xvdb,r'",
        "'/a,,xvda,w!', '/a,,xvdb,w!'",
        "'/a,,xvda,r', '/a,,xvdb,w!', '/a,,xvdc,w!'",
    ] {
        read(&format!("disk = [ {disks} ]"));
    }
    for disks in [
        "'/a,,xvda,w', '/a,,xvdb,w'",
        "'/a,,xvda,w', '/a,,xvdb,w!'",
        "'/a,,xvda,r', '/a,,xvdb,r', '/a,,xvdc,w'",
        "'/a,,xvda,w!', '/a,,xvdb,r', '/a,,xvdc,w'",
    ] {
        assert!(refused(&format!("disk = [ {disks} ]")).contains("two users of a disk"), "{disks}");
    }
}

proptest! {
    #[test]
    fn any_text_is_answered(text in "(?s).{0,200}") {
        let _ = xl::parse(&text, Path::new("vm1"));
    }

    #[test]
    fn texts_made_of_its_words_are_answered(
        words in proptest::collection::vec(prop_oneof![
            Just("name"), Just("disk"), Just("="), Just("+="), Just("["), Just("]"), Just(","), Just(";"), Just("\n"),
            Just("#"), Just("'"), Just("\""), Just("\\"), Just("'/a,,xvda'"), Just("'file:/b,sda1,w'"), Just("1"),
            Just("-"), Just(" "), Just("'''"), Just("ä"), Just("\\x"), Just("\r\n"), Just("True"),
        ], 0..20),
    ) {
        let _ = xl::parse(&words.concat(), Path::new("vm1"));
    }
}
