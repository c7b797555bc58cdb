//! Which blocks travel: pure decisions over 64 blocks at a time, one bit for each.

use janus_proto::{ids::BlockHash, model::Extent};

use crate::segment_bits::WORD_BLOCKS;

/// Known hashes of up to 64 consecutive blocks.
#[derive(Debug, Clone, Copy)]
pub enum Known<'a> {
    /// All of them are zero blocks.
    Zeros,
    /// Their hashes, as many as there are blocks.
    Hashes(&'a [BlockHash]),
}

impl<'a> Known<'a> {
    /// Of a segment's hashes (`None`: all zero), those of word `word`.
    pub fn word(segment: Option<&'a [BlockHash]>, word: usize) -> Self {
        let Some(hashes) = segment else { return Self::Zeros };
        let first = (word * WORD_BLOCKS as usize).min(hashes.len());
        let end = (first + WORD_BLOCKS as usize).min(hashes.len());
        Self::Hashes(&hashes[first..end])
    }

    /// Bits of the blocks, of so many, whose hash is known.
    pub fn known(self, blocks: usize) -> u64 {
        match self {
            Self::Zeros => mask(blocks),
            Self::Hashes(hashes) => mask(hashes.len().min(blocks)),
        }
    }

    /// Bits of the blocks, of so many, that are known to be zeros.
    pub fn zeros(self, blocks: usize, zero_of: impl Fn(usize) -> BlockHash) -> u64 {
        match self {
            Self::Zeros => mask(blocks),
            Self::Hashes(hashes) => zero_bits(&hashes[..hashes.len().min(blocks)], zero_of),
        }
    }

    /// Bits of the blocks whose new hash is another one; `zero` has the bits of new zero blocks.
    pub fn differing(self, new: &[BlockHash], zero: u64) -> u64 {
        match self {
            Self::Zeros => !zero & mask(new.len()),
            // A known list that is too short knows nothing of the rest: that differs.
            Self::Hashes(old) => bits(
                new.iter()
                    .enumerate()
                    .map(|(index, hash)| old.get(index).is_none_or(|old| old != hash)),
            ),
        }
    }
}

/// Bits of the blocks to send: all that differ from what the session holds (`session`), and those of `must`, of
/// which nobody knows what the session holds.
pub fn to_send(session: Known<'_>, must: u64, new: &[BlockHash], zero: u64) -> u64 {
    session.differing(new, zero) | (must & mask(new.len()))
}

/// Bits of the hashes that are `zero_of` their place.
pub fn zero_bits(new: &[BlockHash], zero_of: impl Fn(usize) -> BlockHash) -> u64 {
    bits(new.iter().enumerate().map(|(index, hash)| *hash == zero_of(index)))
}

/// The lowest `count` bits, `count` at most 64.
pub fn mask(count: usize) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

/// Adds the blocks of `send` to `extents`, merging what continues; blocks of `zero` become zero extents. Bit 0 is
/// block `first`, which lies behind all blocks added before.
pub fn append_extents(extents: &mut Vec<Extent>, first: u64, send: u64, zero: u64) {
    let mut left = send;
    while left != 0 {
        let start = left.trailing_zeros();
        let is_zero = zero >> start & 1 == 1;
        let same_kind = if is_zero { zero } else { !zero };
        let count = (!((left & same_kind) >> start)).trailing_zeros().min(64 - start);
        push(
            extents,
            Extent { first: first + u64::from(start), count: u64::from(count), zero: is_zero },
        );
        left &= !(mask(count as usize) << start);
    }
}

fn push(extents: &mut Vec<Extent>, next: Extent) {
    match extents.last_mut() {
        Some(last) if last.end() == next.first && last.zero == next.zero => {
            last.count += next.count
        }
        _ => extents.push(next),
    }
}

fn bits(flags: impl Iterator<Item = bool>) -> u64 {
    flags.take(64).enumerate().fold(0, |all, (index, flag)| all | u64::from(flag) << index)
}

#[cfg(test)]
mod tests {
    use janus_proto::hash::{hash_block, zero_block};
    use proptest::prelude::*;

    use super::*;

    fn hash(byte: u8) -> BlockHash {
        if byte == 0 { zero_block() } else { hash_block(&[byte; 64]) }
    }

    fn hashes(bytes: &[u8]) -> Vec<BlockHash> {
        bytes.iter().map(|byte| hash(*byte)).collect()
    }

    fn decide(old: Option<&[u8]>, must: u64, new: &[u8]) -> u64 {
        let (old, new) = (old.map(hashes), hashes(new));
        let zero = zero_bits(&new, |_| zero_block());
        to_send(old.as_deref().map_or(Known::Zeros, Known::Hashes), must, &new, zero)
    }

    #[test]
    fn zero_blocks_against_no_head_do_not_travel() {
        assert_eq!(decide(None, 0, &[0, 1, 0, 2]), 0b1010);
        assert_eq!(decide(None, 0, &[0; 64]), 0);
    }

    #[test]
    fn zero_blocks_over_content_travel_as_zero_extents() {
        assert_eq!(decide(Some(&[5, 1, 5]), 0, &[0, 1, 0]), 0b101);
        let mut extents = vec![];
        append_extents(&mut extents, 100, 0b101, 0b101);
        assert_eq!(
            extents,
            [
                Extent { first: 100, count: 1, zero: true },
                Extent { first: 102, count: 1, zero: true }
            ]
        );
    }

    #[test]
    fn must_send_travels_though_equal_and_never_past_the_end() {
        assert_eq!(decide(Some(&[1, 2, 3]), u64::MAX, &[1, 2, 3]), 0b111);
        assert_eq!(decide(Some(&[1, 2, 3]), 0, &[1, 2, 3]), 0);
    }

    #[test]
    fn a_known_list_that_is_too_short_knows_nothing_of_the_rest() {
        assert_eq!(decide(Some(&[1]), 0, &[1, 0, 3]), 0b110);
    }

    proptest! {
        #[test]
        fn extents_are_exactly_the_sent_blocks(words in prop::collection::vec((any::<u64>(), any::<u64>()), 1..4)) {
            let mut extents = vec![];
            for (index, (send, zero)) in words.iter().enumerate() {
                append_extents(&mut extents, index as u64 * 64, *send, *zero);
            }
            let expected: Vec<(u64, bool)> = (0..words.len() as u64 * 64)
                .filter(|b| words[(b / 64) as usize].0 >> (b % 64) & 1 == 1)
                .map(|b| (b, words[(b / 64) as usize].1 >> (b % 64) & 1 == 1))
                .collect();
            let found: Vec<_> = extents.iter().flat_map(|e| (e.first..e.end()).map(|b| (b, e.zero))).collect();
            prop_assert_eq!(found, expected);
            prop_assert!(extents.windows(2).all(|w| w[0].end() < w[1].first || w[0].zero != w[1].zero));
        }
    }
}
