//! A set of blocks: what a server lacks. Sparse by segment, and allowed to say too much, never too little.

use std::{collections::BTreeMap, sync::Arc};

use janus_proto::ids::SEGMENT_BLOCKS;

use super::segment_set::bits;
use crate::segment_bits::{SEGMENT_WORDS, SegmentBits as Bits};

const NONE: Bits = [0; SEGMENT_WORDS];
const ALL: Bits = [u64::MAX; SEGMENT_WORDS];

/// Segments kept exactly (about 160 bytes each): all of a disk of 1 TiB. Further ones become whole segments, so that
/// memory stays bounded; they are sent once more than needed.
const MAX_EXACT: usize = 1 << 18;

/// Largest stored part: stays inside sled's leaves.
const PART_BYTES: usize = 8000;
const TAG_WHOLE: u8 = 0;
const TAG_BITS: u8 = 255;
/// Up to here a list of 16-bit indexes is shorter than the bits.
const MAX_LISTED: u32 = 63;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Page {
    Whole,
    Exact(Box<Bits>),
}

/// Blocks by segment, and all blocks from `tail` on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlockSet {
    tail: u64,
    pages: BTreeMap<u64, Page>,
    exact: usize,
}

impl BlockSet {
    pub(super) fn empty() -> Self {
        Self::from_tail(u64::MAX)
    }

    pub(super) fn everything() -> Self {
        Self::from_tail(0)
    }

    pub(super) fn from_tail(tail: u64) -> Self {
        Self { tail, pages: BTreeMap::new(), exact: 0 }
    }

    /// First block from which on all are in the set; `u64::MAX` for none.
    pub(super) fn tail(&self) -> u64 {
        self.tail
    }

    pub(super) fn add_tail(&mut self, first: u64) {
        self.tail = self.tail.min(first);
        if self.tail == 0 {
            *self = Self::everything();
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tail == u64::MAX && self.pages.is_empty()
    }

    pub(super) fn segment_bits(&self, segment: u64) -> Bits {
        let mut found = match self.pages.get(&segment) {
            None => NONE,
            Some(Page::Whole) => return ALL,
            Some(Page::Exact(exact)) => **exact,
        };
        let first = segment.saturating_mul(SEGMENT_BLOCKS);
        if self.tail < first.saturating_add(SEGMENT_BLOCKS) {
            set_from(&mut found, self.tail.saturating_sub(first) as usize);
        }
        found
    }

    /// Replaces what the set has of `segment`.
    pub(super) fn set_segment(&mut self, segment: u64, new: Bits) {
        let page = match self.pages.remove(&segment) {
            Some(Page::Exact(mut page)) => {
                self.exact -= 1;
                *page = new;
                Some(page)
            }
            _ => None,
        };
        let page = match new {
            NONE => return,
            ALL => Page::Whole,
            _ if self.exact == MAX_EXACT => Page::Whole,
            _ => {
                self.exact += 1;
                Page::Exact(page.unwrap_or_else(|| Box::new(new)))
            }
        };
        self.pages.insert(segment, page);
    }

    pub(super) fn union_with(&mut self, other: &Self) {
        self.add_tail(other.tail);
        if self.tail == 0 {
            return;
        }
        for segment in other.pages.keys() {
            let (mine, theirs) = (self.page_bits(*segment), other.page_bits(*segment));
            let both = std::array::from_fn(|word| mine[word] | theirs[word]);
            if both != mine {
                self.set_segment(*segment, both);
            }
        }
    }

    fn page_bits(&self, segment: u64) -> Bits {
        match self.pages.get(&segment) {
            None => NONE,
            Some(Page::Whole) => ALL,
            Some(Page::Exact(exact)) => **exact,
        }
    }

    /// The pages as values to store, each at most about 8 KB; the tail is kept elsewhere.
    pub(super) fn parts(&self) -> Vec<Vec<u8>> {
        let mut parts: Vec<Vec<u8>> = Vec::new();
        for (segment, page) in &self.pages {
            match parts.last() {
                Some(part) if part.len() < PART_BYTES => {}
                _ => parts.push(Vec::with_capacity(PART_BYTES + 256)),
            }
            if let Some(part) = parts.last_mut() {
                part.extend((*segment as u32).to_le_bytes());
                write_page(part, page);
            }
        }
        parts
    }

    /// Takes a stored part; `None` when it can't be one.
    pub(super) fn take_part(&mut self, mut bytes: &[u8]) -> Option<()> {
        while !bytes.is_empty() {
            let segment = u32::from_le_bytes(take(&mut bytes)?);
            let found = match take::<1>(&mut bytes)? {
                [TAG_WHOLE] => ALL,
                [TAG_BITS] => {
                    let raw: [u8; SEGMENT_WORDS * 8] = take(&mut bytes)?;
                    std::array::from_fn(|word| {
                        u64::from_le_bytes(std::array::from_fn(|at| raw[word * 8 + at]))
                    })
                }
                [count] => take_list(&mut bytes, count)?,
            };
            self.set_segment(u64::from(segment), found);
        }
        Some(())
    }
}

/// Which blocks must go to a server whatever T says; a picture of one moment, cheap to clone and share.
#[derive(Clone, Debug)]
pub struct MustSend {
    set: Arc<BlockSet>,
    blocks: u64,
}

impl MustSend {
    pub(super) fn new(set: Arc<BlockSet>, blocks: u64) -> Self {
        Self { set, blocks }
    }

    /// Nothing is known of the server: every block (that is not zero, when the server starts from nothing).
    pub fn is_everything(&self) -> bool {
        self.set.tail == 0
    }

    /// The server's head is T, size and all.
    pub fn is_same(&self) -> bool {
        self.set.is_empty()
    }

    /// No block has to go but those that differ from T.
    pub fn is_nothing(&self) -> bool {
        self.set.is_empty() || (self.set.pages.is_empty() && self.set.tail >= self.blocks)
    }

    /// Bit `i % 64` of word `i / 64` stands for block `i` of the segment; none is set past the end of the disk.
    pub fn segment_bits(&self, segment: u64) -> [u64; SEGMENT_WORDS] {
        let mut found = self.set.segment_bits(segment);
        let blocks = self.blocks.saturating_sub(segment.saturating_mul(SEGMENT_BLOCKS));
        if blocks < SEGMENT_BLOCKS {
            let mut past = NONE;
            set_from(&mut past, blocks as usize);
            for (word, past) in found.iter_mut().zip(past) {
                *word &= !past;
            }
        }
        found
    }

    /// True when no block of `segment` has to go.
    pub fn is_segment_clear(&self, segment: u64) -> bool {
        self.segment_bits(segment) == NONE
    }

    /// Whether block `block` of the disk has to go.
    pub fn contains(&self, block: u64) -> bool {
        let at = (block % SEGMENT_BLOCKS) as usize;
        self.segment_bits(block / SEGMENT_BLOCKS)[at / 64] >> (at % 64) & 1 == 1
    }

    /// How many blocks have to go.
    pub fn count(&self) -> u64 {
        let tail = self.blocks.saturating_sub(self.set.tail);
        let tail_segment = self.set.tail / SEGMENT_BLOCKS;
        let before = |segment: &u64| *segment <= tail_segment;
        let pages: u64 =
            self.set.pages.keys().filter(|s| before(s)).map(|segment| self.counted(*segment)).sum();
        // The segment that the tail begins in is counted with the pages when it has one.
        let twice = match self.set.pages.contains_key(&tail_segment) {
            true => self
                .blocks
                .min((tail_segment + 1).saturating_mul(SEGMENT_BLOCKS))
                .saturating_sub(self.set.tail),
            false => 0,
        };
        pages + tail - twice
    }

    fn counted(&self, segment: u64) -> u64 {
        self.segment_bits(segment).iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// Sets all bits from `first` on.
fn set_from(bits: &mut Bits, first: usize) {
    for (at, word) in bits.iter_mut().enumerate() {
        match first.saturating_sub(at * 64) {
            0 => *word = u64::MAX,
            skip if skip < 64 => *word |= u64::MAX << skip,
            _ => {}
        }
    }
}

fn write_page(part: &mut Vec<u8>, page: &Page) {
    let Page::Exact(exact) = page else {
        part.push(TAG_WHOLE);
        return;
    };
    let count: u32 = exact.iter().map(|word| word.count_ones()).sum();
    if count > MAX_LISTED {
        part.push(TAG_BITS);
        part.extend(exact.iter().flat_map(|word| word.to_le_bytes()));
        return;
    }
    part.push(count as u8);
    for (at, word) in exact.iter().enumerate() {
        part.extend(bits(*word).flat_map(|bit| (at as u16 * 64 + bit as u16).to_le_bytes()));
    }
}

fn take_list(bytes: &mut &[u8], count: u8) -> Option<Bits> {
    let mut found = NONE;
    for _ in 0..count {
        let index = usize::from(u16::from_le_bytes(take(bytes)?));
        *found.get_mut(index / 64)? |= 1 << (index % 64);
    }
    Some(found)
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_bring_every_kind_of_page_back() {
        let mut set = BlockSet::empty();
        set.set_segment(3, ALL);
        for segment in 10..2000 {
            let mut bits = NONE;
            bits[segment as usize % 16] = segment | 1;
            if segment % 7 == 0 {
                bits = [segment; 16];
            }
            set.set_segment(segment, bits);
        }
        let mut back = BlockSet::empty();
        let parts = set.parts();
        assert!(parts.len() > 1 && parts.iter().all(|part| part.len() < 8200));
        for part in parts {
            back.take_part(&part).unwrap();
        }
        assert_eq!(back, set);
        assert_eq!(back.take_part(&[1, 2, 3]), None);
    }

    #[test]
    fn a_tail_is_cut_at_the_end_of_the_disk() {
        let mut set = BlockSet::empty();
        set.add_tail(1500);
        set.set_segment(1, std::array::from_fn(|word| u64::from(word == 0)));
        let picture = MustSend::new(Arc::new(set), 1600);
        assert!(picture.is_segment_clear(0));
        assert!(picture.contains(1024) && !picture.contains(1499));
        assert!(picture.contains(1500) && picture.contains(1599) && !picture.contains(1600));
        assert_eq!(picture.count(), 101);
        assert_eq!(MustSend::new(Arc::new(BlockSet::everything()), 1600).count(), 1600);
        assert!(MustSend::new(Arc::new(BlockSet::empty()), 1600).is_nothing());
    }

    #[test]
    fn beyond_its_budget_the_set_says_too_much_never_too_little() {
        let mut set = BlockSet::empty();
        let one = std::array::from_fn(|word| u64::from(word == 5));
        for segment in 0..MAX_EXACT as u64 + 10 {
            set.set_segment(segment, one);
        }
        assert_eq!(set.segment_bits(0), one);
        assert_eq!(set.segment_bits(MAX_EXACT as u64 + 1), ALL);
    }
}
