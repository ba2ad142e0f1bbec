//! Reads that are not one run of one file: cut into parts, all of which are under way at once.

use std::rc::Rc;

use vbd_core::memory::{slice, zero};
use vbd_core::{Guard, IoVec, Operation, Request, Result};

use super::channel::Qcow2Channel;
use super::io::{Part, all, bytes};
use super::map::Span;

/// Memory that a read fills: pieces, and what keeps them.
pub(super) struct Target {
    pub(super) memory: Vec<IoVec>,
    pub(super) guard: Option<Guard>,
}

impl Target {
    /// `len` bytes after the first `skip`.
    pub(super) fn part(&self, skip: u64, len: u64) -> Vec<IoVec> {
        slice(&self.memory, bytes(skip), bytes(len), usize::MAX).0
    }

    fn zero(&self, skip: u64, len: u64) {
        // SAFETY: the guard keeps the memory valid.
        unsafe { zero(&self.memory, bytes(skip), bytes(len)) };
    }
}

impl Qcow2Channel {
    pub(super) fn read_slowly(self: Rc<Self>, request: Request) {
        self.work(request, async |this, request| {
            let target = Target { memory: std::mem::take(&mut request.memory), guard: request.guard.clone() };
            let result = this.read_range(request.offset, request.len, &target).await;
            request.memory = target.memory;
            result
        });
    }

    /// Reads a range of the disk into memory.
    pub(super) async fn read_range(&self, offset: u64, len: u64, target: &Target) -> Result<()> {
        let mut parts = Vec::new();
        let result = self.start_parts(offset, len, target, &mut parts).await;
        // Whatever happened: the memory is in use until the last of them has ended.
        let ended = all(parts).await;
        result.and(ended)
    }

    async fn start_parts(&self, offset: u64, len: u64, target: &Target, parts: &mut Vec<Part>) -> Result<()> {
        let (l1, mut done) = (self.l1(), 0);
        while done < len {
            let (span, part) = self.image.span(&self.io, &l1, offset + done, len - done).await?;
            match span {
                Span::Data { host, .. } => self.start_data(host, (done, part), target, parts),
                Span::Zero { .. } => target.zero(done, part),
                Span::Below => self.start_below(offset, (done, part), target, parts),
                Span::Compressed { cluster, skip } => {
                    self.read_compressed(cluster, skip, (done, part), target).await?
                }
                Span::Bad(error) => return Err(self.image.corrupted(&self.io, &error.to_string())),
            }
            done += part;
        }
        Ok(())
    }

    /// Guest clusters; what is missing of the last one of a file that was cut off reads as zeroes.
    fn start_data(&self, host: u64, (skip, len): (u64, u64), target: &Target, parts: &mut Vec<Part>) {
        let end = if self.image.data_file.is_some() { u64::MAX } else { self.image.backend.size() };
        let there = end.saturating_sub(host).min(len);
        target.zero(skip + there, len - there);
        if there > 0 {
            let (memory, guard) = (target.part(skip, there), target.guard.clone());
            parts.push(Box::pin(self.io.transfer(&self.io.data, Operation::Read, host, memory, guard)));
        }
    }

    /// What the image behind has, and zeroes where that ends.
    pub(super) fn start_below(
        &self,
        offset: u64,
        (skip, len): (u64, u64),
        target: &Target,
        parts: &mut Vec<Part>,
    ) {
        let there = self.image.backing_size().saturating_sub(offset + skip).min(len);
        target.zero(skip + there, len - there);
        if let Some(backing) = self.below().filter(|_| there > 0) {
            let (memory, guard) = (target.part(skip, there), target.guard.clone());
            parts.push(Box::pin(self.io.transfer(&backing, Operation::Read, offset + skip, memory, guard)));
        }
    }
}
