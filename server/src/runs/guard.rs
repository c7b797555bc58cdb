//! Alarms and locks, as the runs meet them: raised and taken by commits, asked before anything is dropped.

use std::collections::{BTreeMap, BTreeSet};

use janus_proto::ids::{BackupId, DiskId};

use super::{ActiveRun, Change, Machine, RunError, Runs, now_ms};
use crate::{
    audit::{Action, Event, Who},
    chain::{Held, Run, store::StoreError},
    guard::{Alarm, Guarded, Lock, Now, change::judge},
};

const DAY_MS: u64 = 86_400_000;
/// Disks that are named where an alarm is told; a report has those of 500 machines in one message.
const MOST_NAMED: usize = 3;

/// What a commit has found out about its run.
#[derive(Default)]
pub(super) struct Looked {
    changed: BTreeMap<DiskId, u64>,
    alarm: Option<Alarm>,
    is_locked: bool,
}

impl Machine {
    /// The alarm that is open, for people.
    pub fn alarm(&self) -> Option<String> {
        let (key, alarms) = (&self.key, self.guarded().alarms);
        let (run, alarm) = alarms.iter().next()?;
        let named = alarm.disks.iter().take(MOST_NAMED);
        let mut disks: Vec<String> =
            named.map(|(disk, what)| format!("disk {disk}: {what}")).collect();
        let more = alarm.disks.len() - disks.len();
        disks.extend((more > 0).then(|| format!("{more} more disks")));
        let others = match alarms.len() - 1 {
            0 => String::new(),
            more => format!(", and {more} after it"),
        };
        Some(format!(
            "alarm: backup {run} of {key}{others}: {}; the last good one stays until `janus-server alarm clear {key}` there",
            disks.join("; ")
        ))
    }
}

impl Runs {
    /// Locks each new whole run for so many days.
    #[must_use]
    pub fn locking(mut self, days: u32) -> Self {
        self.lock_days = days;
        self
    }

    /// What time it is for locks.
    pub fn now(&self) -> Now {
        Now { wall_ms: now_ms(), seen_ms: self.clock.seen_ms(self.least_seen_ms()) }
    }

    /// Keeps how much time has passed, while there is a lock that asks for it.
    pub fn save_clock(&self) {
        let has_lock = |machine: &std::sync::Arc<Machine>| !machine.guarded().locks.is_empty();
        if self.machines().iter().any(has_lock)
            && let Err(error) = self.clock.save(self.least_seen_ms())
        {
            tracing::warn!(%error, "how much time has passed can't be kept: locks may last longer");
        }
    }

    fn least_seen_ms(&self) -> u64 {
        let machines = self.machines();
        let locks = machines.iter().flat_map(|machine| machine.guarded().locks.into_values());
        locks.map(|lock| lock.from_seen_ms).max().unwrap_or(0)
    }

    /// A lock until a date (Unix milliseconds) that an operator names.
    pub fn dated_lock(&self, until_ms: i64) -> Lock {
        let now = self.now();
        let left = until_ms.saturating_sub(now.wall_ms).max(0).cast_unsigned();
        Lock {
            until_ms,
            from_seen_ms: now.seen_ms,
            seen_ms: now.seen_ms.saturating_add(left),
            is_dated: true,
        }
    }

    /// Locks a run that is not in the trash, or locks it for longer. Its lock from now on.
    ///
    /// # Errors
    /// `Unknown`; when that can't be written, or the machine's locks aren't known.
    pub fn lock_run(
        &self,
        machine: &Machine,
        backup: BackupId,
        lock: Lock,
    ) -> Result<Lock, RunError> {
        let _turn = machine.take_turn();
        machine.check_guard()?;
        if machine.live_run(backup).is_none() {
            return Err(RunError::Unknown { id: backup.to_string() });
        }
        self.change_guarded(machine, |guarded| guarded.lock(backup, lock))?;
        self.save_clock();
        self.protect_files(machine);
        Ok(machine.guarded().locks.get(&backup).copied().unwrap_or(lock))
    }

    /// Ends all alarms of a machine; how many there were.
    ///
    /// # Errors
    /// When that can't be written, or they aren't known.
    pub fn clear_alarms(&self, machine: &Machine) -> Result<Vec<(BackupId, Alarm)>, RunError> {
        let _turn = machine.take_turn();
        machine.check_guard()?;
        let cleared = machine.guarded().alarms;
        self.change_guarded(machine, |guarded| guarded.alarms.clear())?;
        for run in cleared.keys() {
            let event = Event::new(Action::AlarmClear).of_run(&machine.key, *run);
            self.note(&Who::server(), event);
        }
        // Tells every janus how the machine stands.
        let _ = self.changes.send(Change::Used(machine.key.clone()));
        Ok(cleared.into_iter().collect())
    }

    /// Refuses to drop what is protected.
    pub(super) fn check_droppable(&self, machine: &Machine, run: &Run) -> Result<(), RunError> {
        machine.check_guard()?;
        let (guarded, backup) = (machine.guarded(), run.backup);
        let now = self.now();
        if let Some(lock) = guarded.lock_of(backup, now) {
            return Err(RunError::Locked { backup, until: lock.describe(now) });
        }
        match guarded.kept_by(backup) {
            Some(_) => Err(RunError::KeptByAlarm { backup, machine: machine.key.clone() }),
            None => Ok(()),
        }
    }

    /// Looks at what a run changes, and makes durable what protects it and those before it. The run is not published yet.
    pub(super) fn guard_commit(
        &self,
        machine: &Machine,
        active: &ActiveRun,
        run: &Run,
    ) -> Result<Looked, RunError> {
        let sessions = active.sessions();
        let mut looked = Looked::default();
        let mut disks: BTreeMap<DiskId, String> = BTreeMap::new();
        // What an operator takes in from elsewhere changes as much as has happened there.
        for session in sessions.iter().filter(|_| run.origin.is_none()) {
            let head = session.head().map(|head| head.held.run.clone());
            let was_sealed = head.is_some_and(|head| !head.client_seal.is_empty());
            let is_sealed = was_sealed && !run.client_seal.is_empty();
            let Some(change) = session.change(is_sealed) else { continue };
            let disk = &session.disk.disk;
            let earlier = machine.changes();
            let found = judge(&change, earlier.of(disk, run.backup));
            looked.changed.insert(disk.clone(), change.changed_blocks);
            if !found.is_empty() {
                let found: Vec<String> = found.iter().map(ToString::to_string).collect();
                disks.insert(disk.clone(), found.join("; "));
            }
        }
        if !disks.is_empty() {
            let keeps = self.last_good(machine, disks.keys());
            looked.alarm = Some(Alarm { raised_ms: now_ms(), disks, keeps });
        }
        let is_whole = sessions.iter().all(|session| !session.disk.stub);
        let lock = (self.lock_days > 0 && is_whole).then(|| self.lock_for_days());
        looked.is_locked = lock.is_some();
        if looked.alarm.is_none() && lock.is_none() {
            return Ok(looked);
        }
        if let Err(error) = machine.check_guard() {
            // A backup is worth more than its lock, and nothing is dropped meanwhile.
            tracing::error!(%error, machine = %machine.key, backup_id = %run.backup, "a run gets neither lock nor alarm");
            return Ok(looked);
        }
        self.change_guarded(machine, |guarded| {
            if let Some(alarm) = looked.alarm.clone() {
                guarded.raise(run.backup, alarm);
            }
            if let Some(lock) = lock {
                guarded.lock(run.backup, lock);
            }
        })?;
        Ok(looked)
    }

    /// Tells what a commit has found out, once it is one.
    pub(super) fn guarded_now(&self, machine: &Machine, run: &Run, looked: Looked) {
        let Looked { changed, alarm, is_locked } = looked;
        if !changed.is_empty() {
            let mut changes = machine.changes();
            changes.add(run.backup, changed);
            if let Err(error) = self.store.save_changes(&machine.key, &changes) {
                tracing::warn!(%error, machine = %machine.key, "what a backup has changed can't be kept");
            }
            machine.set_changes(changes);
        }
        if let Some(alarm) = alarm {
            let what: Vec<String> =
                alarm.disks.iter().map(|(disk, what)| format!("{disk}: {what}")).collect();
            let what = what.join("; ");
            tracing::error!(machine = %machine.key, backup_id = %run.backup, what, "alarm: look whether this machine is under attack; `janus-server alarm list`");
            let event = Event::new(Action::Alarm).of_run(&machine.key, run.backup).noting(what);
            self.note(&Who::server(), event);
        }
        if is_locked {
            self.save_clock();
            self.protect_files(machine);
        }
    }

    /// Forgets what a run has that was given up.
    pub(super) fn unguard(&self, machine: &Machine, backup: BackupId) {
        let mut guarded = machine.guarded();
        if guarded.forget(backup)
            && let Err(error) = self.change_guarded(machine, |all| *all = guarded)
        {
            tracing::warn!(%error, machine = %machine.key, backup_id = %backup, "the alarm of a run that was given up stays");
        }
    }

    /// Makes the files of locked runs immutable, where that can be done, and those of runs whose lock is over changeable again.
    pub fn protect_files(&self, machine: &Machine) {
        let guarded = machine.guarded();
        if guarded.locks.is_empty() {
            return;
        }
        let now = self.now();
        let is_locked = |held: &Held| guarded.lock_of(held.run.backup, now).is_some();
        let locked = machine.snapshots().into_iter().filter(is_locked);
        let chains = locked.filter_map(|held| machine.chain(held.snapshot().id));
        let keep: BTreeSet<_> = chains.flatten().map(|held| held.snapshot().id).collect();
        let _files = machine.keep_files();
        for link in machine.links() {
            self.set_immutable(machine, &link, keep.contains(&link.snapshot().id));
        }
    }

    pub(super) fn set_immutable(&self, machine: &Machine, link: &Held, immutable: bool) {
        let folder = self.store.machine_folder(&machine.key);
        for name in [&link.snapshot().image, &link.snapshot().table] {
            // A help where it can be had; what holds is that nothing here drops the run.
            self.store.storage().set_immutable(&folder.join(name), immutable);
        }
    }

    fn lock_for_days(&self) -> Lock {
        let now = self.now();
        let left = u64::from(self.lock_days) * DAY_MS;
        Lock {
            until_ms: now.wall_ms.saturating_add_unsigned(left),
            from_seen_ms: now.seen_ms,
            seen_ms: now.seen_ms.saturating_add(left),
            is_dated: false,
        }
    }

    /// Of each of these disks the newest run that raised no alarm, if possible one that is whole.
    fn last_good<'a>(
        &self,
        machine: &Machine,
        disks: impl Iterator<Item = &'a DiskId>,
    ) -> BTreeSet<BackupId> {
        let (alarms, snapshots) = (machine.guarded().alarms, machine.snapshots());
        let good = |disk: &DiskId| {
            let calm = |held: &&Held| {
                held.snapshot().disk == *disk && !alarms.contains_key(&held.run.backup)
            };
            let whole = |held: &&Held| !machine.is_faulty(held.snapshot().id);
            let mut of_disk = snapshots.iter().filter(calm);
            let found = of_disk.clone().find(whole).or_else(|| of_disk.next())?;
            Some(found.run.backup)
        };
        disks.filter_map(good).collect()
    }

    /// Changes what protects runs of a machine, durably. Its turn is the caller's.
    fn change_guarded(
        &self,
        machine: &Machine,
        change: impl FnOnce(&mut Guarded),
    ) -> Result<(), StoreError> {
        let known = machine.guarded();
        let mut guarded = known.clone();
        change(&mut guarded);
        let is_here =
            |run: &BackupId| machine.committed(*run).is_some() || machine.find(*run).is_some();
        guarded.locks.retain(|run, _| is_here(run));
        if guarded != known {
            self.store.save_guard(&machine.key, &guarded)?;
            machine.set_guarded(guarded);
        }
        Ok(())
    }
}
