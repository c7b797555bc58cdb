//! Blocks as they come, put together to chunks.

use std::{collections::VecDeque, ops::Range, sync::Arc};

use janus_proto::{
    ids::{BLOCK_BYTES, BlockHash},
    model::Batch,
};

use super::{CHUNK_BLOCKS, cache::Chunk, proof::Proven};
use crate::{
    seal::DiskSeal,
    snapshot::opened::{Part, Sink},
};

const CHUNK_BYTES: usize = (CHUNK_BLOCKS * BLOCK_BYTES) as usize;

/// Batches of so few blocks are compared with their hashes at once: that takes less time than to hand them on.
const FEW_BLOCKS: u64 = 16;

/// Fills chunks in order and hands on each that is complete.
pub(super) struct Filling<F> {
    /// Chunks that are not complete, ascending.
    left: VecDeque<u64>,
    /// Of the disk.
    blocks: u64,
    /// What opens blocks, and what they must be.
    seal: Option<(Arc<DiskSeal>, Arc<Proven>)>,
    /// The first of them, as far as it has come.
    data: Option<Vec<u8>>,
    lost: u16,
    /// A bit for each block of it that has come.
    filled: u16,
    /// Why no more is wanted.
    wrong: Option<String>,
    done: F,
}

impl<F: FnMut(u64, Chunk) + Send> Filling<F> {
    /// Ascending chunks of a disk of so many blocks.
    pub(super) fn new(chunks: impl IntoIterator<Item = u64>, blocks: u64, done: F) -> Self {
        let (left, data, seal, wrong) = (chunks.into_iter().collect(), None, None, None);
        Self { left, blocks, seal, data, lost: 0, filled: 0, wrong, done }
    }

    /// What comes is sealed, and must be this.
    pub(super) fn sealed(&mut self, seal: Arc<DiskSeal>, proven: Proven) {
        self.seal = Some((seal, Arc::new(proven)));
    }

    /// Chunks that have not been handed on.
    pub(super) fn left(&self) -> impl Iterator<Item = u64> {
        self.left.iter().copied()
    }

    /// Nothing more comes: the rest is zeros.
    pub(super) fn finish(&mut self) -> Result<(), String> {
        if self.wrong.is_none() {
            self.advance(u64::MAX);
        }
        self.wrong.take().map_or(Ok(()), Err)
    }

    /// All chunks before this one are complete.
    fn advance(&mut self, chunk: u64) {
        while let Some(complete) = self.left.front().copied().filter(|first| *first < chunk) {
            let (lost, filled) = (std::mem::take(&mut self.lost), std::mem::take(&mut self.filled));
            if let Some((_, proven)) = &self.seal {
                let blocks = self.blocks_of(complete);
                let first = blocks.start;
                let mut left_out =
                    blocks.filter(|block| (filled | lost) >> (block - first) & 1 == 0);
                if let Some(block) = left_out.find(|block| !proven.is_zeros(*block)) {
                    self.wrong = Some(not_the_snapshots(block));
                    return;
                }
            }
            let mut data = self.data.take();
            if let Some(data) = &mut data {
                data.resize(CHUNK_BYTES, 0);
            }
            self.left.pop_front();
            (self.done)(complete, Chunk::new(data, lost));
        }
    }

    fn blocks_of(&self, chunk: u64) -> Range<u64> {
        let first = chunk * CHUNK_BLOCKS;
        first..(first + CHUNK_BLOCKS).min(self.blocks)
    }

    fn blocks(&mut self, batch: &Batch) {
        for piece in batch.pieces().filter(|piece| !piece.extent.zero) {
            let mut data = piece.data;
            for block in piece.extent.first..piece.extent.end() {
                let (now, later) = data.split_at(data.len().min(BLOCK_BYTES as usize));
                data = later;
                self.block(block, now);
                if self.wrong.is_some() {
                    return;
                }
            }
        }
    }

    fn block(&mut self, block: u64, bytes: &[u8]) {
        let chunk = block / CHUNK_BLOCKS;
        self.advance(chunk);
        if self.left.front() != Some(&chunk) {
            return;
        }
        let data = self.data.get_or_insert_with(|| Vec::with_capacity(CHUNK_BYTES));
        let at = (block % CHUNK_BLOCKS * BLOCK_BYTES) as usize;
        match data.get_mut(at..at + bytes.len()) {
            Some(place) => place.copy_from_slice(bytes),
            None => {
                data.resize(at, 0);
                data.extend_from_slice(bytes);
            }
        }
        self.filled |= 1 << (block % CHUNK_BLOCKS);
        let blocks = self.blocks_of(chunk);
        if u64::from((self.filled | self.lost).count_ones()) == blocks.end - blocks.start {
            self.advance(chunk + 1);
        }
    }

    fn lose(&mut self, blocks: Range<u64>) {
        let Some((first, last)) = self.left.front().zip(self.left.back()) else { return };
        let all = first * CHUNK_BLOCKS..(last + 1) * CHUNK_BLOCKS;
        for block in blocks.start.max(all.start)..blocks.end.min(all.end) {
            let chunk = block / CHUNK_BLOCKS;
            self.advance(chunk);
            if self.left.front() == Some(&chunk) {
                self.lost |= 1 << (block % CHUNK_BLOCKS);
            }
        }
    }
}

/// A batch whose blocks have their hashes, opened where it is sealed.
fn checked(batch: Batch, seal: Option<(Arc<DiskSeal>, Arc<Proven>)>) -> Result<Batch, String> {
    batch.verify().map_err(|error| format!("the server sent wrong data: {error}"))?;
    let Some((seal, proven)) = seal else { return Ok(batch) };
    compare(&batch, &proven)?;
    Ok(batch.changed(|first, data| seal.open(first * BLOCK_BYTES, data)))
}

/// Whether all blocks of a batch are those of the snapshot.
fn compare(batch: &Batch, proven: &Proven) -> Result<(), String> {
    for piece in batch.pieces().filter(|piece| !piece.extent.zero) {
        let blocks = piece.extent.first..piece.extent.end();
        let mut sent = blocks.zip(piece.hashes.chunks_exact(BlockHash::LEN));
        if let Some((block, _)) = sent.find(|(block, hash)| proven.hash(*block).0 != **hash) {
            return Err(not_the_snapshots(block));
        }
    }
    Ok(())
}

fn not_the_snapshots(block: u64) -> String {
    format!("the server sent another block {block} than the snapshot has")
}

impl<F: FnMut(u64, Chunk) + Send> Sink for Filling<F> {
    async fn take(&mut self, part: Part) -> bool {
        match part {
            Part::Lost(blocks) => self.lose(blocks),
            Part::Blocks(batch) => {
                let seal = self.seal.clone();
                let blocks: u64 = batch.extents().iter().map(|extent| extent.count).sum();
                let checked = if blocks <= FEW_BLOCKS {
                    checked(batch, seal)
                } else {
                    let checking = tokio::task::spawn_blocking(move || checked(batch, seal));
                    checking.await.unwrap_or_else(|_| Err("interrupted".into()))
                };
                match checked {
                    Ok(batch) => self.blocks(&batch),
                    Err(wrong) => self.wrong = Some(wrong),
                }
            }
        }
        self.wrong.is_none()
    }
}

#[cfg(test)]
mod tests {
    use janus_proto::{hash, model::Extent};

    use super::*;
    use crate::seal::{MasterKey, Sealer};

    const SIZE: u64 = 4 * CHUNK_BYTES as u64 + 512;

    fn batch(first: u64, bytes: &[u8]) -> Batch {
        let mut hashes = vec![];
        hash::hash_blocks(bytes, &mut hashes);
        let hashes: Vec<u8> = hashes.iter().flat_map(|h| h.0).collect();
        let count = (bytes.len() as u64).div_ceil(BLOCK_BYTES);
        let extents = vec![Extent { first, count, zero: false }];
        Batch::new(SIZE, extents, hashes.into(), bytes.to_vec().into()).unwrap()
    }

    /// A sealed disk of which block 1 has data and all else is zeros.
    fn sealed() -> (Arc<DiskSeal>, Vec<u8>, Vec<BlockHash>) {
        let key = Arc::new(MasterKey::of([7; 32]));
        let sealer = Sealer::new(key, "a/b".parse().unwrap());
        let seal = Arc::new(sealer.disk(&"c".parse().unwrap(), SIZE).unwrap());
        let mut bytes = vec![5; BLOCK_BYTES as usize];
        seal.seal(BLOCK_BYTES, &mut bytes);
        let mut hashes: Vec<_> = (0..SIZE.div_ceil(BLOCK_BYTES))
            .map(|block| hash::zero_hash(janus_proto::ids::block_len(SIZE, block)))
            .collect();
        hashes[1] = hash::hash_block(&bytes);
        (seal, bytes, hashes)
    }

    #[tokio::test]
    async fn of_what_is_sealed_only_the_snapshots_own_blocks_are_taken() {
        let (seal, bytes, hashes) = sealed();
        let fill = async |batches: Vec<Batch>| {
            let mut first = None;
            let mut filling = Filling::new(0..5, hashes.len() as u64, |at, chunk: Chunk| {
                if at == 0 {
                    first = Some(chunk);
                }
            });
            filling.sealed(seal.clone(), Proven::of_first(SIZE, &hashes));
            for batch in batches {
                if !filling.take(Part::Blocks(batch)).await {
                    break;
                }
            }
            let done = filling.finish();
            drop(filling);
            done.map(|()| first.unwrap())
        };
        let first = fill(vec![batch(1, &bytes)]).await.unwrap();
        let mut read = vec![0; 3 * BLOCK_BYTES as usize];
        first.copy_to(&mut read, 0).unwrap();
        let block = BLOCK_BYTES as usize;
        assert!(read[block..2 * block].iter().all(|byte| *byte == 5));
        assert!(hash::is_zero(&read[..block]) && hash::is_zero(&read[2 * block..]));
        // Each block has the hash that came with it, and is not the snapshot's.
        let mut older = bytes.clone();
        older[0] ^= 1;
        for wrong in [vec![batch(1, &older)], vec![batch(2, &bytes)], vec![]] {
            let refused = fill(wrong).await.unwrap_err();
            assert!(refused.contains("another block"), "{refused}");
        }
        let too_much = fill(vec![batch(1, &bytes), batch(64, &bytes[..512])]).await;
        assert!(too_much.is_err(), "{too_much:?}");
    }

    #[tokio::test]
    async fn chunks_are_handed_on_in_order_with_zeros_for_what_was_left_out() {
        let mut chunks = Vec::new();
        let mut filling =
            Filling::new(0..5, SIZE.div_ceil(BLOCK_BYTES), |at, chunk| chunks.push((at, chunk)));
        assert!(filling.take(Part::Blocks(batch(15, &[7; 8192]))).await);
        assert!(filling.take(Part::Lost(18..19)).await);
        assert!(filling.take(Part::Blocks(batch(64, &[9; 512]))).await);
        filling.finish().unwrap();
        assert_eq!(filling.left().count(), 0);
        drop(filling);
        let read = |chunk: &Chunk, within| {
            let mut byte = [0];
            chunk.copy_to(&mut byte, within).map(|()| byte[0])
        };
        let numbers: Vec<_> = chunks.iter().map(|(at, _)| *at).collect();
        assert_eq!(numbers, [0, 1, 2, 3, 4]);
        let contents: Vec<_> = chunks.into_iter().map(|(_, chunk)| chunk).collect();
        assert_eq!(
            (read(&contents[0], 15 * 4096 - 1), read(&contents[0], 15 * 4096)),
            (Ok(0), Ok(7))
        );
        assert_eq!((read(&contents[1], 4095), read(&contents[1], 4096)), (Ok(7), Ok(0)));
        assert_eq!(read(&contents[1], 2 * 4096), Err(2 * 4096..3 * 4096));
        assert_eq!(contents[2], Chunk::new(None, 0));
        assert_eq!((read(&contents[4], 511), read(&contents[4], 512)), (Ok(9), Ok(0)));
    }
}
