//! Blocks as they come, put together to chunks.

use std::{ops::Range, sync::Arc};

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

/// Fills a run of chunks in order and hands on each that is complete.
pub(super) struct Filling<F> {
    /// Chunks that are not complete.
    left: Range<u64>,
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
    /// Of a disk of so many blocks.
    pub(super) fn new(chunks: Range<u64>, blocks: u64, done: F) -> Self {
        let (data, seal, wrong) = (None, None, None);
        Self { left: chunks, blocks, seal, data, lost: 0, filled: 0, wrong, done }
    }

    /// What comes is sealed, and must be this.
    pub(super) fn sealed(&mut self, seal: Arc<DiskSeal>, proven: Proven) {
        self.seal = Some((seal, Arc::new(proven)));
    }

    /// Chunks that have not been handed on.
    pub(super) fn left(&self) -> Range<u64> {
        self.left.clone()
    }

    /// Nothing more comes: the rest is zeros.
    pub(super) fn finish(&mut self) -> Result<(), String> {
        if self.wrong.is_none() {
            self.advance(self.left.end);
        }
        self.wrong.take().map_or(Ok(()), Err)
    }

    /// All chunks before this one are complete.
    fn advance(&mut self, chunk: u64) {
        while self.left.start < chunk.min(self.left.end) && self.wrong.is_none() {
            let complete = self.left.start;
            let (lost, filled) = (std::mem::take(&mut self.lost), std::mem::take(&mut self.filled));
            if let Some((_, proven)) = &self.seal {
                let first = complete * CHUNK_BLOCKS;
                let blocks = first..(first + CHUNK_BLOCKS).min(self.blocks);
                let mut left_out =
                    blocks.filter(|block| (filled | lost) >> (block - first) & 1 == 0);
                if let Some(block) = left_out.find(|block| !proven.is_zeros(*block)) {
                    self.wrong = Some(not_the_snapshots(block));
                    return;
                }
            }
            let content = Chunk::new(self.data.take(), lost);
            self.left.start += 1;
            (self.done)(complete, content);
        }
    }

    fn blocks(&mut self, batch: &Batch) {
        for piece in batch.pieces().filter(|piece| !piece.extent.zero) {
            let mut data = piece.data;
            for block in piece.extent.first..piece.extent.end() {
                let (now, later) = data.split_at(data.len().min(BLOCK_BYTES as usize));
                self.advance(block / CHUNK_BLOCKS);
                data = later;
                if block / CHUNK_BLOCKS == self.left.start && !self.left.is_empty() {
                    let chunk = self.data.get_or_insert_with(|| vec![0; CHUNK_BYTES]);
                    let at = (block % CHUNK_BLOCKS * BLOCK_BYTES) as usize;
                    chunk[at..at + now.len()].copy_from_slice(now);
                    self.filled |= 1 << (block % CHUNK_BLOCKS);
                }
            }
        }
    }

    fn lose(&mut self, blocks: Range<u64>) {
        let all = self.left.start * CHUNK_BLOCKS..self.left.end * CHUNK_BLOCKS;
        for block in blocks.start.max(all.start)..blocks.end.min(all.end) {
            self.advance(block / CHUNK_BLOCKS);
            self.lost |= 1 << (block % CHUNK_BLOCKS);
        }
    }
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
                let checking = tokio::task::spawn_blocking(move || {
                    batch
                        .verify()
                        .map_err(|error| format!("the server sent wrong data: {error}"))?;
                    let Some((seal, proven)) = seal else { return Ok(batch) };
                    compare(&batch, &proven)?;
                    Ok(batch.changed(|first, data| seal.open(first * BLOCK_BYTES, data)))
                });
                match checking.await {
                    Ok(Ok(batch)) => self.blocks(&batch),
                    Ok(Err(wrong)) => self.wrong = Some(wrong),
                    Err(_) => self.wrong = Some("interrupted".into()),
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
        assert!(filling.left().is_empty());
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
