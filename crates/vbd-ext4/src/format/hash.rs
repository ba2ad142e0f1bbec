//! Hashes of names ("Hash Tree Directories"): the legacy one, half of MD4 and TEA, each with names as signed or unsigned
//! characters.

/// Which hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// The first one.
    Legacy,
    /// MD4 with half of its input and rounds; the usual one.
    HalfMd4,
    /// The Tiny Encryption Algorithm.
    Tea,
}

/// How names become hashes in one directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hasher {
    /// Which hash.
    pub algorithm: Algorithm,
    /// Whether characters are taken as unsigned.
    pub unsigned: bool,
    /// The filesystem's seed; zeros mean the algorithm's own.
    pub seed: [u32; 4],
}

/// The hash and what tells apart those that have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NameHash {
    /// The hash, always even.
    pub major: u32,
    /// More of it; not on the disk.
    pub minor: u32,
}

/// The largest hash is kept for "end of the directory".
const END: u32 = 0x7fff_ffff << 1;
/// What MD4 begins with (RFC 1320, section 3.3).
const MD4_BEGIN: [u32; 4] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];

impl Hasher {
    /// From the numbers on the disk: the version in the tree's root, and the superblock's flags where it does not say
    /// whether characters are unsigned. `None` for a version not known here (6 is SipHash, of encrypted directories).
    pub fn new(version: u8, unsigned_flag: bool, seed: [u32; 4]) -> Option<Hasher> {
        let (algorithm, unsigned) = match version {
            0 => (Algorithm::Legacy, unsigned_flag),
            1 => (Algorithm::HalfMd4, unsigned_flag),
            2 => (Algorithm::Tea, unsigned_flag),
            3 => (Algorithm::Legacy, true),
            4 => (Algorithm::HalfMd4, true),
            5 => (Algorithm::Tea, true),
            _ => return None,
        };
        Some(Hasher { algorithm, unsigned, seed })
    }

    /// The hash of a name.
    pub fn hash(&self, name: &[u8]) -> NameHash {
        let mut state = if self.seed == [0; 4] { MD4_BEGIN } else { self.seed };
        let (major, minor) = match self.algorithm {
            Algorithm::Legacy => (self.legacy(name), 0),
            Algorithm::HalfMd4 => {
                for at in (0..name.len()).step_by(32) {
                    half_md4(&mut state, &self.words::<8>(&name[at..]));
                }
                (state[1], state[2])
            }
            Algorithm::Tea => {
                for at in (0..name.len()).step_by(16) {
                    tea(&mut state, &self.words::<4>(&name[at..]));
                }
                (state[0], state[1])
            }
        };
        let major = major & !1;
        NameHash { major: if major == END { END - 2 } else { major }, minor }
    }

    fn character(&self, byte: u8) -> u32 {
        if self.unsigned { u32::from(byte) } else { i32::from(byte.cast_signed()).cast_unsigned() }
    }

    /// The next characters as words, the most significant first, filled up with the length of what is left of the name.
    fn words<const N: usize>(&self, rest: &[u8]) -> [u32; N] {
        #[expect(clippy::cast_possible_truncation, reason = "names have at most 255 bytes")]
        let length = rest.len() as u32;
        let padding = (length | length << 8) * 0x1_0001;
        let mut words = [padding; N];
        for (word, characters) in words.iter_mut().zip(rest.chunks(4)) {
            *word =
                characters.iter().fold(padding, |word, byte| (word << 8).wrapping_add(self.character(*byte)));
        }
        words
    }

    fn legacy(&self, name: &[u8]) -> u32 {
        let (mut last, mut before) = (0x12a3_fe2du32, 0x37ab_e8f9u32);
        for byte in name {
            let product = self.character(*byte).wrapping_mul(7_152_373);
            let mut next = before.wrapping_add(last ^ product);
            if next & 1 << 31 != 0 {
                next = next.wrapping_sub(0x7fff_ffff);
            }
            (before, last) = (last, next);
        }
        last << 1
    }
}

/// Three rounds of eight steps over MD4's state; the order of words and the shifts are what half of MD4 leaves of RFC 1320.
fn half_md4(state: &mut [u32; 4], words: &[u32; 8]) {
    type Mix = fn(u32, u32, u32) -> u32;
    const ROUNDS: [(Mix, u32, [usize; 8], [u32; 4]); 3] = [
        (|x, y, z| x & y | !x & z, 0, [0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19]),
        // The majority of each bit.
        (|x, y, z| x & y | x & z | y & z, 0x5a82_7999, [1, 3, 5, 7, 0, 2, 4, 6], [3, 5, 9, 13]),
        (|x, y, z| x ^ y ^ z, 0x6ed9_eba1, [3, 7, 2, 6, 1, 5, 0, 4], [3, 9, 11, 15]),
    ];
    let [mut a, mut b, mut c, mut d] = *state;
    for (mix, constant, order, shifts) in ROUNDS {
        for (step, word) in order.into_iter().enumerate() {
            let sum = a.wrapping_add(mix(b, c, d)).wrapping_add(words[word]).wrapping_add(constant);
            (a, b, c, d) = (d, sum.rotate_left(shifts[step % 4]), b, c);
        }
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d]) {
        *word = word.wrapping_add(add);
    }
}

/// Sixteen rounds of TEA: the words are the key, the state's first half the text.
fn tea(state: &mut [u32; 4], key: &[u32; 4]) {
    const DELTA: u32 = 0x9e37_79b9;
    let [mut left, mut right, ..] = *state;
    let mut sum = 0u32;
    let mix = |half: u32, sum: u32, first: u32, second: u32| {
        (half << 4).wrapping_add(first) ^ half.wrapping_add(sum) ^ (half >> 5).wrapping_add(second)
    };
    for _ in 0..16 {
        sum = sum.wrapping_add(DELTA);
        left = left.wrapping_add(mix(right, sum, key[0], key[1]));
        right = right.wrapping_add(mix(left, sum, key[2], key[3]));
    }
    state[0] = state[0].wrapping_add(left);
    state[1] = state[1].wrapping_add(right);
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: [u32; 4] = [0x7856_3412, 0x3412_3412, 0x3412_3412, 0xbc9a_7856];

    fn hash(algorithm: Algorithm, seed: [u32; 4], name: &[u8]) -> (u32, u32) {
        let NameHash { major, minor } = Hasher { algorithm, unsigned: false, seed }.hash(name);
        (major, minor)
    }

    /// What debugfs's dx_hash says, with the seed 12345678-1234-1234-1234-123456789abc or none.
    #[test]
    fn hashes_as_debugfs_has_them() {
        let long = [b'a'; 200];
        assert_eq!(hash(Algorithm::HalfMd4, SEED, b"hello"), (0x06cc_2f6e, 0x1596_7186));
        assert_eq!(hash(Algorithm::HalfMd4, [0; 4], "hellö".as_bytes()), (0x0622_6d8c, 0x05c8_fc20));
        assert_eq!(hash(Algorithm::HalfMd4, SEED, &long), (0x448f_79cc, 0x21eb_f06b));
        assert_eq!(hash(Algorithm::Tea, [0; 4], "hellö".as_bytes()), (0xee31_9486, 0x420e_7504));
        assert_eq!(hash(Algorithm::Tea, SEED, &long), (0xc3da_97ee, 0x8dd0_e9c1));
        assert_eq!(hash(Algorithm::Legacy, [0; 4], "hellö".as_bytes()), (0xde14_66b4, 0));
    }

    #[test]
    fn unsigned_characters_matter_beyond_ascii_only() {
        for version in 0..3 {
            let signed = Hasher::new(version, false, SEED).unwrap();
            let unsigned = Hasher::new(version + 3, false, SEED).unwrap();
            assert_eq!(signed.hash(b"plain"), unsigned.hash(b"plain"));
            assert_ne!(signed.hash(b"\xff"), unsigned.hash(b"\xff"));
        }
        assert_eq!(Hasher::new(6, false, SEED), None);
    }
}
