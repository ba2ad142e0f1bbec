//! References counted, and compared with the refcounts.
#![allow(clippy::cast_possible_truncation, reason = "images of tests are small")]

use std::collections::BTreeMap;

use super::read::{Mapping, u64_at};
use super::{COPIED, Image, OFFSET, Result, incompatible};

/// What a check has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What makes reading or writing wrong.
    pub errors: Vec<String>,
    /// Clusters that are lost until a repair.
    pub leaks: u64,
}

struct Counting<'a> {
    image: &'a Image<'a>,
    references: Vec<u64>,
    report: Report,
    /// What metadata lies where: nothing else may.
    metadata: BTreeMap<u64, &'static str>,
}

impl Image<'_> {
    /// Counts what refers to each cluster and compares.
    pub fn check(&self) -> Report {
        let clusters = (self.bytes().len() as u64).div_ceil(self.cluster());
        let mut counting = Counting {
            image: self,
            references: vec![0; clusters as usize],
            report: Report::default(),
            metadata: BTreeMap::new(),
        };
        if let Err(error) = counting.all() {
            counting.report.errors.push(error);
        }
        counting.report
    }
}

impl Counting<'_> {
    fn all(&mut self) -> Result<()> {
        let image = self.image;
        let header = &image.header;
        let cluster = image.cluster();
        if image.has(incompatible::CORRUPT) {
            self.report.errors.push("the corrupt bit is set".into());
        }
        self.metadata("the header", 0, cluster);
        let table = u64::from(header.refcount_table_clusters) * cluster;
        self.metadata("the refcount table", header.refcount_table_offset, table);
        let blocks = self.blocks()?;
        for block in blocks.iter().filter(|block| **block != 0) {
            if block & 511 != 0 {
                self.report.errors.push(format!("reserved bits in refcount table entry {block:#x}"));
            }
            self.metadata("a refcount block", block & !511, cluster);
        }
        let (snapshots, end) = image.snapshots()?;
        if header.nb_snapshots > 0 {
            let start = header.snapshots_offset;
            self.metadata("the snapshot table", start, end - start);
        }
        self.bitmaps()?;
        if let Some(crypto) = image.extension(0x0537_be77) {
            self.metadata("the crypto header", u64_at(crypto, 0)?, u64_at(crypto, 8)?);
        }
        let mut tables = Vec::new();
        for snapshot in &snapshots {
            tables.extend(self.l1("a snapshot's L1 table", snapshot.l1)?);
        }
        tables.extend(self.l1("the L1 table", image.active_l1())?);
        // All metadata is known now. Tables that several L1 tables share count for each, and so does what they map.
        for table in tables {
            self.l2(table)?;
        }
        self.copied()?;
        for (index, references) in (0..).zip(std::mem::take(&mut self.references)) {
            let refcount = self.refcount(index)?;
            if refcount < references {
                let message = format!("cluster {index} has refcount {refcount} and {references} references");
                self.report.errors.push(message);
            } else if refcount > references {
                self.report.leaks += 1;
            }
        }
        Ok(())
    }

    /// Counts a range once; metadata has its clusters for itself.
    fn metadata(&mut self, what: &'static str, offset: u64, len: u64) {
        let cluster = self.image.cluster();
        for at in (offset / cluster * cluster..offset + len).step_by(cluster as usize) {
            if let Some(other) = self.metadata.insert(at, what) {
                self.report.errors.push(format!("{what} and {other} are both at {at:#x}"));
            }
        }
        if !offset.is_multiple_of(cluster) {
            self.report.errors.push(format!("{what} at {offset:#x} is not aligned"));
        }
        self.count(what, offset, len);
    }

    fn count(&mut self, what: &str, offset: u64, len: u64) {
        let cluster = self.image.cluster();
        if len == 0 {
            return;
        }
        for index in offset / cluster..=(offset + len - 1) / cluster {
            match self.references.get_mut(index as usize) {
                Some(count) => *count += 1,
                None => {
                    self.report.errors.push(format!("{what} at {offset:#x} is beyond the end of the file"))
                }
            }
        }
    }

    fn blocks(&self) -> Result<Vec<u64>> {
        let header = &self.image.header;
        let entries = u64::from(header.refcount_table_clusters) * self.image.cluster() / 8;
        (0..entries)
            .map(|index| u64_at(self.image.bytes(), header.refcount_table_offset + index * 8))
            .collect()
    }

    fn bitmaps(&mut self) -> Result<()> {
        let Some((offset, len)) = self.image.bitmap_directory()? else { return Ok(()) };
        self.metadata("the bitmap directory", offset, len);
        for bitmap in self.image.bitmaps()? {
            let (offset, entries) = bitmap.table();
            self.metadata("a bitmap's table", offset, u64::from(entries) * 8);
            for entry in self.image.bitmap_table(bitmap.table())? {
                if entry & OFFSET != 0 {
                    self.metadata("a bitmap's data", entry & OFFSET, self.image.cluster());
                }
            }
        }
        Ok(())
    }

    /// Counts an L1 table and its L2 tables, which it gives.
    fn l1(&mut self, what: &'static str, l1: (u64, u32)) -> Result<Vec<u64>> {
        const L2: &str = "an L2 table";
        let image = self.image;
        self.metadata(what, l1.0, u64::from(l1.1) * 8);
        let entries = image.l1(l1)?;
        for entry in entries.iter().filter(|entry| **entry & !(OFFSET | COPIED) != 0) {
            self.report.errors.push(format!("reserved bits in L1 entry {entry:#x}"));
        }
        let tables: Vec<u64> =
            entries.iter().map(|entry| entry & OFFSET).filter(|table| *table != 0).collect();
        for table in &tables {
            if self.metadata.get(table) == Some(&L2) {
                self.count(L2, *table, image.cluster());
            } else {
                self.metadata(L2, *table, image.cluster());
            }
        }
        Ok(tables)
    }

    /// Counts what an L2 table maps.
    fn l2(&mut self, table: u64) -> Result<()> {
        let image = self.image;
        let outside = image.has(incompatible::DATA_FILE);
        // Bit 0 is the zero flag, where there are no subclusters.
        let flags = if image.has(incompatible::EXTENDED_L2) { COPIED } else { COPIED | 1 };
        for index in 0..image.l2_entries() {
            let (entry, mapping) = image.l2(table, index)?;
            if matches!(mapping, Mapping::Standard { .. }) && entry & !(OFFSET | flags) != 0 {
                self.report.errors.push(format!("reserved bits in L2 entry {entry:#x}"));
            }
            match mapping {
                Mapping::Compressed { host, sectors } => {
                    let len = host / 512 * 512 + sectors * 512 - host;
                    let inside = len.min((image.bytes().len() as u64).saturating_sub(host));
                    self.data(host, inside.max(1), false);
                }
                Mapping::Standard { subclusters: Some(bits), .. }
                    if bits as u32 & (bits >> 32) as u32 != 0 =>
                {
                    self.report.errors.push(format!("subclusters are data and zero ({bits:#x})"));
                }
                Mapping::Standard { host: 0, subclusters: Some(bits), .. }
                    if bits as u32 != 0 && !outside =>
                {
                    self.report.errors.push("subclusters are data in a cluster that is nowhere".into());
                }
                Mapping::Standard { host: 0, .. } => {}
                Mapping::Standard { host, .. } if !outside => self.data(host, image.cluster(), true),
                Mapping::Standard { .. } => {}
            }
        }
        Ok(())
    }

    fn data(&mut self, host: u64, len: u64, aligned: bool) {
        let cluster = self.image.cluster();
        if aligned && !host.is_multiple_of(cluster) {
            self.report.errors.push(format!("data at {host:#x} is not aligned"));
        }
        for at in (host / cluster * cluster..host + len).step_by(cluster as usize) {
            if let Some(other) = self.metadata.get(&at) {
                self.report.errors.push(format!("data lies at {at:#x} on {other}"));
            }
        }
        self.count("data", host, len);
    }

    /// COPIED is set in the active tables exactly where the refcount is one.
    fn copied(&mut self) -> Result<()> {
        let image = self.image;
        for entry in image.l1(image.active_l1())? {
            let table = entry & OFFSET;
            if table == 0 {
                continue;
            }
            self.is_copied("L1", entry, table)?;
            for index in 0..image.l2_entries() {
                match image.l2(table, index)? {
                    (entry, Mapping::Standard { host, .. })
                        if host != 0 && !image.has(incompatible::DATA_FILE) =>
                    {
                        self.is_copied("L2", entry, host)?;
                    }
                    (entry, Mapping::Compressed { .. }) if entry & COPIED != 0 => {
                        self.report.errors.push("COPIED on a compressed cluster".into());
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn is_copied(&mut self, what: &str, entry: u64, host: u64) -> Result<()> {
        let refcount = self.refcount(host / self.image.cluster())?;
        if (entry & COPIED != 0) != (refcount == 1) {
            let message = format!("COPIED is wrong in {what} entry {entry:#x}: refcount {refcount}");
            self.report.errors.push(message);
        }
        Ok(())
    }

    fn refcount(&self, index: u64) -> Result<u64> {
        let header = &self.image.header;
        let bits = 1u64 << header.refcount_order;
        let entries = self.image.cluster() * 8 / bits;
        let table = u64::from(header.refcount_table_clusters) * self.image.cluster() / 8;
        if index / entries >= table {
            return Ok(0);
        }
        let raw = self.image.bytes();
        let block = u64_at(raw, header.refcount_table_offset + index / entries * 8)? & !511;
        if block == 0 {
            return Ok(0);
        }
        let at = index % entries;
        let from = super::read::bytes(raw, block, self.image.cluster())?;
        Ok(if bits < 8 {
            u64::from(from[(at * bits / 8) as usize]) >> (at * bits % 8) & ((1 << bits) - 1)
        } else {
            let bytes = (bits / 8) as usize;
            from[at as usize * bytes..][..bytes].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
        })
    }
}
