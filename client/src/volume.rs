//! What is on a disk: the volumes of its partition table, or a bare file system.
//!
//! A table that contradicts itself is an error, never a guess: the disk then counts as one piece. Reading one takes a
//! bounded number of small reads, whatever it says.

use std::{fmt, io, ops::Range};

use uuid::Uuid;

use crate::{
    fs::{self, FileSystemKind, Head},
    source::view::ReadAt,
};

mod gpt;
mod mbr;

/// Why the volumes of a disk can't be told.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The disk could not be read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The partition table makes no sense.
    #[error("the partition table is damaged: {what}")]
    Damaged {
        /// What is wrong.
        what: String,
    },
}

impl VolumeError {
    fn damaged(what: impl Into<String>) -> Self {
        Self::Damaged { what: what.into() }
    }
}

/// How a disk is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TableKind {
    /// Not at all.
    None,
    /// By a GPT.
    Gpt,
    /// By the GPT at the end of the disk: the one at its start is damaged.
    GptBackup,
    /// By an MBR.
    Mbr,
}

impl fmt::Display for TableKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "no partition table",
            Self::Gpt => "GPT",
            Self::GptBackup => "GPT (only its backup is whole)",
            Self::Mbr => "MBR",
        })
    }
}

/// A part of a disk: a partition, or all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its number in the table; 0: a file system on the whole disk, without a table.
    pub number: u32,
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// What the table says it is for.
    pub type_name: String,
    /// Its id in a GPT.
    pub guid: Option<Uuid>,
    /// Its name in a GPT.
    pub label: String,
    /// What it holds; `None`: nothing that is known here.
    pub file_system: Option<FileSystemKind>,
    /// The file system's id; may be empty.
    pub fs_uuid: String,
    /// The file system's label; may be empty.
    pub fs_label: String,
}

impl Volume {
    /// Its bytes on the disk.
    pub fn range(&self) -> Range<u64> {
        self.start..self.start + self.len
    }

    /// How messages name it.
    pub fn name(&self) -> String {
        match self.number {
            0 => "the whole disk".into(),
            number => format!("volume {number}"),
        }
    }
}

/// A disk's table and volumes, in the order of their numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// How it is divided.
    pub table: TableKind,
    /// Its volumes; none overlap, all lie within the disk.
    pub volumes: Vec<Volume>,
}

/// A part as a table names it, in sectors.
struct Part {
    number: u32,
    first: u64,
    sectors: u64,
    type_name: String,
    guid: Option<Uuid>,
    label: String,
}

/// What is on `disk`, whose logical sectors have `sector_bytes`. Those of an image file may be others than 512: a GPT tells.
///
/// # Errors
/// When it can't be read or its table is damaged.
pub fn layout(disk: &dyn ReadAt, sector_bytes: u32) -> Result<Layout, VolumeError> {
    let mut sector = vec![0; disk.len().min(512) as usize];
    disk.read_exact_at(&mut sector, 0)?;
    let sector = Head(&sector);
    let table = match fs::in_first_sector(sector) {
        Some(_) => None,
        None => mbr::Table::parse(sector),
    };
    let sector_bytes = u64::from(sector_bytes);
    let (kind, parts, sector_bytes) = match table {
        Some(table) if table.is_protective() => {
            let gpt = gpt::read(disk, sector_bytes)?
                .ok_or_else(|| VolumeError::damaged("neither GPT can be read"))?;
            (gpt.kind, gpt.parts, gpt.sector_bytes)
        }
        Some(table) => (TableKind::Mbr, table.parts(disk, sector_bytes)?, sector_bytes),
        None => return bare(disk, sector_bytes),
    };
    let mut volumes = Vec::with_capacity(parts.len());
    for part in parts {
        volumes.push(volume(disk, part, sector_bytes)?);
    }
    refuse_overlaps(&volumes)?;
    Ok(Layout { table: kind, volumes })
}

/// A disk without an MBR: a file system, a GPT whose first sectors were wiped, or nothing that is known.
fn bare(disk: &dyn ReadAt, sector_bytes: u64) -> Result<Layout, VolumeError> {
    let whole = Part {
        number: 0,
        first: 0,
        sectors: disk.len(),
        type_name: String::new(),
        guid: None,
        label: String::new(),
    };
    let whole = volume(disk, whole, 1)?;
    if whole.file_system.is_some() {
        return Ok(Layout { table: TableKind::None, volumes: vec![whole] });
    }
    let Some(gpt) = gpt::read(disk, sector_bytes)? else {
        return Ok(Layout { table: TableKind::None, volumes: Vec::new() });
    };
    let volumes: Result<Vec<_>, _> =
        gpt.parts.into_iter().map(|part| volume(disk, part, gpt.sector_bytes)).collect();
    let volumes = volumes?;
    refuse_overlaps(&volumes)?;
    Ok(Layout { table: gpt.kind, volumes })
}

fn volume(disk: &dyn ReadAt, part: Part, sector_bytes: u64) -> Result<Volume, VolumeError> {
    let start = part.first.checked_mul(sector_bytes);
    let len = part.sectors.checked_mul(sector_bytes);
    let within = |start: u64, len| start.checked_add(len).is_some_and(|end| end <= disk.len());
    let (start, len) = match (start, len) {
        (Some(start), Some(len)) if within(start, len) => (start, len),
        _ => {
            return Err(VolumeError::damaged(format!(
                "partition {} ends behind the disk",
                part.number
            )));
        }
    };
    let found = match fs::detect(&Window { disk, start, len }) {
        // Of a disk that is put together from what others have, its first blocks may be missing.
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        found => found?,
    };
    let (file_system, fs_uuid, fs_label) = match found {
        Some(found) => (Some(found.kind), found.uuid, found.label),
        None => (None, String::new(), String::new()),
    };
    let Part { number, type_name, guid, label, .. } = part;
    Ok(Volume { number, start, len, type_name, guid, label, file_system, fs_uuid, fs_label })
}

fn refuse_overlaps(volumes: &[Volume]) -> Result<(), VolumeError> {
    let mut sorted: Vec<_> = volumes.iter().collect();
    sorted.sort_unstable_by_key(|volume| volume.start);
    for pair in sorted.windows(2) {
        if pair[0].range().end > pair[1].start {
            let (a, b) = (pair[0].number, pair[1].number);
            return Err(VolumeError::damaged(format!("partitions {a} and {b} overlap")));
        }
    }
    Ok(())
}

/// A part of a disk as bytes.
pub struct Window<'a> {
    /// The disk.
    pub disk: &'a dyn ReadAt,
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

impl ReadAt for Window<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.disk.read_exact_at(buffer, self.start + offset)
    }
}

#[cfg(test)]
mod tests;
