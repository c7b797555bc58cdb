//! What a source is asked for: what is needed of a piece, and it has.

use std::{collections::HashMap, sync::Arc};

use janus_proto::{
    ids::{BlockHash, SEGMENT_BLOCKS},
    pb::BlockBatch,
};

use super::{
    super::{DamageError, part::Piece, source::Source, work::Work},
    SHORT, ServeError, is_damage,
};
use crate::snapshot::opened::SegmentHashes;

/// What a source is asked for.
#[derive(Default)]
pub(super) struct Plan {
    pub(super) blocks: Vec<u64>,
    /// Of segments that differ: what the wanted blocks are.
    pub(super) checks: HashMap<u64, Arc<SegmentHashes>>,
}

impl Work {
    /// Looks for what is needed and a source has.
    pub(super) async fn plan(
        &self,
        source: &Source,
        piece: &mut Piece,
    ) -> Result<Plan, ServeError> {
        let (same, other): (Vec<_>, Vec<_>) = piece
            .parts
            .iter()
            .map(|part| part.segment)
            .partition(|segment| self.has_segment(source, *segment));
        let mut plan = Plan::default();
        self.plan_same(source, piece, &same, &mut plan).await?;
        let is_there = |segment: &u64| source.digest(*segment).is_some();
        let other: Vec<_> = other.into_iter().filter(is_there).collect();
        self.plan_other(source, piece, &other, &mut plan).await?;
        plan.blocks.sort_unstable();
        Ok(plan)
    }

    /// Segments that are the wanted ones: where the target has data, short hashes say what differs.
    async fn plan_same(
        &self,
        source: &Source,
        piece: &mut Piece,
        same: &[u64],
        plan: &mut Plan,
    ) -> Result<(), ServeError> {
        let compared: Vec<u64> = piece
            .parts
            .iter()
            .filter(|part| part.has_content && same.contains(&part.segment))
            .map(|part| part.segment)
            .collect();
        let hashes = match self.table.ask(&source.opened, &compared, SHORT).await {
            Ok(hashes) => hashes,
            // The blocks may be there all the same.
            Err(ServeError::Link(error)) if is_damage(&error) => Vec::new(),
            Err(error) => return Err(error),
        };
        let hashes: HashMap<_, _> = compared.into_iter().zip(hashes).collect();
        for part in piece.parts.iter().filter(|part| same.contains(&part.segment)) {
            plan.blocks.extend(part.needed(hashes.get(&part.segment).map(Arc::as_ref)));
        }
        Ok(())
    }

    /// Segments of another snapshot that differ: the blocks that are the same at the same place.
    async fn plan_other(
        &self,
        source: &Source,
        piece: &mut Piece,
        other: &[u64],
        plan: &mut Plan,
    ) -> Result<(), ServeError> {
        let holder = self.holder();
        let wanted = self.table.of(holder, other).await;
        let known: Vec<u64> =
            other.iter().filter(|segment| wanted.contains_key(segment)).copied().collect();
        if known.is_empty() {
            return Ok(());
        }
        let theirs = source.opened.segment_hashes_once(&known, self.table.hash_bytes()).await?;
        for (segment, theirs) in known.into_iter().zip(theirs) {
            let Some(wanted) = wanted.get(&segment) else { continue };
            let Some(part) = piece.part_of(segment * SEGMENT_BLOCKS) else { continue };
            if wanted.is_whole() {
                part.prove(wanted);
            }
            let is_same = |block: &u64| {
                let place = (block % SEGMENT_BLOCKS) as usize;
                let (wanted, theirs) = (wanted.of(place), theirs.of(place));
                let known = wanted.len().min(theirs.len());
                known > 0 && wanted[..known] == theirs[..known]
            };
            plan.blocks.extend(part.needed(Some(wanted)).into_iter().filter(is_same));
            plan.checks.insert(segment, wanted.clone());
        }
        Ok(())
    }
}

impl Plan {
    /// A message's blocks are those that are wanted, as far as that is known of each.
    pub(super) fn check(&self, batch: &BlockBatch) -> Result<(), ServeError> {
        if self.checks.is_empty() {
            return Ok(());
        }
        let extents = batch.extents.iter().filter(|extent| !extent.zero);
        // Numbers and hashes were looked at before.
        let blocks =
            extents.flat_map(|extent| extent.first_block..extent.first_block + extent.block_count);
        for (block, hash) in blocks.zip(batch.hashes.chunks_exact(BlockHash::LEN)) {
            self.check_block(block, &BlockHash::from_wire("hashes", hash)?)?;
        }
        Ok(())
    }

    pub(super) fn check_block(&self, block: u64, hash: &BlockHash) -> Result<(), ServeError> {
        let wanted = self.checks.get(&(block / SEGMENT_BLOCKS));
        let place = (block % SEGMENT_BLOCKS) as usize;
        match wanted.is_none_or(|wanted| wanted.fits(place, hash)) {
            true => Ok(()),
            false => Err(DamageError::Foreign { block }.into()),
        }
    }
}
