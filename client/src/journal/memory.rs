//! What a disk's next run has to know of the journals: their cursors, and when everything was compared last.
//!
//! Packed, the volumes' cursors follow the head.

use serde::{Deserialize, Serialize};

use super::{JournalKind, packed};

const FORMAT: u32 = 1;

/// Of one disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Memory {
    /// Seed of the audits' order.
    pub seed: u64,
    /// Number of the next audit.
    pub turn: u32,
    /// Runs since everything was compared.
    pub runs: u32,
    /// When everything was compared: seconds of Unix time.
    pub compared: i64,
    /// A change that a journal missed: its offset, and when that was found (seconds of Unix time).
    pub missed: Option<(u64, i64)>,
    /// Free space counted as zeros: a zero block may have been used since, without having been written.
    pub skipped: bool,
    /// What the known hashes are of: [`crate::seal::DiskSeal::kind`] where the disk was sealed, else empty.
    pub kind: String,
    /// Cursors.
    pub volumes: Vec<VolumeCursor>,
}

/// Of one volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeCursor {
    /// First byte on the disk.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Of which journal.
    pub kind: JournalKind,
    /// As the journal gave it.
    pub cursor: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
struct Head {
    format: u32,
    seed: u64,
    turn: u32,
    runs: u32,
    compared: i64,
    missed: Option<(u64, i64)>,
    skipped: bool,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    kind: String,
    volumes: Vec<HeadVolume>,
}

#[derive(Serialize, Deserialize)]
struct HeadVolume {
    start: u64,
    len: u64,
    kind: JournalKind,
    cursor_bytes: u64,
}

impl Memory {
    /// Reads it; `None` when there is nothing, or nothing that this version understands.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (head, mut cursors): (Head, _) = packed::unpack(bytes)?;
        if head.format != FORMAT {
            return None;
        }
        let mut volumes = Vec::new();
        for HeadVolume { start, len, kind, cursor_bytes } in head.volumes {
            let (cursor, rest) = cursors.split_at_checked(usize::try_from(cursor_bytes).ok()?)?;
            volumes.push(VolumeCursor { start, len, kind, cursor: cursor.to_vec() });
            cursors = rest;
        }
        let Head { seed, turn, runs, compared, missed, skipped, kind, .. } = head;
        let memory = Self { seed, turn, runs, compared, missed, skipped, kind, volumes };
        cursors.is_empty().then_some(memory)
    }

    /// Its bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let of = |volume: &VolumeCursor| HeadVolume {
            start: volume.start,
            len: volume.len,
            kind: volume.kind,
            cursor_bytes: volume.cursor.len() as u64,
        };
        let Self { seed, turn, runs, compared, missed, skipped, ref kind, ref volumes } = *self;
        let head = Head {
            format: FORMAT,
            seed,
            turn,
            runs,
            compared,
            missed,
            skipped,
            kind: kind.clone(),
            volumes: volumes.iter().map(of).collect(),
        };
        let cursors = volumes.iter().map(|volume| volume.cursor.as_slice());
        packed::pack(&head, cursors)
    }

    /// All but the volumes' cursors, which may be large.
    pub fn without_cursors(&self) -> Self {
        let Self { seed, turn, runs, compared, missed, skipped, ref kind, .. } = *self;
        let (kind, volumes) = (kind.clone(), Vec::new());
        Self { seed, turn, runs, compared, missed, skipped, kind, volumes }
    }

    /// True when the next run would do the same without it.
    pub fn is_worthless(&self) -> bool {
        self.volumes.is_empty() && self.missed.is_none() && !self.skipped
    }

    /// The cursor of a volume that has not moved.
    pub fn cursor(&self, start: u64, len: u64, kind: JournalKind) -> Option<&[u8]> {
        let same =
            |volume: &&VolumeCursor| (volume.start, volume.len, volume.kind) == (start, len, kind);
        self.volumes.iter().find(same).map(|volume| volume.cursor.as_slice())
    }

    /// How many bytes a volume had that has so many now, if it had others.
    pub fn other_len(&self, start: u64, len: u64, kind: JournalKind) -> Option<u64> {
        let same = |volume: &&VolumeCursor| (volume.start, volume.kind) == (start, kind);
        let known = self.volumes.iter().find(same)?.len;
        (known != len).then_some(known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_and_every_cut_is_nothing() {
        let volume = |start, cursor: &[u8]| VolumeCursor {
            start,
            len: 5,
            kind: JournalKind::NtfsUsn,
            cursor: cursor.to_vec(),
        };
        let memory = Memory {
            seed: 7,
            turn: 3,
            runs: 2,
            compared: 1_700_000_000,
            missed: Some((4096, 1_700_000_001)),
            skipped: true,
            kind: "sealed".into(),
            volumes: vec![volume(0, b"one"), volume(9, b"")],
        };
        let bytes = memory.to_bytes();
        assert_eq!(Memory::parse(&bytes), Some(memory.clone()));
        assert_eq!(memory.cursor(0, 5, JournalKind::NtfsUsn), Some(&b"one"[..]));
        assert_eq!(memory.cursor(0, 6, JournalKind::NtfsUsn), None);
        assert_eq!(memory.cursor(0, 5, JournalKind::QemuBitmap), None);
        let other = |start, len, kind| memory.other_len(start, len, kind);
        assert_eq!(other(0, 6, JournalKind::NtfsUsn), Some(5));
        assert_eq!(other(0, 5, JournalKind::NtfsUsn), None);
        assert_eq!(other(1, 6, JournalKind::NtfsUsn), None);
        for cut in 0..bytes.len() {
            assert_eq!(Memory::parse(&bytes[..cut]), None, "{cut}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(Memory::parse(&longer), None);
        let lying = [&u32::MAX.to_le_bytes()[..], &bytes[4..]].concat();
        assert_eq!(Memory::parse(&lying), None);
    }
}
