//! A bit for each block of a segment.

use janus_proto::ids::SEGMENT_BLOCKS;

/// Blocks decided on at once: the bits of a word.
pub const WORD_BLOCKS: u64 = 64;
/// Words in a segment.
pub const SEGMENT_WORDS: usize = (SEGMENT_BLOCKS / WORD_BLOCKS) as usize;
/// One bit for each block of a segment, that of its first block lowest.
pub type SegmentBits = [u64; SEGMENT_WORDS];

/// The bits of the blocks for which `is_set`, of the first `blocks` of a segment.
pub(crate) fn of(blocks: usize, is_set: impl Fn(usize) -> bool) -> SegmentBits {
    let mut bits = [0; SEGMENT_WORDS];
    for at in (0..blocks.min(SEGMENT_BLOCKS as usize)).filter(|at| is_set(*at)) {
        bits[at / 64] |= 1 << (at % 64);
    }
    bits
}

/// The bit of the block at `first`, and where bits like it end.
pub(crate) fn run(bits: &SegmentBits, first: u64) -> (bool, u64) {
    let word = |at: u64| bits[(at / 64) as usize];
    let is_set = word(first) >> (first % 64) & 1 == 1;
    let mut at = first;
    while at < SEGMENT_BLOCKS {
        let others = if is_set { !word(at) } else { word(at) } >> (at % 64);
        if others != 0 {
            return (is_set, at + u64::from(others.trailing_zeros()));
        }
        at = (at / 64 + 1) * 64;
    }
    (is_set, SEGMENT_BLOCKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_where_the_bits_change() {
        let mut bits = [0; SEGMENT_WORDS];
        bits[0] = 1 << 63;
        bits[1] = 0b11;
        assert_eq!(run(&bits, 0), (false, 63));
        assert_eq!(run(&bits, 64), (true, 66));
        assert_eq!(run(&bits, 63), (true, 66));
        assert_eq!(run(&bits, 66), (false, SEGMENT_BLOCKS));
        let mut bits = [0; SEGMENT_WORDS];
        bits[1] = 0b1100;
        bits[15] = 1 << 63;
        assert_eq!(run(&bits, 0), (false, 66));
        assert_eq!(run(&bits, 66), (true, 68));
        assert_eq!(run(&bits, 67), (true, 68));
        assert_eq!(run(&bits, 68), (false, 1023));
        assert_eq!(run(&bits, 1023), (true, 1024));
        assert_eq!(run(&[u64::MAX; 16], 5), (true, 1024));
        assert_eq!(run(&of(5, |at| at != 2), 3), (true, 5));
    }
}
