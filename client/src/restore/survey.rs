//! What is to be done: threads compare what the target holds with the snapshot, segment by segment. What is right already
//! is counted and left alone, what shall be zeros is made zeros, and the rest are parts for the sources.
//!
//! A file that is replaced without a clone is copied here on the way: what it has is worth more than an empty place.

use std::{
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use janus_proto::{
    buffers::Buffer,
    hash::{hash_blocks, segment_digest, zero_hash, zero_segment_of},
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, SEGMENT_BYTES, block_count, block_len},
    model::MAX_BATCH_BYTES,
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::{
    counts::Counts,
    part::{Part, ranges, unread},
    target::{Content, Target, TargetError},
};
use crate::{
    seal::DiskSeal,
    source::medium::{Medium, Stretch},
};

/// Parts that wait to be gathered into pieces.
const WAITING: usize = 32;

/// What all threads share.
pub(super) struct Survey {
    target: Arc<Target>,
    wanted: Arc<[BlockHash]>,
    size_bytes: u64,
    counts: Arc<Counts>,
    /// The next segment, and the one after the last.
    next: AtomicU64,
    end: u64,
    /// Ends the threads early.
    stop: CancellationToken,
}

/// The threads and what they find, in any order.
pub(super) struct Found {
    pub(super) parts: mpsc::Receiver<Part>,
    threads: Vec<JoinHandle<Result<(), TargetError>>>,
}

impl Survey {
    pub(super) fn new(
        target: &Arc<Target>,
        wanted: &Arc<[BlockHash]>,
        size_bytes: u64,
        segments: Range<u64>,
        counts: &Arc<Counts>,
    ) -> Self {
        Self {
            target: target.clone(),
            wanted: wanted.clone(),
            size_bytes,
            counts: counts.clone(),
            next: AtomicU64::new(segments.start),
            end: segments.end,
            stop: CancellationToken::new(),
        }
    }

    /// Starts so many threads; they end by themselves when nobody takes what they find.
    pub(super) fn start(self, threads: usize) -> Found {
        let (sender, parts) = mpsc::channel(WAITING);
        let survey = Arc::new(self);
        let threads = (0..threads.clamp(1, 16)).map(|_| {
            let (survey, sender) = (survey.clone(), sender.clone());
            tokio::task::spawn_blocking(move || {
                let done = survey.work(&sender);
                // One that fails ends them all.
                let _ = done.as_ref().inspect_err(|_| survey.stop.cancel());
                done
            })
        });
        Found { threads: threads.collect(), parts }
    }

    fn work(&self, out: &mpsc::Sender<Part>) -> Result<(), TargetError> {
        let mut reader = match self.target.content() {
            Content::Old => Some(Reader::new(self.target.medium()?, self.size_bytes, &self.target)),
            Content::Zeros | Content::Unread => None,
        };
        let base = self.target.base()?;
        let mut base = base.map(|base| Reader::new(base, self.size_bytes, &self.target));
        loop {
            let segment = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(wanted) = self.wanted.get(segment as usize) else { return Ok(()) };
            if segment >= self.end || self.stop.is_cancelled() || out.is_closed() {
                return Ok(());
            }
            let part = match &mut reader {
                Some(reader) => self.compare(reader, base.as_mut(), segment, wanted)?,
                None => self.unread(segment, wanted)?,
            };
            if let Some(part) = part
                && out.blocking_send(part).is_err()
            {
                return Ok(());
            }
        }
    }

    /// A segment of a target that isn't read.
    fn unread(&self, segment: u64, wanted: &BlockHash) -> Result<Option<Part>, TargetError> {
        let is_zeros = self.target.content() == Content::Zeros;
        let part = match is_zeros {
            true => Part::zeros(self.size_bytes, segment),
            false => Part::unknown(self.size_bytes, segment),
        };
        if *wanted != zero_segment_of(self.size_bytes, segment) {
            return Ok(Some(part));
        }
        if !is_zeros {
            let blocks = part.blocks();
            self.target.zero(blocks.start, blocks.end - blocks.start)?;
        }
        self.counts.verified(&part);
        Ok(None)
    }

    fn compare(
        &self,
        reader: &mut Reader,
        base: Option<&mut Reader>,
        segment: u64,
        wanted: &BlockHash,
    ) -> Result<Option<Part>, TargetError> {
        let zeros = Part::zeros(self.size_bytes, segment);
        let zero_digest = zeros.digest();
        let mut held = reader.segment(segment, |_, data, _| {
            self.counts.read(data.len() as u64);
            Ok(())
        })?;
        if held.is_none()
            && *wanted != zero_digest
            && let Some(base) = base
        {
            held = base.segment(segment, |first, data, hashes| {
                self.counts.read(data.len() as u64);
                self.copy(first, data, hashes)
            })?;
        }
        let Some(hashes) = held else {
            return match *wanted == zero_digest {
                true => {
                    self.counts.verified(&zeros);
                    Ok(None)
                }
                false => Ok(Some(zeros)),
            };
        };
        let part = Part::content(self.size_bytes, segment, hashes);
        if part.digest() == *wanted {
            self.counts.verified(&part);
            return Ok(None);
        }
        if *wanted != zero_digest {
            return Ok(Some(part));
        }
        for range in ranges(part.blocks().filter(|block| !part.is_zero(*block))) {
            self.target.zero(range.start, range.end - range.start)?;
        }
        self.counts.verified(&part);
        Ok(None)
    }

    /// Copies what is not zeros.
    fn copy(&self, first: u64, data: &[u8], hashes: &[BlockHash]) -> Result<(), TargetError> {
        let is_zero = |block: u64| {
            hashes.get((block - first) as usize)
                == Some(&zero_hash(block_len(self.size_bytes, block)))
        };
        let blocks = first..first + hashes.len() as u64;
        for range in ranges(blocks.filter(|block| !is_zero(*block))) {
            let from = (range.start - first) * BLOCK_BYTES;
            let to = ((range.end - first) * BLOCK_BYTES).min(data.len() as u64);
            let piece = data.get(from as usize..to as usize).unwrap_or_default();
            self.target.write(range.start, piece)?;
        }
        Ok(())
    }
}

impl Found {
    /// Waits for the threads.
    pub(super) async fn finish(self) -> Result<(), TargetError> {
        drop(self.parts);
        for thread in self.threads {
            // A thread that was never started, as the runtime ends, has found nothing.
            if let Ok(done) = thread.await {
                done?;
            }
        }
        Ok(())
    }
}

/// Reads segments of a file that may be of another size than its part of the disk: what it lacks counts as zeros.
pub(super) struct Reader {
    medium: Box<dyn Medium>,
    size_bytes: u64,
    /// The bytes of the disk that the file holds.
    window: Range<u64>,
    stretch: Stretch,
    buffer: Buffer,
    /// Hashes are of what this makes of it, beside the buffer.
    seal: Option<(Arc<DiskSeal>, Buffer)>,
}

impl Reader {
    /// Of `target`, or of the file that it replaces.
    pub(super) fn new(medium: Box<dyn Medium>, size_bytes: u64, target: &Target) -> Self {
        let stretch = Stretch { end: 0, hole: false };
        let seal = target.seal().map(|seal| (seal.clone(), Buffer::take()));
        Self { medium, size_bytes, window: target.window(), stretch, buffer: Buffer::take(), seal }
    }

    /// Hashes of a segment's blocks, `None` where all are zeros. What is read is handed on: first block, bytes, hashes.
    pub(super) fn segment(
        &mut self,
        segment: u64,
        mut take: impl FnMut(u64, &[u8], &[BlockHash]) -> Result<(), TargetError>,
    ) -> Result<Option<Vec<BlockHash>>, TargetError> {
        let start = segment * SEGMENT_BYTES;
        let end = (start + SEGMENT_BYTES).min(self.size_bytes);
        if self.inside(start..end) == (start..end) && self.is_hole(start, end) {
            return Ok(None);
        }
        let mut hashes = Vec::with_capacity(SEGMENT_BLOCKS as usize);
        let mut offset = start;
        while offset < end {
            let to = (offset + MAX_BATCH_BYTES as u64).min(end);
            let inside = self.inside(offset..to);
            hashes.extend((offset / BLOCK_BYTES..inside.start / BLOCK_BYTES).map(|_| unread()));
            self.batch(inside.clone(), &mut hashes, &mut take)?;
            hashes.extend((block_count(inside.end)..block_count(to)).map(|_| unread()));
            offset = to;
        }
        let is_zeros = segment_digest(&hashes) == zero_segment_of(self.size_bytes, segment);
        Ok((!is_zeros).then_some(hashes))
    }

    /// The whole blocks of some bytes of the disk that the file holds.
    fn inside(&self, bytes: Range<u64>) -> Range<u64> {
        let start = bytes.start.max(self.window.start.next_multiple_of(BLOCK_BYTES));
        let end = match self.window.end < bytes.end {
            true => self.window.end - self.window.end % BLOCK_BYTES,
            false => bytes.end,
        };
        let start = start.min(bytes.end);
        start..end.max(start)
    }

    fn batch(
        &mut self,
        bytes: Range<u64>,
        hashes: &mut Vec<BlockHash>,
        take: &mut impl FnMut(u64, &[u8], &[BlockHash]) -> Result<(), TargetError>,
    ) -> Result<(), TargetError> {
        let Range { start: offset, end: to } = bytes;
        let (first, old) = (offset / BLOCK_BYTES, hashes.len());
        let len = (to - offset) as usize;
        if len == 0 {
        } else if self.is_hole(offset, to) {
            let blocks = first..block_count(to);
            hashes.extend(blocks.map(|block| zero_hash(block_len(self.size_bytes, block))));
        } else if let Err(error) = self.fill(offset, len) {
            // What can't be read may well be written.
            tracing::warn!(offset, %error, "the target can't be read here; it is written anew");
            hashes.extend((first..block_count(to)).map(|_| unread()));
        } else {
            let data = self.buffer.get(..len).unwrap_or_default();
            match &mut self.seal {
                None => hash_blocks(data, hashes),
                Some((seal, sealed)) => {
                    // What is handed on stays as it was read.
                    let sealed = sealed.get_mut(..len).unwrap_or_default();
                    sealed.copy_from_slice(data);
                    seal.seal(offset, sealed);
                    hash_blocks(sealed, hashes);
                }
            }
            take(first, data, hashes.get(old..).unwrap_or_default())?;
        }
        Ok(())
    }

    fn fill(&mut self, offset: u64, len: usize) -> io::Result<()> {
        let offset = offset - self.window.start;
        let has = self.medium.size_bytes().saturating_sub(offset).min(len as u64) as usize;
        let (there, missing) = self.buffer.split_at_mut(has);
        missing[..len - has].fill(0);
        self.medium.read_exact_at(there, offset)
    }

    /// True when all of it, which is inside, is known to be zeros without reading.
    fn is_hole(&mut self, start: u64, end: u64) -> bool {
        let (start, end) = (start - self.window.start, end - self.window.start);
        let size = self.medium.size_bytes();
        if start >= size {
            return true;
        }
        if self.stretch.end <= start || !self.stretch.hole {
            self.stretch = self.medium.stretch(start);
        }
        self.stretch.hole && self.stretch.end >= end.min(size)
    }
}

#[cfg(test)]
mod tests;
