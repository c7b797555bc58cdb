//! The superblock of ext4, checked, and where it puts things.

use crate::{
    fs::{FsError, Head},
    source::view::ReadAt,
};

const OFFSET: u64 = 1024;
const BYTES: usize = 1024;
/// Groups that are read; with the usual 128 MiB each, 128 TiB.
const MAX_GROUPS: u64 = 1 << 20;

const RECOVER: u32 = 0x4;
const META_BG: u32 = 0x10;
const BIT64: u32 = 0x80;
const CSUM_SEED: u32 = 0x2000;
/// filetype, recover, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed, largedir, inline_data, encrypt, casefold.
const KNOWN_INCOMPAT: u32 = 0x3_E7D6;
const SPARSE_SUPER: u32 = 0x1;
const GDT_CSUM: u32 = 0x10;
const BIGALLOC: u32 = 0x200;
const METADATA_CSUM: u32 = 0x400;
/// All up to orphan_present but has_snapshot, replica and shared_blocks.
const KNOWN_RO: u32 = 0x1_B77F;
const CHECKSUM_TYPE: usize = 0x175;
const SPARSE_SUPER2: u32 = 0x200;

/// How group descriptors and bitmaps are summed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sums {
    /// Not at all.
    None,
    /// Descriptors only, by CRC-16.
    Descriptors,
    /// Both, by CRC-32C from this seed.
    All(u32),
}

#[derive(Debug)]
pub(super) struct Superblock {
    pub(super) block_bytes: u64,
    pub(super) blocks: u64,
    pub(super) groups: u64,
    pub(super) descriptor_bytes: usize,
    pub(super) inode_table_blocks: u64,
    pub(super) clusters_per_group: u64,
    pub(super) sums: Sums,
    pub(super) uuid: [u8; 16],
    first_data_block: u64,
    blocks_per_group: u64,
    cluster_ratio: u64,
    first_meta_group: Option<u64>,
    reserved_gdt_blocks: u64,
    backups: Backups,
}

/// Which groups have a copy of the superblock.
#[derive(Debug)]
enum Backups {
    All,
    Sparse,
    Two([u64; 2]),
}

impl Superblock {
    pub(super) fn read(volume: &dyn ReadAt) -> Result<Self, FsError> {
        let mut bytes = [0; BYTES];
        volume.read_exact_at(&mut bytes, OFFSET)?;
        Self::parse(&bytes, volume.len()).ok_or_else(|| FsError::damaged("superblock"))?
    }

    /// `None`: a field is not there, or a sum of them overflows.
    fn parse(bytes: &[u8; BYTES], volume_bytes: u64) -> Option<Result<Self, FsError>> {
        let head = Head(bytes);
        if head.u16(0x38)? != 0xEF53 {
            return Some(Err(FsError::damaged("no superblock")));
        }
        // The first revision has fixed sizes and no features.
        let is_dynamic = head.u32(0x4C)? > 0;
        let feature = |at| if is_dynamic { head.u32(at) } else { Some(0) };
        let (compat, incompat, ro) = (feature(0x5C)?, feature(0x60)?, feature(0x64)?);
        let uuid = *head.bytes(0x68, 16)?.first_chunk()?;
        let sums = if ro & METADATA_CSUM != 0 {
            let seed = if incompat & CSUM_SEED != 0 { head.u32(0x270)? } else { crc(!0, &uuid) };
            Sums::All(seed)
        } else if ro & GDT_CSUM != 0 {
            Sums::Descriptors
        } else {
            Sums::None
        };
        if let Err(error) = check(head, incompat, ro) {
            return Some(Err(error));
        }
        let log_block = head.u32(0x18).filter(|log| *log <= 6)?;
        let block_bytes = 1024u64 << log_block;
        let log_cluster = if ro & BIGALLOC != 0 { head.u32(0x1C)? } else { log_block };
        let cluster_log = log_cluster.checked_sub(log_block).filter(|log| *log <= 16)?;
        let high = |at| if incompat & BIT64 != 0 { head.u32(at) } else { Some(0) };
        let blocks = u64::from(head.u32(4)?) | u64::from(high(0x150)?) << 32;
        let blocks_per_group = u64::from(head.u32(0x20)?);
        let cluster_ratio = 1 << cluster_log;
        let clusters_per_group =
            if ro & BIGALLOC != 0 { head.u32(0x24)?.into() } else { blocks_per_group };
        let first_data_block = u64::from(head.u32(0x14)?);
        let inode_bytes = if is_dynamic { head.u16(0x58)? } else { 128 };
        let inodes = u64::from(head.u32(0x28)?);
        let descriptor_bytes = match (incompat & BIT64, head.u16(0xFE)?) {
            (0, _) => 32,
            (_, bytes @ 64..=1024) if bytes.is_power_of_two() => bytes.into(),
            _ => return None,
        };
        let groups = blocks.checked_sub(first_data_block)?.div_ceil(blocks_per_group.max(1));
        let sane = blocks.checked_mul(block_bytes)? <= volume_bytes
            && clusters_per_group.is_multiple_of(8)
            && (256..=block_bytes * 8).contains(&clusters_per_group)
            && clusters_per_group * cluster_ratio == blocks_per_group
            && first_data_block == u64::from(block_bytes == 1024)
            && (cluster_ratio == 1 || first_data_block == 0)
            && (128..=block_bytes).contains(&inode_bytes.into());
        if !sane {
            return Some(Err(FsError::damaged("sizes in the superblock")));
        }
        if groups > MAX_GROUPS {
            return Some(Err(FsError::unsupported(format!("{groups} groups"))));
        }
        let backups = match (compat & SPARSE_SUPER2, ro & SPARSE_SUPER) {
            (0, 0) => Backups::All,
            (0, _) => Backups::Sparse,
            _ => Backups::Two([head.u32(0x24C)?.into(), head.u32(0x250)?.into()]),
        };
        Some(Ok(Self {
            block_bytes,
            blocks,
            groups,
            descriptor_bytes,
            inode_table_blocks: (inodes * u64::from(inode_bytes)).div_ceil(block_bytes),
            clusters_per_group,
            sums,
            uuid,
            first_data_block,
            blocks_per_group,
            cluster_ratio,
            first_meta_group: (incompat & META_BG != 0).then_some(head.u32(0x104)?.into()),
            reserved_gdt_blocks: head.u16(0xCE)?.into(),
            backups,
        }))
    }

    pub(super) fn read_block(&self, volume: &dyn ReadAt, block: u64) -> Result<Vec<u8>, FsError> {
        let mut bytes = vec![0; self.block_bytes as usize];
        volume.read_exact_at(&mut bytes, block.saturating_mul(self.block_bytes))?;
        Ok(bytes)
    }

    pub(super) fn cluster_bytes(&self) -> u64 {
        self.block_bytes * self.cluster_ratio
    }

    pub(super) fn group_bytes(&self) -> u64 {
        self.block_bytes * self.blocks_per_group
    }

    pub(super) fn first_block(&self, group: u64) -> u64 {
        self.first_data_block + group * self.blocks_per_group
    }

    /// The block that holds the descriptor of `group`, and where in it.
    pub(super) fn descriptor_place(&self, group: u64) -> (u64, usize) {
        let per_block = self.descriptors_per_block();
        let number = group / per_block;
        let block = match self.first_meta_group {
            Some(first) if number >= first => {
                let group = number * per_block;
                self.first_block(group) + u64::from(self.has_superblock(group))
            }
            _ => self.first_data_block + 1 + number,
        };
        (block, (group % per_block) as usize * self.descriptor_bytes)
    }

    /// Blocks at the start of `group` that hold copies of the superblock and of descriptors, or are kept for more of these.
    pub(super) fn base_blocks(&self, group: u64) -> u64 {
        let per_block = self.descriptors_per_block();
        let superblock = u64::from(self.has_superblock(group));
        match self.first_meta_group {
            Some(first) if group / per_block >= first => {
                let within = group % per_block;
                superblock + u64::from(within <= 1 || within == per_block - 1)
            }
            _ if superblock == 0 => 0,
            first => {
                let all = self.groups.div_ceil(per_block);
                superblock + first.unwrap_or(all).min(all) + self.reserved_gdt_blocks
            }
        }
    }

    fn descriptors_per_block(&self) -> u64 {
        self.block_bytes / self.descriptor_bytes as u64
    }

    fn has_superblock(&self, group: u64) -> bool {
        let is_power = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        match self.backups {
            Backups::All => true,
            Backups::Sparse => group <= 1 || [3, 5, 7].into_iter().any(is_power),
            Backups::Two(groups) => group == 0 || groups.contains(&group),
        }
    }
}

/// State, features and checksum.
fn check(head: Head<'_>, incompat: u32, ro: u32) -> Result<(), FsError> {
    let field = |value: Option<u32>| value.ok_or_else(|| FsError::damaged("superblock"));
    if ro & METADATA_CSUM != 0 && crc(!0, &head.0[..BYTES - 4]) != field(head.u32(BYTES - 4))? {
        return Err(FsError::damaged("checksum of the superblock"));
    }
    // A flag that is lost must not turn the sums off. (Their sum may stay where tune2fs took them away, but not their type.)
    if ro & METADATA_CSUM == 0 && head.u8(CHECKSUM_TYPE) != Some(0) {
        return Err(FsError::damaged(
            "the superblock names a kind of checksum and says it has none",
        ));
    }
    if incompat & !KNOWN_INCOMPAT != 0 || ro & !KNOWN_RO != 0 {
        return Err(FsError::unsupported(format!("features {incompat:#x} and {ro:#x} of ext4")));
    }
    if incompat & RECOVER != 0 {
        return Err(FsError::not_clean("its journal is to be replayed"));
    }
    match head.u16(0x3A).unwrap_or_default() & 0x3 {
        1 => Ok(()),
        0 => Err(FsError::not_clean("it was not unmounted")),
        _ => Err(FsError::not_clean("it has noted errors: run fsck")),
    }
}

/// CRC-32C without its usual first and last inversion, as ext4 chains it.
pub(crate) fn crc(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}
