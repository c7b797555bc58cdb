//! The commit point of a run, and the way back from it.
//!
//! The files of the run get their names, durably, then its manifest is renamed to its own: that is the commit. When the disk fails
//! on the way, all is undone. When it fails to undo a manifest that may already be durable, the run is *in doubt*: its files
//! stay as the manifest names them, until a repeated publication or its undoing succeeds.

use std::{
    collections::HashSet,
    io,
    path::{Path, PathBuf},
};

use super::{OpenRun, RUNS, Run, Store, StoreError, exists, read, trash, write};
use crate::storage::Disk;

impl Store {
    /// Publishes a run: gives its synced partial files their names, then writes the manifest, the commit point.
    ///
    /// # Errors
    /// As the file system says. The run is not committed then, its files have their partial names again, and publishing
    /// may be tried again. `InDoubt`: it may be committed. Then nothing may be done with it but this, with the same `run`, or
    /// [`Self::unpublish`], until one of them succeeds.
    pub fn publish(&self, run: &Run, open: &OpenRun) -> Result<(), StoreError> {
        let folder = self.machine_folder(&run.machine);
        let published = name_and_publish(&self.storage, &folder, run, open);
        if let Err(error) = &published {
            tracing::error!(%error, backup_id = %run.backup, "a run can't be published");
            self.unpublish(run, open)?;
        }
        published
    }

    /// Undoes a publication that failed: durably removes the manifest, then gives the files their partial names.
    ///
    /// # Errors
    /// `InDoubt` while the manifest may still be on the disk.
    pub fn unpublish(&self, run: &Run, open: &OpenRun) -> Result<(), StoreError> {
        let folder = self.machine_folder(&run.machine);
        let path = trash::manifest_path(&folder.join(RUNS), run);
        let in_doubt = |source| StoreError::InDoubt { path: path.clone(), source };
        // Its folder is synced even if it is not there: a rename that "failed" may be on its way to the disk.
        let removed = match read::<Run>(&self.storage, &path) {
            Ok(Some(there)) if there.backup != run.backup => Ok(()),
            Err(StoreError::Io { source, .. }) => Err(source),
            _ => self.storage.remove(&path),
        };
        removed.and_then(|()| self.storage.sync_folder(&folder.join(RUNS))).map_err(in_doubt)?;
        take_back(&self.storage, &folder, open, &HashSet::new())
    }
}

fn name_and_publish(
    storage: &Disk,
    folder: &Path,
    run: &Run,
    open: &OpenRun,
) -> Result<(), StoreError> {
    for disk in &open.disks {
        for kind in disk.kinds() {
            let (partial, path) =
                (folder.join(disk.partial(kind)), folder.join(disk.published_file(kind)));
            // When an earlier publication is in doubt, the file has its name already.
            let has_name = !exists(storage, &partial)? && exists(storage, &path)?;
            if !has_name {
                storage.rename(&partial, &path).map_err(StoreError::io("publish", &path))?;
            }
        }
        let disk_folder = folder.join(disk.disk.as_str());
        storage.sync_folder(&disk_folder).map_err(StoreError::io("sync", &disk_folder))?;
    }
    let path = trash::manifest_path(&folder.join(RUNS), run);
    if read::<Run>(storage, &path)?.is_some_and(|there| there.backup != run.backup) {
        let source = io::Error::from(io::ErrorKind::AlreadyExists);
        return Err(StoreError::Io { action: "write over", path, source });
    }
    write(storage, &path, run)
}

/// Undoes the renames of a publication that did not reach its manifest. What `committed` names stays.
pub(super) fn take_back(
    storage: &Disk,
    folder: &Path,
    run: &OpenRun,
    committed: &HashSet<PathBuf>,
) -> Result<(), StoreError> {
    for disk in &run.disks {
        for kind in disk.kinds() {
            let path = folder.join(disk.published_file(kind));
            if !committed.contains(&path) && exists(storage, &path)? {
                storage
                    .rename(&path, &folder.join(disk.partial(kind)))
                    .map_err(StoreError::io("take back", &path))?;
            }
        }
    }
    Ok(())
}
