//! `$Extend/$UsnJrnl`: the stream `$J` of records, whose bytes' places are their numbers, and `$Max`, which describes it.

use super::{
    Distrust,
    files::Files,
    record::{self, UsnRecord},
};
use crate::fs::{
    FsError,
    ntfs::{Body, Bytes, Ntfs, Run, join, types},
};

/// No record crosses a border of these.
const PAGE_BYTES: u64 = 4096;
/// What is read at once.
const BATCH_BYTES: u64 = 256 << 10;
/// More of a journal is not read: a full compare isn't slower.
const MAX_BYTES: u64 = 4 << 30;

/// Where the journal is, and its numbers.
pub(super) struct UsnJournal {
    pub(super) id: u64,
    /// First byte that is there.
    pub(super) first_usn: u64,
    /// First byte after the last record.
    pub(super) next_usn: u64,
    /// Earlier records are of another life of the journal.
    pub(super) lowest_valid_usn: u64,
    runs: Vec<Run>,
}

impl UsnJournal {
    /// Finds it.
    pub(super) fn open(ntfs: &Ntfs<'_>, files: &Files) -> Result<Self, Distrust> {
        let Some(records) = files.journal() else { return Err(Distrust::NoJournal) };
        let (mut max, mut parts, mut size) = (None, Vec::new(), None);
        for number in records {
            let record =
                ntfs.record(number)?.ok_or_else(|| FsError::damaged("the journal is gone"))?;
            for attribute in record.attributes.iter().filter(|one| one.kind == types::DATA) {
                match (attribute.name.as_str(), &attribute.body) {
                    ("$Max", Body::Resident(bytes)) => max = Some(bytes.clone()),
                    ("$J", Body::Mapped(mapped)) => {
                        if mapped.first_vcn == 0 {
                            size = Some(mapped.size_bytes);
                        }
                        parts.push((mapped.first_vcn, ntfs.clusters_of(attribute)?));
                    }
                    ("$J", Body::Resident(bytes)) if bytes.is_empty() => size = Some(0),
                    _ => {}
                }
            }
        }
        let bad = |what: &str| Distrust::NotUnderstood { what: what.to_owned() };
        let max = max.ok_or_else(|| bad("it has no $Max"))?;
        let max = Bytes(&max);
        let next_usn = size.ok_or_else(|| bad("it has no $J"))?;
        let runs = join(parts)?;
        let first = runs.first().map(|run| run.vcn.saturating_mul(ntfs.boot.cluster_bytes));
        let first_usn = first.map_or(next_usn, |first| first.min(next_usn));
        let length = |_| bad("$Max is cut off");
        let (id, lowest_valid_usn) = (max.u64(16).map_err(length)?, max.u64(24).map_err(length)?);
        // Only what was deleted from its beginning has no place: a longer one would be read for nothing.
        let clusters: u64 = runs.iter().map(|run| run.count).sum();
        let mapped = clusters.saturating_mul(ntfs.boot.cluster_bytes);
        let there = next_usn - first_usn;
        if next_usn > i64::MAX as u64
            || there > MAX_BYTES
            || there > mapped.min(ntfs.volume_bytes())
        {
            return Err(bad("it is too long"));
        }
        Ok(Self { id, first_usn, next_usn, lowest_valid_usn, runs })
    }
}

/// The records of a journal.
pub(super) struct Stream<'a> {
    pub(super) ntfs: &'a Ntfs<'a>,
    pub(super) journal: &'a UsnJournal,
}

impl Stream<'_> {
    /// The record at a place; `None` when there is none.
    pub(super) fn record_at(&self, usn: u64) -> Result<Option<UsnRecord>, Distrust> {
        let left = self.journal.next_usn.saturating_sub(usn).min(PAGE_BYTES - usn % PAGE_BYTES);
        let mut bytes = vec![0; (left as usize).min(record::MAX_BYTES)];
        self.read(usn, &mut bytes)?;
        // What can't be read as a record isn't the one that stood there.
        Ok(UsnRecord::parse(&bytes, usn).unwrap_or(None))
    }

    /// Hands out all records from `usn` on, where one begins or a page does.
    pub(super) fn each(&self, usn: u64, each: impl FnMut(&UsnRecord)) -> Result<(), Distrust> {
        self.each_below(usn, self.journal.next_usn, each)
    }

    fn each_below(
        &self,
        usn: u64,
        end: u64,
        mut each: impl FnMut(&UsnRecord),
    ) -> Result<(), Distrust> {
        let mut at = usn;
        let mut bytes = Vec::new();
        while at < end {
            let stop = ((at / BATCH_BYTES + 1) * BATCH_BYTES).min(end);
            bytes.resize((stop - at) as usize, 0);
            self.read(at, &mut bytes)?;
            let start = at;
            while at < stop {
                let page_end = ((at / PAGE_BYTES + 1) * PAGE_BYTES).min(stop);
                let page = bytes.get((at - start) as usize..(page_end - start) as usize);
                match UsnRecord::parse(page.unwrap_or_default(), at)? {
                    Some(record) => {
                        each(&record);
                        at += record.len;
                    }
                    None => at = page_end,
                }
            }
        }
        Ok(())
    }

    /// The last record that has a time.
    pub(super) fn last(&self) -> Result<Option<UsnRecord>, Distrust> {
        let (first, end) = (self.journal.first_usn, self.journal.next_usn);
        let mut page = end.saturating_sub(1) / PAGE_BYTES * PAGE_BYTES;
        loop {
            let mut last = None;
            let from = page.max(first);
            if from < end {
                let stop = end.min(page + PAGE_BYTES);
                self.each_below(from, stop, |record| {
                    if record.has_time {
                        last = Some(*record);
                    }
                })?;
            }
            if last.is_some() || page <= first {
                return Ok(last);
            }
            page -= PAGE_BYTES;
        }
    }

    fn read(&self, usn: u64, bytes: &mut [u8]) -> Result<(), Distrust> {
        Ok(self.ntfs.read_stream(&self.journal.runs, usn, bytes)?)
    }
}
