//! What the store has acknowledged, and whether it keeps it: every promise against a model in memory.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use janus_proto::ids::{BackupId, DiskId, MachineKey, SnapshotId};
use janus_server::{chain::Held, runs::Runs, session::Marks};

use crate::content::Content;

/// What is on each disk.
pub type Contents = BTreeMap<DiskId, Arc<Content>>;

/// Something the client was told, or was about to do.
#[derive(Clone)]
pub enum Promise {
    /// It begins or takes over a run of these contents.
    Trying { backup: BackupId, contents: Contents },
    /// A start was accepted with this use counter.
    Counter(u64),
    /// An acknowledgement of the run it tries.
    Settled { disk: DiskId, marks: Marks },
    /// A commit's answer.
    Committed { backup: BackupId, snapshots: Vec<(SnapshotId, DiskId)> },
    /// It gives the run up: nothing of it needs to stay.
    GivenUp,
    /// It does no longer need this snapshot: from now on it may go.
    MayGo(SnapshotId),
}

/// All promises up to a point.
#[derive(Clone, Default)]
pub struct Promised {
    pub tried: HashMap<BackupId, Contents>,
    pub trying: Option<BackupId>,
    pub counter: u64,
    pub settled: BTreeMap<DiskId, Marks>,
    pub snapshots: BTreeMap<SnapshotId, (DiskId, Arc<Content>)>,
}

impl Promised {
    pub fn take(&mut self, promise: Promise) {
        match promise {
            Promise::Trying { backup, contents } => {
                if self.tried.get(&backup) != Some(&contents) {
                    self.settled.clear();
                }
                self.tried.insert(backup, contents);
                self.trying = Some(backup);
            }
            Promise::Counter(counter) => self.counter = counter,
            Promise::Settled { disk, marks } => {
                self.settled.insert(disk, marks);
            }
            Promise::Committed { backup, snapshots } => {
                for (snapshot, disk) in snapshots {
                    let content = self.tried[&backup][&disk].clone();
                    self.snapshots.insert(snapshot, (disk, content));
                }
                self.end();
            }
            Promise::GivenUp => self.end(),
            Promise::MayGo(snapshot) => {
                self.snapshots.remove(&snapshot);
            }
        }
    }

    fn end(&mut self) {
        self.trying = None;
        self.settled.clear();
    }

    /// Content that the run being tried, or the newest, should have.
    pub fn contents(&self) -> Contents {
        let newest = || self.tried.keys().max().copied();
        let backup = self.trying.or_else(newest);
        backup.map(|backup| self.tried[&backup].clone()).unwrap_or_default()
    }

    /// Compares all that is in the store: what was acknowledged must be there, and nothing may be there that isn't right.
    pub fn check(&self, runs: &Runs, machine: &MachineKey) -> Result<(), String> {
        let known = runs.machine(machine);
        let counter = known.as_ref().map_or(0, |machine| machine.use_counter());
        if counter < self.counter {
            return Err(format!("use counter {counter}, {} was acknowledged", self.counter));
        }
        let there = known.map(|machine| machine.snapshots()).unwrap_or_default();
        for id in self.snapshots.keys() {
            if there.iter().all(|held| held.snapshot().id != *id) {
                return Err(format!("snapshot {id} is gone"));
            }
        }
        for held in &there {
            self.check_snapshot(runs, held)
                .map_err(|error| format!("snapshot {}: {error}", held.snapshot().id))?;
        }
        Ok(())
    }

    fn check_snapshot(&self, runs: &Runs, held: &Held) -> Result<(), String> {
        let snapshot = held.snapshot();
        if let Some((disk, content)) = self.snapshots.get(&snapshot.id) {
            let right = snapshot.disk == *disk;
            return if right {
                compare(runs, held, content)
            } else {
                Err("of another disk".into())
            };
        }
        // Its commit was not acknowledged, but all of it may be there.
        let tried = self.tried.get(&held.run.backup).ok_or("nobody has made it")?;
        if held.run.snapshots.len() != tried.len() {
            return Err(format!("its run has {} disks", held.run.snapshots.len()));
        }
        compare(runs, held, tried.get(&snapshot.disk).ok_or("of another disk")?)
    }
}

/// A snapshot's bytes and hashes against those of the model.
fn compare(runs: &Runs, held: &Held, content: &Content) -> Result<(), String> {
    let opened = runs.open_snapshot(held).map_err(|e| e.to_string())?;
    if held.snapshot().size_bytes != content.bytes.len() as u64 {
        return Err(format!(
            "has {} bytes, not {}",
            held.snapshot().size_bytes,
            content.bytes.len()
        ));
    }
    let mut found = vec![0; content.bytes.len()];
    opened.read_at(0, &mut found).map_err(|e| e.to_string())?;
    if found != content.bytes {
        let at = found.iter().zip(&content.bytes).position(|(a, b)| a != b);
        return Err(format!("differs in block {}", at.unwrap_or_default() / 4096));
    }
    let stored = opened.tables.table_digest().map_err(|e| e.to_string())?;
    if stored != held.snapshot().table_digest {
        return Err("its tables have another digest".into());
    }
    for (number, hashes) in content.segments() {
        if opened.tables.segment(number).map_err(|e| e.to_string())? != hashes {
            return Err(format!("has wrong hashes in segment {number}"));
        }
    }
    Ok(())
}
