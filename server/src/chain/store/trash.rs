//! The trash: dropped runs, in `<machine>/.trash/<sequence>.json`, each with a record `<sequence>.why.json`.
//!
//! The record is written first, then ONE rename of the manifest drops the run: a crash leaves it kept or dropped. A record
//! without its manifest means nothing and goes at the next start. Bringing a run back is the rename back. The images stay
//! where they are. Locking is the caller's.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use janus_proto::ids::MachineKey;

use super::{DAMAGED, RUNS, Store, StoreError, files_in, put_aside, read, write};
use crate::{
    chain::{FORMAT, History, Run, TrashRecord, TrashedRun},
    storage::Disk,
};

pub(super) const TRASH: &str = ".trash";
pub(super) const WHY: &str = ".why.json";

impl Store {
    /// Drops a run.
    ///
    /// # Errors
    /// As the file system says. The run is kept then until the store is opened again, which may find it dropped; repeating this is
    /// safe.
    pub fn drop_run(&self, run: &Run, record: &TrashRecord) -> Result<(), StoreError> {
        let trash = self.machine_folder(&run.machine).join(TRASH);
        self.storage.make_folder(&trash).map_err(StoreError::io("make", &trash))?;
        self.save_trash_record(run, record)?;
        move_manifest(&self.storage, &self.run_path(run, RUNS), &self.run_path(run, TRASH))
    }

    /// Brings a dropped run back.
    ///
    /// # Errors
    /// As the file system says.
    pub fn bring_back(&self, run: &Run) -> Result<(), StoreError> {
        move_manifest(&self.storage, &self.run_path(run, TRASH), &self.run_path(run, RUNS))?;
        let path = self.why_path(run);
        self.storage.remove(&path).map_err(StoreError::io("remove", &path))
    }

    /// Replaces the record of a dropped run.
    ///
    /// # Errors
    /// As the file system says; the old record stays then.
    pub fn save_trash_record(&self, run: &Run, record: &TrashRecord) -> Result<(), StoreError> {
        write(&self.storage, &self.why_path(run), record)
    }

    /// Removes what is left of a dropped run that has no snapshots any more.
    ///
    /// # Errors
    /// As the file system says.
    pub(super) fn remove_trashed(&self, run: &Run) -> Result<(), StoreError> {
        for path in [self.run_path(run, TRASH), self.why_path(run)] {
            self.storage.remove(&path).map_err(StoreError::io("remove", &path))?;
        }
        Ok(())
    }

    /// True when the manifest of a run says what the run is; false when it is missing, damaged or says something else.
    ///
    /// # Errors
    /// When it can't be read now.
    pub fn has_manifest(&self, run: &Run, in_trash: bool) -> Result<bool, StoreError> {
        match read::<Run>(&self.storage, &self.path_of(run, in_trash)) {
            Ok(there) => Ok(there.as_ref() == Some(run)),
            Err(StoreError::Damaged { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes the manifest of a run again, durably.
    ///
    /// # Errors
    /// As the file system says; what was there stays then.
    pub fn write_manifest(&self, run: &Run, in_trash: bool) -> Result<(), StoreError> {
        write(&self.storage, &self.path_of(run, in_trash), run)
    }

    fn path_of(&self, run: &Run, in_trash: bool) -> PathBuf {
        self.run_path(run, if in_trash { TRASH } else { RUNS })
    }

    fn run_path(&self, run: &Run, folder: &str) -> PathBuf {
        manifest_path(&self.machine_folder(&run.machine).join(folder), run)
    }

    fn why_path(&self, run: &Run) -> PathBuf {
        self.run_path(run, TRASH).with_extension("why.json")
    }
}

/// Reads a machine's trash into `history`; false when a manifest could not be read and was left out.
pub(super) fn load(
    storage: &Disk,
    folder: &Path,
    machine: &MachineKey,
    history: &mut History,
) -> Result<bool, StoreError> {
    let trash = folder.join(TRASH);
    let mut complete = files_in(storage, &trash, DAMAGED)?.is_empty();
    for path in files_in(storage, &trash, "json")? {
        if path.to_string_lossy().ends_with(WHY) {
            continue;
        }
        match read::<Run>(storage, &path) {
            Ok(Some(run)) if run.machine == *machine && history.run(run.backup).is_none() => {
                let record = read_record(storage, &path, &run)?;
                history.add_trashed(TrashedRun { run: Arc::new(run), record });
            }
            Ok(_) => {
                tracing::error!(path = %path.display(), "a dropped run of another machine, or one that is kept too, is left out");
                complete = false;
            }
            Err(error @ StoreError::Newer { .. }) => return Err(error),
            Err(error) => {
                tracing::error!(%error, "the manifest of a dropped run is left out; its images stay where they are");
                if matches!(error, StoreError::Damaged { .. }) {
                    put_aside(storage, &path)?;
                }
                complete = false;
            }
        }
    }
    remove_lone_records(storage, &trash)?;
    Ok(complete)
}

/// A run without a record that can be read stays until somebody asks for its purge, and isn't brought back: its purge
/// may have begun.
fn read_record(storage: &Disk, manifest: &Path, run: &Run) -> Result<TrashRecord, StoreError> {
    match read(storage, &manifest.with_extension("why.json")) {
        Ok(Some(record)) => return Ok(record),
        Err(error @ StoreError::Newer { .. }) => return Err(error),
        Ok(None) => {
            tracing::error!(path = %manifest.display(), "a dropped run has no record of its drop")
        }
        Err(error) => tracing::error!(%error, "the record of a dropped run can't be read"),
    }
    Ok(TrashRecord {
        format: FORMAT,
        backup: run.backup,
        trashed_ms: run.committed_ms,
        reason: "its record is damaged".to_owned(),
        purge_not_before_ms: i64::MAX,
        purging: true,
    })
}

/// Removes records of drops that did not happen or were undone.
fn remove_lone_records(storage: &Disk, trash: &Path) -> Result<(), StoreError> {
    for path in files_in(storage, trash, "json")? {
        let Some(stem) = path.to_str().and_then(|path| path.strip_suffix(WHY)) else { continue };
        let manifest = PathBuf::from(format!("{stem}.json"));
        let there = storage.exists(&manifest).map_err(StoreError::io("look for", &manifest))?;
        // A damaged manifest may be brought back under its name.
        if !there && files_in(storage, trash, DAMAGED)?.is_empty() {
            storage.remove(&path).map_err(StoreError::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Moves a manifest, durably. When that fails it may be moved all the same, which repeating this makes durable.
fn move_manifest(storage: &Disk, from: &Path, to: &Path) -> Result<(), StoreError> {
    let there = |path: &Path| storage.exists(path).map_err(StoreError::io("look for", path));
    if there(from)? || !there(to)? {
        storage.rename(from, to).map_err(StoreError::io("move", from))?;
    }
    for folder in [to, from].into_iter().filter_map(Path::parent) {
        storage.sync_folder(folder).map_err(StoreError::io("sync", folder))?;
    }
    Ok(())
}

/// Where the manifest of a run lies in a folder of manifests.
pub(super) fn manifest_path(folder: &Path, run: &Run) -> PathBuf {
    folder.join(format!("{:08}.json", run.sequence))
}
