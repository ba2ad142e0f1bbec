//! The journal's own beginning, and the inodes that wait for their end.

use zerocopy::FromBytes;

use super::Checker;
use crate::format::Ino;
use crate::format::inode::{Inode, flags};
use crate::format::journal::{self, JournalSuperblock, block_type, feature};
use crate::format::superblock::{compat, incompat, ro_compat};
use crate::read::{Error, Place, Result};

impl Checker<'_> {
    pub(super) fn journal(&mut self) -> Result<()> {
        let superblock = &self.superblock;
        let number = superblock.journal_inum.get();
        if !superblock.has_compat(compat::HAS_JOURNAL) {
            if number != 0 {
                self.bad("the superblock", format!("inode {number} is its journal, and it has none"));
            }
            return Ok(());
        }
        if number == 0 {
            self.report.note("its journal is on another device, and was not looked at".to_owned());
            return Ok(());
        }
        let inode = self.filesystem.inode(number);
        let Some(inode) = self.found(inode)? else { return Ok(()) };
        let bytes = self.filesystem.read_piece(&inode, journal_head());
        let Some(bytes) = self.found(bytes)? else { return Ok(()) };
        let Ok((head, _)) = JournalSuperblock::read_from_prefix(&bytes) else {
            self.bad(Place::Journal, "it is too short");
            return Ok(());
        };
        let kind = head.header.block_type.get();
        if head.header.magic.get() != journal::MAGIC
            || ![block_type::SUPERBLOCK_V1, block_type::SUPERBLOCK_V2].contains(&kind)
        {
            self.bad(Place::Journal, "it does not begin with a superblock");
            return Ok(());
        }
        let features = if kind == block_type::SUPERBLOCK_V2 { head.incompat.get() } else { 0 };
        if features & (feature::CSUM_V2 | feature::CSUM_V3) != 0 && head.sum() != head.checksum.get() {
            self.bad(Place::Journal, "the checksum of its superblock is wrong");
        }
        let blocks = inode.size() / u64::from(self.numbers.block_size);
        let (said, size) = (u64::from(head.blocks.get()), head.block_size.get());
        if size != self.numbers.block_size {
            self.bad(Place::Journal, format!("its blocks have {size} bytes"));
        } else if said > blocks
            || said < u64::from(journal::MIN_BLOCKS)
            || head.first.get() == 0
            || u64::from(head.first.get()) >= said
            || u64::from(head.start.get()) >= said
        {
            let reason =
                format!("it says it has {said} blocks, of {blocks}, and begins at {}", head.first.get());
            self.bad(Place::Journal, reason);
        }
        if head.start.get() != 0 && !self.superblock.has_incompat(incompat::RECOVER) {
            self.bad(Place::Journal, "it holds changes, and the superblock says that there are none");
        }
        if head.error.get() != 0 {
            self.bad(Place::Journal, "the kernel left an error in it");
        }
        Ok(())
    }

    /// The inodes that have no name any more, or are being cut off: a list through inodes, and a file.
    pub(super) fn orphans(&mut self) -> Result<()> {
        let mut next = self.superblock.last_orphan.get();
        let clean = self.filesystem.replayed() == 0 && !self.superblock.has_incompat(incompat::RECOVER);
        if next != 0 && clean {
            self.bad(
                "the superblock",
                format!("inode {next} is in the list of orphans, and it was unmounted"),
            );
        }
        while next != 0 {
            let inode = self.raw_inode(next)?;
            let Some(fields) = inode.filter(|_| self.orphans.insert(next)) else {
                self.bad("the list of orphans", format!("it leads to inode {next}, which cannot be"));
                break;
            };
            next = fields.dtime.get();
        }
        self.orphan_file(clean)?;
        if !self.orphans.is_empty() {
            let count = self.orphans.len();
            self.report.note(format!("{count} inodes wait for their end, which comes with the next mount"));
        }
        Ok(())
    }

    fn orphan_file(&mut self, clean: bool) -> Result<()> {
        let number = self.superblock.orphan_file_inum.get();
        if !self.superblock.has_compat(compat::ORPHAN_FILE) {
            return Ok(());
        }
        let inode = self.filesystem.inode(number);
        let Some(inode) = self.found(inode)? else { return Ok(()) };
        let block_size = u64::from(self.numbers.block_size);
        // As many as the kernel makes at most, and more.
        for block in 0..(inode.size() / block_size).min(1 << 12) {
            let bytes = self.filesystem.read_piece(&inode, block * block_size..(block + 1) * block_size);
            let Some(bytes) = self.found(bytes)? else { return Ok(()) };
            let entries = &bytes[..bytes.len() - size_of::<crate::format::orphan::Tail>()];
            for entry in entries.chunks_exact(4).filter(|entry| *entry != [0; 4]) {
                let ino = Ino::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
                if clean || !self.superblock.has_ro_compat(ro_compat::ORPHAN_PRESENT) {
                    self.bad("the file of orphans", format!("inode {ino} is in it, and it was unmounted"));
                } else if self.raw_inode(ino)?.is_none() {
                    self.bad(
                        "the file of orphans",
                        format!("inode {ino} is in it, and there is no such inode"),
                    );
                    continue;
                }
                self.orphans.insert(ino);
            }
        }
        Ok(())
    }

    /// The fields of an inode, whether it is in use or not.
    fn raw_inode(&self, ino: Ino) -> Result<Option<Inode>> {
        let numbers = self.numbers;
        if ino == 0 || ino > self.superblock.inodes_count.get() {
            return Ok(None);
        }
        let (group, index) = ((ino - 1) / numbers.inodes_per_group, (ino - 1) % numbers.inodes_per_group);
        let table = self.filesystem.group(group, false)?.inode_table();
        if !self.used.exist(table, self.table_blocks()) {
            return Ok(None);
        }
        let mut bytes = vec![0; usize::from(numbers.inode_size)];
        let offset = table * u64::from(numbers.block_size) + u64::from(index) * u64::from(numbers.inode_size);
        self.filesystem.bytes_at(offset, &mut bytes)?;
        let fields = Inode::read(&bytes);
        let own = ino < self.first_ino() || fields.flags.get() & flags::EA_INODE != 0;
        Ok((!own).then_some(fields))
    }
}

/// The bytes of the journal's superblock.
fn journal_head() -> std::ops::Range<u64> {
    0..size_of::<JournalSuperblock>() as u64
}

impl crate::read::Filesystem {
    /// A piece of a file that has to be there whole.
    fn read_piece(&self, inode: &crate::read::Inode, range: std::ops::Range<u64>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap_or(0)];
        let mut done = 0;
        while done < bytes.len() {
            let got = self.read_at(inode, range.start + done as u64, &mut bytes[done..])?;
            if got == 0 {
                return Err(Error::corrupt(Place::Inode(inode.number()), "it is too short"));
            }
            done += got;
        }
        Ok(bytes)
    }
}
