//! Where everything lies in a file we write: a pure function of the disk's size.

use super::SECTOR;
use crate::image::{
    Geometry, ImageError, Kind,
    payload::{PAYLOAD_BYTES, UNIT_BYTES},
};

/// Largest virtual size of the format: more blocks of 2 MiB, each with its bitmap, have no numbers.
pub const MAX_BYTES: u64 = 2040 << 30;

pub(super) const HEADER_OFFSET: u64 = 512;
/// Places of the absolute and the relative path.
pub(super) const LOCATOR_OFFSETS: [u64; 2] = [4096, 6144];
/// Bytes for a path: at most 255 characters and a few.
pub(super) const LOCATOR_BYTES: u64 = 2048;
pub(super) const BAT_OFFSET: u64 = 8192;
/// What comes before the data of a slot, so that they start on a 4 KiB border: the bitmap is the end of it.
pub(super) const HEAD_BYTES: u64 = 4096;
/// A bit for each sector of a block.
pub(super) const BITMAP_BYTES: u64 = PAYLOAD_BYTES / SECTOR / 8;
const SLOT_BYTES: u64 = HEAD_BYTES + PAYLOAD_BYTES;

/// The places in a file of one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    geometry: Geometry,
    kind: Kind,
    virtual_bytes: u64,
}

impl Layout {
    /// The layout for a disk.
    ///
    /// # Errors
    /// When the size is not a multiple of 512 or above 2040 GiB, or sectors don't have 512 bytes.
    pub fn new(geometry: Geometry, kind: Kind) -> Result<Self, ImageError> {
        let Geometry { disk_bytes, logical_sector_bytes } = geometry;
        if logical_sector_bytes != 512 {
            return Err(ImageError::impossible(format!(
                "logical sectors of {logical_sector_bytes} bytes: a VHD's have 512"
            )));
        }
        if !disk_bytes.is_multiple_of(SECTOR) || disk_bytes > MAX_BYTES {
            return Err(ImageError::impossible(format!(
                "a disk of {disk_bytes} bytes: the size must be a multiple of 512, and a VHD holds at most 2040 GiB"
            )));
        }
        // Whole units, because children change in units. An empty disk has no place in the format.
        let virtual_bytes = disk_bytes.next_multiple_of(UNIT_BYTES).max(UNIT_BYTES);
        Ok(Self { geometry, kind, virtual_bytes })
    }

    /// The disk's geometry, with its true size.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Base or child.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Size of the virtual disk in bytes: the true size padded to a multiple of 4096.
    pub fn virtual_bytes(&self) -> u64 {
        self.virtual_bytes
    }

    /// Payload blocks of the disk.
    pub fn payload_count(&self) -> u64 {
        self.virtual_bytes.div_ceil(PAYLOAD_BYTES)
    }

    /// Offset of the data of slot `slot` in the file: a multiple of 4096.
    pub fn slot_offset(&self, slot: u32) -> u64 {
        self.slots_end(slot) + HEAD_BYTES
    }

    /// Where `slots` slots end.
    pub(super) fn slots_end(&self, slots: u32) -> u64 {
        BAT_OFFSET + self.bat_bytes() + u64::from(slots) * SLOT_BYTES
    }

    /// Bytes of the block allocation table, padded to 4096.
    pub(super) fn bat_bytes(&self) -> u64 {
        (self.payload_count() * 4).next_multiple_of(4096)
    }

    /// The table entry of a block in slot `slot`: the sector where its bitmap starts.
    pub(super) fn entry(&self, slot: u32) -> u32 {
        // The largest disk with all its slots ends below 2^32 sectors.
        ((self.slot_offset(slot) - BITMAP_BYTES) / SECTOR) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(disk_bytes: u64) -> Layout {
        Layout::new(Geometry { disk_bytes, logical_sector_bytes: 512 }, Kind::Dynamic).unwrap()
    }

    #[test]
    fn data_lie_on_borders_of_4_kib() {
        assert_eq!(layout(0).virtual_bytes(), 4096);
        assert_eq!(layout(4096 + 512).virtual_bytes(), 8192);
        assert_eq!(layout(4096).slot_offset(0), BAT_OFFSET + 2 * 4096);
        assert_eq!(layout(4096).slot_offset(2), BAT_OFFSET + 2 * 4096 + 2 * (PAYLOAD_BYTES + 4096));
        assert_eq!(layout(4096).entry(0), (BAT_OFFSET as u32 + 2 * 4096 - 512) / 512);
    }

    #[test]
    fn the_last_slot_of_the_largest_disk_has_a_number() {
        let full = layout(MAX_BYTES);
        let last = full.payload_count() as u32 - 1;
        assert!(full.slots_end(last + 1) / SECTOR < u64::from(u32::MAX));
        assert_eq!(u64::from(full.entry(last)) * SECTOR, full.slot_offset(last) - 512);
    }

    #[test]
    fn impossible_disks_are_refused() {
        for (disk_bytes, logical_sector_bytes) in
            [(511, 512), (4096, 4096), (MAX_BYTES + 512, 512), (u64::MAX - 511, 512), (4096, 0)]
        {
            Layout::new(Geometry { disk_bytes, logical_sector_bytes }, Kind::Dynamic).unwrap_err();
        }
    }
}
