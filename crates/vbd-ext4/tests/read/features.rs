//! Filesystems with all sorts of features, as mke2fs fills them.

use std::fs;
use std::path::Path;

use vbd_ext4::read::{Error, Links};

use crate::sample::{self, same};
use crate::support::{command, debugfs, image, open, run, text};

/// Makes an image of the sample with these arguments of mke2fs, and compares.
fn compare(size: &str, arguments: &[&[&str]]) {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir(&tree).unwrap();
    sample::fill(&tree);
    sample::decorate(&tree);
    for arguments in arguments {
        compare_one(&tree, &image(directory.path(), Some(&tree), size, arguments));
    }
}

fn compare_one(tree: &Path, image: &Path) {
    index(image);
    let filesystem = open(image).unwrap();
    let host = sample::of_host(tree);
    same(host, sample::of_image(&filesystem), |path, entry| entry.as_mke2fs(path));
    let usage = filesystem.usage().unwrap();
    let said = run("dumpe2fs", &["-h", text(image)]);
    let number = |name: &str| -> u64 {
        let line = said.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert_eq!(usage.free, number("Free blocks:") * number("Block size:"));
    assert_eq!((usage.inodes, usage.free_inodes), (number("Inode count:"), number("Free inodes:")));
}

/// Makes hashed directories of the large ones, which mke2fs does not do; and the rest is found right.
fn index(image: &Path) {
    let status = command("e2fsck", &["-fyD", text(image)]).status().unwrap();
    assert!(matches!(status.code(), Some(0 | 1)), "{status}");
    run("e2fsck", &["-fn", text(image)]);
}

#[test]
fn ext4_as_mke2fs_makes_it() {
    compare("200M", &[&["-t", "ext4", "-b", "4096"]]);
}

#[test]
fn ext2_with_large_and_small_blocks() {
    compare("60M", &[&["-t", "ext2", "-b", "4096"], &["-t", "ext2", "-b", "1024"]]);
}

#[test]
fn ext3_with_inodes_of_128_bytes() {
    compare("60M", &[&["-t", "ext3", "-b", "1024", "-I", "128"], &["-t", "ext3", "-b", "2048"]]);
}

#[test]
fn ext4_with_other_features() {
    compare(
        "60M",
        &[
            &["-t", "ext4", "-b", "1024"],
            &["-t", "ext4", "-O", "^metadata_csum,uninit_bg"],
            &["-t", "ext4", "-O", "^metadata_csum,^64bit,^flex_bg"],
            &["-t", "ext4", "-O", "inline_data,metadata_csum_seed"],
            &["-t", "ext4", "-O", "meta_bg,^resize_inode", "-b", "1024"],
            &["-t", "ext4", "-O", "bigalloc", "-C", "16384"],
            &["-t", "ext4", "-O", "sparse_super2,orphan_file,casefold,verity,project,quota"],
            &["-t", "ext4", "-O", "^extent,^64bit"],
        ],
    );
}

#[test]
fn blocks_of_64_kib() {
    compare("300M", &[&["-t", "ext4", "-b", "65536"]]);
}

#[test]
fn revision_0_of_ext2() {
    let directory = tempfile::tempdir().unwrap();
    let image = image(directory.path(), None, "8M", &["-t", "ext2", "-r", "0"]);
    debugfs(&image, &["write /etc/hostname name", "mkdir d", "symlink d/link /name"]);
    let filesystem = open(&image).unwrap();
    let found = filesystem.lookup(b"d/link", Links::Follow).unwrap();
    let host = fs::read("/etc/hostname").unwrap();
    assert_eq!(filesystem.read_all(&found, 1000).unwrap(), host);
}

#[test]
fn paths() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir(&tree).unwrap();
    sample::fill(&tree);
    let image = image(directory.path(), Some(&tree), "100M", &["-t", "ext4"]);
    let filesystem = open(&image).unwrap();
    let number = |path: &str, links| filesystem.lookup(path.as_bytes(), links).map(|inode| inode.number());
    let middle = number("/a/b/middle", Links::Follow).unwrap();
    for path in
        ["a/b/middle", "link/middle", "absolute", "hard", "//a/./b//middle", "../../a/../link/../b/middle"]
    {
        assert_eq!(number(path, Links::Follow).unwrap(), middle, "{path}");
    }
    for path in ["/", "", "..", "link/../..", "a/.."] {
        assert_eq!(number(path, Links::Keep).unwrap(), 2, "{path}");
    }
    assert_ne!(number("absolute", Links::Keep).unwrap(), middle);
    // With a slash at its end, a link is its target.
    assert_eq!(number("link/", Links::Keep).unwrap(), number("a/b", Links::Keep).unwrap());
    assert!(matches!(number("loop", Links::Follow), Err(Error::Links(_))));
    assert!(matches!(number("a/b/none", Links::Follow), Err(Error::NotFound(_))));
    assert!(matches!(number("a/tiny/", Links::Follow), Err(Error::NotDirectory(_))));
    assert!(matches!(number("a/tiny/x", Links::Follow), Err(Error::NotDirectory(_))));
    assert_eq!(filesystem.number_of(b"a/none").unwrap(), None);
}

#[test]
fn what_is_none_and_what_is_not_known_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("zeros");
    fs::write(&path, vec![0; 1 << 20]).unwrap();
    assert!(matches!(open(&path), Err(Error::NotExt)));
    fs::write(&path, b"short").unwrap();
    assert!(matches!(open(&path), Err(Error::NotExt)));

    let image = image(directory.path(), None, "8M", &["-t", "ext4", "-O", "^metadata_csum"]);
    let with = |feature: u32| {
        let mut bytes = fs::read(&image).unwrap();
        let at = 1024 + 0x60;
        let old = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        bytes[at..at + 4].copy_from_slice(&(old | feature).to_le_bytes());
        fs::write(&path, bytes).unwrap();
        open(&path).err().map(|error| error.to_string())
    };
    assert!(with(1).unwrap().contains("compression"));
    assert!(with(0x1000).unwrap().contains("dirdata"));
    assert!(with(0x8).unwrap().contains("a journal, not a filesystem"));
    assert!(with(0x8000_0000).unwrap().contains("unknown feature 0x80000000"));
    assert!(with(0x2_0000).is_none());
    let cut = fs::read(&image).unwrap();
    fs::write(&path, &cut[..cut.len() - 4096]).unwrap();
    assert!(open(&path).err().unwrap().to_string().contains("what it is in has"));
}

/// What is encrypted is there, and says no more than that.
#[test]
fn encryption_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir(&tree).unwrap();
    sample::fill(&tree);
    let image = image(directory.path(), Some(&tree), "60M", &["-t", "ext4", "-O", "encrypt"]);
    debugfs(
        &image,
        &[
            "set_inode_field /a flags 0x80800",
            "set_inode_field /hard flags 0x80800",
            "set_inode_field /far flags 0x80800",
        ],
    );
    let filesystem = open(&image).unwrap();
    let inode = |path: &str| filesystem.lookup(path.as_bytes(), Links::Keep);
    let encrypted = |error: Error| assert!(error.to_string().contains("uses encryption"), "{error}");
    encrypted(filesystem.entries(&inode("a").unwrap()).err().unwrap());
    encrypted(inode("a/tiny").unwrap_err());
    let hard = inode("hard").unwrap();
    assert_eq!(hard.size(), 70_001);
    encrypted(filesystem.read_at(&hard, 0, &mut [0; 10]).unwrap_err());
    encrypted(filesystem.read_link(&inode("far").unwrap()).unwrap_err());
    assert!(filesystem.read_all(&inode("sparse").unwrap(), 1 << 30).is_ok());
}

/// Every byte of every structure that has a checksum.
#[test]
fn wrong_checksums_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir(&tree).unwrap();
    sample::fill(&tree);
    sample::decorate(&tree);
    let image = image(directory.path(), Some(&tree), "100M", &["-t", "ext4", "-b", "4096"]);
    index(&image);
    let whole = fs::read(&image).unwrap();
    let path = directory.path().join("damaged");
    let damaged = |byte: u64| {
        let mut bytes = whole.clone();
        bytes[usize::try_from(byte).unwrap()] ^= 1;
        fs::write(&path, bytes).unwrap();
        open(&path)
    };
    let block = |command: &str| -> u64 {
        let said = run("debugfs", &["-R", command, text(&image)]);
        said.split_whitespace().next().unwrap().parse().unwrap()
    };
    let read = |byte: u64, path: &str| {
        let filesystem = damaged(byte).unwrap_or_else(|error| panic!("{path}: {error}"));
        let inode = filesystem.lookup(path.as_bytes(), Links::Keep).map_err(|error| error.to_string())?;
        filesystem.xattrs(&inode).map_err(|error| error.to_string())?;
        if path == "large" {
            let entries = filesystem.entries(&inode).map_err(|error| error.to_string())?;
            entries.collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
        }
        Ok::<_, String>(())
    };
    assert!(
        damaged(1024 + 0x78).err().unwrap().to_string().contains("the superblock: the checksum is wrong")
    );
    assert!(read(4096 + 4, "a").unwrap_err().contains("the descriptor of group 0: the checksum"));
    let place = run("debugfs", &["-R", "imap /a", text(&image)]);
    let (at, offset) = place.split_once("located at block ").unwrap().1.split_once(", offset ").unwrap();
    let inode = at.parse::<u64>().unwrap() * 4096
        + u64::from_str_radix(offset.trim().trim_start_matches("0x"), 16).unwrap();
    assert!(read(inode + 8, "a").unwrap_err().contains(": the checksum is wrong"));
    assert!(read(block("bmap /a 0") * 4096 + 8, "a/b").unwrap_err().contains("of the directory, inode"));
    for number in [0, 1, 10] {
        let at = block(&format!("bmap /large {number}")) * 4096 + 40;
        assert!(read(at, "large").unwrap_err().contains(&format!("block {number} of the directory")));
    }
    // 900 bytes do not fit into the inode.
    let stat = run("debugfs", &["-R", "stat /a/inline", text(&image)]);
    let at: u64 =
        stat.split_once("File ACL: ").unwrap().1.split_whitespace().next().unwrap().parse().unwrap();
    assert!(read(at * 4096 + 4095, "a/inline").unwrap_err().contains("of extended attributes, of inode"));
    assert!(read(at * 4096 + 4095, "a/tiny").is_ok());
}

#[test]
fn ext4_view_agrees() {
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    fs::create_dir(&tree).unwrap();
    sample::fill(&tree);
    let image = image(directory.path(), Some(&tree), "100M", &["-t", "ext4"]);
    let theirs = ext4_view::Ext4::load(Box::new(fs::read(&image).unwrap())).unwrap();
    let ours = open(&image).unwrap();
    let mut left = vec![std::path::PathBuf::from("/")];
    let mut count = 0;
    while let Some(path) = left.pop() {
        count += 1;
        let inode = ours.lookup(text(&path).as_bytes(), Links::Keep).unwrap();
        let metadata = theirs.symlink_metadata(text(&path)).unwrap();
        let attributes = inode.attributes();
        assert_eq!(u32::from(attributes.mode), u32::from(metadata.mode()));
        assert_eq!((attributes.uid, attributes.gid), (metadata.uid(), metadata.gid()));
        assert_eq!(inode.size(), metadata.len());
        if metadata.is_dir() {
            let names = |path: &Path| {
                let entries = theirs.read_dir(text(path)).unwrap();
                let mut names: Vec<Vec<u8>> =
                    entries.map(|entry| entry.unwrap().file_name().as_ref().to_vec()).collect();
                names.sort();
                names
            };
            let mut entries: Vec<_> =
                ours.entries(&inode).unwrap().map(|entry| entry.unwrap().name).collect();
            entries.sort();
            assert_eq!(entries, names(&path));
            // Hundreds of files of one kind say no more than some.
            let children = entries.iter().filter(|name| *name != b"." && *name != b"..").take(20);
            left.extend(children.filter_map(|name| Some(path.join(std::str::from_utf8(name).ok()?))));
        } else if metadata.is_symlink() {
            assert_eq!(ours.read_link(&inode).unwrap(), theirs.read_link(text(&path)).unwrap().as_ref());
        } else if metadata.file_type().is_regular_file() && metadata.len() < 50 << 20 {
            assert!(ours.read_all(&inode, 1 << 30).unwrap() == theirs.read(text(&path)).unwrap());
        }
    }
    assert!(count > 30);
}
