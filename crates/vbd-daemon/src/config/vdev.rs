//! What the guest calls a disk: Xen's virtual device names and their numbers (xen-vbd-interface(7)).

use std::fmt;
use std::str::FromStr;

/// A Xen virtual block device: a kind, a disk and a partition (0 is the whole disk).
///
/// Two names of one device are equal: `d0`, `d0p0`, `vda` and `xvda` all print as `xvda`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vdev(Name);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Name {
    /// `xvda`, `sdb3`, `hdc`.
    Disk { bus: Bus, disk: u32, partition: u32 },
    /// A number that goes to the guest as it is.
    Number(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Bus {
    Xvd,
    Sd,
    Hd,
}

impl Bus {
    fn name(self) -> &'static str {
        match self {
            Self::Xvd => "xvd",
            Self::Sd => "sd",
            Self::Hd => "hd",
        }
    }

    /// The highest disk and partition that the encoding holds.
    fn limits(self) -> (u32, u32) {
        match self {
            Self::Xvd => ((1 << 20) - 1, 255),
            Self::Sd => (15, 15),
            Self::Hd => (3, 63),
        }
    }
}

/// Why a text names no virtual device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VdevError {
    /// Nothing that Xen knows.
    #[error("`{0}` names no virtual device: write `xvda`, `sda1`, `hdc` or the like")]
    Unknown(String),
    /// A name of the right form, beyond what its kind of device can number.
    #[error("`{name}` is beyond the {last_disk} disks and {last_partition} partitions of `{bus}*`: use an `xvd*` name",
        last_disk = last_disk + 1)]
    TooHigh {
        /// The name as it was written.
        name: String,
        /// `xvd`, `sd` or `hd`.
        bus: &'static str,
        /// The highest disk, from 0.
        last_disk: u32,
        /// The highest partition.
        last_partition: u32,
    },
}

impl Vdev {
    /// The number that stands for this device in XenStore (xen-vbd-interface(7), "Concrete encoding").
    ///
    /// ```
    /// # use vbd_daemon::config::Vdev;
    /// assert_eq!("xvda".parse::<Vdev>().unwrap().number(), 51712);
    /// ```
    pub fn number(self) -> u32 {
        match self.0 {
            Name::Number(number) => number,
            Name::Disk { bus: Bus::Xvd, disk, partition } if disk > 15 || partition > 15 => {
                1 << 28 | disk << 8 | partition
            }
            Name::Disk { bus: Bus::Xvd, disk, partition } => 202 << 8 | disk << 4 | partition,
            Name::Disk { bus: Bus::Sd, disk, partition } => 8 << 8 | disk << 4 | partition,
            Name::Disk { bus: Bus::Hd, disk: disk @ 0..=1, partition } => 3 << 8 | disk << 6 | partition,
            Name::Disk { bus: Bus::Hd, disk, partition } => 22 << 8 | (disk - 2) << 6 | partition,
        }
    }

    fn disk(bus: Bus, disk: Option<u32>, partition: Option<u32>, name: &str) -> Result<Self, VdevError> {
        let (last_disk, last_partition) = bus.limits();
        match (disk, partition) {
            (Some(disk), Some(partition)) if disk <= last_disk && partition <= last_partition => {
                Ok(Self(Name::Disk { bus, disk, partition }))
            }
            _ => {
                let name = name.to_owned();
                Err(VdevError::TooHigh { name, bus: bus.name(), last_disk, last_partition })
            }
        }
    }
}

impl FromStr for Vdev {
    type Err = VdevError;

    /// Reads `xvda`, `sda1`, `hdc`, `d1p2`, a number in decimal, hexadecimal or octal, and `vda` for `xvda`.
    /// A leading `/dev/`, as old files have it, is passed over.
    fn from_str(text: &str) -> Result<Self, VdevError> {
        let unknown = || VdevError::Unknown(text.to_owned());
        let name = text.strip_prefix("/dev/").unwrap_or(text);
        if name.starts_with(|c: char| c.is_ascii_digit()) {
            return number(name).map(|n| Self(Name::Number(n))).ok_or_else(unknown);
        }
        for (prefix, bus) in [("xvd", Bus::Xvd), ("vd", Bus::Xvd), ("sd", Bus::Sd), ("hd", Bus::Hd)] {
            let Some(rest) = name.strip_prefix(prefix) else { continue };
            let letters = rest.bytes().take_while(u8::is_ascii_lowercase).count();
            let (letters, digits) = rest.split_at(letters);
            if letters.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) || digits.starts_with('0') {
                return Err(unknown());
            }
            let partition = if digits.is_empty() { Some(0) } else { digits.parse().ok() };
            return Self::disk(bus, disk_of_letters(letters), partition, text);
        }
        let (disk, partition) = name
            .strip_prefix('d')
            .map(|rest| rest.split_once('p').unwrap_or((rest, "0")))
            .ok_or_else(unknown)?;
        let decimal = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
        if !decimal(disk) || !decimal(partition) {
            return Err(unknown());
        }
        Self::disk(Bus::Xvd, disk.parse().ok(), partition.parse().ok(), text)
    }
}

impl fmt::Display for Vdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Name::Number(number) => write!(f, "{number}"),
            Name::Disk { bus, disk, partition } => {
                write!(f, "{}{}", bus.name(), letters_of_disk(disk))?;
                if partition == 0 { Ok(()) } else { write!(f, "{partition}") }
            }
        }
    }
}

/// A C number: decimal, `0x` hexadecimal or `0` octal, up to the largest `int`.
fn number(text: &str) -> Option<u32> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
        None => (text, 10),
    };
    let digits = Some(digits).filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))?;
    u32::from_str_radix(digits, radix).ok().filter(|&n| i32::try_from(n).is_ok())
}

/// `a` is 0, `z` 25, `aa` 26: there is no digit zero.
fn disk_of_letters(letters: &str) -> Option<u32> {
    letters
        .bytes()
        .try_fold(0u32, |disk, letter| disk.checked_mul(26)?.checked_add(u32::from(letter - b'a') + 1))
        .map(|from_one| from_one - 1)
}

fn letters_of_disk(disk: u32) -> String {
    let mut letters = Vec::new();
    let mut rest = u64::from(disk) + 1;
    while rest > 0 {
        rest -= 1;
        letters.push(char::from(b"abcdefghijklmnopqrstuvwxyz"[(rest % 26) as usize]));
        rest /= 26;
    }
    letters.iter().rev().collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_and_numbers() {
        for (text, canonical, number) in [
            ("xvda", "xvda", 51712),
            ("vda", "xvda", 51712),
            ("d0", "xvda", 51712),
            ("d0p0", "xvda", 51712),
            ("/dev/xvdb2", "xvdb2", 51712 + 18),
            ("d1p2", "xvdb2", 51712 + 18),
            ("xvdp15", "xvdp15", 51712 + 255),
            ("xvdq", "xvdq", (1 << 28) | 16 << 8),
            ("xvda16", "xvda16", (1 << 28) | 16),
            ("xvdtq37", "xvdtq37", (1 << 28) | 536 << 8 | 37),
            ("d536p37", "xvdtq37", (1 << 28) | 536 << 8 | 37),
            ("sda1", "sda1", 2049),
            ("sdb3", "sdb3", 2048 + 19),
            ("hda", "hda", 768),
            ("hdb1", "hdb1", 768 + 65),
            ("hdc", "hdc", 5632),
            ("hdc2", "hdc2", 5634),
            ("hdd", "hdd", 5632 + 64),
            ("51712", "51712", 51712),
            ("0xca00", "51712", 51712),
            ("0145000", "51712", 51712),
        ] {
            let vdev: Vdev = text.parse().unwrap();
            assert_eq!((vdev.to_string().as_str(), vdev.number()), (canonical, number), "{text}");
        }
    }

    #[test]
    fn what_is_no_device() {
        for text in [
            "",
            "x",
            "xvd",
            "xvd1",
            "xvda0",
            "xvda01",
            "xvdA",
            "xvda1b",
            "hdc:cdrom",
            "d",
            "dp1",
            "d1p",
            "d+1p1",
            "0x",
            "0x+1",
            "08",
            "4294967296",
            "2147483648",
            "floppy",
            "/dev/",
            "xvdä",
        ] {
            assert!(matches!(text.parse::<Vdev>(), Err(VdevError::Unknown(_))), "{text}");
        }
        for text in
            ["sdq", "sda16", "hde", "hda64", "xvda256", "d1048576p0", "xvdzzzzzzzzzzzz", "d99999999999"]
        {
            assert!(matches!(text.parse::<Vdev>(), Err(VdevError::TooHigh { .. })), "{text}");
        }
        let error = "sdq".parse::<Vdev>().unwrap_err().to_string();
        assert_eq!(error, "`sdq` is beyond the 16 disks and 15 partitions of `sd*`: use an `xvd*` name");
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "\\PC{0,12}") {
            let _ = text.parse::<Vdev>();
        }

        #[test]
        fn a_printed_device_reads_back(disk in 0u32..1 << 20, partition in 0u32..256) {
            let vdev: Vdev = format!("d{disk}p{partition}").parse().unwrap();
            prop_assert_eq!(vdev.to_string().parse::<Vdev>().unwrap(), vdev);
        }
    }
}
