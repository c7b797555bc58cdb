//! Runs: opened, taken over, committed or given up; the only writer of the store.
//!
//! A run's lease keeps other runs of the same machine away; the same run takes over at once, and each takeover raises
//! the epoch, so that a client that was believed dead can't write any more. All functions block: they are called on
//! threads meant for it. No lock is held while blocks are received.

mod active;
mod error;
mod faults;
mod guard;
mod health;
mod holds;
mod import;
mod limits;
mod machine;
mod manifests;
mod missing;
mod names;
mod proofs;
mod purge;
mod room;
mod trash;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use janus_proto::{
    grants::Which,
    ids::{BLOCK_BYTES, BackupId, BlockHash, DiskId, MachineKey, SessionId, SnapshotId},
    model::{Batch, Extent},
    show::amount,
};
use tokio::{
    sync::{broadcast, watch},
    time::Instant,
};

pub use janus_proto::clock::unix_ms as now_ms;

pub use self::{
    active::ActiveRun,
    error::RunError,
    holds::Hold,
    limits::Limits,
    machine::Machine,
    purge::{PurgeOptions, PurgeReport, Wait},
};
use self::{active::PlannedDisk, holds::Holds, limits::Metered};
use crate::{
    audit::{Action, Audit, Event, Who},
    chain::{
        Held, Origin, Run,
        store::{MachineState, Store, StoreError},
    },
    fetching::Fetching,
    fill::Wanted,
    guard::clock::Clock,
    image::Format,
    session::{Marks, Session, SessionError},
    space::WHAT_HELPS,
};

/// Most open runs at once, over all machines.
const MAX_OPEN_RUNS: usize = 256;
/// Most sessions of them: a machine may have 64.
const MAX_OPEN_SESSIONS: usize = 4096;
/// Changes kept for slow report streams before they must send the full state again.
const CHANGE_BACKLOG: usize = 256;

/// One disk that a client wants to back up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedDisk {
    /// The disk.
    pub disk: DiskId,
    /// Its size in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// 512 or 4096.
    pub logical_sector_bytes: u32,
}

/// What a commit says of one disk.
#[derive(Debug, Clone)]
pub struct CommitDisk {
    /// The disk.
    pub disk: DiskId,
    /// Head that the session started from.
    pub expected_head: Option<SnapshotId>,
    /// Digest of the content.
    pub table_digest: BlockHash,
    /// Number of `janus.v1.Consistency`.
    pub consistency: i32,
    /// Bytes that the client counted as zeros unread.
    pub skipped_bytes: u64,
}

/// How a run stands.
pub enum RunState {
    /// Blocks may be written.
    Open(Arc<ActiveRun>),
    /// A commit is at work.
    Committing,
    /// It has snapshots.
    Committed(Arc<Run>),
    /// It was given up.
    Aborted,
}

/// Something that every janus should know.
#[derive(Debug, Clone)]
pub enum Change {
    /// A machine's use counter.
    Used(MachineKey),
    /// A run was committed, brought back, or its images changed.
    Committed(Arc<Run>),
    /// Snapshots of a machine are gone.
    Removed(MachineKey, Vec<SnapshotId>),
    /// Other things are known of the images of these snapshots.
    Health(MachineKey, Vec<SnapshotId>),
}

/// All runs of one server.
pub struct Runs {
    store: Store,
    lease: Duration,
    /// Format of new chains.
    new_chains: Format,
    machines: Mutex<HashMap<MachineKey, Arc<Machine>>>,
    sessions: Mutex<HashMap<SessionId, Arc<ActiveRun>>>,
    changes: broadcast::Sender<Change>,
    limits: Limits,
    wanted: Wanted,
    /// Machines that seedings are to bring here.
    awaited: watch::Sender<Vec<Which>>,
    fetching: Fetching,
    holds: Holds,
    audit: Option<Audit>,
    clock: Clock,
    /// New runs are locked for so long.
    lock_days: u32,
}

impl Runs {
    /// Takes over an opened store.
    pub fn new(store: Store, machines: HashMap<MachineKey, MachineState>, lease: Duration) -> Self {
        let mut sessions = HashMap::new();
        let mut known = HashMap::new();
        for (key, state) in machines {
            let machine = Machine::new(key.clone(), state, lease);
            for run in machine.active() {
                sessions.extend(run.session_ids().into_iter().map(|id| (id, run.clone())));
            }
            known.insert(key, Arc::new(machine));
        }
        let changes = broadcast::channel(CHANGE_BACKLOG).0;
        let clock = Clock::new(store.storage().clone(), store.root());
        let holds = Holds::new(&store);
        Self {
            store,
            lease,
            new_chains: Format::default(),
            machines: Mutex::new(known),
            sessions: Mutex::new(sessions),
            changes,
            limits: Limits::NONE,
            wanted: Wanted::default(),
            awaited: watch::Sender::default(),
            fetching: Fetching::default(),
            holds,
            audit: None,
            clock,
            lock_days: 0,
        }
    }

    /// Records what is done.
    #[must_use]
    pub fn with_audit(mut self, audit: Audit) -> Self {
        self.audit = Some(audit);
        self
    }

    /// The log of what is done, if there is one.
    pub fn audit(&self) -> Option<&Audit> {
        self.audit.as_ref()
    }

    /// Records what was done. Blocks; what can't be recorded now waits.
    pub fn note(&self, who: &Who, event: Event) {
        if let Some(audit) = &self.audit {
            audit.note(who, event);
        }
    }

    /// Chooses the format of chains that begin from now on; those that are here go on in their own.
    #[must_use]
    pub fn with_new_chains(mut self, format: Format) -> Self {
        self.new_chains = format;
        self
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What readers of stubs wait for.
    pub fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// Seedings that wait are to bring these machines here, and no others.
    pub fn set_awaited(&self, machines: Vec<Which>) {
        self.awaited.send_replace(machines);
    }

    /// Says when they are others.
    pub fn awaited(&self) -> watch::Receiver<Vec<Which>> {
        self.awaited.subscribe()
    }

    /// Machines whose first backup is to come from another server: those that wait for it, and those of which it has begun to come.
    pub fn seeding(&self) -> Vec<Which> {
        let mut seeding = self.awaited.borrow().clone();
        let is_seeded = |run: &Arc<ActiveRun>| run.origin().is_some_and(|it| it.from.is_some());
        let begun =
            |machine: &Arc<Machine>| !machine.has_chain() && machine.active().iter().any(is_seeded);
        let machines = self.machines().into_iter().filter(begun);
        seeding.extend(machines.map(|machine| Which::Machine(machine.key.clone(), None)));
        seeding
    }

    /// How it goes with what comes here from other servers.
    pub fn fetching(&self) -> &Fetching {
        &self.fetching
    }

    /// All stubs.
    pub fn stubs(&self) -> Vec<Held> {
        self.machines().iter().flat_map(|machine| machine.stubs()).collect()
    }

    /// How long a lease lasts.
    pub fn lease(&self) -> Duration {
        self.lease
    }

    /// Changes from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }

    /// All machines, in the order of their keys.
    pub fn machines(&self) -> Vec<Arc<Machine>> {
        let mut all: Vec<_> = lock(&self.machines).values().cloned().collect();
        all.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        all
    }

    /// One machine, if it was ever here.
    pub fn machine(&self, key: &MachineKey) -> Option<Arc<Machine>> {
        lock(&self.machines).get(key).cloned()
    }

    /// A snapshot by its id, of whatever machine.
    pub fn snapshot(&self, id: SnapshotId) -> Option<Held> {
        lock(&self.machines).values().find_map(|machine| machine.snapshot(id))
    }

    /// Opens a run or takes it over.
    ///
    /// # Errors
    /// When another run holds the lease, the run has ended, or the store can't be written.
    pub fn start(
        &self,
        key: &MachineKey,
        backup: BackupId,
        wanted: &[WantedDisk],
        use_counter: u64,
    ) -> Result<Arc<ActiveRun>, RunError> {
        self.check_size(wanted)?;
        self.begin(key, backup, wanted, Maker::Client { use_counter })
    }

    fn begin(
        &self,
        key: &MachineKey,
        backup: BackupId,
        wanted: &[WantedDisk],
        maker: Maker,
    ) -> Result<Arc<ActiveRun>, RunError> {
        self.check_machine(key)?;
        let mut machines = lock(&self.machines);
        names::check_machine(&machines, key)?;
        let machine = machines
            .entry(key.clone())
            .or_insert_with(|| {
                Arc::new(Machine::new(key.clone(), MachineState::default(), self.lease))
            })
            .clone();
        drop(machines);
        machine.check_disks(wanted.iter().map(|wanted| &wanted.disk))?;
        self.refuse_while_committing(&machine, backup)?;
        let _turn = machine.take_turn();
        machine.refuse_ended(backup)?;
        if let Some(run) = machine.find(backup) {
            if run.is_closed() {
                self.give_up(&machine, &run)?;
                machine.refuse_ended(backup)?;
            }
            let origin = match maker {
                Maker::Client { .. } => None,
                Maker::Import { origin, .. } => {
                    import::check_place(&machine, &origin, wanted.iter().map(|disk| &disk.disk))?;
                    Some(origin)
                }
            };
            self.end_doubt(&run)?;
            run.take_over(self, wanted, origin)?;
            return Ok(run);
        }
        names::check_disks(&machine, wanted)?;
        for other in machine.active() {
            if let Some(left) = other.lease_left() {
                refuse_while_importing(&other)?;
                let seconds = left.as_secs().max(1);
                return Err(RunError::LeaseHeld {
                    machine: key.clone(),
                    holder: other.backup,
                    seconds,
                });
            }
            self.give_up(&machine, &other)?;
        }
        // After the lost runs, which took room.
        self.check_room(key)?;
        let runs: usize = self.machines().iter().map(|machine| machine.active().len()).sum();
        if runs >= MAX_OPEN_RUNS || lock(&self.sessions).len() >= MAX_OPEN_SESSIONS {
            return Err(RunError::TooMany);
        }
        let stubs = matches!(maker, Maker::Import { stubs: true, .. });
        let planned = wanted.iter().map(|disk| PlannedDisk::new(self, &machine, disk, stubs));
        let planned = planned.collect::<Result<Vec<_>, _>>()?;
        let (used, origin) = match maker {
            Maker::Client { use_counter } => (machine.next_counter(use_counter)?, None),
            // Whose turn it is is not for an import to change.
            Maker::Import { origin, .. } => {
                let disks = wanted.iter().map(|wanted| &wanted.disk);
                import::check_place(&machine, &origin, disks)?;
                (machine.use_counter(), Some(origin))
            }
        };
        let counters = machine.counters_with(used);
        self.store.save_counters(key, counters)?;
        machine.set_counters(counters);
        let run = Arc::new(ActiveRun::create(self, &machine, backup, planned, used, origin)?);
        lock(&self.sessions).extend(run.session_ids().into_iter().map(|id| (id, run.clone())));
        machine.add(run.clone());
        let _ = self.changes.send(Change::Used(key.clone()));
        Ok(run)
    }

    /// A commit holds the machine's turn for minutes; a start must not wait for it.
    fn refuse_while_committing(&self, machine: &Machine, backup: BackupId) -> Result<(), RunError> {
        match machine.active().iter().find(|run| run.is_committing()) {
            Some(run) if run.backup == backup => {
                Err(RunError::State { backup, state: "being committed" })
            }
            Some(run) => {
                refuse_while_importing(run)?;
                let seconds = self.lease.as_secs();
                Err(RunError::LeaseHeld {
                    machine: machine.key.clone(),
                    holder: run.backup,
                    seconds,
                })
            }
            None => Ok(()),
        }
    }

    /// The run that a session belongs to, if it is the caller's.
    ///
    /// # Errors
    /// `Unknown`.
    pub fn run_of(
        &self,
        session: SessionId,
        machine: &MachineKey,
    ) -> Result<Arc<ActiveRun>, RunError> {
        let run = lock(&self.sessions).get(&session).filter(|run| run.machine == *machine).cloned();
        run.ok_or_else(|| RunError::Unknown { id: session.to_string() })
    }

    /// True when a run of this machine is open here, or was committed.
    pub fn is_known(&self, key: &MachineKey, backup: BackupId) -> bool {
        let machine = self.machine(key);
        machine.is_some_and(|it| it.find(backup).is_some() || it.committed(backup).is_some())
    }

    /// How a run of this machine stands.
    ///
    /// # Errors
    /// `Unknown`.
    pub fn state(&self, key: &MachineKey, backup: BackupId) -> Result<RunState, RunError> {
        let unknown = || RunError::Unknown { id: backup.to_string() };
        let machine = self.machine(key).ok_or_else(unknown)?;
        if let Some(run) = machine.committed(backup) {
            return Ok(RunState::Committed(run));
        }
        let found = machine.find(backup);
        if let Some(run) = found.clone().filter(|run| !run.is_closed()) {
            run.renew();
            return Ok(if run.is_committing() {
                RunState::Committing
            } else {
                RunState::Open(run)
            });
        }
        let is_aborted = found.is_some() || machine.was_aborted(backup);
        if is_aborted { Ok(RunState::Aborted) } else { Err(unknown()) }
    }

    /// Commits a run: all its disks or none. A committed run answers its result again.
    ///
    /// # Errors
    /// As [`RunError`] says; unless the run is unknown or superseded it stays open.
    pub fn commit(
        &self,
        key: &MachineKey,
        backup: BackupId,
        epoch: u64,
        disks: &[CommitDisk],
        seal: &[u8],
    ) -> Result<Arc<Run>, RunError> {
        let machine =
            self.machine(key).ok_or_else(|| RunError::Unknown { id: backup.to_string() })?;
        let _turn = machine.take_turn();
        if let Some(run) = machine.committed(backup) {
            return Ok(run);
        }
        let active =
            machine.find(backup).ok_or_else(|| RunError::Unknown { id: backup.to_string() })?;
        active.check_epoch(epoch)?;
        let _committing = active.begin_commit();
        let run = match active.in_doubt() {
            Some(run) => run,
            None => Arc::new(self.finish(&machine, &active, disks, seal)?),
        };
        let open = active.record();
        let looked = self.guard_commit(&machine, &active, &run)?;
        let published = self.store.publish(&run, &open);
        let is_in_doubt = matches!(published, Err(StoreError::InDoubt { .. }));
        active.set_in_doubt(is_in_doubt.then(|| run.clone()));
        published?;
        let known = machine.moved();
        machine.committed_now(run.clone());
        self.note_stubs(&machine, &run, &open);
        self.look_again(&machine);
        self.forget_sessions(&active);
        if let Err(error) = self.store.remove_open(&open) {
            // Harmless: the next start of the server finds the manifest and removes the rest.
            tracing::warn!(%error, backup_id = %backup, "cannot remove the files of a committed run");
        }
        self.guarded_now(&machine, &run, looked);
        if run.origin.is_some() {
            // Of a client's run its service knows who it is.
            self.note(
                &Who::server(),
                Event::new(Action::Commit).of_run(key, backup).noting("import"),
            );
        }
        let _ = self.changes.send(Change::Committed(run.clone()));
        // Which of the earlier ones a clock had dated wrongly may show now.
        let moved: Vec<SnapshotId> = {
            let moved = machine.moved().into_iter();
            moved.filter(|(id, ms)| known.get(id) != Some(ms)).map(|(id, _)| id).collect()
        };
        self.tell_health(key, moved);
        Ok(run)
    }

    /// Turns the sessions of a run into images, and says what its manifest will.
    fn finish(
        &self,
        machine: &Machine,
        active: &Arc<ActiveRun>,
        disks: &[CommitDisk],
        seal: &[u8],
    ) -> Result<Run, RunError> {
        let snapshots = match active.finish(disks) {
            Err(error @ RunError::ChainDamaged { .. }) => {
                tracing::error!(%error, machine = %machine.key, backup_id = %active.backup, "a commit found damage");
                self.note_found(machine, active, &error);
                self.give_up(machine, active)?;
                return Err(error);
            }
            finished => finished?,
        };
        let origin = active.origin();
        let (sequence, committed_ms) = match &origin {
            Some(origin) => {
                import::check_place(machine, origin, disks.iter().map(|disk| &disk.disk))?
            }
            None => machine.next_place(),
        };
        Ok(Run {
            format: crate::chain::FORMAT,
            backup: active.backup,
            machine: machine.key.clone(),
            committed_ms,
            sequence,
            use_counter: if origin.is_none() { active.record().use_counter } else { 0 },
            client_seal: seal.to_vec(),
            origin,
            snapshots,
        })
    }

    /// Gives a run up. An unknown run is none to give up, which is what the caller wants.
    ///
    /// # Errors
    /// When it is committed already, or files can't be removed.
    pub fn abort(&self, key: &MachineKey, backup: BackupId) -> Result<(), RunError> {
        let Some(machine) = self.machine(key) else { return Ok(()) };
        let _turn = machine.take_turn();
        if machine.committed(backup).is_some() {
            return Err(RunError::State { backup, state: "committed already" });
        }
        match machine.find(backup) {
            Some(run) => self.give_up(&machine, &run),
            None => Ok(()),
        }
    }

    /// Gives up runs that nobody has touched for `keep`, counted while this server runs: clocks can't end a run.
    pub fn expire(&self, keep: Duration) {
        for machine in self.machines() {
            for run in machine.active().iter().filter(|run| run.idle() > keep) {
                let _turn = machine.take_turn();
                tracing::warn!(machine = %machine.key, backup_id = %run.backup, "an open run was kept long enough and is given up");
                if let Err(error) = self.give_up(&machine, run) {
                    tracing::error!(%error, machine = %machine.key, backup_id = %run.backup, "cannot give the run up");
                }
            }
        }
    }

    fn give_up(&self, machine: &Machine, run: &Arc<ActiveRun>) -> Result<(), RunError> {
        self.end_doubt(run)?;
        run.close();
        self.forget_sessions(run);
        self.store.remove_open(&run.record())?;
        self.unguard(machine, run.backup);
        machine.aborted_now(run.backup);
        Ok(())
    }

    /// Undoes a commit that may or may not be on the disk, so that the run can go on or end.
    fn end_doubt(&self, run: &ActiveRun) -> Result<(), RunError> {
        if let Some(manifest) = run.in_doubt() {
            self.store.unpublish(&manifest, &run.record())?;
            run.set_in_doubt(None);
        }
        Ok(())
    }

    fn forget_sessions(&self, run: &ActiveRun) {
        let ids = run.session_ids();
        lock(&self.sessions).retain(|id, _| !ids.contains(id));
    }
}

/// Who makes a run.
#[derive(Debug, Clone)]
enum Maker {
    /// A client, with the use counter it was sent with.
    Client { use_counter: u64 },
    /// An administrator, of what lies here or elsewhere; with stubs of disks that have no chain here.
    Import { origin: Origin, stubs: bool },
}

/// Whoever starts a backup may have it elsewhere meanwhile: an import of a large disk takes hours.
fn refuse_while_importing(other: &ActiveRun) -> Result<(), RunError> {
    match other.origin() {
        Some(_) => Err(RunError::Importing { machine: other.machine.clone() }),
        None => Ok(()),
    }
}

/// Writes into one session under one epoch.
pub struct Writer {
    run: Arc<ActiveRun>,
    session: Arc<Session>,
    epoch: u64,
    metered: Option<Metered>,
}

impl Writer {
    /// Checks that the caller holds the run.
    ///
    /// # Errors
    /// `Unknown`, `Superseded`.
    pub fn new(run: Arc<ActiveRun>, session: SessionId, epoch: u64) -> Result<Self, RunError> {
        run.check_epoch(epoch)?;
        let session = run.session(session)?;
        Ok(Self { run, session, epoch, metered: None })
    }

    /// The same, which looks at its user's quota while it writes.
    #[must_use]
    pub fn within_quota(mut self, runs: Arc<Runs>) -> Self {
        self.metered = Some(Metered::new(runs));
        self
    }

    /// The session.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Takes in what blocks of a stub will be, renewing the lease.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn promise(&self, extents: &[Extent], hashes: &[u8], settled: u64) -> Result<(), RunError> {
        self.check()?;
        if let Some(metered) = &self.metered {
            let blocks = (hashes.len() / BlockHash::LEN) as u64;
            metered.count(self.run.machine.user(), blocks * BLOCK_BYTES)?;
        }
        self.session.promise(extents, hashes, settled).map_err(|error| self.explain(error))
    }

    /// Takes in one message, renewing the lease.
    ///
    /// # Errors
    /// When the run was taken over, is committing or has ended, the user's quota is used up, or the store can't be written.
    pub fn apply(&self, batch: Option<&Batch>, settled: u64) -> Result<Marks, RunError> {
        self.check()?;
        if let (Some(metered), Some(batch)) = (&self.metered, batch) {
            metered.count(self.run.machine.user(), batch.data_len() as u64)?;
        }
        self.session.apply(batch, settled).map_err(|error| self.explain(error))
    }

    fn check(&self) -> Result<(), RunError> {
        self.run.check_epoch(self.epoch)?;
        self.run.renew();
        match self.run.is_committing() || self.run.in_doubt().is_some() {
            true => Err(RunError::State { backup: self.run.backup, state: "being committed" }),
            false => Ok(()),
        }
    }

    fn explain(&self, error: SessionError) -> RunError {
        match error {
            full @ SessionError::Full { .. } => RunError::Full(self.lacking(&full)),
            error => error.into(),
        }
    }

    /// What to tell whose data found no room: how much is missing, and what helps.
    fn lacking(&self, full: &SessionError) -> String {
        let (disk, marks) = (&self.session.disk, self.session.marks());
        let left = disk.size_bytes.saturating_sub(marks.received.saturating_mul(BLOCK_BYTES));
        format!("{full}; the rest of disk {} needs up to {}; {WHAT_HELPS}", disk.disk, amount(left))
    }
}

/// Takes a lock that is only held for moments. A panic under it is a bug, but must not take the server along.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Time left until `until`; `None` when it has passed.
fn left(until: Instant) -> Option<Duration> {
    until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
}
