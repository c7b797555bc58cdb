//! Block hashes, segment digests and table digests: the one place that computes them.
//!
//! All are BLAKE3-256 (J. O'Connor et al., "BLAKE3: one function, fast everywhere", 2020). Full blocks are hashed
//! 16 side by side through `blake3::platform`, which is not a stable interface: the first use compares it with
//! `blake3::hash` and stays with the latter when they differ.

use std::sync::OnceLock;

use blake3::platform::Platform;

use crate::ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, block_count, block_len, segment_count};

const BLOCK: usize = BLOCK_BYTES as usize;
const CHUNK: usize = blake3::CHUNK_LEN;
const LANES: usize = 16;

// Flags and initial value of BLAKE3 (paper, section 2.3, table 3).
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;
const ROOT: u8 = 8;
const IV: [u32; 8] = [
    0x6A09_E667,
    0xBB67_AE85,
    0x3C6E_F372,
    0xA54F_F53A,
    0x510E_527F,
    0x9B05_688C,
    0x1F83_D9AB,
    0x5BE0_CD19,
];

/// Hash of a full block of zeros.
pub fn zero_block() -> BlockHash {
    static ZERO: OnceLock<BlockHash> = OnceLock::new();
    *ZERO.get_or_init(|| hash_block(&[0; BLOCK]))
}

/// Hash of `len` zero bytes, `len` at most one block.
pub fn zero_hash(len: usize) -> BlockHash {
    if len == BLOCK { zero_block() } else { hash_block(&[0; BLOCK][..len.min(BLOCK)]) }
}

/// Digest of a full segment of zeros.
pub fn zero_segment() -> BlockHash {
    static ZERO: OnceLock<BlockHash> = OnceLock::new();
    *ZERO.get_or_init(|| segment_digest(&[zero_block(); SEGMENT_BLOCKS as usize]))
}

/// Hash of one block of any length up to 4096 bytes.
pub fn hash_block(block: &[u8]) -> BlockHash {
    BlockHash(*blake3::hash(block).as_bytes())
}

/// Hashes of consecutive blocks; the last may be short. Zero blocks are found first, which is cheaper than hashing.
pub fn hash_blocks(data: &[u8], out: &mut Vec<BlockHash>) {
    let first = out.len();
    let mut full = [(0usize, &[0u8; BLOCK]); LANES];
    let mut waiting = 0;
    for piece in data.chunks(BLOCK) {
        let index = out.len();
        let Ok(block) = <&[u8; BLOCK]>::try_from(piece) else {
            out.push(hash_block(piece));
            continue;
        };
        out.push(zero_block());
        if is_zero(block) {
            continue;
        }
        full[waiting] = (index, block);
        waiting += 1;
        if waiting == LANES {
            hash_group(&full, out);
            waiting = 0;
        }
    }
    debug_assert_eq!(out.len() - first, data.len().div_ceil(BLOCK));
    hash_group(&full[..waiting], out);
}

/// True when all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Most data shows itself in its first bytes; the rest is compared in pieces the compiler turns into vectors.
    let (head, rest) = bytes.split_at(bytes.len().min(64));
    head.iter().all(|b| *b == 0)
        && rest.chunks(512).all(|piece| piece.iter().fold(0, |all, b| all | b) == 0)
}

/// Digest of a segment: BLAKE3 of its block hashes, concatenated.
pub fn segment_digest(hashes: &[BlockHash]) -> BlockHash {
    // One piece after the other would be hashed by itself; together they are as wide as the processor is.
    let mut bytes = [0; SEGMENT_BLOCKS as usize * BlockHash::LEN];
    let mut hasher = blake3::Hasher::new();
    for some in hashes.chunks(SEGMENT_BLOCKS as usize) {
        let places = bytes.chunks_exact_mut(BlockHash::LEN).zip(some);
        places.for_each(|(place, hash)| place.copy_from_slice(&hash.0));
        hasher.update(&bytes[..some.len() * BlockHash::LEN]);
    }
    BlockHash(*hasher.finalize().as_bytes())
}

/// Digest of segment `segment` of a disk of `size_bytes` when all its blocks are zero.
pub fn zero_segment_of(size_bytes: u64, segment: u64) -> BlockHash {
    let first = segment * SEGMENT_BLOCKS;
    let blocks = block_count(size_bytes).saturating_sub(first).min(SEGMENT_BLOCKS);
    let last_len = block_len(size_bytes, (first + blocks).saturating_sub(1));
    if blocks == SEGMENT_BLOCKS && last_len == BLOCK {
        return zero_segment();
    }
    let hashes: Vec<_> =
        (first..first + blocks).map(|block| zero_hash(block_len(size_bytes, block))).collect();
    segment_digest(&hashes)
}

/// Table digest: names the whole content of a disk of `size_bytes` with these segment digests, in order.
pub fn table_digest<'a>(
    size_bytes: u64,
    segments: impl IntoIterator<Item = &'a BlockHash>,
) -> BlockHash {
    let mut digester = TableDigester::new(size_bytes);
    segments.into_iter().for_each(|digest| digester.push(digest));
    digester.finish()
}

/// Makes a table digest without all segment digests in memory.
#[derive(Clone, Debug)]
pub struct TableDigester {
    hasher: blake3::Hasher,
    size_bytes: u64,
    count: u64,
}

impl TableDigester {
    /// Of a disk of `size_bytes`.
    pub fn new(size_bytes: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&size_bytes.to_le_bytes());
        hasher.update(&(BLOCK_BYTES as u32).to_le_bytes());
        Self { hasher, size_bytes, count: 0 }
    }

    /// Number of the segment whose digest comes next.
    pub fn next(&self) -> u64 {
        self.count
    }

    /// Adds the digest of the next segment.
    pub fn push(&mut self, digest: &BlockHash) {
        self.hasher.update(&digest.0);
        self.count += 1;
    }

    /// Adds segments of zeros up to `segment`.
    pub fn push_zeros(&mut self, segment: u64) {
        while self.count < segment {
            self.push(&zero_segment_of(self.size_bytes, self.count));
        }
    }

    /// The digest of all segments.
    pub fn finish(self) -> BlockHash {
        debug_assert_eq!(self.count, segment_count(self.size_bytes));
        BlockHash(*self.hasher.finalize().as_bytes())
    }
}

fn hash_group(group: &[(usize, &[u8; BLOCK])], out: &mut [BlockHash]) {
    let full: Option<&[(usize, &[u8; BLOCK]); LANES]> = group.try_into().ok();
    match (full, lanes()) {
        (Some(group), Some(platform)) => {
            let hashes = hash_lanes(platform, &group.map(|(_, block)| block));
            for ((index, _), hash) in group.iter().zip(hashes) {
                out[*index] = hash;
            }
        }
        _ => {
            for (index, block) in group {
                out[*index] = hash_block(*block);
            }
        }
    }
}

/// The platform to hash 16 blocks side by side with, if it is wide enough and agrees with `blake3::hash`.
fn lanes() -> Option<Platform> {
    static CHECKED: OnceLock<Option<Platform>> = OnceLock::new();
    *CHECKED.get_or_init(|| {
        let platform = Platform::detect();
        let sample: Vec<[u8; BLOCK]> = (0..LANES)
            .map(|lane| std::array::from_fn(|i| (i * 31 + lane * 7 + i / 1024) as u8))
            .collect();
        let blocks: [&[u8; BLOCK]; LANES] = std::array::from_fn(|lane| &sample[lane]);
        let agree = hash_lanes(platform, &blocks)
            .iter()
            .zip(&sample)
            .all(|(hash, block)| *hash == hash_block(block));
        (platform.simd_degree() >= 8 && agree).then_some(platform)
    })
}

/// A 4 KiB block is four chunks and three parents: each level is hashed for all 16 blocks in one call.
fn hash_lanes(platform: Platform, blocks: &[&[u8; BLOCK]; LANES]) -> [BlockHash; LANES] {
    use blake3::IncrementCounter::No;
    // Chaining values of the four chunks of each block, beside each other: [lane][chunk].
    let mut chunks = [[[0u8; 32]; 4]; LANES];
    let mut level = [0u8; LANES * 32];
    for chunk in 0..4 {
        let inputs: [&[u8; CHUNK]; LANES] = std::array::from_fn(|lane| {
            blocks[lane][chunk * CHUNK..].first_chunk().expect("a block has four chunks")
        });
        platform.hash_many(&inputs, &IV, chunk as u64, No, 0, CHUNK_START, CHUNK_END, &mut level);
        for (lane, value) in level.chunks_exact(32).enumerate() {
            chunks[lane][chunk].copy_from_slice(value);
        }
    }
    let mut parents = [[0u8; 64]; LANES];
    for pair in 0..2 {
        let inputs: [[u8; 64]; LANES] =
            std::array::from_fn(|lane| join(&chunks[lane][pair * 2], &chunks[lane][pair * 2 + 1]));
        platform.hash_many(&inputs.each_ref(), &IV, 0, No, PARENT, 0, 0, &mut level);
        for (lane, value) in level.chunks_exact(32).enumerate() {
            parents[lane][pair * 32..][..32].copy_from_slice(value);
        }
    }
    platform.hash_many(&parents.each_ref(), &IV, 0, No, PARENT | ROOT, 0, 0, &mut level);
    std::array::from_fn(|lane| {
        BlockHash(*level[lane * 32..].first_chunk().expect("32 bytes for each lane"))
    })
}

fn join(left: &[u8; 32], right: &[u8; 32]) -> [u8; 64] {
    let mut both = [0; 64];
    both[..32].copy_from_slice(left);
    both[32..].copy_from_slice(right);
    both
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_agree_with_plain_hashing() {
        let data: Vec<u8> = (0..BLOCK * 77 + 513)
            .map(|i| if i / BLOCK % 5 == 3 { 0 } else { ((i * i) >> 7) as u8 })
            .collect();
        let mut hashes = Vec::new();
        hash_blocks(&data, &mut hashes);
        let plain: Vec<_> = data.chunks(BLOCK).map(hash_block).collect();
        assert_eq!(hashes, plain);
    }

    #[test]
    fn zero_segments_of_every_shape() {
        for size in [512, 4095, 4096, (4 << 20) - 512, 4 << 20, (4 << 20) + 512] {
            let hashes: Vec<_> =
                (0..block_count(size)).map(|b| zero_hash(block_len(size, b))).collect();
            for (segment, hashes) in hashes.chunks(SEGMENT_BLOCKS as usize).enumerate() {
                assert_eq!(
                    zero_segment_of(size, segment as u64),
                    segment_digest(hashes),
                    "size {size}"
                );
            }
        }
    }
}
