//! An existing filesystem changed in place, without mounting it, and so that a cut at any moment leaves either the old or
//! the new one.
//!
//! [`Editor`] keeps changed blocks of metadata in memory, on top of what [`crate::read`] reads, so that everything it
//! reads has the changes made so far. The content of files goes to blocks that are free in the old filesystem as it comes.
//! [`Editor::commit`] makes one transaction in the filesystem's own journal of the blocks: when its last word is written the
//! new filesystem is there for the kernel, e2fsck and the reader here, before that the old one. An editor that is dropped
//! changes nothing.
//!
//! - Blocks that a change frees are not used again before its commit: the old filesystem needs them.
//! - What cannot be kept right (clusters, inline data, encryption …) is refused by its name before the first write.
//! - A journal with changes in it is replayed first, which is as safe as the kernel's doing it.
//! - A write of 4 KiB to an aligned place reaches the storage whole or not at all, as the kernel's ext4 assumes.

mod directory;
mod entries;
mod error;
pub mod fuzz;
mod groups;
mod grow;
mod identity;
mod inodes;
mod journal;
mod map;
mod operations;
mod quota;
mod shrink;
mod storage;
mod xattrs;

pub use crate::format::{Attributes, FileType, Ino, Timestamp, Xattr};
pub use error::{EditError, Result};
pub use grow::Resized;
pub use operations::{New, Where};
pub use storage::Storage;

use std::sync::Arc;

use crate::format::Superblock;
use crate::format::superblock::{compat, incompat, ro_compat, state};
use crate::read::{Filesystem, Options};
use crate::write::directory::Form;
use journal::Journal;
use storage::Shared;

/// Incompatible features with which a filesystem can be changed.
const INCOMPAT: u32 = incompat::FILETYPE
    | incompat::RECOVER
    | incompat::META_BG
    | incompat::EXTENTS
    | incompat::BITS64
    | incompat::FLEX_BG
    | incompat::CSUM_SEED
    | incompat::LARGEDIR;
/// Read-only compatible features with which a filesystem can be changed.
const RO_COMPAT: u32 = ro_compat::SPARSE_SUPER
    | ro_compat::LARGE_FILE
    | ro_compat::HUGE_FILE
    | ro_compat::GDT_CSUM
    | ro_compat::DIR_NLINK
    | ro_compat::EXTRA_ISIZE
    | ro_compat::QUOTA
    | ro_compat::METADATA_CSUM
    | ro_compat::PROJECT;

/// A filesystem that is being changed.
pub struct Editor {
    filesystem: Filesystem,
    storage: Arc<dyn Storage>,
    journal: Journal,
    now: Timestamp,
    space: groups::Space,
    /// Changes of usage that are not in the quota files yet: bytes and inodes.
    usage: quota::Usage,
    /// Whether a change failed in the middle.
    failed: bool,
}

impl Editor {
    /// Opens a filesystem to change it; `now` is what its times become. What its journal holds is put into its place first.
    ///
    /// # Errors
    ///
    /// Those of reading, and a filesystem that cannot be changed safely: [`EditError::Refused`] says why.
    pub fn open(storage: impl Storage + 'static, now: Timestamp) -> Result<Editor> {
        let storage: Arc<dyn Storage> = Arc::new(storage);
        let filesystem = Filesystem::open(Shared(storage.clone()), Options::default())?;
        may_change(filesystem.superblock())?;
        let journal = Journal::open(&filesystem)?;
        let mut editor = Editor {
            filesystem,
            storage,
            journal,
            now,
            space: groups::Space::default(),
            usage: quota::Usage::default(),
            failed: false,
        };
        if editor.filesystem.superblock().has_incompat(incompat::RECOVER) {
            editor.recover()?;
        }
        // Known after the replay only: the kernel has these words changed through the journal, too.
        may_change(editor.filesystem.superblock())?;
        has_no_orphans(editor.filesystem.superblock())?;
        Ok(editor)
    }

    /// What is in it, with the changes made so far.
    pub fn filesystem(&self) -> &Filesystem {
        &self.filesystem
    }

    /// Whether something would change with a commit.
    pub fn is_changed(&self) -> bool {
        !self.filesystem.blocks.staged().is_empty()
    }

    /// Makes the changes so far, all of them or none; they are on the storage when this returns.
    ///
    /// # Errors
    ///
    /// [`EditError::TooLarge`] before the first write where the journal is too small; those of writing. After one, what is
    /// in the file is the old filesystem or the new one, and the editor is of no use any more.
    pub fn commit(&mut self) -> Result<()> {
        self.usable()?;
        if self.is_changed() {
            // Cleared again when it is whole.
            self.failed = true;
            match self.write_transaction() {
                // Nothing was written yet.
                Err(error @ EditError::TooLarge { .. }) => return Err(error),
                result => result?,
            }
            self.failed = false;
        }
        self.space.settle();
        Ok(())
    }

    fn superblock(&self) -> &Superblock {
        &self.filesystem.geometry.superblock
    }

    fn superblock_mut(&mut self) -> &mut Superblock {
        &mut self.filesystem.geometry.superblock
    }

    fn block_size(&self) -> u32 {
        self.filesystem.geometry.block_size
    }

    /// How directories are here.
    fn form(&self) -> Result<Form> {
        let superblock = self.superblock();
        let seed = superblock.hash_seed.map(zerocopy::little_endian::U32::get);
        let unsigned = superblock.flags.get() & crate::format::superblock::flags::UNSIGNED_HASH != 0;
        let version = superblock.hash_version;
        let hasher = crate::format::hash::Hasher::new(version, unsigned, seed).ok_or_else(|| {
            EditError::Refused(format!("its directories are hashed in the unknown way {version}"))
        })?;
        // The version in a tree's root may say signed characters, which the superblock's flag then turns over.
        Ok(Form {
            block_size: self.block_size() as usize,
            hasher,
            version,
            sums: self.filesystem.geometry.seed.is_some(),
        })
    }

    /// Whether hashed directories may be made.
    fn hashes(&self) -> bool {
        self.superblock().has_compat(compat::DIR_INDEX)
    }
}

/// Refuses what cannot be kept right.
fn may_change(superblock: &Superblock) -> Result<()> {
    let refuse = |why: String| Err(EditError::Refused(why));
    let incompatible = superblock.incompat.get() & !INCOMPAT;
    let others = superblock.ro_compat.get() & !RO_COMPAT;
    let named = [
        (incompat::MMP, 0, "mmp"),
        (incompat::EA_INODE, 0, "ea_inode"),
        (incompat::INLINE_DATA, 0, "inline_data"),
        (incompat::ENCRYPT, 0, "encrypt"),
        (incompat::CASEFOLD, 0, "casefold"),
        (0, ro_compat::BIGALLOC, "bigalloc"),
        (0, ro_compat::READONLY, "read-only"),
        (0, ro_compat::SHARED_BLOCKS, "shared_blocks"),
        (0, ro_compat::VERITY, "verity"),
    ];
    let names: Vec<&str> = named
        .iter()
        .filter(|(one, other, _)| incompatible & one != 0 || others & other != 0)
        .map(|(_, _, name)| *name)
        .collect();
    if !names.is_empty() {
        return refuse(format!(
            "it has the feature {}, with which files can only be read here",
            names.join(", ")
        ));
    }
    let rest = others & !ro_compat::ORPHAN_PRESENT;
    if incompatible != 0 || rest != 0 {
        return refuse(format!("it has a feature that is not known here ({incompatible:#x}, {rest:#x})"));
    }
    if !superblock.has_compat(compat::HAS_JOURNAL) {
        return refuse(
            "it has no journal, without which a change cannot be made safely; `tune2fs -j` gives it one"
                .to_owned(),
        );
    }
    if superblock.journal_inum.get() == 0 {
        return refuse("its journal is on another device".to_owned());
    }
    if !superblock.has_incompat(incompat::FILETYPE) {
        return refuse("its directories do not tell types of files (the feature filetype)".to_owned());
    }
    if superblock.state.get() & state::ERRORS != 0 {
        return refuse("it has errors that the kernel found; repair it with e2fsck first".to_owned());
    }
    Ok(())
}

/// Files that were deleted while open are for the kernel or e2fsck to remove.
fn has_no_orphans(superblock: &Superblock) -> Result<()> {
    if superblock.last_orphan.get() != 0 || superblock.has_ro_compat(ro_compat::ORPHAN_PRESENT) {
        return Err(EditError::Refused(
            "it was not unmounted, and has files that were deleted while open; `e2fsck -p` or a mount removes them"
                .to_owned(),
        ));
    }
    Ok(())
}
