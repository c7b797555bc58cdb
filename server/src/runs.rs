//! Runs: opened, taken over, committed or given up; the only writer of the store.
//!
//! A run's lease keeps other runs of the same machine away; the same run takes over at once, and each takeover raises
//! the epoch, so that a client that was believed dead can't write any more. All functions block: they are called on
//! threads meant for it. No lock is held while blocks are received.

mod active;
mod health;
mod limits;
mod machine;
mod manifests;
mod missing;
mod names;
mod purge;
mod trash;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use janus_proto::{
    ids::{BLOCK_BYTES, BackupId, BlockHash, DiskId, MachineKey, SessionId, SnapshotId},
    model::Batch,
    show::amount,
};
use tokio::{sync::broadcast, time::Instant};

pub use janus_proto::clock::unix_ms as now_ms;

pub use self::{
    active::ActiveRun,
    limits::Limits,
    machine::Machine,
    purge::{PurgeOptions, PurgeReport, Wait},
};
use self::{active::PlannedDisk, limits::Metered};
use crate::{
    chain::{
        Held, Run,
        opened::OpenError,
        ranges::BlockRanges,
        store::{MachineState, Store, StoreError},
    },
    image::Format,
    session::{Marks, Session, SessionError},
    space::WHAT_HELPS,
};

/// Most open runs at once, over all machines.
const MAX_OPEN_RUNS: usize = 256;
/// A use counter from outside may be this far ahead of ours.
const MAX_COUNTER_JUMP: u64 = 1 << 32;
/// Changes kept for slow report streams before they must send the full state again.
const CHANGE_BACKLOG: usize = 256;

/// What can go wrong with a run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No open run has this id or session.
    #[error("no open run or session {id} here: it ended or was replaced; start a new run")]
    Unknown {
        /// What was asked for.
        id: String,
    },
    /// Another run holds the lease.
    #[error(
        "run {holder} of machine {machine} is still open here; it ends by itself {seconds} s after its last message"
    )]
    LeaseHeld {
        /// The machine.
        machine: MachineKey,
        /// The other run.
        holder: BackupId,
        /// How long the lease lasts.
        seconds: u64,
    },
    /// The run was taken over.
    #[error("run {backup} was taken over (epoch {current}); this caller has epoch {given}")]
    Superseded {
        /// The run.
        backup: BackupId,
        /// Its epoch.
        current: u64,
        /// The caller's.
        given: u64,
    },
    /// The head is not what the client thinks.
    #[error(
        "disk {disk}: the session started from {}, the commit expects {}: start a new run",
        head(actual.as_ref()),
        head(expected.as_ref())
    )]
    HeadMoved {
        /// The disk.
        disk: DiskId,
        /// What the client named.
        expected: Option<SnapshotId>,
        /// What it is.
        actual: Option<SnapshotId>,
    },
    /// What the run builds on is damaged. The run is given up.
    #[error(
        "the chain of disk {disk} is damaged: {reason}; this run is given up, the next one heals it"
    )]
    ChainDamaged {
        /// The disk.
        disk: DiskId,
        /// Blocks of its head that are lost; none when its tables or structures are damaged.
        blocks: BlockRanges,
        /// What was found.
        reason: String,
    },
    /// The call makes no sense in this state.
    #[error("run {backup} is {state}")]
    State {
        /// The run.
        backup: BackupId,
        /// How it stands.
        state: &'static str,
    },
    /// The disks of a commit or takeover are not those of the run.
    #[error("run {backup} was started with other disks or sizes: abort it and start a new one")]
    OtherDisks {
        /// The run.
        backup: BackupId,
    },
    /// The format of new chains can't hold the disk.
    #[error(
        "disk {disk}: {reason}, and new chains are VHDs on this server (prefer_vhdx = false): set prefer_vhdx = true in its settings, or leave the disk out"
    )]
    FormatTooSmall {
        /// The disk.
        disk: DiskId,
        /// What doesn't fit.
        reason: String,
    },
    /// The counter can't be right.
    #[error("use counter {given} is more than 2^32 above {known}")]
    CounterJump {
        /// From the caller.
        given: u64,
        /// Here.
        known: u64,
    },
    /// An open run builds on a snapshot that should be dropped.
    #[error(
        "run {backup} can't be dropped: the open run {holder} starts from its snapshot of disk {disk}; wait for its end or abort it"
    )]
    BuiltOn {
        /// The run.
        backup: BackupId,
        /// The open run.
        holder: BackupId,
        /// A disk of both.
        disk: DiskId,
    },
    /// A dropped run can't be brought back.
    #[error("run {backup} can't be brought back from the trash: its purge has begun")]
    Purging {
        /// The run.
        backup: BackupId,
    },
    /// The user's backups take what they may.
    #[error(
        "the backups of user {user} take {} here, quota is {}: `janus-server usage` shows what takes the space, \
         `janus-server retention run --now`, `delete` and `trash purge` free it; or raise setting quotas.{user}",
        amount(*used),
        amount(*quota)
    )]
    Quota {
        /// The user.
        user: String,
        /// Bytes taken.
        used: u64,
        /// Bytes allowed.
        quota: u64,
    },
    /// A folder would be shared on file systems that don't tell cases apart.
    #[error(
        "{new} differs only in upper and lower case from {other}, which is here already: choose another name"
    )]
    NameTaken {
        /// The new name.
        new: String,
        /// The one that is here.
        other: String,
    },
    /// Too many open runs.
    #[error("{MAX_OPEN_RUNS} runs are open on this server: try again later")]
    TooMany,
    /// The disk that holds the store is full.
    #[error("the store is full: {0}")]
    Full(String),
    /// A disk's head is not damaged, and still it can't be opened.
    #[error("disk {disk}: its newest snapshot can't be opened now: {source}")]
    Head {
        /// The disk.
        disk: DiskId,
        /// Why not.
        source: OpenError,
    },
    /// A session failed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The store failed.
    #[error(transparent)]
    Store(StoreError),
}

fn head(snapshot: Option<&SnapshotId>) -> String {
    snapshot.map_or_else(|| "no snapshot".into(), |id| format!("snapshot {id}"))
}

impl From<StoreError> for RunError {
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::Io { source, .. } if crate::storage::is_full(source) => {
                Self::Full(format!("{error}; up to 1 MiB is needed for that; {WHAT_HELPS}"))
            }
            _ => Self::Store(error),
        }
    }
}

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
        Self {
            store,
            lease,
            new_chains: Format::default(),
            machines: Mutex::new(known),
            sessions: Mutex::new(sessions),
            changes,
            limits: Limits::NONE,
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
        let mut machines = lock(&self.machines);
        names::check_machine(&machines, key)?;
        let machine = machines
            .entry(key.clone())
            .or_insert_with(|| {
                Arc::new(Machine::new(key.clone(), MachineState::default(), self.lease))
            })
            .clone();
        drop(machines);
        self.refuse_while_committing(&machine, backup)?;
        let _turn = machine.take_turn();
        machine.refuse_ended(backup)?;
        if let Some(run) = machine.find(backup) {
            if run.is_closed() {
                self.give_up(&machine, &run)?;
                machine.refuse_ended(backup)?;
            }
            self.end_doubt(&run)?;
            run.take_over(self, wanted)?;
            return Ok(run);
        }
        names::check_disks(&machine, wanted)?;
        for other in machine.active() {
            if let Some(left) = other.lease_left() {
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
        if lock(&self.sessions).len() >= MAX_OPEN_RUNS {
            return Err(RunError::TooMany);
        }
        let planned = wanted.iter().map(|disk| PlannedDisk::new(self, &machine, disk));
        let planned = planned.collect::<Result<Vec<_>, _>>()?;
        let used = machine.next_counter(use_counter)?;
        let counters = machine.counters_with(used);
        self.store.save_counters(key, counters)?;
        machine.set_counters(counters);
        let run = Arc::new(ActiveRun::create(self, &machine, backup, planned, used)?);
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
        let published = self.store.publish(&run, &open);
        let is_in_doubt = matches!(published, Err(StoreError::InDoubt { .. }));
        active.set_in_doubt(is_in_doubt.then(|| run.clone()));
        published?;
        machine.committed_now(run.clone());
        self.look_again(&machine);
        self.forget_sessions(&active);
        if let Err(error) = self.store.remove_open(&open) {
            // Harmless: the next start of the server finds the manifest and removes the rest.
            tracing::warn!(%error, backup_id = %backup, "cannot remove the files of a committed run");
        }
        let _ = self.changes.send(Change::Committed(run.clone()));
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
        let (sequence, committed_ms) = machine.next_place();
        Ok(Run {
            format: crate::chain::FORMAT,
            backup: active.backup,
            machine: machine.key.clone(),
            committed_ms,
            sequence,
            client_seal: seal.to_vec(),
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

    /// Takes in one message, renewing the lease.
    ///
    /// # Errors
    /// When the run was taken over, is committing or has ended, the user's quota is used up, or the store can't be written.
    pub fn apply(&self, batch: Option<&Batch>, settled: u64) -> Result<Marks, RunError> {
        self.run.check_epoch(self.epoch)?;
        self.run.renew();
        if self.run.is_committing() || self.run.in_doubt().is_some() {
            return Err(RunError::State { backup: self.run.backup, state: "being committed" });
        }
        if let (Some(metered), Some(batch)) = (&self.metered, batch) {
            metered.count(self.run.machine.user(), batch.data_len() as u64)?;
        }
        self.session.apply(batch, settled).map_err(|error| match error {
            full @ SessionError::Full { .. } => RunError::Full(self.lacking(&full)),
            error => error.into(),
        })
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
