//! What the blocks of a sealed snapshot must be. Its seal proves the digest of the whole, that the digests of segments, and these the
//! hashes of blocks: who reads here and there gets no other block than a restore would write, whatever the server sends.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use janus_proto::{
    error::WireError,
    hash::{segment_digest, table_digest, zero_hash, zero_segment_of},
    ids::{BlockHash, SEGMENT_BLOCKS, block_len},
};
use tokio::sync::OnceCell;

use crate::snapshot::{BadData, Opened, ReadError};

/// Segments whose hashes are kept: 16 MiB.
const MOST: usize = 512;

/// What is proven so far.
#[derive(Default)]
pub(super) struct Proof {
    digests: OnceCell<Vec<BlockHash>>,
    known: Mutex<HashMap<u64, Arc<[BlockHash]>>>,
}

/// Hashes of all blocks of some segments.
pub(super) struct Proven {
    size_bytes: u64,
    /// Those that aren't all zeros.
    segments: HashMap<u64, Arc<[BlockHash]>>,
}

impl Proof {
    /// Digests of all segments of the snapshot.
    pub(super) async fn digests(&self, opened: &Opened) -> Result<&[BlockHash], ReadError> {
        let read = || async {
            let (digests, snapshot) = (opened.segment_digests().await?, opened.snapshot());
            let whole = table_digest(snapshot.size_bytes, &digests);
            match whole.0 == *snapshot.table_digest {
                true => Ok(digests),
                false => Err(foreign(opened, "together they are not the snapshot's".into())),
            }
        };
        Ok(self.digests.get_or_try_init(read).await?)
    }

    /// What the blocks of some segments, ascending, are.
    pub(super) async fn of(&self, opened: &Opened, wanted: &[u64]) -> Result<Proven, ReadError> {
        let (digests, size_bytes) = (self.digests(opened).await?, opened.snapshot().size_bytes);
        let is_zeros = |segment: &u64| {
            digests.get(*segment as usize) == Some(&zero_segment_of(size_bytes, *segment))
        };
        let wanted: Vec<u64> = wanted.iter().copied().filter(|one| !is_zeros(one)).collect();
        let mut segments: HashMap<u64, Arc<[BlockHash]>> = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            wanted.iter().filter_map(|one| Some((*one, known.get(one)?.clone()))).collect()
        };
        let missing: Vec<u64> =
            wanted.into_iter().filter(|one| !segments.contains_key(one)).collect();
        if !missing.is_empty() {
            for (segment, hashes) in missing.iter().zip(opened.segment_hashes(&missing).await?) {
                let whole = hashes.whole().unwrap_or_default();
                if digests.get(*segment as usize) != Some(&segment_digest(&whole)) {
                    let reason = format!("those of segment {segment} are not the snapshot's");
                    return Err(foreign(opened, reason));
                }
                segments.insert(*segment, whole.into());
            }
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if known.len() + missing.len() > MOST {
                known.clear();
            }
            known.extend(missing.iter().filter_map(|one| Some((*one, segments.get(one)?.clone()))));
        }
        Ok(Proven { size_bytes, segments })
    }
}

fn foreign(opened: &Opened, reason: String) -> ReadError {
    let source = BadData::Message(WireError::Invalid { field: "hashes", reason });
    ReadError::Damaged { server: opened.snapshot().server_id.clone(), source }
}

impl Proven {
    /// Of one segment.
    #[cfg(test)]
    pub(super) fn of_first(size_bytes: u64, hashes: &[BlockHash]) -> Self {
        Self { size_bytes, segments: HashMap::from([(0, hashes.into())]) }
    }

    /// The hash of a block. Of segments that were not asked for all is zeros.
    pub(super) fn hash(&self, block: u64) -> BlockHash {
        let hashes = self.segments.get(&(block / SEGMENT_BLOCKS));
        let known = hashes.and_then(|hashes| hashes.get((block % SEGMENT_BLOCKS) as usize));
        known.copied().unwrap_or_else(|| self.zeros(block))
    }

    /// True when a block is zeros.
    pub(super) fn is_zeros(&self, block: u64) -> bool {
        self.hash(block) == self.zeros(block)
    }

    fn zeros(&self, block: u64) -> BlockHash {
        zero_hash(block_len(self.size_bytes, block))
    }
}
