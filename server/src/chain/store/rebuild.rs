//! A catalog from the folders alone: for a store that was copied by hand, in part, from another server or another layout.
//!
//! First a survey says what would be done, as a list of [`Step`]s: it only reads. Then the steps are done in their order.
//! Each is one rename or one replaced file, and a step that was done is not in the next survey, so that a rebuild that was
//! killed is begun again. Nothing is removed: what belongs nowhere is moved to a `set-aside` folder.
//!
//! Where merges are pending there are two surveys: files have the names that manifests say once the merges are finished.
//!
//! The new generation comes first: whatever else was done, clients and janus then take the store for a new one and compare.
//! Open runs end: nobody knows when their files were copied, and all that it costs is that their client begins again.

mod steps;
mod survey;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use janus_proto::ids::{MachineKey, StoreGeneration};

pub use self::steps::Step;
use self::survey::{Folders, NOBODYS};
use super::{FORMAT, MachineState, Store, StoreError, StoreFile, StoreLock, Unknown, read, write};
use crate::{image::Format, storage::Disk};

/// What was or would be done.
#[derive(Debug, Default)]
pub struct Plan {
    /// In their order.
    pub steps: Vec<Step>,
    /// Files that can't be used as they are, and why.
    pub unread: Vec<(PathBuf, String)>,
}

impl Plan {
    /// What comes before the machines.
    fn of(root: &Path, folders: &Folders) -> Self {
        let renew = Step::Renew(root.to_owned());
        let steps = [renew].into_iter().chain(folders.steps.clone()).collect();
        Self { steps, unread: Vec::new() }
    }

    /// Finished images that no manifest names.
    pub fn images_of_nobody(&self) -> usize {
        let is_image = |path: &Path| path.to_str().and_then(Format::of_name).is_some();
        let moved = |step: &&Step| matches!(step, Step::Move { from, why, .. } if *why == NOBODYS && is_image(from));
        self.steps.iter().filter(moved).count()
    }
}

/// A store made anew, and how.
pub struct Rebuilt {
    /// Opened as a server would.
    pub store: Store,
    /// Its machines.
    pub machines: HashMap<MachineKey, MachineState>,
    /// What was done.
    pub plan: Plan,
}

/// Says what [`rebuild`] would do with the first look at the folders.
///
/// # Errors
/// When no machine is found, a server has the store, a newer version wrote it, or the file system refuses.
pub fn plan(storage: &Disk, root: &Path, separate: bool) -> Result<Plan, StoreError> {
    let (_lock, folders) = locked(storage, root, separate)?;
    let mut plan = Plan::of(root, &folders);
    for (folder, key) in folders.machines {
        survey::machine(storage, &folder, &key, &mut plan)?;
    }
    Ok(plan)
}

/// Makes the catalog of the folders below `root`.
///
/// # Errors
/// As [`plan`]. What was done until then stays, and doing it again goes on.
pub fn rebuild(storage: &Disk, root: &Path, separate: bool) -> Result<Rebuilt, StoreError> {
    let (lock, folders) = locked(storage, root, separate)?;
    renew_generation(storage, root)?;
    steps::carry_out(storage, &folders.steps)?;
    let mut plan = Plan::of(root, &folders);
    // Where they are now.
    let machines = survey::folders(storage, root, separate)?.machines;
    let merging = carry_out(storage, machines, &mut plan)?;
    let lock = match merging.is_empty() {
        true => lock,
        false => {
            // This finishes the merges. What nothing names is for the second survey.
            let opened = Store::open_locked(storage.clone(), root, separate, lock, Unknown::Stays);
            let (store, _) = opened?;
            carry_out(storage, merging, &mut plan)?;
            store.lock
        }
    };
    let (store, machines) =
        Store::open_locked(storage.clone(), root, separate, lock, Unknown::SetAside)?;
    for key in machines.iter().filter(|(_, state)| state.incomplete).map(|(key, _)| key) {
        let folder = store.machine_folder(key);
        // A disk that fails now and then: the survey could read what opening the store could not.
        if !plan.unread.iter().any(|(path, _)| path.starts_with(&folder)) {
            plan.unread.push((folder, "a manifest can't be read now: rebuild again".into()));
        }
    }
    Ok(Rebuilt { store, machines, plan })
}

/// Looks at machines and does what is to be done there. Returns those that are to be looked at again, once their merges are finished.
fn carry_out(
    storage: &Disk,
    machines: Vec<(PathBuf, MachineKey)>,
    plan: &mut Plan,
) -> Result<Vec<(PathBuf, MachineKey)>, StoreError> {
    let mut merging = Vec::new();
    for (folder, key) in machines {
        let mut own = Plan::default();
        let is_all = survey::machine(storage, &folder, &key, &mut own)?;
        steps::carry_out(storage, &own.steps)?;
        plan.steps.extend(own.steps);
        own.unread.retain(|found| !plan.unread.contains(found));
        plan.unread.extend(own.unread);
        if !is_all {
            merging.push((folder, key));
        }
    }
    Ok(merging)
}

/// What the survey finds, and the lock. A mistyped path must not become a store, and gets no lock's file either.
fn locked(storage: &Disk, root: &Path, separate: bool) -> Result<(StoreLock, Folders), StoreError> {
    let some = || {
        let folders = survey::folders(storage, root, separate)?;
        match folders.machines.is_empty() {
            true => Err(StoreError::NoStore { path: root.to_owned() }),
            false => Ok(folders),
        }
    };
    some()?;
    let lock = StoreLock::of_store(storage, root)?;
    Ok((lock, some()?))
}

/// Gives a store another generation and counts its starts anew. The caller has the store's lock.
///
/// # Errors
/// When a newer version wrote it, or the file system refuses; the old generation stays then, or the new one is there.
pub(super) fn renew_generation(storage: &Disk, root: &Path) -> Result<StoreGeneration, StoreError> {
    let path = root.join(super::STORE);
    // Of a damaged file nothing is of use but its being there: it is kept beside the new one.
    if let Err(error) = read::<StoreFile>(storage, &path) {
        match error {
            StoreError::Damaged { .. } => super::put_aside(storage, &path)?,
            other => return Err(other),
        }
    }
    let generation = StoreGeneration::new();
    write(storage, &path, &StoreFile { format: FORMAT, generation, starts: 0 })?;
    Ok(generation)
}
