//! Another header for an image, in place.
//!
//! A sector of 512 bytes is the most that storage promises to write whole, and a header with its extensions and the name
//! of the backing file is longer. So what lies beyond the first sector is never changed while the first sector needs it:
//! a header without feature names, which fits one sector, stands in between.

use std::io;

use crate::format::{self, Extension, Header};
use crate::storage::Storage;

/// What storage writes whole or not at all, in bytes.
const SECTOR: usize = 512;
/// The longest name of a backing file, rounded up to 8.
const NAME: usize = 1024;

/// Puts `new` in the place of `old`, which is what the image has now: after a power cut at any moment it has one or the
/// other, except that feature names (which programs only show) may be missing. Where clusters are smaller than 4 KiB, or
/// extensions longer than a sector, it is written at once, and storage with smaller blocks than that may tear it.
///
/// # Errors
/// The header does not fit the first cluster ([`io::ErrorKind::InvalidInput`]), or writing fails.
pub fn replace_header<S: Storage + ?Sized>(storage: &S, old: &Header, new: &Header) -> io::Result<()> {
    for step in header_steps(old, new)? {
        for (offset, bytes) in step {
            storage.write_all_at(offset as u64, &bytes)?;
        }
        storage.sync()?;
    }
    Ok(())
}

/// Writes that may be under way at once, by where they begin in the file.
pub(crate) type Step = Vec<(usize, Vec<u8>)>;

/// How `new` comes in the place of `old`, as [`replace_header`] does it: after each step comes a sync.
pub(crate) fn header_steps(old: &Header, new: &Header) -> io::Result<Vec<Step>> {
    let whole = new.encode_cluster().map_err(too_long)?;
    let (old_end, new_end) = (old.encode().map_err(too_long)?.len(), new.encode().map_err(too_long)?.len());
    let far = old_end.max(new_end).next_multiple_of(8).max(SECTOR);
    let between = first_sector(old, far)?.filter(|_| far + NAME <= whole.len());
    let Some(between) = between else { return Ok(vec![vec![(0, whole)]]) };
    let mut steps: Vec<Step> = Vec::new();
    // The old name, where nothing else is or will be.
    if let Some(name) = &old.backing {
        steps.push(vec![(far, name.clone())]);
    }
    steps.push(vec![(0, between)]);
    // Nobody needs the rest now.
    if far > SECTOR {
        steps.push(vec![(SECTOR, whole[SECTOR..far].to_vec())]);
    }
    steps.push(vec![(0, whole[..SECTOR].to_vec())]);
    // Nor the copy of the name.
    steps.push(vec![(far, whole[far..far + NAME].to_vec())]);
    Ok(steps)
}

fn too_long(error: format::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error.to_string())
}

/// The first sector of the same header without feature names, with the name of its backing file at `far`; none if that is
/// longer.
fn first_sector(header: &Header, far: usize) -> io::Result<Option<Vec<u8>>> {
    let mut header = header.clone();
    let name = header.backing.take();
    header.extensions.retain(|extension| !matches!(extension, Extension::FeatureNames(_)));
    let mut bytes = header.encode().map_err(too_long)?;
    if bytes.len() > SECTOR {
        return Ok(None);
    }
    if let Some(name) = name {
        let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
        bytes[8..16].copy_from_slice(&(far as u64).to_be_bytes());
        bytes[16..20].copy_from_slice(&length.to_be_bytes());
    }
    bytes.resize(SECTOR, 0);
    Ok(Some(bytes))
}

/// The same header with another backing file and its format, or with none.
pub fn with_backing(header: &Header, backing: Option<(&[u8], &str)>) -> Header {
    let mut header = header.clone();
    header.extensions.retain(|extension| !matches!(extension, Extension::BackingFormat(_)));
    header.backing = backing.map(|(name, _)| name.to_vec());
    if let Some((_, format)) = backing {
        header.extensions.insert(0, Extension::BackingFormat(format.as_bytes().to_vec()));
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Memory;
    use crate::storage::Source;
    use crate::{Backing, CreateOptions, create_in};
    use std::cell::RefCell;
    use vbd_image::ReadAt;

    /// What was written between two syncs: where, and what.
    type Step = Vec<(usize, Vec<u8>)>;

    /// Remembers what was written between syncs.
    struct Recorded {
        bytes: RefCell<Vec<u8>>,
        steps: RefCell<Vec<Step>>,
    }

    impl ReadAt for Recorded {
        fn fill_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
            self.bytes.borrow().as_slice().fill_at(offset, buffer)
        }
    }

    impl Source for Recorded {
        fn length(&self) -> io::Result<u64> {
            Ok(self.bytes.borrow().len() as u64)
        }
    }

    impl Storage for Recorded {
        fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            let at = usize::try_from(offset).unwrap();
            self.bytes.borrow_mut()[at..at + bytes.len()].copy_from_slice(bytes);
            self.steps.borrow_mut().last_mut().unwrap().push((at, bytes.to_vec()));
            Ok(())
        }

        fn sync(&self) -> io::Result<()> {
            self.steps.borrow_mut().push(Vec::new());
            Ok(())
        }

        fn set_len(&self, _length: u64) -> io::Result<()> {
            unreachable!("a header changes no length")
        }

        fn punch(&self, _offset: u64, _length: u64) -> io::Result<()> {
            unreachable!("a header has no holes")
        }
    }

    fn image(backing: Option<(&[u8], &str)>, cluster_size: u64) -> Vec<u8> {
        let backing =
            backing.map(|(name, format)| Backing { name: name.to_vec(), format: format.to_owned() });
        let options = CreateOptions { size: 1 << 20, cluster_size, backing, ..CreateOptions::default() };
        let memory = Memory::new(Vec::new(), 16 << 20);
        create_in(&memory, &options).unwrap();
        memory.into_bytes()
    }

    fn facts(header: &Header) -> (Option<Vec<u8>>, Option<Vec<u8>>, u64, u64) {
        let format = header.backing.as_ref().and(header.backing_format()).map(<[u8]>::to_vec);
        (header.backing.clone(), format, header.size, header.l1_offset)
    }

    /// Every sector of what was written last is there or not, in every combination.
    #[test]
    fn a_power_cut_at_any_moment_leaves_one_header_or_the_other() {
        let long = [b'x'; 1023];
        let all: [Option<(&[u8], &str)>; 5] = [
            None,
            Some((b"base.img", "raw")),
            Some((b"a/rather/long/name/of/a/file.qcow2", "qcow2")),
            Some((&long, "raw")),
            Some((&long[..300], "qcow2")),
        ];
        let mut checked = 0;
        for from in all {
            for to in all {
                let before = image(from, 65_536);
                let old = Header::read(&before[..]).unwrap();
                let new = with_backing(&old, to);
                let recorded =
                    Recorded { bytes: RefCell::new(before.clone()), steps: RefCell::new(vec![Vec::new()]) };
                replace_header(&recorded, &old, &new).unwrap();
                assert_eq!(Header::read(&recorded).unwrap(), new);
                let end = new.encode().unwrap().len();
                assert!(
                    recorded.bytes.borrow()[end..65_536].iter().all(|byte| *byte == 0),
                    "{from:?} {to:?}"
                );

                let mut durable = before;
                for step in recorded.steps.borrow().iter() {
                    let sectors: Vec<(usize, &[u8])> = step
                        .iter()
                        .flat_map(|(at, bytes)| {
                            bytes.chunks(SECTOR).enumerate().map(move |(n, piece)| (at + n * SECTOR, piece))
                        })
                        .collect();
                    assert!(sectors.len() < 8, "few enough to try all");
                    for chosen in 0..1u32 << sectors.len() {
                        let mut cut = durable.clone();
                        for (n, (at, piece)) in sectors.iter().enumerate() {
                            if chosen & (1 << n) != 0 {
                                cut[*at..at + piece.len()].copy_from_slice(piece);
                            }
                        }
                        let found = facts(&Header::read(&cut[..]).unwrap());
                        assert!(
                            found == facts(&old) || found == facts(&new),
                            "{from:?} -> {to:?}: {found:?}"
                        );
                        checked += 1;
                    }
                    for (at, piece) in sectors {
                        durable[at..at + piece.len()].copy_from_slice(piece);
                    }
                }
            }
        }
        assert!(checked > 200, "{checked}");
    }

    #[test]
    fn small_clusters_take_it_at_once_or_say_that_it_does_not_fit() {
        let before = image(None, 1024);
        let old = Header::read(&before[..]).unwrap();
        let memory = Memory::new(before, 16 << 20);
        replace_header(&memory, &old, &with_backing(&old, Some((b"base", "raw")))).unwrap();
        let now = Header::read(&memory.to_bytes()[..]).unwrap();
        assert_eq!(now.backing.as_deref(), Some(&b"base"[..]));
        let too_long = with_backing(&now, Some((&[b'x'; 1000], "raw")));
        let refused = replace_header(&memory, &now, &too_long).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(Header::read(&memory.to_bytes()[..]).unwrap(), now);
    }
}
