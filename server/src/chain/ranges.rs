//! Sets of blocks as ranges: ascending, apart from each other, as few as can be.

use std::ops::Range;

use janus_proto::ids::SEGMENT_BLOCKS;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::table::SegmentBitmap;

/// Blocks of a disk. As text `first+count first+count`, which keeps files short.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockRanges(Vec<Range<u64>>);

impl BlockRanges {
    /// All blocks below `end`.
    pub fn all(end: u64) -> Self {
        let mut all = Self::default();
        all.insert(0..end);
        all
    }

    /// Adds blocks.
    pub fn insert(&mut self, added: Range<u64>) {
        if added.is_empty() {
            return;
        }
        let from = self.0.partition_point(|range| range.end < added.start);
        let to = self.0.partition_point(|range| range.start <= added.end);
        let touching = self.0[from..to].iter();
        let merged =
            touching.fold(added, |all, range| all.start.min(range.start)..all.end.max(range.end));
        self.0.splice(from..to, [merged]);
    }

    /// Adds the blocks of another set.
    pub fn extend(&mut self, other: &Self) {
        other.0.iter().for_each(|range| self.insert(range.clone()));
    }

    /// Takes blocks out.
    pub fn remove(&mut self, gone: Range<u64>) {
        let from = self.0.partition_point(|range| range.end <= gone.start);
        let to = self.0.partition_point(|range| range.start < gone.end);
        if from >= to || gone.is_empty() {
            return;
        }
        let left = self.0[from].start..gone.start;
        let right = gone.end..self.0[to - 1].end;
        self.0.splice(from..to, [left, right].into_iter().filter(|range| !range.is_empty()));
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

    /// True when one of these blocks is in the set.
    pub fn intersects(&self, blocks: &Range<u64>) -> bool {
        let next = self.0.partition_point(|range| range.end <= blocks.start);
        self.0.get(next).is_some_and(|range| range.start < blocks.end)
    }

    /// True when this block is in the set.
    pub fn contains(&self, block: u64) -> bool {
        self.intersects(&(block..block + 1))
    }

    /// The ranges, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().cloned()
    }

    /// Number of blocks.
    pub fn blocks(&self) -> u64 {
        self.0.iter().map(|range| range.end - range.start).sum()
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
        let one = |range: &Range<u64>| format!("{}+{}", range.start, range.end - range.start);
        serializer.serialize_str(&self.0.iter().map(one).collect::<Vec<_>>().join(" "))
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
            prop_assert!(ranges.0.windows(2).all(|pair| pair[0].end < pair[1].start));
            let text = serde_json::to_string(&ranges).unwrap();
            prop_assert_eq!(serde_json::from_str::<BlockRanges>(&text).unwrap(), ranges);
        }
    }
}
