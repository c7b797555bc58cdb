//! Purges: runs of the trash whose time has come go for good, link by link.
//!
//! A link without children is removed. One with a child is merged into it: oldest first, so that each block is moved once
//! however many links go. What can't go now waits, with a reason, and the chain is as readable as before. Purges of a machine
//! take turns; backups, restores and drops go on meanwhile.
//!
//! Where the file system doesn't share blocks, a link's image changes while chains through it are open. That is right for
//! all that were opened through the child, sessions too, since the child covers what changes; whoever opened the link
//! without the child (a restore that began before the link was dropped) is waited for. What nothing builds on waits for
//! restores, too: another server may be filling a stub from it.

use std::fmt;

use janus_proto::{
    ids::{BackupId, MachineKey, SnapshotId},
    show::amount,
};
use tokio_util::sync::CancellationToken;

use super::{Change, Machine, RunError, Runs, now_ms};
use crate::{
    audit::{Action, Event, Who},
    chain::{
        Held, Snapshot, TrashedRun,
        health::Damage,
        merge::{Intent, MergeError, Moved, Pair, Way},
    },
};

/// For manifests, intents and the file system's own needs.
pub(super) const SLACK_BYTES: u64 = 1 << 20;

/// How a purge goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PurgeOptions {
    /// Runs whose time came before this (Unix milliseconds) go. `i64::MAX`: all.
    pub now_ms: i64,
    /// Free space that must be left; what needs more waits.
    pub reserve_bytes: u64,
    /// Never share blocks between files, even where the file system can.
    pub copy: bool,
}

/// What a purge did.
#[derive(Debug, Clone, Default)]
pub struct PurgeReport {
    /// Runs that are gone for good.
    pub purged: Vec<BackupId>,
    /// Links that were merged into a child.
    pub merged: usize,
    /// What was moved for that.
    pub moved: Moved,
    /// Links whose time has come but that stay for now.
    pub waiting: Vec<(SnapshotId, Wait)>,
}

impl PurgeReport {
    /// Adds what a later purge did; what waits is what still does.
    pub fn add(&mut self, later: Self) {
        self.purged.extend(later.purged);
        self.merged += later.merged;
        self.moved += later.moved;
        self.waiting = later.waiting;
    }
}

/// Why a link stays for now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wait {
    /// A manifest of the machine can't be read: what it names may build on the link.
    Incomplete,
    /// More than one image builds on it, and blocks can't be shared here.
    Children(usize),
    /// It is a stub, and the image that builds on it lacks something too.
    Stub,
    /// The image that builds on it is damaged: merging would lose which of its blocks are.
    Damaged {
        /// Whose image that is.
        child: SnapshotId,
    },
    /// Somebody reads it.
    Opened,
    /// Merging would leave less than the reserve.
    Space {
        /// Bytes that it takes before it frees any.
        needed_bytes: u64,
        /// Free bytes that it may take: a reserve must be left.
        free_bytes: u64,
    },
    /// It was tried.
    Failed(String),
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Incomplete => f.write_str(
                "a manifest of this machine is damaged (*.damaged): what it names may build on this",
            ),
            Self::Children(count) => write!(f, "{count} images build on it: all but one must go first"),
            Self::Stub => f.write_str("it is a stub that isn't full, and what builds on it needs the rest"),
            Self::Damaged { child } => write!(
                f,
                "the image of snapshot {child}, which builds on it, is damaged: until that is whole or gone they can't be merged"
            ),
            Self::Opened => f.write_str("a restore or another server still reads it"),
            Self::Space { needed_bytes, free_bytes } => write!(
                f,
                "merging it takes {} before it frees any, {} may be taken: make room",
                amount(*needed_bytes),
                amount(*free_bytes)
            ),
            Self::Failed(error) => f.write_str(error),
        }
    }
}

impl From<MergeError> for Wait {
    fn from(error: MergeError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<RunError> for Wait {
    fn from(error: RunError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl Runs {
    /// Purges the runs of a machine whose time has come: their images are merged into their children or removed.
    ///
    /// Blocks, maybe for minutes; ends soon when `stop` is cancelled, and goes on from there next time.
    pub fn purge_due(
        &self,
        key: &MachineKey,
        options: &PurgeOptions,
        stop: &CancellationToken,
    ) -> PurgeReport {
        let Some(machine) = self.machine(key) else { return PurgeReport::default() };
        let _merging = machine.take_merging();
        let report = PurgeReport::default();
        let mut purge = Purge { runs: self, machine: &machine, options, stop, report };
        purge.go();
        let report = purge.report;
        self.protect_files(&machine);
        if report.merged > 0 || !report.purged.is_empty() {
            self.look_again(&machine);
        }
        report
    }

    /// What damage keeps of a dropped run from its purge, however often that is tried; empty while its time hasn't come.
    pub fn damage_above(&self, machine: &Machine, trashed: &TrashedRun) -> Vec<(SnapshotId, Wait)> {
        if !trashed.record.purging && trashed.record.purge_not_before_ms > now_ms() {
            return Vec::new();
        }
        let waits = |snapshot: &Snapshot| {
            let children = machine.history(|history| history.children(snapshot.id));
            Some((snapshot.id, damaged(machine, taker(&children)?)?))
        };
        trashed.run.snapshots.iter().filter_map(waits).collect()
    }

    /// Lets decided merges happen that are not finished: nobody can open their chains before.
    pub(super) fn finish_switches(&self, machine: &Machine) -> Result<(), RunError> {
        while let Some(intent) = machine.unswitched() {
            let _files = machine.change_files();
            if machine.unswitched().as_ref() != Some(&intent) {
                continue;
            }
            self.store.save_intent(&machine.key, &intent)?;
            let child = machine.history(|history| {
                let run = intent.changed_runs(history).0?;
                let in_trash = !history.is_live(run.sequence);
                Some((run, in_trash))
            });
            let known = child.as_ref().map(|(run, in_trash)| (run, *in_trash));
            self.store.switch(&machine.key, &intent, known)?;
            machine.switched_now(&intent);
            if let Some((run, false)) = child {
                let _ = self.changes.send(Change::Committed(run.into()));
            }
        }
        Ok(())
    }

    /// Removes what finished merges have left.
    fn clear_away(&self, machine: &Machine) -> Result<(), RunError> {
        while let Some(intent) = machine.unfinished() {
            // The machine's file is written by starts too.
            let _turn = machine.take_turn();
            let rest = machine.history(|history| intent.changed_runs(history).1);
            let counters = machine.counters();
            let counters = rest.as_ref().map_or(counters, |run| counters.after(run));
            self.store.clear_away(&machine.key, &intent, rest.as_ref(), counters)?;
            machine.set_counters(counters);
            machine.finished_now(&intent);
        }
        Ok(())
    }
}

/// Which of a link's children takes it in.
fn taker(children: &[Held]) -> Option<&Held> {
    children.iter().min_by_key(|held| held.run.sequence)
}

/// Whether what is known of the image that would take a link in keeps it from that.
fn damaged(machine: &Machine, child: &Held) -> Option<Wait> {
    let child = child.snapshot();
    machine.health().damage(child).map(|_| Wait::Damaged { child: child.id })
}

/// One purge of one machine.
struct Purge<'a> {
    runs: &'a Runs,
    machine: &'a Machine,
    options: &'a PurgeOptions,
    stop: &'a CancellationToken,
    report: PurgeReport,
}

impl Purge<'_> {
    fn go(&mut self) {
        if self.due_links().is_empty() && self.machine.unfinished().is_none() {
            return;
        }
        let readable =
            self.machine.check_history().map_err(|fault| Wait::Failed(fault.to_string()));
        let hindrance = match readable.and_then(|()| self.tidy()) {
            Err(wait) => Some(wait),
            Ok(()) => self.machine.is_incomplete().then_some(Wait::Incomplete),
        };
        if let Some(wait) = hindrance {
            let due = self.due_links();
            let waiting = due.iter().map(|held| (held.snapshot().id, wait.clone()));
            self.report.waiting = waiting.collect();
            return;
        }
        while let Some((link, children)) = self.next() {
            if self.stop.is_cancelled() {
                return;
            }
            let snapshot = link.snapshot();
            let taken = self.take_out(&link, &children);
            if taken.is_ok() {
                // It has freed some.
                self.report.waiting.retain(|(_, wait)| !matches!(wait, Wait::Space { .. }));
            }
            if let Err(wait) = taken {
                // It stays so until somebody acts: whoever reads the log hears of it, but once.
                match wait {
                    Wait::Damaged { .. } if self.machine.is_new_hindrance(snapshot.id) => {
                        tracing::warn!(machine = %self.machine.key, image = snapshot.image, %wait, "a dropped image can't be purged: see `janus-server trash list`");
                    }
                    _ => {
                        tracing::info!(machine = %self.machine.key, image = snapshot.image, %wait, "a dropped image stays for now");
                    }
                }
                self.report.waiting.push((snapshot.id, wait));
                // What is decided comes first: the links above it are not what they will be.
                if self.machine.unfinished().is_some() {
                    return;
                }
            }
        }
    }

    /// The link to take out next, and its children: first what nothing builds on, newest first, then the oldest.
    fn next(&self) -> Option<(Held, Vec<Held>)> {
        let waits =
            |held: &Held| self.report.waiting.iter().any(|(id, _)| *id == held.snapshot().id);
        let due = self.due_links().into_iter().filter(|held| !waits(held));
        let children = |held: &Held| self.machine.history(|h| h.children(held.snapshot().id));
        let mut links: Vec<_> = due.map(|held| (children(&held), held)).collect();
        let leaf = links.iter().rposition(|(children, _)| children.is_empty());
        let chosen = leaf.or_else(|| (!links.is_empty()).then_some(0))?;
        let (children, link) = links.swap_remove(chosen);
        Some((link, children))
    }

    /// Links of runs whose time has come, oldest first.
    fn due_links(&self) -> Vec<Held> {
        let is_due = |trashed: &TrashedRun| {
            trashed.record.purging || trashed.record.purge_not_before_ms <= self.options.now_ms
        };
        // A locked run doesn't get into the trash; should one be there, it stays.
        let (guarded, now) = (self.machine.guarded(), self.runs.now());
        let is_locked = |trashed: &&TrashedRun| guarded.lock_of(trashed.run.backup, now).is_some();
        let trashed = self.machine.trashed();
        let due = trashed.iter().filter(|trashed| is_due(trashed) && !is_locked(trashed));
        due.flat_map(|trashed| Held::all(&trashed.run)).collect()
    }

    fn take_out(&mut self, link: &Held, children: &[Held]) -> Result<(), Wait> {
        // What stays is protected again at the end.
        for held in children.iter().chain([link]).filter(|_| self.has_locks()) {
            self.runs.set_immutable(self.machine, held, false);
        }
        let Some(child_held) = taker(children) else {
            // Its space wouldn't come free, and who reads it may have to open it again.
            if self.machine.is_read(link.snapshot().id) {
                return Err(Wait::Opened);
            }
            self.begin(link)?;
            return self.conclude(link, Intent::remove(link.snapshot().clone()));
        };
        let folder = self.runs.store.machine_folder(&self.machine.key);
        let storage = self.runs.store.storage();
        if self.lacking_without(link, children) {
            return Err(Wait::Stub);
        }
        let (link_snapshot, child) = (link.snapshot(), child_held.snapshot());
        let pair = Pair { storage, folder: &folder, link: link_snapshot, child };
        let way = self.way(&pair, children.len())?;
        // All that is copied is compared first, so that it would end at the damage each time. What is shared isn't read.
        if way == Way::InPlace
            && let Some(wait) = damaged(self.machine, child_held)
        {
            return Err(wait);
        }
        self.begin(link)?;
        let stop = || self.stop.is_cancelled();
        let prepared = pair.prepare(way, &stop);
        let (switch, moved) = prepared.inspect_err(|error| self.note_met(child_held, error))?;
        self.runs.note_merge(self.machine, link, child_held);
        let intent = Intent::switch(link.snapshot().clone(), switch, children.len() > 1);
        self.conclude(link, intent)?;
        tracing::info!(
            machine = %self.machine.key, image = pair.link.image, into = pair.child.image, ?way,
            copied = moved.copied_bytes, shared = moved.shared_bytes, "image merged"
        );
        self.report.merged += 1;
        self.report.moved += moved;
        Ok(())
    }

    /// Damage that a merge has met is known from then on.
    fn note_met(&self, child: &Held, error: &MergeError) {
        if let MergeError::BlockDamaged { block, .. } = error {
            let mut damage = Damage::default();
            damage.blocks.insert(*block..*block + 1);
            self.runs.note_damage(child, &damage);
        }
    }

    fn has_locks(&self) -> bool {
        !self.machine.guarded().locks.is_empty()
    }

    /// True when one of the children lacks what the link does.
    fn lacking_without(&self, link: &Held, children: &[Held]) -> bool {
        let health = self.machine.health();
        let Some(missing) = health.missing(link.snapshot()) else { return false };
        let folder = self.runs.store.machine_folder(&self.machine.key);
        let storage = self.runs.store.storage();
        let lacks = |child: &Held| {
            !health.missing_through(storage, &folder, child, missing.clone()).is_empty()
        };
        children.iter().any(lacks)
    }

    /// How to merge, if it can be done now.
    fn way(&self, pair: &Pair<'_>, children: usize) -> Result<Way, Wait> {
        let way = match !self.options.copy && pair.can_clone()? {
            true => Way::Clone,
            false => Way::InPlace,
        };
        if way == Way::InPlace && children > 1 {
            return Err(Wait::Children(children));
        }
        let needed_bytes = pair.needed_bytes(way)? + SLACK_BYTES;
        let (free_bytes, _) =
            self.runs.store.space().map_err(|error| Wait::Failed(error.to_string()))?;
        let free_bytes = free_bytes.saturating_sub(self.options.reserve_bytes);
        if free_bytes < needed_bytes {
            return Err(Wait::Space { needed_bytes, free_bytes });
        }
        if way == Way::InPlace && self.machine.is_opened_without(pair.link.id, pair.child.id) {
            return Err(Wait::Opened);
        }
        Ok(way)
    }

    /// Makes it durable that the link's own snapshot is gone for good.
    fn begin(&self, link: &Held) -> Result<(), Wait> {
        let _files = self.machine.change_files();
        let trashed = self.machine.trashed_run(link.run.backup);
        let gone = || Wait::Failed("it was brought back from the trash".to_owned());
        let mut trashed = trashed.ok_or_else(gone)?;
        if !trashed.record.purging {
            trashed.record.purging = true;
            let saved = self.runs.store.save_trash_record(&trashed.run, &trashed.record);
            saved.map_err(|error| Wait::Failed(error.to_string()))?;
            self.machine.purging_now(link.run.backup);
        }
        Ok(())
    }

    fn conclude(&mut self, link: &Held, intent: Intent) -> Result<(), Wait> {
        self.machine.decided(intent);
        self.finish()?;
        let backup = link.run.backup;
        if self.machine.trashed_run(backup).is_none() {
            self.report.purged.push(backup);
            let event = Event::new(Action::Purge).of_run(&self.machine.key, backup);
            self.runs.note(&Who::server(), event);
        }
        Ok(())
    }

    fn finish(&self) -> Result<(), Wait> {
        self.runs.finish_switches(self.machine)?;
        Ok(self.runs.clear_away(self.machine)?)
    }

    /// Finishes what an earlier purge has begun, and removes what it had not.
    fn tidy(&self) -> Result<(), Wait> {
        self.finish()?;
        let removed = self.runs.store.remove_partials(&self.machine.key);
        removed.map_err(|error| Wait::Failed(error.to_string()))
    }
}
