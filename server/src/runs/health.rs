//! What is known of the images of all machines: opened with it, told to every janus, kept on disk.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use janus_proto::{
    ids::{MachineKey, SnapshotId},
    pb,
};

use super::{ActiveRun, Change, Machine, RunError, Runs, lock, now_ms};
use crate::chain::{
    Held, Run,
    health::{Damage, ImageHealth, OpenCheck},
    opened::{OpenError, OpenedSnapshot, Salvage, open_table},
    ranges::BlockRanges,
    store::OpenRun,
    stub,
    table::{Table, TableStack},
};
use crate::session::{Session, SessionError};

/// Snapshots told of in one change, so that it fits a message.
const MOST_TOLD: usize = 500;

/// Lost blocks whose image is looked for.
const MOST_BLAMED: usize = 1 << 16;

/// When what is known gets into its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// At once.
    Now,
    /// With the next change, or by [`Runs::save_health`].
    Later,
}

impl Runs {
    /// A snapshot as the catalog shows it.
    pub fn to_wire(&self, held: &Held, server_id: &str) -> pb::Snapshot {
        let machine = self.machine(&held.run.machine);
        let id = held.snapshot().id;
        let (damaged_blocks, verified_ms) =
            machine.as_ref().map_or((0, 0), |machine| machine.health_of(id));
        let (missing_blocks, proven_ms) = machine
            .as_ref()
            .map_or((0, 0), |machine| (machine.missing_blocks(id), machine.proven_ms(id)));
        let folder = self.store.relative_folder(&held.run.machine);
        let committed_ms =
            machine.map_or(held.run.committed_ms, |machine| machine.time_of(&held.run));
        let wire = held.to_wire(server_id, &folder, committed_ms);
        pb::Snapshot { damaged_blocks, verified_ms, missing_blocks, proven_ms, ..wire }
    }

    /// Opens a snapshot to build on it.
    ///
    /// # Errors
    /// When a file of its chain is missing or damaged, or was found to be.
    pub fn open_snapshot(&self, held: &Held) -> Result<OpenedSnapshot, OpenError> {
        self.open_chain(held, |machine, folder, chain| {
            let (health, storage) = (machine.health(), self.store.storage());
            let snapshot = held.snapshot().id;
            if let Some(reason) = health.unusable(chain) {
                return Err(OpenError::Unusable { snapshot, reason: reason.to_owned() });
            }
            let mut opened = OpenedSnapshot::open(storage, folder, chain)?;
            opened.damaged = health.of_chain(storage, folder, chain);
            Ok(opened)
        })
    }

    /// Opens a snapshot to read what is left of it.
    ///
    /// # Errors
    /// When a manifest or a table of its chain is missing or damaged.
    pub fn open_for_reading(&self, held: &Held) -> Result<OpenedSnapshot, OpenError> {
        self.open_chain(held, |_, folder, chain| {
            OpenedSnapshot::open_rest(self.store.storage(), folder, chain)
        })
    }

    /// Opens only the tables of some snapshots of a machine, with the blocks of each that are known to be lost; snapshots that
    /// are gone or can't be opened are left out. Tables of links that they share are opened once.
    pub fn open_tables(
        &self,
        machine: &Machine,
        ids: &[SnapshotId],
    ) -> Vec<(SnapshotId, TableStack, BlockRanges)> {
        // What is not finished shows as a chain that can't be opened; whoever reads blocks of it says so.
        let _ = self.finish_switches(machine);
        let _files = machine.keep_files();
        let (folder, health) = (self.store.machine_folder(&machine.key), machine.health());
        let storage = self.store.storage();
        let mut opened: BTreeMap<SnapshotId, Arc<Table>> = BTreeMap::new();
        let mut stack = |id: SnapshotId| -> Option<(SnapshotId, TableStack, BlockRanges)> {
            let chain = machine.snapshot(id).and_then(|_| machine.chain(id))?;
            let mut tables = Vec::with_capacity(chain.len());
            for held in &chain {
                let link = held.snapshot();
                let table = match opened.get(&link.id) {
                    Some(table) => table.clone(),
                    None => Arc::new(open_table(storage, &folder, link).ok()?),
                };
                opened.insert(link.id, table.clone());
                tables.push(table);
            }
            let stack = TableStack::new(tables, chain.first()?.snapshot().size_bytes).ok()?;
            let mut lost = health.of_chain(storage, &folder, &chain);
            lost.extend(&health.missing_of_chain(storage, &folder, &chain));
            Some((id, stack, lost))
        };
        ids.iter().filter_map(|id| stack(*id)).collect()
    }

    /// Opens the files of a chain while nothing changes their names.
    fn open_chain(
        &self,
        held: &Held,
        open: impl FnOnce(&Machine, &Path, &[Held]) -> Result<OpenedSnapshot, OpenError>,
    ) -> Result<OpenedSnapshot, OpenError> {
        let broken = OpenError::BrokenChain { snapshot: held.snapshot().id };
        let Some(machine) = self.machine(&held.run.machine) else { return Err(broken) };
        let switched = self.finish_switches(&machine).inspect_err(|error| {
            tracing::error!(%error, machine = %machine.key, "a merge can't be finished: snapshots of its chain can't be read");
        });
        // Between the steps of a merge images don't fit each other, and none of them is to blame.
        let note = |chain: &[Held], error: &OpenError| {
            if switched.is_ok() {
                self.note_unopened(chain, error);
            }
        };
        let _files = machine.keep_files();
        let id = held.snapshot().id;
        let chain = machine.snapshot(id).and_then(|_| machine.chain(id)).ok_or(broken)?;
        let folder = self.store.machine_folder(&held.run.machine);
        let opened = open(&machine, &folder, &chain).inspect_err(|error| note(&chain, error))?;
        opened.lost.iter().for_each(|(_, error)| note(&chain, error));
        machine.note_opened(opened.links());
        Ok(opened)
    }

    /// A link is about to be merged into this child: what is known of its blocks counts for the child's image then.
    pub(super) fn note_merge(&self, machine: &Machine, link: &Held, child: &Held) {
        let folder = self.store.machine_folder(&machine.key);
        let storage = self.store.storage();
        let merged = machine.health().of_merge(storage, &folder, link.snapshot(), child);
        self.change(machine, child, Keep::Now, |known| {
            let damage = std::mem::take(&mut known.damage);
            *known = merged;
            known.damage.extend(&damage);
        });
    }

    /// A file of a chain can't be opened: nothing is built on its image until a check says otherwise.
    fn note_unopened(&self, chain: &[Held], error: &OpenError) {
        let Some(machine) = chain.first().and_then(|held| self.machine(&held.run.machine)) else {
            return;
        };
        let folder = self.store.machine_folder(&machine.key);
        let is_about = |held: &&Held| {
            let snapshot = held.snapshot();
            error.is_about(&folder.join(&snapshot.image))
                || error.is_about(&folder.join(&snapshot.table))
        };
        let is_sure = error.is_damage() && !error.is_disk_failure();
        if let Some(held) = chain.iter().find(is_about).filter(|_| is_sure) {
            let damage = Damage { unusable: Some(error.to_string()), ..Damage::default() };
            self.note_damage(held, &damage);
        }
    }

    /// A reader found damage of this snapshot's own image.
    pub fn note_damage(&self, held: &Held, damage: &Damage) {
        let Some(machine) = self.machine(&held.run.machine) else { return };
        let image = held.snapshot().data_write;
        let mut known = machine.health().images.remove(&image).unwrap_or_default();
        let before = known.damage.clone();
        known.damage.extend(damage);
        if known.damage == before {
            return;
        }
        tracing::error!(machine = %machine.key, image = held.snapshot().image, blocks = damage.blocks.blocks(), reason = damage.unusable, "an image is damaged");
        self.change(&machine, held, Keep::Now, |known| {
            known.damage.extend(damage);
            // To be looked at as a whole soon.
            known.proven_ms = 0;
        });
    }

    /// Blocks of a snapshot are lost: notes them with the images that lost them. Of very many only the first; the image is
    /// checked as a whole soon. Images that can't be opened were noted when that was tried.
    pub fn note_lost(&self, opened: &OpenedSnapshot, lost: &BlockRanges) {
        let mut salvage = Salvage::new(opened);
        let mut by_image: BTreeMap<usize, Damage> = BTreeMap::new();
        for block in lost.iter().flatten().take(MOST_BLAMED) {
            if let Some(place) = salvage.to_blame(block) {
                by_image.entry(place).or_default().blocks.insert(block..block + 1);
            }
        }
        for (place, damage) in by_image {
            let Some(held) = opened.chain.get(place) else { continue };
            if opened.is_stub(place) {
                self.note_lacking(held, &damage.blocks);
            } else {
                self.note_damage(held, &damage);
            }
        }
    }

    /// Disks of a run were committed as stubs: notes what they lack.
    pub(super) fn note_stubs(&self, machine: &Machine, run: &Arc<Run>, open: &OpenRun) {
        let (storage, folder) = (self.store.storage(), self.store.machine_folder(&machine.key));
        let is_stub = |held: &Held| {
            open.disks.iter().any(|disk| disk.stub && disk.snapshot == held.snapshot().id)
        };
        for held in Held::all(run).filter(is_stub) {
            let missing = stub::all_blocks(storage, &folder, held.snapshot());
            self.change(machine, &held, Keep::Now, |known| known.missing = Some(missing));
        }
    }

    /// Blocks of a stub turned out not to be here: they are fetched again.
    fn note_lacking(&self, held: &Held, blocks: &BlockRanges) {
        let Some(machine) = self.machine(&held.run.machine) else { return };
        if machine.missing(held.snapshot()).is_some() {
            self.change(&machine, held, Keep::Later, |known| {
                if let Some(missing) = &mut known.missing {
                    missing.extend(blocks);
                }
            });
        }
    }

    /// A stub was filled further: of the blocks that were `looked` at it lacks these. What is here now is asked of nobody.
    pub fn note_filled(&self, held: &Held, looked: &BlockRanges, lacking: &BlockRanges) {
        let Some(machine) = self.machine(&held.run.machine) else { return };
        self.change(&machine, held, Keep::Now, |known| {
            // Others may have found more that is not here.
            let Some(missing) = &mut known.missing else { return };
            looked.iter().for_each(|range| missing.remove(range));
            missing.extend(lacking);
            let mut here = looked.clone();
            lacking.iter().for_each(|range| here.remove(range));
            here.iter().for_each(|range| known.damage.blocks.remove(range));
        });
    }

    /// Nobody has these blocks of what a stub lacks: the next backup is asked for them, and for no others.
    pub fn note_nobodys(&self, held: &Held, mut nobodys: BlockRanges, most_ranges: usize) {
        let Some(machine) = self.machine(&held.run.machine) else { return };
        nobodys.coarsen(most_ranges);
        self.change(&machine, held, Keep::Now, |known| known.damage.blocks = nobodys);
    }

    /// All blocks of a stub are here: it is one no more.
    pub fn note_full(&self, held: &Held) {
        let Some(machine) = self.machine(&held.run.machine) else { return };
        let now_ms = now_ms();
        self.change(&machine, held, Keep::Now, |known| {
            *known = ImageHealth { proven_ms: now_ms, ..ImageHealth::default() };
        });
    }

    /// The file of a stub is lost or damaged: so are all snapshots on it, as with any other image.
    pub fn note_stub_lost(&self, held: &Held, reason: &str) {
        let Some(machine) = self.machine(&held.run.machine) else { return };
        tracing::error!(machine = %machine.key, image = held.snapshot().image, reason, "a stub is lost");
        let damage = Damage::whole(held.snapshot(), reason);
        self.change(&machine, held, Keep::Now, |known| {
            *known = ImageHealth { damage, ..ImageHealth::default() };
        });
    }

    /// What a commit found in the heads of its sessions.
    pub(super) fn note_found(&self, machine: &Machine, run: &ActiveRun, error: &RunError) {
        let RunError::ChainDamaged { disk, blocks, reason } = error else { return };
        let sessions = run.sessions();
        let session = sessions.iter().find(|session| session.disk.disk == *disk);
        let Some(head) = session.and_then(|session| session.head()) else { return };
        tracing::debug!(machine = %machine.key, %disk, "noting damage");
        if blocks.is_empty() {
            let unusable = Some(reason.clone());
            self.note_damage(&head.held, &Damage { unusable, ..Damage::default() });
        } else {
            self.note_lost(head, blocks);
        }
    }

    /// Hashes of a session can't be read. When its head is damaged the run is given up, as by a commit that finds it: the
    /// client begins another one, which builds on something else.
    pub fn cannot_compare(&self, session: &Session, error: SessionError) -> RunError {
        let run = lock(&self.sessions).get(&session.disk.session).cloned();
        let machine = run.as_ref().and_then(|run| self.machine(&run.machine));
        let (Some(run), Some(machine), true) = (run, machine, error.is_head_damage()) else {
            return error.into();
        };
        let (disk, reason) = (session.disk.disk.clone(), error.to_string());
        let damaged = RunError::ChainDamaged { disk, blocks: BlockRanges::default(), reason };
        tracing::error!(error = %damaged, machine = %machine.key, backup_id = %run.backup, "a comparison found damage");
        let _turn = machine.take_turn();
        self.note_found(&machine, &run, &damaged);
        match machine.find(run.backup) {
            Some(_) => self.give_up(&machine, &run).err().unwrap_or(damaged),
            None => damaged,
        }
    }

    /// How far a check of an image is.
    pub fn note_progress(&self, held: &Held, check: OpenCheck) {
        if let Some(machine) = self.machine(&held.run.machine) {
            self.change(&machine, held, Keep::Later, |known| known.check = Some(check));
        }
    }

    /// All of an image was read and compared, beginning at this time, and what was `suspected` once more at the end. Other
    /// damage that is known by now was met after that.
    pub fn note_checked(&self, held: &Held, began_ms: i64, damage: Damage, suspected: &Damage) {
        let Some(machine) = self.machine(&held.run.machine) else { return };
        let keep = if damage.is_none() { Keep::Later } else { Keep::Now };
        if !damage.is_none() {
            tracing::error!(machine = %machine.key, image = held.snapshot().image, blocks = damage.blocks.blocks(), reason = damage.unusable, "a check found damage");
        }
        self.change(&machine, held, keep, |known| {
            let mut met = std::mem::take(&mut known.damage);
            suspected.blocks.iter().for_each(|range| met.blocks.remove(range));
            met.unusable = met.unusable.filter(|_| suspected.unusable.is_none());
            let missing = known.missing.take();
            *known = ImageHealth { proven_ms: began_ms, damage, check: None, missing };
            known.damage.extend(&met);
        });
    }

    fn change(
        &self,
        machine: &Machine,
        held: &Held,
        keep: Keep,
        change: impl FnOnce(&mut ImageHealth),
    ) {
        let image = held.snapshot().data_write;
        let _turn = machine.take_health_turn();
        let before = machine.health();
        let mut health = before.clone();
        let known = health.images.entry(image).or_default();
        let old = known.clone();
        change(known);
        let (is_new, mut is_damage) = (
            known.proven_ms != old.proven_ms,
            known.damage != old.damage || known.missing != old.missing,
        );
        let history = machine.history(Clone::clone);
        is_damage |= health.lacks_orphans(&history);
        if is_damage {
            health.tidy(&history);
            health.count(self.store.storage(), &self.store.machine_folder(&machine.key), &history);
        }
        self.keep(machine, health, if is_damage { Keep::Now } else { keep });
        if is_new || is_damage {
            let changed = history.newest_first().map(|held| held.snapshot().id).filter(|id| {
                before.snapshots.get(id) != machine.health_count(*id).as_ref()
                    || before.incomplete.get(id).copied().unwrap_or(0)
                        != machine.missing_blocks(*id)
                    || before.proven_ms(&history, *id) != machine.health_of(*id).1
            });
            self.tell_health(&machine.key, changed.collect());
        }
    }

    /// Files of these images are missing. To be followed by [`Self::look_again`].
    pub(super) fn note_missing(&self, machine: &Machine, found: Vec<(Held, Damage)>) {
        if found.is_empty() {
            return;
        }
        let _turn = machine.take_health_turn();
        let mut health = machine.health();
        for (held, damage) in found {
            let known = health.images.entry(held.snapshot().data_write).or_default();
            known.damage.extend(&damage);
            known.proven_ms = 0;
        }
        self.keep(machine, health, Keep::Later);
    }

    /// The machine has other snapshots than before: counts their damage again.
    pub fn look_again(&self, machine: &Machine) {
        let _turn = machine.take_health_turn();
        let mut health = machine.health();
        let lacks_orphans = || machine.history(|history| health.lacks_orphans(history));
        if health.is_whole() && !lacks_orphans() {
            return;
        }
        let history = machine.history(Clone::clone);
        let before = health.clone();
        health.tidy(&history);
        health.count(self.store.storage(), &self.store.machine_folder(&machine.key), &history);
        let counts =
            [&health, &before].map(|one| one.snapshots.keys().chain(one.incomplete.keys()));
        let differs = |id: &&SnapshotId| {
            before.snapshots.get(id) != health.snapshots.get(id)
                || before.incomplete.get(id) != health.incomplete.get(id)
        };
        let changed = counts.into_iter().flatten().filter(differs).copied().collect();
        self.keep(machine, health, Keep::Now);
        self.tell_health(&machine.key, changed);
    }

    /// Writes what is known and not written yet.
    pub fn save_health(&self) {
        for machine in self.machines().iter().filter(|machine| machine.is_health_unsaved()) {
            let _turn = machine.take_health_turn();
            self.keep(machine, machine.health(), Keep::Now);
        }
    }

    fn keep(&self, machine: &Machine, health: crate::chain::health::Health, keep: Keep) {
        let folder = self.store.machine_folder(&machine.key);
        let saved = keep == Keep::Now && {
            let saved = health.save(self.store.storage(), &folder, &machine.key);
            saved
                .inspect_err(
                    |error| tracing::warn!(%error, "what is known of the images can't be kept"),
                )
                .is_ok()
        };
        machine.set_health(health, saved);
    }

    pub(super) fn tell_health(&self, machine: &MachineKey, mut snapshots: Vec<SnapshotId>) {
        snapshots.sort_unstable();
        snapshots.dedup();
        for some in snapshots.chunks(MOST_TOLD) {
            let _ = self.changes.send(Change::Health(machine.clone(), some.to_vec()));
        }
    }

    /// The image to check next: one whose check was begun, else the one that was checked longest ago, unless that was
    /// after `before_ms`.
    pub fn next_to_check(&self, before_ms: i64, skip: &dyn Fn(&Held) -> bool) -> Option<Held> {
        let now = now_ms();
        let mut next: Option<((bool, i64, i64), Held)> = None;
        for machine in self.machines() {
            let health = machine.health();
            // What is known of a link that is being merged isn't kept: it would be the next one for ever.
            let is_full = |held: &Held| health.missing(held.snapshot()).is_none();
            let may_check = |held: &Held| machine.still_has(held) && is_full(held) && !skip(held);
            for held in machine.links().into_iter().filter(may_check) {
                let known = health.image(held.snapshot());
                let proven_ms = known.map_or(0, |known| known.proven_ms);
                // A clock that was set back must not keep an image from being checked.
                let proven_ms = if proven_ms > now { 0 } else { proven_ms };
                let is_open = known.is_some_and(|known| known.check.is_some());
                let rank = (!is_open, proven_ms, held.run.committed_ms);
                let is_due = is_open || proven_ms < before_ms;
                if is_due && next.as_ref().is_none_or(|(best, _)| rank < *best) {
                    next = Some((rank, held));
                }
            }
        }
        next.map(|(_, held)| held)
    }

    /// True while a client writes.
    pub fn is_busy(&self) -> bool {
        lock(&self.sessions).values().any(|run| run.lease_left().is_some())
    }
}
