//! What is on a disk of the machine, with its hashes, which are made once.

use janus_proto::{
    hash::{hash_blocks, segment_digest, table_digest},
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS},
    model::{Batch, Extent},
};

const BLOCK: usize = BLOCK_BYTES as usize;

/// Bytes of a disk.
#[derive(Clone, PartialEq, Eq)]
pub struct Content {
    pub bytes: Vec<u8>,
    pub hashes: Vec<BlockHash>,
}

impl Content {
    pub fn new(bytes: Vec<u8>) -> Self {
        let mut hashes = Vec::new();
        hash_blocks(&bytes, &mut hashes);
        Self { bytes, hashes }
    }

    /// These bytes, cut, or extended by islands of data between holes.
    pub fn resized(&self, len: usize) -> Self {
        let (mut bytes, old) = (self.bytes.clone(), self.bytes.len());
        bytes.resize(len, 0);
        for (number, island) in bytes.chunks_mut(128 << 10).enumerate().step_by(3) {
            let at = number * (128 << 10);
            if at >= old {
                fill(island, (len + at) as u64);
            }
        }
        Self::new(bytes)
    }

    /// Other data in some blocks, zeros in some that may have had data.
    pub fn changed(&self, seed: u64) -> Self {
        let mut bytes = self.bytes.clone();
        let count = self.hashes.len();
        for (first, is_zero) in [(seed * 7, false), (seed * 31 + 100, false), (seed * 13, true)] {
            for block in (first as usize..first as usize + 5).map(|block| block % count) {
                let end = bytes.len().min((block + 1) * BLOCK);
                match is_zero {
                    true => bytes[block * BLOCK..end].fill(0),
                    false => fill(&mut bytes[block * BLOCK..end], seed * 1000 + block as u64),
                }
            }
        }
        Self::new(bytes)
    }

    /// Other data in `count` blocks from `first` on.
    pub fn overwritten(&self, first: usize, count: usize, seed: u64) -> Self {
        let mut bytes = self.bytes.clone();
        for (block, at) in (first..first + count).map(|block| (block, block * BLOCK)) {
            fill(&mut bytes[at..at + BLOCK], seed * 1000 + block as u64);
        }
        Self::new(bytes)
    }

    /// Hashes by segments.
    pub fn segments(&self) -> impl Iterator<Item = (u64, &[BlockHash])> {
        (0..).zip(self.hashes.chunks(SEGMENT_BLOCKS as usize))
    }

    /// What a commit names.
    pub fn digest(&self) -> BlockHash {
        let digests: Vec<BlockHash> =
            self.segments().map(|(_, hashes)| segment_digest(hashes)).collect();
        table_digest(self.bytes.len() as u64, &digests)
    }

    /// A message with these blocks, ascending.
    pub fn batch(&self, blocks: &[u64]) -> Batch {
        let mut extents: Vec<Extent> = Vec::new();
        let (mut data, mut hashes) = (Vec::new(), Vec::new());
        for &block in blocks {
            let from = block as usize * BLOCK;
            let bytes = &self.bytes[from..self.bytes.len().min(from + BLOCK)];
            let zero = bytes.iter().all(|byte| *byte == 0);
            match extents.last_mut() {
                Some(last) if last.end() == block && last.zero == zero => last.count += 1,
                _ => extents.push(Extent { first: block, count: 1, zero }),
            }
            if !zero {
                data.extend_from_slice(bytes);
                hashes.extend_from_slice(&self.hashes[block as usize].0);
            }
        }
        Batch::new(self.bytes.len() as u64, extents, hashes.into(), data.into()).unwrap()
    }
}

/// Bytes that are no zero blocks, and differ by seed.
fn fill(bytes: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for byte in bytes {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = (state >> 56) as u8;
    }
}
