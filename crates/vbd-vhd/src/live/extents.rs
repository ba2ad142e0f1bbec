//! What a range of the disk consists of.

use vbd_core::ask::{Ask, ask};
use vbd_core::{Extent, ExtentKind, Operation, Result};

use super::channel::VhdChannel;
use super::map::{BlockState, Map};
use super::work::{Part, Placed};
use super::write::next_run;

/// The most extents in one answer.
const MOST_EXTENTS: usize = 1024;

impl VhdChannel {
    /// Extents from `offset` on, until there are many of them.
    pub(crate) async fn extents(&self, map: &Map, offset: u64, len: u64) -> Result<Vec<Extent>> {
        let (mut all, mut done) = (Vec::new(), 0);
        while done < len && all.len() < MOST_EXTENTS {
            let (block, within) = ((offset + done) / map.block_size, (offset + done) % map.block_size);
            let part = Part { block, within, len: (len - done).min(map.block_size - within), done };
            let added = self.block_extents(map, part, &mut all).await?;
            done += added;
            if added < part.len {
                break;
            }
        }
        if all.is_empty() {
            all.push(Extent { len, kind: ExtentKind::Data });
        }
        Ok(all)
    }

    /// Those of a part of a block: the bytes that they tell of, which may be fewer.
    async fn block_extents(&self, map: &Map, mut part: Part, all: &mut Vec<Extent>) -> Result<u64> {
        let content = match map.state(part.block) {
            BlockState::Damaged => return Err(map.damaged(part.block)),
            BlockState::Absent => return self.extents_below(map, part, all).await,
            BlockState::Full(content) | BlockState::Partial(content) => content,
        };
        match self.placed(map, part.block, content).await? {
            Placed::Full => self.extents_of_file(part, content, all).await,
            Placed::Partial(bitmap) => {
                let mut done = 0;
                while part.len > 0 && all.len() < MOST_EXTENTS {
                    let (there, run, rest) = next_run(&bitmap, part);
                    let added = match there {
                        true => self.extents_of_file(run, content, all).await?,
                        false => self.extents_below(map, run, all).await?,
                    };
                    done += added;
                    if added < run.len {
                        break;
                    }
                    part = rest;
                }
                Ok(done)
            }
        }
    }

    async fn extents_of_file(&self, part: Part, content: u64, all: &mut Vec<Extent>) -> Result<u64> {
        let look = Ask::new(Operation::Extents, content + part.within, part.len);
        let found = ask(&self.file, look, self.local.now()).await?;
        Ok(add(all, found, part.len))
    }

    async fn extents_below(&self, map: &Map, part: Part, all: &mut Vec<Extent>) -> Result<u64> {
        let offset = part.block * map.block_size + part.within;
        let (inside, beyond) = match &self.parent {
            Some((_, size)) => part.split(size.saturating_sub(offset)),
            None => part.split(0),
        };
        let mut done = 0;
        if let Some((parent, _)) = &self.parent
            && inside.len > 0
        {
            let look = Ask::new(Operation::Extents, offset, inside.len);
            let found = ask(parent, look, self.local.now()).await?;
            done = add(all, found, inside.len);
            if done < inside.len {
                return Ok(done);
            }
        }
        let hole = Extent { len: beyond.len, kind: ExtentKind::Hole };
        Ok(done + add(all, vec![hole], beyond.len))
    }
}

/// Adds extents of at most `most` bytes, joined with the last where they are alike: the bytes added.
fn add(all: &mut Vec<Extent>, found: Vec<Extent>, most: u64) -> u64 {
    let mut added = 0;
    for extent in found {
        let len = extent.len.min(most - added);
        added += len;
        match all.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.kind == extent.kind => last.len += len,
            _ => all.push(Extent { len, kind: extent.kind }),
        }
    }
    added
}
