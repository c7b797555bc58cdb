//! Makes the stream of blocks, on a thread that may block. A receiver that has gone ends it.
//!
//! What is read is compared with its hashes before it is sent. Where something is wrong, each block is tried by any way
//! there is; those that are lost are named in the stream, or end it where the caller doesn't know such names.

use std::{collections::VecDeque, ops::Range};

use bytes::Bytes;
use janus_proto::{
    asked::by_segment,
    buffers::Buffer,
    hash::{hash_block, hash_blocks, segment_digest, zero_hash, zero_segment_of},
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, block_len},
    model::{Batch, Extent, MAX_BATCH_BYTES},
    pb,
};
use tonic::Status;

use super::{
    RestoreError,
    hashes::{Answers, Gone, send},
    too_short,
};
use crate::chain::{
    opened::{Ahead, OpenedSnapshot, Salvage},
    ranges::BlockRanges,
};

/// Extents after which a message is sent though it is not full.
const ENOUGH_EXTENTS: usize = 1024;

/// Sends the blocks of the ranges; returns those that were found to be lost. Of a chain that builds on a stub `fetch` gets a segment of
/// it from elsewhere, if it can.
pub(crate) fn send_blocks(
    opened: &OpenedSnapshot,
    ranges: &[Range<u64>],
    encoding: pb::Encoding,
    name_damaged: bool,
    fetch: Option<&dyn Fn(u64)>,
    answers: &Answers<pb::ReadBlocksResponse>,
) -> BlockRanges {
    let mut message = Message {
        opened,
        ahead: opened.ahead(),
        encoding,
        name_damaged,
        fetch,
        answers,
        extents: Vec::new(),
        hashes: Vec::new(),
        bytes: 0,
        lost: BlockRanges::default(),
        unnamed: 0..0,
    };
    if let Err(Some(error)) = message.send_ranges(ranges) {
        let _ = answers.blocking_send(Err(error));
    }
    message.lost
}

/// One message in the making.
struct Message<'a> {
    opened: &'a OpenedSnapshot,
    ahead: Ahead<'a>,
    encoding: pb::Encoding,
    name_damaged: bool,
    fetch: Option<&'a dyn Fn(u64)>,
    answers: &'a Answers<pb::ReadBlocksResponse>,
    extents: Vec<Extent>,
    hashes: Vec<BlockHash>,
    bytes: usize,
    lost: BlockRanges,
    /// Lost blocks that were not named yet.
    unnamed: Range<u64>,
}

impl Message<'_> {
    fn send_ranges(&mut self, ranges: &[Range<u64>]) -> Result<(), Option<Status>> {
        let (opened, size) = (self.opened, self.size_bytes());
        // Looked up one by one: requests for a few blocks of a large disk are many.
        let is_zero = |segment| opened.tables.digest(segment) == zero_segment_of(size, segment);
        let mut parts = ranges.iter().cloned().flat_map(by_segment);
        let mut coming: VecDeque<Range<u64>> = VecDeque::new();
        loop {
            coming.extend(parts.by_ref().take(Ahead::AT_ONCE + 1 - coming.len()));
            let Some(part) = coming.pop_front() else { break };
            let segment = part.start / SEGMENT_BLOCKS;
            if is_zero(segment) {
                self.add(part.start, part.end - part.start, true);
                continue;
            }
            let next = coming.iter().map(|part| part.start / SEGMENT_BLOCKS);
            let next: Vec<u64> = next.take_while(|next| !is_zero(*next)).collect();
            self.ahead.segments(segment, &next);
            match opened.tables.segment(segment) {
                Ok(all) => self.add_blocks(part, &all)?,
                Err(error) => {
                    tracing::error!(%error, segment, "the hashes of a segment can't be read");
                    self.add_rest(part)?;
                }
            }
        }
        self.flush()?;
        self.name()
    }

    fn add_blocks(
        &mut self,
        part: Range<u64>,
        segment: &[BlockHash],
    ) -> Result<(), Option<Status>> {
        for block in part {
            let hash = segment.get((block % SEGMENT_BLOCKS) as usize);
            self.add_block(block, *hash.ok_or_else(|| Some(too_short()))?)?;
        }
        Ok(())
    }

    /// Blocks of a segment of which a page is damaged: those that other pages name, and all where what is stored gives the
    /// segment's digest.
    fn add_rest(&mut self, part: Range<u64>) -> Result<(), Option<Status>> {
        let segment = part.start / SEGMENT_BLOCKS;
        let known = self.opened.tables.known(segment);
        let mut found = Vec::with_capacity(known.len());
        let mut block = [0; BLOCK_BYTES as usize];
        for (number, known) in (segment * SEGMENT_BLOCKS..).zip(&known) {
            let bytes = &mut block[..block_len(self.size_bytes(), number)];
            found.push(match known {
                Some(hash) => Some(*hash),
                None => {
                    let read = self.opened.read_at(number * BLOCK_BYTES, bytes);
                    read.ok().map(|()| hash_block(bytes))
                }
            });
        }
        let all: Option<Vec<BlockHash>> = found.into_iter().collect();
        let digest = self.opened.tables.digest(segment);
        if let Some(all) = all.filter(|all| segment_digest(all) == digest) {
            return self.add_blocks(part, &all);
        }
        for block in part {
            match known.get((block % SEGMENT_BLOCKS) as usize).copied().flatten() {
                Some(hash) => self.add_block(block, hash)?,
                None => {
                    self.flush()?;
                    self.lose(block..block + 1)?;
                }
            }
        }
        Ok(())
    }

    fn add_block(&mut self, block: u64, hash: BlockHash) -> Result<(), Option<Status>> {
        let len = block_len(self.size_bytes(), block);
        if hash == zero_hash(len) {
            self.add(block, 1, true);
            return Ok(());
        }
        if self.bytes + len > MAX_BATCH_BYTES || self.extents.len() >= ENOUGH_EXTENTS {
            self.flush()?;
        }
        self.add(block, 1, false);
        self.hashes.push(hash);
        self.bytes += len;
        Ok(())
    }

    fn add(&mut self, first: u64, count: u64, zero: bool) {
        push(&mut self.extents, Extent { first, count, zero });
    }

    fn flush(&mut self) -> Result<(), Option<Status>> {
        if self.extents.is_empty() {
            return Ok(());
        }
        let (extents, hashes) =
            (std::mem::take(&mut self.extents), std::mem::take(&mut self.hashes));
        self.bytes = 0;
        let mut data = Buffer::take();
        match self.read(&extents, &hashes, &mut data) {
            Some(len) => self.send(extents, &hashes, data, len),
            None => self.send_rest(&extents, &hashes),
        }
    }

    /// Reads the data of all extents and compares it; `None` when anything is wrong.
    fn read(&self, extents: &[Extent], hashes: &[BlockHash], data: &mut Buffer) -> Option<usize> {
        let mut found = Vec::with_capacity(hashes.len());
        let mut at = 0;
        for extent in extents.iter().filter(|extent| !extent.zero) {
            let end = (extent.end() * BLOCK_BYTES).min(self.size_bytes());
            let len = (end - extent.first * BLOCK_BYTES) as usize;
            let piece = &mut data[at..at + len];
            self.ahead.read_at(extent.first * BLOCK_BYTES, piece).ok()?;
            hash_blocks(piece, &mut found);
            at += len;
        }
        (found == hashes).then_some(at)
    }

    /// Sends what can be saved of a message, block by block, and names the rest.
    fn send_rest(
        &mut self,
        extents: &[Extent],
        hashes: &[BlockHash],
    ) -> Result<(), Option<Status>> {
        let mut hashes = hashes.iter();
        let mut salvage = Salvage::new(self.opened);
        let mut fetched = None;
        let (mut kept, mut kept_hashes) = (Vec::new(), Vec::new());
        let (mut data, mut at) = (Buffer::take(), 0);
        for extent in extents {
            if extent.zero {
                push(&mut kept, *extent);
                continue;
            }
            for (block, hash) in (extent.first..extent.end()).zip(hashes.by_ref()) {
                let len = block_len(self.size_bytes(), block);
                let bytes = &mut data[at..at + len];
                let mut is_here = salvage.read(block, *hash, bytes);
                let segment = block / SEGMENT_BLOCKS;
                if let Some(fetch) = self.fetch.filter(|_| !is_here && fetched != Some(segment)) {
                    fetched = Some(segment);
                    fetch(segment);
                    is_here = salvage.read(block, *hash, bytes);
                }
                if is_here {
                    push(&mut kept, Extent { first: block, count: 1, zero: false });
                    kept_hashes.push(*hash);
                    at += len;
                    continue;
                }
                let (extents, hashes) =
                    (std::mem::take(&mut kept), std::mem::take(&mut kept_hashes));
                if !extents.is_empty() {
                    let full = std::mem::replace(&mut data, Buffer::take());
                    self.send(extents, &hashes, full, std::mem::take(&mut at))?;
                }
                self.lose(block..block + 1)?;
            }
        }
        self.send(kept, &kept_hashes, data, at)
    }

    fn send(
        &mut self,
        extents: Vec<Extent>,
        hashes: &[BlockHash],
        data: Buffer,
        len: usize,
    ) -> Result<(), Option<Status>> {
        if extents.is_empty() {
            return Ok(());
        }
        self.name()?;
        let hashes: Vec<u8> = hashes.iter().flat_map(|hash| hash.0).collect();
        let batch =
            Batch::new(self.size_bytes(), extents, Bytes::from(hashes), data.into_bytes(len))
                .map_err(|e| Some(e.into()))?;
        let batch = Some(batch.into_wire(self.encoding));
        let answer = pb::ReadBlocksResponse { batch, damaged: Vec::new() };
        send(self.answers, answer).map_err(|Gone| None)
    }

    /// Notes lost blocks, which come after all that was sent; ends the stream where they can't be named.
    fn lose(&mut self, blocks: Range<u64>) -> Result<(), Option<Status>> {
        self.lost.insert(blocks.clone());
        if !self.name_damaged {
            return Err(failed(RestoreError::Lost { block: blocks.start }));
        }
        if self.unnamed.end != blocks.start {
            self.name()?;
            self.unnamed = blocks;
        } else {
            self.unnamed.end = blocks.end;
        }
        Ok(())
    }

    /// Names the lost blocks before what comes next.
    fn name(&mut self) -> Result<(), Option<Status>> {
        let unnamed = std::mem::replace(&mut self.unnamed, 0..0);
        if unnamed.is_empty() {
            return Ok(());
        }
        let (first_block, block_count) = (unnamed.start, unnamed.end - unnamed.start);
        let damaged = vec![pb::BlockRange { first_block, block_count }];
        let answer = pb::ReadBlocksResponse { batch: None, damaged };
        send(self.answers, answer).map_err(|Gone| None)
    }

    fn size_bytes(&self) -> u64 {
        self.opened.held.snapshot().size_bytes
    }
}

fn failed(error: RestoreError) -> Option<Status> {
    Some(error.into())
}

fn push(extents: &mut Vec<Extent>, next: Extent) {
    match extents.last_mut() {
        Some(last) if last.zero == next.zero && last.end() == next.first => {
            last.count += next.count
        }
        _ => extents.push(next),
    }
}
