//! What a session starts from: the head's content, cut or extended to the disk's present size.

use std::ops::Range;

use janus_proto::{
    hash::{hash_block, segment_digest, zero_hash, zero_segment_of},
    ids::{
        BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, SEGMENT_BYTES, block_count, block_len,
        segment_count,
    },
};

use super::SessionError;
use crate::chain::opened::{OpenedSnapshot, Salvage};

/// Hashes of a disk before anything was sent.
pub struct StartContent {
    head: Option<OpenedSnapshot>,
    disk_bytes: u64,
    /// The one block whose length changes with the disk's size, and its hash at the new length.
    boundary: Option<(u64, BlockHash)>,
}

impl StartContent {
    /// Content of `head`, or zeros, at a size of `disk_bytes`.
    ///
    /// # Errors
    /// When the head can't be read.
    pub fn new(head: Option<OpenedSnapshot>, disk_bytes: u64) -> Result<Self, SessionError> {
        let mut content = Self { head, disk_bytes, boundary: None };
        content.boundary = content.boundary_block()?;
        Ok(content)
    }

    /// The head that was opened.
    pub fn head(&self) -> Option<&OpenedSnapshot> {
        self.head.as_ref()
    }

    /// True when the content has the size of its head.
    pub fn keeps_size(&self) -> bool {
        self.head.as_ref().is_some_and(|head| head.held.snapshot().size_bytes == self.disk_bytes)
    }

    /// Block hashes of one segment.
    ///
    /// # Errors
    /// When a table of the head can't be read.
    pub fn segment(&self, segment: u64) -> Result<Vec<BlockHash>, SessionError> {
        let first = segment * SEGMENT_BLOCKS;
        let count = block_count(self.disk_bytes).saturating_sub(first).min(SEGMENT_BLOCKS);
        let old = match &self.head {
            Some(head) if segment < segment_count(self.old_bytes()) => {
                head.tables.segment(segment)?
            }
            _ => Vec::new(),
        };
        let hash = |index: u64| match (self.boundary, old.get(index as usize)) {
            (Some((block, hash)), _) if block == first + index => hash,
            (_, Some(hash)) => *hash,
            _ => zero_hash(block_len(self.disk_bytes, first + index)),
        };
        Ok((0..count).map(hash).collect())
    }

    /// Digests of all segments.
    ///
    /// # Errors
    /// When a table of the head can't be read.
    pub fn segment_digests(&self) -> Result<Vec<BlockHash>, SessionError> {
        let total = segment_count(self.disk_bytes);
        let mut digests = match &self.head {
            Some(head) => head.tables.segment_digests()?,
            None => Vec::new(),
        };
        // Segments that both sizes hold whole are as they were; the rest is made anew.
        let same = if self.keeps_size() {
            total
        } else {
            self.old_bytes().min(self.disk_bytes) / SEGMENT_BYTES
        };
        digests.truncate(same as usize);
        for segment in same..total {
            let touched = segment * SEGMENT_BYTES < self.old_bytes();
            digests.push(match touched {
                true => segment_digest(&self.segment(segment)?),
                false => zero_segment_of(self.disk_bytes, segment),
            });
        }
        Ok(digests)
    }

    /// Digests of a range of segments.
    ///
    /// # Errors
    /// When a table of the head can't be read.
    pub fn digests_in(&self, range: Range<u64>) -> Result<Vec<BlockHash>, SessionError> {
        let end = range.end.min(segment_count(self.disk_bytes));
        let same = match &self.head {
            None => 0,
            Some(_) if self.keeps_size() => end,
            Some(_) => self.old_bytes().min(self.disk_bytes) / SEGMENT_BYTES,
        };
        let same = same.clamp(range.start, end.max(range.start));
        let mut digests = match &self.head {
            Some(head) => head.tables.digests_in(range.start..same),
            None => Vec::new(),
        };
        for segment in same..end {
            digests.push(match segment * SEGMENT_BYTES < self.old_bytes() {
                true => segment_digest(&self.segment(segment)?),
                false => zero_segment_of(self.disk_bytes, segment),
            });
        }
        Ok(digests)
    }

    /// Reads the head's bytes; what lies past its end is zero.
    ///
    /// # Errors
    /// When an image of the head can't be read.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), SessionError> {
        let inside = self.old_bytes().saturating_sub(offset).min(buffer.len() as u64) as usize;
        let (old, past) = buffer.split_at_mut(inside);
        past.fill(0);
        match &self.head {
            Some(head) => Ok(head.read_at(offset, old)?),
            None => Ok(()),
        }
    }

    /// Reads one block that should have this hash by any way there is; false when it is lost. The one whose length has
    /// changed is read as it was when the session was opened.
    pub fn salvage(&self, block: u64, hash: BlockHash, buffer: &mut [u8]) -> bool {
        let is_inside = block * BLOCK_BYTES + buffer.len() as u64 <= self.old_bytes();
        match &self.head {
            Some(head) if is_inside => Salvage::new(head).read(block, hash, buffer),
            _ => {
                let read = self.read_at(block * BLOCK_BYTES, buffer);
                read.is_ok() && hash_block(buffer) == hash
            }
        }
    }

    fn old_bytes(&self) -> u64 {
        self.head.as_ref().map_or(0, |head| head.held.snapshot().size_bytes)
    }

    fn boundary_block(&self) -> Result<Option<(u64, BlockHash)>, SessionError> {
        let common = self.old_bytes().min(self.disk_bytes);
        if self.keeps_size() || common.is_multiple_of(BLOCK_BYTES) {
            return Ok(None);
        }
        let block = common / BLOCK_BYTES;
        let mut bytes = vec![0; block_len(self.disk_bytes, block)];
        let kept = (common % BLOCK_BYTES) as usize;
        self.read_at(block * BLOCK_BYTES, &mut bytes[..kept])?;
        Ok(Some((block, hash_block(&bytes))))
    }
}
