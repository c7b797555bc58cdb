//! What a new run is refused for: free space below the reserve, and its user's quota.
//!
//! Open runs go on below the reserve: what they hold already is lost otherwise. A quota also ends those, resumably; it may be
//! exceeded by what streams send between two looks. A quota counts images as they lie on the disk, those in the trash too,
//! and the blocks of open runs.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use janus_proto::ids::MachineKey;

use super::{ActiveRun, RunError, Runs, WantedDisk, lock};
use crate::{
    chain::store::OpenDisk,
    config::{Settings, Size},
    space::{self, Space},
};

/// A stream looks at its user's quota again after so many bytes.
const LOOK_BYTES: u64 = 16 << 20;

/// What new runs must leave alone.
#[derive(Debug, Clone)]
pub struct Limits {
    reserve: Size,
    quotas: BTreeMap<String, u64>,
    /// All disks of a run together.
    machine_bytes: u64,
}

impl Limits {
    /// No limits.
    pub const NONE: Self =
        Self { reserve: Size::Bytes(0), quotas: BTreeMap::new(), machine_bytes: u64::MAX };

    pub(super) fn reserve(&self) -> Size {
        self.reserve
    }

    /// Those of checked settings.
    pub fn of(settings: &Settings) -> Self {
        let quotas = settings.quotas().unwrap_or_default();
        let machine_bytes = settings.max_machine_bytes().unwrap_or(u64::MAX);
        Self { reserve: space::reserve(settings), quotas, machine_bytes }
    }
}

impl Runs {
    /// The same runs, with limits for new ones.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Refuses a new run of a machine where there is no room for it.
    pub(super) fn check_room(&self, machine: &MachineKey) -> Result<(), RunError> {
        match Space::ask(&self.store, self.limits.reserve) {
            Some(space) if space.is_low(false) => Err(RunError::Full(space.advice())),
            _ => self.check_quota(machine.user()),
        }
    }

    /// Refuses disks that are larger together than a machine's may be: what an open run takes of memory grows with them, whatever they
    /// hold.
    pub(super) fn check_size(&self, wanted: &[WantedDisk]) -> Result<(), RunError> {
        let bytes = wanted.iter().fold(0, |sum: u64, disk| sum.saturating_add(disk.size_bytes));
        let limit = self.limits.machine_bytes;
        if bytes <= limit { Ok(()) } else { Err(RunError::TooLarge { bytes, limit }) }
    }

    /// Bytes that the backups of a user take here.
    pub fn used_by(&self, user: &str) -> u64 {
        let machines = self.machines();
        let own = machines.iter().filter(|machine| machine.key.user() == user);
        let of_machine = |machine: &super::Machine| {
            let snapshots = machine.snapshots();
            let kept = snapshots.iter().map(|held| held.snapshot().image_allocated_bytes);
            let trashed = machine.trashed();
            let dropped = trashed.iter().flat_map(|trashed| &trashed.run.snapshots);
            let dropped = dropped.map(|snapshot| snapshot.image_allocated_bytes);
            let active = machine.active();
            let open = active.iter().map(|run| self.held_by(run));
            kept.chain(dropped).chain(open).fold(0, u64::saturating_add)
        };
        own.map(|machine| of_machine(machine)).fold(0, u64::saturating_add)
    }

    /// Bytes that an open run takes.
    fn held_by(&self, run: &ActiveRun) -> u64 {
        let sessions = run.sessions();
        if !sessions.is_empty() {
            return sessions.iter().map(|session| session.stored_bytes()).sum();
        }
        // Nobody has taken it over since this server started: what its images occupy.
        let folder = self.store.machine_folder(&run.machine);
        let image = |disk: &OpenDisk| {
            let path = folder.join(disk.partial(disk.format.extension()));
            self.store.storage().metadata(&path).ok().flatten()
        };
        let record = run.record();
        record.disks.iter().filter_map(image).map(|image| image.allocated_bytes).sum()
    }

    fn check_quota(&self, user: &str) -> Result<(), RunError> {
        let Some(quota) = self.limits.quotas.get(user).copied() else { return Ok(()) };
        let used = self.used_by(user);
        match used < quota {
            true => Ok(()),
            false => Err(RunError::Quota { user: user.to_owned(), used, quota }),
        }
    }
}

/// What one stream has sent since its user's quota was looked at.
pub(super) struct Metered {
    runs: Arc<Runs>,
    /// `None` before the first message: a resumed run may be over its quota already.
    sent_bytes: Mutex<Option<u64>>,
}

impl Metered {
    pub(super) fn new(runs: Arc<Runs>) -> Self {
        Self { runs, sent_bytes: Mutex::new(None) }
    }

    /// Counts `bytes` that are about to be stored.
    pub(super) fn count(&self, user: &str, bytes: u64) -> Result<(), RunError> {
        let is_due = {
            let mut sent_bytes = lock(&self.sent_bytes);
            let sent = sent_bytes.map_or(LOOK_BYTES, |sent| sent.saturating_add(bytes));
            *sent_bytes = Some(if sent >= LOOK_BYTES { 0 } else { sent });
            sent >= LOOK_BYTES
        };
        if is_due { self.runs.check_quota(user) } else { Ok(()) }
    }
}
