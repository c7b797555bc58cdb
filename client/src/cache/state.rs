//! What a manifest stands for, in memory, and how it changes. A state is changed as a copy and replaces the old one
//! only after it was persisted.

use std::{sync::Arc, time::Duration};

use janus_proto::{
    hash::{zero_block, zero_hash},
    ids::{BlockHash, SEGMENT_BLOCKS, ServerId, block_count, block_len},
};

use super::{
    CacheError, Head, Servers,
    block_set::{BlockSet, MustSend},
    blocks_in,
    cursor::Cursor,
    engine::{BLOCKS, Engine, HASHES, Key, SEGMENTS},
    first_resized_block,
    layer::{Layer, limit_in},
    manifest::{FORMAT, Manifest, StoredLayer, StoredServer, StoredSet, write},
    place::Place,
    segment_set::SegmentSet,
    stage::Staged,
};

/// More layers than this make reading slow.
const MAX_LAYERS: usize = 16;
/// Layers above the first may hold a tenth of it, and so much in any case: below, nothing is gained.
const SMALL_HASHES: u64 = 1 << 15;
/// Space on disk for each byte of hashes before it is worth writing anew; sled settles at 1.7 after bulk writes.
const MAX_SPACE_TIMES_TEN: u64 = 25;
const SMALL_SPACE_BYTES: u64 = 64 << 20;
/// sled opens ever more slowly as it grows in pieces: more than this is worth writing anew ...
const SLOW_OPENING: Duration = Duration::from_secs(2);
/// ... but not at once, since the first opening after that is slow too.
const SLOW_LAYERS: usize = 4;

/// T, heads and changed sets at one moment.
#[derive(Clone)]
pub(super) struct State {
    pub(super) size_bytes: u64,
    pub(super) generation: u64,
    pub(super) layers: Vec<PlacedLayer>,
    pub(super) servers: Servers,
    pub(super) cursor: Cursor,
    /// Size of the disk when it was stored, where that is another one.
    pub(super) resized_from: Option<u64>,
}

/// A layer and from which block on it no longer counts.
#[derive(Clone)]
pub(super) struct PlacedLayer {
    pub(super) layer: Arc<Layer>,
    pub(super) limit_blocks: u64,
    /// Its set of segments is in the database, in so many chunks.
    pub(super) chunks: Option<u32>,
}

/// What is known of one server.
#[derive(Clone)]
pub(super) struct Known {
    /// `None` while T holds an open session's content; such a server is not persisted.
    pub(super) head: Option<Head>,
    pub(super) changed: Arc<BlockSet>,
    /// Where `changed` is in the database, if it is there as it is now.
    pub(super) stored: Option<StoredSet>,
}

impl Layer {
    pub(super) fn new() -> Self {
        Self { id: random_id(), segments: SegmentSet::default(), hashes: 0 }
    }
}

impl State {
    pub(super) fn empty(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            generation: 0,
            layers: Vec::new(),
            servers: Servers::new(),
            cursor: Cursor::default(),
            resized_from: None,
        }
    }

    /// Reads everything but the hashes.
    pub(super) fn load(
        place: &Place,
        engine: &Engine,
        stored: Manifest,
    ) -> Result<Self, CacheError> {
        let mut state = Self::empty(stored.size_bytes);
        state.generation = stored.generation;
        state.cursor = Cursor::load(place, &stored.cursor)?;
        for layer in stored.layers {
            state.layers.push(load_layer(engine, &layer)?);
        }
        for (server, StoredServer { head, changed, .. }) in stored.servers {
            let known = Known {
                head: Some(head),
                changed: load_set(engine, changed)?,
                stored: Some(changed),
            };
            state.servers.insert(server, known);
        }
        Ok(state)
    }

    /// Makes the state one of a disk of `size_bytes`, see [`super::DiskCache::open`]. In memory: the next switch stores it.
    pub(super) fn resize(&mut self, size_bytes: u64) {
        if size_bytes == self.size_bytes {
            return;
        }
        let first = first_resized_block(self.size_bytes, size_bytes);
        for placed in &mut self.layers {
            placed.limit_blocks = placed.limit_blocks.min(first);
        }
        for known in self.servers.values_mut() {
            Arc::make_mut(&mut known.changed).add_tail(first);
            known.stored = None;
        }
        self.resized_from = Some(self.size_bytes);
        self.size_bytes = size_bytes;
        self.cursor = Cursor::default();
    }

    pub(super) fn holds(&self, segment: u64) -> bool {
        self.layers.iter().any(|placed| placed.holds(segment))
    }

    /// T of one segment of the disk.
    pub(super) fn segment(
        &self,
        engine: &Engine,
        segment: u64,
    ) -> Result<Vec<BlockHash>, CacheError> {
        let mut hashes = zero_hashes(self.size_bytes, segment);
        for placed in self.layers.iter().filter(|placed| placed.holds(segment)) {
            placed.layer.overlay(
                engine,
                segment,
                limit_in(segment, placed.limit_blocks),
                &mut hashes,
            )?;
        }
        Ok(hashes)
    }

    /// T becomes T with `staged`, and `server`, if one is named, has exactly that. Every other server lacks what was staged.
    pub(super) fn apply(
        &mut self,
        staged: Staged,
        server: Option<(&ServerId, Option<Head>)>,
        cursor: Option<Vec<u8>>,
    ) {
        if !staged.blocks.is_empty() {
            let has_it = |id: &ServerId| server.is_some_and(|(server, _)| server == id);
            for (_, known) in self.servers.iter_mut().filter(|(id, _)| !has_it(id)) {
                Arc::make_mut(&mut known.changed).union_with(&staged.blocks);
                known.stored = None;
            }
            // Without a new cursor T was taken from a server: the disk may never have looked like that.
            self.cursor = Cursor::default();
        }
        if let Some(cursor) = cursor {
            self.cursor = Cursor::new(cursor);
        }
        let place =
            |layer| PlacedLayer { layer: Arc::new(layer), limit_blocks: u64::MAX, chunks: None };
        self.layers.extend(staged.layers.into_iter().map(place));
        if let Some((server, head)) = server {
            let changed = Arc::new(BlockSet::empty());
            self.servers.insert(server.clone(), Known { head, changed, stored: None });
        }
        self.generation += 1;
    }

    /// Writes what is not stored yet, syncs it, and only then lets `CURRENT` name it. Durable when it returns.
    pub(super) fn persist(&mut self, place: &Place, engine: &Engine) -> Result<(), CacheError> {
        self.layers.iter_mut().try_for_each(|placed| placed.store(engine))?;
        let known = self
            .servers
            .values_mut()
            .filter(|known| known.head.is_some() && known.stored.is_none());
        for known in known {
            known.stored = Some(store_set(engine, &known.changed)?);
        }
        engine.sync()?;
        self.cursor.store(place)?;
        let bytes = write(&self.manifest(engine.number())).map_err(|source| CacheError::Io {
            path: place.path().to_path_buf(),
            source: source.into(),
        })?;
        place.write_current(&bytes)
    }

    fn manifest(&self, database: u64) -> Manifest {
        let server = |(id, known): (&ServerId, &Known)| {
            let count = MustSend::new(known.changed.clone(), block_count(self.size_bytes)).count();
            let (head, changed) = (known.head?, known.stored?);
            Some((id.clone(), StoredServer { head, changed, changed_blocks: Some(count) }))
        };
        Manifest {
            format: FORMAT,
            database,
            generation: self.generation,
            size_bytes: self.size_bytes,
            layers: self.layers.iter().map(PlacedLayer::stored).collect(),
            servers: self.servers.iter().filter_map(server).collect(),
            cursor: self.cursor.name(),
        }
    }

    /// Removes the sets that `old` named and this state doesn't. To be called when this one is durable.
    pub(super) fn remove_superseded(&self, old: &Self, engine: &Engine) -> Result<(), CacheError> {
        let used = self.set_ids();
        old.set_ids()
            .into_iter()
            .filter(|id| !used.contains(id))
            .try_for_each(|id| engine.remove_all(BLOCKS, id))
    }

    /// Removes what no manifest names: values of stages that were never committed.
    pub(super) fn sweep_orphans(&self, engine: &Engine) -> Result<(), CacheError> {
        let layers: Vec<_> = self.layers.iter().map(|placed| placed.layer.id).collect();
        let sets = self.set_ids();
        for (kind, used) in [(HASHES, &layers), (SEGMENTS, &layers), (BLOCKS, &sets)] {
            let orphans = engine.ids(kind)?.into_iter().filter(|id| !used.contains(id));
            orphans.into_iter().try_for_each(|id| engine.remove_all(kind, id))?;
        }
        Ok(())
    }

    pub(super) fn is_compaction_due(&self, allocated_bytes: u64, opening_took: Duration) -> bool {
        let Some((first, later)) = self.layers.split_first() else { return false };
        let later_hashes: u64 = later.iter().map(|placed| placed.layer.hashes).sum();
        let payload_bytes = (first.layer.hashes + later_hashes) * BlockHash::LEN as u64;
        self.layers.len() > MAX_LAYERS
            || (opening_took > SLOW_OPENING && self.layers.len() > SLOW_LAYERS)
            || later_hashes > SMALL_HASHES.max(first.layer.hashes / 10)
            || allocated_bytes > SMALL_SPACE_BYTES + payload_bytes * MAX_SPACE_TIMES_TEN / 10
    }

    fn set_ids(&self) -> Vec<u64> {
        self.servers.values().filter_map(|known| known.stored).map(|stored| stored.id).collect()
    }
}

impl PlacedLayer {
    fn holds(&self, segment: u64) -> bool {
        self.layer.segments.contains(segment) && limit_in(segment, self.limit_blocks) > 0
    }

    fn store(&mut self, engine: &Engine) -> Result<(), CacheError> {
        if self.chunks.is_some() {
            return Ok(());
        }
        let mut chunks = 0;
        for (chunk, bytes) in self.layer.segments.chunks() {
            engine.put(Key::Segments { layer: self.layer.id, chunk }, &bytes)?;
            chunks += 1;
        }
        self.chunks = Some(chunks);
        Ok(())
    }

    fn stored(&self) -> StoredLayer {
        StoredLayer {
            id: self.layer.id,
            limit_blocks: self.limit_blocks,
            hashes: self.layer.hashes,
            segments: self.layer.segments.len(),
            chunks: self.chunks.unwrap_or_default(),
        }
    }
}

/// Hashes of a segment of zeros, the disk's last block being as short as it is.
pub(super) fn zero_hashes(size_bytes: u64, segment: u64) -> Vec<BlockHash> {
    let mut hashes = vec![zero_block(); blocks_in(size_bytes, segment)];
    if let Some((at, last)) = hashes.iter_mut().enumerate().next_back() {
        *last = zero_hash(block_len(size_bytes, segment * SEGMENT_BLOCKS + at as u64));
    }
    hashes
}

pub(super) fn random_id() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().1 ^ uuid::Uuid::new_v4().as_u64_pair().0
}

fn load_layer(engine: &Engine, stored: &StoredLayer) -> Result<PlacedLayer, CacheError> {
    let mut segments = SegmentSet::default();
    let mut chunks = 0;
    for (chunk, bytes) in engine.segment_chunks(stored.id)? {
        segments
            .take_chunk(chunk, &bytes)
            .ok_or_else(|| engine.damaged("a set of segments is malformed"))?;
        chunks += 1;
    }
    if chunks != stored.chunks || segments.len() != stored.segments {
        return Err(engine.damaged(format!("parts of layer {:016x} are missing", stored.id)));
    }
    let layer = Arc::new(Layer { id: stored.id, segments, hashes: stored.hashes });
    Ok(PlacedLayer { layer, limit_blocks: stored.limit_blocks, chunks: Some(stored.chunks) })
}

fn load_set(engine: &Engine, stored: StoredSet) -> Result<Arc<BlockSet>, CacheError> {
    let mut set = BlockSet::from_tail(stored.tail);
    for part in 0..stored.parts {
        let value = engine.get(Key::Blocks { set: stored.id, part })?;
        let value = value.ok_or_else(|| engine.damaged("part of a changed set is missing"))?;
        set.take_part(&value).ok_or_else(|| engine.damaged("a changed set is malformed"))?;
    }
    Ok(Arc::new(set))
}

fn store_set(engine: &Engine, set: &BlockSet) -> Result<StoredSet, CacheError> {
    let id = random_id();
    let parts = set.parts();
    for (part, payload) in parts.iter().enumerate() {
        engine.put(Key::Blocks { set: id, part: part as u32 }, payload)?;
    }
    Ok(StoredSet { id, parts: parts.len() as u32, tail: set.tail() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_layers_much_space_and_slow_openings_are_worth_writing_anew() {
        let quick = Duration::from_millis(200);
        let with = |layers: usize| {
            let layer = || PlacedLayer {
                layer: Arc::new(Layer { hashes: 1 << 10, ..Layer::new() }),
                limit_blocks: u64::MAX,
                chunks: None,
            };
            State { layers: (0..layers).map(|_| layer()).collect(), ..State::empty(1 << 30) }
        };
        assert!(!with(0).is_compaction_due(u64::MAX, SLOW_OPENING * 2));
        assert!(!with(MAX_LAYERS).is_compaction_due(0, quick));
        assert!(with(MAX_LAYERS + 1).is_compaction_due(0, quick));
        assert!(with(1).is_compaction_due(SMALL_SPACE_BYTES + (1 << 20), quick));
        assert!(with(SLOW_LAYERS + 1).is_compaction_due(0, SLOW_OPENING * 2));
        assert!(!with(SLOW_LAYERS + 1).is_compaction_due(0, SLOW_OPENING));
        // The first opening after that may be slow for that very reason.
        assert!(!with(SLOW_LAYERS).is_compaction_due(0, SLOW_OPENING * 2));
    }
}
