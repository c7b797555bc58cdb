//! Merging tables: the parent's file grows by the child's pages and becomes the child's table.
//!
//! The cost is the child's pages and one index. [`append`] changes nothing that a reader of the parent's table sees, and may be
//! repeated; [`Appended::header`], written at the start of the file, makes the switch. Once more than half of the file
//! would be pages that nobody names, [`rewrite`] makes a new file instead.

use super::{
    BITMAP_BYTES, ENTRY_BYTES, Entry, Fields, HEADER_BYTES, Page, SegmentBitmap, Table, TableError,
    TableWriter, VERSION,
};
use crate::{
    hash::zero_hash,
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, block_len},
    storage::File,
};

/// Bytes gathered before they are written.
const PIECE_BYTES: usize = 1 << 18;

/// What was appended: a new table, once its header stands at the start of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Appended {
    /// The header's bytes.
    pub header: [u8; HEADER_BYTES],
    /// Bytes that were written.
    pub written: u64,
}

/// Appends to the parent's `file`, from which `parent` was opened, the pages of the child and an index of both; cuts off what
/// an earlier attempt left there. The caller syncs before it writes the header.
///
/// # Errors
/// When a page can't be read, the tables are of other disks, or the file can't be written.
pub fn append(file: &File, parent: &Table, child: &Table) -> Result<Appended, TableError> {
    check(parent, child)?;
    file.set_len(parent.end).map_err(TableError::io("write"))?;
    let mut out = Writer { file, at: parent.end, waiting: Vec::with_capacity(PIECE_BYTES) };
    let mut fresh = Vec::with_capacity(child.entries.len());
    for entry in &child.entries {
        let page = merged_page(parent, child, entry.segment)?.to_bytes();
        fresh.push(Entry {
            segment: entry.segment,
            offset: out.end(),
            count: ((page.len() - BITMAP_BYTES) / BlockHash::LEN) as u32,
            sum: crc32c::crc32c(&page),
            digest: entry.digest,
        });
        out.put(&page)?;
    }
    let (index_offset, mut sum, mut pages) = (out.end(), blake3::Hasher::new(), 0);
    for entry in both(&parent.entries, &fresh) {
        let bytes = entry.to_bytes();
        sum.update(&bytes);
        out.put(&bytes)?;
        pages += 1;
    }
    out.flush()?;
    let index_sum = *sum.finalize().as_bytes();
    let fields = Fields { version: VERSION, header: child.header, pages, index_offset, index_sum };
    Ok(Appended { header: fields.to_bytes(), written: out.at - parent.end })
}

/// Writes the merged table of parent and child into an empty `file`; the caller syncs.
///
/// # Errors
/// As [`append`].
pub fn rewrite(file: File, parent: &Table, child: &Table) -> Result<File, TableError> {
    check(parent, child)?;
    let mut writer = TableWriter::create(file, child.header)?;
    for entry in both(&parent.entries, &child.entries) {
        let page = merged_page(parent, child, entry.segment)?;
        writer.push(entry.segment, &page.present, &page.hashes, entry.digest)?;
    }
    writer.finish()
}

impl Table {
    /// True when appending `bytes` would leave a file of which less than half is in use.
    pub fn is_worth_rewriting(&self, child: &Table) -> bool {
        let pages = both(&self.entries, &child.entries).map(|entry| entry.page_bytes());
        let used = pages.map(|bytes| bytes + ENTRY_BYTES as u64).sum::<u64>();
        let added = child.entries.iter().map(Entry::page_bytes).sum::<u64>();
        let index = self.entries.len().max(child.entries.len()) * ENTRY_BYTES;
        (self.end + added + index as u64) / 2 > used + HEADER_BYTES as u64
    }

    /// Writes a header that [`append`] made.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn write_header(file: &File, header: &[u8; HEADER_BYTES]) -> Result<(), TableError> {
        file.write_all_at(header, 0).map_err(TableError::io("write"))
    }

    /// Reads the header's bytes, unchecked.
    ///
    /// # Errors
    /// When the file can't be read.
    pub fn read_header(file: &File) -> Result<[u8; HEADER_BYTES], TableError> {
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).map_err(TableError::io("header"))?;
        Ok(header)
    }

    /// Takes a header that was kept elsewhere.
    ///
    /// # Errors
    /// When the bytes are none.
    pub fn parse_header(bytes: &[u8]) -> Result<[u8; HEADER_BYTES], TableError> {
        let header =
            bytes.try_into().map_err(|_| TableError::damaged("a header of another length"))?;
        Fields::from_bytes(&header).map(|_| header)
    }
}

/// Bytes of data and table that merging `child` into `parent`'s files adds: blocks that the parent has nothing of, pages, index.
///
/// `shared`: the file is a clone, in which written blocks need space whatever the parent has, and runs of so many blocks none.
///
/// # Errors
/// When a page can't be read.
pub fn needed_bytes(parent: &Table, child: &Table, shared: Option<u64>) -> Result<u64, TableError> {
    check(parent, child)?;
    let disk_bytes = child.header.disk_bytes;
    let mut bytes = (parent.entries.len() + child.entries.len()) * ENTRY_BYTES;
    for (segment, _) in child.digests() {
        let (Some(new), old) = (child.page(segment)?, parent.page(segment)?) else { continue };
        let data = match shared {
            Some(least) => new.present.in_short_runs(least as usize),
            None => SegmentBitmap::of(&new, disk_bytes, segment)
                .without(&old.as_ref().map_or_else(SegmentBitmap::default, |old| {
                    SegmentBitmap::of(old, disk_bytes, segment)
                }))
                .count(),
        };
        let entries = new.hashes.len() + old.map_or(0, |page| page.hashes.len());
        bytes += data * BLOCK_BYTES as usize + BITMAP_BYTES + entries * BlockHash::LEN;
    }
    Ok(bytes as u64)
}

fn check(parent: &Table, child: &Table) -> Result<(), TableError> {
    if parent.header.disk_bytes == child.header.disk_bytes {
        return Ok(());
    }
    Err(TableError::impossible("a merge of tables of disks of different sizes"))
}

/// The child's entries over the parent's.
fn merged_page(parent: &Table, child: &Table, segment: u64) -> Result<Page, TableError> {
    match (parent.page(segment)?, child.page(segment)?) {
        (Some(below), Some(above)) => Ok(below.under(&above)),
        (Some(page), None) | (None, Some(page)) => Ok(page),
        (None, None) => Err(TableError::impossible(format!("no page of segment {segment}"))),
    }
}

/// Entries of both, ascending; where both have one the child's.
fn both<'a>(parent: &'a [Entry], child: &'a [Entry]) -> impl Iterator<Item = &'a Entry> {
    let (mut parent, mut child) = (parent.iter().peekable(), child.iter().peekable());
    std::iter::from_fn(move || match (parent.peek(), child.peek()) {
        (Some(below), Some(above)) if below.segment < above.segment => parent.next(),
        (Some(below), Some(above)) => {
            if below.segment == above.segment {
                parent.next();
            }
            child.next()
        }
        (Some(_), None) => parent.next(),
        (None, _) => child.next(),
    })
}

impl SegmentBitmap {
    /// The blocks of a page that are not zero.
    fn of(page: &Page, disk_bytes: u64, segment: u64) -> Self {
        let mut data = Self::default();
        for (block, hash) in page.present.blocks().zip(&page.hashes) {
            let len = block_len(disk_bytes, segment * SEGMENT_BLOCKS + block as u64);
            if *hash != zero_hash(len) {
                data.insert(block);
            }
        }
        data
    }

    fn without(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|word| self.0[word] & !other.0[word]))
    }

    /// Number of blocks in runs of less than `least`.
    fn in_short_runs(&self, least: usize) -> usize {
        let (mut short, mut run) = (0, 0);
        for block in 0..=SEGMENT_BLOCKS as usize {
            if self.contains(block) {
                run += 1;
                continue;
            }
            short += if run < least { run } else { 0 };
            run = 0;
        }
        short
    }
}

impl Page {
    fn under(&self, above: &Self) -> Self {
        let mut known = [None; SEGMENT_BLOCKS as usize];
        for page in [self, above] {
            for (block, hash) in page.present.blocks().zip(&page.hashes) {
                known[block] = Some(*hash);
            }
        }
        let mut present = SegmentBitmap::default();
        for block in (0..known.len()).filter(|block| known[*block].is_some()) {
            present.insert(block);
        }
        Self { present, hashes: known.into_iter().flatten().collect() }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(BITMAP_BYTES + self.hashes.len() * BlockHash::LEN);
        bytes.extend(self.present.0.iter().flat_map(|word| word.to_le_bytes()));
        bytes.extend(self.hashes.iter().flat_map(|hash| hash.0));
        bytes
    }
}

/// Gathers what is appended.
struct Writer<'a> {
    file: &'a File,
    at: u64,
    waiting: Vec<u8>,
}

impl Writer<'_> {
    fn end(&self) -> u64 {
        self.at + self.waiting.len() as u64
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), TableError> {
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= PIECE_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), TableError> {
        self.file.write_all_at(&self.waiting, self.at).map_err(TableError::io("write"))?;
        self.at = self.end();
        self.waiting.clear();
        Ok(())
    }
}
