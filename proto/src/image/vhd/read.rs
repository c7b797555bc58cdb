//! Opens a VHD of any origin and says where its data lies.

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use uuid::Uuid;

use super::{
    Fields, SECTOR, UNUSED,
    footer::{self, DiskType, Footer},
    header::{self, Header},
};
use crate::{
    image::{
        Geometry, ImageError, Kind, Parent, Source, check_disjoint,
        stretches::{BitOrder, Extents, Runs},
    },
    storage::File,
};

/// Table entries read at once, 4 KiB.
const WINDOW: u64 = 1024;
/// More blocks than the largest disk has with blocks of 512 KiB: bounds what [`VhdImage::check_blocks`] needs.
const MAX_BLOCKS: u64 = 1 << 22;

/// An open image. Nothing of its allocation table is kept in memory, so that blocks which a merge adds meanwhile are found.
#[derive(Debug)]
pub struct VhdImage {
    file: File,
    /// Length of the file when it was last asked.
    file_bytes: AtomicU64,
    footer: Footer,
    /// None in a fixed image, whose data are the file's beginning.
    table: Option<Header>,
    parent: Option<Parent>,
    parent_names: Vec<String>,
    /// Structures but the last footer, sorted: no block may lie there.
    taken: Vec<Range<u64>>,
}

impl VhdImage {
    /// Opens an image and checks all its structures but the blocks, which are checked when they are read (or all at once by
    /// [`Self::check_blocks`]).
    ///
    /// # Errors
    /// `Unsupported` when it needs what we don't know, `Damaged` when it breaks the format's rules.
    pub fn open(file: File) -> Result<Self, ImageError> {
        let file_bytes = file.metadata().map_err(ImageError::io("length"))?.length_bytes;
        let (footer, footer_at) = footer::read(&file, file_bytes)?;
        let mut image = Self {
            file,
            file_bytes: file_bytes.into(),
            footer,
            table: None,
            parent: None,
            parent_names: Vec::new(),
            taken: Vec::new(),
        };
        match footer.disk_type {
            DiskType::Fixed if footer.disk_bytes > footer_at => {
                let reason = format!("a fixed disk of {} bytes", footer.disk_bytes);
                return Err(ImageError::damaged(reason + " in a shorter file"));
            }
            DiskType::Fixed => {}
            DiskType::Dynamic | DiskType::Differencing => image.open_dynamic(file_bytes)?,
        }
        Ok(image)
    }

    fn open_dynamic(&mut self, file_bytes: u64) -> Result<(), ImageError> {
        let is_child = self.footer.disk_type == DiskType::Differencing;
        let (header, parent) =
            header::read(&self.file, file_bytes, self.footer.header_offset, is_child)?;
        let count = self.footer.disk_bytes.div_ceil(header.block_bytes);
        if count > MAX_BLOCKS {
            return Err(ImageError::unsupported(format!("{count} blocks in a VHD")));
        }
        let table_end = header.table_offset.checked_add(header.entries * 4);
        if count > header.entries || table_end.is_none_or(|end| end > file_bytes) {
            return Err(ImageError::damaged(format!(
                "an allocation table of {} entries at {} for {count} blocks",
                header.entries, header.table_offset
            )));
        }
        let header_at = self.footer.header_offset;
        self.taken = vec![
            0..footer::BYTES as u64,
            header_at..header_at.saturating_add(header::BYTES as u64),
            header.table_offset..header.table_offset + header.entries * 4,
        ];
        self.taken.retain(|range| !range.is_empty());
        check_disjoint(&mut self.taken, "structures")?;
        self.table = Some(header);
        (self.parent, self.parent_names) = parent.map_or((None, Vec::new()), |(p, n)| (Some(p), n));
        Ok(())
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Virtual size and sectors.
    pub fn geometry(&self) -> Geometry {
        Geometry { disk_bytes: self.footer.disk_bytes, logical_sector_bytes: SECTOR as u32 }
    }

    /// Base or child.
    pub fn kind(&self) -> Kind {
        if self.parent.is_some() { Kind::Differencing } else { Kind::Dynamic }
    }

    /// The id that a child of this image names.
    pub fn data_write(&self) -> Uuid {
        self.footer.unique_id
    }

    /// When it was made, in seconds since 2000; children name it too.
    pub fn time_stamp(&self) -> u32 {
        self.footer.time_stamp
    }

    /// What a child says about its parent. The name comes from the file: compare it before using it as a path.
    pub fn parent(&self) -> Option<&Parent> {
        self.parent.as_ref()
    }

    /// All file names that a child gives its parent, the most trusted first.
    pub fn parent_names(&self) -> &[String] {
        &self.parent_names
    }

    /// Says where each stretch of `range` (bytes of the disk) is, in order and without gaps. Past the disk's end it is zero.
    ///
    /// The answer can have an entry for each sector: ask for large disks in pieces.
    ///
    /// # Errors
    /// When the table can't be read, or names blocks outside the file or on top of its structures.
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<(Range<u64>, Source)>, ImageError> {
        let mut extents = Extents(Vec::new());
        let end = range.end.min(self.footer.disk_bytes);
        match &self.table {
            Some(header) => self.block_extents(header, range.start..end, &mut extents)?,
            None => extents.push(range.start..end, Source::File(range.start)),
        }
        extents.push(range.start.max(end)..range.end, Source::Zero);
        Ok(extents.0)
    }

    /// Reads all of `buffer` from `offset` of the file, a place that [`Self::extents`] named.
    ///
    /// # Errors
    /// When the file can't be read or has become shorter.
    pub fn read_file_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ImageError> {
        self.file.read_exact_at(buffer, offset).map_err(ImageError::io("block"))
    }

    /// What [`Self::extents`] reads of the file for `range` is read soon: the bitmap before each block.
    ///
    /// # Errors
    /// As there.
    pub fn will_need_structures(&self, range: Range<u64>) -> Result<(), ImageError> {
        let Some(header) = &self.table else { return Ok(()) };
        let end = range.end.min(self.footer.disk_bytes).div_ceil(header.block_bytes);
        let mut window = Window::default();
        for block in range.start / header.block_bytes..end {
            match self.entry(header, &mut window, block)? {
                UNUSED => {}
                entry => self.file.will_need(self.place(header, entry)?, bitmap_bytes(header)),
            }
        }
        Ok(())
    }

    /// Checks every entry of the allocation table: all blocks inside the file, none on top of another.
    ///
    /// Reads the whole table (2 MiB for each TiB of a disk with 2 MiB blocks) and needs as much memory.
    ///
    /// # Errors
    /// As [`Self::extents`], and when blocks overlap.
    pub fn check_blocks(&self) -> Result<(), ImageError> {
        let Some(header) = &self.table else { return Ok(()) };
        let count = self.footer.disk_bytes.div_ceil(header.block_bytes);
        let (mut window, mut used) = (Window::default(), Vec::new());
        for block in 0..count {
            let entry = self.entry(header, &mut window, block)?;
            if entry != UNUSED {
                self.place(header, entry)?;
                used.push(entry);
            }
        }
        used.sort_unstable();
        let sectors = (bitmap_bytes(header) + header.block_bytes) / SECTOR;
        match used.windows(2).find(|pair| u64::from(pair[1] - pair[0]) < sectors) {
            Some(pair) => Err(ImageError::damaged(format!(
                "two blocks share the place at sector {}",
                pair[1]
            ))),
            None => Ok(()),
        }
    }

    /// Bytes of a block; of a fixed image, all.
    pub(super) fn block_bytes(&self) -> u64 {
        self.table.as_ref().map_or(self.footer.disk_bytes, |header| header.block_bytes)
    }

    /// Bytes of the bitmap before each block.
    pub(super) fn bitmap_bytes(&self) -> u64 {
        self.table.as_ref().map_or(0, bitmap_bytes)
    }

    /// True when other programs don't take it for a VHD.
    pub fn is_hidden(&self) -> bool {
        self.footer.is_hidden
    }

    pub(super) fn footer(&self) -> &Footer {
        &self.footer
    }

    /// First byte behind all structures and blocks but the last footer.
    pub(super) fn used_end(&self) -> Result<u64, ImageError> {
        let header = self.header()?;
        let mut end = self.taken.iter().map(|range| range.end).max().unwrap_or_default();
        let mut window = Window::default();
        for block in 0..self.footer.disk_bytes.div_ceil(header.block_bytes) {
            let entry = self.entry(header, &mut window, block)?;
            if entry != UNUSED {
                let bytes = bitmap_bytes(header) + header.block_bytes;
                end = end.max(self.place(header, entry)? + bytes);
            }
        }
        Ok(end)
    }

    /// The table entry of a block.
    pub(super) fn lookup(&self, block: u64) -> Result<u32, ImageError> {
        self.entry(self.header()?, &mut Window::default(), block)
    }

    /// Where the bitmap of a block with this entry is.
    pub(super) fn place_of(&self, entry: u32) -> Result<u64, ImageError> {
        self.place(self.header()?, entry)
    }

    /// Makes the table name a block.
    pub(super) fn set_entry(&self, block: u64, entry: u32) -> Result<(), ImageError> {
        let at = self.header()?.table_offset + block * 4;
        self.file.write_all_at(&entry.to_be_bytes(), at).map_err(ImageError::io("write"))
    }

    fn header(&self) -> Result<&Header, ImageError> {
        self.table.as_ref().ok_or_else(|| ImageError::unsupported("changes of a fixed VHD"))
    }

    fn block_extents(
        &self,
        header: &Header,
        range: Range<u64>,
        extents: &mut Extents,
    ) -> Result<(), ImageError> {
        let mut window = Window::default();
        let mut at = range.start;
        while at < range.end {
            let block = at / header.block_bytes;
            let stop = range.end.min((block + 1) * header.block_bytes);
            match self.entry(header, &mut window, block)? {
                UNUSED => extents.push(at..stop, self.absent()),
                entry => self.sectors(header, block, entry, at..stop, extents)?,
            }
            at = stop;
        }
        Ok(())
    }

    /// Where that is which this file doesn't hold.
    fn absent(&self) -> Source {
        if self.parent.is_some() { Source::Parent } else { Source::Zero }
    }

    /// The table entry of a block that the table has.
    fn entry(&self, header: &Header, window: &mut Window, block: u64) -> Result<u32, ImageError> {
        if let Some(entry) = window.get(block) {
            return Ok(entry);
        }
        let entries = header.entries.saturating_sub(block).clamp(1, WINDOW);
        window.first = block;
        window.bytes.resize(entries as usize * 4, 0);
        self.file
            .read_exact_at(&mut window.bytes, header.table_offset + block * 4)
            .map_err(ImageError::io("allocation table"))?;
        Ok(window.bytes.u32_at(0))
    }

    /// Looks `range`, a part of block `block`, up in the bitmap before the block's data.
    fn sectors(
        &self,
        header: &Header,
        block: u64,
        entry: u32,
        range: Range<u64>,
        extents: &mut Extents,
    ) -> Result<(), ImageError> {
        let bitmap = self.place(header, entry)?;
        let data = bitmap + bitmap_bytes(header);
        let block_start = block * header.block_bytes;
        let first = (range.start - block_start) / SECTOR;
        let end = (range.end - block_start).div_ceil(SECTOR);
        let mut bits = vec![0; (end.div_ceil(8) - first / 8) as usize];
        self.file
            .read_exact_at(&mut bits, bitmap + first / 8)
            .map_err(ImageError::io("sector bitmap"))?;
        for (run, present) in Runs::new(&bits, BitOrder::HighestFirst, first..end) {
            let from = (block_start + run.start * SECTOR).max(range.start);
            let to = (block_start + run.end * SECTOR).min(range.end);
            let source =
                if present { Source::File(data + (from - block_start)) } else { self.absent() };
            extents.push(from..to, source);
        }
        Ok(())
    }

    /// The offset of a block's bitmap, checked: with its data in the file and not on top of the structures.
    fn place(&self, header: &Header, entry: u32) -> Result<u64, ImageError> {
        let start = u64::from(entry) * SECTOR;
        let end = start + bitmap_bytes(header) + header.block_bytes;
        let mut file_bytes = self.file_bytes.load(Ordering::Relaxed);
        if end > file_bytes {
            // A merge may have added blocks since.
            file_bytes = self.file.metadata().map_err(ImageError::io("length"))?.length_bytes;
            self.file_bytes.store(file_bytes, Ordering::Relaxed);
        }
        if end > file_bytes {
            return Err(ImageError::damaged(format!(
                "a block at {start} of a file of {file_bytes} bytes"
            )));
        }
        let next = self.taken.partition_point(|range| range.end <= start);
        match self.taken.get(next) {
            Some(range) if range.start < end => Err(ImageError::damaged(format!(
                "a block at {start} lies on top of the file's structures"
            ))),
            _ => Ok(start),
        }
    }
}

/// Bytes of the bitmap before each block: a bit for a sector, in whole sectors.
fn bitmap_bytes(header: &Header) -> u64 {
    (header.block_bytes / SECTOR / 8).next_multiple_of(SECTOR)
}

/// A piece of the allocation table.
#[derive(Default)]
struct Window {
    first: u64,
    bytes: Vec<u8>,
}

impl Window {
    fn get(&self, block: u64) -> Option<u32> {
        let at = usize::try_from(block.checked_sub(self.first)?).ok()?;
        (at < self.bytes.len() / 4).then(|| self.bytes.u32_at(at * 4))
    }
}
