//! What the superblock says, beyond what the reader needs.

use super::Checker;
use crate::format::superblock::{compat, incompat, ro_compat, state};

/// The fewest blocks of a group.
const FEWEST: u64 = 256;

impl Checker<'_> {
    /// Whether the rest can be looked at with these numbers.
    pub(super) fn superblock(&mut self) -> bool {
        let superblock = self.superblock.clone();
        let numbers = self.numbers;
        let place = "the superblock";
        let before = self.report.count;
        let first = u64::from(numbers.block_size == 1024);
        if numbers.first_data_block != first {
            let found = numbers.first_data_block;
            self.bad(place, format!("the first group begins at block {found}, not {first}"));
        }
        if numbers.blocks_per_group < FEWEST || !numbers.blocks_per_group.is_multiple_of(8) {
            self.bad(place, format!("a group has {} blocks", numbers.blocks_per_group));
        }
        if superblock.clusters_per_group.get() != superblock.blocks_per_group.get()
            || superblock.log_cluster_size.get() != superblock.log_block_size.get()
        {
            self.bad(place, "clusters are not blocks, and the feature bigalloc is not there");
        }
        if !numbers.inodes_per_group.is_multiple_of(8) {
            self.bad(place, format!("a group has {} inodes", numbers.inodes_per_group));
        }
        let inodes = u64::from(numbers.groups) * u64::from(numbers.inodes_per_group);
        if u64::from(superblock.inodes_count.get()) != inodes {
            let found = superblock.inodes_count.get();
            self.bad(place, format!("there are {found} inodes, and {} groups have {inodes}", numbers.groups));
        }
        if superblock.has_ro_compat(ro_compat::GDT_CSUM | ro_compat::METADATA_CSUM) {
            self.bad(place, "it has two kinds of checksums, gdt_csum and metadata_csum");
        }
        if superblock.has_compat(compat::RESIZE_INODE) && superblock.has_incompat(incompat::META_BG) {
            self.bad(place, "it has both resize_inode and meta_bg");
        }
        let descriptors = u64::from(numbers.groups)
            .div_ceil(u64::from(numbers.block_size / u32::from(numbers.descriptor_size)));
        let reserved = u64::from(superblock.reserved_gdt_blocks.get());
        if descriptors + reserved + 1 > numbers.blocks_per_group
            && !superblock.has_incompat(incompat::META_BG)
        {
            self.bad(place, format!("{descriptors} and {reserved} blocks of descriptors fit no group"));
        }
        if reserved > u64::from(numbers.block_size / 4) {
            self.bad(
                place,
                format!("it reserves {reserved} blocks for descriptors, more than can be listed"),
            );
        }
        // What follows does not keep the rest from being looked at.
        let usable = self.report.count == before;
        if superblock.reserved_blocks() > numbers.blocks / 2 {
            self.bad(place, format!("it reserves {} blocks, more than half", superblock.reserved_blocks()));
        }
        let first_ino = superblock.first_ino.get();
        if superblock.revision.get() > 0
            && (first_ino < crate::format::ino::FIRST || first_ino > superblock.inodes_count.get())
        {
            self.bad(place, format!("its first inode for files is {first_ino}"));
        }
        if superblock.state.get() & state::ERRORS != 0 {
            self.bad(place, "it says that the kernel found errors");
        }
        let recovering = superblock.has_incompat(incompat::RECOVER) || self.filesystem.replayed() > 0;
        if superblock.state.get() & state::VALID == 0 && !recovering {
            self.bad(place, "it says that it was not unmounted, and there is no journal to replay");
        }
        if superblock.has_incompat(incompat::RECOVER) && !superblock.has_compat(compat::HAS_JOURNAL) {
            self.bad(place, "its journal is to be replayed, and it has none");
        }
        let extra = [superblock.min_extra_isize.get(), superblock.want_extra_isize.get()];
        if superblock.has_ro_compat(ro_compat::EXTRA_ISIZE)
            && extra
                .iter()
                .any(|extra| 128 + u32::from(*extra) > u32::from(numbers.inode_size) || extra % 4 != 0)
        {
            self.bad(place, format!("inodes of {} bytes are to have {extra:?} more", numbers.inode_size));
        }
        if superblock.has_incompat(incompat::FLEX_BG) && superblock.log_groups_per_flex > 31 {
            self.bad(place, format!("its flexible groups are 2^{} groups", superblock.log_groups_per_flex));
        }
        usable
    }

    /// The first inode that is not the filesystem's own.
    pub(super) fn first_ino(&self) -> u32 {
        match self.superblock.revision.get() {
            0 => crate::format::ino::FIRST,
            _ => self.superblock.first_ino.get().max(crate::format::ino::FIRST),
        }
    }
}
