//! Which part of a disk goes onto a target: all of it, one volume, or as much as fits on a device of another size.

use std::{ops::Range, path::Path};

use janus_proto::ids::{BLOCK_BYTES, SEGMENT_BYTES};

use super::{
    fit::{self, FitError, Table},
    format::TargetFormat,
};
use crate::{
    source::{medium::Medium, view::ReadAt},
    volume::{self, Volume, VolumeError},
};

/// Why a part can't be restored.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// There is no such volume.
    #[error("the disk has no volume {number}; it has {has}")]
    Volume {
        /// As asked for.
        number: u32,
        /// What there is.
        has: String,
    },
    /// Blocks of the disk are not blocks of the volume.
    #[error(
        "volume {number} begins at byte {start}, which is no multiple of 4096: restore the whole disk to a file, and take the volume out of that"
    )]
    Unaligned {
        /// The volume.
        number: u32,
        /// Its first byte.
        start: u64,
    },
    /// The volumes can't be told.
    #[error(transparent)]
    Layout(#[from] VolumeError),
    /// The disk doesn't fit on the device.
    #[error(transparent)]
    Fit(#[from] FitError),
}

/// What a target holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Bytes of the disk.
    pub window: Range<u64>,
    /// Of the disk: 512 or 4096.
    pub logical_sector_bytes: u32,
    /// As what it is written.
    pub format: TargetFormat,
    /// A GPT that has to be moved in the end.
    pub table: Option<Table>,
}

impl Place {
    /// All of a disk.
    pub fn whole(disk_bytes: u64, logical_sector_bytes: u32, format: TargetFormat) -> Self {
        Self { window: 0..disk_bytes, logical_sector_bytes, format, table: None }
    }

    /// So many bytes.
    pub fn bytes(&self) -> u64 {
        self.window.end - self.window.start
    }

    /// The segments that it has blocks of.
    pub fn segments(&self) -> Range<u64> {
        self.window.start / SEGMENT_BYTES..self.window.end.div_ceil(SEGMENT_BYTES)
    }
}

/// The place of one volume of `disk`, or of all that fits on a device of so many bytes. Blocks.
///
/// # Errors
/// When there is no such volume, or it doesn't fit.
pub fn plan<D: Medium + ReadAt>(
    disk: &D,
    volume: Option<u32>,
    device_bytes: Option<u64>,
    format: TargetFormat,
) -> Result<Place, PlaceError> {
    let whole = Place::whole(disk.size_bytes(), disk.sector_bytes(), format);
    match (volume, device_bytes) {
        (Some(number), _) => Ok(Place { window: volume_range(disk, number)?, ..whole }),
        (None, Some(bytes)) => {
            let fit = fit::fit(disk, bytes)?;
            Ok(Place { window: 0..fit.copy_bytes, table: fit.table, ..whole })
        }
        (None, None) => Ok(whole),
    }
}

fn volume_range<D: Medium + ReadAt>(disk: &D, number: u32) -> Result<Range<u64>, PlaceError> {
    let layout = volume::layout(disk, disk.sector_bytes())?;
    let Some(found) = layout.volumes.iter().find(|volume| volume.number == number) else {
        let has: Vec<_> = layout.volumes.iter().map(Volume::name).collect();
        let has = if has.is_empty() { "none that is known".into() } else { has.join(", ") };
        return Err(PlaceError::Volume { number, has });
    };
    match found.start.is_multiple_of(BLOCK_BYTES) {
        true => Ok(found.range()),
        false => Err(PlaceError::Unaligned { number, start: found.start }),
    }
}

/// The size of `path` if it is a block device. Blocks.
pub(super) fn device_bytes(path: &Path) -> Option<u64> {
    use std::os::unix::fs::FileTypeExt;
    let is_device = std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device());
    let opened = is_device.then(|| std::fs::File::open(path).ok())??;
    crate::source::size_of(&opened, true).ok()
}
