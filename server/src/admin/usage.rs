//! `janus-server usage`: what is stored, and what dropping it would free.
//!
//! *Logical* is the size of the disk. *Allocated* is what images and tables occupy. *Unique* is what would come free if
//! this alone was dropped: all of a machine or disk, since nothing is shared between disks; of a snapshot what no other
//! needs, which are the blocks that its children hold anew, or all when it has no child. Children in the trash count: they can
//! come back, and what builds on them can be read.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use clap::Args;
use janus_proto::{
    ids::{BLOCK_BYTES, DiskId, MachineKey, SnapshotId},
    show::{amount, date},
};
use serde::{Deserialize, Serialize};

use super::{
    Admin, AdminError, Answer, Task,
    missing::Missing,
    table::{right, table},
};
use crate::{
    chain::{
        Held, Snapshot, stub,
        table::{Table, TableError},
    },
    mirror::shelf,
    runs::Machine,
    storage::{Access, Disk},
};

/// Arguments of the command.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
pub struct Arguments {
    /// Only this machine
    #[arg(value_name = "USER/MACHINE")]
    machine: Option<MachineKey>,
    /// Each snapshot too (reads the tables)
    #[arg(long)]
    snapshots: bool,
}

#[cfg(test)]
impl Arguments {
    pub(super) fn of(machine: MachineKey) -> Self {
        Self { machine: Some(machine), snapshots: false }
    }
}

#[derive(Debug, Serialize)]
struct Usage {
    machines: Vec<MachineUsage>,
    /// What the hash tables of other servers' backups take. Nobody's quota has them.
    mirrored_bytes: u64,
    free_bytes: u64,
    total_bytes: u64,
    /// Snapshots that can't be read as a whole since files are missing.
    gaps: serde_json::Value,
}

#[derive(Debug, Serialize)]
struct MachineUsage {
    machine: MachineKey,
    #[serde(flatten)]
    bytes: Bytes,
    disks: Vec<DiskUsage>,
    /// Of the allocated bytes: what was dropped and not purged.
    trash_bytes: u64,
    /// Unix milliseconds at which a backup of it was last proven; absent: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    proven_ms: Option<i64>,
    /// What looks like an attack; absent: nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    alarm: Option<String>,
}

#[derive(Debug, Serialize)]
struct DiskUsage {
    disk: DiskId,
    snapshot_count: usize,
    #[serde(flatten)]
    bytes: Bytes,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshots: Option<Vec<SnapshotUsage>>,
}

#[derive(Debug, Serialize)]
struct SnapshotUsage {
    snapshot: SnapshotId,
    committed_ms: i64,
    #[serde(flatten)]
    bytes: Bytes,
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Bytes {
    logical_bytes: u64,
    allocated_bytes: u64,
    unique_bytes: u64,
}

impl Bytes {
    fn add(&mut self, other: Self) {
        self.logical_bytes += other.logical_bytes;
        self.allocated_bytes += other.allocated_bytes;
        self.unique_bytes += other.unique_bytes;
    }

    fn cells(self) -> [String; 3] {
        [self.logical_bytes, self.allocated_bytes, self.unique_bytes].map(|b| right(amount(b)))
    }
}

pub(super) fn run(
    admin: &Admin,
    arguments: &Arguments,
    task: &Task<'_>,
) -> Result<Answer, AdminError> {
    let machines = admin.machines(arguments.machine.as_ref())?;
    let (free_bytes, total_bytes) = admin
        .runs()
        .store()
        .space()
        .map_err(|source| AdminError::Io { action: "ask for the free space", source })?;
    let missing = Missing::of_machines(admin, &machines, arguments.machine.as_ref());
    let store = admin.runs().store();
    let mirrored_bytes = shelf::stored_bytes(store.storage(), store.root());
    let gaps = missing.json();
    let mut usage = Usage { machines: Vec::new(), mirrored_bytes, free_bytes, total_bytes, gaps };
    for machine in machines {
        usage.machines.push(of_machine(admin, &machine, arguments.snapshots, task)?);
    }
    Ok(Answer::new(text(&usage) + &missing.text(), &usage))
}

fn of_machine(
    admin: &Admin,
    machine: &Machine,
    each: bool,
    task: &Task<'_>,
) -> Result<MachineUsage, AdminError> {
    let files = Files {
        storage: admin.runs().store().storage(),
        folder: &admin.runs().store().machine_folder(&machine.key),
    };
    let mut disks: BTreeMap<DiskId, Vec<Held>> = BTreeMap::new();
    for held in machine.snapshots() {
        disks.entry(held.snapshot().disk.clone()).or_default().push(held);
    }
    let trashed = machine.trashed();
    let dropped = trashed.iter().flat_map(|trashed| &trashed.run.snapshots);
    let trash_bytes = dropped.map(|snapshot| files.allocated(snapshot)).sum();
    let bytes = Bytes { allocated_bytes: trash_bytes, unique_bytes: trash_bytes, logical_bytes: 0 };
    let proven_ms = Some(machine.proofs().standing().proven_ms).filter(|ms| *ms > 0);
    let mut usage = MachineUsage {
        machine: machine.key.clone(),
        bytes,
        disks: Vec::new(),
        trash_bytes,
        proven_ms,
        alarm: machine.alarm(),
    };
    for (disk, newest_first) in disks {
        task.check()?;
        let allocated = newest_first.iter().map(|held| files.allocated(held.snapshot()));
        let allocated_bytes = allocated.sum();
        let logical_bytes = newest_first.first().map_or(0, |held| held.snapshot().size_bytes);
        let bytes = Bytes { logical_bytes, allocated_bytes, unique_bytes: allocated_bytes };
        usage.bytes.add(bytes);
        let dropped = trashed.iter().flat_map(|trashed| &trashed.run.snapshots);
        let of_this = dropped.filter(|dropped| dropped.disk == disk);
        let snapshots =
            each.then(|| of_snapshots(&files, &newest_first, of_this, task)).transpose()?;
        usage.disks.push(DiskUsage { disk, snapshot_count: newest_first.len(), bytes, snapshots });
    }
    Ok(usage)
}

fn of_snapshots<'a>(
    files: &Files<'_>,
    newest_first: &'a [Held],
    dropped: impl Iterator<Item = &'a Snapshot>,
    task: &Task<'_>,
) -> Result<Vec<SnapshotUsage>, AdminError> {
    let mut children: HashMap<SnapshotId, Vec<&Snapshot>> = HashMap::new();
    for child in newest_first.iter().map(Held::snapshot).chain(dropped) {
        if let Some(parent) = child.parent {
            children.entry(parent).or_default().push(child);
        }
    }
    let mut all = Vec::with_capacity(newest_first.len());
    for held in newest_first {
        task.check()?;
        let snapshot = held.snapshot();
        let allocated_bytes = files.allocated(snapshot);
        let unique_bytes = match children.get(&snapshot.id) {
            None => allocated_bytes,
            // A table that can't be read is told by whoever verifies; here it counts as needed.
            Some(children) => files.shadowed(snapshot, children).unwrap_or(0).min(allocated_bytes),
        };
        let bytes = Bytes { logical_bytes: snapshot.size_bytes, allocated_bytes, unique_bytes };
        let (snapshot, committed_ms) = (snapshot.id, held.run.committed_ms);
        all.push(SnapshotUsage { snapshot, committed_ms, bytes });
    }
    Ok(all)
}

/// The files of one machine.
struct Files<'a> {
    storage: &'a Disk,
    folder: &'a Path,
}

impl Files<'_> {
    /// Bytes that image and table occupy now; a missing file has none.
    fn allocated(&self, snapshot: &Snapshot) -> u64 {
        let file = |name: &str| self.storage.metadata(&self.folder.join(name)).ok().flatten();
        let occupied = |name: &str| file(name).map(|file| file.allocated_bytes);
        let image = occupied(&snapshot.image).or_else(|| occupied(&stub::name(&snapshot.image)));
        image.unwrap_or(0) + occupied(&snapshot.table).unwrap_or(0)
    }

    /// Bytes of a snapshot's blocks that all of its children hold anew.
    fn shadowed(&self, snapshot: &Snapshot, children: &[&Snapshot]) -> Result<u64, TableError> {
        let own = self.table(snapshot)?;
        let children =
            children.iter().map(|child| self.table(child)).collect::<Result<Vec<_>, _>>()?;
        let mut blocks = 0;
        for (segment, _) in own.digests() {
            if children.iter().any(|child| child.digest(segment).is_none()) {
                continue;
            }
            let Some(page) = own.page(segment)? else { continue };
            let mut common = page.present;
            for child in &children {
                let present = child.page(segment)?.map(|page| page.present).unwrap_or_default();
                for (word, present) in common.0.iter_mut().zip(present.0) {
                    *word &= present;
                }
            }
            blocks += common.count() as u64;
        }
        Ok(blocks * BLOCK_BYTES)
    }

    fn table(&self, snapshot: &Snapshot) -> Result<Table, TableError> {
        let file = self.storage.open(&self.folder.join(&snapshot.table), Access::Read);
        Table::open(file.map_err(|source| TableError::Io { action: "open", source })?)
    }
}

fn text(usage: &Usage) -> String {
    let row = |name: String, count: String, bytes: Bytes| {
        let mut row = vec![name, right(count)];
        row.extend(bytes.cells());
        row
    };
    let mut rows = vec![vec![
        "MACHINE / DISK / SNAPSHOT".to_owned(),
        right("SNAPSHOTS"),
        right("LOGICAL"),
        right("ALLOCATED"),
        right("UNIQUE"),
        "LAST PROVEN".to_owned(),
    ]];
    for machine in &usage.machines {
        let count: usize = machine.disks.iter().map(|disk| disk.snapshot_count).sum();
        let mut of_machine = row(machine.machine.to_string(), count.to_string(), machine.bytes);
        of_machine.push(machine.proven_ms.map_or_else(|| "never".to_owned(), date));
        rows.push(of_machine);
        for disk in &machine.disks {
            rows.push(row(format!("  {}", disk.disk), disk.snapshot_count.to_string(), disk.bytes));
            for one in disk.snapshots.iter().flatten() {
                let name = format!("    {}  {}", date(one.committed_ms), one.snapshot);
                rows.push(row(name, String::new(), one.bytes));
            }
        }
        if machine.trash_bytes > 0 {
            let (allocated_bytes, unique_bytes) = (machine.trash_bytes, machine.trash_bytes);
            let bytes = Bytes { logical_bytes: 0, allocated_bytes, unique_bytes };
            rows.push(row("  in the trash".into(), String::new(), bytes));
        }
    }
    let mirrored = match usage.mirrored_bytes {
        0 => String::new(),
        bytes => format!("{} of hash tables of other servers' backups\n", amount(bytes)),
    };
    let free = format!("{} of {} free", amount(usage.free_bytes), amount(usage.total_bytes));
    let alarms = usage.machines.iter().filter_map(|machine| machine.alarm.as_ref());
    let alarms: String = alarms.map(|alarm| format!("{alarm}\n")).collect();
    format!("{}{alarms}{mirrored}{free}\n", table(&rows))
}
