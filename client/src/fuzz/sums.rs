//! Makes the sums of a volume's structures right, where they are meant to be.

use super::Sparse;
use crate::{
    fs::{Head, ext4},
    source::{gpt, view::ReadAt},
};

/// Structures of one kind that get their sums: no more are needed to reach what is behind them.
const MOST: u64 = 64;

/// Superblock, group descriptors and bitmaps.
pub(super) fn make_ext4_right(volume: &mut Sparse) {
    if groups(volume).is_none() {
        return;
    }
    let mut sb = volume.part(1024, 1024);
    if sb.len() == 1024 {
        let sum = ext4::crc(!0, &sb[..1020]);
        sb[1020..].copy_from_slice(&sum.to_le_bytes());
        volume.patch(1024, &sb);
    }
}

/// `None`: the superblock has no sums, or makes no sense.
fn groups(volume: &mut Sparse) -> Option<()> {
    let sb = volume.part(1024, 1024);
    let head = Head(&sb);
    let (incompat, ro) = (head.u32(0x60)?, head.u32(0x64)?);
    if ro & 0x400 == 0 {
        return None;
    }
    let seed = if incompat & 0x2000 != 0 {
        head.u32(0x270)?
    } else {
        ext4::crc(!0, head.bytes(0x68, 16)?)
    };
    let block = 1024u64 << head.u32(0x18)?.min(6);
    let size = if incompat & 0x80 != 0 { usize::from(head.u16(0xFE)?).min(1024) } else { 32 };
    let clusters = if ro & 0x200 != 0 { head.u32(0x24)? } else { head.u32(0x20)? } / 8;
    let first = (u64::from(head.u32(0x14)?) + 1) * block;
    for number in 0..MOST {
        let at = first + number * size as u64;
        let mut descriptor = volume.part(at, size);
        if descriptor.len() < size || descriptor.iter().all(|byte| *byte == 0) {
            break;
        }
        let bitmap = u64::from(Head(&descriptor).u32(0)?) * block;
        let bitmap = volume.part(bitmap, (clusters as usize).min(block as usize));
        let sum = ext4::crc(seed, &bitmap).to_le_bytes();
        descriptor.get_mut(0x18..0x1A)?.copy_from_slice(&sum[..2]);
        if size >= 64 {
            descriptor.get_mut(0x38..0x3A)?.copy_from_slice(&sum[2..]);
        }
        descriptor.get_mut(0x1E..0x20)?.fill(0);
        let sum = ext4::crc(ext4::crc(seed, &(number as u32).to_le_bytes()), &descriptor);
        descriptor.get_mut(0x1E..0x20)?.copy_from_slice(&(sum as u16).to_le_bytes());
        volume.patch(at, &descriptor);
    }
    Some(())
}

/// Superblock, headers of groups, and blocks of free-space trees.
pub(super) fn make_xfs_right(volume: &mut Sparse) {
    let sb = volume.part(0, 512);
    let field = |at: usize| Head(&sb).be32(at).map_or(0, u64::from);
    let (block, group) = (field(4).clamp(512, 65536), field(84));
    let sector = Head(&sb).be16(102).map_or(512, u64::from).clamp(512, 32768);
    sum_at(volume, 0, sector, 224);
    for number in 0..field(88).min(MOST) {
        sum_at(volume, number * group * block + sector, sector, 216);
    }
    for place in volume.places() {
        if place % block == 0 && matches!(&*volume.part(place, 4), b"AB3B" | b"AB3C") {
            sum_at(volume, place, block, 52);
        }
    }
}

fn sum_at(volume: &mut Sparse, start: u64, len: u64, at: usize) {
    let mut bytes = volume.part(start, len as usize);
    if let Some(sum) = bytes.get_mut(at..at + 4) {
        sum.fill(0);
        let sum = crc32c::crc32c(&bytes);
        volume.patch(start + at as u64, &sum.to_le_bytes());
    }
}

/// Both headers of a GPT, and the entries that they name.
pub(super) fn make_gpt_right(disk: &mut Sparse) {
    for sector in [512, 4096] {
        for at in [sector, (disk.len() / sector).saturating_sub(1) * sector] {
            let mut header = disk.part(at, 512);
            let read = |header: &[u8]| {
                let head = Head(header);
                let len = (head.u32(80)?.min(1024) * head.u32(84)?.min(4096)) as usize;
                let entries = head.u64(72)?.checked_mul(sector)?;
                let length = head.u32(12).map(|length| length as usize)?;
                (head.is(0, b"EFI PART") && (92..=512).contains(&length))
                    .then_some((entries, len, length))
            };
            let Some((entries, len, length)) = read(&header) else { continue };
            let sum = gpt::crc32(&disk.part(entries, len));
            header[88..92].copy_from_slice(&sum.to_le_bytes());
            header[16..20].fill(0);
            let sum = gpt::crc32(&header[..length]);
            header[16..20].copy_from_slice(&sum.to_le_bytes());
            disk.patch(at, &header);
        }
    }
}
