//! Makes the streams of hashes and blocks, on threads that may block. A receiver that has gone ends them.

use std::ops::Range;

use bytes::Bytes;
use janus_proto::{
    buffers::Buffer,
    error::{ErrorReason, reason},
    hash::{zero_hash, zero_segment_of},
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, block_len},
    model::{Batch, Extent, MAX_BATCH_BYTES, MAX_HASHES},
    pb,
};
use tokio::sync::mpsc::Sender;
use tonic::Status;

use super::{Content, RestoreError, too_short};
use crate::chain::opened::OpenedSnapshot;

/// Extents after which a message is sent though it is not full.
const ENOUGH_EXTENTS: usize = 1024;

/// The receiver has gone: nobody wants the rest.
struct Gone;

type Answers<T> = Sender<Result<T, Status>>;

fn send<T>(answers: &Answers<T>, answer: T) -> Result<(), Gone> {
    answers.blocking_send(Ok(answer)).map_err(|_| Gone)
}

/// Sends the hashes of the ranges at one level.
pub(super) fn send_hashes(
    content: &Content,
    level: pb::HashLevel,
    ranges: &[Range<u64>],
    answers: &Answers<pb::ReadHashesResponse>,
) {
    let sent = match level {
        pb::HashLevel::Segment => send_segment_digests(content, ranges, answers),
        _ => send_block_hashes(content, ranges, answers),
    };
    if let Err(Some(error)) = sent {
        let _ = answers.blocking_send(Err(error));
    }
}

fn send_segment_digests(
    content: &Content,
    ranges: &[Range<u64>],
    answers: &Answers<pb::ReadHashesResponse>,
) -> Result<(), Option<Status>> {
    let digests = content.segment_digests().map_err(|e| Some(e.into()))?;
    for range in ranges {
        let wanted = digests
            .get(range.start as usize..range.end as usize)
            .ok_or_else(|| Some(too_short()))?;
        for (index, piece) in wanted.chunks(MAX_HASHES).enumerate() {
            let first = range.start + (index * MAX_HASHES) as u64;
            send(answers, hashes(first, piece)).map_err(|Gone| None)?;
        }
    }
    Ok(())
}

fn send_block_hashes(
    content: &Content,
    ranges: &[Range<u64>],
    answers: &Answers<pb::ReadHashesResponse>,
) -> Result<(), Option<Status>> {
    for range in ranges {
        let mut waiting: Vec<BlockHash> = Vec::new();
        let mut first = range.start;
        for part in by_segment(range.clone()) {
            let segment = part.start / SEGMENT_BLOCKS;
            let all = content.segment(segment).map_err(|e| Some(e.into()))?;
            let inside = (part.start % SEGMENT_BLOCKS) as usize..;
            let wanted =
                all.get(inside).and_then(|all| all.get(..(part.end - part.start) as usize));
            waiting.extend_from_slice(wanted.ok_or_else(|| Some(too_short()))?);
            if waiting.len() + SEGMENT_BLOCKS as usize > MAX_HASHES {
                send(answers, hashes(first, &waiting)).map_err(|Gone| None)?;
                first = part.end;
                waiting.clear();
            }
        }
        if !waiting.is_empty() {
            send(answers, hashes(first, &waiting)).map_err(|Gone| None)?;
        }
    }
    Ok(())
}

fn hashes(first: u64, piece: &[BlockHash]) -> pb::ReadHashesResponse {
    let hashes: Vec<u8> = piece.iter().flat_map(|hash| hash.0).collect();
    pb::ReadHashesResponse { batch: Some(pb::HashBatch { first, hashes: hashes.into() }) }
}

/// Sends the blocks of the ranges; false when the snapshot was found to be damaged.
pub(super) fn send_blocks(
    opened: &OpenedSnapshot,
    ranges: &[Range<u64>],
    encoding: pb::Encoding,
    answers: &Answers<pb::ReadBlocksResponse>,
) -> bool {
    let mut message =
        Message { opened, encoding, answers, extents: Vec::new(), hashes: Vec::new(), bytes: 0 };
    let Err(Some(error)) = message.send_ranges(ranges) else { return true };
    let is_whole = reason(&error) != Some(ErrorReason::StoreDamaged);
    let _ = answers.blocking_send(Err(error));
    is_whole
}

/// One message in the making.
struct Message<'a> {
    opened: &'a OpenedSnapshot,
    encoding: pb::Encoding,
    answers: &'a Answers<pb::ReadBlocksResponse>,
    extents: Vec<Extent>,
    hashes: Vec<u8>,
    bytes: usize,
}

impl Message<'_> {
    fn send_ranges(&mut self, ranges: &[Range<u64>]) -> Result<(), Option<Status>> {
        let failed = |error: RestoreError| Some(Status::from(error));
        let digests = self.opened.tables.segment_digests().map_err(|e| failed(e.into()))?;
        for range in ranges {
            for part in by_segment(range.clone()) {
                let segment = part.start / SEGMENT_BLOCKS;
                let digest = digests.get(segment as usize).ok_or_else(|| Some(too_short()))?;
                if *digest == zero_segment_of(self.size_bytes(), segment) {
                    self.add(part.start, part.end - part.start, true);
                    continue;
                }
                let all = self.opened.tables.segment(segment).map_err(|e| failed(e.into()))?;
                for block in part {
                    let hash = all
                        .get((block % SEGMENT_BLOCKS) as usize)
                        .ok_or_else(|| Some(too_short()))?;
                    self.add_block(block, *hash)?;
                }
            }
        }
        self.flush()
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
        self.hashes.extend_from_slice(&hash.0);
        self.bytes += len;
        Ok(())
    }

    fn add(&mut self, first: u64, count: u64, zero: bool) {
        match self.extents.last_mut() {
            Some(last) if last.zero == zero && last.end() == first => last.count += count,
            _ => self.extents.push(Extent { first, count, zero }),
        }
    }

    fn flush(&mut self) -> Result<(), Option<Status>> {
        if self.extents.is_empty() {
            return Ok(());
        }
        let mut data = Buffer::take();
        let mut at = 0;
        for extent in self.extents.iter().filter(|extent| !extent.zero) {
            let end = (extent.end() * BLOCK_BYTES).min(self.size_bytes());
            let len = (end - extent.first * BLOCK_BYTES) as usize;
            let read =
                self.opened.layers.read_at(extent.first * BLOCK_BYTES, &mut data[at..at + len]);
            read.map_err(|e| Some(RestoreError::from(e).into()))?;
            at += len;
        }
        let (extents, hashes) =
            (std::mem::take(&mut self.extents), Bytes::from(std::mem::take(&mut self.hashes)));
        self.bytes = 0;
        let batch = Batch::new(self.size_bytes(), extents, hashes, data.into_bytes(at))
            .map_err(|e| Some(e.into()))?;
        let answer = pb::ReadBlocksResponse {
            batch: Some(batch.into_wire(self.encoding)),
            ..Default::default()
        };
        send(self.answers, answer).map_err(|Gone| None)
    }

    fn size_bytes(&self) -> u64 {
        self.opened.held.snapshot().size_bytes
    }
}

/// A range of blocks in parts that each lie within one segment.
fn by_segment(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut next = range.start;
    std::iter::from_fn(move || {
        let start = next;
        next = range.end.min((start / SEGMENT_BLOCKS + 1) * SEGMENT_BLOCKS);
        (start < next).then_some(start..next)
    })
}
