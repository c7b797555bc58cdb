//! The hashes of what arrives, in order, up to the digest of the whole disk.

use std::ops::Range;

use janus_proto::{
    error::WireError,
    hash,
    ids::{BlockHash, SEGMENT_BLOCKS, block_count, block_len, segment_count},
    model::MAX_EXTENTS,
    pb::{BlockBatch, BlockRange},
};

/// A stretch of zero blocks: first block and count.
pub(super) type Zeros = (u64, u64);

/// Segment digests of the blocks taken so far. What is left out counts as zeros; the digest of the whole tells whether
/// that was right.
pub(super) struct Assembly {
    size_bytes: u64,
    next: u64,
    current: Vec<BlockHash>,
    segments: Vec<BlockHash>,
    /// Blocks that the server has lost; they count as zeros.
    lost: Vec<Range<u64>>,
}

/// Ranges of lost blocks that are kept: with more there is nothing worth restoring.
const MOST_LOST: usize = 1 << 20;

impl Assembly {
    pub(super) fn new(size_bytes: u64) -> Self {
        let segments = Vec::with_capacity(segment_count(size_bytes) as usize);
        Self { size_bytes, next: 0, current: Vec::new(), segments, lost: Vec::new() }
    }

    /// First block that has not arrived.
    pub(super) fn next_block(&self) -> u64 {
        self.next
    }

    /// Takes a message in; returns the stretches that were left out before its blocks.
    pub(super) fn take(&mut self, batch: &BlockBatch) -> Result<Vec<Zeros>, WireError> {
        self.check(batch)?;
        let mut gaps = Vec::new();
        let mut hashes = batch.hashes.chunks_exact(BlockHash::LEN);
        for extent in &batch.extents {
            if extent.first_block > self.next {
                gaps.push((self.next, extent.first_block - self.next));
                self.zeros_until(extent.first_block);
            }
            let end = extent.first_block + extent.block_count;
            if extent.zero {
                self.zeros_until(end);
                continue;
            }
            while self.next < end {
                let hash = hashes.next().unwrap_or_default();
                self.push(BlockHash::from_wire("hashes", hash)?);
            }
        }
        Ok(gaps)
    }

    /// Takes note of blocks that are lost; returns the stretch up to their end, which counts as zeros.
    pub(super) fn lose(&mut self, range: &BlockRange) -> Result<Zeros, WireError> {
        let invalid = |reason: &str| WireError::Invalid { field: "damaged", reason: reason.into() };
        let blocks = block_count(self.size_bytes);
        let (first, from) = (range.first_block, self.next);
        let end = first.checked_add(range.block_count).filter(|end| *end <= blocks);
        let end = end
            .filter(|end| first >= from && *end > first)
            .ok_or_else(|| invalid("empty, out of order or past the end"))?;
        let is_full = self.lost.len() >= MOST_LOST;
        match self.lost.last_mut() {
            Some(last) if last.end == first => last.end = end,
            _ if is_full => return Err(invalid("too many ranges are lost")),
            _ => self.lost.push(first..end),
        }
        self.zeros_until(end);
        Ok((from, end - from))
    }

    /// Blocks that are lost, ascending.
    pub(super) fn lost(&self) -> &[Range<u64>] {
        &self.lost
    }

    /// Compares all segments that have lost nothing with the digests they should have; the first that differs.
    pub(super) fn compare(&self, digests: &[BlockHash]) -> Result<(), u64> {
        if self.segments.len() != digests.len() {
            return Err(self.segments.len().min(digests.len()) as u64);
        }
        let mut lost = self.lost.iter().peekable();
        for (segment, (ours, theirs)) in (0..).zip(self.segments.iter().zip(digests)) {
            let blocks = segment * SEGMENT_BLOCKS..(segment + 1) * SEGMENT_BLOCKS;
            while lost.next_if(|range| range.end <= blocks.start).is_some() {}
            let is_whole = lost.peek().is_none_or(|range| range.start >= blocks.end);
            if is_whole && ours != theirs {
                return Err(segment);
            }
        }
        Ok(())
    }

    /// Nothing more comes: the rest is zeros.
    pub(super) fn finish(&mut self) -> Zeros {
        let rest = (self.next, block_count(self.size_bytes) - self.next);
        self.zeros_until(block_count(self.size_bytes));
        rest
    }

    pub(super) fn table_digest(&self) -> BlockHash {
        hash::table_digest(self.size_bytes, &self.segments)
    }

    /// Nothing may be taken of a message that is wrong anywhere: it would be asked for again.
    fn check(&self, batch: &BlockBatch) -> Result<(), WireError> {
        let invalid = |reason: &str| WireError::Invalid { field: "extents", reason: reason.into() };
        if batch.extents.len() > MAX_EXTENTS {
            return Err(invalid("too many"));
        }
        let (mut next, mut hashed) = (self.next, 0u64);
        for extent in &batch.extents {
            let end = extent.first_block.checked_add(extent.block_count);
            let end =
                end.filter(|end| *end <= block_count(self.size_bytes) && extent.block_count > 0);
            next = end
                .filter(|_| extent.first_block >= next)
                .ok_or_else(|| invalid("empty, out of order or past the end"))?;
            hashed += if extent.zero { 0 } else { extent.block_count };
        }
        if hashed.checked_mul(BlockHash::LEN as u64) != Some(batch.hashes.len() as u64) {
            return Err(WireError::Invalid {
                field: "hashes",
                reason: "not one for each block".into(),
            });
        }
        Ok(())
    }

    fn zeros_until(&mut self, end: u64) {
        let total = block_count(self.size_bytes);
        while self.next < end {
            let segment_end = ((self.next / SEGMENT_BLOCKS + 1) * SEGMENT_BLOCKS).min(total);
            if self.current.is_empty() && segment_end <= end {
                let segment = self.segments.len() as u64;
                self.segments.push(hash::zero_segment_of(self.size_bytes, segment));
                self.next = segment_end;
            } else {
                self.push(hash::zero_hash(block_len(self.size_bytes, self.next)));
            }
        }
    }

    fn push(&mut self, hash: BlockHash) {
        self.current.push(hash);
        self.next += 1;
        if self.next.is_multiple_of(SEGMENT_BLOCKS) || self.next == block_count(self.size_bytes) {
            self.segments.push(hash::segment_digest(&self.current));
            self.current.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use janus_proto::{
        ids::SEGMENT_BYTES,
        model::{Batch, Extent},
        pb::Encoding,
    };

    use super::*;

    #[test]
    fn the_digest_is_that_of_the_whole_disk_whatever_was_left_out() {
        let size = 3 * SEGMENT_BYTES + 4096 * 9 + 512;
        let mut content = vec![0; size as usize];
        content[4096 * 1020..4096 * 1030].fill(3);
        content[size as usize - 512..].fill(4);
        let batch = |first: u64, count: u64| {
            let bytes =
                &content[(first * 4096) as usize..((first + count) * 4096).min(size) as usize];
            let mut hashes = vec![];
            hash::hash_blocks(bytes, &mut hashes);
            let hashes: Vec<u8> = hashes.iter().flat_map(|h| h.0).collect();
            let extents = vec![Extent { first, count, zero: false }];
            Batch::new(size, extents, hashes.into(), bytes.to_vec().into())
                .unwrap()
                .into_wire(Encoding::None)
        };
        let mut assembly = Assembly::new(size);
        assert_eq!(assembly.take(&batch(1020, 10)).unwrap(), [(0, 1020)]);
        assert_eq!(assembly.take(&batch(3072 + 9, 1)).unwrap(), [(1030, 3072 + 9 - 1030)]);
        assert!(assembly.take(&batch(0, 1)).is_err());
        assert_eq!(assembly.finish(), (3072 + 10, 0));
        let digests: Vec<_> = content
            .chunks(SEGMENT_BYTES as usize)
            .map(|bytes| {
                let mut hashes = vec![];
                hash::hash_blocks(bytes, &mut hashes);
                hash::segment_digest(&hashes)
            })
            .collect();
        assert_eq!(assembly.table_digest(), hash::table_digest(size, &digests));
    }

    #[test]
    fn segments_with_lost_blocks_are_not_compared_and_all_others_are() {
        let size = 3 * SEGMENT_BYTES;
        let range = |first_block, block_count| BlockRange { first_block, block_count };
        let mut assembly = Assembly::new(size);
        assert_eq!(assembly.lose(&range(1030, 2)).unwrap(), (0, 1032));
        assert!(assembly.lose(&range(1031, 2)).is_err());
        assert!(assembly.lose(&range(3000, 100)).is_err());
        assert_eq!(assembly.lose(&range(1032, 1)).unwrap(), (1032, 1));
        assert!(matches!(assembly.lost(), [lost] if *lost == (1030..1033)));
        assembly.finish();
        let mut digests = vec![hash::zero_segment(); 3];
        digests[1] = hash::hash_block(b"other");
        assert_eq!(assembly.compare(&digests), Ok(()));
        digests[2] = hash::hash_block(b"other");
        assert_eq!(assembly.compare(&digests), Err(2));
    }
}
