//! A set of segments, one bit each: which of them a layer has a value for.

/// Bytes of a stored chunk: 32768 segments, 128 GiB of disk.
pub(super) const CHUNK_BYTES: usize = 4096;
const CHUNK_WORDS: usize = CHUNK_BYTES / 8;

/// Grows as needed; costs 32 KiB for each TiB of disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SegmentSet {
    words: Vec<u64>,
}

impl SegmentSet {
    pub(super) fn contains(&self, segment: u64) -> bool {
        let (word, bit) = place(segment);
        self.words.get(word).is_some_and(|w| w >> bit & 1 == 1)
    }

    pub(super) fn insert(&mut self, segment: u64) {
        let (word, bit) = place(segment);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << bit;
    }

    pub(super) fn remove(&mut self, segment: u64) {
        let (word, bit) = place(segment);
        if let Some(w) = self.words.get_mut(word) {
            *w &= !(1 << bit);
        }
    }

    pub(super) fn union_with(&mut self, other: &Self) {
        self.words.resize(self.words.len().max(other.words.len()), 0);
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    pub(super) fn len(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words
            .iter()
            .enumerate()
            .flat_map(|(at, word)| bits(*word).map(move |bit| at as u64 * 64 + bit))
    }

    /// Chunks that are not empty, each with its number.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (u32, Vec<u8>)> + '_ {
        self.words
            .chunks(CHUNK_WORDS)
            .enumerate()
            .filter(|(_, words)| words.iter().any(|w| *w != 0))
            .map(|(number, words)| {
                (number as u32, words.iter().flat_map(|w| w.to_le_bytes()).collect())
            })
    }

    /// Takes a stored chunk; `None` when it can't be one.
    pub(super) fn take_chunk(&mut self, number: u32, bytes: &[u8]) -> Option<()> {
        if bytes.len() > CHUNK_BYTES
            || !bytes.len().is_multiple_of(8)
            || number as usize >= MAX_CHUNKS
        {
            return None;
        }
        let first = number as usize * CHUNK_WORDS;
        let needed = first + bytes.len() / 8;
        if self.words.len() < needed {
            self.words.resize(needed, 0);
        }
        for (word, bytes) in self.words[first..].iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Some(())
    }
}

/// Enough for 64 TiB, and a bound on what a damaged number can make us allocate.
const MAX_CHUNKS: usize = (janus_proto::ids::MAX_DISK_BYTES / janus_proto::ids::SEGMENT_BYTES)
    as usize
    / (CHUNK_BYTES * 8);

fn place(segment: u64) -> (usize, u64) {
    ((segment / 64) as usize, segment % 64)
}

/// Positions of the bits set in `word`, ascending.
pub(super) fn bits(mut word: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let bit = u64::from(word.trailing_zeros());
        if bit == 64 {
            return None;
        }
        word &= word - 1;
        Some(bit)
    })
}
