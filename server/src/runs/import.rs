//! Runs that are made of what lies on this machine, not sent by a client: opened, gone on with, and their place among the others.
//!
//! They are written through sessions and published by commits as all runs are. They have the time of their content, and
//! don't count as uses.

use std::sync::Arc;

use janus_proto::ids::{BackupId, DiskId, MachineKey};

use super::{ActiveRun, Machine, Maker, RunError, Runs, WantedDisk};
use crate::{
    chain::{Origin, Run},
    space::Space,
};

impl Runs {
    /// Opens a run that is made of what lies here, or goes on with one of the same disks that was begun and not ended: what came for
    /// an older backup of them is compared with this one as a head is, and needn't come again. With `stubs` disks that have no
    /// chain here get only hashes.
    ///
    /// # Errors
    /// As [`Self::start`]; `Older` when the machine has a newer run here.
    pub fn start_import(
        &self,
        key: &MachineKey,
        wanted: &[WantedDisk],
        origin: Origin,
        stubs: bool,
    ) -> Result<Arc<ActiveRun>, RunError> {
        let fits = |run: &ActiveRun| {
            let disks = run.record().disks;
            disks.len() == wanted.len()
                && disks.iter().zip(wanted).all(|(open, wanted)| {
                    open.disk == wanted.disk
                        && open.size_bytes == wanted.size_bytes
                        && open.logical_sector_bytes == wanted.logical_sector_bytes
                        && open.stub == (stubs && open.head.is_none())
                })
        };
        let open = self.machine(key).and_then(|machine| {
            let begun = |run: &Arc<ActiveRun>| run.origin().is_some() && !run.is_closed();
            machine.active().into_iter().find(|run| begun(run) && fits(run))
        });
        let backup = match open {
            Some(run) if run.lease_left().is_some() => {
                return Err(RunError::Importing { machine: key.clone() });
            }
            Some(run) => run.backup,
            None => BackupId::new(),
        };
        self.begin(key, backup, wanted, Maker::Import { origin, stubs })
    }

    /// Leaves a run open for whoever goes on with it. A backup of the machine may come first, and ends it.
    pub fn leave_import(&self, run: &ActiveRun) {
        run.release();
    }

    /// The run here that was made of a carried one, or that is that one itself, with all of these disks.
    pub fn imported(
        &self,
        key: &MachineKey,
        carried: BackupId,
        disks: &[&DiskId],
    ) -> Option<Arc<Run>> {
        let machine = self.machine(key)?;
        let has = |run: &Run, disk: &DiskId| run.snapshots.iter().any(|one| one.disk == *disk);
        let is_made_of_it =
            |run: &Run| run.is_made_of(carried) && disks.iter().all(|disk| has(run, disk));
        let held = machine.snapshots().into_iter().find(|held| is_made_of_it(&held.run));
        held.map(|held| held.run)
    }

    /// Refuses what is larger than the space that new runs may take.
    ///
    /// # Errors
    /// `Full`.
    pub fn check_room_for(&self, bytes: u64) -> Result<(), RunError> {
        match Space::ask(&self.store, self.limits.reserve()) {
            Some(space) if !space.has_room_for(bytes) => {
                Err(RunError::Full(space.advice_for(bytes)))
            }
            _ => Ok(()),
        }
    }
}

/// Place of an imported run among those of its machine.
pub(super) fn check_place<'a>(
    machine: &Machine,
    origin: &Origin,
    disks: impl Iterator<Item = &'a DiskId>,
) -> Result<(u64, i64), RunError> {
    let taken_ms = origin.taken_ms;
    machine.place_of_import(taken_ms, disks).map_err(|(disk, newest_ms)| RunError::Older {
        machine: machine.key.clone(),
        disk,
        newest_ms,
        taken_ms,
    })
}
