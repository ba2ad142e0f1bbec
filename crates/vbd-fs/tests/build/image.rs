//! What is in an image, as e2fsprogs sees it.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use super::sample::{Entry, Tree};

fn program(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("LC_ALL", "C").env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").stdin(Stdio::null());
    command
}

/// The output of one command of debugfs.
pub(crate) fn debugfs(image: &Path, request: &str) -> Vec<u8> {
    let ran = program("debugfs").args(["-R", request]).arg(image).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    // It greets there.
    assert!(ran.status.success() && said.lines().count() == 1, "{request}: {said}");
    ran.stdout
}

/// A file's text.
pub(crate) fn cat(image: &Path, path: &str) -> String {
    String::from_utf8(debugfs(image, &format!("cat {path}"))).unwrap()
}

/// Whether a path is in an image.
pub(crate) fn has(image: &Path, path: &str) -> bool {
    let ran = program("debugfs").args(["-R", &format!("stat {path}")]).arg(image).output().unwrap();
    ran.stdout.starts_with(b"Inode:")
}

/// Fails unless a filesystem has no faults.
pub(crate) fn check(image: &Path) {
    let ran = program("e2fsck").arg("-fn").arg(image).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stdout));
}

/// One entry.
pub(crate) fn entry(image: &Path, path: &str) -> Entry {
    one(image, path, &String::from_utf8_lossy(&debugfs(image, &format!("stat {path}"))))
}

/// Everything in an image but its `lost+found`.
pub(crate) fn read(image: &Path) -> Tree {
    let mut inodes = vec![(Vec::new(), 2, true)];
    let mut seen = 0;
    while let Some((path, inode, directory)) = inodes.get(seen).cloned() {
        seen += 1;
        if directory {
            for (name, inode, directory) in list(image, inode) {
                let path = if path.is_empty() { name } else { [&path[..], b"/", &name].concat() };
                if path != b"lost+found" {
                    inodes.push((path, inode, directory));
                }
            }
        }
    }
    let stats = stats(image, inodes.iter().map(|&(_, inode, _)| inode));
    let tree = inodes.into_iter().zip(stats);
    tree.map(|((path, inode, _), stat)| (path, one(image, &format!("<{inode}>"), &stat))).collect()
}

/// What debugfs says of inodes, in one run.
fn stats(image: &Path, inodes: impl Iterator<Item = u32>) -> Vec<String> {
    let mut script = tempfile::NamedTempFile::new().unwrap();
    for inode in inodes {
        writeln!(script, "stat <{inode}>").unwrap();
    }
    let ran = program("debugfs").arg("-f").arg(script.path()).arg(image).output().unwrap();
    assert!(ran.status.success());
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    said.split("debugfs: stat ").skip(1).map(str::to_owned).collect()
}

/// Names, inodes, and whether they are directories: `/INODE/MODE/UID/GID/NAME/SIZE/` and a newline, which a name may have, too.
fn list(image: &Path, inode: u32) -> Vec<(Vec<u8>, u32, bool)> {
    let output = debugfs(image, &format!("ls -p <{inode}>"));
    let fields: Vec<&[u8]> = output.split(|&b| b == b'/').collect();
    let mut names = Vec::new();
    for record in fields[1..].chunks(7).filter(|record| record.len() >= 6) {
        let number = std::str::from_utf8(record[0]).unwrap().parse().unwrap();
        if record[4] != b"." && record[4] != b".." {
            names.push((record[4].to_vec(), number, record[1].starts_with(b"04")));
        }
    }
    names
}

fn after<'a>(text: &'a str, label: &str) -> &'a str {
    text.split_once(label).unwrap_or_else(|| panic!("no {label:?} in {text}")).1.trim_start()
}

fn word<'a>(text: &'a str, label: &str) -> &'a str {
    after(text, label).split_whitespace().next().unwrap()
}

/// A number of 32 bits that is shown as one with a sign.
fn id(stat: &str, label: &str) -> u32 {
    let shown: i64 = word(stat, label).parse().unwrap();
    u32::try_from(shown.rem_euclid(1 << 32)).unwrap()
}

fn one(image: &Path, which: &str, stat: &str) -> Entry {
    let size: u64 = word(stat, "Size:").parse().unwrap();
    let kind = match after(stat, "Type:") {
        t if t.starts_with("directory") => 'd',
        t if t.starts_with("regular") => 'f',
        t if t.starts_with("symlink") => 'l',
        t if t.starts_with("character special") => 'c',
        t if t.starts_with("block special") => 'b',
        t if t.starts_with("FIFO") => 'p',
        t if t.starts_with("socket") => 's',
        t => panic!("{t}"),
    };
    let (seconds, extra) = word(stat, " mtime: 0x").split_once(':').unwrap();
    let [seconds, extra] = [seconds, extra].map(|hex| u32::from_str_radix(hex, 16).unwrap());
    // Two bits for 136 years each, then the nanoseconds.
    let mtime = (i64::from(seconds.cast_signed()) + (i64::from(extra & 3) << 32), extra >> 2);
    let device = match kind {
        'c' | 'b' => {
            let (major, minor) = word(stat, "major/minor number:").split_once(':').unwrap();
            (major.parse().unwrap(), minor.parse().unwrap())
        }
        _ => (0, 0),
    };
    let blocks = if kind == 'f' { blocks(stat) } else { Vec::new() };
    let content = match kind {
        'f' if blocks.is_empty() && size > 0 => size.to_string().into_bytes(),
        // The target of a short link is in its inode.
        'l' if stat.contains("Fast link dest: ") => {
            let target = after(stat, "Fast link dest: \"");
            target.as_bytes()[..usize::try_from(size).unwrap()].to_vec()
        }
        'f' if size == 0 => Vec::new(),
        'f' | 'l' => debugfs(image, &format!("cat {which}")),
        _ => Vec::new(),
    };
    Entry {
        kind,
        mode: u32::from_str_radix(word(stat, "Mode:"), 8).unwrap() & 0o7777,
        uid: id(stat, "User:"),
        gid: id(stat, "Group:"),
        mtime,
        links: if kind == 'd' { 0 } else { word(stat, "Links:").parse().unwrap() },
        device,
        content,
        xattrs: xattrs(image, which, stat),
        blocks,
    }
}

fn xattrs(image: &Path, which: &str, stat: &str) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let Some((_, lines)) = stat.split_once("Extended attributes:\n") else { return all };
    for line in lines.lines().take_while(|line| line.starts_with("  ")) {
        let name = line.split_whitespace().next().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        debugfs(image, &format!("ea_get -f {} {which} {name}", file.path().display()));
        let mut value = std::fs::read(file.path()).unwrap();
        if name.starts_with("system.posix_acl_") {
            // Entries for no one in particular have no number on disk, and debugfs shows 0 where the kernel has -1.
            for entry in value[4..].chunks_mut(8).filter(|entry| !matches!(entry[0], 2 | 8)) {
                entry[4..].fill(0xff);
            }
        }
        all.insert(name.to_owned(), value);
    }
    all
}

/// The data blocks of a file: `(0-2):100-102, (IND):103, (5):104`.
fn blocks(stat: &str) -> Vec<u64> {
    let list = stat.split_once("EXTENTS:").or_else(|| stat.split_once("BLOCKS:"));
    let mut blocks = Vec::new();
    for piece in list.map_or("", |(_, list)| list).split('(').skip(1) {
        let range = piece.split(')').next().unwrap();
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        if let (Ok(first), Ok(last)) = (first.parse::<u64>(), last.parse()) {
            blocks.extend(first..=last);
        }
    }
    blocks
}
