//! One machine on this server: its committed runs, the trash, and the open ones.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak},
    time::Duration,
};

use janus_proto::{
    ids::{BackupId, DiskId, MachineKey, SnapshotId},
    metadata::MAX_USE_JUMP,
};

use super::{ActiveRun, RunError, lock, now_ms};
use crate::chain::{
    Held, History, Run, Snapshot, TrashRecord, TrashedRun, clocks,
    health::Health,
    merge::Intent,
    ranges::BlockRanges,
    store::{
        Counters, MachineState, StoreError,
        faults::{Fault, Faults},
    },
};
use crate::{
    guard::{Changes, Guarded},
    prove::record::Proofs,
};

/// Aborted runs remembered per machine, to tell a late caller what became of them.
const ABORTED_KEPT: usize = 64;

/// One machine.
pub struct Machine {
    /// Its key.
    pub key: MachineKey,
    state: Mutex<State>,
    /// Starts, commits, aborts and drops of one machine take turns. Taken before `files`, and that before `state`.
    turn: Mutex<()>,
    /// Read while the files of a chain are opened, written while they change their names or manifests.
    files: RwLock<()>,
    /// Purges take turns. Taken before all others.
    merging: Mutex<()>,
    /// Changes of what is known of the images take turns of their own: a commit may take minutes.
    health_turn: Mutex<()>,
}

struct State {
    history: History,
    counters: Counters,
    active: Vec<Arc<ActiveRun>>,
    aborted: VecDeque<BackupId>,
    /// Highest number of a run manifest, readable or not.
    last_sequence: u64,
    /// Manifests that could not be read may name what nothing else does.
    incomplete: bool,
    /// Decided merges that are not finished, and whether the chain can be opened already.
    unfinished: Vec<(Intent, bool)>,
    /// Chains that somebody has open.
    opened: Chains,
    /// Those of them that restores and other servers have open.
    read: Chains,
    /// Links whose purge damage hinders, as far as the log has them.
    hindered: BTreeSet<SnapshotId>,
    /// What is known of the images.
    health: Health,
    /// Something of that is not in its file yet.
    health_unsaved: bool,
    /// What was proven of its backups.
    proofs: Proofs,
    /// What protects its runs.
    guarded: Guarded,
    /// What its last runs have changed.
    changes: Changes,
    /// What of it can't be used.
    faults: Faults,
}

/// Chains by their links, as long as whoever has them open keeps these.
#[derive(Default)]
struct Chains(Vec<Weak<[SnapshotId]>>);

impl Chains {
    fn note(&mut self, links: &Arc<[SnapshotId]>) {
        self.0.retain(|links| links.strong_count() > 0);
        self.0.push(Arc::downgrade(links));
    }

    fn open(&self) -> Vec<Arc<[SnapshotId]>> {
        self.0.iter().filter_map(Weak::upgrade).collect()
    }
}

impl Machine {
    pub(super) fn new(key: MachineKey, state: MachineState, lease: Duration) -> Self {
        // Nobody holds the lease of a run that was left by an earlier process.
        let active = state
            .open
            .into_iter()
            .map(|run| Arc::new(ActiveRun::left_behind(run, lease)))
            .collect();
        let state = State {
            history: state.history,
            counters: state.counters,
            active,
            aborted: VecDeque::new(),
            last_sequence: state.last_sequence,
            incomplete: state.incomplete,
            unfinished: state.unfinished.into_iter().map(|intent| (intent, false)).collect(),
            opened: Chains::default(),
            read: Chains::default(),
            hindered: BTreeSet::new(),
            health: state.health,
            health_unsaved: false,
            proofs: state.proofs,
            guarded: state.guarded,
            changes: state.changes,
            faults: state.faults,
        };
        Self {
            key,
            state: Mutex::new(state),
            turn: Mutex::new(()),
            files: RwLock::new(()),
            merging: Mutex::new(()),
            health_turn: Mutex::new(()),
        }
    }

    /// What of it can't be used.
    pub fn faults(&self) -> Faults {
        lock(&self.state).faults.clone()
    }

    /// Fails where something of it can't be read: its history isn't known then, or can't be changed.
    ///
    /// # Errors
    /// `Faulty`.
    pub fn check_history(&self) -> Result<(), StoreError> {
        match self.faults().of_history() {
            Some(fault) => Err(self.faulty(fault)),
            None => Ok(()),
        }
    }

    /// Fails where nobody knows what of it is locked.
    pub(super) fn check_guard(&self) -> Result<(), StoreError> {
        match self.faults().guard {
            Some(fault) => Err(self.faulty(&fault)),
            None => Ok(()),
        }
    }

    /// What protects its runs.
    pub fn guarded(&self) -> Guarded {
        lock(&self.state).guarded.clone()
    }

    pub(super) fn set_guarded(&self, guarded: Guarded) {
        lock(&self.state).guarded = guarded;
    }

    pub(super) fn changes(&self) -> Changes {
        lock(&self.state).changes.clone()
    }

    pub(super) fn set_changes(&self, changes: Changes) {
        lock(&self.state).changes = changes;
    }

    pub(super) fn check_disks<'a>(
        &self,
        disks: impl Iterator<Item = &'a DiskId>,
    ) -> Result<(), StoreError> {
        match self.faults().of_disks(disks) {
            Some(fault) => Err(self.faulty(fault)),
            None => Ok(()),
        }
    }

    fn faulty(&self, fault: &Fault) -> StoreError {
        StoreError::Faulty { machine: self.key.clone(), fault: fault.clone() }
    }

    pub(super) fn set_pins_fault(&self, fault: Option<Fault>) {
        lock(&self.state).faults.pins = fault;
    }

    /// Counter of the newest start here.
    pub fn use_counter(&self) -> u64 {
        lock(&self.state).counters.use_counter
    }

    /// All snapshots, newest first.
    pub fn snapshots(&self) -> Vec<Held> {
        lock(&self.state).history.newest_first().collect()
    }

    /// One snapshot.
    pub fn snapshot(&self, id: SnapshotId) -> Option<Held> {
        lock(&self.state).history.snapshot(id).cloned()
    }

    /// True when a run was committed here.
    pub fn has_chain(&self) -> bool {
        lock(&self.state).history.newest().is_some()
    }

    /// The base that a snapshot's chain begins with; `None` when a link is missing.
    pub fn chain_base(&self, id: SnapshotId) -> Option<SnapshotId> {
        Some(self.chain(id)?.last()?.snapshot().id)
    }

    /// The chain that ends in a snapshot, newest first; `None` when a link is missing.
    pub fn chain(&self, id: SnapshotId) -> Option<Vec<Held>> {
        lock(&self.state).history.chain(id)
    }

    /// Nothing changes the names of files or the manifests of this machine meanwhile.
    pub(super) fn keep_files(&self) -> RwLockReadGuard<'_, ()> {
        self.files.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody opens files of this machine meanwhile.
    pub(crate) fn change_files(&self) -> RwLockWriteGuard<'_, ()> {
        self.files.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The trash, oldest run first.
    pub fn trashed(&self) -> Vec<TrashedRun> {
        lock(&self.state).history.trashed().cloned().collect()
    }

    pub(super) fn live_run(&self, backup: BackupId) -> Option<Arc<Run>> {
        lock(&self.state).history.live_run(backup).cloned()
    }

    pub(super) fn trashed_run(&self, backup: BackupId) -> Option<TrashedRun> {
        lock(&self.state).history.trashed_run(backup).cloned()
    }

    pub(super) fn dropped_now(&self, backup: BackupId, record: TrashRecord) {
        lock(&self.state).history.drop_run(backup, record);
    }

    pub(super) fn brought_back_now(&self, backup: BackupId) {
        lock(&self.state).history.bring_back(backup);
    }

    pub(crate) fn take_merging(&self) -> MutexGuard<'_, ()> {
        lock(&self.merging)
    }

    /// Looks at the runs.
    pub(super) fn history<T>(&self, look: impl FnOnce(&History) -> T) -> T {
        look(&lock(&self.state).history)
    }

    /// A link of its chains, be it in the trash.
    pub fn link(&self, id: SnapshotId) -> Option<Held> {
        self.history(|history| history.link(id).cloned())
    }

    /// True while a link is as it was, and no merge may be changing its image.
    pub fn still_has(&self, held: &Held) -> bool {
        let link = self.link(held.snapshot().id).filter(|_| self.unswitched().is_none());
        let purging = self.trashed_run(held.run.backup).is_some_and(|run| run.record.purging);
        !purging && link.is_some_and(|link| link.snapshot() == held.snapshot())
    }

    /// All links of its chains, those in the trash too.
    pub(super) fn links(&self) -> Vec<Held> {
        self.history(|history| history.links().cloned().collect())
    }

    pub(super) fn is_incomplete(&self) -> bool {
        lock(&self.state).incomplete
    }

    pub(super) fn purging_now(&self, backup: BackupId) {
        lock(&self.state).history.purging(backup);
    }

    pub(super) fn due_now(&self, backup: BackupId) {
        lock(&self.state).history.due(backup);
    }

    /// A merge will happen: it is tried until it has.
    pub(super) fn decided(&self, intent: Intent) {
        lock(&self.state).unfinished.push((intent, false));
    }

    /// A merge whose chain may not be readable before it goes on.
    pub(super) fn unswitched(&self) -> Option<Intent> {
        let state = lock(&self.state);
        state.unfinished.iter().find(|(_, switched)| !switched).map(|(intent, _)| intent.clone())
    }

    pub(super) fn switched_now(&self, intent: &Intent) {
        let mut state = lock(&self.state);
        state.history.switch(intent);
        for (known, switched) in &mut state.unfinished {
            *switched |= known == intent;
        }
    }

    /// A merge that has left something behind.
    pub(super) fn unfinished(&self) -> Option<Intent> {
        lock(&self.state).unfinished.first().map(|(intent, _)| intent.clone())
    }

    /// Damage hinders the purge of this link: true when that is heard of for the first time.
    pub(super) fn is_new_hindrance(&self, link: SnapshotId) -> bool {
        lock(&self.state).hindered.insert(link)
    }

    pub(super) fn finished_now(&self, intent: &Intent) {
        let mut state = lock(&self.state);
        state.hindered.remove(&intent.link.id);
        state.history.clear_away(intent);
        state.unfinished.retain(|(known, _)| known != intent);
    }

    pub(super) fn note_opened(&self, links: &Arc<[SnapshotId]>) {
        lock(&self.state).opened.note(links);
    }

    /// A restore, or another server, reads these links until it closes them.
    pub(crate) fn note_read(&self, links: &Arc<[SnapshotId]>) {
        lock(&self.state).read.note(links);
    }

    /// Whether a restore or another server reads a link.
    pub(super) fn is_read(&self, link: SnapshotId) -> bool {
        let chains = lock(&self.state).read.open();
        chains.iter().any(|links| links.contains(&link))
    }

    /// Whether somebody reads a link, and not through its child.
    pub(super) fn is_opened_without(&self, link: SnapshotId, child: SnapshotId) -> bool {
        let chains = lock(&self.state).opened.open();
        chains.iter().any(|links| links.contains(&link) && !links.contains(&child))
    }

    pub(super) fn take_health_turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.health_turn)
    }

    /// What is known of its images.
    pub fn health(&self) -> Health {
        lock(&self.state).health.clone()
    }

    pub(super) fn set_health(&self, health: Health, is_saved: bool) {
        let mut state = lock(&self.state);
        state.health = health;
        state.health_unsaved = !is_saved;
    }

    pub(super) fn is_health_unsaved(&self) -> bool {
        lock(&self.state).health_unsaved
    }

    pub(super) fn health_count(&self, snapshot: SnapshotId) -> Option<u64> {
        lock(&self.state).health.snapshots.get(&snapshot).copied()
    }

    /// Damaged blocks of a snapshot, and since when all images of its chain are proven (Unix milliseconds; 0: not yet).
    pub fn health_of(&self, snapshot: SnapshotId) -> (u64, i64) {
        let state = lock(&self.state);
        let damaged = state.health.snapshots.get(&snapshot).copied().unwrap_or(0);
        (damaged, state.health.proven_ms(&state.history, snapshot))
    }

    /// Blocks that a snapshot lacks, since a stub that it builds on isn't full.
    pub fn missing_blocks(&self, snapshot: SnapshotId) -> u64 {
        lock(&self.state).health.incomplete.get(&snapshot).copied().unwrap_or(0)
    }

    /// Blocks that a stub lacks; `None`: it is none.
    pub fn missing(&self, snapshot: &Snapshot) -> Option<BlockRanges> {
        lock(&self.state).health.missing(snapshot).cloned()
    }

    /// Its stubs.
    pub fn stubs(&self) -> Vec<Held> {
        let state = lock(&self.state);
        let is_stub = |held: &&Held| state.health.missing(held.snapshot()).is_some();
        state.history.links().filter(is_stub).cloned().collect()
    }

    /// True when a snapshot has lost something, or lacks something.
    pub fn is_faulty(&self, snapshot: SnapshotId) -> bool {
        self.health_of(snapshot).0 > 0 || self.missing_blocks(snapshot) > 0
    }

    /// What was proven of its backups.
    pub fn proofs(&self) -> Proofs {
        lock(&self.state).proofs.clone()
    }

    /// Since when a snapshot is proven (Unix milliseconds; 0: it isn't).
    pub fn proven_ms(&self, snapshot: SnapshotId) -> i64 {
        lock(&self.state).proofs.proven_ms(snapshot)
    }

    pub(super) fn set_proofs(&self, proofs: Proofs) {
        lock(&self.state).proofs = proofs;
    }

    pub(super) fn take_turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.turn)
    }

    /// Its open runs.
    pub fn active(&self) -> Vec<Arc<ActiveRun>> {
        lock(&self.state).active.clone()
    }

    pub(super) fn find(&self, backup: BackupId) -> Option<Arc<ActiveRun>> {
        lock(&self.state).active.iter().find(|run| run.backup == backup).cloned()
    }

    pub(super) fn committed(&self, backup: BackupId) -> Option<Arc<Run>> {
        lock(&self.state).history.run(backup).cloned()
    }

    pub(super) fn was_aborted(&self, backup: BackupId) -> bool {
        lock(&self.state).aborted.contains(&backup)
    }

    pub(super) fn refuse_ended(&self, backup: BackupId) -> Result<(), RunError> {
        if self.committed(backup).is_some() {
            return Err(RunError::State { backup, state: "committed already" });
        }
        if self.was_aborted(backup) {
            return Err(RunError::State { backup, state: "aborted" });
        }
        Ok(())
    }

    pub(super) fn next_counter(&self, given: u64) -> Result<u64, RunError> {
        let known = self.use_counter();
        if given > known.saturating_add(MAX_USE_JUMP) {
            return Err(RunError::CounterJump { given, known });
        }
        Ok(given.max(known + 1))
    }

    /// The counters with a new use.
    pub(super) fn counters_with(&self, use_counter: u64) -> Counters {
        Counters { use_counter, ..lock(&self.state).counters }
    }

    pub(super) fn counters(&self) -> Counters {
        lock(&self.state).counters
    }

    pub(super) fn set_counters(&self, counters: Counters) {
        lock(&self.state).counters = counters;
    }

    pub(super) fn add(&self, run: Arc<ActiveRun>) {
        lock(&self.state).active.push(run);
    }

    /// When a run was committed, as far as its place among the others lets that be believed.
    pub fn time_of(&self, run: &Run) -> i64 {
        lock(&self.state).history.time_of(run)
    }

    /// Snapshots whose time isn't the one of their manifest, with that time.
    pub(super) fn moved(&self) -> BTreeMap<SnapshotId, i64> {
        let state = lock(&self.state);
        let moved = state.history.moved();
        let mut all = BTreeMap::new();
        if !moved.is_empty() {
            for held in state.history.newest_first() {
                let ms = moved.get(&held.run.sequence);
                all.extend(ms.map(|ms| (held.snapshot().id, *ms)));
            }
        }
        all
    }

    /// True when a run was ever committed here, whatever became of it.
    pub fn was_committed(&self) -> bool {
        self.next_place().0 > 1
    }

    /// Sequence and time of the next commit. Numbers only grow; times, too, unless a clock was far ahead.
    pub(super) fn next_place(&self) -> (u64, i64) {
        let state = lock(&self.state);
        let purged = (state.counters.purged_sequence, state.counters.purged_ms);
        let last = state.history.last().map_or(purged, |run| (run.sequence, run.committed_ms));
        let sequence = last.0.max(purged.0).max(state.last_sequence).saturating_add(1);
        let now = now_ms();
        let earlier = [last.1, purged.1].into_iter().filter(|ms| !clocks::is_future(*ms, now));
        let after = earlier.max().map_or(now, |ms| ms.saturating_add(1));
        (sequence, now.max(after))
    }

    /// The same of an imported run, which has the time of its content, so that who asks for the newest gets what is newest.
    /// Where the machine has a newer run of other disks, or one in the trash, it comes right after that.
    ///
    /// # Errors
    /// With a disk of it that has a newer snapshot here, and its time.
    pub(super) fn place_of_import<'a>(
        &self,
        taken_ms: i64,
        disks: impl Iterator<Item = &'a DiskId>,
    ) -> Result<(u64, i64), (DiskId, i64)> {
        let sequence = self.next_place().0;
        // A clock of elsewhere may be ahead of ours, and the next run comes after this one.
        let now = now_ms();
        let taken_ms = taken_ms.min(now);
        let here = self.snapshots();
        let believed =
            |run: &Run| Some(self.time_of(run)).filter(|ms| !clocks::is_future(*ms, now));
        for disk in disks {
            let newest = here.iter().find(|held| held.snapshot().disk == *disk);
            let newest_ms = newest.and_then(|held| match &held.run.origin {
                // Of the time of its content, not of its place.
                Some(origin) => Some(origin.taken_ms).filter(|ms| !clocks::is_future(*ms, now)),
                None => believed(&held.run),
            });
            if let Some(newest_ms) = newest_ms.filter(|newest_ms| *newest_ms >= taken_ms) {
                return Err((disk.clone(), newest_ms));
            }
        }
        let last = self.history(|history| history.last().cloned());
        let last_ms = last.and_then(|run| believed(&run));
        Ok((sequence, last_ms.map_or(taken_ms, |last_ms| taken_ms.max(last_ms.saturating_add(1)))))
    }

    pub(super) fn committed_now(&self, run: Arc<Run>) {
        let mut state = lock(&self.state);
        state.active.retain(|active| active.backup != run.backup);
        state.history.add(run);
    }

    pub(super) fn aborted_now(&self, backup: BackupId) {
        let mut state = lock(&self.state);
        state.active.retain(|active| active.backup != backup);
        state.aborted.push_back(backup);
        if state.aborted.len() > ABORTED_KEPT {
            state.aborted.pop_front();
        }
    }
}
