//! Filesystems without a fault, of several makers.

use crate::tools::{is_clean, mke2fs, run, tree};

const MIB: u64 = 1 << 20;

#[test]
fn of_mke2fs() {
    let directory = tempfile::tempdir().unwrap();
    let tree = tree(directory.path());
    let image = directory.path().join("image");
    for (size, options) in [
        (40, &["-t", "ext4"][..]),
        (40, &["-t", "ext3"]),
        (40, &["-t", "ext2"]),
        (40, &["-t", "ext4", "-b", "1024"]),
        (40, &["-t", "ext2", "-b", "1024", "-I", "128"]),
        (40, &["-t", "ext4", "-O", "^metadata_csum,uninit_bg"]),
        (40, &["-t", "ext4", "-O", "^64bit"]),
        (40, &["-t", "ext4", "-O", "^flex_bg,^sparse_super,^resize_inode"]),
        (40, &["-t", "ext4", "-O", "sparse_super2,^resize_inode"]),
        (40, &["-t", "ext4", "-O", "meta_bg,^resize_inode", "-b", "1024"]),
        (40, &["-t", "ext4", "-O", "inline_data"]),
        (40, &["-t", "ext4", "-O", "orphan_file"]),
        (40, &["-t", "ext4", "-O", "metadata_csum_seed,large_dir,ea_inode"]),
        (40, &["-t", "ext4", "-O", "^dir_index"]),
        (40, &["-t", "ext4", "-O", "mmp"]),
        (9000, &["-t", "ext4"]),
    ] {
        mke2fs(&image, size * MIB, options, Some(&tree));
        is_clean(&image, &format!("mke2fs {options:?}"));
        // Hashed directories are made by e2fsck, not by mke2fs -d.
        let optimised = std::process::Command::new("e2fsck").args(["-fyD"]).arg(&image).output().unwrap();
        assert!(optimised.status.code() < Some(2), "{optimised:?}");
        is_clean(&image, &format!("e2fsck -D after mke2fs {options:?}"));
    }
}

#[test]
fn of_tune2fs_and_resize2fs() {
    let directory = tempfile::tempdir().unwrap();
    let tree = tree(directory.path());
    let image = directory.path().join("image");
    let name = image.to_str().unwrap();
    mke2fs(&image, 200 * MIB, &["-t", "ext4"], Some(&tree));
    for (program, arguments) in [
        ("tune2fs", &["-L", "label", name][..]),
        ("tune2fs", &["-U", "random", name]),
        ("resize2fs", &[name, "1200M"]),
        ("tune2fs", &["-O", "metadata_csum_seed", name]),
        ("tune2fs", &["-U", "random", name]),
        ("resize2fs", &["-M", name]),
        ("tune2fs", &["-m", "1", name]),
    ] {
        run(program, arguments);
        is_clean(&image, &format!("{program} {arguments:?}"));
        if program == "tune2fs" {
            run("e2fsck", &["-fp", name]);
        }
    }
}

#[test]
fn of_our_writer() {
    use crate::model::{self, Entry, Kind, settings};
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let many = |count: usize| {
        Entry::directory((0..count).map(|n| (format!("{n:x} of many").into_bytes(), Entry::new(Kind::Fifo))))
    };
    let long = |entry: Entry| entry.with_xattr("user.long", &[b'x'; 400]);
    let root = Entry::directory([
        (b"many".to_vec(), many(6000)),
        (b"file".to_vec(), long(Entry::file(5 << 20, 7))),
        (b"other".to_vec(), long(Entry::file(1, 8))),
        (b"striped".to_vec(), Entry::new(Kind::File(model::Data::striped(2000, 3)))),
        (b"link".to_vec(), Entry::new(Kind::Symlink(vec![b'y'; 90]))),
    ]);
    for size in [300 * MIB, 3000 * MIB] {
        std::fs::File::create(&image).unwrap();
        model::write(&image, &settings(size), &root);
        is_clean(&image, "our writer");
    }
}

/// The kernel's own filesystem, unmounted, and as it is while it is mounted: what is in the journal counts.
#[test]
fn of_the_kernel() {
    use crate::tools::look;
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    mke2fs(&image, 200 * MIB, &["-t", "ext4"], None);
    let mounted = vbd_testing::Mounted::new(&image, "rw");
    let point = mounted.path().display();
    let script = format!(
        "cd {point}; mkdir -p a/b/c many; for n in $(seq 700); do echo $n > many/a_rather_long_name_of_a_file_$n; done; \
         dd if=/dev/zero of=big bs=1M count=20 status=none; fallocate -l 5M reserved; ln big again; rm -r a/b; \
         for n in $(seq 0 5 690); do rm -f many/a_rather_long_name_of_a_file_$n; done; setfattr -n user.x -v $(seq -s, 150) big; \
         fallocate -p -o 1M -l 3M big; sync"
    );
    run("sh", &["-c", &script]);
    let copy = directory.path().join("copy");
    std::fs::copy(&image, &copy).unwrap();
    drop(mounted);
    is_clean(&image, "the kernel");
    let unclean = look(&copy);
    assert!(unclean.is_clean(), "{unclean:#?}");
    assert!(!unclean.notes.is_empty(), "it was mounted");
}
