//! Turns a file whose slots hold data into a VHDX.

use std::error::Error;

use super::{
    Layout, MIB,
    bat::{self, TableWriter},
    bitmap::BitmapWriter,
    header, layout, metadata, region,
};
use crate::{
    image::{
        Identity, ImageError, Kind, Parent,
        payload::{Order, Payload},
    },
    storage::File,
};

/// Writes all structures of a VHDX around the data that is already in the slots, and returns the file's length.
///
/// `slots` is the number of slots that were taken, with or without data; what lies behind the last one is cut off first, so
/// that a repeated call leaves nothing of an earlier one. Before more slots are filled after such a call, the file must be cut
/// with [`Layout::cut`]. `blocks` come in ascending order of `index`. The caller syncs.
///
/// In a base all of a listed slot is the disk's content, whatever `present` says: what was never sent must be a hole there.
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
    let blocks = blocks.map(|block| block.and_then(|block| order.check(block)));
    let end = write_table(file, layout, slots, blocks)?;
    file.set_len(end).map_err(ImageError::io("write"))?;
    metadata::write(file, layout, identity.virtual_disk, parent)?;
    region::write(file, layout.bat_bytes())?;
    header::write_headers(file, identity.data_write)?;
    header::write_identifier(file)?;
    Ok(end)
}

impl Layout {
    /// Cuts a partial file behind its slots, or extends it to there: removes the sector bitmaps of an earlier
    /// [`write_structures`], which would otherwise show up as data in the next slots.
    ///
    /// # Errors
    /// When the length can't be set.
    pub fn cut(&self, file: &File, slots: u32) -> Result<(), ImageError> {
        file.set_len(self.slot_offset(slots)).map_err(ImageError::io("write"))
    }
}

/// Writes allocation table and sector bitmaps; returns the end of the file.
fn write_table(
    file: &File,
    layout: &Layout,
    slots: u32,
    mut blocks: impl Iterator<Item = Result<Payload, ImageError>>,
) -> Result<u64, ImageError> {
    let (count, ratio) = (layout.payload_count(), layout.chunk_ratio());
    let mut table = TableWriter::new(file, layout::BAT_OFFSET);
    let mut bitmaps = BitmapWriter::new(file, layout.slot_offset(slots), ratio);
    let mut upcoming = blocks.next().transpose()?;
    for index in 0..count {
        let entry = match upcoming.take_if(|block| block.index == index) {
            Some(block) => {
                upcoming = blocks.next().transpose()?;
                payload_entry(layout, &block, &mut bitmaps)?
            }
            None => absent(layout.kind()),
        };
        table.push(entry)?;
        if (index + 1) % ratio == 0 || index + 1 == count {
            close_chunk(layout, index, &bitmaps, &mut table)?;
        }
    }
    table.finish()?;
    bitmaps.finish()?;
    let chunks = if layout.kind() == Kind::Differencing { count.div_ceil(ratio) } else { 0 };
    Ok(layout.slot_offset(slots) + chunks * MIB)
}

/// Writes the bitmap's entry after the last payload block of a chunk.
fn close_chunk(
    layout: &Layout,
    last: u64,
    bitmaps: &BitmapWriter<'_>,
    table: &mut TableWriter<'_>,
) -> Result<(), ImageError> {
    let ratio = layout.chunk_ratio();
    match layout.kind() {
        Kind::Differencing => {
            // It comes after all places of the chunk, those past the disk's end too.
            for _ in last % ratio + 1..ratio {
                table.push(bat::NOT_PRESENT)?;
            }
            table.push(bitmaps.entry(last / ratio))
        }
        Kind::Dynamic if last + 1 < layout.payload_count() => table.push(bat::NOT_PRESENT),
        Kind::Dynamic => Ok(()),
    }
}

fn payload_entry(
    layout: &Layout,
    block: &Payload,
    bitmaps: &mut BitmapWriter<'_>,
) -> Result<u64, ImageError> {
    let offset = layout.slot_offset(block.slot);
    if layout.kind() == Kind::Dynamic {
        return Ok(offset | bat::FULLY_PRESENT);
    }
    let all = layout.units_of(block.index);
    let present: [u64; 8] = std::array::from_fn(|word| block.present[word] & all[word]);
    if present == [0; 8] {
        return Ok(absent(layout.kind()));
    }
    if present == all {
        return Ok(offset | bat::FULLY_PRESENT);
    }
    bitmaps.mark(block.index, &present)?;
    Ok(offset | bat::PARTIALLY_PRESENT)
}

/// The entry of a block without data. In a base "not present" would mean "undefined"; in a child it means the parent, and
/// "zero" must not be used there because libvhdi reads the parent's data for it.
fn absent(kind: Kind) -> u64 {
    match kind {
        Kind::Dynamic => bat::ZERO,
        Kind::Differencing => bat::NOT_PRESENT,
    }
}
