//! What can't be read: one folder or file costs nothing but the machine or disk whose it is.
//!
//! A machine whose folder can't be read is known by its name alone: nothing of it is listed, changed or built on until a start
//! finds it readable. Of one with an unreadable disk the other disks go on. Newer formats are no fault of this kind: they stop the
//! start, since they tell of a server that was set back to an older version.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use janus_proto::ids::{DiskId, MachineKey};

use super::{
    MachineFile, MachineState, Store, StoreError,
    folders::{is_folder, list, named_in},
};
use crate::storage::Disk;

/// A folder or file of the store that can't be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Which.
    pub path: PathBuf,
    /// Why not, with the way out.
    reason: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl Fault {
    /// Of a folder that is left alone until the next start.
    fn of_folder(path: &Path, error: &StoreError) -> Self {
        let reason = format!(
            "{error}; what is below {} is left alone: make it readable for the server's user, or bring it back, and restart the \
             server; to begin anew, move it out of the image path first",
            path.display()
        );
        Self { path: path.to_owned(), reason }
    }

    /// Of a file whose error says the way out.
    pub(super) fn of_file(path: &Path, error: &StoreError) -> Self {
        Self { path: path.to_owned(), reason: error.to_string() }
    }
}

/// What of one machine can't be used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Faults {
    /// All of it.
    pub machine: Option<Fault>,
    /// Some of its disks.
    pub disks: BTreeMap<DiskId, Fault>,
    /// What is pinned isn't known.
    pub pins: Option<Fault>,
    /// What is locked isn't known.
    pub guard: Option<Fault>,
}

impl Faults {
    /// Why no run with these disks can start.
    pub fn of_disks<'a>(&self, mut disks: impl Iterator<Item = &'a DiskId>) -> Option<&Fault> {
        self.machine.as_ref().or_else(|| disks.find_map(|disk| self.disks.get(disk)))
    }

    /// Why nothing of the machine may be dropped or merged.
    pub fn of_history(&self) -> Option<&Fault> {
        self.machine.as_ref().or_else(|| self.disks.values().next()).or(self.guard.as_ref())
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Fault> {
        self.machine.iter().chain(self.disks.values()).chain(&self.pins).chain(&self.guard)
    }
}

impl Store {
    /// Why nothing of a machine can be known here, though no folder of its own says so.
    pub fn fault_above(&self, machine: &MachineKey) -> Option<&Fault> {
        let folder = self.machine_folder(machine);
        self.faults.iter().find(|fault| folder.starts_with(&fault.path))
    }

    /// What can't be used and belongs to no machine that is known.
    pub fn faults(&self) -> &[Fault] {
        &self.faults
    }

    /// Folders of machines. What can't be read is logged and remembered.
    ///
    /// # Errors
    /// When the image path itself can't be read.
    pub(super) fn machine_folders(&mut self) -> Result<Vec<PathBuf>, StoreError> {
        let first = named_in(&self.storage, &self.root)?;
        let first = self.folders_of(first);
        if !self.separate_folders_by_user {
            return Ok(first);
        }
        let mut all = Vec::new();
        for user in first {
            match named_in(&self.storage, &user) {
                Ok(paths) => all.extend(self.folders_of(paths)),
                Err(error) => self.note(&user, &error),
            }
        }
        Ok(all)
    }

    fn folders_of(&mut self, mut paths: Vec<PathBuf>) -> Vec<PathBuf> {
        paths.retain(|path| match is_folder(&self.storage, path) {
            Ok(is_folder) => is_folder,
            Err(error) => {
                self.note(path, &error);
                false
            }
        });
        paths
    }

    /// Takes a machine in that can't be loaded.
    ///
    /// # Errors
    /// The error itself, where a newer version has written the store.
    pub(super) fn without(
        &mut self,
        folder: &Path,
        error: StoreError,
    ) -> Result<Option<(MachineKey, MachineState)>, StoreError> {
        if matches!(error, StoreError::Newer { .. }) {
            return Err(error);
        }
        let Some(machine) = self.machine_of(folder) else {
            self.note(folder, &error);
            return Ok(None);
        };
        let fault = Fault::of_folder(folder, &error);
        tracing::error!(%machine, %fault, "a machine can't be used");
        let faults = Faults { machine: Some(fault), ..Faults::default() };
        Ok(Some((machine, MachineState { faults, ..MachineState::default() })))
    }

    fn note(&mut self, path: &Path, error: &StoreError) {
        let fault = Fault::of_folder(path, error);
        tracing::error!(%fault, "a part of the store can't be used");
        self.faults.push(fault);
    }

    /// Looks which disks and pins of a machine can't be read.
    pub(super) fn look_for_faults(
        &self,
        folder: &Path,
        file: &MachineFile,
    ) -> Result<Faults, StoreError> {
        let mut faults = Faults::default();
        for path in named_in(&self.storage, folder)? {
            let listed = match is_folder(&self.storage, &path) {
                Ok(false) => continue,
                Ok(true) => list(&self.storage, &path).map(drop),
                Err(error) => Err(error),
            };
            let disk = path.file_name().and_then(|name| name.to_str()?.parse::<DiskId>().ok());
            if let (Err(error), Some(disk)) = (listed, disk) {
                let fault = Fault::of_folder(&path, &error);
                tracing::error!(machine = %file.machine, %disk, %fault, "a disk can't be used");
                faults.disks.insert(disk, fault);
            }
        }
        if let Err(error) = self.pins(&file.machine) {
            tracing::error!(machine = %file.machine, %error, "what is pinned isn't known: retention drops nothing of this machine");
            faults.pins = Some(self.pins_fault(&file.machine, &error));
        }
        Ok(faults)
    }
}

impl Faults {
    /// Folders of a machine's disks, without those that can't be read.
    pub(super) fn readable_disks(
        &self,
        storage: &Disk,
        folder: &Path,
    ) -> Result<Vec<PathBuf>, StoreError> {
        let mut disks = Vec::new();
        for path in named_in(storage, folder)? {
            let is_faulty = self.disks.values().any(|fault| fault.path == path);
            if !is_faulty && is_folder(storage, &path)? {
                disks.push(path);
            }
        }
        Ok(disks)
    }
}
