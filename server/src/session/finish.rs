//! Turning a session into an image and a table: checked against the commit's digest, written, synced, not yet named.

use std::{collections::HashMap, convert::Infallible, ops::Range};

use janus_proto::{
    buffers::Buffer,
    hash::{hash_blocks, table_digest, zero_hash, zero_segment_of},
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, block_len},
    model::MAX_BATCH_BYTES,
};
use uuid::Uuid;

use super::{Inner, PAYLOAD_BLOCKS, Session, SessionError, Touch};
use crate::{
    chain::{
        opened::OpenedSnapshot,
        ranges::BlockRanges,
        table::{SegmentBitmap, TableError, TableHeader, TableWriter},
    },
    image::{self, Identity, Kind, Payload},
    storage::Access,
};

/// An image that only needs its name and a manifest.
#[derive(Debug, Clone)]
pub struct Finished {
    /// Ids of the image.
    pub identity: Identity,
    /// Digest of the disk's content.
    pub table_digest: BlockHash,
    /// True for a delta, false for a base.
    pub is_delta: bool,
    /// Bytes the image occupies.
    pub image_allocated_bytes: u64,
    /// Length of the image.
    pub image_length_bytes: u64,
}

impl Session {
    /// Writes image and table, and syncs both. Blocks the thread; may take minutes. May be repeated.
    ///
    /// # Errors
    /// `DigestMismatch` when the content isn't what the commit names: the session stays usable. Otherwise as the
    /// file system says.
    pub fn finish(&self, named: BlockHash) -> Result<Finished, SessionError> {
        let mut inner = self.lock();
        if inner.failed {
            return Err(SessionError::Failed);
        }
        let digests = self.digests_of(&inner)?;
        let stored = table_digest(self.disk.size_bytes, &digests);
        if stored != named {
            return Err(SessionError::DigestMismatch {
                disk: self.disk.disk.to_string(),
                stored,
                named,
            });
        }
        self.cut(&inner.index)?;
        inner.finished = true;
        let is_delta = self.layout.kind() == Kind::Differencing;
        let slots =
            if is_delta { inner.index.slots.clone() } else { self.copy_unsent(&inner, &digests)? };
        self.write_table(&inner, &digests, is_delta)?;
        let identity = self.write_image(&inner, &slots)?;
        let path = self.image_path();
        if let Err(error) = self.image.sync_all() {
            inner.failed = true;
            return Err(SessionError::io("sync", &path)(error));
        }
        let metadata = self.image.metadata().map_err(SessionError::io("read", &path))?;
        Ok(Finished {
            identity,
            table_digest: stored,
            is_delta,
            image_allocated_bytes: metadata.allocated_bytes,
            image_length_bytes: metadata.length_bytes,
        })
    }

    /// A base that starts from a head of another size: copies what was not sent, and returns all slots.
    fn copy_unsent(
        &self,
        inner: &Inner,
        digests: &[BlockHash],
    ) -> Result<HashMap<u64, u32>, SessionError> {
        let mut slots = inner.index.slots.clone();
        if self.start.head().is_none() {
            return Ok(slots);
        }
        let (mut buffer, mut lost) = (Buffer::take(), BlockRanges::default());
        for segment in self.segments_with_data(digests) {
            let hashes = self.segment_of(inner, segment)?;
            let sent = bitmap(inner.index.touched.get(&segment));
            let mut unsent = self.not_zero(segment, &hashes);
            for (word, sent) in unsent.0.iter_mut().zip(sent.0) {
                *word &= !sent;
            }
            for run in runs(&unsent, segment) {
                let next = slots.len() as u32;
                let slot = *slots.entry(run.start / PAYLOAD_BLOCKS).or_insert(next);
                let end = (run.end * BLOCK_BYTES).min(self.disk.size_bytes);
                let bytes = &mut buffer[..(end - run.start * BLOCK_BYTES) as usize];
                let first = (run.start - segment * SEGMENT_BLOCKS) as usize;
                if !self.read_head(&run, bytes, &hashes[first..], &mut lost) {
                    continue;
                }
                self.image
                    .write_all_at(bytes, self.place(slot, run.start))
                    .map_err(SessionError::io("write", &self.image_path()))?;
            }
        }
        // All of them at once: the client is asked for them in its next run.
        if lost.is_empty() { Ok(slots) } else { Err(SessionError::HeadDamaged { blocks: lost }) }
    }

    /// Reads blocks of the head. Nothing that is not what was backed up gets into a new image: false when one is lost, which
    /// is then among `lost`.
    fn read_head(
        &self,
        blocks: &Range<u64>,
        bytes: &mut [u8],
        hashes: &[BlockHash],
        lost: &mut BlockRanges,
    ) -> bool {
        let mut found = Vec::new();
        if self.start.read_at(blocks.start * BLOCK_BYTES, bytes).is_ok() {
            hash_blocks(bytes, &mut found);
            if found.iter().eq(&hashes[..found.len()]) {
                return true;
            }
        }
        let mut is_whole = true;
        for ((block, piece), hash) in
            blocks.clone().zip(bytes.chunks_mut(BLOCK_BYTES as usize)).zip(hashes)
        {
            if !self.start.salvage(block, *hash, piece) {
                lost.insert(block..block + 1);
                is_whole = false;
            }
        }
        is_whole
    }

    /// Writes and syncs the table: what was sent for a delta, all that isn't zero for a base.
    fn write_table(
        &self,
        inner: &Inner,
        digests: &[BlockHash],
        is_delta: bool,
    ) -> Result<(), SessionError> {
        let path = self.folder.join(self.disk.partial("table"));
        let file = self.storage.open(&path, Access::Create);
        let file = file.map_err(SessionError::io("create", &path))?;
        let header = TableHeader { snapshot: self.disk.snapshot, disk_bytes: self.disk.size_bytes };
        let mut writer = TableWriter::create(file, header).map_err(|e| self.table_error(e))?;
        let segments: Vec<u64> = match is_delta {
            true => inner.index.touched.keys().copied().collect(),
            false => self.segments_with_data(digests).collect(),
        };
        for segment in segments {
            let hashes = self.segment_of(inner, segment)?;
            let present = match is_delta {
                true => bitmap(inner.index.touched.get(&segment)),
                false => self.not_zero(segment, &hashes),
            };
            let kept: Vec<BlockHash> =
                present.blocks().filter_map(|index| hashes.get(index).copied()).collect();
            writer
                .push(segment, &present, &kept, digests[segment as usize])
                .map_err(|e| self.table_error(e))?;
        }
        let file = writer.finish().map_err(|e| self.table_error(e))?;
        file.sync_all().map_err(SessionError::io("sync", &path))
    }

    fn write_image(
        &self,
        inner: &Inner,
        slots: &HashMap<u64, u32>,
    ) -> Result<Identity, SessionError> {
        let head = self.start.head().filter(|_| self.layout.kind() == Kind::Differencing);
        let identity = Identity {
            // Its time is the time stamp of a VHD.
            data_write: Uuid::now_v7(),
            virtual_disk: head.map_or_else(Uuid::new_v4, |head| head.held.snapshot().virtual_disk),
        };
        let parent = head.and_then(OpenedSnapshot::as_parent);
        let mut order: Vec<(u64, u32)> =
            slots.iter().map(|(payload, slot)| (*payload, *slot)).collect();
        order.sort_unstable();
        let payloads = order.into_iter().map(|(index, slot)| {
            let present = bitmap(inner.index.touched.get(&(index / 2))).half(index);
            Ok::<_, Infallible>(Payload { index, slot, present })
        });
        let slots = slots.len() as u32;
        let written =
            self.layout.write_structures(&self.image, &identity, parent.as_ref(), slots, payloads);
        written.map_err(|error| self.image_error(error))?;
        if self.disk.stub {
            image::set_hidden(&self.image, true).map_err(|error| self.image_error(error))?;
        }
        Ok(identity)
    }

    fn segments_with_data(&self, digests: &[BlockHash]) -> impl Iterator<Item = u64> {
        let zero = move |(segment, digest): &(u64, &BlockHash)| {
            **digest != zero_segment_of(self.disk.size_bytes, *segment)
        };
        (0u64..).zip(digests).filter(zero).map(|(segment, _)| segment)
    }

    fn not_zero(&self, segment: u64, hashes: &[BlockHash]) -> SegmentBitmap {
        let mut present = SegmentBitmap::default();
        for (index, hash) in hashes.iter().enumerate() {
            let block = segment * SEGMENT_BLOCKS + index as u64;
            if *hash != zero_hash(block_len(self.disk.size_bytes, block)) {
                present.insert(index);
            }
        }
        present
    }

    fn table_error(&self, error: TableError) -> SessionError {
        match error {
            TableError::Io { source, .. } => {
                let path = self.folder.join(self.disk.partial("table"));
                SessionError::io("write", &path)(source)
            }
            other => other.into(),
        }
    }
}

/// Blocks of a segment that were written.
pub(super) fn bitmap(touches: Option<&Vec<Touch>>) -> SegmentBitmap {
    let mut present = SegmentBitmap::default();
    for touch in touches.into_iter().flatten() {
        for index in touch.first..touch.first + touch.count {
            present.insert(usize::from(index));
        }
    }
    present
}

/// Marked blocks that follow each other, as block numbers of the disk: in one payload block, and no more than a buffer holds.
fn runs(marked: &SegmentBitmap, segment: u64) -> Vec<Range<u64>> {
    const MOST: u64 = MAX_BATCH_BYTES as u64 / BLOCK_BYTES;
    let mut runs: Vec<Range<u64>> = Vec::new();
    for block in marked.blocks().map(|index| segment * SEGMENT_BLOCKS + index as u64) {
        match runs.last_mut() {
            // A payload block is whole buffers long.
            Some(run) if run.end == block && !block.is_multiple_of(MOST) => run.end += 1,
            _ => runs.push(block..block + 1),
        }
    }
    runs
}
