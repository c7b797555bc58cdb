//! The journal of an open session: what was received, with its hashes, before the data is written.
//!
//! A record is appended before its blocks are written and acknowledged after, so whatever was acknowledged can be
//! found again after a `kill -9`. A *synced* record says that all data before it is on disk, which is what counts after a
//! reboot. Records carry sums; the first bad one ends the journal.
//!
//! ```text
//! header  "JANUSJNL" | u32 format | u32 0 | 16 bytes session id | u64 disk bytes          40 bytes
//! record  u32 magic | u32 kind | u32 extents | u32 hashes | u64 settled block             24 bytes
//!         extents: u64 first | u64 count, top bit: zero
//!         hashes: 32 bytes each
//!         first 16 bytes of the BLAKE3 of all of the above
//! ```

use std::io;

use janus_proto::{
    ids::{BlockHash, SessionId},
    model::{Extent, MAX_BATCH_BYTES, MAX_EXTENTS},
};

use crate::storage::File;

const MAGIC: &[u8; 8] = b"JANUSJNL";
const FORMAT: u32 = 1;
const HEADER_BYTES: u64 = 40;
const RECORD_MAGIC: u32 = 0x4345_524A;
const FIXED_BYTES: usize = 24;
const SUM_BYTES: usize = 16;
const ZERO_BIT: u64 = 1 << 63;
/// Most hashes of a record: those of a full batch, or of one re-hashed payload block.
const MAX_HASHES: usize = MAX_BATCH_BYTES / 512;

/// What one record says.
pub struct Record {
    /// Blocks that were written.
    pub extents: Vec<Extent>,
    /// Where the hashes of the extents that are not zero start in the journal.
    pub hashes_at: u64,
    /// Mark up to which the client has settled everything.
    pub settled: u64,
    /// Everything before is on disk.
    pub synced: bool,
}

/// An append-only file of records.
pub struct Journal {
    file: File,
    len: u64,
}

impl Journal {
    /// Starts an empty journal.
    ///
    /// # Errors
    /// As the file system says.
    pub fn create(file: File, session: SessionId, disk_bytes: u64) -> io::Result<Self> {
        let mut header = Vec::with_capacity(HEADER_BYTES as usize);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&FORMAT.to_le_bytes());
        header.extend_from_slice(&[0; 4]);
        header.extend_from_slice(session.as_bytes());
        header.extend_from_slice(&disk_bytes.to_le_bytes());
        file.set_len(0)?;
        file.write_all_at(&header, 0)?;
        Ok(Self { file, len: HEADER_BYTES })
    }

    /// True when `file` is the journal of this session. After a power cut it may hold nothing yet, or still that of a
    /// session which had the file before.
    ///
    /// # Errors
    /// As the file system says.
    pub fn is_of(file: &File, session: SessionId) -> io::Result<bool> {
        let mut header = [0; HEADER_BYTES as usize];
        Ok(read_full(file, &mut header, 0)?
            && &header[..8] == MAGIC
            && &header[16..32] == session.as_bytes())
    }

    /// Opens a journal and hands its records over in order; what follows the last good one is cut off. With
    /// `synced_only` the last synced record is the end.
    ///
    /// # Errors
    /// When the file can't be read or isn't the journal of this session.
    pub fn open(
        file: File,
        session: SessionId,
        disk_bytes: u64,
        synced_only: bool,
        mut take: impl FnMut(Record),
    ) -> io::Result<Self> {
        let mut header = [0; HEADER_BYTES as usize];
        file.read_exact_at(&mut header, 0)?;
        let format = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        if &header[..8] != MAGIC
            || format != FORMAT
            || &header[16..32] != session.as_bytes()
            || header[32..] != disk_bytes.to_le_bytes()
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not the journal of this session",
            ));
        }
        let end = if synced_only { last_synced(&file)? } else { u64::MAX };
        let (mut len, mut synced, mut synced_before) = (HEADER_BYTES, None, 0);
        while len < end {
            let Some((record, next)) = read_record(&file, len)? else { break };
            if record.synced {
                synced_before = synced.replace(next).unwrap_or(0);
            }
            take(record);
            len = next;
        }
        file.set_len(len)?;
        if synced.is_some() {
            // An earlier process may have been killed before it had synced the last of these records, or was told that it
            // can't be, which is told once. It will be acknowledged, so it is written anew.
            file.copy_range(synced_before, &file, synced_before, len - synced_before)?;
            file.sync_data()?;
        }
        Ok(Self { file, len })
    }

    /// Appends a record of blocks and returns where its hashes start. When it fails nothing was appended.
    ///
    /// # Errors
    /// As the file system says.
    pub fn append(&mut self, extents: &[Extent], hashes: &[u8], settled: u64) -> io::Result<u64> {
        self.write(1, extents, hashes, settled)
    }

    /// Appends that all data so far is on disk, and makes that durable.
    ///
    /// # Errors
    /// As the file system says.
    pub fn append_synced(&mut self, settled: u64) -> io::Result<()> {
        self.write(2, &[], &[], settled)?;
        self.file.sync_data()
    }

    /// Reads `count` hashes at a place that a record named.
    ///
    /// # Errors
    /// As the file system says.
    pub fn hashes(&self, at: u64, count: usize) -> io::Result<Vec<BlockHash>> {
        let mut bytes = vec![0; count * BlockHash::LEN];
        self.file.read_exact_at(&mut bytes, at)?;
        Ok(bytes.as_chunks::<32>().0.iter().map(|hash| BlockHash(*hash)).collect())
    }

    fn write(
        &mut self,
        kind: u32,
        extents: &[Extent],
        hashes: &[u8],
        settled: u64,
    ) -> io::Result<u64> {
        let hashes_at = self.len + (FIXED_BYTES + extents.len() * 16) as u64;
        let mut bytes =
            Vec::with_capacity(FIXED_BYTES + extents.len() * 16 + hashes.len() + SUM_BYTES);
        for word in
            [RECORD_MAGIC, kind, extents.len() as u32, (hashes.len() / BlockHash::LEN) as u32]
        {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(&settled.to_le_bytes());
        for extent in extents {
            bytes.extend_from_slice(&extent.first.to_le_bytes());
            bytes.extend_from_slice(
                &(extent.count | if extent.zero { ZERO_BIT } else { 0 }).to_le_bytes(),
            );
        }
        bytes.extend_from_slice(hashes);
        let sum = blake3::hash(&bytes);
        bytes.extend_from_slice(&sum.as_bytes()[..SUM_BYTES]);
        if let Err(error) = self.file.write_all_at(&bytes, self.len) {
            self.file.set_len(self.len)?;
            return Err(error);
        }
        self.len += bytes.len() as u64;
        Ok(hashes_at)
    }
}

/// Where the last synced record ends; right after the header when there is none.
fn last_synced(file: &File) -> io::Result<u64> {
    let (mut at, mut found) = (HEADER_BYTES, HEADER_BYTES);
    while let Some((record, next)) = read_record(file, at)? {
        if record.synced {
            found = next;
        }
        at = next;
    }
    Ok(found)
}

/// The record at `at` and where it ends; `None` when there is no whole, good one.
fn read_record(file: &File, at: u64) -> io::Result<Option<(Record, u64)>> {
    let mut fixed = [0; FIXED_BYTES];
    if !read_full(file, &mut fixed, at)? {
        return Ok(None);
    }
    let word = |index: usize| {
        u32::from_le_bytes([
            fixed[index * 4],
            fixed[index * 4 + 1],
            fixed[index * 4 + 2],
            fixed[index * 4 + 3],
        ])
    };
    let (extent_count, hash_count) = (word(2) as usize, word(3) as usize);
    if word(0) != RECORD_MAGIC || extent_count > MAX_EXTENTS || hash_count > MAX_HASHES {
        return Ok(None);
    }
    let mut rest = vec![0; extent_count * 16 + hash_count * BlockHash::LEN + SUM_BYTES];
    if !read_full(file, &mut rest, at + FIXED_BYTES as u64)? {
        return Ok(None);
    }
    let (body, sum) = rest.split_at(rest.len() - SUM_BYTES);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&fixed).update(body);
    if hasher.finalize().as_bytes()[..SUM_BYTES] != *sum {
        return Ok(None);
    }
    let long =
        |bytes: &[u8]| bytes.iter().rev().fold(0u64, |all, byte| all << 8 | u64::from(*byte));
    let extents = body[..extent_count * 16].chunks_exact(16).map(|pair| {
        let count = long(&pair[8..]);
        Extent { first: long(&pair[..8]), count: count & !ZERO_BIT, zero: count & ZERO_BIT != 0 }
    });
    let record = Record {
        extents: extents.collect(),
        hashes_at: at + (FIXED_BYTES + extent_count * 16) as u64,
        settled: long(&fixed[16..]),
        synced: word(1) == 2,
    };
    Ok(Some((record, at + (FIXED_BYTES + rest.len()) as u64)))
}

/// Reads all of `bytes`, or says false at the end of the file.
fn read_full(file: &File, bytes: &mut [u8], at: u64) -> io::Result<bool> {
    match file.read_exact_at(bytes, at) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        other => other.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Access, Disk};

    /// The same file each time, with handles of its own.
    fn file(folder: &tempfile::TempDir) -> File {
        Disk::default().open(&folder.path().join("journal"), Access::Create).unwrap()
    }

    #[test]
    fn a_torn_tail_is_cut_off_and_the_rest_kept() {
        let (folder, session) = (tempfile::tempdir().unwrap(), SessionId::new());
        let mut journal = Journal::create(file(&folder), session, 1 << 20).unwrap();
        let extent = Extent { first: 3, count: 2, zero: false };
        let at = journal.append(&[extent], &[7; 64], 5).unwrap();
        journal.append_synced(5).unwrap();
        let whole = journal.len;
        journal.append(&[Extent { first: 9, count: 1, zero: true }], &[], 10).unwrap();
        for cut in whole..journal.len {
            file(&folder).set_len(cut).unwrap();
            let mut seen = Vec::new();
            let again =
                Journal::open(file(&folder), session, 1 << 20, false, |r| seen.push(r)).unwrap();
            assert_eq!((again.len, seen.len()), (whole, 2));
            assert_eq!(seen[0].extents, [extent]);
            assert_eq!(again.hashes(at, 2).unwrap(), [BlockHash([7; 32]); 2]);
        }
    }

    #[test]
    fn after_a_reboot_only_synced_records_count() {
        let (folder, session) = (tempfile::tempdir().unwrap(), SessionId::new());
        let mut journal = Journal::create(file(&folder), session, 1 << 20).unwrap();
        journal.append(&[Extent { first: 0, count: 1, zero: true }], &[], 1).unwrap();
        journal.append_synced(1).unwrap();
        journal.append(&[Extent { first: 1, count: 1, zero: true }], &[], 2).unwrap();
        let mut settled = 0;
        Journal::open(file(&folder), session, 1 << 20, true, |r| settled = r.settled).unwrap();
        assert_eq!(settled, 1);
    }

    #[test]
    fn another_sessions_journal_is_told_and_refused() {
        let (folder, session) = (tempfile::tempdir().unwrap(), SessionId::new());
        assert!(!Journal::is_of(&file(&folder), session).unwrap());
        Journal::create(file(&folder), session, 1 << 20).unwrap();
        assert!(Journal::is_of(&file(&folder), session).unwrap());
        assert!(!Journal::is_of(&file(&folder), SessionId::new()).unwrap());
        assert!(Journal::open(file(&folder), SessionId::new(), 1 << 20, false, |_| ()).is_err());
    }
}
