//! Sizes as people write them: `2G`, `1.5 GiB`, `500MB`, `2147484672`.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};

/// The size of a disk, in bytes: at least 1, at most `i64::MAX` (what a file offset can say).
///
/// `K`, `M`, `G`, `T`, `P`, `E` and `KiB`, `MiB`, ... are powers of 1024; `KB`, `MB`, ... are powers of 1000; a bare
/// number or `B` means bytes. Upper and lower case are the same. A fraction (`1.5G`) that is no whole number of bytes
/// is rounded up to the next multiple of 512.
///
/// `Display` is the shortest form that reads back as the same size; [`Human`] is the form for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Size(u64);

/// Why a text is no [`Size`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// There is no number.
    #[error("no size given; write for example 2G, 500MB or 2147484672")]
    Empty,
    /// A disk of no bytes.
    #[error("a size of 0 makes no disk; write for example 2G")]
    Zero,
    /// A size below 0.
    #[error("\"{0}\" is negative; a size is at least 1 byte")]
    Negative(String),
    /// More than a file offset can say.
    #[error("\"{0}\" is too large; a file holds at most 8 EiB less one byte")]
    TooLarge(String),
    /// A fraction of a byte.
    #[error("\"{0}\" is a fraction of a byte; give a unit, for example 1.5G")]
    Fraction(String),
    /// A unit that is not known.
    #[error(
        "\"{unit}\" in \"{text}\" is no unit; use K, M, G, T, P, E or KiB (1024), KB (1000), or none for bytes"
    )]
    Unit {
        /// The whole text.
        text: String,
        /// The part taken for the unit.
        unit: String,
    },
    /// Something that is no number.
    #[error("\"{0}\" is no size; write for example 2G, 500MB or 2147484672")]
    Malformed(String),
}

impl Size {
    /// The largest size: what a file offset (`off_t`) can say.
    pub const MAX: Size = Size(i64::MAX.cast_unsigned());

    /// A size of that many bytes; an error for 0 and for more than [`Size::MAX`].
    pub fn from_bytes(bytes: u64) -> Result<Self, SizeError> {
        match bytes {
            0 => Err(SizeError::Zero),
            n if n > Self::MAX.0 => Err(SizeError::TooLarge(n.to_string())),
            n => Ok(Size(n)),
        }
    }

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// The form for people, as `2 GiB`.
    pub fn human(self) -> Human {
        Human(self.0)
    }
}

/// The powers that a unit letter stands for, in order.
const LETTERS: &str = "KMGTPE";

/// What one of a unit is in bytes, or `None` if it is unknown.
fn unit_bytes(unit: &str) -> Option<u128> {
    let upper = unit.to_ascii_uppercase();
    if upper.is_empty() || upper == "B" {
        return Some(1);
    }
    let power = u32::try_from(LETTERS.find(upper.chars().next()?)?).ok()? + 1;
    match &upper[1..] {
        "" | "IB" => Some(1024u128.pow(power)),
        "B" => Some(1000u128.pow(power)),
        _ => None,
    }
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let trimmed = text.trim();
        let malformed = || SizeError::Malformed(text.to_owned());
        if trimmed.is_empty() {
            return Err(SizeError::Empty);
        }
        if let Some(rest) = trimmed.strip_prefix('-') {
            let number = rest.trim_start().starts_with(|c: char| c.is_ascii_digit());
            return Err(if number { SizeError::Negative(text.to_owned()) } else { malformed() });
        }
        let end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = (&trimmed[..end], trimmed[end..].trim_start());
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.contains('.') || (number.contains('.') && fraction.is_empty()) {
            return Err(malformed());
        }
        let unit = unit_bytes(unit)
            .ok_or_else(|| SizeError::Unit { text: text.to_owned(), unit: unit.to_owned() })?;

        let too_large = || SizeError::TooLarge(text.to_owned());
        let fraction = fraction.trim_end_matches('0');
        if unit == 1 && !fraction.is_empty() {
            return Err(SizeError::Fraction(text.to_owned()));
        }
        // All characters are digits, so a failure to parse is an overflow. 18 decimals of the largest unit stay
        // below 2^120.
        let whole: u128 = whole.parse().map_err(|_| too_large())?;
        let mut bytes = whole.checked_mul(unit).ok_or_else(too_large)?;
        if !fraction.is_empty() {
            let digits = u32::try_from(fraction.len()).ok().filter(|n| *n <= 18).ok_or_else(malformed)?;
            let numerator = fraction.parse::<u128>().map_err(|_| malformed())? * unit;
            let denominator = 10u128.pow(digits);
            bytes = bytes.checked_add(numerator / denominator).ok_or_else(too_large)?;
            if numerator % denominator != 0 {
                bytes = (bytes + 1).next_multiple_of(512);
            }
        }
        Self::from_bytes(u64::try_from(bytes).map_err(|_| too_large())?).map_err(|error| match error {
            SizeError::TooLarge(_) => too_large(),
            other => other,
        })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0;
        let mut letter = None;
        for next in LETTERS.chars() {
            if !value.is_multiple_of(1024) {
                break;
            }
            value /= 1024;
            letter = Some(next);
        }
        match letter {
            Some(letter) => write!(f, "{value}{letter}"),
            None => write!(f, "{value}"),
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;

        impl Visitor<'_> for SizeVisitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size: a number of bytes, or a text such as \"2G\"")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                Size::from_bytes(bytes).map_err(E::custom)
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                let bytes =
                    u64::try_from(bytes).map_err(|_| E::custom(SizeError::Negative(bytes.to_string())))?;
                self.visit_u64(bytes)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(SizeVisitor)
    }
}

/// A number of bytes for people to read: `512 B`, `1.5 KiB`, `2 GiB`. One decimal at most, rounded; [`Size`]'s own
/// `Display` is exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Human(pub u64);

impl fmt::Display for Human {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Tenths of the unit are kept as an integer, so that nothing is lost near a boundary.
        let (mut tenths, mut letter) = (u128::from(self.0) * 10, None);
        let mut unit = 1u128;
        for next in LETTERS.chars() {
            if tenths < 10_235 {
                break;
            }
            unit *= 1024;
            tenths = (u128::from(self.0) * 10 + unit / 2) / unit;
            letter = Some(next);
        }
        let text = if tenths.is_multiple_of(10) {
            format!("{}", tenths / 10)
        } else {
            format!("{}.{}", tenths / 10, tenths % 10)
        };
        match letter {
            Some(letter) => f.pad(&format!("{text} {letter}iB")),
            None => f.pad(&format!("{text} B")),
        }
    }
}
