//! A layer of T: hashes that one generation changed, as values that are written once and never again.
//!
//! A segment with at most 256 hashes is one value: the bits of its blocks, then a hash for each bit. A fuller one is
//! four values of 256 blocks each (8 KiB: larger ones leave sled's leaves for files of their own), also where empty.
//! The layer's id is random, so a key is never used twice, and a value that is there with a right sum is the right one.

use janus_proto::ids::{BlockHash, SEGMENT_BLOCKS};

use super::{
    CacheError, SEGMENT_WORDS,
    engine::{Engine, Key},
    segment_set::{SegmentSet, bits},
};

/// Blocks in a quarter of a segment.
const QUARTER: usize = 256;
const QUARTER_WORDS: usize = QUARTER / 64;
/// Number of the value that holds a whole segment; quarters are 0 to 3.
const WHOLE: u8 = 4;

/// A committed layer.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) id: u64,
    /// Segments it has hashes for.
    pub(super) segments: SegmentSet,
    /// About how many hashes; decides when to compact.
    pub(super) hashes: u64,
}

/// Hashes of some blocks of a segment: bits, and a hash for each bit, ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Changes {
    pub(super) bits: [u64; SEGMENT_WORDS],
    pub(super) hashes: Vec<BlockHash>,
}

impl Changes {
    /// Of (index, hash) pairs in any order; of equal indexes the last counts.
    pub(super) fn of(blocks: &[(u16, BlockHash)]) -> Self {
        let mut sorted = blocks.to_vec();
        sorted.sort_by_key(|(index, _)| *index);
        let mut changes =
            Self { bits: [0; SEGMENT_WORDS], hashes: Vec::with_capacity(sorted.len()) };
        for (at, (index, hash)) in sorted.iter().enumerate() {
            if sorted.get(at + 1).is_some_and(|(next, _)| next == index) {
                continue;
            }
            let index = usize::from(*index);
            changes.bits[index / 64] |= 1 << (index % 64);
            changes.hashes.push(*hash);
        }
        changes
    }

    pub(super) fn write(
        &self,
        engine: &Engine,
        layer: u64,
        segment: u64,
    ) -> Result<(), CacheError> {
        if self.hashes.len() <= QUARTER {
            return engine.put(
                Key::Hashes { layer, segment, piece: WHOLE },
                &encode(&self.bits, &self.hashes),
            );
        }
        let mut rest = self.hashes.as_slice();
        for (piece, words) in self.bits.chunks(QUARTER_WORDS).enumerate() {
            let count = words.iter().map(|word| word.count_ones() as usize).sum::<usize>();
            let (mine, others) = rest.split_at(count.min(rest.len()));
            engine.put(Key::Hashes { layer, segment, piece: piece as u8 }, &encode(words, mine))?;
            rest = others;
        }
        Ok(())
    }
}

impl Layer {
    /// Puts the layer's hashes of `segment` over `hashes`; blocks from `limit` on (in the segment) are left out.
    pub(super) fn overlay(
        &self,
        engine: &Engine,
        segment: u64,
        limit: usize,
        hashes: &mut [BlockHash],
    ) -> Result<(), CacheError> {
        let limit = limit.min(hashes.len());
        let found = engine.pieces(self.id, segment)?;
        let complete = match found.as_slice() {
            [(WHOLE, value)] => decode(value, SEGMENT_WORDS, 0, &mut hashes[..limit]),
            [(0, _), (1, _), (2, _), (3, _)] => found.iter().try_for_each(|(piece, value)| {
                decode(value, QUARTER_WORDS, usize::from(*piece) * QUARTER, &mut hashes[..limit])
            }),
            _ => None,
        };
        complete.ok_or_else(|| {
            engine.damaged(format!("segment {segment} of layer {:016x} is not complete", self.id))
        })
    }
}

/// Where in `segment` the blocks from `first` on begin.
pub(super) fn limit_in(segment: u64, first: u64) -> usize {
    first.saturating_sub(segment.saturating_mul(SEGMENT_BLOCKS)).min(SEGMENT_BLOCKS) as usize
}

fn encode(words: &[u64], hashes: &[BlockHash]) -> Vec<u8> {
    let mut value = Vec::with_capacity(words.len() * 8 + hashes.len() * BlockHash::LEN);
    value.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    for hash in hashes {
        value.extend_from_slice(&hash.0);
    }
    value
}

/// Puts the value's hashes at `base` plus their bits' positions; `None` when bits and hashes don't fit each other.
fn decode(value: &[u8], words: usize, base: usize, hashes: &mut [BlockHash]) -> Option<()> {
    let (head, body) = value.split_at_checked(words * 8)?;
    let (mut body, odd) = body.as_chunks::<{ BlockHash::LEN }>();
    for (at, word) in head.as_chunks::<8>().0.iter().enumerate() {
        for bit in bits(u64::from_le_bytes(*word)) {
            let (hash, rest) = body.split_first()?;
            body = rest;
            if let Some(slot) = hashes.get_mut(base + at * 64 + bit as usize) {
                *slot = BlockHash(*hash);
            }
        }
    }
    (body.is_empty() && odd.is_empty()).then_some(())
}
