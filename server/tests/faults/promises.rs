//! What the store has acknowledged, and whether it keeps it: every promise against a model in memory.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use janus_proto::ids::{BackupId, DiskId, MachineKey, SnapshotId};
use janus_server::{
    chain::{Held, opened::OpenedSnapshot, ranges::BlockRanges},
    runs::Runs,
    session::Marks,
};

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
    /// It went: it is not listed any more.
    Gone(SnapshotId),
    /// What went is asked for again.
    MayReturn(SnapshotId),
    /// It is there as before it went.
    IsBack(SnapshotId),
    /// The snapshot has a pin.
    Pinned(SnapshotId),
    /// Its pin may be there or not.
    MayBeUnpinned(SnapshotId),
    /// One block of all runs so far may be damaged, and of those that begin before it is found.
    Damaged { disk: DiskId, block: u64 },
    /// The damage was found: runs that begin from now on are whole.
    Found,
    /// The disk's files can share blocks.
    Shares,
}

/// All promises up to a point.
#[derive(Clone, Default)]
pub struct Promised {
    pub tried: HashMap<BackupId, Contents>,
    pub trying: Option<BackupId>,
    pub counter: u64,
    pub settled: BTreeMap<DiskId, Marks>,
    pub snapshots: BTreeMap<SnapshotId, (DiskId, Arc<Content>)>,
    /// What went, or may have.
    dropped: BTreeMap<SnapshotId, (DiskId, Arc<Content>)>,
    gone: BTreeSet<SnapshotId>,
    pinned: BTreeSet<SnapshotId>,
    damage: Option<Damaged>,
    /// Files share blocks.
    pub shares: bool,
}

/// A damaged block.
#[derive(Clone)]
struct Damaged {
    disk: DiskId,
    block: u64,
    /// Runs that may have it.
    harmed: HashSet<BackupId>,
    is_found: bool,
}

impl Promised {
    pub fn take(&mut self, promise: Promise) {
        match promise {
            Promise::Trying { backup, contents } => {
                if self.tried.get(&backup) != Some(&contents) {
                    self.settled.clear();
                }
                let is_new = self.tried.insert(backup, contents).is_none();
                if let Some(damage) = &mut self.damage
                    && is_new
                    && !damage.is_found
                {
                    damage.harmed.insert(backup);
                }
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
                let known = self.snapshots.remove_entry(&snapshot);
                self.dropped.extend(known);
            }
            Promise::Gone(snapshot) => {
                self.gone.insert(snapshot);
            }
            Promise::MayReturn(snapshot) => {
                self.gone.remove(&snapshot);
            }
            Promise::IsBack(snapshot) => {
                let known = self.dropped.remove_entry(&snapshot);
                self.snapshots.extend(known);
            }
            Promise::Pinned(snapshot) => {
                self.pinned.insert(snapshot);
            }
            Promise::MayBeUnpinned(snapshot) => {
                self.pinned.remove(&snapshot);
            }
            Promise::Damaged { disk, block } => {
                let harmed = self.tried.keys().copied().collect();
                self.damage = Some(Damaged { disk, block, harmed, is_found: false });
            }
            Promise::Shares => self.shares = true,
            Promise::Found => {
                if let Some(damage) = &mut self.damage {
                    damage.is_found = true;
                }
            }
        }
    }

    /// True while nobody has found the damage that was done.
    pub fn hides_damage(&self) -> bool {
        self.damage.as_ref().is_some_and(|damage| !damage.is_found)
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
        if let Some(held) = there.iter().find(|held| self.gone.contains(&held.snapshot().id)) {
            return Err(format!("snapshot {} is here again", held.snapshot().id));
        }
        let pins = runs.store().pins(machine).map_err(|error| error.to_string())?;
        if let Some(id) = self.pinned.iter().find(|id| !pins.contains(id)) {
            return Err(format!("snapshot {id} has lost its pin"));
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
                compare(runs, held, content, self.damaged_block(held))
            } else {
                Err("of another disk".into())
            };
        }
        // Its commit was not acknowledged, but all of it may be there.
        // An import is known by the run that was carried.
        let carried = held.run.origin.as_ref().and_then(|origin| origin.run);
        let tried = self.tried.get(&carried.unwrap_or(held.run.backup));
        let tried = tried.ok_or("nobody has made it")?;
        if held.run.snapshots.len() != tried.len() {
            return Err(format!("its run has {} disks", held.run.snapshots.len()));
        }
        let content = tried.get(&snapshot.disk).ok_or("of another disk")?;
        compare(runs, held, content, self.damaged_block(held))
    }

    /// The block that a snapshot may have lost.
    fn damaged_block(&self, held: &Held) -> Option<usize> {
        let damage = self.damage.as_ref()?;
        let is_harmed =
            damage.disk == held.snapshot().disk && damage.harmed.contains(&held.run.backup);
        is_harmed.then_some(damage.block as usize)
    }
}

/// Blocks that a snapshot lacks, since it builds on a stub.
fn missing(runs: &Runs, opened: &OpenedSnapshot) -> BlockRanges {
    let machine = &opened.held.run.machine;
    let folder = runs.store().machine_folder(machine);
    let health = runs.machine(machine).map(|machine| machine.health()).unwrap_or_default();
    health.missing_of_chain(runs.store().storage(), &folder, &opened.chain)
}

/// A snapshot's bytes and hashes against those of the model, but for the bytes of a block that is damaged.
fn compare(
    runs: &Runs,
    held: &Held,
    content: &Content,
    damaged: Option<usize>,
) -> Result<(), String> {
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
    // What isn't here yet is known, and compared with its hash by whoever reads it.
    let missing = missing(runs, &opened);
    let blocks = found.chunks(4096).zip(content.bytes.chunks(4096)).enumerate();
    let mut differing = blocks
        .filter(|(number, (found, wanted))| found != wanted && !missing.contains(*number as u64))
        .map(|(number, _)| number);
    if let Some(block) = differing.find(|number| Some(*number) != damaged) {
        return Err(format!("differs in block {block}"));
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
