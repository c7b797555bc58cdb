//! Where a snapshot is zeros, told by its hashes: segment digests once, block hashes where a segment is neither all zeros nor known yet.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use janus_proto::{
    hash,
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, block_count, block_len},
};
use tokio::sync::OnceCell;

use crate::{
    segment_bits::{self, SegmentBits},
    snapshot::{Opened, ReadError},
    source::medium::Stretch,
};

use super::proof::Proof;

/// Segments whose hashes are read at once: 1 MiB.
const TOGETHER: usize = 32;
/// Segments of which is known which blocks are zeros: 16 MiB.
const MOST: usize = 1 << 16;
/// As far as is looked for the end of a stretch: 1 GiB. Who wants to know more asks on from there.
const FARTHEST: u64 = 256 * SEGMENT_BLOCKS;

/// What is known.
pub(super) struct Zeros {
    size_bytes: u64,
    /// For each segment whether it is all zeros.
    empty: OnceCell<Vec<bool>>,
    /// Of some of the others which blocks are not zeros.
    known: Mutex<HashMap<u64, SegmentBits>>,
    /// Held while hashes are read, which all who ask meanwhile want as well.
    learning: tokio::sync::Mutex<()>,
}

impl Zeros {
    pub(super) fn new(size_bytes: u64) -> Self {
        let (known, learning) = (Mutex::default(), tokio::sync::Mutex::default());
        Self { size_bytes, empty: OnceCell::new(), known, learning }
    }

    /// The stretch at `offset`. What can't be told is data.
    pub(super) async fn stretch(
        &self,
        opened: &Opened,
        proof: Option<&Proof>,
        offset: u64,
    ) -> Stretch {
        let told = self.blocks(opened, proof, offset / BLOCK_BYTES).await;
        let (end, hole) = told.unwrap_or_else(|error| {
            tracing::debug!(%error, "where zeros are can't be told");
            (block_count(self.size_bytes), false)
        });
        Stretch { end: end.saturating_mul(BLOCK_BYTES).min(self.size_bytes), hole }
    }

    /// The end of the blocks from `first` on that are of one kind as far as is known, and whether they are zeros.
    async fn blocks(
        &self,
        opened: &Opened,
        proof: Option<&Proof>,
        first: u64,
    ) -> Result<(u64, bool), ReadError> {
        let digests = || async {
            let digests = match proof {
                Some(proof) => proof.digests(opened).await?.to_vec(),
                None => opened.segment_digests().await?,
            };
            let is_empty = |(segment, digest): (u64, BlockHash)| {
                digest == hash::zero_segment_of(self.size_bytes, segment)
            };
            Ok::<_, ReadError>((0..).zip(digests).map(is_empty).collect())
        };
        let empty = self.empty.get_or_try_init(digests).await?;
        let total = block_count(self.size_bytes).min(first.saturating_add(FARTHEST));
        self.learn(opened, proof, empty, first / SEGMENT_BLOCKS).await?;
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut end, mut hole) = (first, None);
        while end < total {
            let segment = end / SEGMENT_BLOCKS;
            let start = segment * SEGMENT_BLOCKS;
            let (is_hole, stop) = match (empty.get(segment as usize), known.get(&segment)) {
                (Some(true) | None, _) => (true, SEGMENT_BLOCKS),
                (_, Some(data)) => {
                    let (is_data, stop) = segment_bits::run(data, end - start);
                    (!is_data, stop)
                }
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
    async fn learn(
        &self,
        opened: &Opened,
        proof: Option<&Proof>,
        empty: &[bool],
        segment: u64,
    ) -> Result<(), ReadError> {
        if self.unknown(empty, segment).is_empty() {
            return Ok(());
        }
        let _learning = self.learning.lock().await;
        let wanted = self.unknown(empty, segment);
        if wanted.is_empty() {
            return Ok(());
        }
        if let Some(proof) = proof {
            let proven = proof.of(opened, &wanted).await?;
            let total = block_count(self.size_bytes);
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            for segment in wanted {
                let first = segment * SEGMENT_BLOCKS;
                let blocks = total.saturating_sub(first).min(SEGMENT_BLOCKS) as usize;
                let is_data = |at: usize| !proven.is_zeros(first + at as u64);
                known.insert(segment, segment_bits::of(blocks, is_data));
            }
            return Ok(());
        }
        let hashes = opened.segment_hashes(&wanted).await?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for (segment, hashes) in wanted.into_iter().zip(hashes) {
            let first = segment * SEGMENT_BLOCKS;
            let is_data = |at: usize| {
                let zeros = hash::zero_hash(block_len(self.size_bytes, first + at as u64));
                !hashes.fits(at, &zeros)
            };
            known.insert(segment, segment_bits::of(hashes.len(), is_data));
        }
        Ok(())
    }

    /// What is to be read so that a segment is known: nothing, or it and those after it.
    fn unknown(&self, empty: &[bool], segment: u64) -> Vec<u64> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = |segment: &u64| {
            known.contains_key(segment) || empty.get(*segment as usize).copied().unwrap_or(true)
        };
        if is_known(&segment) {
            return Vec::new();
        }
        let next = segment..(segment + TOGETHER as u64).min(empty.len() as u64);
        let wanted = next.filter(|segment| !is_known(segment)).collect();
        if known.len() + TOGETHER > MOST {
            known.clear();
        }
        wanted
    }
}
