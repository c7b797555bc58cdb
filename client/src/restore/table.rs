//! What the snapshot is: the digest of each segment, and hashes of blocks as far as they are known.
//!
//! Digests are had before the first block, so that any server may deliver a segment that has the same one. Block hashes are
//! needed where servers' segments differ. They come from the server that holds the snapshot; what was learnt in time
//! is of use after it is lost. Hashes from elsewhere (a mirrored table) can be put in by [`Table::keep`].

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use janus_proto::{hash::segment_digest, ids::BlockHash};

use super::{DamageError, serve::ServeError};
use crate::snapshot::opened::{Opened, SegmentHashes};

/// Memory for hashes: enough for 8 GiB of segments that differ between servers, for sixteen times that where two
/// bytes of each hash do.
const MEMORY: usize = 64 << 20;
/// Segments whose hashes are asked for at once.
const AT_ONCE: usize = 64;

pub(super) struct Table {
    digests: Arc<[BlockHash]>,
    /// Bytes of each hash that are asked for.
    hash_bytes: usize,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    segments: HashMap<u64, Arc<SegmentHashes>>,
    bytes: usize,
}

impl Table {
    pub(super) fn new(digests: Arc<[BlockHash]>, hash_bytes: usize) -> Self {
        Self { digests, hash_bytes, known: Mutex::default() }
    }

    /// What a segment should be.
    pub(super) fn digest(&self, segment: u64) -> Option<&BlockHash> {
        self.digests.get(segment as usize)
    }

    /// Bytes of each hash that are asked for.
    pub(super) fn hash_bytes(&self) -> usize {
        self.hash_bytes
    }

    pub(super) fn get(&self, segment: u64) -> Option<Arc<SegmentHashes>> {
        self.lock().segments.get(&segment).cloned()
    }

    /// Takes hashes in that are known to be those of the snapshot; false when there is no more room.
    pub(super) fn keep(&self, segment: u64, hashes: Arc<SegmentHashes>) -> bool {
        let mut known = self.lock();
        if known.bytes + hashes.memory_bytes() > MEMORY {
            return false;
        }
        known.bytes += hashes.memory_bytes();
        if let Some(old) = known.segments.insert(segment, hashes) {
            known.bytes -= old.memory_bytes();
        }
        true
    }

    /// The hashes of some segments, ascending, of those that can be had: `holder` is asked for what isn't known.
    pub(super) async fn of(
        &self,
        holder: Option<&Opened>,
        segments: &[u64],
    ) -> HashMap<u64, Arc<SegmentHashes>> {
        let known = segments.iter().filter_map(|segment| Some((*segment, self.get(*segment)?)));
        let mut found: HashMap<_, _> = known.collect();
        let Some(holder) = holder else { return found };
        let left: Vec<u64> =
            segments.iter().filter(|segment| !found.contains_key(segment)).copied().collect();
        match self.ask(holder, &left, self.hash_bytes).await {
            Ok(hashes) => {
                for (segment, hashes) in left.into_iter().zip(hashes) {
                    self.keep(segment, hashes.clone());
                    found.insert(segment, hashes);
                }
            }
            Err(error) => tracing::debug!(?error, "hashes of the snapshot can't be had now"),
        }
        found
    }

    /// Learns hashes before they are needed: of these segments, as long as there is room.
    pub(super) async fn learn(&self, holder: &Opened, segments: &[u64]) -> Result<(), ServeError> {
        for part in segments.chunks(AT_ONCE) {
            let part: Vec<u64> =
                part.iter().filter(|segment| self.get(**segment).is_none()).copied().collect();
            let hashes = self.ask(holder, &part, self.hash_bytes).await?;
            for (segment, hashes) in part.into_iter().zip(hashes) {
                if !self.keep(segment, hashes) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Asks a server whose segments these are, too.
    pub(super) async fn ask(
        &self,
        opened: &Opened,
        segments: &[u64],
        hash_bytes: usize,
    ) -> Result<Vec<Arc<SegmentHashes>>, ServeError> {
        if segments.is_empty() {
            return Ok(Vec::new());
        }
        let hashes = opened.segment_hashes_once(segments, hash_bytes).await?;
        for (segment, hashes) in segments.iter().zip(&hashes) {
            let digest = hashes.whole().map(|hashes| segment_digest(&hashes));
            if digest.is_some_and(|digest| self.digest(*segment) != Some(&digest)) {
                return Err(DamageError::Segment { segment: *segment }.into());
            }
        }
        Ok(hashes.into_iter().map(Arc::new).collect())
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
