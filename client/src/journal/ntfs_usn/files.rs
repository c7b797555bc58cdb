//! All files of a volume: their MFT records' digests, where they stand, which clusters they have.

use std::{collections::BTreeSet, ops::Range};

use crate::fs::{
    FsError,
    ntfs::{Attribute, Body, Bytes, Ntfs, Record, numbers, text, types},
};
use janus_proto::ranges::Ranges;

const NUMBER: u64 = 0xFFFF_FFFF_FFFF;
/// Files of the root folder that change below the file system or all the time.
const RESTLESS: [&str; 4] =
    ["pagefile.sys", "swapfile.sys", "hiberfil.sys", "system volume information"];

/// What is kept of one record.
#[derive(Clone, Copy, Default)]
struct Entry {
    /// 0: not in use.
    digest: u64,
    base: u64,
    is_folder: bool,
    /// It, and all below it, is always read.
    is_restless: bool,
}

/// The files of a volume.
pub(super) struct Files {
    /// By number.
    entries: Vec<Entry>,
    /// Clusters, with the base record of their file.
    clusters: Vec<(u64, Range<u64>)>,
    /// Base records and the folders that name them.
    parents: Vec<(u64, u64)>,
    /// Base record of the journal.
    journal: Option<u64>,
}

impl Files {
    /// Reads all of the MFT.
    pub(super) fn look(ntfs: &Ntfs<'_>) -> Result<Self, FsError> {
        let mut files =
            Self { entries: Vec::new(), clusters: Vec::new(), parents: Vec::new(), journal: None };
        ntfs.each_record(|record| {
            for attribute in &record.attributes {
                files.note_name(&record, attribute, ntfs.records());
                let clusters = ntfs.clusters_of(attribute)?;
                // The stream of bad clusters is a hole as long as the volume, but for those.
                files.clusters.extend(clusters.iter().map(|run| (record.base, run.clusters())));
            }
            files.entry(record.number, |entry| {
                entry.digest = record.digest.max(1);
                entry.base = record.base;
                entry.is_folder = record.is_folder;
                entry.is_restless |= record.number < numbers::FIRST_USER;
            });
            Ok(())
        })?;
        files.spread_restlessness();
        Ok(files)
    }

    fn entry(&mut self, number: u64, change: impl FnOnce(&mut Entry)) {
        let at = number as usize;
        if self.entries.len() <= at {
            self.entries.resize(at + 1, Entry::default());
        }
        change(&mut self.entries[at]);
    }

    fn note_name(&mut self, record: &Record, attribute: &Attribute, records: u64) {
        let Body::Resident(bytes) = &attribute.body else { return };
        let bytes = Bytes(bytes);
        if attribute.kind != types::FILE_NAME {
            return;
        }
        let name = || bytes.part(66, usize::from(bytes.u8(64)?) * 2);
        let (Ok(parent), Ok(name)) = (bytes.u64(0), name()) else { return };
        let (parent, name) = (parent & NUMBER, text(name.0));
        self.parents.push((record.base, parent));
        if parent == numbers::EXTEND && name == "$UsnJrnl" {
            self.journal = Some(record.base);
        }
        let is_restless = parent == numbers::ROOT
            && RESTLESS.iter().any(|restless| restless.eq_ignore_ascii_case(&name));
        // A base record that can't be would only make the list longer.
        if is_restless && record.base < records {
            self.entry(record.base, |entry| entry.is_restless = true);
        }
    }

    /// What lies below something restless is so, too. The root folder's own restlessness is its alone.
    fn spread_restlessness(&mut self) {
        self.parents.sort_unstable_by_key(|(_, parent)| *parent);
        let restless = |(number, entry): (u64, &Entry)| entry.is_restless.then_some(number);
        let mut waiting: Vec<u64> = (0..).zip(&self.entries).filter_map(restless).collect();
        while let Some(folder) = waiting.pop() {
            if folder == numbers::ROOT {
                continue;
            }
            let first = self.parents.partition_point(|(_, parent)| *parent < folder);
            let below = self.parents[first..].iter().take_while(|(_, parent)| *parent == folder);
            for (child, _) in below {
                if let Some(entry) = self.entries.get_mut(*child as usize)
                    && !entry.is_restless
                {
                    entry.is_restless = true;
                    waiting.push(*child);
                }
            }
        }
    }

    /// Clusters that any file has.
    pub(super) fn clusters(&self) -> Ranges {
        self.clusters.iter().map(|(_, clusters)| clusters.clone()).collect::<Vec<_>>().into()
    }

    /// The journal's records, its base first.
    pub(super) fn journal(&self) -> Option<Vec<u64>> {
        let journal = self.journal?;
        let of_it = |(_, entry): &(u64, &Entry)| entry.digest != 0 && entry.base == journal;
        let numbers = (0..).zip(&self.entries).filter(of_it).map(|(number, _)| number);
        Some(numbers.collect())
    }

    /// Digests of all records, 0: not in use.
    pub(super) fn digests(&self) -> Vec<u64> {
        self.entries.iter().map(|entry| entry.digest).collect()
    }

    /// Clusters of files that are what they were, and those of all others. `touched`: references of files that records
    /// speak of; `old`: the records' digests then.
    pub(super) fn divide(&self, touched: &BTreeSet<u64>, old: &[u64]) -> (Ranges, Ranges) {
        let mut changed: Vec<bool> =
            self.entries.iter().map(|entry| entry.is_restless || entry.is_folder).collect();
        let mut mark = |number: u64| {
            if let Some(changed) = changed.get_mut(number as usize) {
                *changed = true;
            }
        };
        for (number, entry) in (0..).zip(&self.entries) {
            if old.get(number as usize).copied().unwrap_or(0) != entry.digest {
                mark(entry.base);
                mark(number);
            }
        }
        for file in touched {
            // Another file may stand there now; then its record is another one, too.
            mark(file & NUMBER);
        }
        let (mut still, mut others) = (Vec::new(), Vec::new());
        for (base, clusters) in &self.clusters {
            // A file without a base record is none that anybody may speak for.
            let is_known = self.entries.get(*base as usize).is_some_and(|entry| entry.digest != 0);
            let is_changed = changed.get(*base as usize).copied().unwrap_or(true);
            if is_known && !is_changed { &mut still } else { &mut others }.push(clusters.clone());
        }
        (still.into(), others.into())
    }
}
