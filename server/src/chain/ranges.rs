//! Sets of blocks as ranges, in the words of the store.

use std::ops::Range;

use janus_proto::{ids::SEGMENT_BLOCKS, ranges::Ranges};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::table::SegmentBitmap;

/// Blocks of a disk. As text `first+count first+count`, which keeps files short.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockRanges(Ranges);

impl BlockRanges {
    /// All blocks below `end`.
    pub fn all(end: u64) -> Self {
        Self((0..end).into())
    }

    /// Adds blocks.
    pub fn insert(&mut self, added: Range<u64>) {
        self.0.insert(added);
    }

    /// Adds the blocks of another set.
    pub fn extend(&mut self, other: &Self) {
        other.iter().for_each(|range| self.insert(range));
    }

    /// Takes blocks out.
    pub fn remove(&mut self, gone: Range<u64>) {
        self.0.remove(gone);
    }

    /// Takes the marked blocks of a segment out.
    pub fn remove_marked(&mut self, segment: u64, marked: &SegmentBitmap) {
        for run in marked_runs(segment, marked) {
            self.remove(run);
        }
    }

    /// Adds the marked blocks of a segment.
    pub fn insert_marked(&mut self, segment: u64, marked: &SegmentBitmap) {
        for run in marked_runs(segment, marked) {
            self.insert(run);
        }
    }

    /// Makes no more than so many ranges of them, by adding the blocks of the smallest gaps.
    pub fn coarsen(&mut self, most: usize) {
        let mut least_gap = SEGMENT_BLOCKS;
        while self.len() > most.max(1) {
            let ranges: Vec<Range<u64>> = self.iter().collect();
            for pair in ranges.windows(2) {
                if pair[1].start - pair[0].end < least_gap {
                    self.insert(pair[0].end..pair[1].start);
                }
            }
            least_gap *= 2;
        }
    }

    /// True when one of these blocks is in the set.
    pub fn intersects(&self, blocks: &Range<u64>) -> bool {
        self.0.intersects(blocks)
    }

    /// True when this block is in the set.
    pub fn contains(&self, block: u64) -> bool {
        self.0.contains(block)
    }

    /// The ranges, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter()
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.0.total()
    }

    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True when no block is in the set.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The blocks of one segment.
pub fn segment_blocks(segment: u64) -> Range<u64> {
    segment * SEGMENT_BLOCKS..(segment + 1) * SEGMENT_BLOCKS
}

/// Marked blocks of a segment that follow each other, as blocks of the disk.
fn marked_runs(segment: u64, marked: &SegmentBitmap) -> impl Iterator<Item = Range<u64>> {
    let first = segment * SEGMENT_BLOCKS;
    let mut blocks = marked.blocks().map(move |index| first + index as u64).peekable();
    std::iter::from_fn(move || {
        let start = blocks.next()?;
        let mut end = start + 1;
        while blocks.next_if_eq(&end).is_some() {
            end += 1;
        }
        Some(start..end)
    })
}

impl Serialize for BlockRanges {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let one = |range: Range<u64>| format!("{}+{}", range.start, range.end - range.start);
        serializer.serialize_str(&self.iter().map(one).collect::<Vec<_>>().join(" "))
    }
}

impl<'de> Deserialize<'de> for BlockRanges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut ranges = Self::default();
        for part in text.split_whitespace() {
            let numbers = part.split_once('+').and_then(|(first, count)| {
                let first: u64 = first.parse().ok()?;
                Some(first..first.checked_add(count.parse().ok()?)?)
            });
            let range = numbers.ok_or_else(|| D::Error::custom("not a range of blocks"))?;
            ranges.insert(range);
        }
        Ok(ranges)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_that_touch_become_one() {
        let mut ranges = BlockRanges::default();
        [5..7, 9..10, 7..9, 20..21].into_iter().for_each(|range| ranges.insert(range));
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [5..10, 20..21]);
        ranges.remove(6..8);
        assert_eq!(serde_json::to_string(&ranges).unwrap(), "\"5+1 8+2 20+1\"");
        assert!(ranges.intersects(&(0..6)) && !ranges.intersects(&(6..8)));
    }

    #[test]
    fn many_ranges_become_few_which_hold_all_their_blocks() {
        let mut ranges = BlockRanges::default();
        (0..5000).for_each(|index| ranges.insert(index * 3000..index * 3000 + 7));
        let all = ranges.clone();
        ranges.coarsen(5000);
        assert_eq!(ranges, all);
        ranges.coarsen(4096);
        assert!(ranges.len() <= 4096, "{}", ranges.len());
        assert!(all.iter().flatten().all(|block| ranges.contains(block)));
        let end = 4999 * 3000 + 7;
        assert_eq!(
            (ranges.iter().next().unwrap().start, ranges.iter().last().unwrap().end),
            (0, end)
        );
    }

    #[test]
    fn marked_blocks_are_taken_out() {
        let mut marked = SegmentBitmap::default();
        [0, 1, 1023].into_iter().for_each(|block| marked.insert(block));
        let mut ranges = BlockRanges::all(3000);
        ranges.remove_marked(1, &marked);
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [0..1024, 1026..2047, 2048..3000]);
    }

    proptest! {
        #[test]
        fn ranges_are_a_set_of_blocks(steps in prop::collection::vec((any::<bool>(), 0..60u64, 0..20u64), 0..30)) {
            let (mut ranges, mut model) = (BlockRanges::default(), BTreeSet::new());
            for (add, first, count) in steps {
                if add {
                    ranges.insert(first..first + count);
                    model.extend(first..first + count);
                } else {
                    ranges.remove(first..first + count);
                    model.retain(|block| !(first..first + count).contains(block));
                }
            }
            prop_assert_eq!(ranges.iter().flatten().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(ranges.blocks(), model.len() as u64);
            let all: Vec<_> = ranges.iter().collect();
            prop_assert!(all.windows(2).all(|pair| pair[0].end < pair[1].start));
            let text = serde_json::to_string(&ranges).unwrap();
            prop_assert_eq!(serde_json::from_str::<BlockRanges>(&text).unwrap(), ranges);
        }
    }
}
