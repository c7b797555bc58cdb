//! One thread's work: a segment in, its hashes and messages out.

use bytes::Bytes;
use janus_proto::{
    buffers::Buffer,
    hash,
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, SEGMENT_BYTES, block_count, block_len},
    model::{Batch, Extent, MAX_BATCH_BYTES},
};

use super::{Outgoing, ScanError, ScanJob, Scanned, SessionContent};
use crate::{
    delta::{self, Known, SegmentBits, WORD_BLOCKS},
    source::Stretch,
};

/// What is read and hashed at once: it fits the L2 cache, and one word of bits says all about it.
const PIECE_BYTES: u64 = WORD_BLOCKS * BLOCK_BYTES;

pub(super) struct Worker<'a> {
    job: &'a ScanJob<'a>,
    size_bytes: u64,
    buffer: Option<Buffer>,
    /// Bytes of `buffer` that wait for being sent.
    used: usize,
    /// What waits, and its hashes.
    extents: Vec<Extent>,
    hashes: Vec<u8>,
    stretch: Stretch,
}

impl<'a> Worker<'a> {
    pub(super) fn new(job: &'a ScanJob<'a>) -> Self {
        Self {
            job,
            size_bytes: job.source.size_bytes(),
            buffer: None,
            used: 0,
            extents: Vec::new(),
            hashes: Vec::new(),
            stretch: Stretch { end: 0, hole: false },
        }
    }

    pub(super) fn segment(&mut self, segment: u64) -> Result<Box<Scanned>, ScanError> {
        let must = (self.job.must)(segment);
        let table = self.job.table.segment(segment).map_err(ScanError::Table)?;
        let mut scanned = Box::new(Scanned { segment, ..Scanned::default() });
        let start = segment * SEGMENT_BYTES;
        let end = (start + SEGMENT_BYTES).min(self.size_bytes);
        if table.is_none() && must == SegmentBits::default() && self.is_hole(start, end) {
            return Ok(scanned);
        }
        let mut hashes = Vec::with_capacity(SEGMENT_BLOCKS as usize);
        for (word, must) in must.into_iter().enumerate() {
            let offset = start + word as u64 * PIECE_BYTES;
            if offset >= end {
                break;
            }
            self.piece(offset, table.as_deref(), word, must, &mut hashes, &mut scanned)?;
        }
        self.flush(&mut scanned)?;
        scanned.digest = Some(hash::segment_digest(&hashes));
        Ok(scanned)
    }

    /// Reads, hashes and decides on 64 blocks; the hashes are appended to the segment's.
    fn piece(
        &mut self,
        offset: u64,
        table: Option<&[BlockHash]>,
        word: usize,
        must: u64,
        hashes: &mut Vec<BlockHash>,
        scanned: &mut Scanned,
    ) -> Result<(), ScanError> {
        let first_block = offset / BLOCK_BYTES;
        let len = PIECE_BYTES.min(self.size_bytes - offset) as usize;
        let old_len = hashes.len();
        if self.is_hole(offset, offset + len as u64) {
            let blocks = first_block..block_count(offset + len as u64);
            hashes.extend(blocks.map(|block| hash::zero_hash(block_len(self.size_bytes, block))));
        } else {
            if self.used + len > MAX_BATCH_BYTES {
                self.flush(scanned)?;
            }
            let buffer = self.buffer.get_or_insert_with(Buffer::take);
            let piece = &mut buffer[self.used..self.used + len];
            self.job.source.read_at(offset, piece)?;
            scanned.read_bytes += len as u64;
            hash::hash_blocks(piece, hashes);
        }
        let new = &hashes[old_len..];
        let zero_of =
            |index| hash::zero_hash(block_len(self.size_bytes, first_block + index as u64));
        let zero = delta::zero_bits(new, zero_of);
        let table = Known::word(table, word);
        let session = if self.job.content == SessionContent::Zeros { Known::Zeros } else { table };
        let send = delta::to_send(session, must, new, zero);
        scanned.sent[word] = send;
        let place = (word as u64 * WORD_BLOCKS) as u16;
        scanned
            .changes
            .extend(ones(table.differing(new, zero)).map(|bit| (place + bit as u16, new[bit])));
        self.keep(first_block, send, zero, new);
        Ok(())
    }

    /// Moves the data of blocks to send together, at the end of what waits already.
    fn keep(&mut self, first_block: u64, send: u64, zero: u64, new: &[BlockHash]) {
        delta::append_extents(&mut self.extents, first_block, send, zero);
        let data = send & !zero;
        let Some(buffer) = self.buffer.as_mut() else { return };
        let piece = self.used;
        for bit in ones(data) {
            let from = piece + bit * BLOCK_BYTES as usize;
            let len = block_len(self.size_bytes, first_block + bit as u64);
            if from != self.used {
                buffer.copy_within(from..from + len, self.used);
            }
            self.used += len;
            self.hashes.extend_from_slice(&new[bit].0);
        }
    }

    fn flush(&mut self, scanned: &mut Scanned) -> Result<(), ScanError> {
        if self.extents.is_empty() {
            return Ok(());
        }
        let len = std::mem::take(&mut self.used);
        let data = match self.buffer.take() {
            Some(buffer) if len > 0 => buffer.into_bytes(len),
            kept => {
                self.buffer = kept;
                Bytes::new()
            }
        };
        let hashes = std::mem::take(&mut self.hashes).into();
        let batch = Batch::new(self.size_bytes, std::mem::take(&mut self.extents), hashes, data)?;
        scanned
            .messages
            .push(Outgoing { batch: batch.into_wire(self.job.encoding), raw_bytes: len as u64 });
        Ok(())
    }

    /// True when the file system says that these bytes are a hole. Remembers the stretch it looked at last.
    fn is_hole(&mut self, start: u64, end: u64) -> bool {
        if self.stretch.end <= start {
            self.stretch = self.job.source.stretch(start);
        }
        self.stretch.hole && self.stretch.end >= end
    }
}

fn ones(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (bits != 0).then(|| {
            let bit = bits.trailing_zeros() as usize;
            bits &= bits - 1;
            bit
        })
    })
}
