use std::fs;
use std::os::unix::fs::symlink;

use super::told;
use crate::config::load;

#[test]
fn the_name_says_the_language() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in [("a.toml", "[[disk]]\npath = 'x'"), ("a.TOML", "[[disk]]\npath = 'x'")] {
        let file = dir.path().join(name);
        fs::write(&file, text).unwrap();
        assert_eq!(load(&file).unwrap().disks[0].path, dir.path().join("x"));
    }
    for name in ["a.cfg", "a"] {
        let file = dir.path().join(name);
        fs::write(&file, "disk = ['/x,,xvda']").unwrap();
        assert_eq!(load(&file).unwrap().disks[0].name, "a-xvda");
    }
}

#[test]
fn a_file_that_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("none.toml");
    let error = load(&file).unwrap_err();
    assert_eq!(error.to_string(), format!("{}: the configuration cannot be read", file.display()));
    assert_eq!(error.source.unwrap().kind(), std::io::ErrorKind::NotFound);
    assert!(load(dir.path()).unwrap_err().source.is_some(), "a directory");
    let latin = dir.path().join("latin.cfg");
    fs::write(&latin, b"# gr\xfc\xdfe\n").unwrap();
    assert_eq!(told(&load(&latin).unwrap_err()), "1:5 a byte that is not UTF-8: save the file as UTF-8");
    let large = dir.path().join("large.toml");
    fs::File::create(&large).unwrap().set_len((16 << 20) + 1).unwrap();
    assert!(load(&large).unwrap_err().message.contains("more than 16 MiB"));
}

#[test]
fn one_file_under_two_paths_is_found() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), "x").unwrap();
    symlink("a", dir.path().join("b")).unwrap();
    fs::hard_link(dir.path().join("a"), dir.path().join("c")).unwrap();
    for other in ["b", "c"] {
        let file = dir.path().join("vm.toml");
        fs::write(&file, format!("[[disk]]\npath = 'a'\n[[disk]]\npath = '{other}'\naccess = 'r'")).unwrap();
        let error = told(&load(&file).unwrap_err());
        assert!(error.starts_with("3:1 ") && error.contains("is the disk `a` (line 1) too"), "{error}");
    }
}

/// No time is measured: work that grew with the square of these sizes would take minutes.
#[test]
fn hostile_sizes_are_read_in_one_pass() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |name: &str, text: String| {
        let file = dir.path().join(name);
        fs::write(&file, text).unwrap();
        told(&load(&file).unwrap_err())
    };
    let disks: String = (0..50_000).map(|n| format!("{{path='{n}'}},")).collect();
    let error = refused("line.toml", format!("limits.max-devices=1\ndisk=[{disks}]"));
    assert!(error.starts_with("2:") && error.contains("50000 disks are more than"), "{error}");
    let flags = format!("disk = ['/a,,xvda,{}x=1']", "discard,".repeat(200_000));
    assert!(refused("flags", flags).contains("unknown key `x`"));
    let disks: String = (0..20_000).map(|n| format!("'a{n},,d{n},untrusted',")).collect();
    let error = refused("line", format!("disk = [{disks}]"));
    assert!(error.contains("20000 disks are more than `max-devices` allows (4096)"), "{error}");
}
