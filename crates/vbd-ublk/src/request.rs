//! A driver's descriptor made into what is asked of the disk.

use vbd_core::{Operation, SECTOR};

use crate::abi::{Descriptor, op};

/// One operation on the disk. Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) operation: Operation,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) fua: bool,
    pub(crate) may_unmap: bool,
}

impl Part {
    /// How much of the tag's buffer this reads or fills.
    pub(crate) fn data(&self) -> u64 {
        match self.operation {
            Operation::Read | Operation::Write => self.len,
            _ => 0,
        }
    }
}

/// What a descriptor asks for, with reads and writes of `max_io` bytes at most. The kernel is trusted, and still nothing
/// outside the buffer is touched on its word; whether the range is on the disk is the disk's to say.
///
/// # Errors
/// The errno to answer with.
pub(crate) fn decode(descriptor: Descriptor, max_io: u32) -> Result<Part, i32> {
    let flags = descriptor.op_flags;
    let operation = match u8::try_from(flags & 0xff).unwrap_or(u8::MAX) {
        op::READ => Operation::Read,
        op::WRITE => Operation::Write,
        op::FLUSH => Operation::Flush,
        op::DISCARD => Operation::Discard,
        op::WRITE_ZEROES => Operation::WriteZeroes,
        _ => return Err(libc::EOPNOTSUPP),
    };
    if operation == Operation::Flush {
        return Ok(Part { operation, offset: 0, len: 0, fua: false, may_unmap: false });
    }
    let len = u64::from(descriptor.sectors) * SECTOR;
    let offset = descriptor.start.checked_mul(SECTOR).ok_or(libc::EINVAL)?;
    let part = Part {
        operation,
        offset,
        len,
        fua: operation.is_write() && flags & op::FUA != 0,
        may_unmap: operation == Operation::WriteZeroes && flags & op::NO_UNMAP == 0,
    };
    if offset.checked_add(len).is_none() || part.data() > u64::from(max_io) {
        return Err(libc::EINVAL);
    }
    Ok(part)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(op_flags: u32, sectors: u32, start: u64) -> Result<Part, i32> {
        decode(Descriptor { op_flags, sectors, start }, 1 << 19)
    }

    #[test]
    fn operations_and_their_flags() {
        let read = of(0, 8, 16).expect("a read");
        assert_eq!((read.operation, read.offset, read.len), (Operation::Read, 8192, 4096));
        assert!(of(1 | op::FUA, 8, 0).expect("a write").fua);
        assert!(!of(op::FUA, 8, 0).expect("a read").fua);
        assert_eq!(of(2, 99, 99).expect("a flush").len, 0);
        assert!(of(5, 8, 0).expect("zeroes").may_unmap);
        assert!(!of(5 | op::NO_UNMAP, 8, 0).expect("zeroes").may_unmap);
        // Longer than any buffer, and without data.
        assert_eq!(of(3, u32::MAX, 0).expect("a discard").data(), 0);
        assert_eq!(of(4, 1, 0), Err(libc::EOPNOTSUPP));
    }

    proptest! {
        #[test]
        fn no_request_is_longer_than_its_buffer(op_flags: u32, sectors: u32, start: u64, max_io: u32) {
            if let Ok(part) = decode(Descriptor { op_flags, sectors, start }, max_io) {
                prop_assert!(part.data() <= u64::from(max_io));
                prop_assert!(part.offset.checked_add(part.len).is_some());
                prop_assert_eq!((part.offset % SECTOR, part.len % SECTOR), (0, 0));
            }
        }
    }
}
