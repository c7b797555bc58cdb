//! Sets of numbers, such as bytes or blocks of a disk: ascending ranges that neither touch nor overlap.

use std::ops::Range;

/// A set of numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(Vec<Range<u64>>);

impl Ranges {
    /// The empty set.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Adds `range`, which begins at or behind the start of all that was added before: the cheap way to build a set.
    /// Anything else is added as [`Ranges::insert`] does.
    pub fn push(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some(last) if range.start < last.start => self.insert(range),
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => self.0.push(range),
        }
    }

    /// Adds `range`.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let first = self.0.partition_point(|known| known.end < range.start);
        let end = self.0.partition_point(|known| known.start <= range.end);
        let merged = match self.0.get(first..end) {
            Some([first, .., last]) => first.start.min(range.start)..last.end.max(range.end),
            Some([only]) => only.start.min(range.start)..only.end.max(range.end),
            _ => range,
        };
        self.0.splice(first..end, [merged]);
    }

    /// Takes `gone` out.
    pub fn remove(&mut self, gone: Range<u64>) {
        let first = self.0.partition_point(|known| known.end <= gone.start);
        let end = self.0.partition_point(|known| known.start < gone.end);
        let Some(known) = self.0.get(first..end).filter(|_| !gone.is_empty()) else { return };
        let [Some(left), Some(right)] = [known.first(), known.last()] else { return };
        let rest = [left.start..gone.start, gone.end..right.end];
        self.0.splice(first..end, rest.into_iter().filter(|range| !range.is_empty()));
    }

    /// Its ranges, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().cloned()
    }

    /// Those that end behind `at`.
    pub fn behind(&self, at: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        let first = self.0.partition_point(|known| known.end <= at);
        self.0.get(first..).unwrap_or_default().iter().cloned()
    }

    /// True when there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many ranges it has.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// How many numbers are in it: bytes, where it is a set of bytes.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|range| range.end - range.start).sum()
    }

    /// True when `at` is in it.
    pub fn contains(&self, at: u64) -> bool {
        self.behind(at).next().is_some_and(|range| range.start <= at)
    }

    /// True when any of `others` is in it.
    pub fn intersects(&self, others: &Range<u64>) -> bool {
        self.behind(others.start).next().is_some_and(|range| range.start < others.end)
    }

    /// What of `0..end` is not in it.
    pub fn complement(&self, end: u64) -> Self {
        let mut rest = Self::new();
        let mut at = 0;
        for range in self.iter().take_while(|range| range.start < end) {
            rest.push(at..range.start);
            at = range.end;
        }
        rest.push(at..end.max(at));
        rest
    }

    /// What is in any of both.
    pub fn union(&self, other: &Self) -> Self {
        self.iter().chain(other.iter()).collect::<Vec<_>>().into()
    }

    /// What is in both.
    pub fn intersect(&self, other: &Self) -> Self {
        let mut both = Self::new();
        let (mut ours, mut theirs) = (self.iter().peekable(), other.iter().peekable());
        while let (Some(a), Some(b)) = (ours.peek(), theirs.peek()) {
            both.push(a.start.max(b.start)..a.end.min(b.end));
            if a.end < b.end {
                ours.next();
            } else {
                theirs.next();
            }
        }
        both
    }

    /// What is in this one only.
    pub fn subtract(&self, other: &Self) -> Self {
        let end = self.0.last().map_or(0, |range| range.end);
        self.intersect(&other.complement(end))
    }

    /// All of it, `by` bytes further on; what would lie past 2^64 is dropped.
    pub fn shift(&self, by: u64) -> Self {
        let shifted =
            self.iter().map(|range| range.start.saturating_add(by)..range.end.saturating_add(by));
        shifted.collect()
    }

    /// Each number as the `unit` numbers that it stands for: clusters as their bytes.
    pub fn scaled(&self, unit: u64) -> Self {
        let times = |at: u64| at.saturating_mul(unit);
        self.iter().map(|range| times(range.start)..times(range.end)).collect()
    }

    /// Made larger, to whole multiples of `unit`.
    pub fn outward(&self, unit: u64) -> Self {
        let rounded = self
            .iter()
            .map(|range| range.start / unit * unit..range.end.div_ceil(unit).saturating_mul(unit));
        rounded.collect()
    }

    /// Made smaller, to whole multiples of `unit`.
    pub fn inward(&self, unit: u64) -> Self {
        let rounded = self
            .iter()
            .map(|range| range.start.div_ceil(unit).saturating_mul(unit)..range.end / unit * unit);
        rounded.collect()
    }
}

impl From<Range<u64>> for Ranges {
    fn from(range: Range<u64>) -> Self {
        std::iter::once(range).collect()
    }
}

/// In any order.
impl From<Vec<Range<u64>>> for Ranges {
    fn from(mut ranges: Vec<Range<u64>>) -> Self {
        ranges.sort_unstable_by_key(|range| range.start);
        ranges.into_iter().collect()
    }
}

impl FromIterator<Range<u64>> for Ranges {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut set = Self::new();
        ranges.into_iter().for_each(|range| set.push(range));
        set
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const END: u64 = 64;

    fn set() -> impl Strategy<Value = (Ranges, Vec<bool>)> {
        prop::collection::vec((0..END, 0..12u64), 0..12).prop_map(|parts| {
            let (mut ranges, mut model) = (Ranges::new(), vec![false; END as usize]);
            for (index, (start, len)) in parts.into_iter().enumerate() {
                let range = start..(start + len).min(END);
                range.clone().for_each(|at| model[at as usize] = true);
                if index % 2 == 0 { ranges.insert(range) } else { ranges.push(range) }
            }
            (ranges, model)
        })
    }

    fn bytes(ranges: &Ranges) -> Vec<bool> {
        assert!(ranges.0.windows(2).all(|pair| pair[0].end < pair[1].start), "{ranges:?}");
        assert!(ranges.0.iter().all(|range| range.start < range.end), "{ranges:?}");
        (0..END).map(|at| ranges.contains(at)).collect()
    }

    fn both(a: &[bool], b: &[bool], of: impl Fn(bool, bool) -> bool) -> Vec<bool> {
        a.iter().zip(b).map(|(a, b)| of(*a, *b)).collect()
    }

    proptest! {
        #[test]
        fn it_is_a_set_of_numbers((a, in_a) in set(), (b, in_b) in set()) {
            prop_assert_eq!(bytes(&a), in_a.clone());
            prop_assert_eq!(bytes(&a.union(&b)), both(&in_a, &in_b, |a, b| a || b));
            prop_assert_eq!(bytes(&a.intersect(&b)), both(&in_a, &in_b, |a, b| a && b));
            prop_assert_eq!(bytes(&a.subtract(&b)), both(&in_a, &in_b, |a, b| a && !b));
            prop_assert_eq!(bytes(&a.complement(END)), both(&in_a, &in_b, |a, _| !a));
            prop_assert_eq!(a.total(), in_a.iter().filter(|is| **is).count() as u64);
            prop_assert_eq!(a.shift(7).iter().map(|r| r.start - 7..r.end - 7).collect::<Ranges>(), a.clone());
            prop_assert_eq!(a.scaled(3).iter().map(|r| r.start / 3..r.end / 3).collect::<Ranges>(), a.clone());
            let mut less = a.clone();
            b.iter().for_each(|range| less.remove(range));
            prop_assert_eq!(less, a.subtract(&b));
            prop_assert!(b.iter().all(|range| a.intersects(&range) != a.intersect(&range.into()).is_empty()));
            prop_assert_eq!(a.inward(8).subtract(&a), Ranges::new());
            prop_assert_eq!(a.subtract(&a.outward(8)), Ranges::new());
        }
    }
}
