//! Entries of the block allocation table, written in order without holding the table.

use crate::hash::is_zero;

use super::{MIB, PAGE};
use crate::{image::ImageError, storage::File};

pub(super) const NOT_PRESENT: u64 = 0;
pub(super) const UNDEFINED: u64 = 1;
pub(super) const ZERO: u64 = 2;
pub(super) const UNMAPPED: u64 = 3;
pub(super) const FULLY_PRESENT: u64 = 6;
pub(super) const PARTIALLY_PRESENT: u64 = 7;
/// State of a sector bitmap block that is there.
pub(super) const BITMAP_PRESENT: u64 = 6;

/// The state of an entry.
pub(super) fn state(entry: u64) -> u64 {
    entry & 7
}

/// The file offset of an entry, a multiple of 1 MiB.
pub(super) fn offset(entry: u64) -> u64 {
    entry & !(MIB - 1)
}

/// Writes a table page by page. A page of zeros is left a hole, so that an unchanged child of a large disk stays small.
pub(super) struct TableWriter<'a> {
    file: &'a File,
    offset: u64,
    page: Vec<u8>,
}

impl<'a> TableWriter<'a> {
    pub(super) fn new(file: &'a File, offset: u64) -> Self {
        Self { file, offset, page: Vec::with_capacity(PAGE) }
    }

    pub(super) fn push(&mut self, entry: u64) -> Result<(), ImageError> {
        self.page.extend_from_slice(&entry.to_le_bytes());
        if self.page.len() == PAGE { self.flush() } else { Ok(()) }
    }

    /// Writes what is left; the rest of the table stays zero.
    pub(super) fn finish(mut self) -> Result<(), ImageError> {
        self.page.resize(PAGE, 0);
        self.flush()
    }

    fn flush(&mut self) -> Result<(), ImageError> {
        write_page(self.file, &self.page, self.offset)?;
        self.offset += PAGE as u64;
        self.page.clear();
        Ok(())
    }
}

/// Writes a page, unless it would only turn a hole into zeros. What an earlier attempt left there is overwritten.
fn write_page(file: &File, page: &[u8], offset: u64) -> Result<(), ImageError> {
    if is_zero(page) {
        let mut there = [0; PAGE];
        file.read_exact_at(&mut there, offset).map_err(ImageError::io("read"))?;
        if is_zero(&there) {
            return Ok(());
        }
    }
    file.write_all_at(page, offset).map_err(ImageError::io("write"))
}
