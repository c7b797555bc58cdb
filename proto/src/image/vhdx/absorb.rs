//! Takes blocks of a child into its parent's file: the half of a merge that knows the format.
//!
//! The caller asks where a stretch of the disk belongs ([`Absorber::place`]) and puts the child's data there; [`Absorber::flush`]
//! then makes the structures name it, and [`set_identity`] at last makes the file the child. Nothing that the child doesn't
//! hold changes what it reads as at any step, so together with the child the file reads the same after a crash
//! anywhere, and all of it may be repeated.
//!
//! New payload blocks go behind what the allocation table names; what an earlier attempt left there is cut off first.
//! Open readers of the file find them, see [`VhdxImage`].

use std::{collections::BTreeMap, ops::Range};

use uuid::Uuid;

use super::{MIB, PAGE, UNIT_BYTES, VhdxImage, bat, header, layout::bat_index, read::Window};
use crate::{
    image::{ImageError, Kind},
    storage::File,
};

/// An image that takes blocks in.
#[derive(Debug)]
pub struct Absorber {
    image: VhdxImage,
    /// First byte behind all that the allocation table names.
    end: u64,
    /// Payload blocks that something was put into since the last flush, each with its table entry before.
    touched: BTreeMap<u64, Touched>,
    /// What of the disk was put there, ascending.
    marks: Vec<Range<u64>>,
}

#[derive(Debug)]
struct Touched {
    before: u64,
    offset: u64,
}

impl Absorber {
    /// Takes the file of the parent, or a copy of it, open for reading and writing. `least_bytes`: what it was committed with,
    /// below which it is never cut.
    ///
    /// Reads the whole allocation table: 4 MiB for each TiB of disk.
    ///
    /// # Errors
    /// When it is no valid image or can't be read or cut.
    pub fn open(file: File, least_bytes: u64) -> Result<Self, ImageError> {
        let image = VhdxImage::open(file)?;
        let end = used_end(&image)?.max(least_bytes);
        // What lies behind is of an attempt that did not get to the table; new blocks must be holes first.
        image.file().set_len(end).map_err(ImageError::io("write"))?;
        Ok(Self { image, end, touched: BTreeMap::new(), marks: Vec::new() })
    }

    /// The image as it is.
    pub fn image(&self) -> &VhdxImage {
        &self.image
    }

    /// The file, to put data into.
    pub fn file(&self) -> &File {
        self.image.file()
    }

    /// Payload blocks touched since the last flush; each needs some memory.
    pub fn touched(&self) -> usize {
        self.touched.len()
    }

    /// Bytes of the disk up to the end of the payload block that holds byte `at`.
    pub fn until_block_end(&self, at: u64) -> u64 {
        self.image.metadata.block_bytes - at % self.image.metadata.block_bytes
    }

    /// Where in the file the bytes `range` of the disk belong: whole units, in one payload block, behind those asked for before.
    ///
    /// # Errors
    /// When the table is damaged, or the range is none of the disk.
    pub fn place(&mut self, range: Range<u64>) -> Result<u64, ImageError> {
        let block_bytes = self.image.metadata.block_bytes;
        let (block, within) = (range.start / block_bytes, range.start % block_bytes);
        let is_one = range.end > range.start && range.end - range.start <= block_bytes - within;
        let is_whole = range.start.is_multiple_of(UNIT_BYTES)
            && (range.end.is_multiple_of(UNIT_BYTES)
                || range.end == self.image.geometry().disk_bytes);
        if !is_one || !is_whole || range.end > self.image.geometry().disk_bytes {
            return Err(ImageError::impossible(format!("bytes {range:?} in one block")));
        }
        let offset = match self.touched.get(&block) {
            Some(touched) => touched.offset,
            None => self.touch(block)?,
        };
        match self.marks.last_mut() {
            // A base has no bitmaps.
            _ if self.image.kind() == Kind::Dynamic => {}
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.marks.push(range),
        }
        Ok(offset + within)
    }

    /// As [`Self::place`] for zeros; `None` when they are there already, since nothing is.
    ///
    /// # Errors
    /// As [`Self::place`].
    pub fn place_zeros(&mut self, range: Range<u64>) -> Result<Option<u64>, ImageError> {
        let block = range.start / self.image.metadata.block_bytes;
        let touched = self.touched.get(&block);
        let before = touched.map_or_else(|| self.entry(block), |touched| Ok(touched.before))?;
        let is_new = !holds_data(before);
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
        if self.image.kind() == Kind::Differencing {
            self.make_bitmaps()?;
        }
        let file = self.image.file();
        let length = file.metadata().map_err(ImageError::io("length"))?.length_bytes;
        if length < self.end {
            file.set_len(self.end).map_err(ImageError::io("write"))?;
        }
        if sync {
            file.sync_data().map_err(ImageError::io("sync"))?;
        }
        let mut table = Pages::new(file);
        if self.image.kind() == Kind::Differencing {
            self.mark()?;
        }
        for (block, touched) in &self.touched {
            let entry = touched.offset | self.state(*block, touched)?;
            if entry != touched.before {
                let at = self.image.bat_offset + bat_index(*block, self.image.ratio) * 8;
                table.put(at, &entry.to_le_bytes())?;
            }
        }
        table.flush()?;
        self.touched.clear();
        self.marks.clear();
        Ok(())
    }

    fn entry(&self, block: u64) -> Result<u64, ImageError> {
        self.image.entry(&mut Window::default(), block, block + 1)
    }

    /// Looks a block up and gives it a place when it has none.
    fn touch(&mut self, block: u64) -> Result<u64, ImageError> {
        let (before, block_bytes) = (self.entry(block)?, self.image.metadata.block_bytes);
        let offset = match holds_data(before) {
            true => self.image.place(before, block_bytes)?,
            false => self.take(block_bytes),
        };
        self.touched.insert(block, Touched { before, offset });
        Ok(offset)
    }

    fn take(&mut self, bytes: u64) -> u64 {
        let offset = self.end.next_multiple_of(MIB);
        self.end = offset + bytes;
        offset
    }

    /// Chunks of files that others made may have no sector bitmap yet.
    fn make_bitmaps(&mut self) -> Result<(), ImageError> {
        let mut done = None;
        for block in self.touched.keys().copied().collect::<Vec<_>>() {
            let chunk = block / self.image.ratio;
            if done == Some(chunk) {
                continue;
            }
            done = Some(chunk);
            if bat::state(self.image.bitmap_entry(block)?) != bat::BITMAP_PRESENT {
                let offset = self.take(MIB);
                let file = self.image.file();
                file.set_len(self.end).map_err(ImageError::io("write"))?;
                file.sync_data().map_err(ImageError::io("sync"))?;
                let entry = (offset | bat::BITMAP_PRESENT).to_le_bytes();
                let at = self.image.bitmap_entry_offset(block);
                file.write_all_at(&entry, at).map_err(ImageError::io("write"))?;
            }
        }
        Ok(())
    }

    /// Sets the bits of all marks.
    fn mark(&self) -> Result<(), ImageError> {
        let sector_bytes = u64::from(self.image.geometry().logical_sector_bytes);
        let chunk_bytes = self.image.ratio * self.image.metadata.block_bytes;
        let mut pages = Pages::new(self.image.file());
        for mark in &self.marks {
            let mut at = mark.start;
            while at < mark.end {
                let stop = mark.end.min((at / chunk_bytes + 1) * chunk_bytes);
                let entry = self.image.bitmap_entry(at / self.image.metadata.block_bytes)?;
                let bitmap = self.image.place(entry, MIB)?;
                let chunk = at / chunk_bytes * chunk_bytes;
                let bits = (at - chunk) / sector_bytes..(stop - chunk).div_ceil(sector_bytes);
                pages.set_bits(bitmap, bits)?;
                at = stop;
            }
        }
        pages.flush()
    }

    /// The state of a touched block: full when nothing of it is left to the parent.
    fn state(&self, block: u64, touched: &Touched) -> Result<u64, ImageError> {
        let is_full = match self.image.kind() {
            Kind::Dynamic => true,
            Kind::Differencing if bat::state(touched.before) == bat::FULLY_PRESENT => true,
            Kind::Differencing => self.image.all_sectors(block)?,
        };
        Ok(if is_full { bat::FULLY_PRESENT } else { bat::PARTIALLY_PRESENT })
    }
}

/// Gives a file the id that the child's own children name, and shows it. Durable when it returns; a crash leaves the old or the
/// new one.
///
/// # Errors
/// When the file has no valid header or can't be written.
pub fn set_identity(file: &File, data_write: Uuid) -> Result<(), ImageError> {
    header::set_hidden(file, false)?;
    header::set_data_write(file, data_write)
}

fn holds_data(entry: u64) -> bool {
    matches!(bat::state(entry), bat::FULLY_PRESENT | bat::PARTIALLY_PRESENT)
}

/// First byte behind all structures and blocks.
fn used_end(image: &VhdxImage) -> Result<u64, ImageError> {
    let (count, block_bytes) = (image.payload_count(), image.metadata.block_bytes);
    let mut end = image.taken.iter().map(|range| range.end).max().unwrap_or(MIB);
    let mut window = Window::default();
    for block in 0..count {
        let entry = image.entry(&mut window, block, count)?;
        if holds_data(entry) {
            end = end.max(image.place(entry, block_bytes)? + block_bytes);
        }
        let chunk_ends = (block + 1) % image.ratio == 0 || block + 1 == count;
        if image.kind() == Kind::Differencing && chunk_ends {
            let entry = image.bitmap_entry(block)?;
            if bat::state(entry) == bat::BITMAP_PRESENT {
                end = end.max(image.place(entry, MIB)? + MIB);
            }
        }
    }
    Ok(end)
}

/// Changes bytes of a file page by page, ascending: one write for all changes of a page, none for pages without.
///
/// Whoever reads meanwhile sees each 8-byte number old or new: the kernel copies whole words.
struct Pages<'a> {
    file: &'a File,
    page: [u8; PAGE],
    offset: Option<u64>,
}

impl<'a> Pages<'a> {
    fn new(file: &'a File) -> Self {
        Self { file, page: [0; PAGE], offset: None }
    }

    /// The page that holds byte `at`.
    fn page(&mut self, at: u64) -> Result<&mut [u8; PAGE], ImageError> {
        let offset = at - at % PAGE as u64;
        if self.offset != Some(offset) {
            self.flush()?;
            self.file.read_exact_at(&mut self.page, offset).map_err(ImageError::io("read"))?;
            self.offset = Some(offset);
        }
        Ok(&mut self.page)
    }

    /// Changes bytes that lie in one page.
    fn put(&mut self, at: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let within = (at % PAGE as u64) as usize;
        self.page(at)?[within..within + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    /// Sets bits, counted from the lowest of the byte at `start`.
    fn set_bits(&mut self, start: u64, bits: Range<u64>) -> Result<(), ImageError> {
        for byte in bits.start / 8..bits.end.div_ceil(8) {
            let from = bits.start.saturating_sub(byte * 8).min(8);
            let to = (bits.end - byte * 8).min(8);
            let mask = ((1u16 << to) - (1u16 << from)) as u8;
            let at = start + byte;
            self.page(at)?[(at % PAGE as u64) as usize] |= mask;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ImageError> {
        match self.offset.take() {
            Some(offset) => {
                self.file.write_all_at(&self.page, offset).map_err(ImageError::io("write"))
            }
            None => Ok(()),
        }
    }
}
