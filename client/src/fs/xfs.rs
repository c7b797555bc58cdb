//! Free space of XFS, by the free-space trees of its allocation groups.
//!
//! Believed only when the log is clean: its last record, found where the cycle numbers of its blocks change, is the record of
//! an unmount. (A frozen XFS has a log to be replayed, on purpose.) All of this must agree, too: checksums and owners where the
//! file system has them (version 5), ascending records within the group, and the group's count of free blocks. Blocks of the
//! groups' free lists, which the trees grow from, are used. Layout: "XFS Algorithms & Data Structures", 3rd edition.

use super::{Free, FsError, Head};
use janus_proto::ranges::Ranges;

use crate::source::view::ReadAt;

mod log;
mod superblock;

use self::superblock::Superblock;

const NULL_BLOCK: u32 = u32::MAX;
const MAX_LEVELS: u32 = 9;

/// The bytes of `volume` that nothing uses.
///
/// # Errors
/// When that can't be proven.
pub fn free(volume: &dyn ReadAt) -> Result<Ranges, FsError> {
    let sb = Superblock::read(volume)?;
    log::check_clean(volume, &sb)?;
    let mut free = Free::default();
    for number in 0..sb.groups {
        let group = Group::read(volume, &sb, number)?;
        let damaged = || FsError::damaged(format!("free-space tree of group {number}"));
        group.walk(volume, &sb, &mut free)?.ok_or_else(damaged)?;
    }
    Ok(free.0)
}

/// What the header of a group's free space says.
struct Group {
    number: u32,
    blocks: u32,
    root: u32,
    levels: u32,
    free_blocks: u32,
}

impl Group {
    fn read(volume: &dyn ReadAt, sb: &Superblock, number: u32) -> Result<Self, FsError> {
        let mut sector = vec![0; sb.sector_bytes];
        volume.read_exact_at(&mut sector, sb.offset(number, 0) + sb.sector_bytes as u64)?;
        let head = Head(&sector);
        let read = || {
            let is_ours = head.is(0, b"XAGF")
                && head.be32(4)? == 1
                && head.be32(8)? == number
                && (!sb.is_v5 || head.bytes(64, 16)? == sb.uuid && sb.sum_is_right(&sector, 216));
            let group = Self {
                number,
                blocks: head.be32(12)?,
                root: head.be32(16)?,
                levels: head.be32(28)?,
                free_blocks: head.be32(52)?,
            };
            let is_sane = u64::from(group.blocks) == sb.group_blocks(number)
                && (1..=MAX_LEVELS).contains(&group.levels);
            (is_ours && is_sane).then_some(group)
        };
        read().ok_or_else(|| FsError::damaged(format!("header of group {number}")))
    }

    /// Adds what the leaves of the tree name; `None` when they make no sense.
    fn walk(
        &self,
        volume: &dyn ReadAt,
        sb: &Superblock,
        free: &mut Free,
    ) -> Result<Option<()>, FsError> {
        let mut at = self.root;
        for level in (1..self.levels).rev() {
            let Some(block) = self.block(volume, sb, at, level)? else { return Ok(None) };
            let Some(first) = block.first_child(sb) else { return Ok(None) };
            at = first;
        }
        // Records ascend, so a chain that turns back ends here.
        let (mut end, mut total) = (0, 0);
        loop {
            let Some(leaf) = self.block(volume, sb, at, 0)? else { return Ok(None) };
            if leaf.records == 0 && leaf.right != NULL_BLOCK {
                return Ok(None);
            }
            for index in 0..leaf.records {
                let Some((start, count)) = leaf.record(sb, index) else { return Ok(None) };
                let next = u64::from(start) + u64::from(count);
                if count == 0 || u64::from(start) < end || next > self.blocks.into() {
                    return Ok(None);
                }
                (end, total) = (next, total + u64::from(count));
                free.push(
                    sb.offset(self.number, start)
                        ..sb.offset(self.number, start) + u64::from(count) * sb.block_bytes,
                );
            }
            if leaf.right == NULL_BLOCK {
                return Ok((total == u64::from(self.free_blocks)).then_some(()));
            }
            at = leaf.right;
        }
    }

    fn block(
        &self,
        volume: &dyn ReadAt,
        sb: &Superblock,
        at: u32,
        level: u32,
    ) -> Result<Option<TreeBlock>, FsError> {
        if at >= self.blocks {
            return Ok(None);
        }
        let mut bytes = vec![0; sb.block_bytes as usize];
        let offset = sb.offset(self.number, at);
        volume.read_exact_at(&mut bytes, offset)?;
        Ok(TreeBlock::parse(bytes, sb, self.number, offset, level))
    }
}

/// A block of a free-space tree.
struct TreeBlock {
    bytes: Vec<u8>,
    records: usize,
    right: u32,
}

impl TreeBlock {
    fn parse(bytes: Vec<u8>, sb: &Superblock, group: u32, offset: u64, level: u32) -> Option<Self> {
        let head = Head(&bytes);
        let (records, right) = (usize::from(head.be16(6)?), head.be32(12)?);
        let is_ours = if sb.is_v5 {
            head.is(0, b"AB3B")
                && head.be64(16)? == offset / 512
                && head.bytes(32, 16)? == sb.uuid
                && head.be32(48)? == group
                && sb.sum_is_right(&bytes, 52)
        } else {
            head.is(0, b"ABTB")
        };
        let is_sane = u32::from(head.be16(4)?) == level && records <= sb.most_records(level == 0);
        (is_ours && is_sane).then_some(Self { bytes, records, right })
    }

    fn record(&self, sb: &Superblock, index: usize) -> Option<(u32, u32)> {
        let (head, at) = (Head(&self.bytes), sb.tree_header_bytes() + index * 8);
        Some((head.be32(at)?, head.be32(at + 4)?))
    }

    fn first_child(&self, sb: &Superblock) -> Option<u32> {
        let at = sb.tree_header_bytes() + sb.most_records(false) * 8;
        Head(&self.bytes).be32(at).filter(|_| self.records > 0)
    }
}
