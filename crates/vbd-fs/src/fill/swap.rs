//! A file for swapping: swapon(8) takes one without holes alone, so it has blocks where others have none.

use super::blocks::{PIECE, Piece, SIZE};
use super::store::{Allocate, Store, assign};
use super::verify;
use crate::digest::Origin;
use crate::disk::swap;
use crate::entry::{Meta, Time};
use crate::plan::{BLOCK, Body, Data, Gather, Plan};
use crate::{Error, Result, tailor};

/// Its name in the root.
const NAME: &str = "swapfile";

/// Adds one of `size` bytes to a tree, and a line to its fstab.
///
/// # Errors
///
/// When a directory has its name, or fstab cannot be changed.
pub(super) fn add(gather: &mut Gather<'_>, size: u64, now: Time) -> Result<()> {
    let size = size - size % BLOCK;
    let uuid = Origin::new(&size.to_le_bytes()).uuid("swap file");
    let meta = Meta { mode: 0o600, uid: 0, gid: 0, mtime: now };
    gather.reserve(NAME, meta, size, &swap::header(size, uuid, None))?;
    tailor::add_swap_file(gather, &format!("/{NAME}"))
}

/// Gives it its blocks, which are zeros in the image already unless somebody had them before. Where there is no room for them, the store counts them.
///
/// # Errors
///
/// Those of writing.
pub(super) fn place<A: Allocate>(plan: &mut Plan, store: &mut Store<A>) -> Result<()> {
    let found = plan.lookup(plan.root(), NAME.as_bytes()).map(|name| plan.target(name));
    let Some((node, Body::File { size, data: Data::Reserved(start) })) =
        found.map(|node| (node, &plan.node(node).body))
    else {
        return Ok(());
    };
    let too_large = || Error::Invalid("the swap file is larger than a file can be".to_owned());
    let count = u32::try_from(size / BLOCK).map_err(|_| too_large())?;
    let pieces = [Piece { logical: 0, count }];
    store.note_part(crc32c::crc32c(start), &pieces);
    let mut runs = Vec::new();
    if let Some(extents) = store.allocate(count.into())? {
        if store.allocator.gives_again() {
            let zeros = vec![0; PIECE];
            for &(start, count) in &extents {
                for at in (0..count).step_by(PIECE / SIZE) {
                    let blocks = usize::try_from(count - at).unwrap_or(usize::MAX).min(PIECE / SIZE);
                    store.write(start + at, &zeros[..blocks * SIZE])?;
                }
            }
        }
        assign(&pieces, &mut extents.into_iter(), &mut (0, 0), &mut runs);
    }
    if let Some(first) = runs.first() {
        store.write(first.block, start)?;
    }
    if store.sums.is_some() {
        let mut bytes = vec![0; PIECE];
        bytes[..start.len()].copy_from_slice(start);
        let mut sum = 0;
        for logical in (0..count).step_by(PIECE / SIZE) {
            let count = (count - logical).min(u32::try_from(PIECE / SIZE).unwrap_or(1));
            sum = verify::sum(sum, &bytes, &[Piece { logical, count }]);
            bytes[..SIZE].fill(0);
        }
        store.keep_sum(&runs, sum);
    }
    let data = store.data(&runs);
    if let Some((_, old)) = plan.file_mut(node) {
        *old = data;
    }
    Ok(())
}
