//! Whether the log of an XFS is clean.
//!
//! The log is a ring of records. Each of its 512-byte blocks carries the number of the cycle that wrote it, so the newest record
//! ends where that number falls. Clean is only a log whose newest record is that of an unmount, as `xlog_check_unmount_rec` of
//! Linux has it; the blocks around it must tell one story, where a log that was being written may not.

use super::superblock::Superblock;
use crate::{
    fs::{FsError, Head},
    source::view::ReadAt,
};

const BLOCK: u64 = 512;
const MAGIC: u32 = 0xFEED_BABE;
/// Blocks on both sides of the end that are looked at: all that can be in flight at once (8 buffers of 256 KiB).
const IN_FLIGHT: u64 = 4096;
/// Blocks of the longest record, with its headers.
const LONGEST: u64 = 512 + 8;
const UNMOUNT: u8 = 0x20;

struct Log<'a> {
    volume: &'a dyn ReadAt,
    start: u64,
    blocks: u64,
}

/// # Errors
/// [`FsError::NotClean`] when the log is not proven to be clean.
pub(super) fn check_clean(volume: &dyn ReadAt, sb: &Superblock) -> Result<(), FsError> {
    let log = Log { volume, start: sb.log.0, blocks: sb.log.1 / BLOCK };
    let unclear = || FsError::not_clean("its log is to be replayed");
    let end = log.end()?.ok_or_else(unclear)?;
    if log.ends_with_unmount(end, sb)? { Ok(()) } else { Err(unclear()) }
}

impl Log<'_> {
    fn block(&self, index: u64) -> Result<[u8; BLOCK as usize], FsError> {
        let mut bytes = [0; BLOCK as usize];
        self.volume.read_exact_at(&mut bytes, self.start + index % self.blocks * BLOCK)?;
        Ok(bytes)
    }

    fn cycle(&self, index: u64) -> Result<u32, FsError> {
        let block = self.block(index)?;
        let head = Head(&block);
        let at = if head.be32(0) == Some(MAGIC) { 4 } else { 0 };
        Ok(head.be32(at).unwrap_or_default())
    }

    /// The first block behind the newest record; `None` when blocks tell no clear story.
    fn end(&self) -> Result<Option<u64>, FsError> {
        let first = self.cycle(0)?;
        if first == 0 {
            return Ok(None);
        }
        // Invariant: block `low` is of the first block's cycle, block `high` is not, or is the end.
        let (mut low, mut high) = (0, self.blocks);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.cycle(middle)? == first { low = middle } else { high = middle }
        }
        for index in high.saturating_sub(IN_FLIGHT)..high {
            if self.cycle(index)? != first {
                return Ok(None);
            }
        }
        let older = self.cycle(self.blocks - 1)?;
        let falls = high == self.blocks || older == 0 || older == first - 1;
        for index in high..(high + IN_FLIGHT).min(self.blocks) {
            if self.cycle(index)? != older {
                return Ok(None);
            }
        }
        Ok(falls.then_some(high))
    }

    /// True when the record that ends before block `end` is that of an unmount.
    fn ends_with_unmount(&self, end: u64, sb: &Superblock) -> Result<bool, FsError> {
        for back in 2..=LONGEST.min(self.blocks) {
            let at = end + self.blocks - back;
            let block = self.block(at)?;
            let head = Head(&block);
            if head.be32(0) != Some(MAGIC) {
                continue;
            }
            let read = || {
                let len = u64::from(head.be32(12)?);
                let size = u64::from(head.be32(320)?);
                let headers =
                    if head.be32(8)? & 2 != 0 { size.div_ceil(32 << 10).max(1) } else { 1 };
                let is_last = headers + len.div_ceil(BLOCK) == back && head.be32(40)? == 1;
                let is_ours = head.bytes(304, 16)? == sb.log_uuid;
                (is_last && is_ours).then_some(headers)
            };
            let Some(headers) = read() else { return Ok(false) };
            let body = self.block(at + headers)?;
            return Ok(Head(&body).u8(9).is_some_and(|flags| flags & UNMOUNT != 0));
        }
        Ok(false)
    }
}
