//! Free space of XFS, by the free-space trees of its allocation groups.
//!
//! Believed only when the log is clean: its last record, found where the cycle numbers of its blocks change, is the record of
//! an unmount. (A frozen XFS has a log to be replayed, on purpose.) All of this must agree, too: checksums and owners where the
//! file system has them (version 5), else the group's other tree of the same extents, by their length; ascending records within
//! the group, and the group's count of free blocks. Blocks of the groups' free lists, which the trees grow from, are used. Layout: "XFS Algorithms & Data Structures", 3rd edition.

use super::{Free, FsError, Head};
use janus_proto::ranges::Ranges;

use crate::source::view::ReadAt;

mod log;
mod superblock;

use self::superblock::Superblock;

const NULL_BLOCK: u32 = u32::MAX;
const MAX_LEVELS: u32 = 9;
/// Free extents of one group that are kept at once: 128 MiB of memory. A group in more pieces counts as used.
const MANY_EXTENTS: usize = 1 << 24;

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
        let mut extents = group.walk(volume, &sb, group.by_place)?.ok_or_else(damaged)?;
        if !sb.is_v5 {
            // Nothing sums these blocks up: a second tree that says the same is the witness.
            let mut others = group.walk(volume, &sb, group.by_length)?.ok_or_else(damaged)?;
            others.sort_unstable();
            if others != extents {
                return Err(damaged());
            }
        }
        for (start, count) in extents.drain(..) {
            let start = sb.offset(number, start);
            free.push(start..start + u64::from(count) * sb.block_bytes);
        }
    }
    Ok(free.0)
}

/// What the header of a group's free space says.
struct Group {
    number: u32,
    blocks: u32,
    by_place: Tree,
    by_length: Tree,
    free_blocks: u32,
}

/// One of a group's trees of free extents.
#[derive(Clone, Copy)]
struct Tree {
    root: u32,
    levels: u32,
    by_length: bool,
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
                by_place: Tree { root: head.be32(16)?, levels: head.be32(28)?, by_length: false },
                by_length: Tree { root: head.be32(20)?, levels: head.be32(32)?, by_length: true },
                free_blocks: head.be32(52)?,
            };
            let is_sane = u64::from(group.blocks) == sb.group_blocks(number)
                && [group.by_place, group.by_length]
                    .iter()
                    .all(|tree| (1..=MAX_LEVELS).contains(&tree.levels));
            (is_ours && is_sane).then_some(group)
        };
        read().ok_or_else(|| FsError::damaged(format!("header of group {number}")))
    }

    /// Start and length of what the leaves of a tree name, as far as memory is bounded; `None` when they make no sense.
    fn walk(
        &self,
        volume: &dyn ReadAt,
        sb: &Superblock,
        tree: Tree,
    ) -> Result<Option<Vec<(u32, u32)>>, FsError> {
        let mut at = tree.root;
        for level in (1..tree.levels).rev() {
            let Some(block) = self.block(volume, sb, at, (tree, level))? else { return Ok(None) };
            let Some(first) = block.first_child(sb) else { return Ok(None) };
            at = first;
        }
        // Records ascend, so a chain that turns back ends here.
        let (mut extents, mut order, mut total) = (Vec::new(), (0, 0), 0);
        loop {
            let Some(leaf) = self.block(volume, sb, at, (tree, 0))? else { return Ok(None) };
            if leaf.records == 0 && leaf.right != NULL_BLOCK {
                return Ok(None);
            }
            for index in 0..leaf.records {
                let Some((start, count)) = leaf.record(sb, index) else { return Ok(None) };
                let next = u64::from(start) + u64::from(count);
                let key = if tree.by_length { (count.into(), next) } else { (start.into(), next) };
                if count == 0 || key < order || next > self.blocks.into() {
                    return Ok(None);
                }
                order = if tree.by_length { (key.0, next + 1) } else { (next, 0) };
                total += u64::from(count);
                extents.push((start, count));
            }
            if total > self.free_blocks.into() || extents.len() > MANY_EXTENTS {
                return Ok(None);
            }
            if leaf.right == NULL_BLOCK {
                return Ok((total == u64::from(self.free_blocks)).then_some(extents));
            }
            at = leaf.right;
        }
    }

    fn block(
        &self,
        volume: &dyn ReadAt,
        sb: &Superblock,
        at: u32,
        place: (Tree, u32),
    ) -> Result<Option<TreeBlock>, FsError> {
        if at >= self.blocks {
            return Ok(None);
        }
        let mut bytes = vec![0; sb.block_bytes as usize];
        let offset = sb.offset(self.number, at);
        volume.read_exact_at(&mut bytes, offset)?;
        Ok(TreeBlock::parse(bytes, sb, self.number, offset, place))
    }
}

/// A block of a free-space tree.
struct TreeBlock {
    bytes: Vec<u8>,
    records: usize,
    right: u32,
}

impl TreeBlock {
    fn parse(
        bytes: Vec<u8>,
        sb: &Superblock,
        group: u32,
        offset: u64,
        (tree, level): (Tree, u32),
    ) -> Option<Self> {
        let head = Head(&bytes);
        let (records, right) = (usize::from(head.be16(6)?), head.be32(12)?);
        let is_ours = if sb.is_v5 {
            head.is(0, if tree.by_length { b"AB3C" } else { b"AB3B" })
                && head.be64(16)? == offset / 512
                && head.bytes(32, 16)? == sb.uuid
                && head.be32(48)? == group
                && sb.sum_is_right(&bytes, 52)
        } else {
            head.is(0, if tree.by_length { b"ABTC" } else { b"ABTB" })
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
