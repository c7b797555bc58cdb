//! Moves a child's blocks into the merged image: shared where that works, else copied, checked against their hashes.

use std::{ops::Range, path::Path};

use janus_proto::{
    buffers::Buffer,
    hash::{hash_blocks, zero_hash},
    ids::{
        BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, SEGMENT_BYTES, SnapshotId, block_count, block_len,
    },
    model::MAX_BATCH_BYTES,
};

use super::{MergeError, Moved, Way};
use crate::{
    chain::table::{Page, SegmentBitmap, Table},
    image::{
        self, ImageError,
        vhdx::{Absorber, VhdxImage},
    },
    storage::{Cloning, File},
};

/// Shorter stretches are copied even where they could be shared: each shared one makes the file's map longer.
pub(super) const LEAST_SHARED: u64 = 64 << 10;
/// The structures follow the data after so many bytes or payload blocks: bounds memory, and what a crash repeats.
const FLUSH_BYTES: u64 = 256 << 20;
const FLUSH_BLOCKS: usize = 4096;

/// A child whose blocks are moved.
pub(super) struct Source<'a> {
    pub(super) snapshot: SnapshotId,
    pub(super) disk_bytes: u64,
    pub(super) image: &'a VhdxImage,
    pub(super) table: &'a Table,
    pub(super) path: &'a Path,
    pub(super) stop: &'a dyn Fn() -> bool,
}

impl Source<'_> {
    /// Moves all blocks into `target`, whose file is at `path`, and makes its structures name them. The caller syncs.
    pub(super) fn move_into(
        &mut self,
        target: &mut Absorber,
        path: &Path,
        way: Way,
    ) -> Result<Moved, MergeError> {
        let mut mover = Mover {
            target,
            path,
            // Data that somebody may read through the structures must be there before them.
            sync: way == Way::InPlace,
            share: way == Way::Clone,
            moved: Moved::default(),
            unflushed: 0,
        };
        for (segment, _) in self.table.digests() {
            if (self.stop)() {
                return Err(MergeError::Stopped);
            }
            self.move_segment(&mut mover, segment)?;
        }
        mover.flush()?;
        Ok(mover.moved)
    }

    fn move_segment(&self, mover: &mut Mover<'_>, segment: u64) -> Result<(), MergeError> {
        let page = self.table.page(segment).map_err(MergeError::table(self.path))?;
        let Some(page) = page else { return Ok(()) };
        let hashes = spread(&page);
        let start = segment * SEGMENT_BYTES;
        let end = (block_count(self.disk_bytes) * BLOCK_BYTES).min(start + SEGMENT_BYTES);
        let extents = self.image.extents(start..end).map_err(MergeError::image(self.path))?;
        let held: Vec<_> =
            extents.into_iter().filter(|(_, from)| *from != image::Source::Parent).collect();
        self.check_agreement(segment, &page.present, &held)?;
        for (range, from) in held {
            for part in mover.split(range.clone()) {
                let from = match from {
                    image::Source::File(at) => Some(at + (part.start - range.start)),
                    _ => None,
                };
                self.move_part(mover, part, from, &hashes, start)?;
            }
        }
        mover.flush_when_due()
    }

    /// Moves a part of one payload block of the target; `from`: where it is in the child's file, `None` for zeros.
    fn move_part(
        &self,
        mover: &mut Mover<'_>,
        part: Range<u64>,
        from: Option<u64>,
        hashes: &[Option<BlockHash>],
        start: u64,
    ) -> Result<(), MergeError> {
        let is_long = part.end - part.start >= LEAST_SHARED;
        if let Some(from) = from.filter(|_| mover.share && is_long)
            && mover.share_range(self.image.file(), from, part.clone())?
        {
            return Ok(());
        }
        let mut at = part.start;
        while at < part.end {
            let is_zero = |at: u64| from.is_none() || self.is_zero(hashes, start, at);
            let (zero, mut end) = (is_zero(at), at + BLOCK_BYTES);
            let most = part.end.min(at + MAX_BATCH_BYTES as u64);
            while end < most && is_zero(end) == zero {
                end += BLOCK_BYTES;
            }
            match from {
                Some(from) if !zero => {
                    let from = from + (at - part.start);
                    self.copy(
                        mover,
                        at..end,
                        from,
                        &hashes[((at - start) / BLOCK_BYTES) as usize..],
                    )?;
                }
                _ => mover.put_zeros(at..end)?,
            }
            at = end;
        }
        Ok(())
    }

    fn is_zero(&self, hashes: &[Option<BlockHash>], start: u64, at: u64) -> bool {
        let index = ((at - start) / BLOCK_BYTES) as usize;
        hashes[index] == Some(zero_hash(block_len(self.disk_bytes, at / BLOCK_BYTES)))
    }

    fn copy(
        &self,
        mover: &mut Mover<'_>,
        range: Range<u64>,
        from: u64,
        hashes: &[Option<BlockHash>],
    ) -> Result<(), MergeError> {
        let mut buffer = Buffer::take();
        let bytes = &mut buffer[..(range.end - range.start) as usize];
        self.image.read_file_at(bytes, from).map_err(MergeError::image(self.path))?;
        let true_len = (self.disk_bytes.min(range.end) - range.start) as usize;
        let mut found = Vec::new();
        hash_blocks(&bytes[..true_len], &mut found);
        if let Some(index) = found.iter().zip(hashes).position(|(a, b)| Some(*a) != *b) {
            let block = range.start / BLOCK_BYTES + index as u64;
            return Err(MergeError::BlockDamaged { snapshot: self.snapshot, block });
        }
        mover.put(range, bytes)
    }

    /// What the table doesn't name has no hash to be checked against.
    fn check_agreement(
        &self,
        segment: u64,
        present: &SegmentBitmap,
        held: &[(Range<u64>, image::Source)],
    ) -> Result<(), MergeError> {
        let mut found = SegmentBitmap::default();
        let disagree = MergeError::Disagree { snapshot: self.snapshot, segment };
        for (range, _) in held {
            if !range.start.is_multiple_of(BLOCK_BYTES) || !range.end.is_multiple_of(BLOCK_BYTES) {
                return Err(disagree);
            }
            for block in range.start / BLOCK_BYTES..range.end / BLOCK_BYTES {
                found.insert((block % SEGMENT_BLOCKS) as usize);
            }
        }
        if found == *present { Ok(()) } else { Err(disagree) }
    }
}

fn spread(page: &Page) -> Vec<Option<BlockHash>> {
    let mut hashes = vec![None; SEGMENT_BLOCKS as usize];
    for (block, hash) in page.present.blocks().zip(&page.hashes) {
        hashes[block] = Some(*hash);
    }
    hashes
}

/// The merged image while it takes blocks in.
struct Mover<'a> {
    target: &'a mut Absorber,
    path: &'a Path,
    sync: bool,
    share: bool,
    moved: Moved,
    unflushed: u64,
}

impl Mover<'_> {
    /// A range in parts that each lie in one payload block of the target.
    fn split(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let (mut parts, mut at) = (Vec::new(), range.start);
        while at < range.end {
            let end = range.end.min(at + self.target.until_block_end(at));
            parts.push(at..end);
            at = end;
        }
        parts
    }

    fn place(&mut self, range: Range<u64>) -> Result<u64, MergeError> {
        self.target.place(range).map_err(MergeError::image(self.path))
    }

    fn put(&mut self, range: Range<u64>, bytes: &[u8]) -> Result<(), MergeError> {
        let at = self.place(range)?;
        self.target.file().write_all_at(bytes, at).map_err(MergeError::io("write", self.path))?;
        self.moved.copied_bytes += bytes.len() as u64;
        self.unflushed += bytes.len() as u64;
        Ok(())
    }

    fn put_zeros(&mut self, range: Range<u64>) -> Result<(), MergeError> {
        let bytes = range.end - range.start;
        let at = self.target.place_zeros(range).map_err(MergeError::image(self.path))?;
        let Some(at) = at else { return Ok(()) };
        self.target.file().punch(at, bytes).map_err(MergeError::io("write", self.path))
    }

    /// Lets the target share a range of the child's file; false where the file system can't.
    fn share_range(
        &mut self,
        child: &File,
        from: u64,
        range: Range<u64>,
    ) -> Result<bool, MergeError> {
        let bytes = range.end - range.start;
        let at = self.place(range)?;
        let shared = self.target.file().clone_range(at, child, from, bytes);
        match shared.map_err(MergeError::io("share", self.path))? {
            Cloning::Done => self.moved.shared_bytes += bytes,
            Cloning::Unsupported => return Ok(false),
        }
        Ok(true)
    }

    fn flush_when_due(&mut self) -> Result<(), MergeError> {
        if self.unflushed < FLUSH_BYTES && self.target.touched() < FLUSH_BLOCKS {
            return Ok(());
        }
        self.flush()
    }

    fn flush(&mut self) -> Result<(), MergeError> {
        self.unflushed = 0;
        let flushed: Result<(), ImageError> = self.target.flush(self.sync);
        flushed.map_err(MergeError::image(self.path))
    }
}
