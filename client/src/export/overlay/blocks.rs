//! Which blocks were written: bits by segment, only for segments that have some.

use std::{collections::BTreeMap, ops::Range};

use janus_proto::ids::SEGMENT_BLOCKS;

use crate::segment_bits::{self, SEGMENT_WORDS, SegmentBits};

/// A set of blocks; about 160 bytes for each segment that has one.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Blocks(BTreeMap<u64, SegmentBits>);

impl Blocks {
    pub(super) fn contains(&self, block: u64) -> bool {
        let bits = self.0.get(&(block / SEGMENT_BLOCKS));
        bits.is_some_and(|bits| bits[word(block)] >> (block % 64) & 1 == 1)
    }

    /// Adds blocks.
    pub(super) fn insert(&mut self, blocks: Range<u64>) {
        let mut at = blocks.start;
        while at < blocks.end {
            let bits = self.0.entry(at / SEGMENT_BLOCKS).or_insert([0; SEGMENT_WORDS]);
            let stop = blocks.end.min((at / SEGMENT_BLOCKS + 1) * SEGMENT_BLOCKS);
            while at < stop {
                let end = stop.min((at / 64 + 1) * 64);
                bits[word(at)] |= (u64::MAX >> (64 - (end - at))) << (at % 64);
                at = end;
            }
        }
    }

    /// Whether `first` is in the set, and the first block up to `end` of which that isn't so.
    pub(super) fn run(&self, first: u64, end: u64) -> (bool, u64) {
        let is_in = self.contains(first);
        let mut at = first;
        while at < end {
            let segment = at / SEGMENT_BLOCKS;
            let Some(bits) = self.0.get(&segment) else {
                if is_in {
                    return (true, at);
                }
                let next = self.0.range(segment..).next();
                at = next.map_or(end, |(next, _)| next * SEGMENT_BLOCKS);
                continue;
            };
            let start = segment * SEGMENT_BLOCKS;
            match segment_bits::run(bits, at - start) {
                (kind, stop) if kind == is_in => at = start + stop,
                _ => return (is_in, at.min(end)),
            }
        }
        (is_in, end)
    }
}

fn word(block: u64) -> usize {
    (block % SEGMENT_BLOCKS / 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use janus_proto::ranges::Ranges;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_those_of_a_set(
            ranges in prop::collection::vec((0u64..5000, 1u64..1500), 0..20),
            end in 1u64..8000,
        ) {
            let (mut blocks, mut model) = (Blocks::default(), Ranges::new());
            for (start, len) in ranges {
                blocks.insert(start..start + len);
                model.insert(start..start + len);
            }
            let (mut at, mut found) = (0, Ranges::new());
            while at < end {
                let (is_in, stop) = blocks.run(at, end);
                prop_assert!(stop > at && stop <= end);
                prop_assert_eq!(blocks.contains(at), is_in);
                if is_in {
                    found.push(at..stop);
                }
                at = stop;
            }
            prop_assert_eq!(found, model.intersect(&Ranges::from(0..end)));
        }
    }
}
