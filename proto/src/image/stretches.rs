//! Pieces that the readers of both formats share: stretches of a disk, and runs of bits in a sector bitmap.

use std::ops::Range;

use super::Source;

/// Stretches in order; neighbours that go on with the same source become one.
pub(super) struct Extents(pub(super) Vec<(Range<u64>, Source)>);

impl Extents {
    pub(super) fn push(&mut self, range: Range<u64>, source: Source) {
        if range.is_empty() {
            return;
        }
        if let Some((last, last_source)) = self.0.last_mut() {
            let goes_on = match (*last_source, source) {
                (Source::File(a), Source::File(b)) => a + (last.end - last.start) == b,
                (a, b) => a == b,
            };
            if goes_on && last.end == range.start {
                last.end = range.end;
                return;
            }
        }
        self.0.push((range, source));
    }
}

/// Which bit of a byte stands for the first of its eight sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BitOrder {
    /// VHDX.
    LowestFirst,
    /// VHD.
    HighestFirst,
}

/// Runs of equal bits.
pub(super) struct Runs<'a> {
    bits: &'a [u8],
    order: BitOrder,
    /// Sector of the first bit of `bits`, a multiple of 8.
    skip: u64,
    at: u64,
    end: u64,
}

impl<'a> Runs<'a> {
    /// Runs among the bits of `sectors`; the first byte of `bits` is the one that holds the first of them.
    pub(super) fn new(bits: &'a [u8], order: BitOrder, sectors: Range<u64>) -> Self {
        let skip = sectors.start / 8 * 8;
        let end = sectors.end.min(skip + bits.len() as u64 * 8);
        Self { bits, order, skip, at: sectors.start, end }
    }

    fn bit(&self, sector: u64) -> bool {
        let place = sector - self.skip;
        let bit = match self.order {
            BitOrder::LowestFirst => place % 8,
            BitOrder::HighestFirst => 7 - place % 8,
        };
        self.bits[(place / 8) as usize] >> bit & 1 == 1
    }
}

impl Iterator for Runs<'_> {
    type Item = (Range<u64>, bool);

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let (start, present) = (self.at, self.bit(self.at));
        let whole = if present { 0xff } else { 0 };
        while self.at < self.end && self.bit(self.at) == present {
            let aligned = self.at.is_multiple_of(8)
                && self.bits[((self.at - self.skip) / 8) as usize] == whole;
            self.at += if aligned { 8 } else { 1 };
        }
        self.at = self.at.min(self.end);
        Some((start..self.at, present))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_follow_the_order_of_the_format() {
        let runs = |order| Runs::new(&[0xff, 0b0000_0111], order, 4..14).collect::<Vec<_>>();
        assert_eq!(runs(BitOrder::LowestFirst), [(4..11, true), (11..14, false)]);
        assert_eq!(runs(BitOrder::HighestFirst), [(4..8, true), (8..13, false), (13..14, true)]);
    }
}
