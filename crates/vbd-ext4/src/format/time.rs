//! Times: 34 bits of seconds and 30 of nanoseconds ("Inode Timestamps").

/// A point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Seconds since 1970, negative before.
    pub seconds: i64,
    /// Nanoseconds on top of the seconds, below a thousand million.
    pub nanoseconds: u32,
}

impl Timestamp {
    /// The first one an inode can hold: 1901-12-13.
    pub const MIN: Timestamp = Timestamp { seconds: i32::MIN as i64, nanoseconds: 0 };
    /// The last one an inode can hold: 2446-05-10.
    pub const MAX: Timestamp = Timestamp { seconds: (3 << 32) + i32::MAX as i64, nanoseconds: 999_999_999 };

    /// Whether an inode can hold it.
    pub fn fits(self) -> bool {
        (Timestamp::MIN..=Timestamp::MAX).contains(&self) && self.nanoseconds < 1_000_000_000
    }

    /// The word for seconds and the word for the rest; a time out of range becomes the nearest one.
    #[expect(clippy::cast_possible_truncation, reason = "the two words are the parts of one number")]
    pub fn encode(self) -> (u32, u32) {
        let Timestamp { seconds, nanoseconds } = self.clamp(Timestamp::MIN, Timestamp::MAX);
        let low = seconds as i32;
        // How many times 2^32 seconds the signed low word is short.
        let epoch = ((seconds - i64::from(low)) >> 32) as u32 & 3;
        (low.cast_unsigned(), nanoseconds.min(999_999_999) << 2 | epoch)
    }

    /// From the two words.
    pub fn decode(low: u32, extra: u32) -> Timestamp {
        Timestamp {
            seconds: i64::from(low.cast_signed()) + (i64::from(extra & 3) << 32),
            nanoseconds: extra >> 2,
        }
    }

    /// From the one word that an inode of 128 bytes has.
    pub fn decode_short(low: u32) -> Timestamp {
        Timestamp::decode(low, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_documentation() {
        // "Inode Timestamps" lists the ranges of the two epoch bits.
        for (seconds, low, epoch) in [
            (-1i64, 0xffff_ffffu32, 0u32),
            (i64::from(i32::MIN), 0x8000_0000, 0),
            (0x7fff_ffff, 0x7fff_ffff, 0),
            (0x8000_0000, 0x8000_0000, 1),
            (0xffff_ffff, 0xffff_ffff, 1),
            (0x1_0000_0000, 0, 1),
            (0x1_8000_0000, 0x8000_0000, 2),
            (0x3_7fff_ffff, 0x7fff_ffff, 3),
        ] {
            let time = Timestamp { seconds, nanoseconds: 123_456_789 };
            assert!(time.fits());
            assert_eq!(time.encode(), (low, 123_456_789 << 2 | epoch), "{seconds}");
            assert_eq!(Timestamp::decode(low, 123_456_789 << 2 | epoch), time);
        }
    }

    #[test]
    fn what_does_not_fit_goes_to_the_nearest() {
        let late = Timestamp { seconds: i64::MAX, nanoseconds: 0 };
        assert!(!late.fits());
        let (low, extra) = late.encode();
        assert_eq!(Timestamp::decode(low, extra), Timestamp::MAX);
        assert!(!Timestamp { seconds: 0, nanoseconds: 1_000_000_000 }.fits());
    }
}
