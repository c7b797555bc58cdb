//! One thread's work: a segment in, its hashes and messages out.

use std::ops::Range;

use bytes::Bytes;
use janus_proto::{
    buffers::Buffer,
    hash,
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, SEGMENT_BYTES, block_count, block_len},
    model::{Batch, Extent, MAX_BATCH_BYTES},
};

use super::{ScanError, ScanJob, Scanned, SessionContent};
use crate::{
    delta::{self, Known},
    reading::{PieceReading, SegmentReading},
    segment_bits::{SEGMENT_WORDS, SegmentBits, WORD_BLOCKS},
    source::Stretch,
};

/// What is decided on at once: one word of bits says all about it.
const PIECE_BYTES: u64 = WORD_BLOCKS * BLOCK_BYTES;
/// Pieces of what is read at once: disks want large reads, and a message holds no more.
const GROUP_PIECES: usize = MAX_BATCH_BYTES / PIECE_BYTES as usize;

pub(super) struct Worker<'a> {
    job: &'a ScanJob<'a>,
    size_bytes: u64,
    /// What was read last.
    read: Option<Buffer>,
    waiting: Waiting,
    /// Data or a hole from here ...
    stretch_start: u64,
    /// ... to its end.
    stretch: Stretch,
}

/// Blocks that will travel, with their data, which is in `buffer` from its start.
#[derive(Default)]
struct Waiting {
    buffer: Option<Buffer>,
    used: usize,
    extents: Vec<Extent>,
    hashes: Vec<u8>,
}

/// 64 blocks, and what is to be done with them.
struct Piece<'a> {
    offset: u64,
    end: u64,
    /// Its place in the segment.
    word: usize,
    /// The table's hashes.
    known: Known<'a>,
    must: u64,
    /// Bits of the blocks whose known hash stands, unread.
    kept: u64,
    /// Bits of the blocks that are read; the others, but for `kept`, are zeros.
    wanted: u64,
    /// Bits of the blocks that must not have changed.
    promised: u64,
}

impl Piece<'_> {
    fn first_block(&self) -> u64 {
        self.offset / BLOCK_BYTES
    }

    fn blocks(&self) -> usize {
        (block_count(self.end) - self.first_block()) as usize
    }
}

impl<'a> Worker<'a> {
    pub(super) fn new(job: &'a ScanJob<'a>) -> Self {
        Self {
            job,
            size_bytes: job.source.size_bytes(),
            read: None,
            waiting: Waiting::default(),
            stretch_start: 0,
            stretch: Stretch { end: 0, hole: false },
        }
    }

    /// True when the segment has data that must be fetched from a disk or over a network.
    pub(super) fn waits_for(&mut self, segment: u64) -> bool {
        let Range { start, end } = self.range(segment);
        !self.is_hole(start, end) && !self.job.source.is_near(start..end)
    }

    /// The segment's bytes, as far as the disk goes.
    fn range(&self, segment: u64) -> Range<u64> {
        let start = segment * SEGMENT_BYTES;
        start..(start + SEGMENT_BYTES).min(self.size_bytes)
    }

    pub(super) fn segment(&mut self, segment: u64) -> Result<Box<Scanned>, ScanError> {
        let must = (self.job.must)(segment);
        let reading = self.job.reading.segment(segment, self.size_bytes);
        let Range { start, end } = self.range(segment);
        let mut scanned = Box::new(Scanned { segment, ..Scanned::default() });
        if must == SegmentBits::default()
            && let Some(theirs) = self.job.table.digest(segment)
        {
            if self.digest(start, &reading, &mut scanned)? == theirs {
                scanned.digest = Some(theirs);
                return Ok(scanned);
            }
            *scanned = Scanned { segment, ..Scanned::default() };
        }
        let table = self.job.table.segment(segment)?;
        if table.is_none() && must == SegmentBits::default() && self.is_hole(start, end) {
            return Ok(scanned);
        }
        let mut hashes = Vec::with_capacity(SEGMENT_BLOCKS as usize);
        for group in self.words(start).chunks(GROUP_PIECES) {
            let piece = |word: &usize| {
                let offset = start + *word as u64 * PIECE_BYTES;
                let known = Known::word(table.as_deref(), *word);
                self.plan(offset, *word, known, must[*word], reading.word(*word))
            };
            let pieces: Vec<_> = group.iter().map(piece).collect();
            self.read(&pieces, &mut scanned)?;
            self.group(&pieces, &mut hashes, &mut scanned)?;
        }
        self.flush(&mut scanned)?;
        scanned.digest = Some(hash::segment_digest(&hashes));
        Ok(scanned)
    }

    /// The segment's words, as far as the disk goes.
    fn words(&self, start: u64) -> Vec<usize> {
        (0..SEGMENT_WORDS)
            .take_while(|word| start + *word as u64 * PIECE_BYTES < self.size_bytes)
            .collect()
    }

    /// Reads a segment of which only the digest is known.
    fn digest(
        &mut self,
        start: u64,
        reading: &SegmentReading,
        scanned: &mut Scanned,
    ) -> Result<BlockHash, ScanError> {
        let mut hashes = Vec::with_capacity(SEGMENT_BLOCKS as usize);
        for group in self.words(start).chunks(GROUP_PIECES) {
            let piece = |word: &usize| {
                let offset = start + *word as u64 * PIECE_BYTES;
                self.plan(offset, *word, Known::Zeros, 0, reading.word(*word))
            };
            let pieces: Vec<_> = group.iter().map(piece).collect();
            self.read(&pieces, scanned)?;
            for (number, piece) in pieces.iter().enumerate() {
                let data = self.read.as_deref().unwrap_or_default();
                let data = data.get(number * PIECE_BYTES as usize..).unwrap_or_default();
                self.hash(piece, data, &mut hashes);
            }
        }
        Ok(hash::segment_digest(&hashes))
    }

    fn plan<'t>(
        &mut self,
        offset: u64,
        word: usize,
        known: Known<'t>,
        must: u64,
        kinds: PieceReading,
    ) -> Piece<'t> {
        let end = (offset + PIECE_BYTES).min(self.size_bytes);
        let promised = kinds.promised & !kinds.zeros;
        let mut piece = Piece { offset, end, word, known, must, kept: 0, wanted: 0, promised };
        if self.is_hole(offset, end) {
            return piece;
        }
        let blocks = piece.blocks();
        let known_zeros = known.zeros(blocks, zero_of(self.size_bytes, piece.first_block()));
        let doubted = if kinds.doubts_zeros { promised & known_zeros } else { 0 };
        let there = if self.has_all() { known.known(blocks) } else { known_zeros };
        piece.promised &= !doubted;
        piece.kept = kinds.known & there & !must & !doubted & !kinds.zeros;
        piece.wanted = !(piece.kept | kinds.zeros) & delta::mask(blocks);
        piece
    }

    /// True when the session holds what the table says.
    fn has_all(&self) -> bool {
        self.job.content == SessionContent::Table
    }

    /// Reads the blocks of a group that are wanted, each to its place in it.
    fn read(&mut self, pieces: &[Piece<'_>], scanned: &mut Scanned) -> Result<(), ScanError> {
        let Some(first) = pieces.first() else { return Ok(()) };
        let wanted = pieces.iter().flat_map(|piece| {
            (0..piece.blocks())
                .filter(|index| piece.wanted >> index & 1 == 1)
                .map(|index| piece.first_block() + index as u64)
        });
        let end = pieces.last().map_or(0, |piece| piece.end);
        let mut run: Option<Range<u64>> = None;
        let mut runs = Vec::new();
        for block in wanted {
            match &mut run {
                Some(run) if run.end == block => run.end += 1,
                _ => runs.extend(run.replace(block..block + 1)),
            }
        }
        runs.extend(run);
        for run in runs {
            let (from, to) = (run.start * BLOCK_BYTES, (run.end * BLOCK_BYTES).min(end));
            let buffer = self.read.get_or_insert_with(Buffer::take);
            let part = &mut buffer[(from - first.offset) as usize..(to - first.offset) as usize];
            self.job.source.read_at(from, part)?;
            if let Some(seal) = self.job.seal {
                seal.seal(from, part);
            }
            scanned.read.push(from..to);
        }
        Ok(())
    }

    /// Hashes a group and decides on all its blocks; their hashes are appended to the segment's.
    fn group(
        &mut self,
        pieces: &[Piece<'_>],
        hashes: &mut Vec<BlockHash>,
        scanned: &mut Scanned,
    ) -> Result<(), ScanError> {
        let mut fresh = Waiting { buffer: self.read.take(), ..Waiting::default() };
        for (number, piece) in pieces.iter().enumerate() {
            let start = number * PIECE_BYTES as usize;
            let old_len = hashes.len();
            let data = fresh.buffer.as_deref().unwrap_or_default();
            self.hash(piece, data.get(start..).unwrap_or_default(), hashes);
            let new = &hashes[old_len..];
            let zero = delta::zero_bits(new, zero_of(self.size_bytes, piece.first_block()));
            let changed = piece.known.differing(new, zero);
            if let Some(bit) = ones(changed & piece.promised).next() {
                return Err(ScanError::Missed { offset: piece.offset + bit as u64 * BLOCK_BYTES });
            }
            let session = if self.has_all() { piece.known } else { Known::Zeros };
            let send = delta::to_send(session, piece.must, new, zero);
            scanned.sent[piece.word] = send;
            let place = (piece.word as u64 * WORD_BLOCKS) as u16;
            scanned.changes.extend(ones(changed).map(|bit| (place + bit as u16, new[bit])));
            fresh.keep(piece, start, self.size_bytes, (send, zero), new);
        }
        if self.waiting.used + fresh.used > MAX_BATCH_BYTES {
            self.flush(scanned)?;
        }
        self.read = self.waiting.take_in(fresh);
        Ok(())
    }

    /// Appends the hashes of a piece, whose blocks that are wanted are in `data`.
    fn hash(&self, piece: &Piece<'_>, data: &[u8], hashes: &mut Vec<BlockHash>) {
        let (blocks, len) = (piece.blocks(), (piece.end - piece.offset) as usize);
        let zero_of = zero_of(self.size_bytes, piece.first_block());
        let unread = |index: usize| match piece.known {
            Known::Hashes(old) if piece.kept >> index & 1 == 1 => {
                old.get(index).copied().unwrap_or_else(|| zero_of(index))
            }
            _ => zero_of(index),
        };
        let is_wanted = |block: usize| piece.wanted >> block & 1 == 1;
        let mut block = 0;
        while block < blocks {
            let same =
                (block..blocks).take_while(|next| is_wanted(*next) == is_wanted(block)).count();
            if is_wanted(block) {
                let from = block * BLOCK_BYTES as usize;
                let to = ((block + same) * BLOCK_BYTES as usize).min(len);
                hash::hash_blocks(&data[from..to], hashes);
            } else {
                hashes.extend((block..block + same).map(&unread));
            }
            block += same;
        }
    }

    fn flush(&mut self, scanned: &mut Scanned) -> Result<(), ScanError> {
        let Waiting { buffer, used, extents, hashes } = std::mem::take(&mut self.waiting);
        if extents.is_empty() {
            return Ok(());
        }
        let data = match buffer {
            Some(buffer) if used > 0 => buffer.into_bytes(used),
            _ => Bytes::new(),
        };
        let batch = Batch::new(self.size_bytes, extents, hashes.into(), data)?;
        scanned.messages.push(self.job.packing.pack(batch));
        Ok(())
    }

    /// True when the file system says that these bytes are a hole. Remembers the stretch it looked at last.
    fn is_hole(&mut self, start: u64, end: u64) -> bool {
        // Before it, where a segment is read again, it says nothing.
        if !(self.stretch_start..self.stretch.end).contains(&start) {
            (self.stretch_start, self.stretch) = (start, self.job.source.stretch(start));
        }
        self.stretch.hole && self.stretch.end >= end
    }
}

impl Waiting {
    /// Moves the data of blocks to send, which is in the buffer from `start`, to the end of what is kept of it already.
    fn keep(
        &mut self,
        piece: &Piece<'_>,
        start: usize,
        size_bytes: u64,
        (send, zero): (u64, u64),
        new: &[BlockHash],
    ) {
        let first_block = piece.first_block();
        delta::append_extents(&mut self.extents, first_block, send, zero);
        let Some(buffer) = self.buffer.as_mut() else { return };
        for bit in ones(send & !zero) {
            let from = start + bit * BLOCK_BYTES as usize;
            let len = block_len(size_bytes, first_block + bit as u64);
            if from != self.used {
                buffer.copy_within(from..from + len, self.used);
            }
            self.used += len;
            self.hashes.extend_from_slice(&new[bit].0);
        }
    }

    /// Appends `fresh`, for which there is room; gives a buffer back that is free again.
    fn take_in(&mut self, fresh: Self) -> Option<Buffer> {
        self.extents.extend(fresh.extents);
        self.hashes.extend(fresh.hashes);
        match (&mut self.buffer, fresh.buffer) {
            (Some(buffer), Some(more)) if self.used > 0 => {
                buffer[self.used..self.used + fresh.used].copy_from_slice(&more[..fresh.used]);
                self.used += fresh.used;
                Some(more)
            }
            (buffer, more) if fresh.used > 0 => {
                self.used = fresh.used;
                std::mem::replace(buffer, more)
            }
            (_, more) => more,
        }
    }
}

fn zero_of(size_bytes: u64, first_block: u64) -> impl Fn(usize) -> BlockHash {
    move |index| hash::zero_hash(block_len(size_bytes, first_block + index as u64))
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
