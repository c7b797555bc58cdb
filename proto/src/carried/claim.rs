//! A folder that is being written.

use std::path::{Path, PathBuf};

use super::{CarriedError, MANIFEST, Manifest, UNFINISHED, names};
use crate::{
    ids::DiskId,
    storage::{Access, Disk},
};

/// A folder that will hold a carried run. Until it is finished its files count for nothing; whoever claims it again
/// writes them anew.
#[derive(Debug)]
pub struct Claim {
    storage: Disk,
    folder: PathBuf,
    names: Vec<String>,
}

impl Claim {
    /// Claims a folder, which is made if it is not there, for these disks.
    ///
    /// # Errors
    /// When it holds a carried run, or files of these names that an unfinished one has not left there, and as the file
    /// system says.
    pub fn take(
        storage: &Disk,
        folder: &Path,
        disks: impl IntoIterator<Item = DiskId>,
    ) -> Result<Self, CarriedError> {
        storage.make_folder(folder).map_err(CarriedError::io("make", folder))?;
        let names = disks.into_iter().map(|disk| names(&disk)).flat_map(<[String; 2]>::from);
        let claim =
            Self { storage: storage.clone(), folder: folder.to_owned(), names: names.collect() };
        let mark = folder.join(UNFINISHED);
        let mut taken = vec![MANIFEST.to_owned()];
        if !storage.exists(&mark).map_err(CarriedError::io("look for", &mark))? {
            taken.extend(claim.names.iter().cloned());
        }
        for path in taken.iter().map(|name| folder.join(name)) {
            if storage.exists(&path).map_err(CarriedError::io("look for", &path))? {
                return Err(CarriedError::Occupied { path });
            }
        }
        let failed = |error| CarriedError::io("write to", folder)(error);
        storage.open(&mark, Access::Create).map_err(failed)?.sync_all().map_err(failed)?;
        storage.sync_folder(folder).map_err(CarriedError::io("sync", folder))?;
        Ok(claim)
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the folder lies on.
    pub fn storage(&self) -> &Disk {
        &self.storage
    }

    /// Writes the manifest: from now on the folder holds a carried run.
    ///
    /// # Errors
    /// As the file system says; then it holds none.
    pub fn finish(self, manifest: &Manifest) -> Result<(), CarriedError> {
        let path = self.folder.join(MANIFEST);
        let bytes =
            manifest.to_bytes().map_err(|error| CarriedError::damaged(&path, error.to_string()))?;
        self.storage.sync_folder(&self.folder).map_err(CarriedError::io("sync", &self.folder))?;
        self.storage.replace(&path, &bytes).map_err(CarriedError::io("write", &path))?;
        // With a manifest it says nothing any more.
        let mark = self.folder.join(UNFINISHED);
        self.storage.remove(&mark).map_err(CarriedError::io("remove", &mark))
    }

    /// Removes what was written. What can't be removed is left for the next claim.
    pub fn give_up(self) {
        let marks = [UNFINISHED.to_owned(), format!("{MANIFEST}.new")];
        for name in self.names.iter().chain(&marks) {
            if let Err(error) = self.storage.remove(&self.folder.join(name)) {
                tracing::warn!(%error, name, "a file of an unfinished folder stays");
                return;
            }
        }
    }
}
