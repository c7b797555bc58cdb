//! A file as its log would leave it, without writing to it.

use std::{
    collections::BTreeMap,
    fmt, io,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use super::log::{Change, Changes, SECTOR};
use crate::storage::File;

/// A file, and what its log changes. Threads may read at the same time.
pub(super) struct ReplayedFile {
    file: File,
    /// Length of the file itself when it was last asked.
    own_bytes: AtomicU64,
    /// Length that the log gives it; 0 without a log.
    log_bytes: u64,
    zeros: Vec<Range<u64>>,
    pages: BTreeMap<u64, Box<[u8; SECTOR]>>,
}

impl fmt::Debug for ReplayedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let replayed = self.pages.len();
        f.debug_struct("ReplayedFile").field("file", &self.file).field("pages", &replayed).finish()
    }
}

impl ReplayedFile {
    /// The file as it is.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let own_bytes = file.metadata()?.length_bytes.into();
        Ok(Self { file, own_bytes, log_bytes: 0, zeros: Vec::new(), pages: BTreeMap::new() })
    }

    /// The file itself.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The file with these changes.
    pub(super) fn with(mut self, changes: Changes) -> Self {
        self.log_bytes = changes.file_bytes;
        for change in changes.changes {
            match change {
                Change::Zero(range) => {
                    // Later zeros hide earlier pages; a later page hides zeros, because pages are laid on top.
                    let hidden: Vec<u64> =
                        self.pages.range(range.clone()).map(|(at, _)| *at).collect();
                    hidden.iter().for_each(|at| drop(self.pages.remove(at)));
                    self.zeros.push(range);
                }
                Change::Data(at, page) => drop(self.pages.insert(at, page)),
            }
        }
        self.zeros = merged(std::mem::take(&mut self.zeros));
        self
    }

    /// Length with the log's changes, when it was last asked.
    pub(super) fn len(&self) -> u64 {
        self.own_bytes.load(Ordering::Relaxed).max(self.log_bytes)
    }

    /// Asks for the length anew.
    pub(super) fn measure(&self) -> io::Result<u64> {
        self.own_bytes.store(self.file.metadata()?.length_bytes, Ordering::Relaxed);
        Ok(self.len())
    }

    /// Fills `buffer` from `offset`.
    pub(super) fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if self.log_bytes == 0 {
            return self.file.read_exact_at(buffer, offset);
        }
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.len());
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        // The log may have made the file longer than it is.
        let own_bytes = self.own_bytes.load(Ordering::Relaxed);
        let there = own_bytes.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let (own, beyond) = buffer.split_at_mut(there);
        self.file.read_exact_at(own, offset)?;
        beyond.fill(0);
        let first = self.zeros.partition_point(|zeros| zeros.end <= offset);
        for zeros in self.zeros[first..].iter().take_while(|zeros| zeros.start < end) {
            let (from, to) = (zeros.start.max(offset), zeros.end.min(end));
            buffer[(from - offset) as usize..(to - offset) as usize].fill(0);
        }
        let before = offset.saturating_sub(SECTOR as u64 - 1);
        for (at, page) in self.pages.range(before..end) {
            let (from, to) = ((*at).max(offset), (at.saturating_add(SECTOR as u64)).min(end));
            buffer[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&page[(from - at) as usize..(to - at) as usize]);
        }
        Ok(())
    }
}

/// Sorted, without overlaps or empty ranges.
fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        match merged.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::temporary;

    #[test]
    fn later_changes_hide_earlier_ones() {
        let file = temporary();
        file.write_all_at(&[1; 5 * SECTOR], 0).unwrap();
        let page = |at: u64, byte| Change::Data(at * SECTOR as u64, Box::new([byte; SECTOR]));
        let zero = |from: u64, to: u64| Change::Zero(from * SECTOR as u64..to * SECTOR as u64);
        let changes = Changes {
            changes: vec![page(1, 7), page(2, 8), zero(2, 4), page(3, 9), page(6, 5), zero(9, 9)],
            file_bytes: 8 * SECTOR as u64,
        };
        let file = ReplayedFile::new(file).unwrap().with(changes);
        assert_eq!(file.len(), 8 * SECTOR as u64);
        let expected: Vec<u8> =
            [1, 7, 0, 9, 1, 0, 5, 0].iter().flat_map(|b| [*b; SECTOR]).collect();
        for (from, to) in
            [(0, 8 * SECTOR), (5000, 15_000), (4096, 8192), (12_287, 12_289), (20_479, 32_768)]
        {
            let mut read = vec![0xee; to - from];
            file.read_exact_at(&mut read, from as u64).unwrap();
            assert!(read == expected[from..to], "{from}..{to}");
        }
        file.read_exact_at(&mut [0; 2], 8 * SECTOR as u64 - 1).unwrap_err();
    }
}
