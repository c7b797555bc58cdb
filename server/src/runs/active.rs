//! A run that is open, and the disks it is about to begin with.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use janus_proto::{
    ids::{BackupId, DiskId, MachineKey, SessionId, SnapshotId},
    model::MAX_RANGES,
};
use time::{OffsetDateTime, macros::format_description};
use tokio::time::Instant;

use super::{CommitDisk, Machine, RunError, Runs, WantedDisk, left, lock, now_ms};
use crate::{
    chain::{
        FORMAT, Origin, Run, Snapshot,
        opened::OpenedSnapshot,
        ranges::BlockRanges,
        store::{OpenDisk, OpenRun, Store},
    },
    image::{Format, vhd},
    session::{Session, SessionError, Trust},
};

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
        stubs: bool,
    ) -> Result<Self, RunError> {
        let head = readable_head(runs, machine, &wanted.disk)?;
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
            stub: stubs && head.is_none(),
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
    pub(super) fn left_behind(record: OpenRun, lease: Duration) -> Self {
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
        origin: Option<Origin>,
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
            origin,
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

    /// Gives the run to a new caller: same sessions, higher epoch. That of an import may be made from something else now.
    pub(super) fn take_over(
        &self,
        runs: &Runs,
        wanted: &[WantedDisk],
        origin: Option<Origin>,
    ) -> Result<(), RunError> {
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
        record.origin = origin.or(record.origin);
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

    /// Gives the lease back: who held it has gone, and says so.
    pub(super) fn release(&self) {
        lock(&self.state).leased = false;
    }

    /// What it is made from, when that is no backup of a client.
    pub fn origin(&self) -> Option<Origin> {
        lock(&self.state).record.origin.clone()
    }

    /// How long its holder may still be silent; none when nobody holds it.
    pub fn lease_left(&self) -> Option<Duration> {
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
            let allocated = match open.stub {
                // What it will take counts from now on.
                true => finished.image_allocated_bytes.max(session.stored_bytes()),
                false => finished.image_allocated_bytes,
            };
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
                skipped_bytes: commit.skipped_bytes,
                image_allocated_bytes: allocated,
                image_length_bytes: finished.image_length_bytes,
            });
        }
        Ok(snapshots)
    }
}

/// The head of a disk, unless its chain can't be built on: then the session starts from zeros and makes a new base.
fn readable_head(
    runs: &Runs,
    machine: &Machine,
    disk: &DiskId,
) -> Result<Option<OpenedSnapshot>, RunError> {
    let Some(held) = machine.history(|history| history.head(disk).cloned()) else {
        return Ok(None);
    };
    let id = held.snapshot().id;
    Ok(match runs.open_snapshot(&held) {
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
        // It is as it was: only now it can't be opened, and a new base would be for nothing.
        Err(source) if !source.is_damage() => {
            return Err(RunError::Head { disk: disk.clone(), source });
        }
        Err(error) => {
            tracing::error!(%error, machine = %machine.key, %disk, snapshot_id = %id, "the disk's head can't be built on: a new base begins");
            None
        }
    })
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
                stub: false,
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
