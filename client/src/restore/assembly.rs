//! The hashes of what arrives, in order, up to the digest of the whole disk.

use janus_proto::{
    error::WireError,
    hash,
    ids::{BlockHash, SEGMENT_BLOCKS, block_count, block_len, segment_count},
    model::MAX_EXTENTS,
    pb::BlockBatch,
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
}

impl Assembly {
    pub(super) fn new(size_bytes: u64) -> Self {
        let segments = Vec::with_capacity(segment_count(size_bytes) as usize);
        Self { size_bytes, next: 0, current: Vec::new(), segments }
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
}
