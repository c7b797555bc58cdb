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
    /// Length of the file itself.
    own_bytes: u64,
    /// Length with the log's changes, as far as it is known: a merge may make the file longer meanwhile.
    file_bytes: AtomicU64,
    /// A log was laid over it.
    is_changed: bool,
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
        let own_bytes = file.metadata()?.length_bytes;
        Ok(Self {
            file,
            own_bytes,
            file_bytes: own_bytes.into(),
            is_changed: false,
            zeros: Vec::new(),
            pages: BTreeMap::new(),
        })
    }

    /// The file with these changes.
    pub(super) fn with(mut self, changes: Changes) -> Self {
        self.is_changed = true;
        self.file_bytes = changes.file_bytes.max(self.own_bytes).into();
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

    /// Length with the log's changes.
    pub(super) fn len(&self) -> u64 {
        self.file_bytes.load(Ordering::Relaxed)
    }

    /// The same, looked up again when the file was shorter than `end`.
    pub(super) fn len_up_to(&self, end: u64) -> io::Result<u64> {
        if end > self.len() && !self.is_changed {
            self.file_bytes.store(self.file.metadata()?.length_bytes, Ordering::Relaxed);
        }
        Ok(self.len())
    }

    /// The file itself, without what its log changes.
    pub(super) fn own(&self) -> &File {
        &self.file
    }

    /// Fills `buffer` from `offset`.
    pub(super) fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if !self.is_changed {
            return self.file.read_exact_at(buffer, offset);
        }
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.len());
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        // The log may have made the file longer than it is.
        let there = self.own_bytes.saturating_sub(offset).min(buffer.len() as u64) as usize;
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
