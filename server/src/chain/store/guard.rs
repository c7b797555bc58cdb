//! What protects runs of a machine, in `<machine>/.guard.json`, and what its last runs have changed, in `.changes.json`.
//!
//! Each is replaced as a whole. A damaged `.guard.json` stays where it is: what is locked isn't known then, so nothing may be dropped.
//! What runs have changed is worth less: a damaged file is put aside.

use std::path::Path;

use janus_proto::ids::MachineKey;
use serde::{Deserialize, Serialize};

use super::{
    FORMAT, MachineState, Store, StoreError, faults::Fault, read, read_or_put_aside, write,
};
use crate::guard::{Changes, Guarded};

const GUARD: &str = ".guard.json";
const CHANGES: &str = ".changes.json";

#[derive(Serialize, Deserialize)]
struct GuardFile {
    format: u32,
    #[serde(flatten)]
    guarded: Guarded,
}

#[derive(Serialize, Deserialize)]
struct ChangesFile {
    format: u32,
    changes: Changes,
}

impl Store {
    /// Reads both into a machine's state.
    ///
    /// # Errors
    /// When a newer program wrote one.
    pub(super) fn load_guard(
        &self,
        folder: &Path,
        machine: &MachineKey,
        state: &mut MachineState,
    ) -> Result<(), StoreError> {
        let path = folder.join(GUARD);
        match read::<GuardFile>(&self.storage, &path) {
            Ok(file) => state.guarded = file.map(|file| file.guarded).unwrap_or_default(),
            Err(error @ StoreError::Newer { .. }) => return Err(error),
            Err(error) => {
                tracing::error!(%machine, %error, "what is locked isn't known: nothing of this machine is dropped");
                let out = "bring the file back and restart the server: what is locked isn't known, so nothing of this machine is dropped";
                let reason = format!("{error}; {out}");
                let error = StoreError::Damaged { path: path.clone(), reason };
                state.faults.guard = Some(Fault::of_file(&path, &error));
            }
        }
        match read_or_put_aside::<ChangesFile>(&self.storage, &folder.join(CHANGES)) {
            Ok(file) => state.changes = file.map(|file| file.changes).unwrap_or_default(),
            Err(error @ StoreError::Newer { .. }) => return Err(error),
            Err(error) => {
                tracing::error!(%machine, %error, "what the last backups changed isn't known");
            }
        }
        Ok(())
    }

    /// Replaces what protects runs of a machine, durably.
    ///
    /// # Errors
    /// As the file system says; the old file stays then.
    pub fn save_guard(&self, machine: &MachineKey, guarded: &Guarded) -> Result<(), StoreError> {
        let folder = self.machine_folder(machine);
        self.storage.make_folder(&folder).map_err(StoreError::io("make", &folder))?;
        let file = GuardFile { format: FORMAT, guarded: guarded.clone() };
        write(&self.storage, &folder.join(GUARD), &file)
    }

    /// Replaces what the last runs of a machine have changed, durably.
    ///
    /// # Errors
    /// As the file system says; the old file stays then.
    pub fn save_changes(&self, machine: &MachineKey, changes: &Changes) -> Result<(), StoreError> {
        let path = self.machine_folder(machine).join(CHANGES);
        write(&self.storage, &path, &ChangesFile { format: FORMAT, changes: changes.clone() })
    }
}
