//! Finding zeroes.

use std::ops::Range;

/// Bytes that are looked at before the question is whether to go on.
const STRIDE: usize = 256;

/// Whether all bytes are zero.
pub(crate) fn are_zero(bytes: &[u8]) -> bool {
    let mut strides = bytes.chunks_exact(STRIDE);
    strides.by_ref().all(|stride| {
        // No branch within a stride, so that the compiler makes vector instructions of it.
        let words = stride.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("8 bytes")));
        words.fold(0, |all, word| all | word) == 0
    }) && strides.remainder().iter().all(|byte| *byte == 0)
}

/// The longest runs of `unit`-sized pieces (the last may be shorter) that `wanted` says yes to.
pub(crate) fn runs(len: usize, unit: usize, wanted: impl Fn(Range<usize>) -> bool) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for start in (0..len).step_by(unit.max(1)) {
        let piece = start..(start + unit).min(len);
        if !wanted(piece.clone()) {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.end == piece.start => last.end = piece.end,
            _ => runs.push(piece),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_is_found() {
        let mut bytes = vec![0; 1000];
        assert!(are_zero(&bytes) && are_zero(&[]));
        for at in 0..bytes.len() {
            bytes[at] = 1;
            assert!(!are_zero(&bytes), "{at}");
            assert!(are_zero(&bytes[..at]) && are_zero(&bytes[at + 1..]));
            bytes[at] = 0;
        }
    }

    #[test]
    fn runs_join_and_end_where_the_bytes_do() {
        let bytes = [0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1];
        let found = runs(bytes.len(), 2, |piece| !are_zero(&bytes[piece]));
        assert_eq!(found, [2..6, 10..11]);
        assert!(runs(0, 4096, |_| true).is_empty());
    }
}
