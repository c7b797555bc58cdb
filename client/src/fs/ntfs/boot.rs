//! The boot sector: sizes and the place of the MFT.

use crate::{fs::FsError, source::view::ReadAt};

/// Sizes of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Boot {
    /// Bytes of a cluster.
    pub cluster_bytes: u64,
    /// Whole clusters of the volume.
    pub clusters: u64,
    /// Bytes of an MFT record.
    pub record_bytes: u64,
    /// First cluster of the MFT.
    pub mft_cluster: u64,
    /// Serial number.
    pub serial: u64,
}

impl Boot {
    /// Reads it.
    ///
    /// # Errors
    /// When it is none of an NTFS, or one that can't be.
    pub fn read(volume: &dyn ReadAt) -> Result<Self, FsError> {
        let mut sector = [0; 512];
        volume.read_exact_at(&mut sector, 0)?;
        Self::parse(&sector, volume.len())
    }

    fn parse(sector: &[u8; 512], volume_bytes: u64) -> Result<Self, FsError> {
        if &sector[3..11] != b"NTFS    " {
            return Err(FsError::damaged("the boot sector isn't one of NTFS"));
        }
        let u64_at = |at: usize| u64::from_le_bytes(*sector[at..].first_chunk().unwrap_or(&[0; 8]));
        let sector_bytes = u64::from(u16::from_le_bytes([sector[11], sector[12]]));
        let sectors_per_cluster = match sector[13] {
            small @ 0..=0x80 => u64::from(small),
            // Clusters of more than 64 KiB: a negative power of two.
            large => 1u64.checked_shl(u32::from(large.wrapping_neg())).unwrap_or(0),
        };
        let cluster_bytes = sector_bytes.saturating_mul(sectors_per_cluster);
        let record_bytes = match sector[0x40].cast_signed() {
            clusters @ 1.. => cluster_bytes.saturating_mul(clusters.unsigned_abs().into()),
            power => 1u64.checked_shl(power.unsigned_abs().into()).unwrap_or(0),
        };
        let is_power =
            |value: u64, least, most| value.is_power_of_two() && (least..=most).contains(&value);
        if !is_power(sector_bytes, 512, 4096)
            || !is_power(cluster_bytes, sector_bytes, 2 << 20)
            || !is_power(record_bytes, 512, 64 << 10)
        {
            return Err(FsError::damaged(format!(
                "sectors of {sector_bytes}, clusters of {cluster_bytes} and records of {record_bytes} bytes"
            )));
        }
        let (sectors, mft_cluster) = (u64_at(0x28), u64_at(0x30));
        if sectors > volume_bytes / sector_bytes {
            return Err(FsError::damaged("it is larger than its volume"));
        }
        let clusters = sectors / sectors_per_cluster;
        if mft_cluster >= clusters {
            return Err(FsError::damaged("the MFT lies behind the end of the volume"));
        }
        Ok(Self { cluster_bytes, clusters, record_bytes, mft_cluster, serial: u64_at(0x48) })
    }

    /// Clusters that hold one record at least.
    pub(super) fn record_clusters(&self) -> u64 {
        self.record_bytes.div_ceil(self.cluster_bytes)
    }
}
