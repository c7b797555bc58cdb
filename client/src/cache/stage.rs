//! Hashes of a run under way: written to the database as they come, counted only when they are committed.

use std::sync::{Mutex, MutexGuard, PoisonError};

use janus_proto::ids::BlockHash;

use super::{
    CacheError, DiskCache,
    block_set::BlockSet,
    blocks_in,
    layer::{Changes, Layer},
    segment_set::SegmentSet,
};

/// Changes of T that nobody sees before [`DiskCache::commit`] or [`DiskCache::adopt_stage`]. All methods may be called by
/// several threads at once. What a dropped stage wrote is removed when the cache is opened next.
pub struct Stage {
    cache: DiskCache,
    generation: u64,
    draft: Mutex<Draft>,
}

#[derive(Default)]
struct Draft {
    layers: Vec<DraftLayer>,
    blocks: Option<BlockSet>,
}

struct DraftLayer {
    layer: Layer,
    /// Segments with a value here, counting or not: their keys are used up.
    written: SegmentSet,
}

/// What a stage came to.
pub(super) struct Staged {
    pub(super) layers: Vec<Layer>,
    pub(super) blocks: BlockSet,
}

impl Stage {
    pub(super) fn new(cache: DiskCache, generation: u64) -> Self {
        Self { cache, generation, draft: Mutex::default() }
    }

    /// Says that in `segment` the disk differs from T in exactly these blocks (index in the segment, hash), in any
    /// order. Replaces what was put for this segment before; an empty slice takes it back.
    ///
    /// # Errors
    /// `PastEnd` for a block that the disk doesn't have, `Io` or `Damaged`. The stage is then not to be committed.
    pub fn put(&self, segment: u64, blocks: &[(u16, BlockHash)]) -> Result<(), CacheError> {
        let in_segment = blocks_in(self.cache.size_bytes(), segment);
        if let Some((index, _)) = blocks.iter().find(|(index, _)| usize::from(*index) >= in_segment)
        {
            return Err(CacheError::PastEnd { segment, index: usize::from(*index) });
        }
        let changes = Changes::of(blocks);
        let Some(layer) = self.draft().place(segment, &changes) else {
            return Ok(());
        };
        changes.write(&self.cache.shared.read().engine, layer, segment)?;
        self.cache.shared.bound_memory()
    }

    /// [`Stage::put`] of all hashes of a segment: stages those that differ from T. Returns how many.
    ///
    /// # Errors
    /// As [`Stage::put`]; `PastEnd` too when the number of hashes isn't the number of blocks.
    pub fn put_hashes(&self, segment: u64, hashes: &[BlockHash]) -> Result<usize, CacheError> {
        let old = self.cache.segment(segment)?;
        if old.len() != hashes.len() {
            return Err(CacheError::PastEnd { segment, index: hashes.len() });
        }
        let pairs = old.iter().zip(hashes).enumerate();
        let blocks: Vec<_> = pairs
            .filter(|(_, (old, new))| old != new)
            .map(|(index, (_, new))| (index as u16, *new))
            .collect();
        self.put(segment, &blocks)?;
        Ok(blocks.len())
    }

    /// Whether anything was put for `segment`.
    pub fn holds(&self, segment: u64) -> bool {
        self.draft().layers.iter().any(|draft| draft.layer.segments.contains(segment))
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn finish(self) -> Staged {
        let draft = self.draft.into_inner().unwrap_or_else(PoisonError::into_inner);
        let layers = draft
            .layers
            .into_iter()
            .map(|draft| draft.layer)
            .filter(|layer| !layer.segments.is_empty());
        Staged { layers: layers.collect(), blocks: draft.blocks.unwrap_or_else(BlockSet::empty) }
    }

    fn draft(&self) -> MutexGuard<'_, Draft> {
        self.draft.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Draft {
    /// Notes the changes and says in which layer to write them: the first that never had a value for this segment,
    /// since a key that is written twice could show its older value after damage.
    fn place(&mut self, segment: u64, changes: &Changes) -> Option<u64> {
        self.blocks.get_or_insert_with(BlockSet::empty).set_segment(segment, changes.bits);
        for draft in &mut self.layers {
            draft.layer.segments.remove(segment);
        }
        if changes.hashes.is_empty() {
            return None;
        }
        let free = self.layers.iter().position(|draft| !draft.written.contains(segment));
        let at = free.unwrap_or_else(|| {
            self.layers.push(DraftLayer::new());
            self.layers.len() - 1
        });
        let draft = &mut self.layers[at];
        draft.written.insert(segment);
        draft.layer.segments.insert(segment);
        draft.layer.hashes += changes.hashes.len() as u64;
        Some(draft.layer.id)
    }
}

impl DraftLayer {
    fn new() -> Self {
        Self { layer: Layer::new(), written: SegmentSet::default() }
    }
}
