//! What other servers fill their stubs from stays here until those are full.
//!
//! While they have a snapshot open no merge changes it. That ends with this process, and they may be away for a while; so a hold
//! stands in `.holds.json` below the image path, and no plan drops the run of a snapshot that has one. It ends when its server says that
//! the stub is full, or has read nothing for a week. A crash leaves the old holds or the new ones.

use std::time::Duration;

use janus_proto::ids::{DiskId, MachineKey, ServerId, SnapshotId};
use serde::{Deserialize, Serialize};

use super::{Runs, now_ms};
use crate::chain::{
    Held,
    store::{SmallFile, Store, StoreError},
};

/// So long nothing need be heard of a server that fills a stub.
const HELD: Duration = Duration::from_secs(7 * 86_400);
/// A hold is written again when it is so old.
const RENEW_MS: i64 = 3_600_000;
const FILE: &str = ".holds.json";
/// More aren't written: whoever asks for them keeps his snapshots only while they are open.
const MOST: usize = 4096;

/// A snapshot that a server fills a stub from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// The server.
    pub server: ServerId,
    machine: MachineKey,
    disk: DiskId,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// When it was heard of last, to the hour, in Unix milliseconds.
    heard_ms: i64,
}

impl Hold {
    fn new(server: &ServerId, held: &Held, heard_ms: i64) -> Self {
        Self {
            server: server.clone(),
            machine: held.run.machine.clone(),
            disk: held.snapshot().disk.clone(),
            snapshot: held.snapshot().id,
            heard_ms,
        }
    }

    /// When it ends if nothing more is heard, in Unix milliseconds.
    pub fn until_ms(&self) -> i64 {
        let held = i64::try_from(HELD.as_millis()).unwrap_or(i64::MAX);
        self.heard_ms.saturating_add(held)
    }
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Known {
    holds: Vec<Hold>,
}

/// All holds of a store.
pub(super) struct Holds(SmallFile<Known>);

impl Holds {
    /// Those of a store. Nothing is read yet.
    pub(super) fn new(store: &Store) -> Self {
        Self(SmallFile::new(store, FILE))
    }

    /// Keeps a snapshot, or keeps it longer; false: there are too many.
    fn hold(&self, new: Hold) -> Result<bool, StoreError> {
        let is_it = |hold: &Hold| hold.server == new.server && hold.snapshot == new.snapshot;
        let now_ms = new.heard_ms;
        let is_young = |hold: &Hold| (0..RENEW_MS).contains(&now_ms.saturating_sub(hold.heard_ms));
        let mut file = self.0.lock();
        if file.value()?.holds.iter().any(|hold| is_it(hold) && is_young(hold)) {
            return Ok(true);
        }
        file.change(|known| {
            known.holds.retain(|hold| now_ms < hold.until_ms() && !is_it(hold));
            let has_room = known.holds.len() < MOST;
            known.holds.extend(has_room.then(|| new.clone()));
            has_room
        })
    }

    /// Ends all holds of a server on a disk.
    fn release(&self, of: &Hold) -> Result<(), StoreError> {
        let is_other = |hold: &Hold| {
            hold.server != of.server || hold.machine != of.machine || hold.disk != of.disk
        };
        let mut file = self.0.lock();
        match file.value()?.holds.iter().all(is_other) {
            true => Ok(()),
            false => file.change(|known| known.holds.retain(is_other)),
        }
    }

    fn of(&self, machine: &MachineKey, now_ms: i64) -> Result<Vec<Hold>, StoreError> {
        let mut file = self.0.lock();
        let holds = file.value()?.holds.iter();
        let of = |hold: &&Hold| hold.machine == *machine && now_ms < hold.until_ms();
        Ok(holds.filter(of).cloned().collect())
    }
}

impl Runs {
    /// Keeps a snapshot for a server that fills a stub from it, from now on. What can't be kept durably stays while it is open.
    pub fn hold(&self, server: &ServerId, held: &Held) {
        let why = match self.holds.hold(Hold::new(server, held, now_ms())) {
            Ok(true) => return,
            Ok(false) => format!("there are {MOST} holds already"),
            Err(error) => error.to_string(),
        };
        let (machine, snapshot_id) = (&held.run.machine, held.snapshot().id);
        tracing::warn!(%machine, %snapshot_id, %server, error = why, "a snapshot is kept for another server only until this one ends");
    }

    /// The stub that a server filled from snapshots of this one's disk is full.
    pub fn release(&self, server: &ServerId, held: &Held) {
        if let Err(error) = self.holds.release(&Hold::new(server, held, now_ms())) {
            let machine = &held.run.machine;
            tracing::warn!(%machine, %server, %error, "what was kept for another server stays for some days");
        }
    }

    /// What other servers fill stubs of a machine from.
    ///
    /// # Errors
    /// When that isn't known.
    pub fn holds(&self, machine: &MachineKey) -> Result<Vec<Hold>, StoreError> {
        self.holds.of(machine, now_ms())
    }
}

#[cfg(test)]
mod tests {
    use janus_proto::storage::Disk;

    use super::*;

    const HOUR_MS: i64 = 3_600_000;

    fn hold(server: &str, disk: &str, snapshot: SnapshotId, heard_ms: i64) -> Hold {
        Hold {
            server: server.parse().unwrap(),
            machine: "alice/web".parse().unwrap(),
            disk: disk.parse().unwrap(),
            snapshot,
            heard_ms,
        }
    }

    #[test]
    fn holds_survive_restarts_and_end_when_released_or_not_heard_of() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Holds(SmallFile::at(Disk::default(), folder.path().join(FILE)));
        let machine: MachineKey = "alice/web".parse().unwrap();
        let held = |now_ms| {
            let of = open().of(&machine, now_ms).unwrap();
            of.into_iter().map(|hold| hold.snapshot).collect::<Vec<_>>()
        };
        let (sda, older, sdb) = (SnapshotId::new(), SnapshotId::new(), SnapshotId::new());
        let holds = open();
        for (disk, snapshot) in [("sda", sda), ("sda", older), ("sdb", sdb)] {
            assert!(holds.hold(hold("b", disk, snapshot, 0)).unwrap());
        }
        assert_eq!(held(0), [sda, older, sdb]);
        assert!(open().of(&"alice/other".parse().unwrap(), 0).unwrap().is_empty());
        // Of one that is heard of it is written down once an hour.
        holds.hold(hold("b", "sda", sda, HOUR_MS / 2)).unwrap();
        assert_eq!(open().of(&machine, 0).unwrap()[0].heard_ms, 0);
        holds.hold(hold("b", "sda", sda, HOUR_MS)).unwrap();
        let week = 7 * 24 * HOUR_MS;
        assert_eq!(held(week - 1).len(), 3);
        assert_eq!(held(week), [sda]);
        assert!(held(week + HOUR_MS).is_empty());

        holds.release(&hold("c", "sda", sda, 0)).unwrap();
        assert_eq!(held(0).len(), 3, "another server's");
        holds.release(&hold("b", "sda", SnapshotId::new(), 0)).unwrap();
        assert_eq!(held(0), [sdb]);
        // What is over makes room for others.
        holds.hold(hold("c", "sda", sda, week)).unwrap();
        assert_eq!(held(0), [sda]);
    }

    #[test]
    fn there_are_so_many_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let holds = Holds(SmallFile::at(Disk::default(), folder.path().join(FILE)));
        let one = hold("b", "sda", SnapshotId::new(), 0);
        holds.0.lock().replace(Known { holds: vec![one.clone(); MOST] }).unwrap();
        assert!(!holds.hold(hold("b", "sda", SnapshotId::new(), 0)).unwrap());
        assert!(holds.hold(one).unwrap());
    }
}
