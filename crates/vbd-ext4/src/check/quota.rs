//! What the quota files count, held against what is in use.

use std::collections::BTreeMap;

use super::Checker;
use crate::format::inode::{Inode, flags};
use crate::format::quota::Kind;
use crate::format::superblock::ro_compat;
use crate::format::{Ino, ino};
use crate::read::{Place, Result};

/// Bytes and inodes in use, by whose they are.
#[derive(Debug, Default)]
pub(super) struct Counted {
    usage: BTreeMap<(Kind, u32), (u64, u64)>,
    /// Whether something in use could not be counted.
    failed: bool,
}

impl Counted {
    /// That counting means nothing any more.
    pub(super) fn fail(&mut self) {
        self.failed = true;
    }
}

impl Checker<'_> {
    /// Counts an inode in use with so many blocks for those whose it is.
    pub(super) fn count_usage(&mut self, ino: Ino, fields: &Inode, blocks: u64) {
        let own = ino < self.first_ino() && ino != ino::ROOT || self.is_own(ino);
        if !self.superblock.has_ro_compat(ro_compat::QUOTA)
            || own
            || fields.links.get() == 0
            || fields.flags.get() & flags::EA_INODE != 0
        {
            return;
        }
        let space = blocks * u64::from(self.numbers.block_size);
        for (kind, id) in
            [(Kind::User, fields.uid()), (Kind::Group, fields.gid()), (Kind::Project, fields.project.get())]
        {
            let counted = self.counted.usage.entry((kind, id)).or_default();
            *counted = (counted.0.saturating_add(space), counted.1 + 1);
        }
    }

    /// Whether the quota files say what was counted.
    pub(super) fn quotas(&mut self) -> Result<()> {
        for kind in Kind::ALL {
            let number = self.superblock.quota_inum(kind);
            // Inodes without a name count until the mount that ends them.
            if number == 0 || self.counted.failed || !self.orphans.is_empty() {
                continue;
            }
            let place = Place::Quota(kind);
            let said = self.filesystem.quotas(kind);
            let Some(said) = self.found(said)? else { continue };
            let range = (kind, 0)..=(kind, u32::MAX);
            let mut counted: BTreeMap<u32, (u64, u64)> =
                self.counted.usage.range(range).map(|((_, id), usage)| (*id, *usage)).collect();
            for entry in said {
                let id = entry.id.get();
                let (space, inodes) = counted.remove(&id).unwrap_or_default();
                if (entry.space.get(), entry.inodes.get()) != (space, inodes) {
                    let reason = format!(
                        "it says that {id} has {} bytes and {} inodes, which has {space} and {inodes}",
                        entry.space.get(),
                        entry.inodes.get()
                    );
                    self.bad(place, reason);
                }
            }
            for (id, (space, inodes)) in counted {
                self.bad(place, format!("{id} is not in it, and has {space} bytes and {inodes} inodes"));
            }
        }
        Ok(())
    }
}
