//! What a repair does not touch.

use std::os::unix::fs::FileExt;
use std::process::Command;

use vbd_formats::{Format, ImageSpec, Repair, check};

/// Where the bits are that writers clear which do not know them; the highest says that notes lie beside the image.
const AUTOCLEAR: u64 = 88;

/// A repair took what the notes lead to for leaks, gave it to others, and the notes were made again over it afterwards.
#[test]
fn an_image_of_a_killed_process_is_not_repaired_under_its_notes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("4M").status();
    assert!(made.expect("qemu-img").success());
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    file.write_all_at(&(1u64 << 63).to_be_bytes(), AUTOCLEAR).unwrap();
    let notes = dir.path().join(".disk.qcow2.changes");
    std::fs::write(&notes, b"not looked into").unwrap();
    let before = std::fs::read(&path).unwrap();

    let spec = ImageSpec::new(&path, Format::Qcow2);
    for repair in [Repair::Leaks, Repair::All] {
        let error = check(&spec, Some(repair)).unwrap_err().to_string();
        assert!(error.contains("was killed") && error.contains(".disk.qcow2.changes"), "{error}");
    }
    assert!(std::fs::read(&path).unwrap() == before, "the image is as it was");
    check(&spec, None).expect("looking is allowed");

    std::fs::remove_file(&notes).unwrap();
    check(&spec, Some(Repair::All)).expect("without notes it is an image like any other");
}
