//! What a caller of the restore service asks for, and hashes as they are answered.

use std::ops::Range;

use crate::{
    error::WireError,
    ids::{BlockHash, SEGMENT_BLOCKS},
    model::MAX_RANGES,
    pb,
};

/// Checks ranges against `total`; no ranges mean all.
///
/// # Errors
/// When there are too many, or one is empty, out of order or past the end.
pub fn ranges(wire: &[pb::BlockRange], total: u64) -> Result<Vec<Range<u64>>, WireError> {
    if wire.len() > MAX_RANGES {
        let reason = format!("{} of them, more than {MAX_RANGES}", wire.len());
        return Err(WireError::invalid("ranges", reason));
    }
    if wire.is_empty() {
        return Ok(std::iter::once(0..total).collect());
    }
    let mut next = 0;
    let check = |range: &pb::BlockRange| {
        let first = range.first_block;
        let end = first
            .checked_add(range.block_count)
            .filter(|end| range.block_count > 0 && *end <= total && first >= next);
        let end = end.ok_or_else(|| {
            let reason =
                format!("{first} + {} is empty, out of order or past {total}", range.block_count);
            WireError::invalid("ranges", reason)
        })?;
        next = end;
        Ok(first..end)
    };
    wire.iter().map(check).collect()
}

/// Bytes of each hash that are wanted; 0 means all.
///
/// # Errors
/// When a hash has less.
pub fn hash_bytes(wire: u32) -> Result<usize, WireError> {
    match wire as usize {
        0 => Ok(BlockHash::LEN),
        some if some <= BlockHash::LEN => Ok(some),
        _ => Err(WireError::invalid("hash_bytes", format!("{wire}, a hash has 32"))),
    }
}

/// A range of blocks in parts that each lie within one segment.
pub fn by_segment(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut next = range.start;
    std::iter::from_fn(move || {
        let start = next;
        next = range.end.min((start / SEGMENT_BLOCKS + 1) * SEGMENT_BLOCKS);
        (start < next).then_some(start..next)
    })
}

/// So many bytes of each of some hashes, the first of which is that of block or segment `first`.
pub fn hashes(first: u64, all: &[BlockHash], hash_bytes: usize) -> pb::ReadHashesResponse {
    let bytes = all.iter().flat_map(|hash| hash.0.into_iter().take(hash_bytes));
    let hashes: Vec<u8> = bytes.collect();
    let hash_bytes = if hash_bytes == BlockHash::LEN { 0 } else { hash_bytes as u32 };
    let batch = pb::HashBatch { first, hashes: hashes.into(), hash_bytes };
    pb::ReadHashesResponse { batch: Some(batch) }
}
