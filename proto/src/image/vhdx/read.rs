//! Opens a VHDX of any origin and says where its data lies.

use std::ops::Range;

use uuid::Uuid;

use super::{
    Fields, MIB, bat,
    header::{self, Header},
    layout::{bat_entries, bat_index, chunk_ratio},
    log,
    metadata::{self, Metadata},
    region,
    replayed::ReplayedFile,
};
use crate::{
    image::{
        Geometry, ImageError, Kind, Parent, Source,
        stretches::{BitOrder, Extents, Runs},
    },
    storage::File,
};

/// Table entries read at once, 4 KiB.
const WINDOW: u64 = 512;

/// An open image. Nothing of its allocation table is kept in memory, so that blocks which a merge adds meanwhile are found.
#[derive(Debug)]
pub struct VhdxImage {
    pub(super) file: ReplayedFile,
    data_write: Uuid,
    is_hidden: bool,
    pub(super) metadata: Metadata,
    pub(super) ratio: u64,
    pub(super) bat_offset: u64,
    /// Log and regions, sorted: no block may lie there.
    pub(super) taken: Vec<Range<u64>>,
}

impl VhdxImage {
    /// Opens an image and checks all its structures but the blocks, which are checked when they are read (or all at once by
    /// [`Self::check_blocks`]).
    ///
    /// # Errors
    /// [`ImageError::DirtyLog`] when it wasn't closed, `Unsupported` when it needs what we don't know, `Damaged` when it breaks
    /// the format's rules.
    pub fn open(file: File) -> Result<Self, ImageError> {
        let header = header::read(&file)?;
        match header.log_id.is_nil() {
            true => Self::over(ReplayedFile::new(file).map_err(ImageError::io("length"))?, &header),
            false => Err(ImageError::DirtyLog),
        }
    }

    /// Opens an image that its writer may have left open: what its log holds counts as done. The file is not changed.
    ///
    /// # Errors
    /// As [`Self::open`], and when the log is damaged.
    pub fn open_foreign(file: File) -> Result<Self, ImageError> {
        let header = header::read(&file)?;
        let mut file = ReplayedFile::new(file).map_err(ImageError::io("length"))?;
        if !header.log_id.is_nil() {
            let log = read_log(&file, &header)?;
            let changes = log::read(&log, header.log_id, file.len())?;
            file = file.with(changes);
        }
        Self::over(file, &header)
    }

    fn over(file: ReplayedFile, header: &Header) -> Result<Self, ImageError> {
        let log = header.log_offset..header.log_offset.saturating_add(header.log_bytes);
        let regions = region::read(&file, log)?;
        let metadata = metadata::read(&file, regions.metadata)?;
        let ratio = chunk_ratio(metadata.geometry.logical_sector_bytes, metadata.block_bytes);
        let image = Self {
            file,
            data_write: header.data_write,
            is_hidden: header.is_hidden,
            ratio,
            metadata,
            bat_offset: regions.bat.start,
            taken: regions.taken,
        };
        let entries = bat_entries(image.kind(), image.payload_count(), ratio);
        if entries * 8 > regions.bat.end - regions.bat.start {
            return Err(ImageError::damaged(format!(
                "{entries} blocks don't fit the allocation table"
            )));
        }
        Ok(image)
    }

    /// The file itself, without what its log changes.
    pub fn file(&self) -> &File {
        self.file.own()
    }

    /// True when other programs don't take it for a VHDX.
    pub fn is_hidden(&self) -> bool {
        self.is_hidden
    }

    /// Virtual size and sectors.
    pub fn geometry(&self) -> Geometry {
        self.metadata.geometry
    }

    /// Base or child.
    pub fn kind(&self) -> Kind {
        if self.metadata.parent.is_some() { Kind::Differencing } else { Kind::Dynamic }
    }

    /// The id that a child of this image names.
    pub fn data_write(&self) -> Uuid {
        self.data_write
    }

    /// The disk's id.
    pub fn virtual_disk(&self) -> Uuid {
        self.metadata.virtual_disk
    }

    /// What a child says about its parent. The name comes from the file: compare it before using it as a path.
    pub fn parent(&self) -> Option<&Parent> {
        self.metadata.parent.as_ref()
    }

    /// All file names that a child gives its parent, the most trusted first.
    pub fn parent_names(&self) -> &[String] {
        &self.metadata.parent_names
    }

    /// Says where each stretch of `range` (bytes of the disk) is, in order and without gaps. Past the disk's end it is zero.
    ///
    /// The answer can have an entry for each sector: ask for large disks in pieces.
    ///
    /// # Errors
    /// When the table can't be read, or names blocks outside the file or on top of its structures.
    pub fn extents(&self, range: Range<u64>) -> Result<Vec<(Range<u64>, Source)>, ImageError> {
        let mut extents = Extents(Vec::new());
        let (size, block_bytes) = (self.geometry().disk_bytes, self.metadata.block_bytes);
        let end = range.end.min(size);
        let (mut window, mut bitmap) = (Window::default(), Bitmap::default());
        let mut at = range.start;
        while at < end {
            let block = at / block_bytes;
            let stop = end.min((block + 1) * block_bytes);
            let entry = self.entry(&mut window, block, end.div_ceil(block_bytes))?;
            bitmap.until = end;
            self.block_extents(block, entry, at..stop, &mut bitmap, &mut extents)?;
            at = stop;
        }
        if at < range.end {
            extents.push(at..range.end, Source::Zero);
        }
        Ok(extents.0)
    }

    /// Reads all of `buffer` from `offset` of the file, a place that [`Self::extents`] named.
    ///
    /// # Errors
    /// When the file can't be read or has become shorter.
    pub fn read_file_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), ImageError> {
        self.file.read_exact_at(buffer, offset).map_err(ImageError::io("block"))
    }

    /// What [`Self::extents`] reads of the file for `range` is read soon: the table's entries, and the sector bitmaps.
    ///
    /// # Errors
    /// As there.
    pub fn will_need_structures(&self, range: Range<u64>) -> Result<(), ImageError> {
        let (size, block_bytes) = (self.geometry().disk_bytes, self.metadata.block_bytes);
        let blocks = range.start / block_bytes..range.end.min(size).div_ceil(block_bytes);
        let Some(last) = blocks.clone().last() else { return Ok(()) };
        let entries = bat_index(blocks.start, self.ratio)..=bat_index(last, self.ratio);
        let bytes = (entries.end() + 1 - entries.start()) * 8;
        self.file().will_need(self.bat_offset + entries.start() * 8, bytes);
        if self.kind() == Kind::Dynamic {
            return Ok(());
        }
        // Bits of a payload block in the bitmap of its chunk, in bytes.
        let stride = MIB / self.ratio;
        for chunk in blocks.start / self.ratio..=last / self.ratio {
            let first = (chunk * self.ratio).max(blocks.start);
            let end = ((chunk + 1) * self.ratio).min(blocks.end);
            let entry = self.bitmap_entry(first)?;
            if bat::state(entry) == bat::BITMAP_PRESENT {
                let bitmap = self.place(entry, MIB)?;
                self.file().will_need(bitmap + first % self.ratio * stride, (end - first) * stride);
            }
        }
        Ok(())
    }

    /// Checks every entry of the allocation table: all blocks inside the file, none on top of another.
    ///
    /// Reads the whole table (4 MiB for each TiB of a disk with 2 MiB blocks) and needs a bit of memory for each MiB of the
    /// file.
    ///
    /// # Errors
    /// As [`Self::extents`], and when blocks overlap.
    pub fn check_blocks(&self) -> Result<(), ImageError> {
        let (count, mut window) = (self.payload_count(), Window::default());
        let mut used = UsedSpace::new(self.file.len())?;
        for block in 0..count {
            let entry = self.entry(&mut window, block, count)?;
            if matches!(bat::state(entry), bat::FULLY_PRESENT | bat::PARTIALLY_PRESENT) {
                used.take(
                    self.place(entry, self.metadata.block_bytes)?,
                    self.metadata.block_bytes,
                )?;
            }
            let chunk_ends = (block + 1) % self.ratio == 0 || block + 1 == count;
            if self.kind() == Kind::Differencing && chunk_ends {
                let entry = self.bitmap_entry(block)?;
                if bat::state(entry) == bat::BITMAP_PRESENT {
                    used.take(self.place(entry, MIB)?, MIB)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn payload_count(&self) -> u64 {
        self.geometry().disk_bytes.div_ceil(self.metadata.block_bytes)
    }

    /// The table entry of payload block `block`; reads ahead for blocks below `end`.
    pub(super) fn entry(
        &self,
        window: &mut Window,
        block: u64,
        end: u64,
    ) -> Result<u64, ImageError> {
        let index = bat_index(block, self.ratio);
        if let Some(entry) = window.get(index) {
            return Ok(entry);
        }
        let last = bat_index(end.max(block + 1) - 1, self.ratio);
        let entries = (last + 1 - index).min(WINDOW);
        window.first = index;
        window.bytes.resize(entries as usize * 8, 0);
        self.file
            .read_exact_at(&mut window.bytes, self.bat_offset + index * 8)
            .map_err(ImageError::io("allocation table"))?;
        Ok(window.bytes.u64_at(0))
    }

    /// The table entry of the sector bitmap that serves payload block `block` of a child.
    pub(super) fn bitmap_entry(&self, block: u64) -> Result<u64, ImageError> {
        let mut bytes = [0; 8];
        self.file
            .read_exact_at(&mut bytes, self.bitmap_entry_offset(block))
            .map_err(ImageError::io("allocation table"))?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Where in the file that entry is.
    pub(super) fn bitmap_entry_offset(&self, block: u64) -> u64 {
        let index = block / self.ratio * (self.ratio + 1) + self.ratio;
        self.bat_offset + index * 8
    }

    /// Whether the sector bitmap has all of payload block `block`.
    pub(super) fn all_sectors(&self, block: u64) -> Result<bool, ImageError> {
        let block_bytes = self.metadata.block_bytes;
        let range = block * block_bytes..self.geometry().disk_bytes.min((block + 1) * block_bytes);
        let mut extents = Extents(Vec::new());
        let mut bitmap = Bitmap { until: range.end, ..Bitmap::default() };
        self.sectors(block, 0, range, &mut bitmap, &mut extents)?;
        Ok(extents.0.iter().all(|(_, source)| *source != Source::Parent))
    }

    fn block_extents(
        &self,
        block: u64,
        entry: u64,
        range: Range<u64>,
        bitmap: &mut Bitmap,
        extents: &mut Extents,
    ) -> Result<(), ImageError> {
        let block_bytes = self.metadata.block_bytes;
        match (bat::state(entry), self.kind()) {
            (bat::NOT_PRESENT, Kind::Differencing) => extents.push(range, Source::Parent),
            (bat::NOT_PRESENT | bat::UNDEFINED | bat::ZERO | bat::UNMAPPED, _) => {
                extents.push(range, Source::Zero)
            }
            (bat::FULLY_PRESENT, _) => {
                let start = self.place(entry, block_bytes)?;
                let within = range.start % block_bytes;
                extents.push(range, Source::File(start + within));
            }
            (bat::PARTIALLY_PRESENT, Kind::Differencing) => {
                let start = self.place(entry, block_bytes)?;
                return self.sectors(block, start, range, bitmap, extents);
            }
            (state, _) => {
                return Err(ImageError::damaged(format!("block {block} has state {state}")));
            }
        }
        Ok(())
    }

    /// Looks `range`, a part of block `block` whose data starts at `start`, up in the sector bitmap, of which `bitmap` has a part.
    fn sectors(
        &self,
        block: u64,
        start: u64,
        range: Range<u64>,
        bitmap: &mut Bitmap,
        extents: &mut Extents,
    ) -> Result<(), ImageError> {
        let block_bytes = self.metadata.block_bytes;
        let sector_bytes = u64::from(self.geometry().logical_sector_bytes);
        let block_start = block * block_bytes;
        // Sectors within the chunk, whose bitmap block has 2^23 bits.
        let chunk = block / self.ratio;
        let chunk_start = chunk * self.ratio * block_bytes;
        let first = (range.start - chunk_start) / sector_bytes;
        let end = (range.end - chunk_start).div_ceil(sector_bytes);
        if !bitmap.has(chunk, first / 8..end.div_ceil(8)) {
            let until = bitmap.until.clamp(range.end, chunk_start + self.ratio * block_bytes);
            let last = (until - chunk_start).div_ceil(sector_bytes).div_ceil(8);
            self.read_bits(block, first / 8..last, bitmap)?;
        }
        let bits = bitmap.at(first / 8);
        for (run, present) in Runs::new(bits, BitOrder::LowestFirst, first..end) {
            let from = (chunk_start + run.start * sector_bytes).max(range.start);
            let to = (chunk_start + run.end * sector_bytes).min(range.end);
            let source =
                if present { Source::File(start + (from - block_start)) } else { Source::Parent };
            extents.push(from..to, source);
        }
        Ok(())
    }

    /// Reads some bytes of the sector bitmap that serves payload block `block`.
    fn read_bits(
        &self,
        block: u64,
        bytes: Range<u64>,
        bitmap: &mut Bitmap,
    ) -> Result<(), ImageError> {
        let entry = self.bitmap_entry(block)?;
        if bat::state(entry) != bat::BITMAP_PRESENT {
            return Err(ImageError::damaged(format!(
                "block {block} is partial, but its sector bitmap is missing"
            )));
        }
        let place = self.place(entry, MIB)?;
        // Nothing is known of them if that fails.
        bitmap.chunk = None;
        bitmap.bits.resize((bytes.end - bytes.start) as usize, 0);
        self.file
            .read_exact_at(&mut bitmap.bits, place + bytes.start)
            .map_err(ImageError::io("sector bitmap"))?;
        (bitmap.chunk, bitmap.first) = (Some(block / self.ratio), bytes.start);
        Ok(())
    }

    /// The offset of a block of `bytes`, checked: in the file and not on top of its structures.
    pub(super) fn place(&self, entry: u64, bytes: u64) -> Result<u64, ImageError> {
        let start = bat::offset(entry);
        let end = start.checked_add(bytes).filter(|_| start >= MIB);
        let file_bytes = self.file.len_up_to(end.unwrap_or(0)).map_err(ImageError::io("length"))?;
        let end = end.filter(|end| *end <= file_bytes).ok_or_else(|| {
            ImageError::damaged(format!("a block at {start} of a file of {file_bytes} bytes"))
        })?;
        let next = self.taken.partition_point(|range| range.end <= start);
        match self.taken.get(next) {
            Some(range) if range.start < end => Err(ImageError::damaged(format!(
                "a block at {start} lies on top of the file's structures"
            ))),
            _ => Ok(start),
        }
    }
}

/// Some bytes of a chunk's sector bitmap, read at once for all blocks of a range.
#[derive(Default)]
struct Bitmap {
    /// End of the range, in bytes of the disk.
    until: u64,
    chunk: Option<u64>,
    /// Place of the first of them in the bitmap.
    first: u64,
    bits: Vec<u8>,
}

impl Bitmap {
    fn has(&self, chunk: u64, bytes: Range<u64>) -> bool {
        let end = self.first + self.bits.len() as u64;
        self.chunk == Some(chunk) && self.first <= bytes.start && bytes.end <= end
    }

    /// Those from a place on, which it has.
    fn at(&self, byte: u64) -> &[u8] {
        self.bits.get((byte - self.first) as usize..).unwrap_or_default()
    }
}

/// The whole log of a file, whose place is checked.
fn read_log(file: &ReplayedFile, header: &Header) -> Result<Vec<u8>, ImageError> {
    let (at, bytes) = (header.log_offset, header.log_bytes);
    if bytes > log::MAX_LOG_BYTES {
        return Err(ImageError::unsupported(format!("a log of {bytes} bytes to be replayed")));
    }
    let inside = at.checked_add(bytes).is_some_and(|end| end <= file.len());
    if !inside || bytes == 0 || !bytes.is_multiple_of(MIB) || !at.is_multiple_of(MIB) || at < MIB {
        return Err(ImageError::damaged(format!("a log of {bytes} bytes at {at}")));
    }
    let mut log = vec![0; bytes as usize];
    file.read_exact_at(&mut log, at).map_err(ImageError::io("log"))?;
    Ok(log)
}

/// Which MiB of a file hold a block.
struct UsedSpace(Vec<u64>);

impl UsedSpace {
    /// More than twice the largest disk: a longer file is refused rather than paid for with memory.
    const MAX_FILE_BYTES: u64 = 160 << 40;

    fn new(file_bytes: u64) -> Result<Self, ImageError> {
        if file_bytes > Self::MAX_FILE_BYTES {
            return Err(ImageError::unsupported(format!("a file of {file_bytes} bytes")));
        }
        Ok(Self(vec![0; (file_bytes / MIB / 64) as usize + 1]))
    }

    fn take(&mut self, start: u64, bytes: u64) -> Result<(), ImageError> {
        for place in start / MIB..(start + bytes) / MIB {
            let (word, bit) = (&mut self.0[(place / 64) as usize], 1 << (place % 64));
            if *word & bit != 0 {
                return Err(ImageError::damaged(format!(
                    "two blocks share the place at {}",
                    place * MIB
                )));
            }
            *word |= bit;
        }
        Ok(())
    }
}

/// A piece of the allocation table.
#[derive(Default)]
pub(super) struct Window {
    first: u64,
    bytes: Vec<u8>,
}

impl Window {
    fn get(&self, index: u64) -> Option<u64> {
        let at = usize::try_from(index.checked_sub(self.first)?).ok()?;
        (at < self.bytes.len() / 8).then(|| self.bytes.u64_at(at * 8))
    }
}
