//! Names in large directories: found by their hashes, in a few blocks, and without those where they lead nowhere.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vbd_ext4::read::{Filesystem, Links, Options, Part, Source};

use crate::support::{command, image, run, text};

/// An image whose reads are counted.
struct Counted {
    part: Part,
    bytes: Arc<AtomicU64>,
}

impl Source for Counted {
    fn size(&self) -> u64 {
        self.part.size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        self.part.read_exact_at(buffer, offset)
    }
}

fn name(number: u32) -> String {
    format!("number {number}, of a name that is somewhat long")
}

const NAMES: u32 = 3_000;

/// Compares what each of so many names leads to with what a listing says; then looks one up anew, and gives the bytes that
/// this took, and those of the directory.
fn compare(image: &Path, each: usize) -> (u64, u64) {
    let bytes = Arc::new(AtomicU64::new(0));
    let open = || {
        let file = File::open(image).unwrap();
        let part = Part::new(file, 0, fs::metadata(image).unwrap().len());
        Filesystem::open(Counted { part, bytes: Arc::clone(&bytes) }, Options::default()).unwrap()
    };
    let filesystem = open();
    let many = filesystem.lookup(b"many", Links::Keep).unwrap();
    let entries: Vec<_> = filesystem.entries(&many).unwrap().map(Result::unwrap).collect();
    let entries = entries.into_iter().filter(|entry| !entry.name.starts_with(b"."));
    let mut found = 0;
    for entry in entries.step_by(each) {
        let path = [&b"many/"[..], &entry.name].concat();
        assert_eq!(filesystem.lookup(&path, Links::Keep).unwrap().number(), entry.inode);
        found += 1;
    }
    assert_eq!(found, (NAMES as usize).div_ceil(each));
    drop(filesystem);
    let filesystem = open();
    bytes.store(0, Ordering::Relaxed);
    // Whether a name is not there takes no more than where one is.
    assert_eq!(filesystem.number_of(b"many/none").unwrap(), None);
    filesystem.lookup(format!("many/{}", name(NAMES / 2)).as_bytes(), Links::Keep).unwrap();
    (bytes.load(Ordering::Relaxed), many.size())
}

#[test]
fn a_name_is_found_by_its_hash_in_a_few_blocks() {
    let directory = tempfile::tempdir().unwrap();
    let many = directory.path().join("tree/many");
    fs::create_dir_all(&many).unwrap();
    (0..NAMES).for_each(|number| drop(File::create(many.join(name(number))).unwrap()));
    let tree = directory.path().join("tree");
    for arguments in [
        &["-t", "ext4", "-b", "4096"][..],
        // A tree of two levels, and one whose nodes have no checksums.
        &["-t", "ext4", "-b", "1024"],
        &["-t", "ext3", "-b", "1024"],
    ] {
        let image = image(directory.path(), Some(&tree), "64M", &[arguments, &["-N", "16384"]].concat());
        let status = command("e2fsck", &["-fyD", text(&image)]).status().unwrap();
        assert!(matches!(status.code(), Some(0 | 1)), "{status}");
        let (read, size) = compare(&image, 1);
        assert!(size > 120_000 && read < size / 4, "{read} bytes of {size}");
    }
    // Where the tree leads nowhere, names are found all the same: the last image has no checksums.
    let image = directory.path().join("image");
    let block = run("debugfs", &["-R", "bmap /many 0", text(&image)]);
    let block: u64 = block.trim().parse().unwrap();
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let mut root = vec![0; 1024];
    file.read_exact_at(&mut root, block * 1024).unwrap();
    // Each child of the root is the root.
    for entry in root[32..].chunks_mut(8) {
        entry[4..].fill(0);
    }
    file.write_all_at(&root, block * 1024).unwrap();
    let (read, size) = compare(&image, 100);
    assert!(read > size / 4, "{read} bytes of {size}");
}
