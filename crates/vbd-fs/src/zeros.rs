//! What need not be stored.

/// Whether bytes are all zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // What is no zeros mostly shows it at once: it is looked at in small pieces, each without a branch.
    let (pieces, rest) = bytes.as_chunks::<64>();
    pieces.iter().all(|piece| piece.iter().fold(0, |all, &byte| all | byte) == 0)
        && rest.iter().all(|&b| b == 0)
}

#[cfg(test)]
mod tests {
    use super::is_zero;

    #[test]
    fn one_byte_anywhere_is_found() {
        for length in [0, 1, 63, 64, 65, 300] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "{at} of {length}");
                bytes[at] = 0;
            }
        }
    }
}
