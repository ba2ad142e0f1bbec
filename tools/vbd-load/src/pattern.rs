//! What `--verify` writes: each 512 bytes carry their offset on the disk, a sequence number, and words made of both.

const SECTOR: usize = 512;

/// A small, fast generator of random numbers (splitmix64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        let wide = u128::from(self.next()) * u128::from(limit);
        u64::try_from(wide >> 64).expect("the upper half of 128 bits")
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn words(offset: u64, sequence: u64) -> impl Iterator<Item = u64> {
    let mut state = Random::new(offset ^ sequence.rotate_left(40));
    [offset, sequence].into_iter().chain(std::iter::from_fn(move || Some(state.next()))).take(SECTOR / 8)
}

/// Fills a block that goes to `offset`.
pub(crate) fn fill(block: &mut [u8], offset: u64, sequence: u64) {
    for (sector, at) in block.chunks_exact_mut(SECTOR).zip((offset..).step_by(SECTOR)) {
        for (bytes, word) in sector.chunks_exact_mut(8).zip(words(at, sequence)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// Checks a block read from `offset` against what [`fill`] wrote there; the error says what was found.
pub(crate) fn check(block: &[u8], offset: u64, sequence: u64) -> Result<(), String> {
    for (sector, at) in block.chunks_exact(SECTOR).zip((offset..).step_by(SECTOR)) {
        let found = || sector.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes")));
        if !found().eq(words(at, sequence)) {
            let head: Vec<u64> = found().take(2).collect();
            return Err(format!(
                "wrong data at offset {at}: expected offset {at} and sequence {sequence}, found {} and {}",
                head[0], head[1]
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detects_a_flipped_bit_a_moved_block_and_an_old_one() {
        let mut block = vec![0; 4096];
        fill(&mut block, 8192, 7);
        assert_eq!(check(&block, 8192, 7), Ok(()));
        assert!(check(&block, 4096, 7).unwrap_err().contains("found 8192 and 7"));
        assert!(check(&block, 8192, 8).is_err());
        block[4095] ^= 1;
        assert!(check(&block, 8192, 7).unwrap_err().contains("offset 11776"));
    }

    #[test]
    fn random_numbers_stay_below_their_limit_and_reach_it() {
        let mut random = Random::new(3);
        let seen: std::collections::BTreeSet<u64> = (0..1000).map(|_| random.below(10)).collect();
        assert_eq!(seen, (0..10).collect());
    }
}
