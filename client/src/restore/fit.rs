//! A disk on a target of another size: whether its content fits, and where its backup GPT goes.
//!
//! A GPT says where its backup is and where partitions may end. On a larger target both would be wrong, and on a smaller one the
//! backup would be missing, so both are written anew once the content is there; partitions keep their places and sizes.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    ops::Range,
};

use janus_proto::show::amount;

use crate::{
    source::{medium::Medium, view::ReadAt},
    volume::{Layout, TableKind, VolumeError, layout},
};

/// Sectors of a GPT's entries, at most: what our reader takes has 128 of them, of 128 bytes.
const ENTRIES_BYTES: u64 = 16 << 10;

/// Why the content of a disk can't be on a target of that size.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    /// A partition ends behind it.
    #[error(
        "the target has {}, and {volume} ends at {}; shrink it on the machine and back up again, or take a target of {needs} bytes or more",
        amount(*has),
        amount(*end)
    )]
    Volume {
        /// Bytes of the target.
        has: u64,
        /// Which.
        volume: String,
        /// Its end, in bytes.
        end: u64,
        /// Bytes that would do.
        needs: u64,
    },
    /// Something that no partition holds is behind it.
    #[error(
        "the target has {has} bytes, and there is data outside of all partitions from byte {at} on; take a larger target"
    )]
    Data {
        /// Bytes of the target.
        has: u64,
        /// First byte of the data.
        at: u64,
    },
    /// What is on the disk can't be told.
    #[error(
        "the target is smaller than the disk, and whether the content fits can't be told: {0}; take a larger target"
    )]
    Unknown(VolumeError),
    /// The disk could not be read.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The tables could not be written.
    #[error(
        "the partition table can't be moved to the end of the target: {0}; `sgdisk -e` does that, too"
    )]
    Table(#[from] gptman::Error),
}

/// How a disk goes on a target of another size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fit {
    /// So much of its start is copied.
    pub copy_bytes: u64,
    /// The GPT that has to be moved.
    pub table: Option<Table>,
}

/// A GPT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Table {
    sector_bytes: u64,
    /// Size of the disk that it was made for.
    disk_bytes: u64,
}

/// Looks whether `disk` fits on a target of so many bytes.
///
/// # Errors
/// When it doesn't, or that can't be told.
pub fn fit<D: Medium + ReadAt>(disk: &D, target_bytes: u64) -> Result<Fit, FitError> {
    let disk_bytes = disk.size_bytes();
    let is_smaller = target_bytes < disk_bytes;
    if target_bytes == disk_bytes {
        return Ok(Fit { copy_bytes: disk_bytes, table: None });
    }
    let layout = match layout(disk, disk.sector_bytes()) {
        Ok(layout) => layout,
        Err(error) if is_smaller => return Err(FitError::Unknown(error)),
        Err(error) => {
            tracing::warn!(%error, "the disk's partition table is left as it is");
            return Ok(Fit { copy_bytes: disk_bytes, table: None });
        }
    };
    let table = match layout.table {
        TableKind::Gpt => {
            let sector_bytes = gpt_sector(disk)?;
            Some(Table { sector_bytes, disk_bytes })
        }
        _ => None,
    };
    if is_smaller {
        check_volumes(&layout, table, target_bytes)?;
        check_rest(disk, table, target_bytes)?;
    }
    Ok(Fit { copy_bytes: disk_bytes.min(target_bytes), table })
}

/// Sectors that the GPT counts in: its first one begins with its signature.
fn gpt_sector<D: Medium + ReadAt>(disk: &D) -> io::Result<u64> {
    for sector_bytes in [u64::from(disk.sector_bytes()), 512] {
        let mut signature = [0; 8];
        ReadAt::read_exact_at(disk, &mut signature, sector_bytes)?;
        if &signature == b"EFI PART" {
            return Ok(sector_bytes);
        }
    }
    Ok(4096)
}

impl Table {
    /// Bytes of a backup at the end of a disk.
    fn backup_bytes(self) -> u64 {
        ENTRIES_BYTES + self.sector_bytes
    }

    fn backup(self) -> Range<u64> {
        self.disk_bytes.saturating_sub(self.backup_bytes())..self.disk_bytes
    }

    /// Writes both tables of `target`, which holds the disk's content, for the size that it has; the old backup goes.
    ///
    /// # Errors
    /// When they can't be read or written.
    pub fn move_to_end(self, target: &mut File) -> Result<(), FitError> {
        let end = target.seek(SeekFrom::End(0))?;
        let mut gpt = gptman::GPT::read_from(target, self.sector_bytes)?;
        let first_usable = gpt.header.first_usable_lba;
        gpt.header.update_from(target, self.sector_bytes)?;
        gpt.header.first_usable_lba = first_usable;
        let old = self.backup();
        if old.start < end && end > self.disk_bytes {
            target.seek(SeekFrom::Start(old.start))?;
            target.write_all(&vec![0; (old.end - old.start) as usize])?;
        }
        gpt.write_into(target)?;
        self.cover(target, end)?;
        target.sync_all()?;
        Ok(())
    }

    /// The MBR before a GPT covers all of the disk with one partition, unless it is a hybrid one, which is left alone.
    fn cover(self, target: &mut File, end: u64) -> io::Result<()> {
        let mut sector = [0; 512];
        target.seek(SeekFrom::Start(0))?;
        target.read_exact(&mut sector)?;
        let is_pure = sector[446 + 4] == 0xEE && sector[462..510].iter().all(|byte| *byte == 0);
        if is_pure {
            let sectors = u32::try_from(end / self.sector_bytes - 1).unwrap_or(u32::MAX);
            sector[446 + 12..446 + 16].copy_from_slice(&sectors.to_le_bytes());
            target.seek(SeekFrom::Start(0))?;
            target.write_all(&sector)?;
        }
        Ok(())
    }
}

fn check_volumes(layout: &Layout, table: Option<Table>, has: u64) -> Result<(), FitError> {
    let after = table.map_or(0, Table::backup_bytes);
    let last = layout.volumes.iter().max_by_key(|volume| volume.range().end);
    let Some(last) = last else { return Ok(()) };
    let end = last.range().end;
    match end.saturating_add(after) {
        needs if needs > has => Err(FitError::Volume { has, volume: last.name(), end, needs }),
        _ => Ok(()),
    }
}

/// What would be cut off, which no volume has, must be zeros or the backup of a GPT.
fn check_rest<D: Medium + ReadAt>(
    disk: &D,
    table: Option<Table>,
    has: u64,
) -> Result<(), FitError> {
    let end = table.map_or(disk.size_bytes(), |table| table.backup().start);
    let mut at = has;
    let mut buffer = vec![0; 1 << 20];
    while at < end {
        let stretch = disk.stretch(at);
        if stretch.hole {
            at = stretch.end;
            continue;
        }
        let until = stretch.end.min(end).min(at + buffer.len() as u64);
        let now = &mut buffer[..(until - at) as usize];
        ReadAt::read_exact_at(disk, now, at)?;
        if let Some(data) = now.iter().position(|byte| *byte != 0) {
            return Err(FitError::Data { has, at: at + data as u64 });
        }
        at = until;
    }
    Ok(())
}
