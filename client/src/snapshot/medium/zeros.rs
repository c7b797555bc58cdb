//! Where a snapshot is zeros, told by its hashes: segment digests once, block hashes where a segment is neither all zeros nor known yet.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Mutex, PoisonError},
};

use janus_proto::{
    hash,
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, block_count, block_len},
};
use tokio::sync::OnceCell;

use crate::{
    snapshot::{Opened, ReadError},
    source::medium::Stretch,
};

/// Segments whose hashes are read at once: 1 MiB.
const TOGETHER: usize = 32;
/// Segments of which is known which blocks are zeros: 16 MiB.
const MOST: usize = 1 << 16;

/// A bit for each block of a segment: it is not zeros.
type Data = [u64; SEGMENT_BLOCKS as usize / 64];

/// What is known.
pub(super) struct Zeros {
    size_bytes: u64,
    /// For each segment whether it is all zeros.
    empty: OnceCell<Vec<bool>>,
    known: Mutex<HashMap<u64, Box<Data>>>,
}

impl Zeros {
    pub(super) fn new(size_bytes: u64) -> Self {
        Self { size_bytes, empty: OnceCell::new(), known: Mutex::default() }
    }

    /// The stretch at `offset`. What can't be told is data.
    pub(super) async fn stretch(&self, opened: &Opened, offset: u64) -> Stretch {
        let told = self.blocks(opened, offset / BLOCK_BYTES).await;
        let (end, hole) = told.unwrap_or_else(|error| {
            tracing::debug!(%error, "where zeros are can't be told");
            (block_count(self.size_bytes), false)
        });
        Stretch { end: end.saturating_mul(BLOCK_BYTES).min(self.size_bytes), hole }
    }

    /// The end of the blocks from `first` on that are of one kind as far as is known, and whether they are zeros.
    async fn blocks(&self, opened: &Opened, first: u64) -> Result<(u64, bool), ReadError> {
        let digests = || async {
            let digests = opened.segment_digests().await?;
            let is_empty = |(segment, digest): (u64, BlockHash)| {
                digest == hash::zero_segment_of(self.size_bytes, segment)
            };
            Ok::<_, ReadError>((0..).zip(digests).map(is_empty).collect())
        };
        let empty = self.empty.get_or_try_init(digests).await?;
        let total = block_count(self.size_bytes);
        self.learn(opened, empty, first / SEGMENT_BLOCKS).await?;
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut end, mut hole) = (first, None);
        while end < total {
            let segment = end / SEGMENT_BLOCKS;
            let start = segment * SEGMENT_BLOCKS;
            let (is_hole, stop) = match (empty.get(segment as usize), known.get(&segment)) {
                (Some(true) | None, _) => (true, SEGMENT_BLOCKS),
                (_, Some(data)) => run(data, end - start),
                _ => break,
            };
            if *hole.get_or_insert(is_hole) != is_hole {
                break;
            }
            end = start + stop;
        }
        Ok(hole.map_or((first + 1, false), |hole| (end.min(total), hole)))
    }

    /// Reads the hashes of a segment, and of those after it, unless they are known.
    async fn learn(&self, opened: &Opened, empty: &[bool], segment: u64) -> Result<(), ReadError> {
        let wanted: Vec<u64> = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            let is_known = |segment: &u64| {
                known.contains_key(segment) || empty.get(*segment as usize).copied().unwrap_or(true)
            };
            if is_known(&segment) {
                return Ok(());
            }
            let next = segment..(segment + TOGETHER as u64).min(empty.len() as u64);
            let wanted = next.filter(|segment| !is_known(segment)).collect();
            if known.len() + TOGETHER > MOST {
                known.clear();
            }
            wanted
        };
        let total = block_count(self.size_bytes);
        let range =
            |segment: &u64| segment * SEGMENT_BLOCKS..((segment + 1) * SEGMENT_BLOCKS).min(total);
        let ranges: Vec<Range<u64>> = wanted.iter().map(range).collect();
        let mut hashes = opened.block_hashes(&ranges).await?.into_iter();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for (segment, range) in wanted.into_iter().zip(ranges) {
            let mut data: Box<Data> = Box::default();
            for (block, hash) in range.zip(hashes.by_ref()) {
                let at = (block % SEGMENT_BLOCKS) as usize;
                let is_zero = hash == hash::zero_hash(block_len(self.size_bytes, block));
                data[at / 64] |= u64::from(!is_zero) << (at % 64);
            }
            known.insert(segment, data);
        }
        Ok(())
    }
}

/// Whether the block at `first` is zeros, and where blocks like it end.
fn run(data: &Data, first: u64) -> (bool, u64) {
    let word = |at: u64| data[(at / 64) as usize];
    let is_data = word(first) >> (first % 64) & 1 == 1;
    let mut at = first;
    while at < SEGMENT_BLOCKS {
        let others = if is_data { !word(at) } else { word(at) } >> (at % 64);
        if others != 0 {
            return (!is_data, at + u64::from(others.trailing_zeros()));
        }
        at = (at / 64 + 1) * 64;
    }
    (!is_data, SEGMENT_BLOCKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_where_blocks_of_the_other_kind_begin() {
        let mut data = Data::default();
        data[1] = 0b1100;
        data[15] = 1 << 63;
        assert_eq!(run(&data, 0), (true, 66));
        assert_eq!(run(&data, 66), (false, 68));
        assert_eq!(run(&data, 67), (false, 68));
        assert_eq!(run(&data, 68), (true, 1023));
        assert_eq!(run(&data, 1023), (false, 1024));
        assert_eq!(run(&[u64::MAX; 16], 5), (false, 1024));
    }
}
