//! What differs between the content of two snapshots of a disk, by their tables.

use std::{collections::VecDeque, ops::Range};

use crate::{
    hash::segment_digest,
    ids::{BlockHash, segment_count},
};

use super::{SegmentBitmap, TableError, TableStack};

/// Segments whose digests are compared at once: memory doesn't grow with the disk.
const WINDOW: u64 = 4096;

/// A segment of which blocks differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Differing {
    /// Its number.
    pub segment: u64,
    /// Of all of it, as it is.
    pub digest: BlockHash,
    /// Blocks that differ from what it was since.
    pub present: SegmentBitmap,
    /// Their hashes, in order.
    pub hashes: Vec<BlockHash>,
}

impl Differing {
    /// All hashes of the segment, put over those that it had since.
    ///
    /// # Errors
    /// When bitmap and hashes don't fit each other or the segment, a block is named that doesn't differ, or all together don't
    /// have the digest.
    pub fn over(&self, since: &TableStack) -> Result<Vec<BlockHash>, TableError> {
        let mut hashes = since.segment(self.segment)?;
        let fits = self.present.ends_by(hashes.len()) && self.present.count() == self.hashes.len();
        if !fits {
            return Err(TableError::damaged(format!(
                "segment {} has other hashes than it says",
                self.segment
            )));
        }
        for (block, hash) in self.present.blocks().zip(&self.hashes) {
            match hashes.get_mut(block) {
                Some(place) if *place != *hash => *place = *hash,
                _ => {
                    let segment = self.segment;
                    return Err(TableError::damaged(format!(
                        "block {block} of segment {segment} doesn't differ"
                    )));
                }
            }
        }
        match segment_digest(&hashes) == self.digest {
            true => Ok(hashes),
            false => Err(TableError::damaged(format!(
                "the hashes of segment {} don't match its digest",
                self.segment
            ))),
        }
    }
}

/// The segments of a snapshot that differ from another one, ascending. The cost is one look at the indexes and the pages of
/// what differs.
pub struct Difference<'a> {
    of: &'a TableStack,
    since: &'a TableStack,
    left: Range<u64>,
    found: VecDeque<(u64, BlockHash)>,
}

impl<'a> Difference<'a> {
    /// Between `of` and `since`, from a segment on; without tables `since` is a disk of zeros.
    ///
    /// # Errors
    /// When they are of disks of different sizes.
    pub fn new(of: &'a TableStack, since: &'a TableStack, first: u64) -> Result<Self, TableError> {
        if of.disk_bytes() != since.disk_bytes() {
            return Err(TableError::impossible("a difference between disks of different sizes"));
        }
        let left = first..segment_count(of.disk_bytes());
        Ok(Self { of, since, left, found: VecDeque::new() })
    }

    /// Looks at indexes until something differs; false: there is no more.
    fn look(&mut self) -> bool {
        while self.found.is_empty() && self.left.start < self.left.end {
            let window = self.left.start..self.left.end.min(self.left.start + WINDOW);
            self.left.start = window.end;
            let (of, since) =
                (self.of.digests_in(window.clone()), self.since.digests_in(window.clone()));
            let pairs = window.zip(of.into_iter().zip(since));
            self.found.extend(
                pairs.filter_map(|(segment, (of, since))| (of != since).then_some((segment, of))),
            );
        }
        !self.found.is_empty()
    }

    fn differing(&self, segment: u64, digest: BlockHash) -> Result<Differing, TableError> {
        let (of, since) = (self.of.segment(segment)?, self.since.segment(segment)?);
        let (mut present, mut hashes) = (SegmentBitmap::default(), Vec::new());
        for (block, (of, since)) in of.iter().zip(&since).enumerate() {
            if of != since {
                present.insert(block);
                hashes.push(*of);
            }
        }
        Ok(Differing { segment, digest, present, hashes })
    }
}

impl Iterator for Difference<'_> {
    type Item = Result<Differing, TableError>;

    fn next(&mut self) -> Option<Self::Item> {
        if !self.look() {
            return None;
        }
        let (segment, digest) = self.found.pop_front()?;
        Some(self.differing(segment, digest))
    }
}
