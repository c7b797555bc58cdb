//! Takes blocks of a child into its parent's file: the half of a merge that knows the format. As [`crate::image::vhdx::Absorber`].
//!
//! New blocks go where the footer is. A file that loses its footer by that is read by the copy at its start, until the flush
//! writes the footer behind the new blocks. A block's bitmap and data are durable before the table names the block.

use std::{collections::BTreeMap, ops::Range};

use uuid::Uuid;

use super::{
    SECTOR, UNUSED, VhdImage,
    footer::{self, Footer},
};
use crate::{
    image::{ImageError, Kind, UNIT_BYTES},
    storage::File,
};

/// An image that takes blocks in.
#[derive(Debug)]
pub struct Absorber {
    image: VhdImage,
    /// First byte behind all that the allocation table names.
    end: u64,
    /// Blocks that something was put into since the last flush.
    touched: BTreeMap<u64, Touched>,
    /// What of the disk was put there, ascending.
    marks: Vec<Range<u64>>,
}

#[derive(Debug, Clone, Copy)]
struct Touched {
    is_new: bool,
    /// Where the block's bitmap is.
    bitmap: u64,
}

impl Absorber {
    /// Opens the file of the parent, or a copy of it, for reading and writing. It is never made shorter than `least_bytes`, its
    /// length at its commit.
    ///
    /// Reads the whole allocation table: 2 MiB for each TiB of disk.
    ///
    /// # Errors
    /// When it is no valid image, a fixed one, or can't be read or cut.
    pub fn open(file: File, least_bytes: u64) -> Result<Self, ImageError> {
        let image = VhdImage::open(file)?;
        let least_end = least_bytes.saturating_sub(footer::BYTES as u64).next_multiple_of(SECTOR);
        let end = image.used_end()?.max(least_end);
        // What lies behind is the footer, or of an attempt that did not get to the table; new blocks must be holes first.
        let length = end + footer::BYTES as u64;
        image.file().set_len(length).map_err(ImageError::io("write"))?;
        let absorber = Self { image, end, touched: BTreeMap::new(), marks: Vec::new() };
        absorber.write_footer()?;
        Ok(absorber)
    }

    /// The image as it is.
    pub fn image(&self) -> &VhdImage {
        &self.image
    }

    /// Blocks touched since the last flush; each needs some memory.
    pub fn touched(&self) -> usize {
        self.touched.len()
    }

    /// Bytes of the disk up to the end of the block that holds byte `at`.
    pub fn until_block_end(&self, at: u64) -> u64 {
        self.image.block_bytes() - at % self.image.block_bytes()
    }

    /// Where in the file the bytes `range` of the disk belong: whole units, in one block, behind those asked for before.
    ///
    /// # Errors
    /// When the table is damaged, or the range is none of the disk.
    pub fn place(&mut self, range: Range<u64>) -> Result<u64, ImageError> {
        let (block_bytes, disk_bytes) =
            (self.image.block_bytes(), self.image.geometry().disk_bytes);
        let (block, within) = (range.start / block_bytes, range.start % block_bytes);
        let is_one = range.end > range.start && range.end - range.start <= block_bytes - within;
        let is_whole = range.start.is_multiple_of(UNIT_BYTES)
            && (range.end.is_multiple_of(UNIT_BYTES) || range.end == disk_bytes);
        if !is_one || !is_whole || range.end > disk_bytes {
            return Err(ImageError::impossible(format!("bytes {range:?} in one block")));
        }
        let touched = match self.touched.get(&block) {
            Some(touched) => *touched,
            None => self.touch(block)?,
        };
        match self.marks.last_mut() {
            Some(last) if last.end == range.start && last.end % block_bytes != 0 => {
                last.end = range.end;
            }
            _ => self.marks.push(range),
        }
        Ok(touched.bitmap + self.image.bitmap_bytes() + within)
    }

    /// As [`Self::place`] for zeros; `None` when they are there already, since nothing is.
    ///
    /// # Errors
    /// As [`Self::place`].
    pub fn place_zeros(&mut self, range: Range<u64>) -> Result<Option<u64>, ImageError> {
        let block = range.start / self.image.block_bytes();
        let touched = self.touched.get(&block).copied();
        let is_new = match touched {
            Some(touched) => touched.is_new,
            None => self.image.lookup(block)? == UNUSED,
        };
        if is_new && touched.is_none() && self.image.kind() == Kind::Dynamic {
            return Ok(None);
        }
        let offset = self.place(range)?;
        // A new block is a hole; what was put there since is of other units.
        Ok((!is_new).then_some(offset))
    }

    /// Makes the structures name what was put in. With `sync` the data are durable before a structure names them.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn flush(&mut self, sync: bool) -> Result<(), ImageError> {
        if self.touched.is_empty() {
            return Ok(());
        }
        self.write_footer()?;
        if sync {
            self.image.file().sync_data().map_err(ImageError::io("sync"))?;
        }
        self.mark()?;
        if sync {
            self.image.file().sync_data().map_err(ImageError::io("sync"))?;
        }
        for (block, touched) in self.touched.iter().filter(|(_, touched)| touched.is_new) {
            let entry = u32::try_from(touched.bitmap / SECTOR).ok().filter(|e| *e != UNUSED);
            let entry = entry.ok_or_else(|| ImageError::impossible("a VHD of more than 2 TiB"))?;
            self.image.set_entry(*block, entry)?;
        }
        self.touched.clear();
        self.marks.clear();
        Ok(())
    }

    /// Looks a block up, and gives it a place when it has none.
    fn touch(&mut self, block: u64) -> Result<Touched, ImageError> {
        let entry = self.image.lookup(block)?;
        let touched = match entry {
            UNUSED => {
                let bitmap_bytes = self.image.bitmap_bytes();
                // Data on a border of 4 KiB, the bitmap before it.
                let data = (self.end + bitmap_bytes).next_multiple_of(UNIT_BYTES);
                self.end = data + self.image.block_bytes();
                Touched { is_new: true, bitmap: data - bitmap_bytes }
            }
            entry => Touched { is_new: false, bitmap: self.image.place_of(entry)? },
        };
        self.touched.insert(block, touched);
        Ok(touched)
    }

    /// Sets the bits of all marks; in a base, all bits of a new block.
    fn mark(&self) -> Result<(), ImageError> {
        let (file, block_bytes) = (self.image.file(), self.image.block_bytes());
        let mut marks = self.marks.iter().peekable();
        for (block, touched) in &self.touched {
            // A byte is eight sectors, a unit.
            let mut bits = vec![0; (block_bytes / UNIT_BYTES) as usize];
            match (touched.is_new, self.image.kind()) {
                (true, Kind::Dynamic) => bits.fill(0xff),
                (true, Kind::Differencing) => {}
                (false, _) => file
                    .read_exact_at(&mut bits, touched.bitmap)
                    .map_err(ImageError::io("sector bitmap"))?,
            }
            let before = bits.clone();
            while let Some(mark) = marks.next_if(|mark| mark.start / block_bytes <= *block) {
                let start = block * block_bytes;
                let from = mark.start.saturating_sub(start) / UNIT_BYTES;
                let to = mark.end.saturating_sub(start).div_ceil(UNIT_BYTES);
                if let Some(part) = bits.get_mut(from as usize..to as usize) {
                    part.fill(0xff);
                }
            }
            if touched.is_new || bits != before {
                file.write_all_at(&bits, touched.bitmap).map_err(ImageError::io("write"))?;
            }
        }
        Ok(())
    }

    /// Writes the footer behind everything.
    fn write_footer(&self) -> Result<(), ImageError> {
        let file = self.image.file();
        file.write_all_at(&self.image.footer().encode(), self.end).map_err(ImageError::io("write"))
    }
}

/// Gives a file the id that the child's own children name, and its time stamp, and shows it. Durable when it returns; a crash
/// leaves the old or the new one.
///
/// # Errors
/// When the file has no valid footer or can't be written.
pub fn set_identity(file: &File, unique_id: Uuid) -> Result<(), ImageError> {
    let file_bytes = file.metadata().map_err(ImageError::io("length"))?.length_bytes;
    let (old, at) = footer::read(file, file_bytes)?;
    let time_stamp = footer::time_stamp_of(unique_id).unwrap_or(old.time_stamp);
    let footer = Footer { unique_id, time_stamp, is_hidden: false, ..old };
    // The one at the end counts; the copy follows when that is durable.
    for offset in [at, 0] {
        file.write_all_at(&footer.encode(), offset).map_err(ImageError::io("write"))?;
        file.sync_data().map_err(ImageError::io("sync"))?;
    }
    file.set_modified(footer::time_of(time_stamp)).map_err(ImageError::io("write"))
}

/// Hides a file from other programs, or shows it again. The caller syncs.
///
/// # Errors
/// When the file has no valid footer or can't be written.
pub fn set_hidden(file: &File, is_hidden: bool) -> Result<(), ImageError> {
    let file_bytes = file.metadata().map_err(ImageError::io("length"))?.length_bytes;
    let (old, at) = footer::read(file, file_bytes)?;
    let footer = Footer { is_hidden, ..old };
    for offset in [at, 0] {
        file.write_all_at(&footer.encode(), offset).map_err(ImageError::io("write"))?;
    }
    file.set_modified(footer::time_of(footer.time_stamp)).map_err(ImageError::io("write"))
}
