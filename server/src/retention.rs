//! Retention carried out: what no rule keeps goes to the trash, and what is due there is purged.
//!
//! A run that a plan drops may be purged at once; one that an administrator deletes waits for `trash_days`. Plans, pins and
//! deletions take turns, so a pin that was acknowledged holds. Purges don't: they only touch what was dropped before. A crash leaves
//! each run kept or dropped; the next plan goes on. Where merging a run has no room it isn't dropped: it would be gone, and its
//! space would not come free.

mod follow;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use janus_proto::ids::{BackupId, MachineKey, SnapshotId};
use tokio_util::sync::CancellationToken;

pub use self::follow::follow;
use crate::{
    chain::{
        Held,
        retain::{self, DiskPoint, Plan, Point, Policy},
        store::StoreError,
    },
    config::Settings,
    guard::Now,
    runs::{Machine, PurgeOptions, PurgeReport, RunError, Runs, Wait, now_ms},
    space,
};

const DAY_MS: i64 = 86_400_000;

/// Why nothing was dropped, brought back or pinned.
#[derive(Debug, thiserror::Error)]
pub enum RetentionError {
    /// An administrator wants to keep it.
    #[error("snapshot {snapshot} is pinned: `janus-server unpin {snapshot}` first")]
    Pinned {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// The runs.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The pins.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What a plan did to a machine.
#[derive(Debug)]
pub struct Carried {
    /// The plan.
    pub plan: Plan,
    /// Runs that are in the trash now.
    pub dropped: Vec<BackupId>,
    /// Runs that should go and can't yet, with why.
    pub waiting: Vec<(BackupId, String)>,
    /// Some of them wait for room.
    pub lacks_room: bool,
}

/// Retention of one store.
pub struct Retention {
    runs: Arc<Runs>,
    settings: Settings,
    turn: Mutex<()>,
}

impl Retention {
    /// Retention by the settings of a server.
    pub fn new(runs: Arc<Runs>, settings: Settings) -> Self {
        Self { runs, settings, turn: Mutex::new(()) }
    }

    /// What would become of the runs of a machine.
    ///
    /// # Errors
    /// When its pins can't be read.
    pub fn plan(&self, machine: &Machine) -> Result<Plan, StoreError> {
        let pins = self.runs.pins(machine)?;
        let section = &self.settings.retention;
        let policy = Policy {
            rules: &|disk| section.rules(&machine.key, disk),
            max_drop_percent: section.max_drop_percent,
        };
        let holds = self.runs.holds(&machine.key)?;
        let holds = holds.into_iter().map(|hold| hold.snapshot).collect();
        let points = points(machine, &pins, &holds, self.runs.now());
        Ok(retain::plan(points, &policy, now_ms()))
    }

    /// Drops what the plan says, unless it has a stop and isn't forced. Nothing is purged by this.
    ///
    /// # Errors
    /// When pins can't be read or a manifest can't be moved.
    pub fn carry_out(&self, machine: &Machine, force: bool) -> Result<Carried, RetentionError> {
        let _turn = self.take_turn();
        let plan = self.plan(machine)?;
        let mut carried =
            Carried { plan, dropped: Vec::new(), waiting: Vec::new(), lacks_room: false };
        if carried.plan.stop.is_some() && !force {
            return Ok(carried);
        }
        let drops: Vec<BackupId> = carried.plan.drops().map(|point| point.backup).collect();
        for backup in drops {
            if let Some(wait) = self.runs.lacks_room(machine, backup, &self.purge_options(now_ms()))
            {
                carried.lacks_room = true;
                carried.waiting.push((backup, format!("it is kept, {wait}")));
                continue;
            }
            match self.runs.trash(&machine.key, &[backup], "retention", 0) {
                Ok(()) => carried.dropped.push(backup),
                Err(
                    error @ (RunError::BuiltOn { .. }
                    | RunError::Locked { .. }
                    | RunError::KeptByAlarm { .. }),
                ) => {
                    carried.waiting.push((backup, error.to_string()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(carried)
    }

    /// Purges what is due in a machine's trash; with `all` also what could still be brought back. May take minutes.
    pub fn purge(&self, machine: &MachineKey, all: bool, stop: &CancellationToken) -> PurgeReport {
        let options = self.purge_options(if all { i64::MAX } else { now_ms() });
        self.runs.purge_due(machine, &options, stop)
    }

    /// Drops what the plan says and purges it, again as long as that makes room for more. `told` hears of runs that were
    /// dropped before their purge begins.
    pub fn thin(
        &self,
        machine: &Machine,
        force: bool,
        stop: &CancellationToken,
        told: &dyn Fn(usize),
    ) -> (Result<Carried, RetentionError>, PurgeReport) {
        let (mut dropped, mut purge) = (Vec::new(), PurgeReport::default());
        loop {
            let carried = self.carry_out(machine, force);
            let fresh = carried.as_ref().map_or(0, |carried| carried.dropped.len());
            if fresh > 0 {
                told(fresh);
            }
            let report = self.purge(&machine.key, false, stop);
            let has_room = !report.purged.is_empty() && !stop.is_cancelled();
            purge.add(report);
            match carried {
                Ok(carried) if carried.lacks_room && has_room => dropped.extend(carried.dropped),
                Ok(mut carried) => {
                    carried.dropped.splice(0..0, dropped);
                    return (Ok(carried), purge);
                }
                Err(error) => return (Err(error), purge),
            }
        }
    }

    /// Why purging these runs would have to wait for room, were they dropped now.
    pub fn lacks_room(&self, machine: &Machine, backup: BackupId) -> Option<Wait> {
        self.runs.lacks_room(machine, backup, &self.purge_options(now_ms()))
    }

    fn purge_options(&self, now_ms: i64) -> PurgeOptions {
        let reserve_bytes = space::merge_reserve(&self.settings, self.runs.store());
        PurgeOptions { now_ms, reserve_bytes, copy: false }
    }

    /// Drops runs on demand. Until `trash_days` are over they can be brought back.
    ///
    /// # Errors
    /// `Pinned` when one has a pin; as [`Runs::trash`].
    pub fn delete(&self, machine: &MachineKey, backups: &[BackupId]) -> Result<(), RetentionError> {
        let _turn = self.take_turn();
        let pins = self.pins(machine)?;
        let held = self.runs.machine(machine).map(|machine| machine.snapshots());
        for held in held.into_iter().flatten() {
            let snapshot = held.snapshot().id;
            if backups.contains(&held.run.backup) && pins.contains(&snapshot) {
                return Err(RetentionError::Pinned { snapshot });
            }
        }
        let keep_ms = i64::from(self.settings.retention.trash_days) * DAY_MS;
        Ok(self.runs.trash(machine, backups, "deleted", now_ms().saturating_add(keep_ms))?)
    }

    /// Brings a dropped run back, with a pin: without one the next plan might drop it again.
    ///
    /// # Errors
    /// As [`Runs::restore_trashed`].
    pub fn restore(
        &self,
        machine: &MachineKey,
        backup: BackupId,
    ) -> Result<SnapshotId, RetentionError> {
        let _turn = self.take_turn();
        let trashed = self.runs.trashed(machine);
        let run = trashed.iter().find(|trashed| trashed.run.backup == backup);
        let first = run.and_then(|trashed| trashed.run.snapshots.first());
        let first = first.ok_or_else(|| RunError::Unknown { id: backup.to_string() })?.id;
        let mut pins = self.pins(machine)?;
        pins.insert(first);
        // Before the run: the other way round a plan might come between after a crash.
        self.runs.store().save_pins(machine, pins)?;
        self.runs.restore_trashed(machine, backup)?;
        Ok(first)
    }

    /// Pins the run of a snapshot.
    ///
    /// # Errors
    /// `Unknown` when it is gone; when pins can't be read or written.
    pub fn pin(&self, held: &Held) -> Result<(), RetentionError> {
        let _turn = self.take_turn();
        let id = held.snapshot().id;
        if self.runs.snapshot(id).is_none() {
            return Err(RunError::Unknown { id: id.to_string() }.into());
        }
        Ok(self.change_pins(&held.run.machine, |pins| {
            pins.insert(id);
        })?)
    }

    /// Removes all pins of a snapshot's run.
    ///
    /// # Errors
    /// When pins can't be read or written.
    pub fn unpin(&self, held: &Held) -> Result<(), StoreError> {
        let _turn = self.take_turn();
        self.change_pins(&held.run.machine, |pins| {
            for snapshot in &held.run.snapshots {
                pins.remove(&snapshot.id);
            }
        })
    }

    /// Changes the pins of a machine, and forgets those of snapshots that are gone for good.
    fn change_pins(
        &self,
        machine: &MachineKey,
        change: impl FnOnce(&mut BTreeSet<SnapshotId>),
    ) -> Result<(), StoreError> {
        let mut pins = self.pins(machine)?;
        let trashed = self.runs.trashed(machine);
        let in_trash: BTreeSet<SnapshotId> =
            trashed.iter().flat_map(|trashed| &trashed.run.snapshots).map(|s| s.id).collect();
        pins.retain(|id| self.runs.snapshot(*id).is_some() || in_trash.contains(id));
        change(&mut pins);
        self.runs.store().save_pins(machine, pins)
    }

    fn pins(&self, machine: &MachineKey) -> Result<BTreeSet<SnapshotId>, StoreError> {
        self.runs.check_machine(machine)?;
        match self.runs.machine(machine) {
            Some(machine) => self.runs.pins(&machine),
            None => Ok(BTreeSet::new()),
        }
    }

    fn take_turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The runs of a machine as plans look at them.
fn points(
    machine: &Machine,
    pins: &BTreeSet<SnapshotId>,
    holds: &BTreeSet<SnapshotId>,
    now: Now,
) -> Vec<Point> {
    let guarded = machine.guarded();
    let snapshots = machine.snapshots();
    let runs = snapshots.chunk_by(|a, b| a.run.backup == b.run.backup);
    let point = |run: &[Held]| {
        let first = &run.first()?.run;
        Some(Point {
            backup: first.backup,
            committed_ms: machine.time_of(first),
            is_pinned: run.iter().any(|held| pins.contains(&held.snapshot().id)),
            is_held: run.iter().any(|held| holds.contains(&held.snapshot().id)),
            is_locked: guarded.lock_of(first.backup, now).is_some(),
            is_before_alarm: guarded.kept_by(first.backup).is_some(),
            disks: run.iter().map(|held| disk_point(machine, held)).collect(),
        })
    };
    runs.filter_map(point).collect()
}

fn disk_point(machine: &Machine, held: &Held) -> DiskPoint {
    let snapshot = held.snapshot();
    let base = machine.chain_base(snapshot.id);
    DiskPoint {
        disk: snapshot.disk.clone(),
        // Without one of its links it can't be read.
        is_faulty: base.is_none() || machine.is_faulty(snapshot.id),
        chain: base.unwrap_or(snapshot.id),
    }
}
