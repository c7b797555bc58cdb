//! What is missing of a machine's chains, by the names of files alone: pure.
//!
//! A missing image costs its own blocks; a missing table or manifest all snapshots above it, since nobody knows what
//! their blocks should be. What lies below is as it was.

use std::collections::{BTreeMap, HashSet};

use janus_proto::{
    ids::{DiskId, SnapshotId},
    show::date,
};
use serde::Serialize;

use super::{Held, History, Snapshot, stub};

/// A snapshot that can't be read, or not as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// The snapshot.
    pub snapshot_id: SnapshotId,
    /// Its disk.
    pub disk_id: DiskId,
    /// Unix milliseconds of its commit.
    pub committed_ms: i64,
    /// What its chain lacks, oldest first.
    pub missing: Vec<Missing>,
}

/// Something that a chain lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Missing {
    /// An image, relative to the machine's folder.
    Image(String),
    /// A table, relative to the machine's folder.
    Table(String),
    /// The manifest that names this snapshot.
    Manifest(SnapshotId),
}

impl Gap {
    /// True when what other images hold can be restored.
    pub fn is_partly_readable(&self) -> bool {
        self.missing.iter().all(|missing| matches!(missing, Missing::Image(_)))
    }

    /// For people, without the machine.
    pub fn describe(&self) -> String {
        let missing: Vec<String> = self.missing.iter().map(Missing::describe).collect();
        let how =
            if self.is_partly_readable() { "can be read in part only" } else { "can't be read" };
        let (id, disk, at) = (self.snapshot_id, &self.disk_id, date(self.committed_ms));
        format!("snapshot {id} of disk {disk} ({at}) {how}: {}", missing.join(", "))
    }
}

impl Missing {
    fn describe(&self) -> String {
        match self {
            Self::Image(name) => format!("image {name} is missing"),
            Self::Table(name) => format!("table {name} is missing"),
            Self::Manifest(id) => format!("the manifest of snapshot {id} is missing"),
        }
    }
}

/// Whose own files are missing, and which snapshots lack something for it; both oldest first.
#[derive(Debug, Clone, Default)]
pub struct Gaps {
    /// Links without their image or table, those in the trash too.
    pub links: Vec<Held>,
    /// Snapshots.
    pub snapshots: Vec<Gap>,
}

/// Finds what is missing. `there` has the files of the machine, relative to its folder.
pub fn find(history: &History, there: &HashSet<String>) -> Gaps {
    let mut gaps = Gaps::default();
    let mut lacking: BTreeMap<SnapshotId, Vec<Missing>> = BTreeMap::new();
    for held in history.links_oldest_first() {
        let snapshot = held.snapshot();
        let mut missing = match snapshot.parent {
            Some(parent) if history.link(parent).is_none() => vec![Missing::Manifest(parent)],
            Some(parent) => lacking.get(&parent).cloned().unwrap_or_default(),
            None => Vec::new(),
        };
        let own = own_missing(snapshot, there);
        if !own.is_empty() {
            gaps.links.push(held.clone());
            missing.extend(own);
        }
        if missing.is_empty() {
            continue;
        }
        lacking.insert(snapshot.id, missing.clone());
        if history.is_live(held.run.sequence) {
            gaps.snapshots.push(Gap {
                snapshot_id: snapshot.id,
                disk_id: snapshot.disk.clone(),
                committed_ms: held.run.committed_ms,
                missing,
            });
        }
    }
    gaps
}

fn own_missing(snapshot: &Snapshot, there: &HashSet<String>) -> Vec<Missing> {
    let mut missing = Vec::new();
    if !there.contains(&snapshot.image) && !there.contains(&stub::name(&snapshot.image)) {
        missing.push(Missing::Image(snapshot.image.clone()));
    }
    if !there.contains(&snapshot.table) {
        missing.push(Missing::Table(snapshot.table.clone()));
    }
    missing
}
