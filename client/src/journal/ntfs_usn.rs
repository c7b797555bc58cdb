//! NTFS: the USN journal, and the MFT as it was at the last backup.
//!
//! The journal alone misses what a defragmenter moves, what other drivers write, and files that stay open. So a file is
//! believed to be unchanged only if
//! - the volume is at rest: its log is closed, no check is due;
//! - the journal is the same one, reaches back to the last backup, and the last record before the cursor that has a time stands there
//!   unchanged;
//! - no record speaks of the file, and none that spoke of it earlier has left it open;
//! - all its MFT records are byte by byte what they were.
//!
//! Always read are folders, the system's own files (`$MFT`, `$LogFile`, `$Extend/…`), page files, and `System Volume
//! Information`, where shadow copies are written below the file system; and every cluster that no file has. The cursor
//! keeps 8 bytes for each MFT record.
//!
//! NTFS has no checksums. Damage of the MFT or of `$Bitmap` is noticed where these contradict each other, and damage of one of
//! them never makes a changed file look unchanged. A journal's record that still looks like one after damage may name another file; then
//! only the times in the changed file's MFT record, which Windows writes, tell of it.

use std::{cell::OnceCell, collections::BTreeSet};

use serde::{Deserialize, Serialize};

use self::{
    files::Files,
    stream::{Stream, UsnJournal},
};
use super::{Answer, Changes, Distrust, Journal, JournalKind, packed};
use crate::{
    fs::{
        FsError,
        ntfs::{self, LogState, Ntfs},
    },
    source::view::ReadAt,
};
use janus_proto::ranges::Ranges;

mod files;
mod record;
mod stream;

pub(crate) use self::record::{UsnRecord, placed};

const FORMAT: u32 = 1;

/// The journal of one volume. Its MFT is read once, for whoever asks first.
pub struct NtfsUsn<'a> {
    volume: &'a dyn ReadAt,
    looked: OnceCell<Result<Looked<'a>, FsError>>,
}

impl<'a> NtfsUsn<'a> {
    /// Of this volume.
    pub fn new(volume: &'a dyn ReadAt) -> Self {
        Self { volume, looked: OnceCell::new() }
    }

    /// The bytes of the volume that nothing uses, as [`ntfs::free`] tells them.
    ///
    /// # Errors
    /// When that can't be proven.
    pub fn free(&self) -> Result<Ranges, &FsError> {
        let looked = self.looked()?;
        Ok(looked.free.scaled(looked.ntfs.boot.cluster_bytes))
    }

    fn looked(&self) -> Result<&Looked<'a>, &FsError> {
        self.looked.get_or_init(|| Looked::look(self.volume)).as_ref()
    }
}

impl Journal for NtfsUsn<'_> {
    fn kind(&self) -> JournalKind {
        JournalKind::NtfsUsn
    }

    fn changes(&self, cursor: Option<&[u8]>) -> Answer {
        match self.looked().map_err(Distrust::from).and_then(Now::look) {
            Ok(now) => {
                let old = cursor.and_then(Cursor::parse).ok_or(Distrust::NoCursor);
                let open = old.as_ref().map(|old| old.head.open.clone()).unwrap_or_default();
                let (changes, next) = match old.and_then(|old| now.since(&old)) {
                    Ok((changes, open)) => (Ok(changes), now.cursor(open)),
                    // What was open then may still be, whatever came between.
                    Err(reason) => {
                        (Err(reason), now.first_open(open).and_then(|open| now.cursor(open)))
                    }
                };
                Answer { changes, next: next.ok() }
            }
            Err(reason) => Answer { changes: Err(reason), next: None },
        }
    }
}

/// What has to be known of a volume at the next backup.
struct Cursor {
    head: Head,
    /// Digests of the MFT's records, 0: not in use.
    records: Vec<u64>,
}

#[derive(Serialize, Deserialize)]
struct Head {
    format: u32,
    serial: u64,
    clusters: u64,
    cluster_bytes: u64,
    lsn: u64,
    journal: u64,
    /// First byte after the last record that has a time: what follows is read again. A record without a time could stand there
    /// once more after a roll-back.
    next_usn: u64,
    /// That record: its place and digest.
    last: (u64, u64),
    /// File references whose last record doesn't close them, and those of all records after `last`: a roll-back to that one takes
    /// back what they tell of, and their records with it.
    open: BTreeSet<u64>,
}

impl Cursor {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (head, records): (Head, _) = packed::unpack(bytes)?;
        let (records, rest) = records.as_chunks::<8>();
        let is_ours = head.format == FORMAT && rest.is_empty();
        let records = records.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        is_ours.then_some(Self { head, records })
    }

    fn to_bytes(&self) -> Vec<u8> {
        let records: Vec<_> = self.records.iter().flat_map(|digest| digest.to_le_bytes()).collect();
        packed::pack(&self.head, [records.as_slice()])
    }
}

/// A volume as it is now, at rest.
struct Looked<'a> {
    ntfs: Ntfs<'a>,
    log: LogState,
    files: Files,
    /// Clusters that no file has.
    free: Ranges,
}

impl<'a> Looked<'a> {
    fn look(volume: &'a dyn ReadAt) -> Result<Self, FsError> {
        let ntfs = Ntfs::open(volume)?;
        let log = ntfs.state_at_rest()?;
        let files = Files::look(&ntfs)?;
        let free = ntfs.free_clusters()?;
        if let Some(what) = ntfs::contradiction(&free, &files.clusters()) {
            return Err(FsError::Damaged { what });
        }
        Ok(Self { ntfs, log, files, free })
    }
}

/// Such a volume with a journal.
struct Now<'a> {
    ntfs: &'a Ntfs<'a>,
    lsn: u64,
    files: &'a Files,
    free: &'a Ranges,
    journal: UsnJournal,
}

impl<'a> Now<'a> {
    fn look(looked: &'a Looked<'a>) -> Result<Self, Distrust> {
        let Looked { ntfs, log, files, free } = looked;
        let lsn = match *log {
            LogState::Closed { lsn } => lsn,
            LogState::Empty => return Err(Distrust::ForeignDriver),
        };
        // Delete of the journal underway.
        if ntfs.flags()? & 0x0010 != 0 {
            return Err(Distrust::Deleted);
        }
        let journal = UsnJournal::open(ntfs, files)?;
        Ok(Self { ntfs, lsn, files, free, journal })
    }

    fn stream(&self) -> Stream<'_> {
        Stream { ntfs: self.ntfs, journal: &self.journal }
    }

    /// What may have changed since a cursor, and the files that are open now as far as the journal says.
    fn since(&self, old: &Cursor) -> Result<(Changes, BTreeSet<u64>), Distrust> {
        let (head, boot) = (&old.head, &self.ntfs.boot);
        if (head.serial, head.clusters, head.cluster_bytes)
            != (boot.serial, boot.clusters, boot.cluster_bytes)
        {
            return Err(Distrust::OtherVolume);
        }
        if head.journal != self.journal.id {
            return Err(Distrust::Recreated);
        }
        if self.lsn < head.lsn || head.next_usn > self.journal.next_usn {
            return Err(Distrust::RolledBack);
        }
        if head.next_usn < self.journal.lowest_valid_usn {
            return Err(Distrust::Restamped);
        }
        let stream = self.stream();
        let (usn, digest) = head.last;
        if usn < self.journal.first_usn {
            return Err(Distrust::Wrapped);
        }
        if stream.record_at(usn)?.is_none_or(|found| found.digest != digest) {
            return Err(Distrust::RolledBack);
        }
        let (mut touched, mut open) = (head.open.clone(), Open::from(head.open.clone()));
        stream.each(head.next_usn, |record| {
            touched.insert(record.file);
            open.follow(record);
        })?;
        Ok((self.changes(&touched, &old.records), open.files))
    }

    fn changes(&self, touched: &BTreeSet<u64>, old: &[u64]) -> Changes {
        let (still, others) = self.files.divide(touched, old);
        let unchanged = still.subtract(&others);
        let all = Ranges::from(0..self.ntfs.volume_bytes());
        let cluster = self.ntfs.boot.cluster_bytes;
        let unread = unchanged.union(self.free).scaled(cluster);
        Changes { changed: all.subtract(&unread), free: self.free.scaled(cluster) }
    }

    /// Files that the whole journal leaves open, with those of an older cursor.
    fn first_open(&self, open: BTreeSet<u64>) -> Result<BTreeSet<u64>, Distrust> {
        let mut open = Open::from(open);
        self.stream().each(self.journal.first_usn, |record| open.follow(record))?;
        Ok(open.files)
    }

    fn cursor(&self, open: BTreeSet<u64>) -> Result<Vec<u8>, Distrust> {
        // Without a record the next run could not tell whether the volume was rolled back.
        let last = self.stream().last()?.ok_or(Distrust::NoCursor)?;
        let boot = &self.ntfs.boot;
        let head = Head {
            format: FORMAT,
            serial: boot.serial,
            clusters: boot.clusters,
            cluster_bytes: boot.cluster_bytes,
            lsn: self.lsn,
            journal: self.journal.id,
            next_usn: last.usn + last.len,
            last: (last.usn, last.digest),
            open,
        };
        Ok(Cursor { head, records: self.files.digests() }.to_bytes())
    }
}

/// Files that are open, as records tell one after another: all that are so at the last record that has a time, and all that later ones
/// speak of.
struct Open {
    files: BTreeSet<u64>,
    /// Closed since that record.
    closed: BTreeSet<u64>,
}

impl Open {
    fn follow(&mut self, record: &UsnRecord) {
        self.files.insert(record.file);
        if record.closes() {
            self.closed.insert(record.file);
        } else {
            self.closed.remove(&record.file);
        }
        if record.has_time {
            for file in std::mem::take(&mut self.closed) {
                self.files.remove(&file);
            }
        }
    }
}

impl From<BTreeSet<u64>> for Open {
    fn from(files: BTreeSet<u64>) -> Self {
        Self { files, closed: BTreeSet::new() }
    }
}

/// Reads a cursor: for fuzzers.
pub(crate) fn read_cursor(bytes: &[u8]) {
    if let Some(cursor) = Cursor::parse(bytes) {
        assert!(cursor.records.len() * 8 <= bytes.len());
    }
}

/// A cursor: for fuzzers.
pub(crate) fn a_cursor() -> Vec<u8> {
    let head = Head {
        format: FORMAT,
        serial: 1,
        clusters: 2,
        cluster_bytes: 4096,
        lsn: 3,
        journal: 4,
        next_usn: 5,
        last: (6, 7),
        open: BTreeSet::from([8, 9]),
    };
    Cursor { head, records: vec![1, 0, 2] }.to_bytes()
}

impl From<&FsError> for Distrust {
    fn from(error: &FsError) -> Self {
        match error {
            FsError::NotClean { what } => Self::NotAtRest { what: what.clone() },
            error => Self::Damaged { what: error.to_string() },
        }
    }
}

impl From<FsError> for Distrust {
    fn from(error: FsError) -> Self {
        Self::from(&error)
    }
}

#[cfg(test)]
mod tests;
