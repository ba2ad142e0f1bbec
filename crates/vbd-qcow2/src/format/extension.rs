//! Header extensions, and the data of those that are known ("Header extensions").

use super::{Error, Result, be32, be64, limit};

/// Types of extensions.
pub(super) mod kind {
    pub(crate) const END: u32 = 0;
    pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;
    pub(crate) const BITMAPS: u32 = 0x2385_2875;
    pub(crate) const CRYPTO: u32 = 0x0537_be77;
    pub(crate) const DATA_FILE: u32 = 0x4441_5441;
}

/// An extension of the header. Their order in the file is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extension {
    /// The format of the backing file.
    BackingFormat(Vec<u8>),
    /// The name of the external data file.
    DataFile(Vec<u8>),
    /// What features are called.
    FeatureNames(Vec<FeatureName>),
    /// Where the bitmaps are.
    Bitmaps(BitmapsExtension),
    /// Where the encryption header is.
    Crypto(CryptoHeader),
    /// One that is not known here.
    Unknown {
        /// Its type.
        kind: u32,
        /// Its data.
        data: Vec<u8>,
    },
}

/// Which set of features a name is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureKind {
    /// One that must be known to use the image.
    Incompatible,
    /// One that may be ignored.
    Compatible,
    /// One whose bit a writer that does not know it clears.
    Autoclear,
    /// Something else.
    Other(u8),
}

impl FeatureKind {
    fn from_byte(byte: u8) -> Self {
        match byte {
            0 => FeatureKind::Incompatible,
            1 => FeatureKind::Compatible,
            2 => FeatureKind::Autoclear,
            other => FeatureKind::Other(other),
        }
    }

    fn byte(self) -> u8 {
        match self {
            FeatureKind::Incompatible => 0,
            FeatureKind::Compatible => 1,
            FeatureKind::Autoclear => 2,
            FeatureKind::Other(other) => other,
        }
    }
}

/// An entry of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// The set that the feature is in.
    pub kind: FeatureKind,
    /// The number of its bit.
    pub bit: u8,
    /// Its name, padded with zeros.
    pub name: [u8; 46],
}

/// Bytes of an entry of the feature name table.
const FEATURE_NAME: usize = 48;

impl FeatureName {
    /// The name of a bit; what is beyond 46 bytes is cut off.
    pub fn new(kind: FeatureKind, bit: u8, text: &str) -> Self {
        let mut name = [0; 46];
        let length = text.len().min(name.len());
        name[..length].copy_from_slice(&text.as_bytes()[..length]);
        FeatureName { kind, bit, name }
    }

    /// The name for people: without its padding, and without what could play tricks on a terminal.
    pub fn text(&self) -> String {
        let end = self.name.iter().position(|byte| *byte == 0).unwrap_or(self.name.len());
        printable(&self.name[..end])
    }
}

/// A text out of a hostile file for a message: what is no printable character becomes a replacement character.
pub(crate) fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().map(|char| if char.is_control() { char::REPLACEMENT_CHARACTER } else { char }).collect()
}

/// The table with the names of all features that are known here, as QEMU calls them.
pub fn feature_table() -> Extension {
    use FeatureKind::{Autoclear, Compatible, Incompatible};
    let names = [
        (Incompatible, 0, "dirty bit"),
        (Incompatible, 1, "corrupt bit"),
        (Incompatible, 2, "external data file"),
        (Incompatible, 3, "compression type"),
        (Incompatible, 4, "extended L2 entries"),
        (Compatible, 0, "lazy refcounts"),
        (Autoclear, 0, "bitmaps"),
        (Autoclear, 1, "raw external data"),
    ];
    Extension::FeatureNames(names.map(|(kind, bit, name)| FeatureName::new(kind, bit, name)).to_vec())
}

/// The bitmaps extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// How many bitmaps there are: at least one.
    pub count: u32,
    /// Bytes of the bitmap directory.
    pub directory_size: u64,
    /// Where it is in the image, in bytes.
    pub directory_offset: u64,
}

impl BitmapsExtension {
    fn parse(data: &[u8]) -> Result<Self> {
        if data.len() != 24 {
            let allowed = "it is always 24 bytes";
            return Err(Error::field("the length of the bitmaps extension", data.len(), allowed));
        }
        let extension = BitmapsExtension {
            count: be32(data, 0),
            directory_size: be64(data, 8),
            directory_offset: be64(data, 16),
        };
        if be32(data, 4) != 0 {
            return Err(Error::field(
                "the reserved field of the bitmaps extension",
                be32(data, 4),
                "it is always 0",
            ));
        }
        if extension.count == 0 || extension.count > limit::BITMAPS {
            let allowed = format!("an image has 1 to {} bitmaps or no such extension", limit::BITMAPS);
            return Err(Error::field("the number of bitmaps", extension.count, allowed));
        }
        if extension.directory_size == 0 || extension.directory_size > limit::BITMAP_DIRECTORY_BYTES {
            let allowed = format!("it is 1 to {}", limit::BITMAP_DIRECTORY_BYTES);
            return Err(Error::field("the size of the bitmap directory", extension.directory_size, allowed));
        }
        Ok(extension)
    }

    /// As it lies in the header.
    pub fn encode(&self) -> Vec<u8> {
        let mut data = Vec::with_capacity(24);
        data.extend(self.count.to_be_bytes());
        data.extend([0; 4]);
        data.extend(self.directory_size.to_be_bytes());
        data.extend(self.directory_offset.to_be_bytes());
        data
    }
}

/// Where the encryption header is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CryptoHeader {
    /// The offset in the image, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

/// Splits the extension area, which begins right behind the header, into extensions. What follows the end of the area
/// is not looked at; an area that reaches the end of `area` without one ends there.
///
/// # Errors
///
/// An extension does not fit, or the data of a known one is malformed.
pub(super) fn parse(area: &[u8]) -> Result<Vec<Extension>> {
    let mut extensions: Vec<Extension> = Vec::new();
    let mut rest = area;
    while rest.len() >= 8 {
        let (kind, length) = (be32(rest, 0), be32(rest, 4));
        if kind == kind::END {
            break;
        }
        let data = usize::try_from(length).ok().and_then(|length| rest[8..].get(..length));
        let Some(data) = data else {
            return Err(Error::field(
                format!("the length of header extension {kind:#010x}"),
                length,
                format!("{} bytes are left in the first cluster", rest.len() - 8),
            ));
        };
        let extension = known(kind, data)?;
        // Only what is not known here may appear twice, for nothing is known of it.
        let twice = !matches!(extension, Extension::Unknown { .. })
            && extensions.iter().any(|before| before.kind() == kind);
        if twice {
            return Err(Error::field(
                "a header extension",
                format!("{kind:#010x} for the second time"),
                "each appears at most once",
            ));
        }
        extensions.push(extension);
        rest = rest.get(8 + data.len().next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(extensions)
}

fn known(kind: u32, data: &[u8]) -> Result<Extension> {
    Ok(match kind {
        kind::BACKING_FORMAT => Extension::BackingFormat(data.to_vec()),
        kind::DATA_FILE => Extension::DataFile(data.to_vec()),
        kind::FEATURE_NAMES => {
            let name = |entry: &[u8]| FeatureName {
                kind: FeatureKind::from_byte(entry[0]),
                bit: entry[1],
                name: entry[2..].try_into().expect("46 bytes"),
            };
            if !data.len().is_multiple_of(FEATURE_NAME) {
                let allowed = format!("it is a multiple of {FEATURE_NAME}");
                return Err(Error::field("the length of the feature name table", data.len(), allowed));
            }
            Extension::FeatureNames(data.chunks_exact(FEATURE_NAME).map(name).collect())
        }
        kind::BITMAPS => Extension::Bitmaps(BitmapsExtension::parse(data)?),
        kind::CRYPTO => {
            if data.len() != 16 {
                let allowed = "it is always 16 bytes";
                return Err(Error::field("the length of the encryption header pointer", data.len(), allowed));
            }
            Extension::Crypto(CryptoHeader { offset: be64(data, 0), length: be64(data, 8) })
        }
        _ => Extension::Unknown { kind, data: data.to_vec() },
    })
}

impl Extension {
    fn kind(&self) -> u32 {
        match self {
            Extension::BackingFormat(_) => kind::BACKING_FORMAT,
            Extension::DataFile(_) => kind::DATA_FILE,
            Extension::FeatureNames(_) => kind::FEATURE_NAMES,
            Extension::Bitmaps(_) => kind::BITMAPS,
            Extension::Crypto(_) => kind::CRYPTO,
            Extension::Unknown { kind, .. } => *kind,
        }
    }

    /// Appends the extension with its header and padding.
    pub(super) fn encode(&self, bytes: &mut Vec<u8>) {
        let data = match self {
            Extension::BackingFormat(text) | Extension::DataFile(text) => text.clone(),
            Extension::FeatureNames(names) => {
                let entry = |name: &FeatureName| [&[name.kind.byte(), name.bit], &name.name[..]].concat();
                names.iter().flat_map(entry).collect()
            }
            Extension::Bitmaps(bitmaps) => bitmaps.encode(),
            Extension::Crypto(crypto) => [crypto.offset.to_be_bytes(), crypto.length.to_be_bytes()].concat(),
            Extension::Unknown { data, .. } => data.clone(),
        };
        // The data comes out of a header, or is bounded by one when it is written.
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        bytes.extend(self.kind().to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(&data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }

    /// Appends the mark of the area's end.
    pub(super) fn encode_end(bytes: &mut Vec<u8>) {
        bytes.extend([0; 8]);
    }
}
