//! What can go wrong with a run.

use janus_proto::{
    ids::{BackupId, DiskId, MachineKey, SnapshotId},
    show::{amount, date},
};

use super::MAX_OPEN_RUNS;
use crate::{
    chain::{opened::OpenError, ranges::BlockRanges, store::StoreError},
    session::SessionError,
    space::WHAT_HELPS,
};

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
    /// A machine with so much is none that this server takes.
    #[error(
        "the disks of this backup have {} together, this server takes {} of one machine: raise max_machine_size in its settings, or leave a disk out",
        amount(*bytes), amount(*limit)
    )]
    TooLarge {
        /// Bytes of all disks.
        bytes: u64,
        /// Bytes allowed.
        limit: u64,
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
    /// A run is locked.
    #[error(
        "run {backup} is locked {until}: nobody can drop it before, and no command takes the lock off"
    )]
    Locked {
        /// The run.
        backup: BackupId,
        /// How long, for people.
        until: String,
    },
    /// A later run has raised an alarm.
    #[error(
        "run {backup} is the last good one before an alarm: look at `janus-server alarm list`; `janus-server alarm clear {machine}` leaves it to the rules"
    )]
    KeptByAlarm {
        /// The run.
        backup: BackupId,
        /// Its machine.
        machine: MachineKey,
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
    /// It would come before what is here.
    #[error(
        "machine {machine} has a newer backup of disk {disk} here (of {}; what is to be imported is of {}), and an older one can't \
         come after it: import it as another machine (--machine USER/NAME), or delete what is newer",
        date(*newest_ms), date(*taken_ms)
    )]
    Older {
        /// The machine.
        machine: MachineKey,
        /// The disk.
        disk: DiskId,
        /// Time of its newest snapshot.
        newest_ms: i64,
        /// Time of the content.
        taken_ms: i64,
    },
    /// A carried run is being taken in.
    #[error(
        "a backup of machine {machine} is being imported on this server: try again when that is done"
    )]
    Importing {
        /// The machine.
        machine: MachineKey,
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
