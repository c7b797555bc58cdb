//! Free space of ext2, ext3 and ext4, by their block bitmaps.
//!
//! Believed only when the file system was unmounted or frozen (no journal to be replayed, no errors noted), knows no feature
//! that isn't known here, and all of this agrees: checksums of superblock, group descriptors and bitmaps where it has them,
//! and each group's count of free blocks with its bitmap. (Without `metadata_csum` nothing else witnesses a bitmap: wrong
//! bits that cancel out are believed.) Superblocks, descriptors, bitmaps and inode tables are used,
//! whatever a bitmap says. Layout: Documentation/filesystems/ext4 of Linux.

use super::{Free, FsError, zero_bits};
use janus_proto::ranges::Ranges;

use crate::source::view::ReadAt;

mod group;
mod superblock;

pub(crate) use self::superblock::crc;
use self::{group::Group, superblock::Superblock};

/// The bytes of `volume` that nothing uses.
///
/// # Errors
/// When that can't be proven.
pub fn free(volume: &dyn ReadAt) -> Result<Ranges, FsError> {
    let sb = Superblock::read(volume)?;
    let mut groups = Vec::with_capacity(sb.groups as usize);
    let mut table = Vec::new();
    for number in 0..sb.groups {
        let (block, at) = sb.descriptor_place(number);
        if at == 0 {
            table = sb.read_block(volume, block)?;
        }
        let bytes = table.get(at..at + sb.descriptor_bytes);
        let bytes = bytes.ok_or_else(|| FsError::damaged("descriptors end early"))?;
        groups.push(Group::parse(&sb, number, bytes)?);
    }
    let metadata = metadata(&sb, &groups);
    let mut free = Free::default();
    for group in &groups {
        add_free(volume, &sb, group, &metadata, &mut free)?;
    }
    Ok(free.0)
}

/// What holds the file system's own structures, in bytes and whole clusters.
fn metadata(sb: &Superblock, groups: &[Group]) -> Ranges {
    let mut used = Vec::with_capacity(groups.len() * 4);
    for group in groups {
        let first = sb.first_block(group.number);
        used.push(first..first + sb.base_blocks(group.number));
        used.push(group.block_bitmap..group.block_bitmap + 1);
        used.push(group.inode_bitmap..group.inode_bitmap + 1);
        used.push(group.inode_table..group.inode_table + sb.inode_table_blocks);
    }
    Ranges::from(used).scaled(sb.block_bytes).outward(sb.cluster_bytes())
}

fn add_free(
    volume: &dyn ReadAt,
    sb: &Superblock,
    group: &Group,
    metadata: &Ranges,
    free: &mut Free,
) -> Result<(), FsError> {
    let first = sb.first_block(group.number) * sb.block_bytes;
    let end = (sb.blocks * sb.block_bytes).min(first + sb.group_bytes());
    let unused = if group.is_uninit {
        Ranges::from(first..end)
    } else {
        let bitmap = sb.read_block(volume, group.block_bitmap)?;
        group.check_bitmap(sb, &bitmap)?;
        let cluster = sb.cluster_bytes();
        let clusters = zero_bits(&bitmap, (end - first).div_ceil(cluster)).scaled(cluster);
        // The last cluster may be cut off.
        clusters.shift(first).intersect(&(first..end).into())
    };
    let known = unused.subtract(metadata);
    // A bitmap that calls structures free is as wrong as a count that differs from it.
    if known.total().div_ceil(sb.cluster_bytes()) != group.free_clusters {
        return Err(FsError::damaged(format!(
            "group {}: the count of free blocks is not that of its bitmap",
            group.number
        )));
    }
    known.iter().for_each(|range| free.push(range));
    Ok(())
}
