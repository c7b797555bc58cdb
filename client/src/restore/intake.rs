//! What a stream of blocks may bring: what was asked for, in order. What it leaves out is zeros.

use std::ops::Range;

use janus_proto::{
    error::WireError,
    ids::BlockHash,
    model::{MAX_EXTENTS, MAX_RANGES},
    pb::{BlockBatch, BlockRange},
};

/// How far the answer to one request has come.
pub(super) struct Intake<'a> {
    /// Ranges that don't touch.
    asked: &'a [Range<u64>],
    at: usize,
    /// First block of the range `at` that has not come.
    next: u64,
}

impl<'a> Intake<'a> {
    pub(super) fn new(asked: &'a [Range<u64>]) -> Self {
        Self { asked, at: 0, next: asked.first().map_or(0, |range| range.start) }
    }

    /// Looks a message over before anything of it is written; returns the blocks that are zeros by it.
    pub(super) fn take(&mut self, batch: &BlockBatch) -> Result<Vec<Range<u64>>, WireError> {
        if batch.extents.len() > MAX_EXTENTS {
            return Err(WireError::invalid("extents", "too many".to_owned()));
        }
        let (mut zeros, mut hashed) = (Vec::new(), 0u64);
        for extent in &batch.extents {
            let end = extent.first_block.saturating_add(extent.block_count);
            let range = extent.first_block..end;
            zeros.extend(self.pass(&range, "extents")?);
            match extent.zero {
                true => zeros.push(range),
                false => hashed = hashed.saturating_add(extent.block_count),
            }
        }
        if hashed.checked_mul(BlockHash::LEN as u64) != Some(batch.hashes.len() as u64) {
            let reason = "not one for each block".to_owned();
            return Err(WireError::Invalid { field: "hashes", reason });
        }
        Ok(zeros)
    }

    /// Passes blocks that are lost; returns those before them that were left out.
    pub(super) fn lose(&mut self, range: &BlockRange) -> Result<Vec<Range<u64>>, WireError> {
        let end = range.first_block.saturating_add(range.block_count);
        self.pass(&(range.first_block..end), "damaged")
    }

    /// Nothing more comes: what is left was left out.
    pub(super) fn rest(self) -> Vec<Range<u64>> {
        let left = self.asked.get(self.at..).unwrap_or_default();
        let rest = left.iter().map(|range| range.start.max(self.next)..range.end);
        rest.filter(|range| !range.is_empty()).collect()
    }

    fn pass(
        &mut self,
        range: &Range<u64>,
        field: &'static str,
    ) -> Result<Vec<Range<u64>>, WireError> {
        let mut left_out = Vec::new();
        while let Some(asked) = self.asked.get(self.at) {
            let start = asked.start.max(self.next);
            if range.start >= asked.end {
                left_out.push(start..asked.end);
                self.at += 1;
                continue;
            }
            if range.is_empty() || range.start < start || range.end > asked.end {
                break;
            }
            left_out.push(start..range.start);
            self.next = range.end;
            left_out.retain(|range| !range.is_empty());
            return Ok(left_out);
        }
        let reason = format!("blocks {range:?} were not asked for, or come out of order");
        Err(WireError::Invalid { field, reason })
    }
}

/// The first ranges that may be asked for at once, so many blocks at most; takes them away.
pub(super) fn next_request(left: &mut Vec<Range<u64>>, most_blocks: u64) -> Vec<Range<u64>> {
    let (mut request, mut room) = (Vec::new(), most_blocks.max(1));
    let mut count = 0;
    for range in left.iter_mut().take(MAX_RANGES) {
        let len = (range.end - range.start).min(room);
        request.push(range.start..range.start + len);
        room -= len;
        range.start += len;
        if range.is_empty() {
            count += 1;
        }
        if room == 0 {
            break;
        }
    }
    left.drain(..count);
    request
}

#[cfg(test)]
// A list of one range is meant.
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use janus_proto::pb::BlockExtent;

    use super::*;

    fn batch(extents: &[(u64, u64, bool)]) -> BlockBatch {
        let hashed: u64 = extents.iter().filter(|e| !e.2).map(|e| e.1).sum();
        let extent = |&(first_block, block_count, zero): &(u64, u64, bool)| BlockExtent {
            first_block,
            block_count,
            zero,
        };
        BlockBatch {
            extents: extents.iter().map(extent).collect(),
            hashes: vec![0; hashed as usize * 32].into(),
            ..BlockBatch::default()
        }
    }

    #[test]
    fn what_is_left_out_is_zeros() {
        let asked = [2..10, 20..30, 40..41];
        let mut intake = Intake::new(&asked);
        assert_eq!(intake.take(&batch(&[(4, 2, false), (6, 1, true)])).unwrap(), [2..4, 6..7]);
        assert_eq!(intake.take(&batch(&[(22, 1, false)])).unwrap(), [7..10, 20..22]);
        let lost = intake.lose(&BlockRange { first_block: 24, block_count: 2 }).unwrap();
        assert_eq!(lost, [23..24]);
        assert_eq!(intake.rest(), [26..30, 40..41]);
        let mut all = Intake::new(&asked[..1]);
        assert_eq!(all.take(&batch(&[(2, 8, false)])).unwrap(), []);
        assert_eq!(all.rest(), []);
    }

    #[test]
    fn what_was_not_asked_for_is_refused() {
        let asked = [2..10, 20..30];
        for wrong in [
            batch(&[(1, 2, false)]),
            batch(&[(9, 2, false)]),
            batch(&[(12, 2, false)]),
            batch(&[(30, 1, false)]),
            batch(&[(5, 2, false), (6, 1, false)]),
            batch(&[(5, 0, true)]),
            batch(&[(5, u64::MAX, true)]),
            BlockBatch { hashes: vec![0; 32].into(), ..batch(&[(5, 2, false)]) },
        ] {
            assert!(Intake::new(&asked).take(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn requests_are_as_large_as_they_may_be() {
        let mut left = vec![0..10, 20..30];
        assert_eq!(next_request(&mut left, 12), [0..10, 20..22]);
        assert_eq!(next_request(&mut left, u64::MAX), [22..30]);
        assert!(left.is_empty());
        let mut left: Vec<_> = (0..5000).map(|at| at * 2..at * 2 + 1).collect();
        assert_eq!(next_request(&mut left, u64::MAX).len(), MAX_RANGES);
        assert_eq!(left.len(), 5000 - MAX_RANGES);
    }
}
