//! The tables of a chain, read as one.

use std::{ops::Range, sync::Arc};

use super::{SegmentBitmap, Table, TableError, blocks_of};
use crate::{
    hash::{segment_digest, table_digest, zero_hash, zero_segment, zero_segment_of},
    ids::{BlockHash, SEGMENT_BLOCKS, block_len, segment_count},
};

/// The content of a disk by its hashes: the tables of its chain, newest first.
#[derive(Clone, Debug)]
pub struct TableStack {
    tables: Vec<Arc<Table>>,
    disk_bytes: u64,
}

impl TableStack {
    /// A stack of tables, newest first. Without tables the disk is all zeros.
    ///
    /// # Errors
    /// When a table is of a disk of another size: a resized disk starts a new chain.
    pub fn new(tables: Vec<Arc<Table>>, disk_bytes: u64) -> Result<Self, TableError> {
        if let Some(other) =
            tables.iter().map(|table| table.header()).find(|header| header.disk_bytes != disk_bytes)
        {
            return Err(TableError::impossible(format!(
                "the table of snapshot {} is of a disk of {} bytes, not {disk_bytes}",
                other.snapshot, other.disk_bytes
            )));
        }
        Ok(Self { tables, disk_bytes })
    }

    /// The same with one more table over the others.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with(&self, newest: Arc<Table>) -> Result<Self, TableError> {
        let tables = std::iter::once(newest).chain(self.tables.iter().cloned());
        Self::new(tables.collect(), self.disk_bytes)
    }

    /// The segments that the newest table names, ascending.
    pub fn newest_segments(&self) -> impl Iterator<Item = u64> + '_ {
        let newest = self.tables.first().into_iter();
        newest.flat_map(|table| table.digests().map(|(segment, _)| segment))
    }

    /// Size of the disk in bytes.
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }

    /// The hashes of all blocks of a segment, checked against the segment's digest.
    ///
    /// # Errors
    /// When the disk has no such segment, a page is damaged, or the tables don't belong together.
    pub fn segment(&self, segment: u64) -> Result<Vec<BlockHash>, TableError> {
        let blocks = blocks_of(self.disk_bytes, segment);
        if blocks == 0 {
            return Err(TableError::impossible(format!(
                "segment {segment} of a disk of {} bytes",
                self.disk_bytes
            )));
        }
        let last = segment * SEGMENT_BLOCKS + blocks as u64 - 1;
        let mut hashes = vec![zero_hash(4096); blocks];
        hashes[blocks - 1] = zero_hash(block_len(self.disk_bytes, last));
        let mut known = SegmentBitmap::default();
        for table in &self.tables {
            let Some(page) = table.page(segment)? else { continue };
            // `page` saw to it that its blocks are on the disk and that each has a hash.
            for (block, hash) in page.present.blocks().zip(&page.hashes) {
                if !known.contains(block) {
                    hashes[block] = *hash;
                }
            }
            known = SegmentBitmap(std::array::from_fn(|word| known.0[word] | page.present.0[word]));
            if known.count() == blocks {
                break;
            }
        }
        self.check(segment, hashes)
    }

    /// For each block of a segment the place of the table that names it, 0 for the newest; `None`: no table does, the block is
    /// zero.
    ///
    /// # Errors
    /// When a page is damaged.
    pub fn holders(&self, segment: u64) -> Result<Vec<Option<usize>>, TableError> {
        let mut holders = vec![None; SEGMENT_BLOCKS as usize];
        for (place, table) in self.tables.iter().enumerate() {
            let Some(page) = table.page(segment)? else { continue };
            for block in page.present.blocks() {
                holders[block].get_or_insert(place);
            }
        }
        Ok(holders)
    }

    /// The hashes of a segment as far as its pages can be read: `None` where only a damaged page knows.
    pub fn known(&self, segment: u64) -> Vec<Option<BlockHash>> {
        let blocks = blocks_of(self.disk_bytes, segment);
        let first = segment * SEGMENT_BLOCKS;
        let mut known = vec![None; blocks];
        for table in &self.tables {
            let Ok(page) = table.page(segment) else { return known };
            for (block, hash) in
                page.iter().flat_map(|page| page.present.blocks().zip(&page.hashes))
            {
                known[block].get_or_insert(*hash);
            }
        }
        for (hash, block) in known.iter_mut().zip(first..) {
            hash.get_or_insert(zero_hash(block_len(self.disk_bytes, block)));
        }
        known
    }

    /// The digest of a segment, which is known even where its pages are damaged.
    pub fn digest(&self, segment: u64) -> BlockHash {
        let named = self.tables.iter().find_map(|table| table.digest(segment));
        named.unwrap_or_else(|| zero_segment_of(self.disk_bytes, segment))
    }

    /// How many blocks of a segment aren't zeros, where indexes alone tell: nothing else names what one table does, and no table
    /// names zeros over zeros.
    pub fn content_blocks(&self, segment: u64) -> Option<u64> {
        let mut naming = self.tables.iter().filter_map(|table| table.entry(segment));
        match (naming.next(), naming.next()) {
            (None, _) => Some(0),
            (Some(entry), None) => Some(entry.count.into()),
            (Some(_), Some(_)) => None,
        }
    }

    /// The digests of all segments, in order: 8 MiB for each TiB of disk.
    ///
    /// # Errors
    /// When a table names a segment that the disk doesn't have.
    pub fn segment_digests(&self) -> Result<Vec<BlockHash>, TableError> {
        let count = segment_count(self.disk_bytes);
        let mut digests = vec![zero_segment(); count as usize];
        if let Some(last) = digests.last_mut() {
            *last = zero_segment_of(self.disk_bytes, count - 1);
        }
        for table in self.tables.iter().rev() {
            for (segment, digest) in table.digests() {
                let place = digests.get_mut(segment as usize);
                *place.ok_or_else(|| {
                    TableError::damaged(format!("there is no segment {segment}"))
                })? = digest;
            }
        }
        Ok(digests)
    }

    /// The digests of a range of segments of the disk, in order.
    pub fn digests_in(&self, range: Range<u64>) -> Vec<BlockHash> {
        let range = range.start..range.end.min(segment_count(self.disk_bytes));
        let zeros = range.clone().map(|segment| zero_segment_of(self.disk_bytes, segment));
        let mut digests: Vec<BlockHash> = zeros.collect();
        for table in self.tables.iter().rev() {
            for (segment, digest) in table.digests_in(range.clone()) {
                if let Some(place) = digests.get_mut((segment - range.start) as usize) {
                    *place = digest;
                }
            }
        }
        digests
    }

    /// The digest that names the disk's whole content.
    ///
    /// # Errors
    /// As [`Self::segment_digests`].
    pub fn table_digest(&self) -> Result<BlockHash, TableError> {
        Ok(table_digest(self.disk_bytes, &self.segment_digests()?))
    }

    /// The newest table that names a segment knows the digest of the whole; a table that is missing in between shows here.
    fn check(&self, segment: u64, hashes: Vec<BlockHash>) -> Result<Vec<BlockHash>, TableError> {
        match self.tables.iter().find_map(|table| table.digest(segment)) {
            Some(digest) if digest != segment_digest(&hashes) => Err(TableError::damaged(format!(
                "the hashes of segment {segment} don't match its digest"
            ))),
            _ => Ok(hashes),
        }
    }
}
