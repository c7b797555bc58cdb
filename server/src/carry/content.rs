//! What an import reads: disks of carried folders, of images that other programs made, and raw ones.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use janus_proto::{
    carried::{CarriedDisk, CarriedError},
    ids::{BlockHash, MAX_DISK_BYTES},
    image::{
        ImageError,
        foreign::{ForeignChain, ForeignError, open_chain},
    },
    model::Extent,
};

use super::CarryError;
use crate::storage::{Disk, File};

/// The content of a disk that is to be imported.
pub trait Content {
    /// Digest of a segment, where it is known unread.
    fn digest(&self, _segment: u64) -> Option<BlockHash> {
        None
    }

    /// Hashes of all blocks of a segment, where they are known unread. What is read is compared with them.
    ///
    /// # Errors
    /// When they can't be read.
    fn hashes(&self, _segment: u64) -> Result<Option<Vec<BlockHash>>, CarryError> {
        Ok(None)
    }

    /// Bytes that it occupies where it lies, which its data takes at most, if that is known.
    fn occupied_bytes(&self) -> Option<u64> {
        None
    }

    /// Of these segments, ascending, hashes will be asked for.
    fn expect_segments(&self, _segments: &[u64]) {}

    /// These extents of one segment, which aren't zeros, will be read.
    ///
    /// # Errors
    /// When they can't be.
    fn expect(&self, _extents: &[Extent]) -> Result<(), CarryError> {
        Ok(())
    }

    /// True when a range is known to be zeros.
    fn is_zero(&self, _range: Range<u64>) -> bool {
        false
    }

    /// Fills `buffer` from byte `offset` on.
    ///
    /// # Errors
    /// When it can't be read.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CarryError>;

    /// The error of a block that doesn't have its hash.
    fn wrong(&self, block: u64) -> CarryError;
}

impl Content for CarriedDisk {
    fn digest(&self, segment: u64) -> Option<BlockHash> {
        Some(Self::digest(self, segment))
    }

    fn hashes(&self, segment: u64) -> Result<Option<Vec<BlockHash>>, CarryError> {
        Ok(Some(self.segment(segment)?))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CarryError> {
        Ok(Self::read_at(self, offset, buffer)?)
    }

    fn wrong(&self, block: u64) -> CarryError {
        Self::wrong(self, block).into()
    }
}

/// A chain of another program.
struct Foreign {
    chain: ForeignChain,
    occupied_bytes: Option<u64>,
}

/// Opens the VHD or VHDX at `path` with its parents; returns the size of the disk and its sectors as well.
///
/// # Errors
/// When one of its images is missing, damaged, or of a kind that isn't known.
pub fn foreign(storage: &Disk, path: &Path) -> Result<(Box<dyn Content>, u64, u32), CarryError> {
    let chain = open_chain(storage, path)?;
    let geometry = chain.layers.geometry();
    check_size(path, geometry.disk_bytes)?;
    let occupied = |path: &PathBuf| Some(storage.metadata(path).ok()??.allocated_bytes);
    let occupied_bytes = chain.paths.iter().map(occupied).sum();
    let content = Box::new(Foreign { chain, occupied_bytes });
    Ok((content, geometry.disk_bytes, geometry.logical_sector_bytes))
}

impl Foreign {
    fn failed(&self, error: ImageError) -> CarryError {
        let path = self.chain.paths.first().cloned().unwrap_or_default();
        match error {
            ImageError::Io { source, .. } => CarryError::Io { path, source },
            source => ForeignError::Image { path, source }.into(),
        }
    }
}

impl Content for Foreign {
    fn occupied_bytes(&self) -> Option<u64> {
        self.occupied_bytes
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        self.chain.layers.look_up(range).is_ok_and(|places| places.is_zero())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CarryError> {
        self.chain.layers.read_at(offset, buffer).map_err(|error| self.failed(error))
    }

    fn wrong(&self, block: u64) -> CarryError {
        changed(self.chain.paths.first(), block)
    }
}

/// A disk as plain bytes.
struct Raw {
    file: File,
}

/// Opens the raw image at `path`; returns its size as well.
///
/// # Errors
/// When it can't be opened or is no disk.
pub fn raw(storage: &Disk, path: &Path) -> Result<(Box<dyn Content>, u64), CarryError> {
    let failed = |source| CarryError::Io { path: path.to_owned(), source };
    let file = storage.open_named(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.length_bytes;
    check_size(path, size)?;
    Ok((Box::new(Raw { file }), size))
}

impl Content for Raw {
    fn occupied_bytes(&self) -> Option<u64> {
        // Of a device nobody knows.
        self.file.metadata().ok().map(|file| file.allocated_bytes).filter(|bytes| *bytes > 0)
    }

    fn is_zero(&self, range: Range<u64>) -> bool {
        let next = self.file.next_data(range.start);
        next.is_ok_and(|data| data.is_none_or(|data| data.start >= range.end))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CarryError> {
        let failed = |source| CarryError::Io { path: self.file.path().to_owned(), source };
        self.file.read_exact_at(buffer, offset).map_err(failed)
    }

    fn wrong(&self, block: u64) -> CarryError {
        changed(Some(&self.file.path().to_owned()), block)
    }
}

fn changed(path: Option<&PathBuf>, block: u64) -> CarryError {
    let path = path.cloned().unwrap_or_default();
    CarriedError::Damaged { path, reason: format!("block {block} of its disk changes") }.into()
}

fn check_size(path: &Path, size: u64) -> Result<(), CarryError> {
    match size > 0 && size <= MAX_DISK_BYTES && size.is_multiple_of(512) {
        true => Ok(()),
        false => Err(CarryError::Unfit {
            path: path.to_owned(),
            reason: format!(
                "its disk has {size} bytes: a disk has a multiple of 512, and at most 64 TiB"
            ),
        }),
    }
}
