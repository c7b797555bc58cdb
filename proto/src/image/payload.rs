//! What both formats are written from: payload blocks in slots of a partial file, and the units in them that count.

use super::ImageError;

/// Bytes in a payload block, and of data in a slot.
pub const PAYLOAD_BYTES: u64 = 2 << 20;
/// Bytes in a unit, the step in which a child can differ from its parent.
pub const UNIT_BYTES: u64 = 4096;

/// A payload block of which the file holds data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Number of the block on the disk, counted in [`PAYLOAD_BYTES`].
    pub index: u64,
    /// Slot of the file that holds it.
    pub slot: u32,
    /// A bit for each 4 KiB unit, lowest first: set when the unit's content is in this file, be it a hole. Units past the
    /// disk's end don't count. Only children need it: in a base all of the slot counts.
    pub present: [u64; 8],
}

/// The units of payload block `index` that lie on a disk of `virtual_bytes`: all but for the last block.
pub(super) fn units_of(virtual_bytes: u64, index: u64) -> [u64; 8] {
    let start = index.saturating_mul(PAYLOAD_BYTES);
    let units = virtual_bytes.saturating_sub(start).div_ceil(UNIT_BYTES).min(512) as usize;
    std::array::from_fn(|word| match units.saturating_sub(word * 64).min(64) {
        64 => u64::MAX,
        bits => (1 << bits) - 1,
    })
}

/// Checks that blocks ascend and that no slot is used twice.
pub(super) struct Order {
    slots_seen: Vec<u64>,
    slots: u32,
    count: u64,
    next: u64,
}

impl Order {
    /// For a disk of `count` payload blocks and a file of `slots`.
    pub(super) fn new(count: u64, slots: u32) -> Result<Self, ImageError> {
        if u64::from(slots) > count {
            return Err(ImageError::impossible(format!("{slots} slots for {count} blocks")));
        }
        Ok(Self { slots_seen: vec![0; slots.div_ceil(64) as usize], slots, count, next: 0 })
    }

    pub(super) fn check(&mut self, block: Payload) -> Result<Payload, ImageError> {
        let Payload { index, slot, .. } = block;
        if index < self.next || index >= self.count || slot >= self.slots {
            return Err(ImageError::impossible(format!(
                "payload block {index} in slot {slot}, out of order or range"
            )));
        }
        let (word, bit) = (&mut self.slots_seen[slot as usize / 64], 1 << (slot % 64));
        if *word & bit != 0 {
            return Err(ImageError::impossible(format!("slot {slot} holds two payload blocks")));
        }
        *word |= bit;
        self.next = index + 1;
        Ok(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_block_has_fewer_units() {
        let disk_bytes = PAYLOAD_BYTES + 65 * 4096;
        assert_eq!(units_of(disk_bytes, 0), [u64::MAX; 8]);
        assert_eq!(units_of(disk_bytes, 1), [u64::MAX, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(units_of(disk_bytes, 2), [0; 8]);
    }
}
