//! The superblock of XFS, checked, and where it puts things.

use crate::{
    fs::{FsError, Head},
    source::view::ReadAt,
};

const BYTES: usize = 512;
const MAX_GROUPS: u32 = 1 << 20;
/// finobt, rmapbt, reflink, inobtcount.
const KNOWN_RO: u32 = 0xF;
/// ftype, spinodes, meta_uuid, bigtime, nrext64, exchange-range, parent.
const KNOWN_INCOMPAT: u32 = 0xEF;
const META_UUID: u32 = 0x4;
const NEEDS_REPAIR: u32 = 0x10;

#[derive(Debug)]
pub(super) struct Superblock {
    pub(super) block_bytes: u64,
    pub(super) sector_bytes: usize,
    pub(super) groups: u32,
    pub(super) is_v5: bool,
    /// In the headers of structures.
    pub(super) uuid: [u8; 16],
    /// In the log.
    pub(super) log_uuid: [u8; 16],
    /// First byte and bytes of the log.
    pub(super) log: (u64, u64),
    blocks: u64,
    group_blocks: u32,
}

impl Superblock {
    pub(super) fn read(volume: &dyn ReadAt) -> Result<Self, FsError> {
        let mut sector = vec![0; BYTES];
        volume.read_exact_at(&mut sector, 0)?;
        let damaged = || FsError::damaged("superblock");
        let sector_bytes = Head(&sector).be16(102).map(usize::from);
        let sector_bytes = sector_bytes
            .filter(|bytes| bytes.is_power_of_two() && (512..=32768).contains(bytes))
            .ok_or_else(damaged)?;
        sector.resize(sector_bytes, 0);
        volume.read_exact_at(&mut sector, 0)?;
        let sb = Self::parse(&sector).ok_or_else(damaged)??;
        let end = sb.blocks.checked_mul(sb.block_bytes).ok_or_else(damaged)?;
        if end > volume.len() { Err(damaged()) } else { Ok(sb) }
    }

    /// `None`: a field makes no sense.
    fn parse(sector: &[u8]) -> Option<Result<Self, FsError>> {
        let head = Head(sector);
        if !head.is(0, b"XFSB") {
            return None;
        }
        let is_v5 = match head.be16(100)? & 0xF {
            4 => false,
            5 => true,
            other => return Some(Err(FsError::unsupported(format!("XFS version {other}")))),
        };
        let log_uuid = *head.bytes(32, 16)?.first_chunk()?;
        let mut uuid = log_uuid;
        if is_v5 {
            let (ro, incompat) = (head.be32(212)?, head.be32(216)?);
            if ro & !KNOWN_RO != 0 || incompat & !(KNOWN_INCOMPAT | NEEDS_REPAIR) != 0 {
                let what = format!("features {incompat:#x} and {ro:#x} of XFS");
                return Some(Err(FsError::unsupported(what)));
            }
            if incompat & NEEDS_REPAIR != 0 || head.be32(220)? != 0 {
                return Some(Err(FsError::not_clean("its superblock asks for repair or recovery")));
            }
            if incompat & META_UUID != 0 {
                uuid = *head.bytes(248, 16)?.first_chunk()?;
            }
        }
        if head.u8(126)? != 0 {
            return Some(Err(FsError::not_clean("it is still being made")));
        }
        let (log_start, log_blocks) = (head.be64(48)?, u64::from(head.be32(96)?));
        if log_start == 0 {
            return Some(Err(FsError::unsupported("a log on another device")));
        }
        let block_bytes = u64::from(head.be32(4)?);
        let (blocks, group_blocks, groups) = (head.be64(8)?, head.be32(84)?, head.be32(88)?);
        let group_log = u32::from(head.u8(124)?);
        let sane = block_bytes.is_power_of_two()
            && (512..=65536).contains(&block_bytes)
            && sector.len() as u64 <= block_bytes
            && (64..=1 << 31).contains(&group_blocks)
            && group_log == group_blocks.next_power_of_two().trailing_zeros()
            && blocks.div_ceil(group_blocks.into()) == u64::from(groups)
            && (1..=MAX_GROUPS).contains(&groups)
            && (1..=u64::from(group_blocks)).contains(&log_blocks);
        if !sane {
            return None;
        }
        let log_group = log_start >> group_log;
        let log_at = log_group.checked_mul(group_blocks.into())? + log_start % (1 << group_log);
        if log_at.checked_add(log_blocks).is_none_or(|end| end > blocks) {
            return None;
        }
        let sb = Self {
            block_bytes,
            sector_bytes: sector.len(),
            groups,
            is_v5,
            uuid,
            log_uuid,
            log: (log_at.checked_mul(block_bytes)?, log_blocks * block_bytes),
            blocks,
            group_blocks,
        };
        (!is_v5 || sb.sum_is_right(sector, 224)).then_some(Ok(sb))
    }

    /// Blocks of a group: the last one may be short.
    pub(super) fn group_blocks(&self, group: u32) -> u64 {
        let before = u64::from(group) * u64::from(self.group_blocks);
        self.blocks.saturating_sub(before).min(self.group_blocks.into())
    }

    /// Where a block of a group is on the volume.
    pub(super) fn offset(&self, group: u32, block: u32) -> u64 {
        (u64::from(group) * u64::from(self.group_blocks) + u64::from(block)) * self.block_bytes
    }

    pub(super) fn tree_header_bytes(&self) -> usize {
        if self.is_v5 { 56 } else { 16 }
    }

    /// Records that a block of a free-space tree has room for.
    pub(super) fn most_records(&self, is_leaf: bool) -> usize {
        (self.block_bytes as usize - self.tree_header_bytes()) / if is_leaf { 8 } else { 12 }
    }

    /// True when the CRC-32C that stands at `at` is that of all other bytes.
    pub(super) fn sum_is_right(&self, bytes: &[u8], at: usize) -> bool {
        let (Some(sum), Some(rest)) = (Head(bytes).u32(at), bytes.get(at + 4..)) else {
            return false;
        };
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..at]), &[0; 4]);
        crc32c::crc32c_append(crc, rest) == sum
    }
}
