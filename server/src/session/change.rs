//! What a session changes on its disk: how much, and whether it can be read any more.

use std::collections::BTreeSet;

use janus_proto::{
    chance,
    ids::{BLOCK_BYTES, SEGMENT_BLOCKS, block_count, block_len},
};

use super::{Inner, PAYLOAD_BLOCKS, Session, finish::bitmap};
use crate::guard::change::{Change, SAMPLE, is_packed};

impl Session {
    /// What it changes; `None` where there is no head to compare with. With `is_sealed` what blocks hold says nothing. Reads some
    /// hundred blocks.
    pub fn change(&self, is_sealed: bool) -> Option<Change> {
        self.start.head()?;
        let inner = self.lock();
        let counts: Vec<(u64, u64)> = inner
            .index
            .touched
            .iter()
            .map(|(segment, touches)| {
                let words = bitmap(Some(touches)).0;
                (*segment, words.iter().map(|word| u64::from(word.count_ones())).sum())
            })
            .collect();
        let changed_blocks = counts.iter().map(|(_, count)| count).sum();
        let disk_blocks = block_count(self.disk.size_bytes);
        let mut change = Change { changed_blocks, disk_blocks, ..Change::default() };
        if !is_sealed && !change.is_small() {
            for block in self.sample(&inner, &counts, changed_blocks) {
                // What can't be read says nothing; who needs it will find out.
                let turned = self.has_turned(&inner, block);
                change.sampled += u64::from(turned.is_some());
                change.turned += u64::from(turned == Some(true));
            }
        }
        Some(change)
    }

    /// Changed blocks, drawn by chance: who changes them can't know which.
    fn sample(&self, inner: &Inner, counts: &[(u64, u64)], total: u64) -> Vec<u64> {
        // Ranks among the changed blocks, by segment.
        let mut ranks: BTreeSet<u64> = BTreeSet::new();
        for _ in 0..SAMPLE.min(usize::try_from(total).unwrap_or(SAMPLE)) {
            let rank = chance::between(0.0..total as f64) as u64;
            ranks.insert(rank.min(total.saturating_sub(1)));
        }
        let mut blocks = Vec::with_capacity(ranks.len());
        let mut before = 0;
        for (segment, count) in counts {
            let mut here = ranks.range(before..before + count).peekable();
            if here.peek().is_some() {
                let touched = bitmap(inner.index.touched.get(segment));
                let touched: Vec<usize> = touched.blocks().collect();
                let index = |rank: &u64| touched.get((rank - before) as usize).copied();
                let chosen = here.filter_map(index);
                blocks.extend(chosen.map(|index| segment * SEGMENT_BLOCKS + index as u64));
            }
            before += count;
        }
        blocks
    }

    /// Whether a block held something that could be packed, and doesn't any more.
    fn has_turned(&self, inner: &Inner, block: u64) -> Option<bool> {
        let slot = *inner.index.slots.get(&(block / PAYLOAD_BLOCKS))?;
        let mut bytes = vec![0; block_len(self.disk.size_bytes, block)];
        self.image.read_exact_at(&mut bytes, self.place(slot, block)).ok()?;
        if !is_packed(&bytes) {
            return Some(false);
        }
        self.start.read_at(block * BLOCK_BYTES, &mut bytes).ok()?;
        let was_something = bytes.iter().any(|byte| *byte != 0);
        Some(was_something && !is_packed(&bytes))
    }
}
