//! Sector bitmap blocks of a child: which sectors of partially present payload blocks are in the file.
//!
//! A sector bitmap block serves a chunk of payload blocks (4 GiB of disk with 512-byte sectors). It is 1 MiB long, but only
//! its pages with bits are written.
//!
//! Chunks without a partial block get a bitmap block too, all hole, although the format doesn't ask for it: for a payload
//! block that is not present libvhdi (2021 to 2026) looks into the bitmap whatever its state, finds its offset to be 0, and
//! takes the file's first MiB, the headers, for a bitmap. Some of the parent's blocks would then silently read as garbage.

use super::{MIB, PAGE, bat};
use crate::{image::ImageError, storage::File};

/// Writes the bitmap blocks behind the slots, one for each chunk. Payload blocks come in ascending order.
pub(super) struct BitmapWriter<'a> {
    file: &'a File,
    start: u64,
    chunk_ratio: u64,
    /// Bytes of bitmap for a payload block: a bit for each sector.
    stride: usize,
    page: [u8; PAGE],
    page_offset: Option<u64>,
}

impl<'a> BitmapWriter<'a> {
    /// A writer of blocks from `start` on, for a table with `chunk_ratio` payload blocks in a chunk.
    pub(super) fn new(file: &'a File, start: u64, chunk_ratio: u64) -> Self {
        let stride = (MIB / chunk_ratio) as usize;
        Self { file, start, chunk_ratio, stride, page: [0; PAGE], page_offset: None }
    }

    /// Offset of the bitmap block of chunk `chunk`.
    fn block(&self, chunk: u64) -> u64 {
        self.start + chunk * MIB
    }

    /// The table entry of that block.
    pub(super) fn entry(&self, chunk: u64) -> u64 {
        self.block(chunk) | bat::BITMAP_PRESENT
    }

    /// Marks `units` of payload block `index`.
    pub(super) fn mark(&mut self, index: u64, units: &[u64; 8]) -> Result<(), ImageError> {
        let at =
            self.block(index / self.chunk_ratio) + index % self.chunk_ratio * self.stride as u64;
        let page_offset = at - at % PAGE as u64;
        if self.page_offset != Some(page_offset) {
            self.flush()?;
            self.page_offset = Some(page_offset);
        }
        let bits = &mut self.page[(at % PAGE as u64) as usize..][..self.stride];
        // 512-byte sectors: a byte for each unit; 4096-byte sectors: a bit for each unit.
        for unit in (0..512).filter(|unit| units[unit / 64] >> (unit % 64) & 1 == 1) {
            match self.stride {
                512 => bits[unit] = 0xff,
                _ => bits[unit / 8] |= 1 << (unit % 8),
            }
        }
        Ok(())
    }

    /// Writes what is left.
    pub(super) fn finish(mut self) -> Result<(), ImageError> {
        self.flush()
    }

    fn flush(&mut self) -> Result<(), ImageError> {
        if let Some(offset) = self.page_offset.take() {
            self.file.write_all_at(&self.page, offset).map_err(ImageError::io("write"))?;
            self.page.fill(0);
        }
        Ok(())
    }
}
