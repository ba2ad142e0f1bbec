//! The ublk device of a disk, as configurations and the control socket write it.

use std::fmt;

use serde::de::{Deserializer, Error, Visitor};
use serde::{Serialize, Serializer};

/// Which ublk device a disk is on the host itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ublk {
    /// Whichever number is free, or the device that waits for the disk.
    Any,
    /// `/dev/ublkbN`.
    Number(u32),
}

impl Ublk {
    /// The highest number that the driver can give: it has 20 bits for it.
    pub const MAX: u32 = (1 << 20) - 1;

    /// The number that is wanted.
    pub fn number(self) -> Option<u32> {
        match self {
            Self::Any => None,
            Self::Number(number) => Some(number),
        }
    }

    /// Reads `true`, `false` or a number.
    pub(crate) fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Self>, D::Error> {
        struct UblkVisitor;
        impl Visitor<'_> for UblkVisitor {
            type Value = Option<Ublk>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "true, false or the number of a device, from 0 to {}", Ublk::MAX)
            }

            fn visit_bool<E>(self, on: bool) -> Result<Self::Value, E> {
                Ok(on.then_some(Ublk::Any))
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(None)
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
                match u32::try_from(number) {
                    Ok(number @ ..=Ublk::MAX) => Ok(Some(Ublk::Number(number))),
                    _ => Err(E::custom(format!("{number} is no device: the highest is {}", Ublk::MAX))),
                }
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<Self::Value, E> {
                match u64::try_from(number) {
                    Ok(number) => self.visit_u64(number),
                    Err(_) => Err(E::custom(format!("{number} is no device: the lowest is 0"))),
                }
            }
        }
        deserializer.deserialize_any(UblkVisitor)
    }
}

impl Serialize for Ublk {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Any => serializer.serialize_bool(true),
            Self::Number(number) => serializer.serialize_u32(*number),
        }
    }
}
