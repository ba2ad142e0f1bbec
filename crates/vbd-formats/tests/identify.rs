//! Files are known by their headers, to refuse what nobody called raw.

use std::process::Command;

use vbd_formats::{assumed_raw, identify};

#[test]
fn what_qemu_makes_is_not_taken_for_raw_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("qcow2", "", "qcow2"),
        ("qcow", "", "qcow"),
        ("qed", "", "qed"),
        ("vpc", "subformat=fixed", "vhd"),
        ("vpc", "subformat=dynamic", "vhd"),
        ("vhdx", "", "vhdx"),
        ("vmdk", "", "vmdk"),
        ("vdi", "", "vdi"),
    ];
    for (format, options, name) in cases {
        let path = dir.path().join(format!("{format}{options}"));
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", format]).arg(&path).arg("4M");
        if !options.is_empty() {
            command.args(["-o", options]);
        }
        assert!(command.status().expect("qemu-img").success(), "{format}");
        let file = std::fs::File::open(&path).unwrap();
        let size = file.metadata().unwrap().len();
        assert_eq!(identify(&file, size).unwrap(), Some(name), "{format} {options}");
        let error = assumed_raw(&path, "--format").unwrap_err().to_string();
        assert!(error.contains(&format!("is a {name} image")) && error.contains("--format raw"), "{error}");
    }
}

#[test]
fn anything_else_may_be_raw() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    for bytes in [&b""[..], b"QF", &[0; 511], &[0; 4096], b"conecti", &[0xff; 1024]] {
        std::fs::write(&path, bytes).unwrap();
        assumed_raw(&path, "--format").unwrap();
        assert_eq!(identify(bytes, bytes.len() as u64).unwrap(), None);
    }
    assert!(
        assumed_raw(&dir.path().join("missing"), "--format")
            .unwrap_err()
            .to_string()
            .contains("no such file")
    );
}
