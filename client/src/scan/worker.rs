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
    reading::PieceReading,
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

/// 64 blocks.
struct Piece<'a> {
    offset: u64,
    /// Its place in the segment.
    word: usize,
    /// The table's hashes.
    known: Known<'a>,
    must: u64,
    kinds: PieceReading,
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
        let reading = self.job.reading.segment(segment, self.size_bytes);
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
            let known = Known::word(table.as_deref(), word);
            let piece = Piece { offset, word, known, must, kinds: reading.word(word) };
            self.piece(&piece, &mut hashes, &mut scanned)?;
        }
        self.flush(&mut scanned)?;
        scanned.digest = Some(hash::segment_digest(&hashes));
        Ok(scanned)
    }

    /// Reads what has to be read of 64 blocks, and decides on all; their hashes are appended to the segment's.
    fn piece(
        &mut self,
        piece: &Piece<'_>,
        hashes: &mut Vec<BlockHash>,
        scanned: &mut Scanned,
    ) -> Result<(), ScanError> {
        let Piece { offset, word, known, must, kinds } = *piece;
        let first_block = offset / BLOCK_BYTES;
        let end = (offset + PIECE_BYTES).min(self.size_bytes);
        let blocks = (block_count(end) - first_block) as usize;
        let size_bytes = self.size_bytes;
        let zero_of = |index| hash::zero_hash(block_len(size_bytes, first_block + index as u64));
        let old_len = hashes.len();
        let has_all = self.job.content == SessionContent::Table;
        let mut promised = kinds.promised & !kinds.zeros;
        if self.is_hole(offset, end) {
            hashes.extend((0..blocks).map(zero_of));
        } else {
            let known_zeros = known.zeros(blocks, zero_of);
            let doubted = if kinds.doubts_zeros { promised & known_zeros } else { 0 };
            promised &= !doubted;
            let there = if has_all { known.known(blocks) } else { known_zeros };
            let kept = kinds.known & there & !must & !doubted & !kinds.zeros;
            self.read(
                offset,
                end,
                !(kept | kinds.zeros),
                scanned,
                |index| {
                    match known {
                        Known::Hashes(old) if kept >> index & 1 == 1 => old.get(index).copied(),
                        _ => None,
                    }
                    .unwrap_or_else(|| zero_of(index))
                },
                hashes,
            )?;
        }
        let new = &hashes[old_len..];
        let zero = delta::zero_bits(new, zero_of);
        let changed = known.differing(new, zero);
        if let Some(bit) = ones(changed & promised).next() {
            return Err(ScanError::Missed { offset: offset + bit as u64 * BLOCK_BYTES });
        }
        let session = if has_all { known } else { Known::Zeros };
        let send = delta::to_send(session, must, new, zero);
        scanned.sent[word] = send;
        let place = (word as u64 * WORD_BLOCKS) as u16;
        scanned.changes.extend(ones(changed).map(|bit| (place + bit as u16, new[bit])));
        self.keep(first_block, send, zero, new);
        Ok(())
    }

    /// Appends the hashes of a piece: its blocks of `wanted` are read, `unread` tells the others'.
    fn read(
        &mut self,
        offset: u64,
        end: u64,
        wanted: u64,
        scanned: &mut Scanned,
        unread: impl Fn(usize) -> BlockHash,
        hashes: &mut Vec<BlockHash>,
    ) -> Result<(), ScanError> {
        let len = (end - offset) as usize;
        if self.used + len > MAX_BATCH_BYTES {
            self.flush(scanned)?;
        }
        let blocks = len.div_ceil(BLOCK_BYTES as usize);
        let is_wanted = |block: usize| wanted >> block & 1 == 1;
        let mut block = 0;
        while block < blocks {
            let same =
                (block..blocks).take_while(|next| is_wanted(*next) == is_wanted(block)).count();
            if is_wanted(block) {
                let from = block * BLOCK_BYTES as usize;
                let to = ((block + same) * BLOCK_BYTES as usize).min(len);
                let buffer = self.buffer.get_or_insert_with(Buffer::take);
                let part = &mut buffer[self.used + from..self.used + to];
                self.job.source.read_at(offset + from as u64, part)?;
                let start = offset + from as u64;
                scanned.read.push(start..start + part.len() as u64);
                hash::hash_blocks(part, hashes);
            } else {
                hashes.extend((block..block + same).map(&unread));
            }
            block += same;
        }
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
