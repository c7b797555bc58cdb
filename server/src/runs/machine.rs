//! One machine on this server: its committed runs, and the open ones with their leases.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak},
    time::Duration,
};

use janus_proto::{
    ids::{BackupId, DiskId, MachineKey, SessionId, SnapshotId},
    model::MAX_RANGES,
};
use time::{OffsetDateTime, macros::format_description};
use tokio::time::Instant;

use super::{CommitDisk, MAX_COUNTER_JUMP, RunError, Runs, WantedDisk, left, lock, now_ms};
use crate::{
    chain::{
        FORMAT, Held, History, Run, Snapshot, TrashRecord, TrashedRun,
        health::Health,
        merge::Intent,
        opened::OpenedSnapshot,
        ranges::BlockRanges,
        store::{Counters, MachineState, OpenDisk, OpenRun, Store},
    },
    image::{Format, vhd},
    session::{Session, SessionError, Trust},
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
    /// Links of the chains that somebody has open.
    opened: Vec<Weak<[SnapshotId]>>,
    /// What is known of the images.
    health: Health,
    /// Something of that is not in its file yet.
    health_unsaved: bool,
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
            opened: Vec::new(),
            health: state.health,
            health_unsaved: false,
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

    /// True when a snapshot was found to be damaged.
    pub fn is_damaged(&self, id: SnapshotId) -> bool {
        self.health_of(id).0 > 0
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
    pub(super) fn change_files(&self) -> RwLockWriteGuard<'_, ()> {
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

    pub(super) fn take_merging(&self) -> MutexGuard<'_, ()> {
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

    pub(super) fn finished_now(&self, intent: &Intent) {
        let mut state = lock(&self.state);
        state.history.clear_away(intent);
        state.unfinished.retain(|(known, _)| known != intent);
    }

    pub(super) fn note_opened(&self, links: &Arc<[SnapshotId]>) {
        let mut state = lock(&self.state);
        state.opened.retain(|opened| opened.strong_count() > 0);
        state.opened.push(Arc::downgrade(links));
    }

    /// Whether somebody reads a link, and not through its child.
    pub(super) fn is_opened_without(&self, link: SnapshotId, child: SnapshotId) -> bool {
        let opened = lock(&self.state).opened.clone();
        let mut chains = opened.iter().filter_map(Weak::upgrade);
        chains.any(|links| links.contains(&link) && !links.contains(&child))
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

    pub(super) fn take_turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.turn)
    }

    pub(super) fn active(&self) -> Vec<Arc<ActiveRun>> {
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
        if given > known.saturating_add(MAX_COUNTER_JUMP) {
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

    /// Sequence and time of the next commit; both only grow.
    pub(super) fn next_place(&self) -> (u64, i64) {
        let state = lock(&self.state);
        let purged = (state.counters.purged_sequence, state.counters.purged_ms);
        let last = state.history.last().map_or(purged, |run| (run.sequence, run.committed_ms));
        let sequence = last.0.max(purged.0).max(state.last_sequence).saturating_add(1);
        (sequence, now_ms().max(last.1.max(purged.1).saturating_add(1)))
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

/// A disk of a run that is about to begin, with the head it starts from.
pub(super) struct PlannedDisk {
    disk: OpenDisk,
    head: Option<OpenedSnapshot>,
}

impl PlannedDisk {
    /// Chooses head and format: a chain goes on in its own, a new one is in the preferred format. Changes nothing.
    pub(super) fn new(
        runs: &Runs,
        machine: &Machine,
        wanted: &WantedDisk,
    ) -> Result<Self, RunError> {
        let head = readable_head(runs, machine, &wanted.disk);
        let mut disk = OpenDisk {
            disk: wanted.disk.clone(),
            session: SessionId::new(),
            snapshot: SnapshotId::new(),
            size_bytes: wanted.size_bytes,
            logical_sector_bytes: wanted.logical_sector_bytes,
            head: head.as_ref().map(|head| head.held.snapshot().id),
            stem: free_stem(runs.store(), machine, &wanted.disk)?,
            format: head
                .as_ref()
                .and_then(OpenedSnapshot::newest_format)
                .unwrap_or(runs.new_chains),
        };
        if !head.as_ref().is_some_and(|head| disk.goes_on(head)) {
            disk.format = runs.new_chains;
            refuse_what_a_vhd_cannot_hold(&disk)?;
        }
        Ok(Self { disk, head })
    }
}

/// A run that is open.
pub struct ActiveRun {
    /// Its id.
    pub backup: BackupId,
    /// Whose it is.
    pub machine: MachineKey,
    lease: Duration,
    state: Mutex<ActiveState>,
}

struct ActiveState {
    record: OpenRun,
    /// Empty until the run is taken over after a restart.
    sessions: Vec<Arc<Session>>,
    touched: Instant,
    leased: bool,
    committing: bool,
    /// Its manifest, when the disk has failed to say whether it has it.
    in_doubt: Option<Arc<Run>>,
}

/// Ends the committing state when dropped.
pub(super) struct Committing<'a>(&'a ActiveRun);

impl Drop for Committing<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).committing = false;
        self.0.renew();
    }
}

impl ActiveRun {
    fn left_behind(record: OpenRun, lease: Duration) -> Self {
        let (backup, machine) = (record.backup, record.machine.clone());
        let state = ActiveState {
            record,
            sessions: Vec::new(),
            touched: Instant::now(),
            leased: false,
            committing: false,
            in_doubt: None,
        };
        Self { backup, machine, lease, state: Mutex::new(state) }
    }

    pub(super) fn create(
        runs: &Runs,
        machine: &Machine,
        backup: BackupId,
        planned: Vec<PlannedDisk>,
        use_counter: u64,
    ) -> Result<Self, RunError> {
        let folder = runs.store().machine_folder(&machine.key);
        let (disks, opened): (Vec<_>, Vec<_>) =
            planned.into_iter().map(|planned| (planned.disk, planned.head)).unzip();
        let record = OpenRun {
            format: FORMAT,
            backup,
            machine: machine.key.clone(),
            epoch: 1,
            use_counter,
            started_ms: now_ms(),
            boot: runs.store().storage().boot(),
            disks,
        };
        runs.store().save_open(&record)?;
        let open = |(disk, head): (&OpenDisk, _)| {
            Session::open(runs.store().storage(), &folder, disk.clone(), head, Trust::SameBoot)
                .map(Arc::new)
        };
        let sessions = record.disks.iter().zip(opened).map(open).collect::<Result<Vec<_>, _>>();
        let sessions = sessions.inspect_err(|_| {
            let _ = runs.store().remove_open(&record);
        })?;
        let run = Self::left_behind(record, runs.lease());
        lock(&run.state).sessions = sessions;
        run.renew();
        Ok(run)
    }

    /// Gives the run to a new caller: same sessions, higher epoch.
    pub(super) fn take_over(&self, runs: &Runs, wanted: &[WantedDisk]) -> Result<(), RunError> {
        let mut record = self.record();
        let same = record.disks.len() == wanted.len()
            && record.disks.iter().zip(wanted).all(|(open, wanted)| {
                open.disk == wanted.disk
                    && open.size_bytes == wanted.size_bytes
                    && open.logical_sector_bytes == wanted.logical_sector_bytes
            });
        if !same {
            return Err(RunError::OtherDisks { backup: self.backup });
        }
        let boot = runs.store().storage().boot();
        let trust =
            if !boot.is_empty() && record.boot == boot { Trust::SameBoot } else { Trust::Synced };
        record.epoch += 1;
        record.boot = boot;
        record.started_ms = now_ms();
        let kept = lock(&self.state).sessions.clone();
        let mut sessions = Vec::with_capacity(record.disks.len());
        for (index, disk) in record.disks.iter().enumerate() {
            match kept.get(index) {
                Some(session) if !session.is_failed() => sessions.push(session.clone()),
                _ => sessions.push(Arc::new(self.reopen(runs, disk, trust)?)),
            }
        }
        // Only now: a crash before this repeats the repair of the sessions with the same trust.
        runs.store().save_open(&record)?;
        let mut state = lock(&self.state);
        state.record = record;
        state.sessions = sessions;
        drop(state);
        self.renew();
        Ok(())
    }

    fn reopen(&self, runs: &Runs, disk: &OpenDisk, trust: Trust) -> Result<Session, RunError> {
        let head = match disk.head {
            Some(id) => {
                let held = runs.machine(&self.machine).and_then(|machine| machine.snapshot(id));
                let held =
                    held.ok_or_else(|| RunError::Unknown { id: disk.session.to_string() })?;
                let opened = runs.open_snapshot(&held);
                Some(opened.map_err(|error| {
                    tracing::error!(%error, machine = %self.machine, disk = %disk.disk, "the head of an open session can't be read");
                    RunError::Unknown { id: disk.session.to_string() }
                })?)
            }
            None => None,
        };
        let folder = runs.store().machine_folder(&self.machine);
        Ok(Session::open(runs.store().storage(), &folder, disk.clone(), head, trust)?)
    }

    /// The run as it is on disk.
    pub fn record(&self) -> OpenRun {
        lock(&self.state).record.clone()
    }

    /// Its sessions; empty while nobody has taken it over after a restart.
    pub fn sessions(&self) -> Vec<Arc<Session>> {
        lock(&self.state).sessions.clone()
    }

    /// One session.
    ///
    /// # Errors
    /// `Unknown` when nobody has taken the run over since this server started: start it again.
    pub fn session(&self, id: SessionId) -> Result<Arc<Session>, RunError> {
        let found =
            lock(&self.state).sessions.iter().find(|session| session.disk.session == id).cloned();
        found.ok_or_else(|| RunError::Unknown { id: id.to_string() })
    }

    pub(super) fn session_ids(&self) -> Vec<SessionId> {
        lock(&self.state).record.disks.iter().map(|disk| disk.session).collect()
    }

    /// Renews the lease.
    pub fn renew(&self) {
        let mut state = lock(&self.state);
        state.touched = Instant::now();
        state.leased = true;
    }

    pub(super) fn lease_left(&self) -> Option<Duration> {
        let state = lock(&self.state);
        if state.committing {
            return Some(self.lease);
        }
        left(state.touched + self.lease).filter(|_| state.leased && state.record.epoch != u64::MAX)
    }

    pub(super) fn idle(&self) -> Duration {
        lock(&self.state).touched.elapsed()
    }

    pub(super) fn check_epoch(&self, given: u64) -> Result<(), RunError> {
        let current = lock(&self.state).record.epoch;
        if given == current {
            Ok(())
        } else {
            Err(RunError::Superseded { backup: self.backup, current, given })
        }
    }

    /// No writer has this epoch any more.
    pub(super) fn close(&self) {
        let mut state = lock(&self.state);
        state.record.epoch = u64::MAX;
        state.sessions.clear();
    }

    /// True when the run was given up, but the disk has refused to forget it.
    pub(super) fn is_closed(&self) -> bool {
        lock(&self.state).record.epoch == u64::MAX
    }

    /// True while a commit is at work.
    pub fn is_committing(&self) -> bool {
        lock(&self.state).committing
    }

    /// The manifest of a commit that may or may not be on the disk: only that commit may be tried again.
    pub(super) fn in_doubt(&self) -> Option<Arc<Run>> {
        lock(&self.state).in_doubt.clone()
    }

    pub(super) fn set_in_doubt(&self, manifest: Option<Arc<Run>>) {
        lock(&self.state).in_doubt = manifest;
    }

    pub(super) fn begin_commit(&self) -> Committing<'_> {
        lock(&self.state).committing = true;
        Committing(self)
    }

    /// Turns all sessions into images, or says which one can't be.
    pub(super) fn finish(&self, disks: &[CommitDisk]) -> Result<Vec<Snapshot>, RunError> {
        let sessions = self.sessions();
        if sessions.len() != disks.len() {
            return Err(RunError::OtherDisks { backup: self.backup });
        }
        let mut snapshots = Vec::with_capacity(disks.len());
        for session in &sessions {
            let open = &session.disk;
            let commit = disks.iter().find(|disk| disk.disk == open.disk);
            let commit = commit.ok_or(RunError::OtherDisks { backup: self.backup })?;
            if commit.expected_head != open.head {
                let (disk, expected) = (open.disk.clone(), commit.expected_head);
                return Err(RunError::HeadMoved { disk, expected, actual: open.head });
            }
            let finished = session.finish(commit.table_digest).map_err(|error| {
                if !error.is_head_damage() {
                    return error.into();
                }
                let (disk, reason) = (open.disk.clone(), error.to_string());
                let blocks = match error {
                    SessionError::HeadDamaged { blocks } => blocks,
                    _ => BlockRanges::default(),
                };
                RunError::ChainDamaged { disk, blocks, reason }
            })?;
            snapshots.push(Snapshot {
                id: open.snapshot,
                disk: open.disk.clone(),
                size_bytes: open.size_bytes,
                logical_sector_bytes: open.logical_sector_bytes,
                table_digest: finished.table_digest,
                parent: open.head.filter(|_| finished.is_delta),
                image: open.published(open.format.extension()),
                table: open.published("table"),
                data_write: finished.identity.data_write,
                virtual_disk: finished.identity.virtual_disk,
                consistency: commit.consistency,
                image_allocated_bytes: finished.image_allocated_bytes,
                image_length_bytes: finished.image_length_bytes,
            });
        }
        Ok(snapshots)
    }
}

/// The head of a disk, unless its chain can't be built on: then the session starts from zeros and makes a new base.
fn readable_head(runs: &Runs, machine: &Machine, disk: &DiskId) -> Option<OpenedSnapshot> {
    let held = lock(&machine.state).history.head(disk).cloned()?;
    let id = held.snapshot().id;
    match runs.open_snapshot(&held) {
        Ok(opened) if opened.damaged.len() > MAX_RANGES => {
            tracing::error!(machine = %machine.key, %disk, snapshot_id = %id, ranges = opened.damaged.len(), "the disk's head is damaged in too many places: a new base begins");
            None
        }
        Ok(opened) => {
            if !opened.damaged.is_empty() {
                tracing::warn!(machine = %machine.key, %disk, snapshot_id = %id, blocks = opened.damaged.blocks(), "damaged blocks of the disk's head are asked for again");
            }
            Some(opened)
        }
        Err(error) => {
            tracing::error!(%error, machine = %machine.key, %disk, snapshot_id = %id, "the disk's head can't be built on: a new base begins");
            None
        }
    }
}

/// Only new chains are asked: a disk of another shape always begins one.
fn refuse_what_a_vhd_cannot_hold(disk: &OpenDisk) -> Result<(), RunError> {
    let reason = match disk.format {
        Format::Vhd if disk.size_bytes > vhd::MAX_BYTES => {
            format!("it has {} bytes, a VHD holds at most 2040 GiB", disk.size_bytes)
        }
        Format::Vhd if disk.logical_sector_bytes != 512 => {
            format!("it has sectors of {} bytes, a VHD's have 512", disk.logical_sector_bytes)
        }
        _ => return Ok(()),
    };
    Err(RunError::FormatTooSmall { disk: disk.disk.clone(), reason })
}

/// A file name that is free: `<disk>/<number>-<time>`.
fn free_stem(store: &Store, machine: &Machine, disk: &DiskId) -> Result<String, RunError> {
    let time = OffsetDateTime::now_utc()
        .format(format_description!("[year][month][day]T[hour][minute][second]Z"));
    let time = time.unwrap_or_else(|_| "undated".to_owned());
    // The run's number: with the time no image gets the name of a purged one, which a merge may still speak of.
    let mut number = machine.next_place().0;
    loop {
        let stem = format!("{disk}/{number:05}-{time}");
        if !store.is_taken(&machine.key, &stem)? {
            return Ok(stem);
        }
        number += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_vhd_cannot_hold_is_refused_with_the_way_out() {
        for (format, size_bytes, logical_sector_bytes, refused) in [
            (Format::Vhd, 2040 << 30, 512, None),
            (Format::Vhd, (2040 << 30) + 512, 512, Some("2040 GiB")),
            (Format::Vhd, 1 << 30, 4096, Some("sectors of 4096 bytes")),
            (Format::Vhdx, 64 << 40, 4096, None),
        ] {
            let disk = OpenDisk {
                disk: "sda".parse().unwrap(),
                session: SessionId::new(),
                snapshot: SnapshotId::new(),
                size_bytes,
                logical_sector_bytes,
                head: None,
                stem: "sda/1".into(),
                format,
            };
            let said = refuse_what_a_vhd_cannot_hold(&disk).map_err(|error| error.to_string());
            match refused {
                None => said.unwrap(),
                Some(words) => {
                    let said = said.unwrap_err();
                    assert!(said.contains(words) && said.contains("prefer_vhdx = true"), "{said}");
                }
            }
        }
    }
}
