//! One process has a store: what says so.

use std::{io, path::Path};

use super::{StoreError, relocate};
use crate::storage::{Access, Disk, File};

/// Keeps other processes away from a store.
#[derive(Debug)]
pub(super) struct StoreLock {
    _file: File,
}

impl StoreLock {
    /// Takes it, or says who has it.
    pub fn take(storage: &Disk, root: &Path) -> Result<Self, StoreError> {
        let file = storage.open(&root.join(".store.lock"), Access::Create);
        let file = file.map_err(|source| match source.kind() {
            io::ErrorKind::ReadOnlyFilesystem => StoreError::ReadOnly { path: root.to_owned() },
            _ => StoreError::io("write to the image path", root)(source),
        })?;
        if !file.try_lock().map_err(StoreError::io("lock", root))? {
            return Err(StoreError::Locked { path: root.to_owned() });
        }
        Ok(Self { _file: file })
    }

    /// The same of a store that is to be opened.
    pub fn of_store(storage: &Disk, root: &Path) -> Result<Self, StoreError> {
        let lock = Self::take(storage, root)?;
        relocate::check_not_moved(storage, root)?;
        Ok(lock)
    }
}
