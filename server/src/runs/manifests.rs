//! Manifests that went bad while the server runs: it still knows what they said, and writes them again.
//!
//! Only a server that is restarted can't: it lists nothing that the lost manifest named.

use std::sync::Arc;

use super::{Machine, Runs};
use crate::chain::{Held, Run, store::StoreError};

impl Runs {
    /// Looks whether the manifest of an image's run says what is known of it, and else writes it again.
    pub fn mend_manifest(&self, held: &Held) {
        let Some(machine) = self.machine(&held.run.machine) else { return };
        match self.mend(&machine, held) {
            Ok(false) => {}
            Ok(true) => {
                tracing::error!(machine = %machine.key, run = held.run.sequence, "a manifest was missing or damaged; it is written again");
            }
            Err(error) => {
                tracing::error!(%error, machine = %machine.key, run = held.run.sequence, "a damaged manifest can't be written again");
            }
        }
    }

    fn mend(&self, machine: &Machine, held: &Held) -> Result<bool, StoreError> {
        let is_right = |(run, in_trash): &(Arc<Run>, bool)| self.store.has_manifest(run, *in_trash);
        match current(machine, held) {
            Some(known) if !is_right(&known)? => {}
            _ => return Ok(false),
        }
        // Drops, returns and merges write manifests too: with both turns what is known is what must be there.
        let _turn = machine.take_turn();
        let _files = machine.change_files();
        match current(machine, held) {
            Some(known) if machine.unswitched().is_none() && !is_right(&known)? => {
                self.store.write_manifest(&known.0, known.1)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

/// The run of an image as it is now, and whether it is in the trash.
fn current(machine: &Machine, held: &Held) -> Option<(Arc<Run>, bool)> {
    let backup = held.run.backup;
    let dropped = || machine.trashed_run(backup).map(|trashed| (trashed.run, true));
    machine.live_run(backup).map(|run| (run, false)).or_else(dropped)
}
