//! Reads back what was written, past the page cache where the file system lets us, and compares it with the snapshot.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use janus_proto::{
    hash::{segment_digest, zero_segment_of},
    ids::{BlockHash, SEGMENT_BLOCKS, SEGMENT_BYTES},
};

use super::{
    counts::Counts,
    survey::Reader,
    target::{Target, TargetError},
};

/// What all threads share.
struct Check {
    target: Arc<Target>,
    /// Segments that the target holds as a whole.
    segments: Range<u64>,
    wanted: Arc<[BlockHash]>,
    size_bytes: u64,
    lost: Vec<Range<u64>>,
    counts: Arc<Counts>,
    next: AtomicU64,
    /// The first segment that differs.
    differs: AtomicU64,
}

/// Reads all of a target back; the first byte of the first segment that is not what it should be. Segments with lost blocks
/// are not compared, nor are those of which the target has only a part: their blocks were, before they were written.
pub(super) async fn read_back(
    target: &Arc<Target>,
    size_bytes: u64,
    wanted: &Arc<[BlockHash]>,
    lost: Vec<Range<u64>>,
    counts: &Arc<Counts>,
    threads: usize,
) -> Result<Option<u64>, TargetError> {
    let window = target.window();
    let end = if window.end == size_bytes { u64::MAX } else { window.end / SEGMENT_BYTES };
    let segments = window.start.div_ceil(SEGMENT_BYTES)..end;
    let first = segments.start;
    let check = Arc::new(Check {
        target: target.clone(),
        wanted: wanted.clone(),
        size_bytes,
        segments,
        lost,
        counts: counts.clone(),
        next: AtomicU64::new(first),
        differs: AtomicU64::new(u64::MAX),
    });
    let syncing = target.clone();
    let synced = tokio::task::spawn_blocking(move || syncing.sync()).await;
    synced.unwrap_or(Ok(()))?;
    let threads: Vec<_> = (0..threads.clamp(1, 16))
        .map(|_| {
            let check = check.clone();
            tokio::task::spawn_blocking(move || check.work())
        })
        .collect();
    for thread in threads {
        // One that was not started, as the runtime ends, leaves the others to it.
        if let Ok(done) = thread.await {
            done?;
        }
    }
    let segment = check.differs.load(Ordering::Relaxed);
    Ok((segment != u64::MAX).then(|| segment * SEGMENT_BYTES))
}

impl Check {
    fn work(&self) -> Result<(), TargetError> {
        let mut reader = Reader::new(self.target.medium()?, self.size_bytes, &self.target);
        loop {
            let segment = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(wanted) = self.wanted.get(segment as usize) else { return Ok(()) };
            if segment >= self.segments.end {
                return Ok(());
            }
            if self.has_lost(segment) {
                continue;
            }
            let hashes = reader.segment(segment, |_, data, _| {
                self.counts.read_back(data.len() as u64);
                Ok(())
            })?;
            let digest = match hashes {
                Some(hashes) => segment_digest(&hashes),
                None => zero_segment_of(self.size_bytes, segment),
            };
            if digest != *wanted {
                self.differs.fetch_min(segment, Ordering::Relaxed);
            }
        }
    }

    fn has_lost(&self, segment: u64) -> bool {
        let blocks = segment * SEGMENT_BLOCKS..(segment + 1) * SEGMENT_BLOCKS;
        let at = self.lost.partition_point(|range| range.end <= blocks.start);
        self.lost.get(at).is_some_and(|range| range.start < blocks.end)
    }
}
