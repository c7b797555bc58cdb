//! Folders of the store: what is in them, and which names are free.

use std::path::{Path, PathBuf};

use super::{MACHINE, StoreError};
use crate::storage::Disk;

/// This name, or one like it that nothing has.
pub(super) fn free_name(storage: &Disk, path: &Path) -> Result<PathBuf, StoreError> {
    if !exists(storage, path)? {
        return Ok(path.to_owned());
    }
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}", uuid::Uuid::now_v7().simple()));
    Ok(path.with_file_name(name))
}

pub(super) fn list(storage: &Disk, folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    storage.list(folder).map_err(StoreError::io("list", folder))
}

pub(super) fn exists(storage: &Disk, path: &Path) -> Result<bool, StoreError> {
    storage.exists(path).map_err(StoreError::io("look for", path))
}

pub(super) fn is_folder(storage: &Disk, path: &Path) -> Result<bool, StoreError> {
    storage.is_folder(path).map_err(StoreError::io("look at", path))
}

/// Backups that nobody sees any more would begin anew beside the old ones. What can't be read says nothing of the layout.
pub(super) fn check_layout(storage: &Disk, root: &Path, separate: bool) -> Result<(), StoreError> {
    let misplaced = |path: PathBuf| Err(StoreError::OtherLayout { path, separate });
    let is_machine = |path: &Path| exists(storage, &path.join(MACHINE)).unwrap_or(false);
    for first in named_in(storage, root)? {
        if separate {
            if is_machine(&first) {
                return misplaced(first);
            }
        } else if !is_machine(&first) {
            let below = folders_in(storage, &first).unwrap_or_default();
            if let Some(second) = below.into_iter().find(|path| is_machine(path)) {
                return misplaced(second);
            }
        }
    }
    Ok(())
}

/// Folders of users, machines or disks.
pub(super) fn folders_in(storage: &Disk, folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let mut folders = Vec::new();
    for path in named_in(storage, folder)? {
        if is_folder(storage, &path)? {
            folders.push(path);
        }
    }
    Ok(folders)
}

/// What may be a folder of a user, machine or disk: our own files start with a dot, and what file systems make in their root only
/// root may read.
pub(super) fn named_in(storage: &Disk, folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let mut paths = list(storage, folder)?;
    paths.retain(|path| {
        let name = path.file_name().unwrap_or_default();
        !name.as_encoded_bytes().starts_with(b".") && name != "lost+found"
    });
    Ok(paths)
}

pub(super) fn files_in(
    storage: &Disk,
    folder: &Path,
    extension: &str,
) -> Result<Vec<PathBuf>, StoreError> {
    let mut paths = list(storage, folder)?;
    paths.retain(|path| path.extension().is_some_and(|found| found == extension));
    Ok(paths)
}
