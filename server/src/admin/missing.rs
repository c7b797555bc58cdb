//! Snapshots that lack files, and what can't be read at all, as commands name them.

use std::{collections::BTreeSet, sync::Arc};

use janus_proto::ids::{MachineKey, SnapshotId};
use serde_json::{Value, json};

use super::Admin;
use crate::{
    chain::{Held, gaps::Gap},
    runs::Machine,
};

/// What was found missing.
pub(super) struct Missing {
    gaps: Vec<(MachineKey, Gap)>,
    /// Machines whose folders could not be listed, and why.
    unknown: Vec<(MachineKey, String)>,
    /// What can't be used.
    faults: Vec<String>,
}

impl Missing {
    /// Of all snapshots of these machines: of `only` one, or all.
    pub fn of_machines(
        admin: &Admin,
        machines: &[Arc<Machine>],
        only: Option<&MachineKey>,
    ) -> Self {
        let (mut gaps, mut unknown) = (Vec::new(), Vec::new());
        for machine in machines {
            let key = || machine.key.clone();
            if machine.check_history().is_err() {
                continue;
            }
            match admin.runs().gaps(machine) {
                Ok(found) => gaps.extend(found.snapshots.into_iter().map(|gap| (key(), gap))),
                Err(error) => unknown.push((key(), error.to_string())),
            }
        }
        Self { gaps, unknown, faults: admin.runs().faults(only) }
    }

    /// Of these snapshots, of `only` one machine or of all.
    pub fn of(admin: &Admin, snapshots: &[Held], only: Option<&MachineKey>) -> Self {
        let keys: BTreeSet<&MachineKey> = snapshots.iter().map(|held| &held.run.machine).collect();
        let machines: Vec<_> =
            keys.into_iter().filter_map(|key| admin.runs().machine(key)).collect();
        let wanted: BTreeSet<SnapshotId> =
            snapshots.iter().map(|held| held.snapshot().id).collect();
        let mut missing = Self::of_machines(admin, &machines, only);
        missing.gaps.retain(|(_, gap)| wanted.contains(&gap.snapshot_id));
        missing
    }

    /// True when all files are there, and can be read.
    pub fn is_empty(&self) -> bool {
        self.gaps.is_empty() && self.unknown.is_empty() && self.faults.is_empty()
    }

    /// A line for each.
    pub fn text(&self) -> String {
        let gaps = self.gaps.iter().map(|(key, gap)| format!("{key}: {}\n", gap.describe()));
        let unknown = self
            .unknown
            .iter()
            .map(|(key, error)| format!("{key}: whether files are missing is unknown: {error}\n"));
        let faults = self.faults.iter().map(|fault| format!("{fault}\n"));
        gaps.chain(unknown).chain(faults).collect()
    }

    /// A list of objects.
    pub fn json(&self) -> Value {
        let gaps = self.gaps.iter().map(|(key, gap)| {
            let readable = if gap.is_partly_readable() { "part" } else { "none" };
            json!({ "machine": key, "readable": readable, "gap": gap })
        });
        let unknown =
            self.unknown.iter().map(|(key, error)| json!({ "machine": key, "unknown": error }));
        let faults = self.faults.iter().map(|fault| json!({ "fault": fault }));
        gaps.chain(unknown).chain(faults).collect()
    }
}
