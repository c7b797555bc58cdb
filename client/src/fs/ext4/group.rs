//! Group descriptors of ext4, checked.

use super::superblock::{Sums, Superblock, crc};
use crate::fs::{FsError, Head};

const BLOCK_UNINIT: u16 = 0x2;
const SUM: usize = 0x1E;

#[derive(Debug)]
pub(super) struct Group {
    pub(super) number: u64,
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
    pub(super) free_clusters: u64,
    /// Its bitmap was never written: all but structures is free.
    pub(super) is_uninit: bool,
    bitmap_sum: u32,
}

impl Group {
    pub(super) fn parse(sb: &Superblock, number: u64, bytes: &[u8]) -> Result<Self, FsError> {
        let damaged = || FsError::damaged(format!("descriptor of group {number}"));
        let head = Head(bytes);
        if !sum_is_right(sb, number, bytes) {
            return Err(damaged());
        }
        let low = |at| head.u32(at).map(u64::from);
        let is_large = sb.descriptor_bytes >= 64;
        let read = || {
            let high = |at| if is_large { low(at) } else { Some(0) };
            let high16 = |at| if is_large { head.u16(at) } else { Some(0) };
            Some(Self {
                number,
                block_bitmap: low(0)? | high(0x20)? << 32,
                inode_bitmap: low(4)? | high(0x24)? << 32,
                inode_table: low(8)? | high(0x28)? << 32,
                free_clusters: u64::from(head.u16(0xC)?) | u64::from(high16(0x2C)?) << 16,
                is_uninit: sb.sums != Sums::None && head.u16(0x12)? & BLOCK_UNINIT != 0,
                bitmap_sum: u32::from(head.u16(0x18)?) | u32::from(high16(0x38)?) << 16,
            })
        };
        let group = read().ok_or_else(damaged)?;
        let within =
            |block: u64, count: u64| block > 0 && block < sb.blocks && sb.blocks - block >= count;
        let is_within = within(group.block_bitmap, 1)
            && within(group.inode_bitmap, 1)
            && within(group.inode_table, sb.inode_table_blocks);
        if is_within { Ok(group) } else { Err(damaged()) }
    }

    pub(super) fn check_bitmap(&self, sb: &Superblock, bitmap: &[u8]) -> Result<(), FsError> {
        let Sums::All(seed) = sb.sums else { return Ok(()) };
        let used = bitmap.get(..(sb.clusters_per_group / 8) as usize).unwrap_or(bitmap);
        let mask = if sb.descriptor_bytes >= 64 { u32::MAX } else { 0xFFFF };
        if crc(seed, used) & mask == self.bitmap_sum {
            return Ok(());
        }
        Err(FsError::damaged(format!("checksum of the bitmap of group {}", self.number)))
    }
}

fn sum_is_right(sb: &Superblock, number: u64, bytes: &[u8]) -> bool {
    let Some((before, rest)) = bytes.split_at_checked(SUM) else { return false };
    let Some((sum, rest)) = rest.split_first_chunk() else { return false };
    let number = (number as u32).to_le_bytes();
    let expected = match sb.sums {
        Sums::None => return true,
        Sums::All(seed) => {
            let parts: [&[u8]; 4] = [&number, before, &[0, 0], rest];
            parts.into_iter().fold(seed, crc) as u16
        }
        Sums::Descriptors => {
            let parts: [&[u8]; 4] = [&sb.uuid, &number, before, rest];
            parts.into_iter().fold(!0, crc16)
        }
    };
    u16::from_le_bytes(*sum) == expected
}

/// CRC-16 with the polynomial 0x8005, reflected.
fn crc16(seed: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(seed, |crc, byte| {
        (0..8)
            .fold(crc ^ u16::from(*byte), |crc, _| (crc >> 1) ^ (0xA001 & (crc & 1).wrapping_neg()))
    })
}
