//! Filesystems with one fault each, with right checksums around it: the checker finds what e2fsck finds.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use crate::tools::{e2fsck, look, mke2fs, tree};

const MIB: u64 = 1 << 20;

/// Runs a command of debugfs, which sees to the checksums.
fn debugfs(image: &Path, command: &str) {
    let output = Command::new("debugfs").args(["-w", "-R", command]).arg(image).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let said: Vec<&str> = said.lines().filter(|line| !line.starts_with("debugfs ")).collect();
    assert!(said.is_empty(), "debugfs {command}: {said:?}");
}

/// What is changed, and the place that the checker has to name.
const FAULTS: &[(&str, &str)] = &[
    ("ssv free_blocks_count 77", "the superblock"),
    ("ssv free_inodes_count 5", "the superblock"),
    ("ssv r_blocks_count 60000", "the superblock"),
    ("ssv state 2", "the superblock"),
    ("ssv last_orphan 14", "orphan"),
    ("ssv first_ino 5", "the superblock"),
    ("ssv journal_inum 9", "inode 9"),
    ("set_bg 0 free_blocks_count 3", "group 0"),
    ("set_bg 0 free_inodes_count 3", "group 0"),
    ("set_bg 0 used_dirs_count 3", "group 0"),
    ("set_bg 0 block_bitmap 2000", "2000"),
    ("set_bg 0 inode_table 100", "inode table of group 0"),
    ("set_bg 0 checksum 1", "group 0"),
    ("freeb 1500 3", "the block bitmap of group 0"),
    ("setb 60000 7", "the block bitmap of group 7"),
    ("freei <15>", "the inode bitmap of group 0"),
    ("seti <2555>", "the inode bitmap of group 0"),
    ("sif small links_count 5", "inode"),
    ("sif small mode 0170644", "inode"),
    ("sif small mode 0040644", "inode"),
    ("sif large blocks 8", "inode"),
    ("sif large size 4096", "inode"),
    ("sif small dtime 99", "inode"),
    ("sif small flags 0", "inode"),
    ("sif small checksum 12345", "inode"),
    ("sif small extra_isize 30000", "inode"),
    ("sif fifo size 7", "inode"),
    ("sif short size 30", "inode"),
    ("sif small block[0] 0x1234", "extents of inode"),
    ("sif small block[1] 0x00000007", "extents of inode"),
    ("sif large block[5] 3", "block 3 belongs to something else"),
    ("sif large block[5] 99000", "extents of inode"),
    ("sif many size 4096", "inode"),
    ("sif many flags 0x80000", "directory"),
    ("sif <2> mode 0100755", "inode 2"),
    ("sif small file_acl 50", "50"),
    ("sif <7> block[DIND] 9", "inode 7"),
    ("sif <7> blocks 8", "inode 7"),
    ("unlink small", "inode"),
    ("unlink sub/deeper", "inode"),
    ("link sub/deeper/deepest sub/again", "more than once"),
    ("link small sub/counted", "inode"),
    ("link <8> journal", "inode 8"),
    ("link <20000> free", "inode 20000"),
    ("clri sub/deeper", "inode"),
    ("clri <8>", "inode 8"),
];

#[test]
fn one_fault_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let (whole, image) = (directory.path().join("whole"), directory.path().join("image"));
    mke2fs(&whole, 64 * MIB, &["-t", "ext4", "-N", "20480"], Some(&tree(directory.path())));
    let indexed = Command::new("e2fsck").args(["-fyD"]).arg(&whole).output().unwrap();
    assert!(indexed.status.code() < Some(2), "{indexed:?}");
    assert!(look(&whole).is_clean());
    let mut missed = Vec::new();
    for (command, place) in FAULTS {
        std::fs::copy(&whole, &image).unwrap();
        debugfs(&image, command);
        let report = look(&image);
        let named = report.problems.iter().any(|problem| problem.to_string().contains(place));
        if !named {
            missed.push((*command, *place, report.problems, e2fsck(&image)));
        }
    }
    assert!(missed.is_empty(), "{missed:#?}");
}

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % sides as u64).unwrap()
    }
}

/// A byte is changed somewhere in the metadata: where e2fsck finds something, so does the checker, checksums or not.
#[test]
fn what_e2fsck_finds_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let (whole, image) = (directory.path().join("whole"), directory.path().join("image"));
    let tree = tree(directory.path());
    let mut missed = Vec::new();
    let mut found = 0;
    for (seed, options) in
        [(1, &["-t", "ext4"][..]), (2, &["-t", "ext4", "-O", "^metadata_csum"]), (3, &["-t", "ext3"])]
    {
        mke2fs(&whole, 24 * MIB, options, Some(&tree));
        let mut head = vec![0; 4 << 20];
        File::open(&whole).unwrap().read_exact_at(&mut head, 0).unwrap();
        // Zeros are mostly of no importance; the boot sector is none of the filesystem's.
        let places: Vec<usize> = (1024..head.len()).filter(|at| head[*at] != 0 && head[*at] != 7).collect();
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15 ^ seed);
        for _ in 0..40 {
            let (at, bit) = (places[dice.roll(places.len())], dice.roll(8));
            std::fs::copy(&whole, &image).unwrap();
            let changed = [head[at] ^ 1 << bit];
            File::options().write(true).open(&image).unwrap().write_all_at(&changed, at as u64).unwrap();
            let Some(said) = e2fsck(&image) else { continue };
            found += 1;
            let file = File::open(&image).unwrap();
            let source = vbd_ext4::read::Part::new(file, 0, 24 * MIB);
            if vbd_ext4::check::check(source, &mut |_, _| {}).is_ok_and(|report| report.is_clean()) {
                missed.push((options, at, bit, said));
            }
        }
    }
    assert!(missed.is_empty(), "{missed:#?}");
    assert!(found > 30, "only {found} of the changes mattered");
}

/// Extents that name the same blocks again and again are work for a bounded time.
#[test]
fn many_claims_come_to_an_end() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    mke2fs(
        &image,
        8 * MIB,
        &["-t", "ext4", "-O", "^metadata_csum", "-N", "2048"],
        Some(&tree_of_files(&directory)),
    );
    // Every file gets an extent of most of the filesystem.
    for number in 0..20 {
        debugfs(&image, &format!("sif file{number} block[4] 6000"));
    }
    let report = look(&image);
    assert!(report.incomplete && report.count < 1000, "{report:#?}");
}

/// Twenty files of a block.
fn tree_of_files(directory: &tempfile::TempDir) -> std::path::PathBuf {
    let root = directory.path().join("files");
    std::fs::create_dir(&root).unwrap();
    for number in 0..20 {
        std::fs::write(root.join(format!("file{number}")), "content").unwrap();
    }
    root
}
