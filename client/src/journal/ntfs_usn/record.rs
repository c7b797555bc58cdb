//! Records of the journal (`USN_RECORD_V2`, `_V3`, `_V4` of the Windows SDK).

use super::Distrust;
use crate::fs::Head;

const CLOSE: u32 = 0x8000_0000;
/// Longest record: a name of 255 characters behind the head of version 3, or a list of ranges.
pub(super) const MAX_BYTES: usize = 4096;

/// One record, as far as it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UsnRecord {
    /// Its place in the stream.
    pub(super) usn: u64,
    /// Of which file: number of its MFT record, and in the upper 16 bits how often that was used.
    pub(super) file: u64,
    /// What happened.
    reason: u32,
    /// Its bytes.
    pub(crate) len: u64,
    /// It says when it was written: no two such are equal.
    pub(super) has_time: bool,
    /// Tells contents apart.
    pub(super) digest: u64,
}

impl UsnRecord {
    /// True when nothing more can happen to the file without another record.
    pub(super) fn closes(&self) -> bool {
        self.reason & CLOSE != 0
    }

    /// The record that begins at `bytes`, which lies at `usn`; `None` where the page has no more.
    pub(crate) fn parse(bytes: &[u8], usn: u64) -> Result<Option<Self>, Distrust> {
        let bad = |what: &str| Distrust::NotUnderstood { what: format!("{what} at {usn}") };
        let short = || bad("a record is cut off");
        let len = Head(bytes).u32(0).unwrap_or(0) as usize;
        if len == 0 {
            let is_end = bytes.iter().all(|byte| *byte == 0);
            return if is_end { Ok(None) } else { Err(bad("zeros before a record")) };
        }
        let bytes = bytes.get(..len).filter(|_| len.is_multiple_of(8)).ok_or_else(short)?;
        let head = Head(bytes);
        let major = head.u16(4).ok_or_else(short)?;
        let (usn_at, reason_at, least) = match major {
            2 => (24, 40, 60),
            3 => (40, 56, 76),
            4 => (40, 48, 64),
            other => return Err(bad(&format!("a record of version {other}"))),
        };
        if len < least || head.u64(usn_at) != Some(usn) {
            return Err(bad("a record of another place"));
        }
        // The references of 128 bits of ReFS mean nothing on NTFS.
        if major > 2 && head.u64(16) != Some(0) {
            return Err(bad("a reference of 128 bits"));
        }
        let hash = blake3::hash(bytes);
        Ok(Some(Self {
            usn,
            file: head.u64(8).ok_or_else(short)?,
            reason: head.u32(reason_at).ok_or_else(short)?,
            len: len as u64,
            // Those of ranges have none.
            has_time: major < 4,
            digest: Head(hash.as_bytes()).u64(0).ok_or_else(short)?,
        }))
    }
}

/// The bytes of a record as they are at `usn`: for fuzzers.
pub(crate) fn placed(bytes: &[u8], usn: u64) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let at = if Head(&bytes).u16(4) == Some(2) { 24 } else { 40 };
    if let Some(place) = bytes.get_mut(at..at + 8) {
        place.copy_from_slice(&usn.to_le_bytes());
    }
    bytes
}
