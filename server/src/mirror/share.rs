//! How much of a mirrored table's content this server's own snapshots hold at the same place.
//!
//! Digests are compared first, in windows; block hashes only of segments that no own snapshot has as they are, or in which the
//! table's index alone doesn't tell how many blocks are zeros. Blocks that an own snapshot is known to have lost don't count
//! as held by it.

use janus_proto::{
    hash::{zero_hash, zero_segment_of},
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, SnapshotId, block_len, segment_count},
};

use super::record::{Description, made_ms};
use crate::chain::{
    Held,
    ranges::{BlockRanges, segment_blocks},
    table::{TableError, TableStack},
};

/// Own snapshots that are looked at, the nearest in time.
const MOST: usize = 12;
/// Segments looked at together.
const WINDOW: u64 = 1024;

/// What this server has of a snapshot of another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Share {
    /// Bytes in blocks that aren't zeros.
    pub content_bytes: u64,
    /// Those of them that are here.
    pub held_bytes: u64,
    /// Own snapshots that have them; each adds something to those before it.
    pub of: Vec<SnapshotId>,
    /// Own snapshots that were looked at. Others since then: it is to be counted again.
    pub considered: Vec<SnapshotId>,
}

/// An own snapshot: its hashes, and the blocks that it has lost.
pub type Own = (SnapshotId, TableStack, BlockRanges);

/// Own snapshots that are worth a look, the likeliest first.
pub(super) fn considered(of: &Description, own: &[Held]) -> Vec<SnapshotId> {
    let of_disk = own.iter().filter(|held| held.snapshot().disk == of.disk);
    let mut of_disk: Vec<&Held> = of_disk.collect();
    of_disk.sort_by_key(|held| {
        let differs = held.snapshot().table_digest != of.digest;
        let id = held.snapshot().id;
        (differs, made_ms(id).abs_diff(made_ms(of.id)), id)
    });
    of_disk.into_iter().take(MOST).map(|held| held.snapshot().id).collect()
}

/// Counts; `None` when asked to stop.
pub(super) fn count(
    table: &TableStack,
    own: &[Own],
    is_over: &dyn Fn() -> bool,
) -> Result<Option<Share>, TableError> {
    let mut counter = Counter { table, own, adds: vec![false; own.len()], share: Share::default() };
    let segments = segment_count(table.disk_bytes());
    let mut first = 0;
    while first < segments {
        if is_over() {
            return Ok(None);
        }
        let end = segments.min(first + WINDOW);
        counter.window(first..end, is_over)?;
        first = end;
    }
    let adding = own.iter().zip(&counter.adds).filter(|(_, adds)| **adds);
    counter.share.of = adding.map(|((id, ..), _)| *id).collect();
    Ok(Some(counter.share))
}

struct Counter<'a> {
    table: &'a TableStack,
    own: &'a [Own],
    /// Which of the own snapshots have added something.
    adds: Vec<bool>,
    share: Share,
}

impl Counter<'_> {
    fn window(
        &mut self,
        window: std::ops::Range<u64>,
        is_over: &dyn Fn() -> bool,
    ) -> Result<(), TableError> {
        let wanted = self.table.digests_in(window.clone());
        let own: Vec<Vec<BlockHash>> =
            self.own.iter().map(|(_, stack, _)| stack.digests_in(window.clone())).collect();
        for (place, (segment, digest)) in window.zip(wanted).enumerate() {
            if digest == zero_segment_of(self.table.disk_bytes(), segment) {
                continue;
            }
            if is_over() {
                return Ok(());
            }
            let theirs: Vec<Option<BlockHash>> =
                own.iter().map(|digests| digests.get(place).copied()).collect();
            self.segment(segment, digest, &theirs)?;
        }
        Ok(())
    }

    fn segment(
        &mut self,
        segment: u64,
        digest: BlockHash,
        theirs: &[Option<BlockHash>],
    ) -> Result<(), TableError> {
        let (table, own) = (self.table, self.own);
        let same = own.iter().zip(theirs).position(|((_, _, lost), theirs)| {
            *theirs == Some(digest) && !lost.intersects(&segment_blocks(segment))
        });
        let is_last = segment + 1 == segment_count(table.disk_bytes());
        let blocks = table.content_blocks(segment).filter(|_| !is_last);
        if let (Some(number), Some(blocks)) = (same, blocks) {
            self.adds(number);
            self.share.content_bytes += blocks * BLOCK_BYTES;
            self.share.held_bytes += blocks * BLOCK_BYTES;
            return Ok(());
        }
        let first = segment * SEGMENT_BLOCKS;
        let wanted = table.segment(segment)?;
        let length = |block: usize| block_len(table.disk_bytes(), first + block as u64);
        let mut missing: Vec<usize> = (0..wanted.len())
            .filter(|block| wanted.get(*block) != Some(&zero_hash(length(*block))))
            .collect();
        let bytes =
            |blocks: &[usize]| blocks.iter().map(|block| length(*block) as u64).sum::<u64>();
        let content = bytes(&missing);
        if let Some(number) = same {
            self.adds(number);
            missing.clear();
        }
        // Snapshots of one chain mostly have a segment in common: it is read once.
        let mut seen: Vec<BlockHash> = Vec::new();
        for (number, ((_, stack, lost), theirs)) in own.iter().zip(theirs).enumerate() {
            let Some(theirs) = theirs.filter(|theirs| !seen.contains(theirs)) else { continue };
            if missing.is_empty() {
                break;
            }
            if !lost.intersects(&segment_blocks(segment)) {
                seen.push(theirs);
            }
            // One that can't be read here adds nothing here.
            let Ok(hashes) = stack.segment(segment) else { continue };
            let before = missing.len();
            missing.retain(|block| {
                hashes.get(*block) != wanted.get(*block) || lost.contains(first + *block as u64)
            });
            if missing.len() < before {
                self.adds(number);
            }
        }
        self.share.content_bytes += content;
        self.share.held_bytes += content - bytes(&missing);
        Ok(())
    }

    fn adds(&mut self, number: usize) {
        if let Some(adds) = self.adds.get_mut(number) {
            *adds = true;
        }
    }
}
