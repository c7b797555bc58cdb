//! Dropped runs: into the trash, and back from it.
//!
//! A dropped run's snapshots are gone for everybody at once, from the catalog, the reports and the choice of heads. Until
//! its purge begins it can be brought back. Its images stay links of the chains above them until then.

use std::sync::Arc;

use janus_proto::ids::{BackupId, MachineKey};

use super::{Change, Machine, RunError, Runs, now_ms};
use crate::{
    audit::{Action, Event, Who},
    chain::{FORMAT, Run, TrashRecord, TrashedRun},
};

impl Runs {
    /// Drops runs. All are checked before the first one goes.
    ///
    /// # Errors
    /// `Unknown` when a run isn't here or is in the trash already, `BuiltOn` when an open run has a snapshot of it as its
    /// head, `Locked` and `KeptByAlarm` when it is protected. When the store fails, the runs before the one that failed are dropped.
    pub fn trash(
        &self,
        key: &MachineKey,
        backups: &[BackupId],
        reason: &str,
        purge_not_before_ms: i64,
    ) -> Result<(), RunError> {
        let Some(machine) = self.machine(key) else { return Err(unknown(key)) };
        let _turn = machine.take_turn();
        let droppable = |backup: &BackupId| {
            let run = droppable(&machine, *backup)?;
            self.check_droppable(&machine, &run).map(|()| run)
        };
        let runs = backups.iter().map(droppable).collect::<Result<Vec<_>, _>>()?;
        for run in runs {
            let record = TrashRecord {
                format: FORMAT,
                backup: run.backup,
                trashed_ms: now_ms(),
                reason: reason.to_owned(),
                purge_not_before_ms,
                purging: false,
            };
            {
                let _files = machine.change_files();
                self.store.drop_run(&run, &record)?;
                machine.dropped_now(run.backup, record);
            }
            tracing::info!(machine = %key, backup_id = %run.backup, reason, "run dropped");
            self.note(
                &Who::server(),
                Event::new(Action::Drop).of_run(key, run.backup).noting(reason),
            );
            let gone = run.snapshots.iter().map(|snapshot| snapshot.id).collect();
            let _ = self.changes.send(Change::Removed(key.clone(), gone));
        }
        Ok(())
    }

    /// Makes the next purge take a run of the trash, whatever its time. One that isn't there any more is none to purge.
    ///
    /// # Errors
    /// As the file system says.
    pub fn make_due(&self, key: &MachineKey, backup: BackupId) -> Result<(), RunError> {
        let Some(machine) = self.machine(key) else { return Ok(()) };
        let _turn = machine.take_turn();
        let _files = machine.change_files();
        if let Some(TrashedRun { run, mut record }) = machine.trashed_run(backup) {
            record.purge_not_before_ms = 0;
            self.store.save_trash_record(&run, &record)?;
            machine.due_now(backup);
        }
        Ok(())
    }

    /// The trash of a machine, oldest run first.
    pub fn trashed(&self, key: &MachineKey) -> Vec<TrashedRun> {
        self.machine(key).map(|machine| machine.trashed()).unwrap_or_default()
    }

    /// Brings a dropped run back: its snapshots are there again, as if it had never been dropped.
    ///
    /// # Errors
    /// `Unknown` when it isn't in the trash, `Purging` when parts of it may be gone.
    pub fn restore_trashed(
        &self,
        key: &MachineKey,
        backup: BackupId,
    ) -> Result<Arc<Run>, RunError> {
        let Some(machine) = self.machine(key) else { return Err(unknown(key)) };
        let _turn = machine.take_turn();
        let run = {
            let _files = machine.change_files();
            let trashed = machine.trashed_run(backup).ok_or_else(|| unknown(backup))?;
            if trashed.record.purging {
                return Err(RunError::Purging { backup });
            }
            self.store.bring_back(&trashed.run)?;
            machine.brought_back_now(backup);
            trashed.run
        };
        self.look_again(&machine);
        tracing::info!(machine = %key, backup_id = %backup, "run brought back from the trash");
        self.note(&Who::server(), Event::new(Action::Restore).of_run(key, backup));
        let _ = self.changes.send(Change::Committed(run.clone()));
        Ok(run)
    }
}

fn unknown(id: impl ToString) -> RunError {
    RunError::Unknown { id: id.to_string() }
}

/// The run, when nothing that is open starts from it.
fn droppable(machine: &Machine, backup: BackupId) -> Result<Arc<Run>, RunError> {
    let run = machine.live_run(backup).ok_or_else(|| unknown(backup))?;
    for open in machine.active() {
        for disk in open.record().disks {
            if run.snapshots.iter().any(|snapshot| Some(snapshot.id) == disk.head) {
                return Err(RunError::BuiltOn { backup, holder: open.backup, disk: disk.disk });
            }
        }
    }
    Ok(run)
}
