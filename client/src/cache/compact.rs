//! Compaction: T as one layer in a new database, which resets sled's fragmentation as well. The old database counts until
//! `CURRENT` names the new one.

use std::{fs, sync::Arc};

use janus_proto::{hash::zero_block, ids::BlockHash};

#[cfg(test)]
use super::tests::kill::reached;
use super::{
    CacheError,
    engine::Engine,
    layer::{Changes, Layer},
    place::Place,
    segment_set::SegmentSet,
    state::{PlacedLayer, State},
};

/// Replaces `engine` and `state` by compacted ones; after an error they are as before.
pub(super) fn compact(
    place: &Place,
    engine: &mut Engine,
    state: &mut State,
) -> Result<(), CacheError> {
    let number = engine.number() + 1;
    let folder = place.database(number);
    let mut target = Engine::open(folder.clone(), number)?;
    reached("opened");
    match rewrite(place, engine, &mut target, state) {
        Ok(compacted) => {
            *state = compacted;
            std::mem::swap(engine, &mut target);
            let old = target.folder().to_path_buf();
            drop(target);
            remove(&old);
            Ok(())
        }
        Err(error) => {
            drop(target);
            // CURRENT may name the new database already when only its last sync failed: then it stays, and the old one is
            // still whole for this process; the next open removes the one that is not named.
            if !names(place, number) {
                remove(&folder);
            }
            Err(error)
        }
    }
}

fn rewrite(
    place: &Place,
    source: &mut Engine,
    target: &mut Engine,
    state: &State,
) -> Result<State, CacheError> {
    let mut segments = SegmentSet::default();
    state.layers.iter().for_each(|placed| segments.union_with(&placed.layer.segments));
    let mut layer = Layer::new();
    for segment in segments.iter().filter(|segment| state.holds(*segment)) {
        let hashes = state.segment(source, segment)?;
        let changes = without_zeros(&hashes);
        if !changes.hashes.is_empty() {
            changes.write(target, layer.id, segment)?;
            layer.segments.insert(segment);
            layer.hashes += changes.hashes.len() as u64;
        }
        reached("rewriting");
        for engine in [&mut *source, &mut *target] {
            if engine.is_swollen() {
                engine.reopen()?;
            }
        }
    }
    let mut next = state.clone();
    next.layers =
        vec![PlacedLayer { layer: Arc::new(layer), limit_blocks: u64::MAX, chunks: None }];
    next.servers.values_mut().for_each(|known| known.stored = None);
    verify(target, &next)?;
    reached("written");
    next.persist(place, target)?;
    reached("persisted");
    Ok(next)
}

/// Tests kill a process here.
#[cfg(not(test))]
fn reached(_: &str) {}

/// Reads all of it once: the old database goes, so the new one must be good.
fn verify(target: &mut Engine, state: &State) -> Result<(), CacheError> {
    for segment in state.layers.iter().flat_map(|placed| placed.layer.segments.iter()) {
        state.segment(target, segment)?;
        if target.is_swollen() {
            target.reopen()?;
        }
    }
    Ok(())
}

/// A full zero block needs no hash: absent means zero. (A short last one keeps its own.)
fn without_zeros(hashes: &[BlockHash]) -> Changes {
    let changed = hashes.iter().enumerate().filter(|(_, hash)| **hash != zero_block());
    let blocks: Vec<_> = changed.map(|(index, hash)| (index as u16, *hash)).collect();
    Changes::of(&blocks)
}

fn names(place: &Place, number: u64) -> bool {
    let current = place.read_current().ok().flatten();
    current
        .and_then(|bytes| super::manifest::parse(&bytes).ok())
        .is_some_and(|manifest| manifest.database == number)
}

fn remove(folder: &std::path::Path) {
    if let Err(error) = fs::remove_dir_all(folder) {
        tracing::warn!(%error, folder = %folder.display(), "an old hash cache database stays until the next run");
    }
}
