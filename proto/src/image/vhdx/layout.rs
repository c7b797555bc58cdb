//! Where everything lies in a file we write: a pure function of the disk's geometry.

use super::MIB;
use crate::image::{
    Geometry, ImageError, Kind,
    payload::{self, PAYLOAD_BYTES, UNIT_BYTES},
};

/// Largest virtual size of the format.
const MAX_BYTES: u64 = 64 << 40;
pub(super) const LOG_OFFSET: u64 = MIB;
pub(super) const LOG_BYTES: u64 = MIB;
pub(super) const METADATA_OFFSET: u64 = 2 * MIB;
pub(super) const METADATA_BYTES: u64 = MIB;
pub(super) const BAT_OFFSET: u64 = 3 * MIB;

/// Payload blocks that share one sector bitmap block, which has 2^23 bits.
pub(super) fn chunk_ratio(logical_sector_bytes: u32, block_bytes: u64) -> u64 {
    (u64::from(logical_sector_bytes) << 23) / block_bytes
}

/// Entries of the block allocation table for `payloads` payload blocks.
pub(super) fn bat_entries(kind: Kind, payloads: u64, ratio: u64) -> u64 {
    match kind {
        Kind::Dynamic => payloads + payloads.saturating_sub(1) / ratio,
        Kind::Differencing => payloads.div_ceil(ratio) * (ratio + 1),
    }
}

/// Index of a payload block's entry in the table.
pub(super) fn bat_index(payload: u64, ratio: u64) -> u64 {
    payload + payload / ratio
}

/// The places in a file of one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    geometry: Geometry,
    kind: Kind,
    virtual_bytes: u64,
    bat_bytes: u64,
}

impl Layout {
    /// The layout for a disk.
    ///
    /// # Errors
    /// When the size is not a multiple of 512 or above 64 TiB, or sectors are neither 512 nor 4096 bytes.
    pub fn new(geometry: Geometry, kind: Kind) -> Result<Self, ImageError> {
        let Geometry { disk_bytes, logical_sector_bytes } = geometry;
        if !disk_bytes.is_multiple_of(512) || disk_bytes > MAX_BYTES {
            return Err(ImageError::impossible(format!(
                "a disk of {disk_bytes} bytes: the size must be a multiple of 512 and at most 64 TiB"
            )));
        }
        if !matches!(logical_sector_bytes, 512 | 4096) {
            return Err(ImageError::impossible(format!(
                "logical sectors of {logical_sector_bytes} bytes: they must have 512 or 4096"
            )));
        }
        // Whole units, because children change in units. And whole pairs of sectors: 7-Zip (26.02) refuses a size that has the
        // bit of the sector size set. An empty disk has no place in the format.
        let step = UNIT_BYTES.max(2 * u64::from(logical_sector_bytes));
        let virtual_bytes = disk_bytes.next_multiple_of(step).max(step);
        let payloads = virtual_bytes.div_ceil(PAYLOAD_BYTES);
        let entries = bat_entries(kind, payloads, chunk_ratio(logical_sector_bytes, PAYLOAD_BYTES));
        Ok(Self { geometry, kind, virtual_bytes, bat_bytes: (entries * 8).next_multiple_of(MIB) })
    }

    /// The disk's geometry, with its true size.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Base or child.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Size of the virtual disk in bytes: the true size padded to a multiple of 4096 (8192 with 4096-byte
    /// sectors).
    pub fn virtual_bytes(&self) -> u64 {
        self.virtual_bytes
    }

    /// Payload blocks of the disk.
    pub fn payload_count(&self) -> u64 {
        self.virtual_bytes.div_ceil(PAYLOAD_BYTES)
    }

    /// Offset of slot `slot` in the file: a multiple of 1 MiB. Slot 0 comes right after the structures.
    pub fn slot_offset(&self, slot: u32) -> u64 {
        BAT_OFFSET + self.bat_bytes + u64::from(slot) * PAYLOAD_BYTES
    }

    /// Bytes of the block allocation table, a multiple of 1 MiB.
    pub(super) fn bat_bytes(&self) -> u64 {
        self.bat_bytes
    }

    /// Payload blocks that share a sector bitmap block.
    pub(super) fn chunk_ratio(&self) -> u64 {
        chunk_ratio(self.geometry.logical_sector_bytes, PAYLOAD_BYTES)
    }

    /// The units of payload block `index` that lie on the disk: all but for the last block.
    pub(super) fn units_of(&self, index: u64) -> [u64; 8] {
        payload::units_of(self.virtual_bytes, index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(disk_bytes: u64, kind: Kind) -> Layout {
        Layout::new(Geometry { disk_bytes, logical_sector_bytes: 512 }, kind).unwrap()
    }

    #[test]
    fn sizes_are_padded_and_slots_follow_the_table() {
        assert_eq!(layout(0, Kind::Dynamic).virtual_bytes(), 4096);
        assert_eq!(layout(4096 + 512, Kind::Dynamic).virtual_bytes(), 8192);
        let large_sectors = Geometry { disk_bytes: 3 * 4096, logical_sector_bytes: 4096 };
        assert_eq!(Layout::new(large_sectors, Kind::Dynamic).unwrap().virtual_bytes(), 4 * 4096);
        assert_eq!(layout(4096, Kind::Dynamic).slot_offset(0), 4 * MIB);
        assert_eq!(layout(4096, Kind::Dynamic).slot_offset(3), 10 * MIB);
        // 64 TiB: 2^25 entries and one of 2048 more for the bitmaps.
        let full = layout(64 << 40, Kind::Differencing);
        assert_eq!(full.slot_offset(0), BAT_OFFSET + 257 * MIB);
        assert_eq!(full.payload_count(), 1 << 25);
    }

    #[test]
    fn impossible_disks_are_refused() {
        for (disk_bytes, logical_sector_bytes) in
            [(511, 512), (4096, 520), ((64 << 40) + 512, 512), (u64::MAX - 511, 512), (4096, 0)]
        {
            Layout::new(Geometry { disk_bytes, logical_sector_bytes }, Kind::Dynamic).unwrap_err();
        }
    }

    #[test]
    fn the_last_block_has_fewer_units() {
        let short = layout(PAYLOAD_BYTES + 65 * 4096, Kind::Differencing);
        assert_eq!(short.units_of(0), [u64::MAX; 8]);
        assert_eq!(short.units_of(1), [u64::MAX, 1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn table_length_follows_the_specification() {
        assert_eq!(bat_entries(Kind::Dynamic, 2048, 2048), 2048);
        assert_eq!(bat_entries(Kind::Dynamic, 2049, 2048), 2050);
        assert_eq!(bat_entries(Kind::Differencing, 1, 2048), 2049);
        assert_eq!(bat_entries(Kind::Differencing, 2049, 2048), 4098);
        assert_eq!(bat_index(2048, 2048), 2049);
    }
}
