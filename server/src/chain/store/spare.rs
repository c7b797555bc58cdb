//! Space kept for hard times, in `<image_path>/.spare`: on a disk that others have filled to the last block it is given up for
//! what frees space, which has to write down what it drops. It is taken again once there is plenty. A start does without: whoever
//! fills the disk would have that space, too, before it is of use.

use std::path::Path;

use serde::Serialize;

use super::{Store, StoreError, records::text, write};
use crate::storage::{Access, Disk, is_full};

const SPARE: &str = ".spare";
/// Enough for the small files of a large retention run, and for merges, which write tables before they free blocks:
/// those of changes of about half a gibibyte.
const SPARE_BYTES: u64 = 16 << 20;
/// Free space of which so much may be taken.
const PLENTY_BYTES: u64 = 8 * SPARE_BYTES;

/// Gives the spare space up when nothing else is left.
fn give_if_full(storage: &Disk, root: &Path) {
    let is_full = storage.space(root).is_ok_and(|(free_bytes, _)| free_bytes < SPARE_BYTES);
    let spare = root.join(SPARE);
    let is_there = || storage.exists(&spare).unwrap_or(false);
    if is_full && is_there() && storage.remove(&spare).is_ok() {
        tracing::warn!(path = %root.display(), "the disk is full: what was kept for that is free now");
    }
}

/// Replaces a small file as ever; without a block for another one it is written over, where a file system that doesn't copy on
/// writes needs none, or gets spare space. Power that goes in that moment leaves a damaged file: one that can be made again.
pub(super) fn write_even_if_full<T: Serialize>(
    storage: &Disk,
    root: &Path,
    path: &Path,
    value: &T,
) -> Result<(), StoreError> {
    let lacks_space =
        |error: &StoreError| matches!(error, StoreError::Io { source, .. } if is_full(source));
    let written = write(storage, path, value);
    if !written.as_ref().is_err_and(lacks_space) {
        return written;
    }
    write_over(storage, path, value).or_else(|error| {
        if !lacks_space(&error) {
            return Err(error);
        }
        give_if_full(storage, root);
        write(storage, path, value)
    })
}

fn write_over<T: Serialize>(storage: &Disk, path: &Path, value: &T) -> Result<(), StoreError> {
    let bytes = text(path, value)?;
    let write = || {
        let file = storage.open(path, Access::Write)?;
        file.write_all_at(&bytes, 0)?;
        file.set_len(bytes.len() as u64)?;
        file.sync_all()
    };
    write().map_err(StoreError::io("write", path))
}

impl Store {
    /// Called before what frees space: gives the spare space up when nothing else is left.
    pub fn give_spare(&self) {
        give_if_full(&self.storage, &self.root);
    }

    /// Takes spare space where there is plenty. That it can't be had is no failure.
    pub fn keep_spare(&self) {
        if self.space().is_ok_and(|(free_bytes, _)| free_bytes > PLENTY_BYTES) {
            self.storage.allocate(&self.root.join(SPARE), SPARE_BYTES);
        }
    }
}
