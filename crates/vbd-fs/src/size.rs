//! How large an image is to be: a size, or as large as its content needs.

use std::fmt;
use std::str::FromStr;

use vbd_image::size::{Human, Size};

use crate::Error;

/// An image's size, or how it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageSize {
    /// So many bytes.
    Fixed(u64),
    /// As few as hold the content and some more.
    Auto {
        /// What is to stay free.
        spare: Spare,
        /// No fewer bytes than these.
        minimum: Option<u64>,
        /// An error where more than these are needed.
        maximum: Option<u64>,
    },
}

/// Room beyond what the content takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spare {
    /// Bytes.
    Bytes(u64),
    /// A part of what the content takes, in percent.
    Percent(u32),
}

impl Spare {
    /// So many blocks more for `blocks`.
    pub(crate) fn blocks(self, blocks: u64, block_size: u64) -> u64 {
        match self {
            Spare::Bytes(bytes) => bytes.div_ceil(block_size),
            Spare::Percent(percent) => {
                u64::try_from(u128::from(blocks) * u128::from(percent) / 100).unwrap_or(u64::MAX)
            }
        }
    }
}

/// A size as `2G`, or `auto`, `auto+20%`, `auto+500M`.
impl FromStr for ImageSize {
    type Err = Error;

    fn from_str(text: &str) -> Result<ImageSize, Error> {
        let size = |text: &str| text.parse::<Size>().map_err(|e| Error::Invalid(e.to_string()));
        let Some(rest) = text.strip_prefix("auto") else {
            return Ok(ImageSize::Fixed(size(text)?.bytes()));
        };
        let spare = match (rest, rest.strip_prefix('+')) {
            ("", _) => Spare::Bytes(0),
            (_, Some(more)) => match more.strip_suffix('%') {
                Some(percent) => {
                    let plain = percent.bytes().all(|b| b.is_ascii_digit());
                    let percent = percent.parse().ok().filter(|&p| plain && p <= 100_000);
                    Spare::Percent(percent.ok_or_else(|| {
                        Error::Invalid(format!("{text:?}: the percentage is a whole number up to 100000"))
                    })?)
                }
                None => Spare::Bytes(size(more)?.bytes()),
            },
            _ => return Err(Error::Invalid(format!("{text:?} is no size: auto, auto+20% or auto+500M"))),
        };
        Ok(ImageSize::Auto { spare, minimum: None, maximum: None })
    }
}

impl fmt::Display for ImageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageSize::Fixed(bytes) => Human(*bytes).fmt(f),
            ImageSize::Auto { spare: Spare::Bytes(0), .. } => f.write_str("auto"),
            ImageSize::Auto { spare: Spare::Bytes(bytes), .. } => write!(f, "auto+{bytes}"),
            ImageSize::Auto { spare: Spare::Percent(percent), .. } => write!(f, "auto+{percent}%"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_told_from_wishes() {
        let auto = |spare| ImageSize::Auto { spare, minimum: None, maximum: None };
        for (text, size) in [
            ("2G", ImageSize::Fixed(2 << 30)),
            ("auto", auto(Spare::Bytes(0))),
            ("auto+20%", auto(Spare::Percent(20))),
            ("auto+500M", auto(Spare::Bytes(500 << 20))),
        ] {
            assert_eq!(text.parse::<ImageSize>().unwrap(), size, "{text}");
        }
        for text in ["", "auto20%", "auto+", "auto+x%", "auto+-1%", "auto-1M", "automatic", "auto+%"] {
            assert!(text.parse::<ImageSize>().is_err(), "{text}");
        }
    }
}
