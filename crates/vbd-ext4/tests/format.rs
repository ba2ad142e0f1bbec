//! The structures against a filesystem that mke2fs, e2fsck and debugfs made: every checksum and hash of it is recomputed.

use std::fs;
use std::path::Path;
use std::process::Command;

use vbd_ext4::format::hash::Hasher;
use vbd_ext4::format::superblock::{compat, flags, incompat, ro_compat};
use vbd_ext4::format::{
    Extent, ExtentHeader, ExtentIndex, FileType, GroupDescriptor, Inode, Seed, Superblock, acl, directory,
    extent, group, inode, journal, superblock, xattr,
};
use zerocopy::FromBytes;

const BLOCK: usize = 4096;

fn run(program: &str, arguments: &[&str], good: &[i32]) -> String {
    let output = Command::new(program).args(arguments).output().expect(program);
    assert!(
        output.status.code().is_some_and(|code| good.contains(&code)),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

struct Image(Vec<u8>);

impl Image {
    fn superblock(&self) -> &Superblock {
        Superblock::ref_from_prefix(&self.0[1024..]).unwrap().0
    }

    fn block(&self, number: u64) -> &[u8] {
        let at = usize::try_from(number).unwrap() * BLOCK;
        &self.0[at..at + BLOCK]
    }

    fn descriptor(&self, group: u32) -> &[u8] {
        let at = BLOCK + group as usize * 64;
        &self.0[at..at + 64]
    }

    fn inode(&self, ino: u32) -> &[u8] {
        let per_group = self.superblock().inodes_per_group.get();
        let (group, index) = ((ino - 1) / per_group, (ino - 1) % per_group);
        let table = GroupDescriptor::read(self.descriptor(group)).inode_table();
        let at = usize::try_from(table).unwrap() * BLOCK + index as usize * 256;
        &self.0[at..at + 256]
    }

    /// The extents of a node and of those below; their checksums are looked at on the way.
    fn extents(&self, node: &[u8], begin: u32, found: &mut Vec<Extent>) {
        let header = ExtentHeader::ref_from_prefix(node).unwrap().0;
        assert_eq!(header.magic.get(), extent::MAGIC);
        for at in 1..=usize::from(header.entries.get()) {
            let entry = &node[at * extent::ENTRY..];
            if header.depth.get() == 0 {
                found.push(extent::ExtentEntry::ref_from_prefix(entry).unwrap().0.extent());
            } else {
                let block = self.block(ExtentIndex::ref_from_prefix(entry).unwrap().0.child());
                let at = extent::tail(block).unwrap();
                assert_eq!(extent::sum(begin, block).unwrap().to_le_bytes(), block[at..at + 4]);
                self.extents(block, begin, found);
            }
        }
    }

    fn content(&self, ino: u32) -> Vec<Extent> {
        let bytes = self.inode(ino);
        let inode = Inode::read(bytes);
        let mut found = Vec::new();
        let begin = self.superblock().seed().of_inode(ino, inode.generation.get());
        self.extents(&inode.block, begin, &mut found);
        found
    }
}

/// A tree with something of everything, as mke2fs and debugfs write it.
fn image() -> Image {
    let scratch = tempfile::tempdir().unwrap();
    let tree = scratch.path().join("tree");
    fs::create_dir_all(tree.join("many")).unwrap();
    for number in 0..2000 {
        fs::write(tree.join(format!("many/{}{number}", "n".repeat(60))), b"").unwrap();
    }
    let file = scratch.path().join("image");
    let file = file.to_str().unwrap();
    fs::write(file, b"").unwrap();
    let tree = tree.to_str().unwrap();
    run(
        "mke2fs",
        &[
            "-q",
            "-F",
            "-t",
            "ext4",
            "-b",
            "4096",
            "-O",
            "metadata_csum_seed",
            "-E",
            "hash_seed=12345678-1234-1234-1234-123456789abc",
            "-d",
            tree,
            file,
            "160M",
        ],
        &[0],
    );
    // A file in every second block is a tree of extents; an attribute too long for the inode has a block.
    let holes = scratch.path().join("holes");
    let mut content = vec![0; 2000 * BLOCK];
    content.iter_mut().step_by(2 * BLOCK).for_each(|byte| *byte = 1);
    fs::write(&holes, content).unwrap();
    let value = scratch.path().join("value");
    fs::write(&value, [b'v'; 301]).unwrap();
    let commands = scratch.path().join("commands");
    let text = format!(
        "write {} holes\nea_set -f {} /holes user.long\nea_set /holes user.short abc\nea_set /holes trusted.other x\n",
        holes.display(),
        value.display()
    );
    fs::write(&commands, text).unwrap();
    run("debugfs", &["-w", "-f", commands.to_str().unwrap(), file], &[0]);
    // Rebuilds the big directory as a hash tree.
    run("e2fsck", &["-fyD", file], &[0, 1]);
    Image(fs::read(Path::new(file)).unwrap())
}

#[test]
fn every_checksum_and_hash_is_as_the_usual_tools_make_it() {
    let image = image();
    let superblock = image.superblock();
    assert_eq!(superblock.magic.get(), superblock::MAGIC);
    assert_eq!(superblock.checksum.get(), superblock.sum());
    assert_eq!(superblock.block_size(), Some(4096));
    assert_eq!(superblock.blocks(), 160 * 256);
    assert!(superblock.has_compat(compat::HAS_JOURNAL | compat::DIR_INDEX | compat::RESIZE_INODE));
    assert!(superblock.has_incompat(incompat::BITS64 | incompat::EXTENTS | incompat::CSUM_SEED));
    assert!(superblock.has_ro_compat(ro_compat::METADATA_CSUM | ro_compat::SPARSE_SUPER));
    assert_eq!(superblock.flags.get(), flags::SIGNED_HASH);
    assert_eq!(superblock.seed(), Seed::of_uuid(&superblock.uuid));

    groups(&image);
    for ino in [2, 7, 8, 11, 12, 13] {
        let bytes = image.inode(ino);
        assert_eq!(Inode::sum(bytes, ino, superblock.seed()), Inode::stored_sum(bytes), "inode {ino}");
    }
    let journal = image.block(image.content(8)[0].physical);
    let journal = journal::JournalSuperblock::ref_from_prefix(journal).unwrap().0;
    assert_eq!(journal.header.magic.get(), journal::MAGIC);
    assert_eq!(journal.blocks.get(), 1024 * 4);

    let root = entries(&image, 2);
    let find = |name: &str| root.iter().find(|entry| entry.0 == name.as_bytes()).unwrap().1;
    hashed_directory(&image, find("many"));
    file_with_attributes(&image, find("holes"));
}

fn groups(image: &Image) {
    let superblock = image.superblock();
    let seed = superblock.seed();
    for number in 0..2 {
        let bytes = image.descriptor(number);
        let descriptor = GroupDescriptor::read(bytes);
        assert_eq!(GroupDescriptor::sum(bytes, number, seed), descriptor.checksum.get(), "group {number}");
        let blocks = image.block(descriptor.block_bitmap());
        let set: u32 = blocks.iter().map(|byte| byte.count_ones()).sum();
        if descriptor.flags.get() & group::flags::BLOCK_UNINIT == 0 {
            assert_eq!(seed.of_bitmap(blocks), descriptor.block_bitmap_sum());
            assert_eq!(32768 - set, descriptor.free_blocks());
        }
        if descriptor.flags.get() & group::flags::INODE_UNINIT == 0 {
            let used = superblock.inodes_per_group.get() as usize / 8;
            let inodes = &image.block(descriptor.inode_bitmap())[..used];
            assert_eq!(seed.of_bitmap(inodes), descriptor.inode_bitmap_sum());
        }
    }
    let mut again = GroupDescriptor::read(image.descriptor(1));
    again.checksum = 0.into();
    again.seal(1, seed);
    assert_eq!(again, GroupDescriptor::read(image.descriptor(1)));
}

/// The entries of a directory, read block by block; every block of entries has its checksum looked at.
fn entries(image: &Image, ino: u32) -> Vec<(Vec<u8>, u32, u64)> {
    let begin = image.superblock().seed().of_inode(ino, Inode::read(image.inode(ino)).generation.get());
    let mut found = Vec::new();
    for extent in image.content(ino) {
        for number in 0..u64::from(extent.length) {
            let block = image.block(extent.physical + number);
            if let Some(tail) = directory::tail(block) {
                assert_eq!(tail.checksum.get(), directory::sum(begin, block));
            }
            let mut at = 0;
            while at < BLOCK {
                let header = directory::EntryHeader::ref_from_prefix(&block[at..]).unwrap().0;
                let name = &block[at + 8..at + 8 + usize::from(header.name_length)];
                if header.inode.get() != 0 {
                    assert!(FileType::from_code(header.file_type).is_some());
                    found.push((name.to_vec(), header.inode.get(), u64::from(extent.logical) + number));
                }
                at += directory::record_length(header.record.get(), 4096) as usize;
            }
        }
    }
    found
}

fn hashed_directory(image: &Image, ino: u32) {
    let superblock = image.superblock();
    let inode = Inode::read(image.inode(ino));
    assert_eq!(FileType::from_mode(inode.mode.get()), Some(FileType::Directory));
    assert_ne!(inode.flags.get() & inode::flags::INDEX, 0);
    let begin = superblock.seed().of_inode(ino, inode.generation.get());
    let root = image.block(image.content(ino)[0].physical);
    assert_eq!(
        directory::hash_sum(begin, root, directory::ROOT_COUNT),
        directory::stored_hash_sum(root, directory::ROOT_COUNT)
    );
    let info = directory::RootInfo::ref_from_prefix(&root[directory::ROOT_INFO..]).unwrap().0;
    assert_eq!((info.length, info.indirect_levels), (8, 0));
    let numbers = directory::CountLimit::ref_from_prefix(&root[directory::ROOT_COUNT..]).unwrap().0;
    assert_eq!(numbers.limit.get(), directory::hash_limit(4096, directory::ROOT_COUNT, true));

    // The least hash of each leaf, by its block.
    let mut leaves: Vec<(u32, u32)> = (0..usize::from(numbers.count.get()))
        .map(|at| {
            let entry = &root[directory::ROOT_COUNT + 8 * at..];
            let entry = directory::HashEntry::ref_from_prefix(entry).unwrap().0;
            (if at == 0 { 0 } else { entry.hash.get() }, entry.block.get())
        })
        .collect();
    assert!(leaves.len() > 10 && leaves.is_sorted());
    leaves.push((u32::MAX, 0));
    let unsigned = superblock.flags.get() & flags::UNSIGNED_HASH != 0;
    let hasher =
        Hasher::new(info.hash_version, unsigned, superblock.hash_seed.map(|word| word.get())).unwrap();
    let found = entries(image, ino);
    assert_eq!(found.len(), 2002);
    for (name, _, block) in found.iter().filter(|entry| entry.2 != 0) {
        let at = leaves.iter().position(|leaf| u64::from(leaf.1) == *block).unwrap();
        let hash = hasher.hash(name).major;
        assert!((leaves[at].0 & !1..=leaves[at + 1].0).contains(&hash), "{name:?} in block {block}");
    }
}

fn file_with_attributes(image: &Image, ino: u32) {
    let seed = image.superblock().seed();
    let bytes = image.inode(ino);
    let inode = Inode::read(bytes);
    assert_eq!(Inode::sum(bytes, ino, seed), Inode::stored_sum(bytes));
    assert_eq!(inode.size(), 2000 * BLOCK as u64);
    let extents = image.content(ino);
    assert_eq!(extents.iter().map(|extent| extent.length).sum::<u32>(), 1000);
    assert!(inode.sectors(4096) > 1000 * 8, "the tree has blocks of its own");

    let place = inode.xattr_block();
    let block = image.block(place);
    let header = xattr::BlockHeader::ref_from_prefix(block).unwrap().0;
    assert_eq!((header.magic.get(), header.references.get()), (xattr::MAGIC, 1));
    assert_eq!(header.checksum.get(), xattr::sum(seed, place, block));
    let mut at = xattr::BLOCK_HEADER;
    let mut hashes = Vec::new();
    while block[at..at + 4] != [0; 4] {
        let entry = xattr::EntryHeader::ref_from_prefix(&block[at..]).unwrap().0;
        let name = &block[at + xattr::ENTRY..][..usize::from(entry.name_length)];
        let value = &block[usize::from(entry.value_offset.get())..][..entry.value_size.get() as usize];
        assert_eq!(xattr::full_name(entry.name_index, name).unwrap(), b"user.long");
        assert_eq!(value, [b'v'; 301]);
        assert_eq!(entry.hash.get(), xattr::entry_hash(name, value));
        hashes.push(entry.hash.get());
        at += xattr::entry_size(name.len());
    }
    assert_eq!(hashes.len(), 1);
    // debugfs leaves the block's own hash out; the kernel's is looked at where the kernel writes.
    assert_eq!(header.hash.get(), 0);
    assert_ne!(xattr::block_hash(hashes), 0);
    assert_eq!(acl::to_disk(&[2, 0, 0, 0]), Ok(vec![1, 0, 0, 0]));
}
