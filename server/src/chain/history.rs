//! The runs of one machine as a value: those that count, those in the trash, and the chains that go through both.
//!
//! A run in the trash has no snapshots for anybody, but its images stay links of the chains above them until it is purged.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, OnceLock},
};

use janus_proto::ids::{BackupId, DiskId, SnapshotId};

use super::{Held, Run, TrashRecord, TrashedRun, clocks, merge::Intent};

/// All runs of one machine on this server, oldest first.
#[derive(Debug, Clone, Default)]
pub struct History {
    runs: BTreeMap<u64, Arc<Run>>,
    trash: BTreeMap<u64, TrashedRun>,
    /// Of runs and trash.
    links: BTreeMap<SnapshotId, Held>,
    heads: BTreeMap<DiskId, SnapshotId>,
    /// Times of runs that a clock has dated wrongly, by their numbers. Found when they are asked for.
    moved: OnceLock<BTreeMap<u64, i64>>,
}

impl History {
    /// Takes a run in. Runs may come in any order.
    pub fn add(&mut self, run: Arc<Run>) {
        for held in Held::all(&run) {
            let snapshot = held.snapshot().clone();
            self.links.insert(snapshot.id, held);
            let newest =
                self.head(&snapshot.disk).is_none_or(|head| head.run.sequence <= run.sequence);
            if newest {
                self.heads.insert(snapshot.disk, snapshot.id);
            }
        }
        self.moved = OnceLock::new();
        self.runs.insert(run.sequence, run);
    }

    /// Takes a run of the trash in.
    pub fn add_trashed(&mut self, trashed: TrashedRun) {
        self.moved = OnceLock::new();
        self.links.extend(Held::all(&trashed.run).map(|held| (held.snapshot().id, held)));
        self.trash.insert(trashed.run.sequence, trashed);
    }

    /// Moves a run to the trash.
    pub fn drop_run(&mut self, backup: BackupId, record: TrashRecord) {
        let Some(sequence) = self.live_run(backup).map(|run| run.sequence) else { return };
        if let Some(run) = self.runs.remove(&sequence) {
            self.trash.insert(sequence, TrashedRun { run, record });
            self.reindex();
        }
    }

    /// Moves a run back from the trash.
    pub fn bring_back(&mut self, backup: BackupId) {
        let Some(sequence) = self.trashed_run(backup).map(|trashed| trashed.run.sequence) else {
            return;
        };
        if let Some(trashed) = self.trash.remove(&sequence) {
            self.runs.insert(sequence, trashed.run);
            self.reindex();
        }
    }

    /// Takes a merge in whose chain can be opened again: the link is nobody's parent any more.
    pub fn switch(&mut self, intent: &Intent) {
        if let (Some(run), _) = intent.changed_runs(self) {
            self.replace(run);
            self.reindex();
        }
    }

    /// Takes a link out that a finished merge has removed.
    pub fn clear_away(&mut self, intent: &Intent) {
        if let (_, Some(run)) = intent.changed_runs(self) {
            self.replace(run);
            self.trash.retain(|_, trashed| !trashed.run.snapshots.is_empty());
            self.reindex();
        }
    }

    fn replace(&mut self, run: Run) {
        if let Some(known) = self.runs.get_mut(&run.sequence) {
            *known = Arc::new(run);
        } else if let Some(known) = self.trash.get_mut(&run.sequence) {
            known.run = Arc::new(run);
        }
    }

    /// Notes that the purge of a run has begun.
    pub fn purging(&mut self, backup: BackupId) {
        for trashed in self.trash.values_mut().filter(|trashed| trashed.run.backup == backup) {
            trashed.record.purging = true;
        }
    }

    /// Notes that a run of the trash may be purged now.
    pub fn due(&mut self, backup: BackupId) {
        for trashed in self.trash.values_mut().filter(|trashed| trashed.run.backup == backup) {
            trashed.record.purge_not_before_ms = 0;
        }
    }

    /// A disk's newest snapshot that is not in the trash.
    pub fn head(&self, disk: &DiskId) -> Option<&Held> {
        self.links.get(self.heads.get(disk)?)
    }

    /// A snapshot by its id; those in the trash are none.
    pub fn snapshot(&self, id: SnapshotId) -> Option<&Held> {
        self.link(id).filter(|held| self.is_live(held.run.sequence))
    }

    /// A link of a chain by its id, be it in the trash.
    pub fn link(&self, id: SnapshotId) -> Option<&Held> {
        self.links.get(&id)
    }

    /// True when the run of this number is not in the trash.
    pub fn is_live(&self, sequence: u64) -> bool {
        self.runs.contains_key(&sequence)
    }

    /// What builds on a link.
    pub fn children(&self, id: SnapshotId) -> Vec<Held> {
        let is_child = |held: &&Held| held.snapshot().parent == Some(id);
        self.links.values().filter(is_child).cloned().collect()
    }

    /// All links, also those in the trash.
    pub fn links(&self) -> impl Iterator<Item = &Held> {
        self.links.values()
    }

    /// True when a manifest is missing that others build on.
    pub fn lacks_links(&self) -> bool {
        let mut parents = self.links.values().filter_map(|held| held.snapshot().parent);
        parents.any(|parent| !self.links.contains_key(&parent))
    }

    /// All links, also those in the trash, in the order of their runs: a parent before its children.
    pub fn links_oldest_first(&self) -> Vec<&Held> {
        let mut links: Vec<&Held> = self.links.values().collect();
        links.sort_by_key(|held| held.run.sequence);
        links
    }

    /// All snapshots, newest run first.
    pub fn newest_first(&self) -> impl Iterator<Item = Held> + '_ {
        self.runs.values().rev().flat_map(Held::all)
    }

    /// A committed run, be it in the trash: its id is not free, and what was left of it when it was open can go.
    pub fn run(&self, backup: BackupId) -> Option<&Arc<Run>> {
        self.live_run(backup).or_else(|| Some(&self.trashed_run(backup)?.run))
    }

    /// A run that is not in the trash.
    pub fn live_run(&self, backup: BackupId) -> Option<&Arc<Run>> {
        self.runs.values().rev().find(|run| run.backup == backup)
    }

    /// A run in the trash.
    pub fn trashed_run(&self, backup: BackupId) -> Option<&TrashedRun> {
        self.trash.values().find(|trashed| trashed.run.backup == backup)
    }

    /// The trash, oldest run first.
    pub fn trashed(&self) -> impl Iterator<Item = &TrashedRun> {
        self.trash.values()
    }

    /// The newest run that is not in the trash.
    pub fn newest(&self) -> Option<&Arc<Run>> {
        self.runs.values().next_back()
    }

    /// When a run was committed, as far as the order of all runs, also those in the trash, lets that be believed: ascends with
    /// their numbers.
    pub fn time_of(&self, run: &Run) -> i64 {
        self.moved().get(&run.sequence).copied().unwrap_or(run.committed_ms)
    }

    /// Runs whose times aren't those of their manifests.
    pub fn moved(&self) -> &BTreeMap<u64, i64> {
        self.moved.get_or_init(|| {
            let trashed = self.trash.values().map(|trashed| &trashed.run);
            let all = self.runs.values().chain(trashed);
            clocks::corrected(&all.map(|run| (run.sequence, run.committed_ms)).collect())
        })
    }

    /// Highest use counter of all runs.
    pub fn use_counter(&self) -> u64 {
        let trashed = self.trash.values().map(|trashed| &trashed.run);
        self.runs.values().chain(trashed).map(|run| run.use_counter).max().unwrap_or(0)
    }

    /// The newest run, be it in the trash: no later one has a lower number.
    pub fn last(&self) -> Option<&Arc<Run>> {
        let trashed = self.trash.values().next_back().map(|trashed| &trashed.run);
        self.newest().into_iter().chain(trashed).max_by_key(|run| run.sequence)
    }

    /// The chain that ends in `id`, newest first, through the trash; `None` when a link is missing.
    pub fn chain(&self, id: SnapshotId) -> Option<Vec<Held>> {
        let mut chain = vec![self.link(id)?.clone()];
        let mut seen = HashSet::from([id]);
        while let Some(parent) = chain[chain.len() - 1].snapshot().parent {
            // A manifest that names itself as an ancestor must not keep us here.
            if !seen.insert(parent) {
                return None;
            }
            chain.push(self.link(parent)?.clone());
        }
        Some(chain)
    }

    fn reindex(&mut self) {
        self.moved = OnceLock::new();
        self.links.clear();
        self.heads.clear();
        for trashed in self.trash.values() {
            self.links.extend(Held::all(&trashed.run).map(|held| (held.snapshot().id, held)));
        }
        for run in std::mem::take(&mut self.runs).into_values() {
            self.add(run);
        }
    }
}
