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

/// Backups that nobody sees any more would begin anew beside the old ones.
pub(super) fn check_layout(storage: &Disk, root: &Path, separate: bool) -> Result<(), StoreError> {
    let misplaced = |path: PathBuf| Err(StoreError::OtherLayout { path, separate });
    for first in folders_in(storage, root)? {
        if separate {
            if exists(storage, &first.join(MACHINE))? {
                return misplaced(first);
            }
        } else if !exists(storage, &first.join(MACHINE))? {
            for second in folders_in(storage, &first)? {
                if exists(storage, &second.join(MACHINE))? {
                    return misplaced(second);
                }
            }
        }
    }
    Ok(())
}

/// Folders of users, machines or disks: our own start with a dot.
pub(super) fn folders_in(storage: &Disk, folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    // Our own, and what file systems make in their root, which only root may read.
    let is_none = |path: &Path| {
        path.file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b".") || name == "lost+found")
    };
    let mut folders = Vec::new();
    for path in list(storage, folder)? {
        if !is_none(&path) && is_folder(storage, &path)? {
            folders.push(path);
        }
    }
    Ok(folders)
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
