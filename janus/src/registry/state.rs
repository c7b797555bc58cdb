//! What one server has told of itself: a full state, replaced as a whole, then changes to it.

use std::collections::{BTreeMap, HashMap};

use janus_proto::{
    clock::unix_ms,
    ids::{DiskId, MachineKey, SnapshotId},
    pb,
};
use tokio::time::Instant;

use super::{
    sight::{Granted, Sight},
    snapshots::Snapshots,
};

/// Machines remembered for one server.
pub(super) const MAX_MACHINES: usize = 20_000;

/// Machines with damaged snapshots that are named for one server.
const MOST_DAMAGED: usize = 20;

/// Whether a server holds a chain of a machine, as far as is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Chain {
    /// Not reported: as if there were none.
    #[default]
    Absent,
    /// This janus sent a start there after the last report; until the server says otherwise it counts as used.
    Assumed,
    /// The server has said so.
    Present,
}

/// How one machine has used one server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Use {
    pub counter: u64,
    pub chain: Chain,
    /// Unix milliseconds since when a use is known.
    pub first_ms: i64,
    /// The server has said that it was never more than a start.
    pub is_unfinished: bool,
}

/// Version of a server's state. Sequences count within a stream.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Version {
    pub generation: String,
    pub epoch: u64,
    /// Which of its process' streams; 0: an older server doesn't say.
    pub stream: u64,
    pub sequence: u64,
}

impl Version {
    /// True when the process that says hello has opened a later stream before: its older one was only late.
    pub fn is_of_later_stream(&self, hello: &pb::ReportHello) -> bool {
        self.generation == hello.store_generation
            && self.epoch == hello.start_epoch
            && (1..self.stream).contains(&hello.stream)
    }
}

/// The parts of a server's state that a full report replaces.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub chains: HashMap<MachineKey, bool>,
    /// What was proven of machines there, of those that have chains.
    pub proofs: HashMap<MachineKey, pb::Proof>,
    /// Open alarms.
    pub alarms: HashMap<MachineKey, String>,
    pub snapshots: Snapshots,
}

impl Told {
    /// Folds a change in. Entries with ids that aren't valid are dropped: they could never be asked for.
    pub fn apply(&mut self, change: pb::StateChange) {
        for machine in change.machines {
            let Ok(key) = machine.machine.parse::<MachineKey>() else { continue };
            if self.chains.len() < MAX_MACHINES || self.chains.contains_key(&key) {
                match machine.proof {
                    Some(proof) => self.proofs.insert(key.clone(), proof),
                    None => self.proofs.remove(&key),
                };
                match machine.alarm {
                    alarm if alarm.is_empty() => self.alarms.remove(&key),
                    alarm => self.alarms.insert(key.clone(), shorten(&alarm)),
                };
                self.chains.insert(key, machine.has_chain);
            }
        }
        for removed in
            change.removed_snapshots.iter().filter_map(|id| id.parse::<SnapshotId>().ok())
        {
            self.snapshots.remove(removed);
        }
        for mut snapshot in change.snapshots {
            let Ok(id) = snapshot.snapshot_id.parse::<SnapshotId>() else { continue };
            // Seals are up to 4 KiB each and only of use to who restores, from the server itself.
            snapshot.client_seal = bytes::Bytes::new();
            self.snapshots.insert(id, snapshot);
        }
    }
}

/// One server's state.
#[derive(Debug, Default)]
pub(super) struct ServerState {
    pub uses: HashMap<MachineKey, Use>,
    pub told: Told,
    pub version: Version,
    /// The stream that may change this state; older ones are out.
    pub slot: u64,
    /// Full state under way.
    pub staged: Option<Told>,
    /// Last message of the stream; none while there is no stream.
    pub last_message: Option<Instant>,
    /// Generation of another store that reported under this name while this one did, and when it last did.
    pub rival: Option<(String, Instant)>,
    pub settings: Option<pb::SharedSettings>,
    pub vitals: Option<pb::Vitals>,
    pub urls: Vec<String>,
    /// What groups may do there; `None`: it hasn't told.
    pub granted: Option<Granted>,
    /// Unix milliseconds of the last message of any stream; 0: there was none.
    pub heard_ms: i64,
    /// The log says that it has more snapshots than are remembered.
    pub is_said_short: bool,
}

impl ServerState {
    /// Use counters only grow, whatever version they come from.
    pub fn raise(&mut self, machine: &MachineKey, counter: u64) {
        if self.uses.len() >= MAX_MACHINES && !self.uses.contains_key(machine) {
            return;
        }
        let entry = self.uses.entry(machine.clone()).or_default();
        if entry.counter == 0 && counter > 0 {
            entry.first_ms = unix_ms();
        }
        entry.counter = entry.counter.max(counter);
    }

    /// Takes counters and chains of a report.
    pub fn take_machines(&mut self, machines: &[pb::MachineReport]) {
        for report in machines {
            let Ok(machine) = report.machine.parse::<MachineKey>() else { continue };
            let known = self.uses.get(&machine).map_or(0, |used| used.counter);
            self.raise(&machine, report.use_counter);
            let Some(entry) = self.uses.get_mut(&machine) else { continue };
            entry.is_unfinished = report.never_committed;
            // A report from before our own start there says nothing about the chain it makes.
            if report.has_chain {
                entry.chain = Chain::Present;
            } else if report.use_counter >= known {
                entry.chain = Chain::Absent;
            }
        }
    }

    /// The full state is complete: what it doesn't name is gone.
    pub fn finish_full(&mut self) {
        let Some(told) = self.staged.take() else { return };
        for (machine, used) in &mut self.uses {
            if !told.chains.contains_key(machine) {
                used.chain = Chain::Absent;
            }
        }
        self.told = told;
    }

    /// Machines that have damaged snapshots here, or this one, by name.
    pub fn damaged(&self, sight: &Sight) -> Vec<pb::DamagedMachine> {
        let mut damaged: BTreeMap<&str, pb::DamagedMachine> = BTreeMap::new();
        let snapshots = self.snapshots(None, None).filter(|one| one.damaged_blocks > 0);
        for snapshot in snapshots.filter(|one| sight.sees_name(&one.machine)) {
            let entry = damaged.entry(&snapshot.machine).or_default();
            entry.machine.clone_from(&snapshot.machine);
            entry.snapshots += 1;
            entry.blocks = entry.blocks.max(snapshot.damaged_blocks);
            entry.newest |= self.told.snapshots.is_newest(snapshot);
        }
        damaged.into_values().take(MOST_DAMAGED).collect()
    }

    /// Snapshots here that lack blocks.
    pub fn incomplete(&self, sight: &Sight) -> u64 {
        let snapshots = self.snapshots(None, None).filter(|one| one.missing_blocks > 0);
        snapshots.filter(|one| sight.sees_name(&one.machine)).count() as u64
    }

    /// Snapshots of one machine, or one disk of it, or all.
    pub fn snapshots<'a>(
        &'a self,
        machine: Option<&'a MachineKey>,
        disk: Option<&'a DiskId>,
    ) -> impl Iterator<Item = &'a pb::Snapshot> {
        self.told.snapshots.values().filter(move |snapshot| {
            machine.is_none_or(|key| key.as_str() == snapshot.machine)
                && disk.is_none_or(|disk| disk.as_str() == snapshot.disk_id)
        })
    }
}

/// Longest alarm that is kept, in characters.
const LONGEST: usize = 1000;

fn shorten(text: &str) -> String {
    text.chars().take(LONGEST).collect()
}
