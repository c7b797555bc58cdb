//! Table files: the block hashes of one image, beside it.
//!
//! Like the image, a table holds only what differs from the parent: for each segment with a difference a page with a bitmap of
//! its changed blocks and their hashes. [`TableStack`] puts a chain's tables together. Blocks that no table names are zero.
//!
//! ```text
//! 0    header: magic, version, snapshot, disk size, place and sum of the index; then its own sum
//! 160  pages: 128 bytes of bitmap, 32 bytes for each hash; version 1: one after another in ascending order of segments
//! then index: 56 bytes for each page
//! ```
//!
//! Numbers are little-endian. Index and header carry BLAKE3 sums, pages CRC-32C. The header is written last, so a file that was
//! not finished is never taken for a table. The caller syncs and renames.
//!
//! A merge appends pages and a new index to the parent's table ([`append`]) and makes it the child's by its header, version 2.
//! Pages that were read through an older header stay where they are, so a table that is open goes on. What lies behind the
//! index is of an attempt that did not get to the header.

use std::{io, ops::Range};

use crate::{
    ids::{
        BLOCK_BYTES, BlockHash, MAX_DISK_BYTES, SEGMENT_BLOCKS, SnapshotId, block_count,
        segment_count,
    },
    storage::{Appender, File},
};

mod append;
mod difference;
mod stack;
#[cfg(test)]
mod tests;

pub use append::{Appended, append, needed_bytes, rewrite};
pub use difference::{Difference, Differing};
pub use stack::TableStack;

const MAGIC: &[u8; 8] = b"JANUSTBL";
/// Version of a table that was written at once.
const WRITTEN: u32 = 1;
/// Version of a table that grew by merges: the newest known.
const VERSION: u32 = 2;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 160;
/// Header bytes before the header's own sum.
const HEADER_FIELDS: usize = 128;
const BITMAP_BYTES: usize = SEGMENT_BLOCKS as usize / 8;
const ENTRY_BYTES: usize = 56;
/// Entries of the index read at once.
const ENTRIES_AT_ONCE: usize = 1024;

/// Which blocks of a segment a page holds, lowest bit of the first word first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentBitmap(pub [u64; 16]);

impl SegmentBitmap {
    /// Marks block `block` of the segment (0 to 1023).
    pub fn insert(&mut self, block: usize) {
        self.0[block / 64] |= 1 << (block % 64);
    }

    /// Whether block `block` of the segment is marked.
    pub fn contains(&self, block: usize) -> bool {
        self.0.get(block / 64).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// Number of marked blocks.
    pub fn count(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The marked blocks, ascending.
    pub fn blocks(&self) -> impl Iterator<Item = usize> + '_ {
        (0..SEGMENT_BLOCKS as usize).filter(|block| self.contains(*block))
    }

    /// The half of it that belongs to payload block `index` of an image, of which a segment has two.
    pub fn half(&self, index: u64) -> [u64; 8] {
        let from = (index % 2) as usize * 8;
        std::array::from_fn(|word| self.0[from + word])
    }

    /// Whether all marked blocks are below `end`.
    fn ends_by(&self, end: usize) -> bool {
        (end..SEGMENT_BLOCKS as usize).all(|block| !self.contains(block))
    }
}

/// What a table belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableHeader {
    /// The snapshot whose image lies beside it.
    pub snapshot: SnapshotId,
    /// True size of the disk in bytes.
    pub disk_bytes: u64,
}

/// The entries of one segment in one table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// Which blocks differ from the parent.
    pub present: SegmentBitmap,
    /// Their hashes, in order.
    pub hashes: Vec<BlockHash>,
}

/// Why a table could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The file itself failed.
    #[error("{action} of a hash table")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not what a writer left there.
    #[error("damaged hash table: {reason}")]
    Damaged {
        /// What doesn't fit.
        reason: String,
    },
    /// The file was written by a newer program.
    #[error(
        "hash table has format version {found}, this program knows versions up to {VERSION}: use a newer one"
    )]
    NewerVersion {
        /// The file's version.
        found: u32,
    },
    /// The caller asked for something that can't be.
    #[error("impossible hash table: {reason}")]
    Impossible {
        /// What can't be.
        reason: String,
    },
}

impl TableError {
    fn damaged(reason: impl Into<String>) -> Self {
        Self::Damaged { reason: reason.into() }
    }

    fn impossible(reason: impl Into<String>) -> Self {
        Self::Impossible { reason: reason.into() }
    }

    fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| match source.kind() {
            io::ErrorKind::UnexpectedEof => Self::damaged(format!("file ends within the {action}")),
            _ => Self::Io { action, source },
        }
    }
}

/// Blocks of segment `segment` of a disk of `disk_bytes`.
fn blocks_of(disk_bytes: u64, segment: u64) -> usize {
    block_count(disk_bytes)
        .saturating_sub(segment.saturating_mul(SEGMENT_BLOCKS))
        .min(SEGMENT_BLOCKS) as usize
}

/// An entry of the index.
#[derive(Clone, Copy, Debug)]
struct Entry {
    segment: u64,
    offset: u64,
    count: u32,
    sum: u32,
    digest: BlockHash,
}

impl Entry {
    fn to_bytes(self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..8].copy_from_slice(&self.segment.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.offset.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.count.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.sum.to_le_bytes());
        bytes[24..].copy_from_slice(&self.digest.0);
        bytes
    }

    fn from_bytes(bytes: &[u8; ENTRY_BYTES]) -> Self {
        Self {
            segment: u64::from_le_bytes(array(bytes, 0)),
            offset: u64::from_le_bytes(array(bytes, 8)),
            count: u32::from_le_bytes(array(bytes, 16)),
            sum: u32::from_le_bytes(array(bytes, 20)),
            digest: BlockHash(array(bytes, 24)),
        }
    }

    fn page_bytes(&self) -> u64 {
        BITMAP_BYTES as u64 + u64::from(self.count) * BlockHash::LEN as u64
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

/// Writes a table, segment by segment.
#[derive(Debug)]
pub struct TableWriter {
    file: Appender,
    header: TableHeader,
    entries: Vec<Entry>,
    end: u64,
}

impl TableWriter {
    /// A writer into an empty file; what is in it is cut off.
    ///
    /// # Errors
    /// When the file can't be written or the disk is larger than the format allows.
    pub fn create(file: File, header: TableHeader) -> Result<Self, TableError> {
        if header.disk_bytes > MAX_DISK_BYTES {
            return Err(TableError::impossible(format!("a disk of {} bytes", header.disk_bytes)));
        }
        let end = HEADER_BYTES as u64;
        file.set_len(0).map_err(TableError::io("write"))?;
        Ok(Self { file: Appender::new(file, end), header, entries: Vec::new(), end })
    }

    /// Adds a segment: the hashes of its blocks in `present`, in order, and the digest of the whole segment with the parent's
    /// blocks. Segments ascend. One without blocks is left out: it is its parent's.
    ///
    /// # Errors
    /// When the file can't be written, or segment, bitmap and hashes don't fit each other and the disk.
    pub fn push(
        &mut self,
        segment: u64,
        present: &SegmentBitmap,
        hashes: &[BlockHash],
        digest: BlockHash,
    ) -> Result<(), TableError> {
        let fits = present.ends_by(blocks_of(self.header.disk_bytes, segment))
            && present.count() == hashes.len();
        if !fits || self.entries.last().is_some_and(|last| last.segment >= segment) {
            return Err(TableError::impossible(format!(
                "segment {segment} with {} blocks and {} hashes",
                present.count(),
                hashes.len()
            )));
        }
        if hashes.is_empty() {
            return Ok(());
        }
        let mut page = Vec::with_capacity(BITMAP_BYTES + hashes.len() * BlockHash::LEN);
        page.extend(present.0.iter().flat_map(|word| word.to_le_bytes()));
        page.extend(hashes.iter().flat_map(|hash| hash.0));
        self.file.push(&page).map_err(TableError::io("write"))?;
        let sum = crc32c::crc32c(&page);
        self.entries.push(Entry {
            segment,
            offset: self.end,
            count: hashes.len() as u32,
            sum,
            digest,
        });
        self.end += page.len() as u64;
        Ok(())
    }

    /// Writes index and header and hands the file back, not yet synced.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn finish(mut self) -> Result<File, TableError> {
        let mut sum = blake3::Hasher::new();
        for entry in &self.entries {
            let bytes = entry.to_bytes();
            sum.update(&bytes);
            self.file.push(&bytes).map_err(TableError::io("write"))?;
        }
        let file = self.file.finish().map_err(TableError::io("write"))?;
        let fields = Fields {
            version: WRITTEN,
            header: self.header,
            pages: self.entries.len() as u64,
            index_offset: self.end,
            index_sum: *sum.finalize().as_bytes(),
        };
        file.write_all_at(&fields.to_bytes(), 0).map_err(TableError::io("write"))?;
        Ok(file)
    }
}

/// The header's fields.
struct Fields {
    version: u32,
    header: TableHeader,
    pages: u64,
    index_offset: u64,
    index_sum: [u8; 32],
}

impl Fields {
    fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&self.version.to_le_bytes());
        bytes[12..16].copy_from_slice(&(BLOCK_BYTES as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.header.disk_bytes.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.pages.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.index_offset.to_le_bytes());
        bytes[40..72].copy_from_slice(&self.index_sum);
        // A UUID as text, 36 characters.
        let snapshot = self.header.snapshot.to_string();
        bytes[72..108].copy_from_slice(&snapshot.as_bytes()[..36]);
        let sum = blake3::hash(&bytes[..HEADER_FIELDS]);
        bytes[HEADER_FIELDS..].copy_from_slice(sum.as_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Result<Self, TableError> {
        if &bytes[..8] != MAGIC {
            return Err(TableError::damaged("it does not start with \"JANUSTBL\""));
        }
        // Before the sum: a newer header may be laid out differently.
        let version = u32::from_le_bytes(array(bytes, 8));
        if version > VERSION {
            return Err(TableError::NewerVersion { found: version });
        }
        if blake3::hash(&bytes[..HEADER_FIELDS]).as_bytes() != &bytes[HEADER_FIELDS..] {
            return Err(TableError::damaged("the header doesn't match its sum"));
        }
        let snapshot = std::str::from_utf8(&bytes[72..108]).ok().and_then(|text| text.parse().ok());
        let snapshot = snapshot.ok_or_else(|| TableError::damaged("its snapshot id is none"))?;
        let disk_bytes = u64::from_le_bytes(array(bytes, 16));
        let block_bytes = u32::from_le_bytes(array(bytes, 12));
        if version == 0 || u64::from(block_bytes) != BLOCK_BYTES || disk_bytes > MAX_DISK_BYTES {
            return Err(TableError::damaged(format!(
                "version {version}, blocks of {block_bytes} bytes, a disk of {disk_bytes} bytes"
            )));
        }
        Ok(Self {
            version,
            header: TableHeader { snapshot, disk_bytes },
            pages: u64::from_le_bytes(array(bytes, 24)),
            index_offset: u64::from_le_bytes(array(bytes, 32)),
            index_sum: array(bytes, 40),
        })
    }
}

/// An open table: its index in memory, its pages on disk.
#[derive(Debug)]
pub struct Table {
    file: File,
    header: TableHeader,
    entries: Vec<Entry>,
    /// First byte behind the index.
    end: u64,
}

impl Table {
    /// Opens a table and checks header and index.
    ///
    /// Needs 56 bytes of memory for each segment in it (14 MiB for each TiB that changed), and never more than the file really
    /// holds.
    ///
    /// # Errors
    /// `NewerVersion` when this program is too old for it, `Damaged` when it isn't whole.
    pub fn open(file: File) -> Result<Self, TableError> {
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).map_err(TableError::io("header"))?;
        let fields = Fields::from_bytes(&header)?;
        let file_bytes = file.metadata().map_err(TableError::io("length"))?.length_bytes;
        let index_bytes = fields.pages.checked_mul(ENTRY_BYTES as u64);
        let end = index_bytes.and_then(|bytes| fields.index_offset.checked_add(bytes));
        let end = end.filter(|end| *end <= file_bytes).ok_or_else(|| {
            let (pages, at) = (fields.pages, fields.index_offset);
            TableError::damaged(format!("{pages} pages and an index at {at} in {file_bytes} bytes"))
        })?;
        if fields.pages > segment_count(fields.header.disk_bytes) {
            return Err(TableError::damaged(format!("{} pages for its disk", fields.pages)));
        }
        let entries = read_index(&file, &fields)?;
        Ok(Self { file, header: fields.header, entries, end })
    }

    /// What the table belongs to.
    pub fn header(&self) -> TableHeader {
        self.header
    }

    /// The entries of a segment, or `None` when it doesn't differ from the parent.
    ///
    /// # Errors
    /// When the page can't be read or doesn't match its sum.
    pub fn page(&self, segment: u64) -> Result<Option<Page>, TableError> {
        let Some(entry) = self.entry(segment) else { return Ok(None) };
        let mut bytes = vec![0; entry.page_bytes() as usize];
        self.file.read_exact_at(&mut bytes, entry.offset).map_err(TableError::io("page"))?;
        if crc32c::crc32c(&bytes) != entry.sum {
            return Err(TableError::damaged(format!(
                "the page of segment {segment} doesn't match its sum"
            )));
        }
        let present =
            SegmentBitmap(std::array::from_fn(|word| u64::from_le_bytes(array(&bytes, word * 8))));
        let fits = present.ends_by(blocks_of(self.header.disk_bytes, segment));
        if !fits || present.count() != entry.count as usize {
            return Err(TableError::damaged(format!(
                "the page of segment {segment} has a wrong bitmap"
            )));
        }
        let hashes = bytes[BITMAP_BYTES..]
            .chunks_exact(BlockHash::LEN)
            .map(|hash| BlockHash(array(hash, 0)));
        Ok(Some(Page { present, hashes: hashes.collect() }))
    }

    /// The segments of the table, ascending, with the digests they have in this snapshot.
    pub fn digests(&self) -> impl Iterator<Item = (u64, BlockHash)> + '_ {
        self.entries.iter().map(|entry| (entry.segment, entry.digest))
    }

    /// Those of a range of segments.
    pub fn digests_in(&self, range: Range<u64>) -> impl Iterator<Item = (u64, BlockHash)> + '_ {
        let at = |segment: u64| self.entries.partition_point(|entry| entry.segment < segment);
        let entries = self.entries.get(at(range.start)..at(range.end)).unwrap_or_default();
        entries.iter().map(|entry| (entry.segment, entry.digest))
    }

    /// The digest of a segment, if it differs from the parent.
    pub fn digest(&self, segment: u64) -> Option<BlockHash> {
        self.entry(segment).map(|entry| entry.digest)
    }

    fn entry(&self, segment: u64) -> Option<&Entry> {
        let at = self.entries.binary_search_by_key(&segment, |entry| entry.segment).ok()?;
        self.entries.get(at)
    }
}

/// Reads the index in pieces, so that memory grows only with entries that are right so far.
fn read_index(file: &File, fields: &Fields) -> Result<Vec<Entry>, TableError> {
    let (mut entries, mut sum): (Vec<Entry>, _) = (Vec::new(), blake3::Hasher::new());
    let (mut place, mut left) = (fields.index_offset, fields.pages as usize);
    let mut end = HEADER_BYTES as u64;
    while left > 0 {
        let mut piece = vec![0; left.min(ENTRIES_AT_ONCE) * ENTRY_BYTES];
        file.read_exact_at(&mut piece, place).map_err(TableError::io("index"))?;
        sum.update(&piece);
        for bytes in piece.as_chunks().0 {
            let entry = Entry::from_bytes(bytes);
            let ascends = entries.last().is_none_or(|last| last.segment < entry.segment);
            let blocks = blocks_of(fields.header.disk_bytes, entry.segment);
            let place = match fields.version {
                WRITTEN => end..=end,
                _ => HEADER_BYTES as u64..=fields.index_offset.saturating_sub(entry.page_bytes()),
            };
            let fits =
                place.contains(&entry.offset) && (1..=blocks).contains(&(entry.count as usize));
            if !ascends || !fits {
                return Err(TableError::damaged(format!(
                    "its index is wrong at segment {}",
                    entry.segment
                )));
            }
            end += entry.page_bytes();
            entries.push(entry);
        }
        place += piece.len() as u64;
        left -= piece.len() / ENTRY_BYTES;
    }
    let has_gap = fields.version == WRITTEN && end != fields.index_offset;
    if has_gap || sum.finalize().as_bytes() != &fields.index_sum {
        return Err(TableError::damaged("the index doesn't match its sum"));
    }
    Ok(entries)
}
