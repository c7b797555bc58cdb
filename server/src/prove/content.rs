//! A snapshot's content as a restore gets it: what `ReadBlocks` sends, looked over as a client does.
//!
//! The messages are made by the code that answers restores, not by a way of our own: what is proven is that way, too.

use std::{
    collections::{HashMap, VecDeque},
    fmt, io,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use janus_client::source::medium::{Medium, Stretch};
use janus_proto::{
    hash::{hash_blocks, segment_digest, zero_hash, zero_segment_of},
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, SEGMENT_BYTES, block_count, block_len},
    image::sector_bytes,
    model::Batch,
    pb,
};
use tokio::sync::mpsc;

use crate::{
    chain::{
        opened::OpenedSnapshot,
        ranges::{BlockRanges, segment_blocks},
    },
    restore::blocks::send_blocks,
    verify::{CheckError, Pace},
};

/// Messages made but not looked over yet, about 1 MiB each.
const QUEUE: usize = 4;
/// What file systems are read in.
const CHUNK_BLOCKS: u64 = 64;
const CHUNK_BYTES: u64 = CHUNK_BLOCKS * BLOCK_BYTES;
/// Chunks that are kept: 64 MiB.
const MOST_CHUNKS: usize = 256;

/// What came of reading all of a snapshot.
#[derive(Debug, Default)]
pub struct Content {
    /// Bytes that were read and compared; the rest are zeros.
    pub read_bytes: u64,
    /// Blocks that are lost, as the stream names them.
    pub lost: BlockRanges,
    /// Segments whose hashes can't be read.
    pub unhashed: Vec<u64>,
    /// Segments whose blocks don't give the digest.
    pub wrong: Vec<u64>,
    /// Why the stream ended before its end.
    pub broken: Option<String>,
}

/// Reads all blocks and compares them with the hashes of their segments.
///
/// # Errors
/// `Stopped`.
pub fn read_all(
    opened: &OpenedSnapshot,
    digests: &[BlockHash],
    pace: &dyn Pace,
    tell: &dyn Fn(u64),
) -> Result<Content, CheckError> {
    let mut check = Check::new(opened, digests);
    let all = 0..block_count(opened.held.snapshot().size_bytes);
    std::thread::scope(|scope| {
        let (answers, mut stream) = mpsc::channel(QUEUE);
        // It ends when the receiver goes, also where this returns early.
        scope.spawn(move || send_blocks(opened, &[all], pb::Encoding::None, true, None, &answers));
        while let Some(answer) = stream.blocking_recv() {
            match answer {
                Ok(answer) => check.take(answer),
                Err(status) => check.found.broken = Some(status.message().to_owned()),
            }
            if check.found.broken.is_some() {
                break;
            }
            tell(check.next);
            pace.take(std::mem::take(&mut check.unpaid))?;
        }
        Ok::<_, CheckError>(())
    })?;
    Ok(check.finish())
}

/// Blocks of a snapshot, in their order, gathered to segments.
struct Check<'a> {
    opened: &'a OpenedSnapshot,
    digests: &'a [BlockHash],
    size: u64,
    /// The block that comes next.
    next: u64,
    /// Hashes of the segment that is being gathered.
    hashes: Vec<BlockHash>,
    /// Something of it is lost: it can't give its digest.
    has_gap: bool,
    unpaid: u64,
    found: Content,
}

impl<'a> Check<'a> {
    fn new(opened: &'a OpenedSnapshot, digests: &'a [BlockHash]) -> Self {
        let size = opened.held.snapshot().size_bytes;
        let hashes = Vec::with_capacity(SEGMENT_BLOCKS as usize);
        let found = Content::default();
        Self { opened, digests, size, next: 0, hashes, has_gap: false, unpaid: 0, found }
    }

    fn take(&mut self, answer: pb::ReadBlocksResponse) {
        if let Some(batch) = answer.batch {
            match Batch::from_wire(self.size, batch) {
                Ok(batch) => self.take_batch(&batch),
                Err(error) => self.found.broken = Some(error.to_string()),
            }
        }
        for range in answer.damaged {
            let range = range.first_block..range.first_block.saturating_add(range.block_count);
            if self.is_next(range.start) {
                self.found.lost.insert(range.clone());
                self.pass(range, None);
            }
        }
    }

    fn take_batch(&mut self, batch: &Batch) {
        let mut found = Vec::new();
        for piece in batch.pieces() {
            let range = piece.extent.first..piece.extent.end();
            if !self.is_next(range.start) {
                return;
            }
            if piece.extent.zero {
                self.pass_zeros(range);
                continue;
            }
            found.clear();
            hash_blocks(piece.data, &mut found);
            self.found.read_bytes += piece.data.len() as u64;
            self.unpaid += piece.data.len() as u64;
            self.pass(range, Some(&found));
        }
    }

    fn is_next(&mut self, block: u64) -> bool {
        if block != self.next {
            let next = self.next;
            self.found.broken = Some(format!("block {block} was sent where block {next} is next"));
        }
        block == self.next
    }

    /// Zeros may be whole disks: a segment of them at once.
    fn pass_zeros(&mut self, blocks: Range<u64>) {
        let mut at = blocks.start;
        while at < blocks.end {
            let segment = at / SEGMENT_BLOCKS;
            let whole = segment_blocks(segment).end.min(block_count(self.size));
            if at == segment * SEGMENT_BLOCKS && whole <= blocks.end {
                let is_right = self.digests.get(segment as usize)
                    == Some(&zero_segment_of(self.size, segment));
                if !is_right {
                    self.found.wrong.push(segment);
                }
                (at, self.next) = (whole, whole);
                continue;
            }
            let end = whole.min(blocks.end);
            let zeros: Vec<_> =
                (at..end).map(|block| zero_hash(block_len(self.size, block))).collect();
            self.pass(at..end, Some(&zeros));
            at = end;
        }
    }

    /// Takes blocks with their hashes, or without any where they are lost.
    fn pass(&mut self, blocks: Range<u64>, hashes: Option<&[BlockHash]>) {
        let mut hashes = hashes.map(|hashes| hashes.iter());
        for block in blocks {
            match hashes.as_mut().map(Iterator::next) {
                Some(Some(hash)) => self.hashes.push(*hash),
                _ => self.has_gap = true,
            }
            self.next = block + 1;
            if self.next.is_multiple_of(SEGMENT_BLOCKS) || self.next == block_count(self.size) {
                self.end_segment(block / SEGMENT_BLOCKS);
            }
        }
    }

    fn end_segment(&mut self, segment: u64) {
        // Restores over an older state of the disk ask for these.
        if self.opened.tables.segment(segment).is_err() {
            self.found.unhashed.push(segment);
        }
        let is_right = self.digests.get(segment as usize) == Some(&segment_digest(&self.hashes));
        if !self.has_gap && !is_right {
            self.found.wrong.push(segment);
        }
        self.hashes.clear();
        self.has_gap = false;
    }

    fn finish(mut self) -> Content {
        let blocks = block_count(self.size);
        if self.found.broken.is_none() && self.next < blocks {
            self.found.broken = Some(format!("it ended at block {} of {blocks}", self.next));
        }
        self.found
    }
}

/// A snapshot as a disk.
pub struct SnapshotDisk {
    opened: Arc<OpenedSnapshot>,
    pace: Arc<dyn Pace + Send>,
    kept: Mutex<Kept>,
}

/// Chunks that were read last.
#[derive(Default)]
struct Kept {
    chunks: HashMap<u64, Arc<Chunk>>,
    order: VecDeque<u64>,
}

/// A piece of the disk, but for its lost blocks.
#[derive(Default)]
struct Chunk {
    bytes: Vec<u8>,
    lost: BlockRanges,
}

impl SnapshotDisk {
    /// Reads `opened` at this pace.
    pub fn new(opened: Arc<OpenedSnapshot>, pace: Arc<dyn Pace + Send>) -> Self {
        Self { opened, pace, kept: Mutex::default() }
    }

    fn chunk(&self, chunk: u64) -> io::Result<Arc<Chunk>> {
        let kept = || self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = kept().chunks.get(&chunk) {
            return Ok(known.clone());
        }
        let read = Arc::new(self.fetch(chunk)?);
        self.pace.take(read.bytes.len() as u64).map_err(io::Error::other)?;
        let mut kept = kept();
        if kept.chunks.insert(chunk, read.clone()).is_none() {
            kept.order.push_back(chunk);
        }
        if kept.order.len() > MOST_CHUNKS
            && let Some(oldest) = kept.order.pop_front()
        {
            kept.chunks.remove(&oldest);
        }
        Ok(read)
    }

    fn fetch(&self, chunk: u64) -> io::Result<Chunk> {
        let size = self.size_bytes();
        let first = chunk * CHUNK_BLOCKS;
        let end = (first + CHUNK_BLOCKS).min(block_count(size));
        let start = chunk * CHUNK_BYTES;
        let bytes = vec![0; (size - start).min(CHUNK_BYTES) as usize];
        let mut read = Chunk { bytes, lost: BlockRanges::default() };
        // Room for all messages that there can be, so that nobody waits: each block in one of its own, lost or not.
        let (answers, mut stream) = mpsc::channel(2 * CHUNK_BLOCKS as usize + 1);
        let asked = std::slice::from_ref(&(first..end)).to_vec();
        send_blocks(&self.opened, &asked, pb::Encoding::None, true, None, &answers);
        drop(answers);
        while let Ok(answer) = stream.try_recv() {
            let answer = answer.map_err(|status| io::Error::other(status.message().to_owned()))?;
            for lost in answer.damaged {
                let end = lost.first_block.saturating_add(lost.block_count);
                read.lost.insert(lost.first_block..end);
            }
            let Some(batch) = answer.batch else { continue };
            let batch = Batch::from_wire(size, batch).map_err(io::Error::other)?;
            for piece in batch.pieces().filter(|piece| !piece.extent.zero) {
                let at = (piece.extent.first * BLOCK_BYTES).saturating_sub(start) as usize;
                let target = read.bytes.get_mut(at..at + piece.data.len());
                let target = target.ok_or_else(|| io::Error::other("other blocks than asked"))?;
                target.copy_from_slice(piece.data);
            }
        }
        Ok(read)
    }
}

impl fmt::Debug for SnapshotDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotDisk").field("id", &self.opened.held.snapshot().id).finish()
    }
}

impl Medium for SnapshotDisk {
    fn size_bytes(&self) -> u64 {
        self.opened.held.snapshot().size_bytes
    }

    fn sector_bytes(&self) -> u32 {
        sector_bytes(self.opened.held.snapshot().logical_sector_bytes)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        end.filter(|end| *end <= self.size_bytes()).ok_or(io::ErrorKind::UnexpectedEof)?;
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let chunk = self.chunk(at / CHUNK_BYTES)?;
            let from = (at % CHUNK_BYTES) as usize;
            let len = rest.len().min(chunk.bytes.len() - from);
            let blocks = at / BLOCK_BYTES..(at + len as u64).div_ceil(BLOCK_BYTES);
            if let Some(lost) = blocks.into_iter().find(|block| chunk.lost.contains(*block)) {
                let id = self.opened.held.snapshot().id;
                return Err(io::Error::other(format!("block {lost} of snapshot {id} is lost")));
            }
            let (piece, after) = rest.split_at_mut(len);
            piece.copy_from_slice(&chunk.bytes[from..from + len]);
            (at, rest) = (at + len as u64, after);
        }
        Ok(())
    }

    fn stretch(&self, offset: u64) -> Stretch {
        let size = self.size_bytes();
        let is_zero =
            |segment| self.opened.tables.digest(segment) == zero_segment_of(size, segment);
        let mut segment = offset / SEGMENT_BYTES;
        let hole = is_zero(segment);
        while segment * SEGMENT_BYTES < size && is_zero(segment) == hole {
            segment += 1;
        }
        Stretch { end: (segment * SEGMENT_BYTES).min(size), hole }
    }
}
