//! What of the store can't be used: told to administrators, and refused to who would build on it.

use std::collections::BTreeSet;

use janus_proto::ids::{MachineKey, SnapshotId};

use super::{Machine, Runs};
use crate::{audit::Audit, chain::store::StoreError};

/// Faults that are told to every janus.
const MOST_TOLD: usize = 20;
/// Length of one that is told.
const MOST_CHARS: usize = 600;

impl Runs {
    /// Why a machine can't be used here.
    ///
    /// # Errors
    /// `Faulty`.
    pub fn check_machine(&self, key: &MachineKey) -> Result<(), StoreError> {
        if let Some(fault) = self.store.fault_above(key) {
            return Err(StoreError::Faulty { machine: key.clone(), fault: fault.clone() });
        }
        let fault = self.machine(key).and_then(|machine| machine.faults().machine);
        match fault {
            Some(fault) => Err(StoreError::Faulty { machine: key.clone(), fault }),
            None => Ok(()),
        }
    }

    /// What can't be used of a machine, or of all: a line for each, for people.
    pub fn faults(&self, only: Option<&MachineKey>) -> Vec<String> {
        let above = self.store.faults().iter().filter(|fault| {
            only.is_none_or(|key| self.store.machine_folder(key).starts_with(&fault.path))
        });
        let mut all: Vec<String> = above.map(ToString::to_string).collect();
        for machine in self.machines() {
            if only.is_none_or(|key| *key == machine.key) {
                let faults = machine.faults();
                all.extend(faults.all().map(|fault| format!("{}: {fault}", machine.key)));
            }
        }
        all
    }

    /// The same for every janus, with what keeps all from being changed. Asks the file system.
    pub fn warnings(&self) -> Vec<String> {
        let mut all = Vec::new();
        if self.store.is_read_only() {
            all.push(StoreError::ReadOnly { path: self.store.root().to_owned() }.to_string());
        }
        all.extend(self.audit().and_then(Audit::warning));
        all.extend(self.faults(None));
        let more = all.len().saturating_sub(MOST_TOLD);
        all.truncate(MOST_TOLD);
        for text in &mut all {
            *text = text.chars().take(MOST_CHARS).collect();
        }
        if more > 0 {
            all.push(format!("and {more} more: `janus-server verify` names them"));
        }
        all
    }

    /// The pinned snapshots of a machine; that they can't be read is remembered until they can.
    ///
    /// # Errors
    /// As [`crate::chain::store::Store::pins`], and `Faulty` where nothing of the machine can be read.
    pub fn pins(&self, machine: &Machine) -> Result<BTreeSet<SnapshotId>, StoreError> {
        machine.check_history()?;
        let pins = self.store.pins(&machine.key);
        let fault = pins.as_ref().err().map(|error| self.store.pins_fault(&machine.key, error));
        machine.set_pins_fault(fault);
        pins
    }
}
