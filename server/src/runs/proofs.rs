//! What was proven of machines: kept on disk, told to every janus.

use janus_proto::ids::MachineKey;

use super::Runs;
use crate::{chain::store::StoreError, prove::record::Proof};

impl Runs {
    /// Keeps a proof. What can't be written is known until the server ends.
    ///
    /// # Errors
    /// As the file system says.
    pub fn note_proof(&self, key: &MachineKey, proof: Proof) -> Result<(), StoreError> {
        let Some(machine) = self.machine(key) else { return Ok(()) };
        let snapshots = proof.disks.iter().map(|disk| disk.snapshot).collect();
        let saved = {
            let _turn = machine.take_health_turn();
            let mut proofs = machine.proofs();
            proofs.add(proof);
            let folder = self.store.machine_folder(key);
            let saved = proofs.save(self.store.storage(), &folder, key, self.store.generation);
            machine.set_proofs(proofs);
            saved
        };
        self.tell_health(key, snapshots);
        saved
    }
}
