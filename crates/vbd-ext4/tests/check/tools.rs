//! Images, and the programs that they are held against.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use vbd_ext4::check::{Report, check};
use vbd_ext4::read::Part;

/// Runs a program that must succeed; its output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?} ended with {}:\n{text}{error}", output.status);
    text
}

/// What the checker finds in an image.
pub(crate) fn look(image: &Path) -> Report {
    let file = File::open(image).unwrap();
    let size = file.metadata().unwrap().len();
    check(Part::new(file, 0, size), &mut |_, _| {}).unwrap()
}

/// Neither the checker nor e2fsck finds anything.
pub(crate) fn is_clean(image: &Path, what: &str) {
    let report = look(image);
    let said = e2fsck(image);
    assert!(report.is_clean(), "{what}: {report:#?}\n{said:?}");
    assert!(said.is_none(), "{what}: {said:?}");
}

/// What e2fsck says where it finds anything.
pub(crate) fn e2fsck(image: &Path) -> Option<String> {
    let output = Command::new("e2fsck").args(["-fn"]).arg(image).output().unwrap();
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A tree with something of everything that an ordinary filesystem has.
pub(crate) fn tree(directory: &Path) -> PathBuf {
    let root = directory.join("tree");
    let at = |name: &str| root.join(name);
    std::fs::create_dir_all(at("sub/deeper/deepest")).unwrap();
    std::fs::write(at("small"), "a few bytes").unwrap();
    std::fs::write(at("large"), vec![7; 1 << 20]).unwrap();
    std::fs::hard_link(at("small"), at("sub/another name")).unwrap();
    std::os::unix::fs::symlink("small", at("short")).unwrap();
    std::os::unix::fs::symlink("x".repeat(200), at("long")).unwrap();
    std::fs::create_dir(at("many")).unwrap();
    for number in 0..500 {
        std::fs::write(at(&format!("many/a file with the number {number}")), "").unwrap();
    }
    let sparse = File::create(at("sparse")).unwrap();
    for number in 0..400 {
        std::os::unix::fs::FileExt::write_at(&sparse, b"x", number * 8192).unwrap();
    }
    run("mkfifo", &[at("fifo").to_str().unwrap()]);
    for name in ["small", "large", "sub"] {
        run("setfattr", &["-n", "user.long", "-v", &"v".repeat(300), at(name).to_str().unwrap()]);
        run("setfattr", &["-n", "user.short", "-v", "v", at(name).to_str().unwrap()]);
    }
    root
}

/// An image of mke2fs with a tree in it.
pub(crate) fn mke2fs(image: &Path, size: u64, options: &[&str], tree: Option<&Path>) {
    File::create(image).unwrap().set_len(size).unwrap();
    let mut arguments = vec!["-qF"];
    arguments.extend(options);
    if let Some(tree) = tree {
        arguments.extend(["-d", tree.to_str().unwrap()]);
    }
    arguments.push(image.to_str().unwrap());
    run("mke2fs", &arguments);
}
