//! Which files an image may name.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use vbd_core::ErrorKind;
use vbd_formats::Gate;

fn pass(gate: &Gate, image: &Path, name: &str) -> Result<std::path::PathBuf, vbd_core::Error> {
    gate.pass(image, image, OsStr::new(name), "backing file")
}

#[test]
fn files_beside_an_image_and_below_pass_and_others_only_where_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let (vm, base) = (root.join("vm"), root.join("base"));
    fs::create_dir_all(vm.join("sub")).unwrap();
    fs::create_dir(&base).unwrap();
    for file in ["vm/top", "vm/beside", "vm/sub/below", "base/one", "vmother"] {
        fs::write(root.join(file), file).unwrap();
    }
    let (image, gate) = (vm.join("top"), Gate::default());
    assert_eq!(pass(&gate, &image, "beside").unwrap(), vm.join("beside"));
    assert_eq!(pass(&gate, &image, "file:sub/../sub/below").unwrap(), vm.join("sub/below"));
    let absolute = base.join("one");
    for outside in ["../base/one", absolute.to_str().unwrap(), "/etc/passwd", "../vmother"] {
        let error = pass(&gate, &image, outside).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{outside}");
        assert!(error.to_string().contains("--allow-dir"), "{error}");
    }
    let allowed = Gate::new([base.clone(), root.join("not there")]);
    assert_eq!(pass(&allowed, &image, "../base/one").unwrap(), base.join("one"));
    assert!(pass(&allowed, &image, "/etc/passwd").is_err());
    // One of the chain below: what counts is the directory of the one that was asked for.
    let below = vm.join("sub/below");
    assert_eq!(
        allowed.pass(&image, &below, OsStr::new("../beside"), "data file").unwrap(),
        vm.join("beside")
    );
}

#[test]
fn links_are_followed_before_they_are_judged() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let image = root.join("top");
    fs::write(&image, "").unwrap();
    fs::write(root.join("file"), "").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", root.join("innocent")).unwrap();
    std::os::unix::fs::symlink("/etc", root.join("directory")).unwrap();
    std::os::unix::fs::symlink("file", root.join("good")).unwrap();
    let gate = Gate::default();
    assert!(pass(&gate, &image, "innocent").is_err());
    assert!(pass(&gate, &image, "directory/passwd").is_err());
    assert_eq!(pass(&gate, &image, "good").unwrap(), root.join("file"));
}

#[test]
fn what_is_no_file_goes_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("top");
    fs::write(&image, "").unwrap();
    fs::create_dir(dir.path().join("directory")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        dir.path().join("fifo"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    let cases = [
        ("json:{\"driver\":\"nbd\"}", "reached by `json`"),
        ("nbd://host/export", "reached by `nbd`"),
        ("fat:rw:/etc", "reached by `fat`"),
        ("file:nbd:x", "reached by `nbd`"),
        ("", "no file can have"),
        ("a\0b", "no file can have"),
        ("directory", "no regular file"),
        ("fifo", "no regular file"),
        ("missing\x1b[2J", "missing?[2J is missing"),
    ];
    for (name, message) in cases {
        let error = pass(&Gate::default(), &image, name).unwrap_err().to_string();
        assert!(error.contains(message), "{name}: {error}");
    }
}
