//! Blocks as they come, put together to chunks.

use std::ops::Range;

use janus_proto::{ids::BLOCK_BYTES, model::Batch};

use super::{CHUNK_BLOCKS, cache::Chunk};
use crate::snapshot::opened::{Part, Sink};

const CHUNK_BYTES: usize = (CHUNK_BLOCKS * BLOCK_BYTES) as usize;

/// Fills a run of chunks in order and hands on each that is complete.
pub(super) struct Filling<F> {
    /// Chunks that are not complete.
    left: Range<u64>,
    /// The first of them, as far as it has come.
    data: Option<Vec<u8>>,
    lost: u16,
    /// Why no more is wanted.
    wrong: Option<String>,
    done: F,
}

impl<F: FnMut(u64, Chunk) + Send> Filling<F> {
    pub(super) fn new(chunks: Range<u64>, done: F) -> Self {
        Self { left: chunks, data: None, lost: 0, wrong: None, done }
    }

    /// Chunks that have not been handed on.
    pub(super) fn left(&self) -> Range<u64> {
        self.left.clone()
    }

    /// Nothing more comes: the rest is zeros.
    pub(super) fn finish(&mut self) -> Result<(), String> {
        match self.wrong.take() {
            Some(wrong) => Err(wrong),
            None => {
                self.advance(self.left.end);
                Ok(())
            }
        }
    }

    /// All chunks before this one are complete.
    fn advance(&mut self, chunk: u64) {
        while self.left.start < chunk.min(self.left.end) {
            let content = Chunk::new(self.data.take(), std::mem::take(&mut self.lost));
            let complete = self.left.start;
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

impl<F: FnMut(u64, Chunk) + Send> Sink for Filling<F> {
    async fn take(&mut self, part: Part) -> bool {
        match part {
            Part::Lost(blocks) => self.lose(blocks),
            Part::Blocks(batch) => {
                let checked = tokio::task::spawn_blocking(move || batch.verify().map(|()| batch));
                match checked.await {
                    Ok(Ok(batch)) => self.blocks(&batch),
                    Ok(Err(error)) => {
                        self.wrong = Some(format!("the server sent wrong data: {error}"))
                    }
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

    const SIZE: u64 = 4 * CHUNK_BYTES as u64 + 512;

    fn batch(first: u64, bytes: &[u8]) -> Batch {
        let mut hashes = vec![];
        hash::hash_blocks(bytes, &mut hashes);
        let hashes: Vec<u8> = hashes.iter().flat_map(|h| h.0).collect();
        let count = (bytes.len() as u64).div_ceil(BLOCK_BYTES);
        let extents = vec![Extent { first, count, zero: false }];
        Batch::new(SIZE, extents, hashes.into(), bytes.to_vec().into()).unwrap()
    }

    #[tokio::test]
    async fn chunks_are_handed_on_in_order_with_zeros_for_what_was_left_out() {
        let mut chunks = Vec::new();
        let mut filling = Filling::new(0..5, |at, chunk| chunks.push((at, chunk)));
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
