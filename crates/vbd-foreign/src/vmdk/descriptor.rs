//! The text that describes the disk ("The Layout File").

use crate::FormatError;

/// What counts of a descriptor.
pub(super) struct Descriptor {
    /// `createType`.
    pub(super) kind: String,
    /// It names a parent.
    has_parent: bool,
    /// How many extents it has.
    extents: usize,
}

impl Descriptor {
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        let text = String::from_utf8_lossy(&bytes[..end]);
        let mut descriptor = Descriptor { kind: String::new(), has_parent: false, extents: 0 };
        for line in text.lines().map(str::trim) {
            let value = |key: &str| {
                let (name, value) = line.split_once('=')?;
                name.trim().eq_ignore_ascii_case(key).then(|| value.trim().trim_matches('"'))
            };
            if let Some(kind) = value("createType") {
                descriptor.kind = kind.chars().take(60).collect();
            }
            if let Some(parent) = value("parentCID") {
                descriptor.has_parent |= !parent.eq_ignore_ascii_case("ffffffff");
            }
            let access = line.split_whitespace().next().unwrap_or_default();
            descriptor.extents += usize::from(["RW", "RDONLY", "NOACCESS"].contains(&access));
        }
        descriptor
    }

    /// Refuses what one sparse file does not hold.
    pub(super) fn check(&self) -> Result<(), FormatError> {
        let refuse = |what: &str| {
            let message = format!("{what}: `qemu-img convert -O raw` makes one file of it");
            Err(FormatError::Unsupported(message))
        };
        if self.has_parent {
            return refuse("it is a delta of another disk, which is not read here");
        }
        if self.extents > 1 {
            return refuse("its disk lies in several files, which is not read here");
        }
        match self.kind.as_str() {
            // Those of one file, and what is kept inside of such a one.
            "monolithicSparse" | "streamOptimized" | "" => Ok(()),
            kind => refuse(&format!(
                "it is of the kind {}; monolithicSparse and streamOptimized are read here",
                kind.escape_debug()
            )),
        }
    }
}
