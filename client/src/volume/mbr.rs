//! The MBR, with its logical partitions.
//!
//! Own code: `mbrman` adds unchecked sector numbers of a table (a panic, or a wrong place), follows up to 2^32 links, and
//! rests on a serializer that nobody keeps any more. The layout is four entries of 16 bytes at 446.

use super::{Part, VolumeError};
use crate::{fs::Head, source::view::ReadAt};

/// More logical partitions than anybody makes; Linux itself stops at 256 partitions.
const MAX_LOGICAL: u32 = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    kind: u8,
    first: u32,
    sectors: u32,
}

impl Entry {
    fn is_used(self) -> bool {
        self.kind != 0 && self.sectors != 0
    }

    fn is_extended(self) -> bool {
        matches!(self.kind, 0x05 | 0x0F | 0x85)
    }
}

/// A table of four partitions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table([Entry; 4]);

impl Table {
    /// The table in `sector`, if it looks like one: the signature, sane boot flags and one used partition at least.
    pub(super) fn parse(sector: Head<'_>) -> Option<Self> {
        let table = Self::read(sector)?;
        table.0.iter().any(|entry| entry.is_used()).then_some(table)
    }

    fn read(sector: Head<'_>) -> Option<Self> {
        if !sector.is(510, &[0x55, 0xAA]) {
            return None;
        }
        let mut entries = [Entry { kind: 0, first: 0, sectors: 0 }; 4];
        for (index, entry) in entries.iter_mut().enumerate() {
            let at = 446 + index * 16;
            if sector.u8(at)? & 0x7F != 0 {
                return None;
            }
            *entry = Entry {
                kind: sector.u8(at + 4)?,
                first: sector.u32(at + 8)?,
                sectors: sector.u32(at + 12)?,
            };
        }
        Some(Self(entries))
    }

    /// A GPT stands behind it.
    pub(super) fn is_protective(&self) -> bool {
        self.0.iter().any(|entry| entry.kind == 0xEE)
    }

    /// Its partitions, with the logical ones from 5 on.
    pub(super) fn parts(
        &self,
        disk: &dyn ReadAt,
        sector_bytes: u64,
    ) -> Result<Vec<Part>, VolumeError> {
        let mut parts = Vec::new();
        for (number, entry) in (1..).zip(self.0) {
            if entry.is_used() && !entry.is_extended() {
                parts.push(part(number, u64::from(entry.first), entry));
            }
        }
        let mut number = 5;
        for extended in self.0.iter().filter(|entry| entry.is_used() && entry.is_extended()) {
            logical(disk, sector_bytes, *extended, &mut number, &mut parts)?;
        }
        Ok(parts)
    }
}

/// Follows the chain of records in an extended partition; each must lie behind the one before.
fn logical(
    disk: &dyn ReadAt,
    sector_bytes: u64,
    extended: Entry,
    number: &mut u32,
    parts: &mut Vec<Part>,
) -> Result<(), VolumeError> {
    let mut at = 0;
    loop {
        let record = u64::from(extended.first) + u64::from(at);
        let mut sector = [0; 512];
        disk.read_exact_at(&mut sector, record * sector_bytes)?;
        let Some(Table([entry, next, ..])) = Table::read(Head(&sector)) else {
            // An extended partition that was never filled has no record.
            return if at == 0 {
                Ok(())
            } else {
                Err(VolumeError::damaged("a logical partition's record is missing"))
            };
        };
        if entry.is_used() {
            if *number >= 5 + MAX_LOGICAL {
                return Err(VolumeError::damaged("too many logical partitions"));
            }
            parts.push(part(*number, record + u64::from(entry.first), entry));
            *number += 1;
        }
        if !next.is_used() {
            return Ok(());
        }
        if next.first <= at || next.first >= extended.sectors || !entry.is_used() && at > 0 {
            return Err(VolumeError::damaged("the chain of logical partitions runs astray"));
        }
        at = next.first;
    }
}

fn part(number: u32, first: u64, entry: Entry) -> Part {
    Part {
        number,
        first,
        sectors: u64::from(entry.sectors),
        type_name: type_name(entry.kind),
        guid: None,
        label: String::new(),
    }
}

fn type_name(kind: u8) -> String {
    let known = match kind {
        0x01 | 0x04 | 0x06 | 0x0B | 0x0C | 0x0E => "FAT",
        0x07 => "NTFS or exFAT",
        0x27 => "Windows recovery",
        0x82 => "Linux swap",
        0x83 => "Linux data",
        0x8E => "Linux LVM",
        0xEF => "EFI system",
        0xFD => "Linux RAID",
        other => return format!("type {other:02x}"),
    };
    known.to_owned()
}
