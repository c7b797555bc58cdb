//! Turns a file whose slots hold data into a VHD.

use std::{error::Error, time::SystemTime};

use super::{
    Layout, UNUSED,
    footer::{self, DiskType, Footer},
    header,
    layout::{BAT_OFFSET, BITMAP_BYTES, HEAD_BYTES, HEADER_OFFSET},
};
use crate::{
    image::{
        Identity, ImageError, Kind, Parent,
        payload::{self, Order, Payload},
    },
    storage::File,
};

/// Bytes of table written at once.
const PIECE_BYTES: usize = 64 << 10;

/// Writes all structures of a VHD around the data that is already in the slots, and returns the file's length. The file's
/// modification time becomes its time stamp.
///
/// As [`crate::image::vhdx::write_structures`]: `slots` is the number of slots that were taken; before more are filled after
/// such a call, the file must be cut with [`Layout::cut`]. `blocks` come in ascending order of `index`. The caller syncs. In a
/// base all of a listed slot is the disk's content.
///
/// # Errors
/// When the file can't be written, the list fails or is out of order, or base and parent contradict each other.
pub fn write_structures<E>(
    file: &File,
    layout: &Layout,
    identity: &Identity,
    parent: Option<&Parent>,
    slots: u32,
    blocks: impl IntoIterator<Item = Result<Payload, E>>,
) -> Result<u64, ImageError>
where
    E: Into<Box<dyn Error + Send + Sync>>,
{
    if parent.is_some() != (layout.kind() == Kind::Differencing) {
        return Err(ImageError::impossible("a base with a parent, or a child without one"));
    }
    let mut order = Order::new(layout.payload_count(), slots)?;
    layout.cut(file, slots)?;
    let blocks = blocks.into_iter().map(|block| block.map_err(|e| ImageError::Blocks(e.into())));
    write_table(file, layout, blocks.map(|block| block.and_then(|block| order.check(block))))?;
    header::write(file, layout, parent)?;
    let time_stamp = footer::time_stamp_of(identity.data_write)
        .unwrap_or_else(|| footer::time_stamp(SystemTime::now()));
    let disk_type = match layout.kind() {
        Kind::Dynamic => DiskType::Dynamic,
        Kind::Differencing => DiskType::Differencing,
    };
    let footer = Footer {
        disk_type,
        disk_bytes: layout.virtual_bytes(),
        header_offset: HEADER_OFFSET,
        time_stamp,
        unique_id: identity.data_write,
        is_hidden: false,
    };
    let end = layout.slots_end(slots);
    for offset in [0, end] {
        file.write_all_at(&footer.encode(), offset).map_err(ImageError::io("write"))?;
    }
    file.set_modified(footer::time_of(time_stamp)).map_err(ImageError::io("write"))?;
    Ok(end + footer::BYTES as u64)
}

impl Layout {
    /// Cuts a partial file behind its slots, or extends it to there: removes the footer of an earlier [`write_structures`],
    /// which would otherwise show up in the next slot.
    ///
    /// # Errors
    /// When the length can't be set.
    pub fn cut(&self, file: &File, slots: u32) -> Result<(), ImageError> {
        file.set_len(self.slots_end(slots)).map_err(ImageError::io("write"))
    }
}

/// Writes the allocation table, and each block's bitmap before its data.
fn write_table(
    file: &File,
    layout: &Layout,
    mut blocks: impl Iterator<Item = Result<Payload, ImageError>>,
) -> Result<(), ImageError> {
    let (mut table, mut offset) = (Vec::with_capacity(PIECE_BYTES), BAT_OFFSET);
    let mut upcoming = blocks.next().transpose()?;
    for index in 0..layout.bat_bytes() / 4 {
        let entry = match upcoming.take_if(|block| block.index == index) {
            Some(block) => {
                upcoming = blocks.next().transpose()?;
                write_bitmap(file, layout, &block)?
            }
            None => UNUSED,
        };
        table.extend_from_slice(&entry.to_be_bytes());
        if table.len() == PIECE_BYTES || index + 1 == layout.bat_bytes() / 4 {
            file.write_all_at(&table, offset).map_err(ImageError::io("write"))?;
            offset += table.len() as u64;
            table.clear();
        }
    }
    Ok(())
}

/// Writes the bitmap of a block and returns the block's table entry.
fn write_bitmap(file: &File, layout: &Layout, block: &Payload) -> Result<u32, ImageError> {
    // A whole page: what is before the bitmap belongs to nobody.
    let mut page = [0; HEAD_BYTES as usize];
    let bits = &mut page[(HEAD_BYTES - BITMAP_BYTES) as usize..];
    let mut entry = layout.entry(block.slot);
    if layout.kind() == Kind::Dynamic {
        bits.fill(0xff);
    } else {
        let all = payload::units_of(layout.virtual_bytes(), block.index);
        let present: [u64; 8] = std::array::from_fn(|word| block.present[word] & all[word]);
        // A unit is eight sectors, a byte of the bitmap.
        for (unit, byte) in bits.iter_mut().enumerate() {
            *byte = if present[unit / 64] >> (unit % 64) & 1 == 1 { 0xff } else { 0 };
        }
        if present == [0; 8] {
            entry = UNUSED;
        }
    }
    let offset = layout.slot_offset(block.slot) - HEAD_BYTES;
    file.write_all_at(&page, offset).map_err(ImageError::io("write"))?;
    Ok(entry)
}
