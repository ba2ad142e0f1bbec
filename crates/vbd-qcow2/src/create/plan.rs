//! Where everything goes in a new image: the header, the refcount table and its blocks, the L1 table, the LUKS header, and
//! where room is set aside L2 tables and data.

use std::os::unix::ffi::OsStrExt;

use super::CreateError;
use super::options::{CreateOptions, Preallocation, Version};
use crate::format::{
    Compression, CryptoHeader, Encryption, Extension, Header, Layout, RefcountWidth, autoclear, compatible,
    feature_table, incompatible, limit,
};

/// Bytes of a new header: a byte more than the fixed fields of version 3, padded.
const HEADER_V3: u32 = 112;
const HEADER_V2: u32 = 72;

/// Where everything goes. Offsets and lengths are in bytes, and all but the size are whole clusters.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) layout: Layout,
    /// Of the virtual disk.
    pub(super) size: u64,
    pub(super) table_clusters: u32,
    pub(super) blocks_start: u64,
    /// Refcount blocks.
    pub(super) blocks: u64,
    pub(super) l1_start: u64,
    pub(super) l1_entries: u32,
    pub(super) luks_start: u64,
    pub(super) l2_start: u64,
    /// L2 tables: all that there can be, or none.
    pub(super) l2_tables: u64,
    /// Where guest data begins: 0 in an external data file.
    pub(super) data_start: u64,
    pub(super) data_bytes: u64,
    /// Of the image.
    pub(super) end: u64,
}

/// Clusters of the refcount table and refcount blocks that count `others` clusters, themselves and the header.
pub(super) fn refcount_clusters(layout: &Layout, others: u64) -> (u64, u64) {
    let (mut table, mut blocks) = (1u64, 1u64);
    loop {
        let all = others.saturating_add(table).saturating_add(blocks);
        let need_blocks = all.div_ceil(layout.refcount_block_entries()).max(1);
        let need_table = layout.clusters(need_blocks.saturating_mul(8)).max(1);
        if (need_table, need_blocks) == (table, blocks) {
            return (table, blocks);
        }
        // Both only grow, so this ends.
        (table, blocks) = (need_table.max(table), need_blocks.max(blocks));
        if table > limit::REFCOUNT_TABLE_BYTES >> layout.cluster_bits {
            return (table, blocks);
        }
    }
}

impl Plan {
    pub(super) fn new(options: &CreateOptions) -> Result<Plan, CreateError> {
        options.validate()?;
        let refused = |reason: String| CreateError::Refused(reason);
        let layout = layout(options)?;
        let bits = layout.cluster_bits;
        let size = options.size.next_multiple_of(512);
        let l1_entries = layout.l1_entries(size);
        if l1_entries * 8 > limit::L1_BYTES {
            let most = (limit::L1_BYTES / 8) << layout.l2_span_bits().min(40);
            return Err(refused(format!(
                "a disk of {size} bytes is too large for clusters of {}: they reach {most} bytes; use larger ones",
                layout.cluster_size()
            )));
        }
        let raw = options.data_file.as_ref().is_some_and(|data| data.raw);
        // A raw data file holds what the guest may read from the first moment on, so all of it is mapped.
        let mapped = options.preallocation != Preallocation::Off || raw;
        let l2_tables = if mapped { l1_entries } else { 0 };
        let data_bytes = if mapped && !layout.data_file { layout.clusters(size) << bits } else { 0 };
        let l1_clusters = layout.clusters(l1_entries * 8);
        let luks_clusters =
            layout.clusters(options.luks_header.as_ref().map_or(0, |header| header.len() as u64));
        let others = 1 + l1_clusters + luks_clusters + l2_tables + (data_bytes >> bits);
        let (table_clusters, blocks) = refcount_clusters(&layout, others);
        if table_clusters > limit::REFCOUNT_TABLE_BYTES >> bits {
            return Err(refused(format!(
                "a disk of {size} bytes takes more clusters than can be counted; use larger clusters, narrower \
                 refcounts or no preallocation"
            )));
        }
        let mut at = 1u64 << bits;
        let mut take = |clusters: u64| {
            let start = at;
            at += clusters << bits;
            start
        };
        take(table_clusters);
        let blocks_start = take(blocks);
        let l1_start = take(l1_clusters);
        let luks_start = take(luks_clusters);
        let l2_start = take(l2_tables);
        let data_start = take(data_bytes >> bits);
        Ok(Plan {
            layout,
            size,
            table_clusters: u32::try_from(table_clusters).expect("within the limit"),
            blocks_start,
            blocks,
            l1_start,
            l1_entries: u32::try_from(l1_entries).expect("within the limit"),
            luks_start,
            l2_start,
            l2_tables,
            data_start: if layout.data_file { 0 } else { data_start },
            data_bytes,
            end: at,
        })
    }

    /// The header of the image.
    pub(super) fn header(&self, options: &CreateOptions) -> Header {
        let v3 = self.layout.version >= 3;
        let flag = |set: bool, bit: u64| if set { bit } else { 0 };
        let mut extensions = Vec::new();
        if let Some(backing) = &options.backing {
            extensions.push(Extension::BackingFormat(backing.format.as_bytes().to_vec()));
        }
        if let Some(data) = &options.data_file {
            extensions.push(Extension::DataFile(data.path.as_os_str().as_bytes().to_vec()));
        }
        if let Some(luks) = &options.luks_header {
            let crypto = CryptoHeader { offset: self.luks_start, length: luks.len() as u64 };
            extensions.push(Extension::Crypto(crypto));
        }
        let mut header = Header {
            version: self.layout.version,
            cluster_bits: self.layout.cluster_bits,
            size: self.size,
            encryption: if options.luks_header.is_some() { Encryption::Luks } else { Encryption::None },
            l1_entries: self.l1_entries,
            l1_offset: self.l1_start,
            refcount_table_offset: self.layout.cluster_size(),
            refcount_table_clusters: self.table_clusters,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: flag(options.data_file.is_some(), incompatible::DATA_FILE)
                | flag(options.compression != Compression::Zlib, incompatible::COMPRESSION)
                | flag(options.extended_l2, incompatible::EXTENDED_L2),
            compatible: flag(options.lazy_refcounts, compatible::LAZY_REFCOUNTS),
            autoclear: flag(options.data_file.as_ref().is_some_and(|data| data.raw), autoclear::RAW_DATA),
            refcount_width: self.layout.refcount_width,
            compression: options.compression,
            unknown: if v3 { vec![0; HEADER_V3 as usize - 105] } else { Vec::new() },
            length: if v3 { HEADER_V3 } else { HEADER_V2 },
            extensions,
            backing: options.backing.as_ref().map(|backing| backing.name.clone()),
        };
        // The names of features are a courtesy, for which the smallest clusters may have no room.
        if v3 {
            header.extensions.push(feature_table());
            if header.encode().is_err() {
                header.extensions.pop();
            }
        }
        header
    }
}

fn layout(options: &CreateOptions) -> Result<Layout, CreateError> {
    Ok(Layout {
        version: if options.version == Version::V2 { 2 } else { 3 },
        cluster_bits: options.cluster_size.trailing_zeros(),
        refcount_width: RefcountWidth::from_bits(options.refcount_bits)?,
        extended_l2: options.extended_l2,
        data_file: options.data_file.is_some(),
    })
}

/// How large a new image becomes, from the ranges of a disk that hold data.
#[derive(Debug)]
pub struct Measure {
    layout: Layout,
    size: u64,
    luks: u64,
    /// Clusters with data, and L2 tables that lead to them.
    clusters: u64,
    tables: u64,
    /// The cluster and the table that were counted last, plus one.
    last: (u64, u64),
}

/// What an image takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// With the data that was counted.
    pub required: u64,
    /// When all of the disk was written.
    pub full: u64,
}

impl Measure {
    /// For an image that is made with these options.
    ///
    /// # Errors
    ///
    /// Those of [`CreateOptions::validate`], and where the disk is too large for the clusters.
    pub fn new(options: &CreateOptions) -> Result<Measure, CreateError> {
        let plan = Plan::new(options)?;
        let luks = options.luks_header.as_ref().map_or(0, |header| header.len() as u64);
        let mut measure =
            Measure { layout: plan.layout, size: plan.size, luks, clusters: 0, tables: 0, last: (0, 0) };
        if plan.l2_tables > 0 {
            measure.add(0, plan.size);
        }
        Ok(measure)
    }

    /// Counts a range that holds data, in bytes. Ranges come in rising order, and what was counted is not counted again.
    pub fn add(&mut self, offset: u64, length: u64) {
        let end = offset.saturating_add(length).min(self.size);
        if offset >= end {
            return;
        }
        let count = |bits: u32, last: &mut u64, counted: &mut u64| {
            let (first, behind) = ((offset >> bits).max(*last), ((end - 1) >> bits) + 1);
            *counted += behind.saturating_sub(first);
            *last = behind.max(*last);
        };
        count(self.layout.cluster_bits, &mut self.last.0, &mut self.clusters);
        count(self.layout.l2_span_bits(), &mut self.last.1, &mut self.tables);
    }

    /// What the image takes.
    pub fn finish(&self) -> Measured {
        let (l1, layout) = (self.layout.l1_entries(self.size), &self.layout);
        let image = |clusters: u64, tables: u64| {
            let data = if layout.data_file { 0 } else { clusters };
            let others = 1 + layout.clusters(l1 * 8) + layout.clusters(self.luks) + tables + data;
            let (table, blocks) = refcount_clusters(layout, others);
            others.saturating_add(table).saturating_add(blocks).saturating_mul(layout.cluster_size())
        };
        Measured { required: image(self.clusters, self.tables), full: image(layout.clusters(self.size), l1) }
    }
}
