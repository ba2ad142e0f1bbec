//! The header in the first cluster ("Header").

use vbd_image::ReadAt;

use super::extension::{self, Extension, FeatureKind, printable};
use super::{BitmapsExtension, CryptoHeader, Error, Layout, MAGIC, RefcountWidth, Result, be32, be64, limit};
use crate::storage::read_padded_at;

/// Incompatible features: what does not know one must not open the image.
pub mod incompatible {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1;
    /// Anything may be wrong; the image must not be written, but for repair.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest clusters are in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// Compressed clusters are not deflated.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have a bitmap of subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All that are known here.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Compatible features.
pub mod compatible {
    /// Refcounts may be written late, with the dirty bit set meanwhile.
    pub const LAZY_REFCOUNTS: u64 = 1;
}

/// Autoclear features: what does not know one clears its bit when it opens the image for writing.
pub mod autoclear {
    /// The bitmaps are consistent.
    pub const BITMAPS: u64 = 1;
    /// The external data file reads as a raw image.
    pub const RAW_DATA: u64 = 1 << 1;
    /// There are notes beside the image of changes that are not in it yet. This program's own: others clear it.
    pub const NOTES: u64 = 1 << 63;
    /// All that are known here.
    pub const KNOWN: u64 = BITMAPS | RAW_DATA | NOTES;
}

/// Offsets of fields in the header, for those that are changed in place.
pub mod at {
    /// The virtual size, 8 bytes.
    pub const SIZE: u64 = 24;
    /// The number of entries of the L1 table, 4 bytes; its offset follows, 8 bytes.
    pub const L1: u64 = 36;
    /// The offset of the refcount table, 8 bytes; its length in clusters follows, 4 bytes.
    pub const REFCOUNT_TABLE: u64 = 48;
    /// The number of snapshots, 4 bytes; the offset of their table follows, 8 bytes.
    pub const SNAPSHOTS: u64 = 60;
    /// The three sets of features, 8 bytes each.
    pub const FEATURES: u64 = 72;
}

/// How guest data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// It is not.
    None,
    /// AES-CBC with a weak scheme; only old images have it.
    Aes,
    /// LUKS, with a header of its own in the image.
    Luks,
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Deflate, without a header.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// The header with its extensions and the name of the backing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The size of a cluster as a power of two.
    pub cluster_bits: u32,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// How guest data is encrypted.
    pub encryption: Encryption,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Where it is, in bytes.
    pub l1_offset: u64,
    /// Where the refcount table is, in bytes.
    pub refcount_table_offset: u64,
    /// Its length in clusters.
    pub refcount_table_clusters: u32,
    /// Snapshots in the image.
    pub snapshots: u32,
    /// Where their table is, in bytes.
    pub snapshots_offset: u64,
    /// Features that must be known: see [`incompatible`].
    pub incompatible: u64,
    /// Features that may be ignored: see [`compatible`].
    pub compatible: u64,
    /// Features whose bits are cleared by a writer that does not know them: see [`autoclear`].
    pub autoclear: u64,
    /// The width of reference counts.
    pub refcount_width: RefcountWidth,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Bytes of the header that are not known here, from byte 105 on.
    pub unknown: Vec<u8>,
    /// Bytes of the header without extensions: 72 in version 2, a multiple of 8 from 104 on in version 3.
    pub length: u32,
    /// The extensions in the order in which they were found.
    pub extensions: Vec<Extension>,
    /// The name of the backing file, as it is written there.
    pub backing: Option<Vec<u8>>,
}

/// Bytes that hold all fixed fields.
const FIXED: usize = 105;
const V2_LENGTH: u32 = 72;
const V3_LENGTH: u32 = 104;

impl Header {
    /// Reads the header of an image. Structures that it points to are not looked at.
    ///
    /// # Errors
    ///
    /// What begins there is no qcow2 image, is cut off, or has a field with a value that it cannot have. Incompatible
    /// features that are not known here are no error of this: see [`Header::refuse_unknown`].
    pub fn read<S: ReadAt + ?Sized>(source: &S) -> Result<Header> {
        let failed = |error| Error::Read { what: "the header", offset: 0, error };
        let mut fixed = [0; FIXED];
        let read = source.fill_at(0, &mut fixed).map_err(failed)?;
        let cluster_bits = Self::recognize(&fixed[..read])?;
        // An image can be shorter than its first cluster only when it is damaged; what is missing reads as zeros, and
        // what relies on it finds out.
        let mut first = vec![0; 1 << cluster_bits];
        read_padded_at(source, 0, &mut first).map_err(failed)?;
        Self::parse(&first)
    }

    /// The logarithm of the cluster size of the image that begins with these bytes, if it is one.
    fn recognize(head: &[u8]) -> Result<u32> {
        if head.get(..4) != Some(&MAGIC) {
            return Err(Error::Foreign { found: describe(head) });
        }
        if head.len() < V2_LENGTH as usize {
            let (need, end) = (V2_LENGTH.into(), head.len() as u64);
            return Err(Error::Truncated { what: "the header", offset: 0, need, end });
        }
        let version = be32(head, 4);
        if !matches!(version, 2 | 3) {
            return Err(Error::field("version", version, "versions 2 and 3 are known here"));
        }
        if version == 3 && head.len() < V3_LENGTH as usize {
            let (need, end) = (V3_LENGTH.into(), head.len() as u64);
            return Err(Error::Truncated { what: "the header", offset: 0, need, end });
        }
        let cluster_bits = be32(head, 20);
        if !limit::CLUSTER_BITS.contains(&cluster_bits) {
            return Err(Error::field("cluster_bits", cluster_bits, "it is 9 to 21: 512 bytes to 2 MiB"));
        }
        Ok(cluster_bits)
    }

    /// The header out of the bytes of the first cluster.
    ///
    /// # Errors
    ///
    /// Those of [`Header::read`], but for reading.
    pub fn parse(first: &[u8]) -> Result<Header> {
        let cluster_bits = Self::recognize(first)?;
        let cluster_size = 1usize << cluster_bits;
        let mut first = first.get(..cluster_size).unwrap_or(first).to_vec();
        first.resize(cluster_size.max(FIXED), 0);
        let version = be32(&first, 4);
        let v3 = version == 3;
        let length = if v3 { be32(&first, 100) } else { V2_LENGTH };
        let fits = usize::try_from(length).is_ok_and(|length| length <= cluster_size);
        if v3 && (length < V3_LENGTH || !length.is_multiple_of(8) || !fits) {
            let allowed = format!("it is a multiple of 8 from {V3_LENGTH} to {cluster_size}");
            return Err(Error::field("header_length", length, allowed));
        }
        // Fields that a short header does not have are 0.
        let field = |offset: usize| if v3 { be64(&first, offset) } else { 0 };
        let (features, compression) = (field(72), if length > V3_LENGTH { first[104] } else { 0 });
        let encryption = match be32(&first, 32) {
            0 => Encryption::None,
            1 => Encryption::Aes,
            2 => Encryption::Luks,
            other => {
                return Err(Error::field("crypt_method", other, "it is 0 (none), 1 (AES) or 2 (LUKS)"));
            }
        };
        let compression = match (features & incompatible::COMPRESSION != 0, compression) {
            (false, 0) => Compression::Zlib,
            (true, 1) => Compression::Zstd,
            (true, 0) => {
                return Err(Error::field("compression_type", 0, "it is not 0 where its feature bit is set"));
            }
            (false, other) => {
                return Err(Error::field(
                    "compression_type",
                    other,
                    "it is 0 where its feature bit is clear",
                ));
            }
            (true, other) => {
                return Err(Error::field("compression_type", other, "0 (zlib) and 1 (zstd) are known here"));
            }
        };
        let mut header = Header {
            version,
            cluster_bits,
            size: be64(&first, 24),
            encryption,
            l1_entries: be32(&first, 36),
            l1_offset: be64(&first, 40),
            refcount_table_offset: be64(&first, 48),
            refcount_table_clusters: be32(&first, 56),
            snapshots: be32(&first, 60),
            snapshots_offset: be64(&first, 64),
            incompatible: features,
            compatible: field(80),
            autoclear: field(88),
            refcount_width: if v3 { RefcountWidth::from_order(be32(&first, 96))? } else { RefcountWidth::V2 },
            compression,
            unknown: first.get(FIXED..length as usize).unwrap_or_default().to_vec(),
            length,
            extensions: Vec::new(),
            backing: None,
        };
        let name = (be64(&first, 8), be32(&first, 16));
        header.backing = header.parse_backing(name, &first[..cluster_size])?;
        // Before the backing file's name, if there is one, which need not be preceded by an end mark.
        let area_end = if header.backing.is_some() {
            usize::try_from(name.0).unwrap_or(cluster_size).max(length as usize)
        } else {
            cluster_size
        };
        header.extensions = extension::parse(&first[length as usize..area_end])?;
        header.check_fields()?;
        Ok(header)
    }

    fn parse_backing(&self, (offset, size): (u64, u32), first: &[u8]) -> Result<Option<Vec<u8>>> {
        if offset == 0 {
            return Ok(None);
        }
        let cluster = first.len() as u64;
        if offset > cluster || offset < self.length.into() {
            let allowed =
                format!("it is in the first cluster behind the header: {} to {cluster}", self.length);
            return Err(Error::field("backing_file_offset", offset, allowed));
        }
        if size > limit::BACKING_NAME || u64::from(size) > cluster - offset {
            let most = u64::from(limit::BACKING_NAME).min(cluster - offset);
            return Err(Error::field("backing_file_size", size, format!("it is at most {most} here")));
        }
        let offset = usize::try_from(offset).expect("within a cluster");
        let name = &first[offset..offset + size as usize];
        if name.contains(&0) {
            return Err(Error::field(
                "the name of the backing file",
                format!("\"{}\"", printable(name)),
                "a name has no zero byte",
            ));
        }
        Ok((size > 0).then(|| name.to_vec()))
    }

    /// What can be said of the fields without looking elsewhere in the file.
    fn check_fields(&self) -> Result<()> {
        if self.size > limit::SIZE {
            let allowed = format!("it is at most {}", limit::SIZE);
            return Err(Error::field("size", self.size, allowed));
        }
        if self.has(incompatible::EXTENDED_L2) && self.cluster_bits < limit::EXTENDED_L2_CLUSTER_BITS {
            let allowed = "with extended L2 entries it is at least 14: 16 KiB";
            return Err(Error::field("cluster_bits", self.cluster_bits, allowed));
        }
        let layout = self.layout();
        let tables = [
            ("l1_table_offset", self.l1_offset),
            ("refcount_table_offset", self.refcount_table_offset),
            ("snapshots_offset", self.snapshots_offset),
        ];
        for (field, offset) in tables {
            if !layout.is_aligned(offset) || offset > limit::SIZE {
                let allowed = format!("it is a multiple of the cluster size, {}", layout.cluster_size());
                return Err(Error::field(field, format!("{offset:#x}"), allowed));
            }
        }
        if u64::from(self.l1_entries) * 8 > limit::L1_BYTES {
            let allowed = format!("it is at most {}", limit::L1_BYTES / 8);
            return Err(Error::field("l1_size", self.l1_entries, allowed));
        }
        let needed = layout.l1_entries(self.size);
        if u64::from(self.l1_entries) < needed {
            let allowed = format!("a virtual disk of {} bytes needs {needed}", self.size);
            return Err(Error::field("l1_size", self.l1_entries, allowed));
        }
        let most = limit::REFCOUNT_TABLE_BYTES >> self.cluster_bits;
        if u64::from(self.refcount_table_clusters) > most {
            let allowed = format!("it is at most {most}");
            return Err(Error::field("refcount_table_clusters", self.refcount_table_clusters, allowed));
        }
        if self.snapshots > limit::SNAPSHOTS {
            let allowed = format!("it is at most {}", limit::SNAPSHOTS);
            return Err(Error::field("nb_snapshots", self.snapshots, allowed));
        }
        if let Some(bitmaps) = self.bitmaps()
            && (!layout.is_aligned(bitmaps.directory_offset) || bitmaps.directory_offset > limit::SIZE)
        {
            let allowed = format!("it is a multiple of the cluster size, {}", layout.cluster_size());
            let value = format!("{:#x}", bitmaps.directory_offset);
            return Err(Error::field("bitmap_directory_offset", value, allowed));
        }
        match (self.crypto(), self.encryption) {
            (None, Encryption::Luks) => Err(Error::field(
                "crypt_method",
                "2 (LUKS)",
                "there is no header extension that says where the LUKS header is",
            )),
            (Some(_), Encryption::None | Encryption::Aes) => Err(Error::field(
                "the encryption header pointer",
                "there",
                "only an image with LUKS encryption has one",
            )),
            (Some(crypto), _) if !layout.is_aligned(crypto.offset) || crypto.offset > limit::SIZE => {
                let allowed = format!("it is a multiple of the cluster size, {}", layout.cluster_size());
                Err(Error::field("the offset of the LUKS header", format!("{:#x}", crypto.offset), allowed))
            }
            _ => Ok(()),
        }
    }

    /// The header as it lies in the first cluster, up to the end of the last thing in it. What is behind that in the
    /// cluster should be zeros.
    ///
    /// # Errors
    ///
    /// It takes more than the cluster.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(1024);
        bytes.extend(MAGIC);
        bytes.extend(self.version.to_be_bytes());
        bytes.extend([0; 12]);
        bytes.extend(self.cluster_bits.to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        let encryption: u32 = match self.encryption {
            Encryption::None => 0,
            Encryption::Aes => 1,
            Encryption::Luks => 2,
        };
        bytes.extend(encryption.to_be_bytes());
        bytes.extend(self.l1_entries.to_be_bytes());
        bytes.extend(self.l1_offset.to_be_bytes());
        bytes.extend(self.refcount_table_offset.to_be_bytes());
        bytes.extend(self.refcount_table_clusters.to_be_bytes());
        bytes.extend(self.snapshots.to_be_bytes());
        bytes.extend(self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            for features in [self.incompatible, self.compatible, self.autoclear] {
                bytes.extend(features.to_be_bytes());
            }
            bytes.extend(self.refcount_width.order().to_be_bytes());
            bytes.extend(self.length.to_be_bytes());
            bytes.push(match self.compression {
                Compression::Zlib => 0,
                Compression::Zstd => 1,
            });
            bytes.extend(&self.unknown);
            bytes.resize(self.length as usize, 0);
        }
        for extension in &self.extensions {
            extension.encode(&mut bytes);
        }
        Extension::encode_end(&mut bytes);
        if let Some(name) = &self.backing {
            let (offset, size) = (bytes.len() as u64, u32::try_from(name.len()).unwrap_or(u32::MAX));
            if size > limit::BACKING_NAME {
                return Err(Error::NoRoom {
                    what: "the name of the backing file",
                    need: name.len() as u64,
                    room: limit::BACKING_NAME.into(),
                    hint: "use a shorter path, for example a relative one",
                });
            }
            bytes[8..16].copy_from_slice(&offset.to_be_bytes());
            bytes[16..20].copy_from_slice(&size.to_be_bytes());
            bytes.extend(name);
        }
        let (need, room) = (bytes.len() as u64, 1u64 << self.cluster_bits);
        if need > room {
            let hint = "use larger clusters, or shorter names";
            return Err(Error::NoRoom { what: "the header", need, room, hint });
        }
        Ok(bytes)
    }

    /// The same, filled with zeros up to the end of the first cluster.
    ///
    /// # Errors
    ///
    /// Those of [`Header::encode`].
    pub fn encode_cluster(&self) -> Result<Vec<u8>> {
        let mut bytes = self.encode()?;
        bytes.resize(1 << self.cluster_bits, 0);
        Ok(bytes)
    }

    /// Whether an incompatible feature is used.
    pub const fn has(&self, incompatible: u64) -> bool {
        self.incompatible & incompatible != 0
    }

    /// How the tables are laid out.
    pub fn layout(&self) -> Layout {
        Layout {
            version: self.version,
            cluster_bits: self.cluster_bits,
            refcount_width: self.refcount_width,
            extended_l2: self.has(incompatible::EXTENDED_L2),
            data_file: self.has(incompatible::DATA_FILE),
        }
    }

    /// Bytes of the refcount table.
    pub const fn refcount_table_bytes(&self) -> u64 {
        (self.refcount_table_clusters as u64) << self.cluster_bits
    }

    /// Bytes of the active L1 table.
    pub const fn l1_bytes(&self) -> u64 {
        self.l1_entries as u64 * 8
    }

    /// Whether the external data file reads as a raw image.
    pub const fn raw_data(&self) -> bool {
        self.has(incompatible::DATA_FILE) && self.autoclear & autoclear::RAW_DATA != 0
    }

    /// Whether refcounts may be written late.
    pub const fn lazy_refcounts(&self) -> bool {
        self.compatible & compatible::LAZY_REFCOUNTS != 0
    }

    /// The format of the backing file, as it is written there.
    pub fn backing_format(&self) -> Option<&[u8]> {
        self.extensions.iter().find_map(|extension| match extension {
            Extension::BackingFormat(text) => Some(&text[..]),
            _ => None,
        })
    }

    /// The name of the external data file, as it is written there.
    pub fn data_file(&self) -> Option<&[u8]> {
        self.extensions.iter().find_map(|extension| match extension {
            Extension::DataFile(text) => Some(&text[..]),
            _ => None,
        })
    }

    /// The bitmaps extension, whether or not it says the truth: see [`autoclear::BITMAPS`].
    pub fn bitmaps(&self) -> Option<BitmapsExtension> {
        self.extensions.iter().find_map(|extension| match extension {
            Extension::Bitmaps(bitmaps) => Some(*bitmaps),
            _ => None,
        })
    }

    /// Where the encryption header is.
    pub fn crypto(&self) -> Option<CryptoHeader> {
        self.extensions.iter().find_map(|extension| match extension {
            Extension::Crypto(crypto) => Some(*crypto),
            _ => None,
        })
    }

    /// Puts an extension in the place of the one of its kind, or behind all others.
    pub fn set_extension(&mut self, extension: Extension) {
        let same = |before: &Extension| std::mem::discriminant(before) == std::mem::discriminant(&extension);
        match self.extensions.iter_mut().find(|before| same(before)) {
            Some(before) => *before = extension,
            None => self.extensions.push(extension),
        }
    }

    /// Takes the bitmaps extension out.
    pub fn remove_bitmaps(&mut self) {
        self.extensions.retain(|extension| !matches!(extension, Extension::Bitmaps(_)));
        self.autoclear &= !autoclear::BITMAPS;
    }

    /// Refuses an image whose incompatible features are not all known here, with the names that the image has for them.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownFeatures`].
    pub fn refuse_unknown(&self) -> Result<()> {
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let names = self.extensions.iter().find_map(|extension| match extension {
            Extension::FeatureNames(names) => Some(&names[..]),
            _ => None,
        });
        let name = |bit: u8| {
            let named = names.unwrap_or_default().iter();
            let mut named = named.filter(|name| name.kind == FeatureKind::Incompatible && name.bit == bit);
            named.next().map_or(format!("incompatible feature {bit}"), |name| {
                format!("\"{}\" (incompatible feature {bit})", name.text())
            })
        };
        Err(Error::UnknownFeatures((0..64).filter(|bit| unknown >> bit & 1 != 0).map(name).collect()))
    }
}

/// What a file begins with that is none of ours.
fn describe(head: &[u8]) -> String {
    const MAGICS: [(&[u8], &str); 9] = [
        (b"KDMV", "the magic of VMDK"),
        (b"# Disk DescriptorFile", "the descriptor of VMDK"),
        (b"vhdxfile", "the magic of VHDX"),
        (b"conectix", "the magic of VHD"),
        (b"QED\0", "the magic of QED"),
        (b"<<< ", "what VDI images begin with"),
        (b"LUKS\xba\xbe", "the magic of LUKS"),
        (b"\x1f\x8b", "the magic of gzip"),
        (b"\x28\xb5\x2f\xfd", "the magic of zstd"),
    ];
    if head.is_empty() {
        return "nothing, for it is empty".to_owned();
    }
    match MAGICS.iter().find(|(magic, _)| head.starts_with(magic)) {
        Some((_, what)) => (*what).to_owned(),
        None if head.iter().take(4).all(|byte| *byte == 0) => "zeros".to_owned(),
        None => {
            let hex: Vec<_> = head.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
            format!("the bytes {}", hex.join(" "))
        }
    }
}
