//! The header, tables, and what they map.
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

use std::io::Read;

use super::{Bitmap, COMPRESSED, Header, Image, OFFSET, Result, Snapshot, incompatible};

/// Reads whole integers from a place that may lie beyond the end.
pub(super) fn bytes(from: &[u8], offset: u64, len: u64) -> Result<&[u8]> {
    let end = offset.checked_add(len).filter(|end| *end <= from.len() as u64);
    let end =
        end.ok_or_else(|| format!("{len} bytes at {offset:#x} are beyond the end ({:#x})", from.len()))?;
    Ok(&from[offset as usize..end as usize])
}

pub(super) fn u64_at(from: &[u8], offset: u64) -> Result<u64> {
    Ok(u64::from_be_bytes(bytes(from, offset, 8)?.try_into().expect("eight")))
}

pub(super) fn u32_at(from: &[u8], offset: u64) -> Result<u32> {
    Ok(u32::from_be_bytes(bytes(from, offset, 4)?.try_into().expect("four")))
}

fn u16_at(from: &[u8], offset: u64) -> Result<u64> {
    Ok(u64::from(u16::from_be_bytes(bytes(from, offset, 2)?.try_into().expect("two"))))
}

fn text(from: &[u8], offset: u64, len: u64) -> Result<String> {
    Ok(String::from_utf8_lossy(bytes(from, offset, len)?).into_owned())
}

/// What an L2 entry says of a cluster.
pub(super) enum Mapping {
    Standard { host: u64, zero: bool, subclusters: Option<u64> },
    Compressed { host: u64, sectors: u64 },
}

impl<'a> Image<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// It is none.
    pub fn new(bytes: &'a [u8]) -> Result<Self> {
        let (u32, u64) = (|offset| u32_at(bytes, offset), |offset| u64_at(bytes, offset));
        if u32(0)? != 0x5146_49fb {
            return Err("no qcow2 magic".into());
        }
        let version = u32(4)?;
        let new = version >= 3;
        let length = if new { u64::from(u32(100)?) } else { 72 };
        let backing_file = match u64(8)? {
            0 => None,
            offset => Some(text(bytes, offset, u64::from(u32(16)?))?),
        };
        let mut extensions = Vec::new();
        let mut at = length;
        loop {
            let (kind, len) = (u32(at)?, u32(at + 4)?);
            if kind == 0 {
                break;
            }
            extensions.push((kind, self::bytes(bytes, at + 8, u64::from(len))?.to_vec()));
            at += 8 + u64::from(len).next_multiple_of(8);
        }
        let header = Header {
            version,
            backing_file,
            cluster_bits: u32(20)?,
            size: u64(24)?,
            l1_size: u32(36)?,
            l1_table_offset: u64(40)?,
            refcount_table_offset: u64(48)?,
            refcount_table_clusters: u32(56)?,
            nb_snapshots: u32(60)?,
            snapshots_offset: u64(64)?,
            incompatible: if new { u64(72)? } else { 0 },
            compatible: if new { u64(80)? } else { 0 },
            autoclear: if new { u64(88)? } else { 0 },
            refcount_order: if new { u32(96)? } else { 4 },
            compression_type: if length > 104 { bytes[104] } else { 0 },
            extensions,
        };
        Ok(Image { bytes, header })
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    /// Whether a cluster of this offset may lie in this file as far as bits tell.
    pub(super) fn has(&self, bit: u64) -> bool {
        self.header.incompatible & bit != 0
    }

    /// All of the file.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Bytes of an L2 entry.
    fn entry(&self) -> u64 {
        if self.has(incompatible::EXTENDED_L2) { 16 } else { 8 }
    }

    pub(super) fn l2_entries(&self) -> u64 {
        self.cluster() / self.entry()
    }

    /// The entries of an L1 table.
    pub(super) fn l1(&self, (offset, entries): (u64, u32)) -> Result<Vec<u64>> {
        (0..u64::from(entries)).map(|index| u64_at(self.bytes, offset + index * 8)).collect()
    }

    pub(super) fn active_l1(&self) -> (u64, u32) {
        (self.header.l1_table_offset, self.header.l1_size)
    }

    /// An L2 entry as it is, and what it says.
    pub(super) fn l2(&self, table: u64, index: u64) -> Result<(u64, Mapping)> {
        let at = table + index * self.entry();
        let entry = u64_at(self.bytes, at)?;
        if entry & COMPRESSED != 0 {
            let split = 62 - (self.header.cluster_bits - 8);
            let host = entry & ((1 << split) - 1);
            let sectors = ((entry & !(3 << 62)) >> split) + 1;
            return Ok((entry, Mapping::Compressed { host, sectors }));
        }
        let subclusters =
            if self.has(incompatible::EXTENDED_L2) { Some(u64_at(self.bytes, at + 8)?) } else { None };
        let zero = subclusters.is_none() && entry & 1 != 0;
        Ok((entry, Mapping::Standard { host: entry & OFFSET, zero, subclusters }))
    }

    /// What the disk holds. `backing` fills a buffer from an offset of the disk on with what is below; `data` is the
    /// external data file.
    ///
    /// # Errors
    /// A table or cluster is not where it should be.
    pub fn content(&self, backing: &dyn Fn(u64, &mut [u8]), data: Option<&[u8]>) -> Result<Vec<u8>> {
        self.content_of(self.active_l1(), self.header.size, backing, data)
    }

    /// The same for a snapshot.
    ///
    /// # Errors
    /// As [`content`](Self::content).
    pub fn content_of(
        &self,
        l1: (u64, u32),
        size: u64,
        backing: &dyn Fn(u64, &mut [u8]),
        data: Option<&[u8]>,
    ) -> Result<Vec<u8>> {
        let l1 = self.l1(l1)?;
        let mut content = vec![0; size as usize];
        for (index, piece) in (0..).zip(content.chunks_mut(self.cluster() as usize)) {
            let guest = index * self.cluster();
            let table = l1.get((index / self.l2_entries()) as usize).copied().unwrap_or(0) & OFFSET;
            if table == 0 {
                backing(guest, piece);
                continue;
            }
            let (_, mapping) = self.l2(table, index % self.l2_entries())?;
            let put = |backing: &dyn Fn(u64, &mut [u8]), piece: &mut [u8]| {
                self.fill(&mapping, guest, piece, backing, data)
            };
            put(backing, piece).map_err(|error| format!("guest {guest:#x}: {error}"))?;
        }
        Ok(content)
    }

    fn fill(
        &self,
        mapping: &Mapping,
        guest: u64,
        piece: &mut [u8],
        backing: &dyn Fn(u64, &mut [u8]),
        data: Option<&[u8]>,
    ) -> Result<()> {
        // What lies beyond the end of a file reads as zeroes.
        let read = |host: u64, piece: &mut [u8]| {
            let from = data.unwrap_or(self.bytes);
            let start = (host as usize).min(from.len());
            let len = piece.len().min(from.len() - start);
            piece[..len].copy_from_slice(&from[start..start + len]);
            piece[len..].fill(0);
        };
        match *mapping {
            Mapping::Compressed { host, sectors } => {
                let most = host / 512 * 512 + sectors * 512 - host;
                let most = most.min((self.bytes.len() as u64).saturating_sub(host));
                let whole = self.inflate(bytes(self.bytes, host, most)?)?;
                piece.copy_from_slice(&whole[..piece.len()]);
            }
            Mapping::Standard { zero: true, .. } => piece.fill(0),
            Mapping::Standard { host, subclusters: None, .. } => {
                if host == 0 && (data.is_none() || !self.is_at_zero(guest)) {
                    backing(guest, piece);
                } else {
                    read(host, piece);
                }
            }
            Mapping::Standard { host, subclusters: Some(bits), .. } => {
                let len = self.cluster() / 32;
                for (index, part) in (0..).zip(piece.chunks_mut(len as usize)) {
                    match (bits >> index & 1, bits >> (32 + index) & 1) {
                        (1, 1) => return Err("a subcluster that is data and zero".into()),
                        (1, _) => read(host + index * len, part),
                        (_, 1) => part.fill(0),
                        _ => backing(guest + index * len, part),
                    }
                }
            }
        }
        Ok(())
    }

    /// Whether offset 0 of a data file is data: the entry of this cluster says so by its COPIED flag.
    fn is_at_zero(&self, guest: u64) -> bool {
        let index = guest / self.cluster();
        let table = self
            .l1(self.active_l1())
            .ok()
            .and_then(|l1| l1.get((index / self.l2_entries()) as usize).copied());
        let Some(table) = table.map(|entry| entry & OFFSET).filter(|table| *table != 0) else { return false };
        self.l2(table, index % self.l2_entries()).is_ok_and(|(entry, _)| entry & super::COPIED != 0)
    }

    fn inflate(&self, from: &[u8]) -> Result<Vec<u8>> {
        let mut whole = vec![0; self.cluster() as usize];
        let failed = |error: std::io::Error| format!("a compressed cluster: {error}");
        match self.header.compression_type {
            0 => flate2::read::DeflateDecoder::new(from).read_exact(&mut whole).map_err(failed)?,
            1 => zstd::Decoder::new(from).and_then(|mut from| from.read_exact(&mut whole)).map_err(failed)?,
            other => return Err(format!("compression type {other}")),
        }
        Ok(whole)
    }

    /// The internal snapshots, and where their table ends.
    ///
    /// # Errors
    /// The table is not where it should be.
    pub fn snapshots(&self) -> Result<(Vec<Snapshot>, u64)> {
        let mut at = self.header.snapshots_offset;
        let mut snapshots = Vec::new();
        for _ in 0..self.header.nb_snapshots {
            let from = self.bytes;
            let l1 = (u64_at(from, at)?, u32_at(from, at + 8)?);
            let (id, name) = (u16_at(from, at + 12)?, u16_at(from, at + 14)?);
            let extra = u64::from(u32_at(from, at + 36)?);
            let size = if extra >= 16 { u64_at(from, at + 48)? } else { self.header.size };
            let texts = at + 40 + extra;
            snapshots.push(Snapshot {
                id: text(from, texts, id)?,
                name: text(from, texts + id, name)?,
                size,
                l1,
            });
            at = (texts + id + name).next_multiple_of(8);
        }
        Ok((snapshots, at))
    }

    /// The persistent bitmaps.
    ///
    /// # Errors
    /// A table is not where it should be.
    pub fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        let Some((offset, _)) = self.bitmap_directory()? else { return Ok(Vec::new()) };
        let extension = self.extension(0x2385_2875).expect("it has a directory");
        let from = self.bytes;
        let mut at = offset;
        let mut bitmaps = Vec::new();
        for _ in 0..u32_at(extension, 0)? {
            let table = (u64_at(from, at)?, u32_at(from, at + 8)?);
            let name = u16_at(from, at + 18)?;
            let extra = u64::from(u32_at(from, at + 20)?);
            let granularity = 1 << bytes(from, at + 17, 1)?[0];
            bitmaps.push(Bitmap {
                name: text(from, at + 24 + extra, name)?,
                flags: u32_at(from, at + 12)?,
                granularity,
                bits: self.bits(table, self.header.size.div_ceil(granularity))?,
                table,
            });
            at = (at + 24 + extra + name).next_multiple_of(8);
        }
        Ok(bitmaps)
    }

    fn bits(&self, table: (u64, u32), count: u64) -> Result<Vec<bool>> {
        let mut bits = Vec::new();
        for entry in self.bitmap_table(table)? {
            let whole = match (entry & OFFSET, entry & 1) {
                (0, ones) => vec![if ones == 1 { 0xff } else { 0 }; self.cluster() as usize],
                (offset, _) => bytes(self.bytes, offset, self.cluster())?.to_vec(),
            };
            bits.extend(whole.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1)));
        }
        bits.truncate(count as usize);
        Ok(bits)
    }

    pub(super) fn bitmap_table(&self, (offset, entries): (u64, u32)) -> Result<Vec<u64>> {
        (0..u64::from(entries)).map(|index| u64_at(self.bytes, offset + index * 8)).collect()
    }

    pub(super) fn extension(&self, kind: u32) -> Option<&[u8]> {
        self.header.extensions.iter().find(|(found, _)| *found == kind).map(|(_, data)| &data[..])
    }

    /// Where the directory of bitmaps is and its bytes.
    pub(super) fn bitmap_directory(&self) -> Result<Option<(u64, u64)>> {
        match self.extension(0x2385_2875) {
            Some(extension) if self.header.autoclear & 1 != 0 => {
                Ok(Some((u64_at(extension, 16)?, u64_at(extension, 8)?)))
            }
            _ => Ok(None),
        }
    }
}

impl Bitmap {
    pub(super) fn table(&self) -> (u64, u32) {
        self.table
    }
}
