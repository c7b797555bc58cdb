//! Pins of a machine, in `<machine>/.pins.json`: snapshots whose runs no plan drops.
//!
//! Replaced as a whole, so a crash leaves the old pins or the new ones. Locking is the caller's. A damaged file stays where
//! it is, and all who ask get the error: what is pinned isn't known then, so nothing may be dropped by a plan.

use std::collections::BTreeSet;

use janus_proto::ids::{MachineKey, SnapshotId};
use serde::{Deserialize, Serialize};

use super::{FORMAT, Store, StoreError, faults::Fault, read, write};

const PINS: &str = ".pins.json";

#[derive(Serialize, Deserialize)]
struct PinsFile {
    format: u32,
    snapshots: BTreeSet<SnapshotId>,
}

impl Store {
    /// The pinned snapshots of a machine.
    ///
    /// # Errors
    /// When the file is there and can't be read.
    pub fn pins(&self, machine: &MachineKey) -> Result<BTreeSet<SnapshotId>, StoreError> {
        let path = self.machine_folder(machine).join(PINS);
        let file = read::<PinsFile>(&self.storage, &path).map_err(|error| match error {
            StoreError::Damaged { path, reason } => {
                let out =
                    "what it pinned isn't known: bring the file back, or remove it and pin again";
                StoreError::Damaged { path, reason: format!("{reason}; {out}") }
            }
            other => other,
        })?;
        Ok(file.map(|file| file.snapshots).unwrap_or_default())
    }

    /// Why the pins of a machine can't be read.
    pub fn pins_fault(&self, machine: &MachineKey, error: &StoreError) -> Fault {
        Fault::of_file(&self.machine_folder(machine).join(PINS), error)
    }

    /// Replaces the pins of a machine, durably.
    ///
    /// # Errors
    /// As the file system says; the old pins stay then.
    pub fn save_pins(
        &self,
        machine: &MachineKey,
        snapshots: BTreeSet<SnapshotId>,
    ) -> Result<(), StoreError> {
        let folder = self.machine_folder(machine);
        self.storage.make_folder(&folder).map_err(StoreError::io("make", &folder))?;
        write(&self.storage, &folder.join(PINS), &PinsFile { format: FORMAT, snapshots })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_survive_a_restart_and_damage_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let machine: MachineKey = "alice/web".parse().unwrap();
        let pins = BTreeSet::from([SnapshotId::new(), SnapshotId::new()]);
        let (store, _) = Store::open(folder.path(), true).unwrap();
        assert_eq!(store.pins(&machine).unwrap(), BTreeSet::new());
        store.save_pins(&machine, pins.clone()).unwrap();
        drop(store);
        let (store, _) = Store::open(folder.path(), true).unwrap();
        assert_eq!(store.pins(&machine).unwrap(), pins);
        let path = store.machine_folder(&machine).join(PINS);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[20] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(matches!(store.pins(&machine), Err(StoreError::Damaged { .. })));
        assert!(path.exists(), "it stays for whoever can read it");
    }
}
