//! The log of a VHDX that was not closed: changes to its structures that its writer had not yet brought to their places.
//!
//! Nothing is ever written: [`read`] gives the changes, and [`super::replayed::ReplayedFile`] shows the file as if they had been made.
//! The log is a ring of entries. What counts is the sequence of entries without a gap that has the highest number and begins
//! where its last entry says; everything else in the ring is old.

use std::{cell::Cell, ops::Range};

use uuid::Uuid;

use super::{Fields, header, put};
use crate::image::ImageError;

/// What entries, data and places in the file are multiples of.
pub(super) const SECTOR: usize = 4096;
const HEADER_BYTES: usize = 64;
const DESCRIPTOR_BYTES: usize = 32;
/// Larger logs are refused: they are read into memory. Windows makes logs of 1 MiB.
pub(super) const MAX_LOG_BYTES: u64 = 16 << 20;
/// Sums are made over so many times the log at most: a hostile one could begin a long entry at each of its sectors.
const MAX_ROUNDS: usize = 16;

/// One change, in the order in which they must be made.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// This range becomes zero.
    Zero(Range<u64>),
    /// The 4 KiB at this offset become these.
    Data(u64, Box<[u8; SECTOR]>),
}

/// What a log says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    pub(super) changes: Vec<Change>,
    /// The file is at least so long afterwards.
    pub(super) file_bytes: u64,
}

/// Reads the changes of a log that belongs to `id`, out of a file of `file_bytes`.
///
/// # Errors
/// When the log has no valid sequence, or the file has been cut since.
pub(super) fn read(log: &[u8], id: Uuid, file_bytes: u64) -> Result<Changes, ImageError> {
    let ring = Ring { log, id, budget: Cell::new(log.len() * MAX_ROUNDS) };
    let sequence = ring
        .active_sequence()
        .ok_or_else(|| ImageError::damaged("the log names changes, but has no whole entry"))?;
    let mut found = Changes { changes: Vec::new(), file_bytes };
    for entry in &sequence {
        entry.changes(&mut found.changes)?;
    }
    let last = &sequence[sequence.len() - 1].bytes;
    let (flushed, end) = (last.u64_at(48), last.u64_at(56));
    if flushed > file_bytes {
        return Err(ImageError::damaged(format!(
            "the file has {file_bytes} bytes, its log says {flushed}"
        )));
    }
    found.file_bytes = file_bytes.max(end);
    Ok(found)
}

/// A valid entry, unrolled from the ring.
struct Entry {
    bytes: Vec<u8>,
    /// Where it starts in the log.
    at: usize,
}

impl Entry {
    fn sequence(&self) -> u64 {
        self.bytes.u64_at(16)
    }

    fn tail(&self) -> usize {
        self.bytes.u32_at(12) as usize
    }

    /// Takes the entry's changes apart: descriptors first, then a sector for each one with data.
    fn changes(&self, into: &mut Vec<Change>) -> Result<(), ImageError> {
        let count = self.bytes.u32_at(24) as usize;
        let mut data = descriptor_area(count);
        for descriptor in self.bytes[HEADER_BYTES..].chunks_exact(DESCRIPTOR_BYTES).take(count) {
            let offset = descriptor.u64_at(16);
            if !offset.is_multiple_of(SECTOR as u64) || descriptor.u64_at(24) != self.sequence() {
                return Err(ImageError::damaged("a descriptor of the log is wrong"));
            }
            match &descriptor[..4] {
                b"zero" => {
                    let end = offset.checked_add(descriptor.u64_at(8));
                    let end = end.filter(|end| end.is_multiple_of(SECTOR as u64));
                    into.push(Change::Zero(
                        offset..end.ok_or_else(|| {
                            ImageError::damaged("a range of zeros in the log is wrong")
                        })?,
                    ));
                }
                b"desc" => {
                    let sector = self.bytes.get(data..data + SECTOR);
                    let sector = sector.ok_or_else(|| ImageError::damaged("a short log entry"))?;
                    into.push(Change::Data(offset, self.sector(descriptor, sector)?));
                    data += SECTOR;
                }
                _ => return Err(ImageError::damaged("a descriptor of the log is of no kind")),
            }
        }
        Ok(())
    }

    /// The page that a data sector stands for: its first eight and last four bytes are in the descriptor.
    fn sector(&self, descriptor: &[u8], sector: &[u8]) -> Result<Box<[u8; SECTOR]>, ImageError> {
        let sequence = u64::from(sector.u32_at(4)) << 32 | u64::from(sector.u32_at(SECTOR - 4));
        if &sector[..4] != b"data" || sequence != self.sequence() {
            return Err(ImageError::damaged("a data sector of the log is wrong"));
        }
        let mut page = Box::new([0; SECTOR]);
        page.copy_from_slice(sector);
        put(&mut *page, 0, &descriptor[8..16]);
        put(&mut *page, SECTOR - 4, &descriptor[4..8]);
        Ok(page)
    }
}

/// Bytes of an entry before its data sectors.
fn descriptor_area(count: usize) -> usize {
    (HEADER_BYTES + count * DESCRIPTOR_BYTES).next_multiple_of(SECTOR)
}

struct Ring<'a> {
    log: &'a [u8],
    id: Uuid,
    /// Bytes that may still be summed up.
    budget: Cell<usize>,
}

impl Ring<'_> {
    /// The sequence with the highest number, oldest entry first.
    fn active_sequence(&self) -> Option<Vec<Entry>> {
        let mut best: Option<Vec<Entry>> = None;
        let mut at = 0;
        while at < self.log.len() {
            let sequence = self.sequence_from(at);
            let Some(last) = sequence.last() else {
                at += SECTOR;
                continue;
            };
            // The next candidate begins after this one, unless that went round the ring.
            let end = last.at + last.bytes.len();
            at = if last.at < at { self.log.len() } else { end };
            let number = last.sequence();
            let Some(first) = sequence.iter().position(|entry| entry.at == last.tail()) else {
                continue;
            };
            let newer = best.as_ref().and_then(|best| best.last());
            if newer.is_none_or(|best| best.sequence() < number) {
                best = Some(sequence.into_iter().skip(first).collect());
            }
        }
        best
    }

    /// Valid entries from `at` on that follow each other, once around the ring at most.
    fn sequence_from(&self, at: usize) -> Vec<Entry> {
        let (mut entries, mut next, mut used) = (Vec::<Entry>::new(), at, 0);
        while let Some(entry) = self.entry(next) {
            let follows = entries
                .last()
                .is_none_or(|last| last.sequence().checked_add(1) == Some(entry.sequence()));
            used += entry.bytes.len();
            if !follows || used > self.log.len() {
                break;
            }
            next = (next + entry.bytes.len()) % self.log.len();
            entries.push(entry);
        }
        entries
    }

    /// The entry at `at`, if there is a valid one of this log.
    fn entry(&self, at: usize) -> Option<Entry> {
        let head = self.log.get(at..at + HEADER_BYTES)?;
        let (length, count) = (head.u32_at(8) as usize, head.u32_at(24) as usize);
        let plausible = &head[..4] == b"loge"
            && head.guid_at(32) == self.id
            && head.u64_at(16) != 0
            && (SECTOR..=self.log.len()).contains(&length)
            && length.is_multiple_of(SECTOR)
            && count <= length / DESCRIPTOR_BYTES
            && descriptor_area(count) <= length;
        if !plausible {
            return None;
        }
        self.budget.set(self.budget.get().checked_sub(length)?);
        let first = length.min(self.log.len() - at);
        let mut bytes = self.log[at..at + first].to_vec();
        bytes.extend_from_slice(&self.log[..length - first]);
        (bytes.u32_at(4) == header::checksum(&bytes)).then_some(Entry { bytes, at })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: usize = 1 << 20;

    fn id() -> Uuid {
        Uuid::from_u128(0x1065)
    }

    /// An entry with a page full of one byte for each of these offsets.
    fn entry(sequence: u64, tail: usize, pages: &[(u64, u8)]) -> Vec<u8> {
        let mut entry = vec![0; SECTOR];
        put(&mut entry, 0, b"loge");
        put(&mut entry, 8, &((SECTOR * (1 + pages.len())) as u32).to_le_bytes());
        put(&mut entry, 12, &(tail as u32).to_le_bytes());
        put(&mut entry, 16, &sequence.to_le_bytes());
        put(&mut entry, 24, &(pages.len() as u32).to_le_bytes());
        put(&mut entry, 32, &id().to_bytes_le());
        put(&mut entry, 48, &(4u64 << 20).to_le_bytes());
        put(&mut entry, 56, &(6u64 << 20).to_le_bytes());
        for (number, (offset, byte)) in pages.iter().enumerate() {
            let at = HEADER_BYTES + number * DESCRIPTOR_BYTES;
            put(&mut entry, at, b"desc");
            put(&mut entry, at + 4, &[*byte; 12]);
            put(&mut entry, at + 16, &offset.to_le_bytes());
            put(&mut entry, at + 24, &sequence.to_le_bytes());
            let mut sector = vec![*byte; SECTOR];
            put(&mut sector, 0, b"data");
            put(&mut sector, 4, &((sequence >> 32) as u32).to_le_bytes());
            put(&mut sector, SECTOR - 4, &(sequence as u32).to_le_bytes());
            entry.extend(sector);
        }
        let length = entry.len();
        crate::image::vhdx::summed(&entry, length)
    }

    /// A log with these entries, which may go over its end.
    fn log(entries: &[(usize, Vec<u8>)]) -> Vec<u8> {
        let mut log = vec![0; LOG];
        for (at, entry) in entries {
            entry.iter().enumerate().for_each(|(i, byte)| log[(at + i) % LOG] = *byte);
        }
        log
    }

    fn pages(log: &[u8]) -> Option<Vec<(u64, u8)>> {
        let changes = read(log, id(), 5 << 20).ok()?;
        assert_eq!(changes.file_bytes, 6 << 20);
        let page = |change| match change {
            Change::Data(at, page) if page.iter().all(|byte| *byte == page[0]) => (at, page[0]),
            other => panic!("{other:?}"),
        };
        Some(changes.changes.into_iter().map(page).collect())
    }

    #[test]
    fn a_sequence_may_go_round_the_ring() {
        let at = LOG - 2 * SECTOR;
        let entries = [
            (at, entry(5 << 32 | 1, at, &[(4096, 1), (8192, 2)])),
            (SECTOR, entry(5 << 32 | 2, at, &[(4096, 3)])),
        ];
        assert_eq!(pages(&log(&entries)).unwrap(), [(4096, 1), (8192, 2), (4096, 3)]);
    }

    #[test]
    fn only_the_newest_sequence_counts_from_its_tail_on() {
        let step = 2 * SECTOR;
        let old = [(10 * step, entry(900, 10 * step, &[(0, 9)]))];
        let newer = (0..3).map(|i| (i * step, entry(1000 + i as u64, step, &[(4096, i as u8)])));
        let entries: Vec<_> = old.into_iter().chain(newer).collect();
        assert_eq!(pages(&log(&entries)).unwrap(), [(4096, 1), (4096, 2)]);
        // Without the entry that it begins with, an older one counts.
        assert_eq!(pages(&log(&[entries[0].clone(), entries[3].clone()])).unwrap(), [(0, 9)]);
        // A gap in the numbers ends a sequence.
        let torn = log(&[(0, entry(7, 0, &[(0, 1)])), (step, entry(9, step, &[(0, 2)]))]);
        assert_eq!(pages(&torn).unwrap(), [(0, 2)]);
    }

    #[test]
    fn a_log_of_another_id_or_of_a_longer_file_is_refused() {
        let log = log(&[(0, entry(7, 0, &[(0, 1)]))]);
        read(&log, Uuid::from_u128(1), 5 << 20).unwrap_err();
        read(&log, id(), (4 << 20) - 1).unwrap_err();
        read(&log, id(), 4 << 20).unwrap();
    }

    #[test]
    fn long_entries_everywhere_end_soon() {
        let mut log = vec![0; 16 << 20];
        for at in (0..log.len()).step_by(SECTOR) {
            put(&mut log, at, &entry(7, 0, &[])[..HEADER_BYTES]);
            put(&mut log, at + 8, &(16u32 << 20).to_le_bytes());
        }
        let begun = std::time::Instant::now();
        read(&log, id(), 64 << 20).unwrap_err();
        assert!(begun.elapsed() < std::time::Duration::from_secs(20));
    }
}
