//! A segment that is to be restored: what the target holds of it, as far as is known.

use std::ops::Range;

use janus_proto::{
    hash::{segment_digest, zero_hash, zero_segment_of},
    ids::{BlockHash, SEGMENT_BLOCKS, SEGMENT_BYTES, block_count, block_len},
    ranges::Ranges,
};

use crate::{segment_bits::SegmentBits, snapshot::opened::SegmentHashes};

/// No block has this hash.
const UNKNOWN: BlockHash = BlockHash([0; BlockHash::LEN]);

/// A segment in work.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) segment: u64,
    size_bytes: u64,
    held: Held,
    /// Blocks that are proven to be what is wanted, one by one.
    proven: SegmentBits,
    /// The target had data here, so that block hashes may save something.
    pub(super) has_content: bool,
    /// Bytes of it that were counted as done.
    pub(super) counted: u64,
}

/// Hashes of what the target holds.
#[derive(Debug)]
enum Held {
    Zeros,
    Unknown,
    Hashes(Vec<BlockHash>),
}

impl Part {
    /// All zeros in the target.
    pub(super) fn zeros(size_bytes: u64, segment: u64) -> Self {
        Self::new(size_bytes, segment, Held::Zeros, false)
    }

    /// Anything may be there.
    pub(super) fn unknown(size_bytes: u64, segment: u64) -> Self {
        Self::new(size_bytes, segment, Held::Unknown, false)
    }

    /// Blocks with these hashes; [`unread`] where that isn't known.
    pub(super) fn content(size_bytes: u64, segment: u64, hashes: Vec<BlockHash>) -> Self {
        Self::new(size_bytes, segment, Held::Hashes(hashes), true)
    }

    fn new(size_bytes: u64, segment: u64, held: Held, has_content: bool) -> Self {
        Self { segment, size_bytes, held, proven: SegmentBits::default(), has_content, counted: 0 }
    }

    /// Its blocks.
    pub(super) fn blocks(&self) -> Range<u64> {
        let first = self.segment * SEGMENT_BLOCKS;
        first..(first + SEGMENT_BLOCKS).min(block_count(self.size_bytes))
    }

    /// Its length.
    pub(super) fn bytes(&self) -> u64 {
        (self.size_bytes - self.segment * SEGMENT_BYTES).min(SEGMENT_BYTES)
    }

    /// Blocks that are not known to be right: by `wanted`, where that is known, else all that are not proven.
    pub(super) fn needed(&self, wanted: Option<&SegmentHashes>) -> Vec<u64> {
        let is_needed = |block: &u64| {
            let place = self.place(*block);
            match wanted {
                Some(wanted) => !wanted.fits(place, &self.held(*block)),
                None => !self.is_proven(place),
            }
        };
        self.blocks().filter(is_needed).collect()
    }

    /// Takes note of what was written. `proven`: it is what is wanted, whatever the rest of the segment is.
    pub(super) fn note(&mut self, block: u64, hash: BlockHash, proven: bool) {
        let place = self.place(block);
        if let Some(held) = self.hashes_mut().get_mut(place) {
            *held = hash;
            let bit = u64::from(proven) << (place % 64);
            self.proven[place / 64] |= bit;
        }
    }

    /// Blocks that are what is wanted by their whole hashes.
    pub(super) fn prove(&mut self, wanted: &SegmentHashes) {
        for block in self.blocks() {
            let (place, held) = (self.place(block), self.held(block));
            if wanted.fits(place, &held) {
                self.proven[place / 64] |= 1 << (place % 64);
            }
        }
    }

    /// Nothing of it counts any more but what is compared anew.
    pub(super) fn doubt(&mut self) {
        self.proven = SegmentBits::default();
        self.has_content = true;
    }

    /// True when a block is known to be zeros in the target.
    pub(super) fn is_zero(&self, block: u64) -> bool {
        self.held(block) == zero_hash(block_len(self.size_bytes, block))
    }

    /// Digest of what the target holds.
    pub(super) fn digest(&self) -> BlockHash {
        match &self.held {
            Held::Zeros => zero_segment_of(self.size_bytes, self.segment),
            Held::Unknown => UNKNOWN,
            Held::Hashes(hashes) => segment_digest(hashes),
        }
    }

    /// Hash of what the target holds, as far as that is known.
    pub(super) fn held(&self, block: u64) -> BlockHash {
        match &self.held {
            Held::Zeros => zero_hash(block_len(self.size_bytes, block)),
            Held::Unknown => UNKNOWN,
            Held::Hashes(hashes) => hashes.get(self.place(block)).copied().unwrap_or(UNKNOWN),
        }
    }

    fn hashes_mut(&mut self) -> &mut Vec<BlockHash> {
        if !matches!(self.held, Held::Hashes(_)) {
            self.held = Held::Hashes(self.blocks().map(|block| self.held(block)).collect());
        }
        match &mut self.held {
            Held::Hashes(hashes) => hashes,
            Held::Zeros | Held::Unknown => unreachable!("it was made a list above"),
        }
    }

    fn is_proven(&self, place: usize) -> bool {
        self.proven[place / 64] >> (place % 64) & 1 == 1
    }

    fn place(&self, block: u64) -> usize {
        (block % SEGMENT_BLOCKS) as usize
    }
}

/// What stands for the hash of a block that could not be read.
pub(super) fn unread() -> BlockHash {
    UNKNOWN
}

/// Ascending blocks as ranges.
pub(super) fn ranges(blocks: impl IntoIterator<Item = u64>) -> Vec<Range<u64>> {
    let mut ranges = Ranges::new();
    blocks.into_iter().for_each(|block| ranges.push(block..block + 1));
    ranges.iter().collect()
}

/// Segments that one source works on at a time, ascending.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) parts: Vec<Part>,
    /// Sources that have given what they have, by their numbers.
    tried: u64,
}

impl Piece {
    pub(super) fn new(mut parts: Vec<Part>) -> Self {
        parts.sort_unstable_by_key(|part| part.segment);
        Self { parts, tried: 0 }
    }

    /// The part that a block is in.
    pub(super) fn part_of(&mut self, block: u64) -> Option<&mut Part> {
        let segment = block / SEGMENT_BLOCKS;
        let at = self.parts.binary_search_by_key(&segment, |part| part.segment).ok()?;
        self.parts.get_mut(at)
    }

    pub(super) fn note_tried(&mut self, source: usize) {
        self.tried |= 1 << source;
    }

    /// False when none of these sources can bring any more of it.
    pub(super) fn has_hope(&self, sources: u64) -> bool {
        sources & !self.tried != 0
    }

    /// No source has had it.
    pub(super) fn is_fresh(&self) -> bool {
        self.tried == 0
    }

    pub(super) fn is_for(&self, source: usize) -> bool {
        self.tried >> source & 1 == 0
    }
}

#[cfg(test)]
mod tests {
    use janus_proto::hash::hash_block;

    use super::*;

    #[test]
    fn a_part_is_what_was_noted_of_it() {
        let size = SEGMENT_BYTES + 4096 * 2 + 512;
        let mut part = Part::zeros(size, 1);
        assert_eq!((part.blocks(), part.bytes()), (1024..1027, 4096 * 2 + 512));
        assert_eq!(part.digest(), zero_segment_of(size, 1));
        assert_eq!(part.needed(None), [1024, 1025, 1026]);
        let (one, two) = (hash_block(b"one"), hash_block(b"two"));
        part.note(1025, one, true);
        part.note(1026, two, false);
        assert_eq!(part.needed(None), [1024, 1026]);
        assert!(part.is_zero(1024) && !part.is_zero(1026));
        assert_eq!(part.digest(), segment_digest(&[zero_hash(4096), one, two]));
        let mut unknown = Part::unknown(size, 1);
        assert_ne!(unknown.digest(), zero_segment_of(size, 1));
        assert!(!unknown.is_zero(1024));
        for block in 1024..1026 {
            unknown.note(block, zero_hash(4096), true);
        }
        unknown.note(1026, zero_hash(512), true);
        assert_eq!(unknown.digest(), zero_segment_of(size, 1));
        assert_eq!(ranges(unknown.needed(None)), []);
    }

    #[test]
    fn a_piece_without_sources_has_no_hope() {
        let mut piece = Piece::new(vec![Part::zeros(1 << 30, 7), Part::zeros(1 << 30, 3)]);
        assert_eq!(piece.part_of(3 * 1024 + 5).map(|part| part.segment), Some(3));
        assert!(piece.part_of(4 * 1024).is_none());
        piece.note_tried(0);
        assert!(piece.has_hope(0b11) && !piece.has_hope(0b01));
        assert!(!piece.is_for(0) && piece.is_for(1));
    }

    #[test]
    fn blocks_in_a_row_are_one_range() {
        assert_eq!(ranges([1, 2, 3, 7, 9, 10]), [1..4, 7..8, 9..11]);
    }
}
