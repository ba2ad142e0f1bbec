//! A filesystem's UUID and label, changed with everything that depends on them.

use zerocopy::IntoBytes;

use super::{EditError, Editor, Result};
use crate::format::group::GroupDescriptor;
use crate::format::superblock::{compat, incompat, ro_compat};
use crate::read::Place;

impl Editor {
    /// Gives the filesystem another UUID, and another label where one is given, with the next commit.
    ///
    /// Checksums begin with the UUID (metadata_csum): the old seed is kept as the feature metadata_csum_seed has it, so none
    /// of them changes. The older checksums of group descriptors (uninit_bg) are made anew.
    ///
    /// # Errors
    ///
    /// A label of more than 16 bytes or with a zero; a UUID that must not change (stable_inodes); those of reading.
    pub fn identify(&mut self, uuid: [u8; 16], label: Option<&[u8]>) -> Result<()> {
        if self.superblock().has_compat(compat::STABLE_INODES) {
            let why = "it has stable_inodes, with which its UUID must not change";
            return Err(EditError::Refused(why.to_owned()));
        }
        if let Some(label) = label.filter(|label| label.len() > 16 || label.contains(&0)) {
            let label = String::from_utf8_lossy(label).into_owned();
            return Err(EditError::Refused(format!("the label {label:?} has more than 16 bytes, or a zero")));
        }
        let numbers = self.filesystem.numbers();
        let seed = self.superblock().seed();
        let superblock = self.superblock_mut();
        if superblock.has_ro_compat(ro_compat::METADATA_CSUM) && !superblock.has_incompat(incompat::CSUM_SEED)
        {
            superblock.checksum_seed = seed.0.into();
            superblock.incompat = (superblock.incompat.get() | incompat::CSUM_SEED).into();
        }
        superblock.uuid = uuid;
        if let Some(label) = label {
            superblock.label = [0; 16];
            superblock.label[..label.len()].copy_from_slice(label);
        }
        let (label, features, seed) = (superblock.label, superblock.incompat, superblock.checksum_seed);
        if superblock.has_ro_compat(ro_compat::GDT_CSUM) && numbers.seed.is_none() {
            for group in 0..numbers.groups {
                let (block, at) = self.filesystem.place_of_descriptor(group);
                let size = usize::from(numbers.descriptor_size);
                let mut bytes = self.filesystem.block(block, Place::Group(group))?.to_vec();
                let sum = GroupDescriptor::sum16(&bytes[at..at + size], group, &uuid);
                let place = at + std::mem::offset_of!(GroupDescriptor, checksum);
                bytes[place..place + 2].copy_from_slice(&sum.to_le_bytes());
                self.filesystem.blocks.stage(block, bytes.into());
            }
        }
        for group in
            (1..numbers.groups).filter(|group| self.filesystem.superblock_in(*group)).collect::<Vec<_>>()
        {
            let block = numbers.first_data_block + u64::from(group) * numbers.blocks_per_group;
            let bytes = self.filesystem.block(block, Place::Superblock)?;
            let Ok((mut copy, _)) =
                <crate::format::Superblock as zerocopy::FromBytes>::read_from_prefix(&bytes)
            else {
                continue;
            };
            (copy.uuid, copy.label, copy.checksum_seed) = (uuid, label, seed);
            copy.incompat = (features.get() & !incompat::RECOVER).into();
            if copy.has_ro_compat(ro_compat::METADATA_CSUM) {
                copy.seal();
            }
            let mut bytes = bytes.to_vec();
            bytes[..copy.as_bytes().len()].copy_from_slice(copy.as_bytes());
            self.filesystem.blocks.stage(block, bytes.into());
        }
        // Where there are no backups nothing else says that something changed.
        self.stage_superblock()
    }
}
