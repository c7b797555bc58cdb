//! Archives: copies of chosen runs in an object store or a folder, for the day when all servers are gone.
//!
//! What lies there is described in [`janus_proto::archive`]. A disk goes there as an image of what differs from the last archived
//! state of that disk, found by the tables of both, whatever chain it has here: runs in between need not be there. A part of an
//! image is computed, packed, and sent, unless one of its name, with its sum, and of its size is there: so what a killed archive
//! has sent is used by the next one, or removed. Everything here blocks, on a runtime of its own for the calls.

mod source;
mod upload;
mod verify;
mod write;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, TryLockError},
};

use janus_proto::{
    archive::{
        ArchiveError, Archived, DiskEntry, Manifest, Path, Place, Store,
        manifest::RunFacts,
        names::MachinePlace,
        runs::{self as archived_runs, Listed},
    },
    ids::{BackupId, DiskId, MachineKey, ServerId, SnapshotId},
    table::TableStack,
};
use tokio_util::sync::CancellationToken;

pub use self::{
    source::{choose, open_run},
    verify::Verified,
};
use crate::{
    carry::CarryError,
    chain::{Held, Run},
    config::Archive as Rule,
    runs::Runs,
    seed::{SeedError, Which},
};

/// One archive at a time: two could take each other's parts for what a killed one left.
static AT_WORK: Mutex<()> = Mutex::new(());

/// Objects of an archive, with their sizes.
type Objects = BTreeMap<Path, u64>;

/// What comes of a machine.
#[derive(Debug)]
pub enum Event<'a> {
    /// A run is there already.
    Here(&'a Manifest),
    /// A run was archived.
    Archived(&'a Manifest, &'a [Sent]),
    /// A run was not.
    Failed(&'a Run, &'a CarryError),
    /// A manifest there is no good.
    Damaged(&'a ArchiveError),
    /// Older runs were removed.
    Removed(usize),
}

/// What was sent of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// The disk.
    pub disk: DiskId,
    /// All of it, and why; else what differs from what is there.
    pub is_base: bool,
    /// Bytes that differ, in whole blocks.
    pub differing_bytes: u64,
    /// Bytes of objects that were there already.
    pub kept_bytes: u64,
}

/// How runs are archived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wish {
    /// Every run that is newer than what is there, not only the newest of each disk.
    pub all_runs: bool,
    /// New bases.
    pub full: bool,
}

/// An archive that is open.
pub struct Archive {
    runtime: tokio::runtime::Runtime,
    store: Store,
    own: ServerId,
    rule: Rule,
}

impl Archive {
    /// Opens the archive of a section of the settings, as the server `own`.
    ///
    /// # Errors
    /// When it can't be set up like this.
    pub fn open(rule: &Rule, own: &ServerId, stop: &CancellationToken) -> Result<Self, CarryError> {
        let place = rule.place();
        let place =
            place.map_err(|reason| ArchiveError::Setup { url: rule.url.clone(), reason })?;
        Self::at(&place, rule, own, stop)
    }

    /// The same at a place that isn't in the settings.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn at(
        place: &Place,
        rule: &Rule,
        own: &ServerId,
        stop: &CancellationToken,
    ) -> Result<Self, CarryError> {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(2).enable_all().build().map_err(SeedError::Threads)?;
        let store = {
            let _inside = runtime.enter();
            place.open(stop)?
        };
        Ok(Self { runtime, store, own: own.clone(), rule: rule.clone() })
    }

    /// Bytes of objects that were written.
    pub fn sent_bytes(&self) -> u64 {
        self.store.sent_bytes()
    }

    /// Bytes of objects that were read.
    pub fn received_bytes(&self) -> u64 {
        self.store.received_bytes()
    }

    /// Keeps others away; `None`: one is at work.
    pub fn lock() -> Option<MutexGuard<'static, ()>> {
        match AT_WORK.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The machines in it, of all servers or one.
    ///
    /// # Errors
    /// When the store can't be asked.
    pub fn machines(
        &self,
        server: Option<&ServerId>,
        machine: Option<&MachineKey>,
    ) -> Result<Vec<(ServerId, MachineKey)>, CarryError> {
        Ok(self.runtime.block_on(archived_runs::machines(&self.store, server, machine))?)
    }

    /// The runs of a machine that a server archived, the oldest first.
    ///
    /// # Errors
    /// When the store can't be asked.
    pub fn runs(&self, server: &ServerId, machine: &MachineKey) -> Result<Vec<Listed>, CarryError> {
        Ok(self.runtime.block_on(archived_runs::runs(&self.store, server, machine))?)
    }

    /// Archives runs of a machine. `hear` gets the bytes of a disk that are done and all, and answers whether to go on; `tell`
    /// hears what comes of each.
    ///
    /// # Errors
    /// When the store can't be asked, or it was stopped. What keeps one run away is told, and the others are archived.
    pub fn archive(
        &self,
        runs: &Arc<Runs>,
        machine: &MachineKey,
        which: &Which,
        wish: Wish,
        hear: &dyn Fn(u64, u64) -> bool,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), CarryError> {
        let place = MachinePlace::new(self.store.prefix(), &self.own, machine);
        let mut known = Vec::new();
        let mut has_damage = false;
        for listed in self.runs(&self.own, machine)? {
            match listed.manifest {
                Ok(manifest) => known.push(manifest),
                Err(error) => {
                    has_damage = true;
                    tell(Event::Damaged(&error));
                }
            }
        }
        let alone = which.alone();
        for run in self.chosen(runs, machine, which, wish, &known) {
            let id = run_id(&run);
            if let Some(there) = known.iter().find(|there| holds(there, id, &run, which)) {
                tell(Event::Here(there));
                continue;
            }
            match self.archive_run(runs, &run, (&place, alone), &known, which, wish, hear) {
                Ok((manifest, sent)) => {
                    tell(Event::Archived(&manifest, &sent));
                    known.push(manifest);
                }
                Err(CarryError::Stopped | CarryError::Archive(ArchiveError::Stopped)) => {
                    return Err(CarryError::Stopped);
                }
                Err(error) => tell(Event::Failed(&run, &error)),
            }
        }
        // What a manifest that can't be read needs isn't known.
        if !has_damage {
            self.clean(&place, &mut known, tell)?;
        }
        Ok(())
    }

    /// Runs that are to be archived, the oldest first.
    fn chosen(
        &self,
        runs: &Runs,
        machine: &MachineKey,
        which: &Which,
        wish: Wish,
        known: &[Manifest],
    ) -> Vec<Arc<Run>> {
        let Some(here) = runs.machine(machine) else { return Vec::new() };
        let newest_there = known.iter().map(|there| there.committed_ms).max();
        let (mut disks, mut chosen): (BTreeSet<DiskId>, BTreeMap<u64, Arc<Run>>) =
            Default::default();
        for held in here.snapshots() {
            let disk = &held.snapshot().disk;
            if !which.takes_disk(disk) {
                continue;
            }
            let is_newest = disks.insert(disk.clone());
            let is_newer = newest_there.is_none_or(|newest| taken_ms(&held.run) > newest);
            if is_newest || wish.all_runs && is_newer {
                chosen.insert(held.run.sequence, held.run.clone());
            }
        }
        chosen.into_values().collect()
    }

    #[allow(clippy::too_many_arguments)]
    fn archive_run(
        &self,
        runs: &Arc<Runs>,
        run: &Arc<Run>,
        (place, alone): (&MachinePlace, Option<&DiskId>),
        known: &[Manifest],
        which: &Which,
        wish: Wish,
        hear: &dyn Fn(u64, u64) -> bool,
    ) -> Result<(Manifest, Vec<Sent>), CarryError> {
        let objects: Objects =
            self.runtime.block_on(self.store.list(&place.disks))?.into_iter().collect();
        let (mut entries, mut sent) = (Vec::new(), Vec::new());
        for held in Held::all(run).filter(|held| which.takes_disk(&held.snapshot().disk)) {
            let snapshot = held.snapshot();
            let there = known.iter().flat_map(|there| &there.disks);
            let mut there = there.filter(|entry| entry.disk == snapshot.disk);
            let same = there.find(|entry| {
                entry.snapshot() == Some(snapshot.id) && entry.table_digest == snapshot.table_digest
            });
            if let Some(entry) =
                same.filter(|entry| !wish.full && write::is_there(entry, place, &objects))
            {
                entries.push(entry.clone());
                continue;
            }
            let before = match wish.full {
                true => None,
                false => self.before(runs, &run.machine, &held, place, known, &objects)?,
            };
            let (entry, of_disk) = self.write_disk(runs, &held, place, before, &objects, hear)?;
            entries.push(entry);
            sent.push(of_disk);
        }
        let facts = RunFacts {
            server: self.own.clone(),
            run: run_id(run),
            machine: run.machine.clone(),
            committed_ms: taken_ms(run),
            seal: run.client_seal.clone(),
        };
        let manifest = Manifest::new(facts, entries);
        let object = place.manifest(manifest.committed_ms, manifest.run, alone);
        let bytes = manifest.to_bytes();
        let bytes =
            bytes.map_err(|reason| ArchiveError::Damaged { object: object.to_string(), reason })?;
        self.runtime.block_on(self.store.create(&object, &bytes.into()))?;
        Ok((manifest, sent))
    }

    /// The last archived state of a disk, where a delta to it can be made.
    fn before(
        &self,
        runs: &Arc<Runs>,
        machine: &MachineKey,
        held: &Held,
        place: &MachinePlace,
        known: &[Manifest],
        objects: &Objects,
    ) -> Result<Option<(DiskEntry, TableStack)>, CarryError> {
        let snapshot = held.snapshot();
        let newest = known.iter().rev().find_map(|there| there.disk(&snapshot.disk));
        let fits = |entry: &&DiskEntry| {
            entry.size_bytes == snapshot.size_bytes
                && entry.logical_sector_bytes == snapshot.logical_sector_bytes
                && entry.links.len() < self.rule.full_every as usize
                // The same snapshot again: what is there of it is not what it was.
                && entry.links.iter().all(|link| link.snapshot != snapshot.id)
        };
        let Some(entry) = newest.filter(fits) else { return Ok(None) };
        if !write::is_there(entry, place, objects) {
            tracing::warn!(%machine, disk = %entry.disk, "objects of its archived chain are missing: a new one begins");
            return Ok(None);
        }
        let here = entry.snapshot().and_then(|id| runs.snapshot(id));
        let here = here.filter(|here| here.snapshot().table_digest == entry.table_digest);
        if let (Some(here), Some(machine)) = (here, runs.machine(machine)) {
            let opened = runs.open_tables(&machine, &[here.snapshot().id]);
            if let Some((_, tables, _)) = opened.into_iter().next() {
                return Ok(Some((entry.clone(), tables)));
            }
        }
        match Archived::open_tables(&self.store, self.runtime.handle(), place, entry) {
            Ok(tables) => Ok(Some((entry.clone(), tables))),
            Err(error) if error.is_damage() => {
                tracing::warn!(%machine, disk = %entry.disk, %error, "its archived chain is damaged: a new one begins");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Removes runs that are not to be kept, and objects that no run needs.
    fn clean(
        &self,
        place: &MachinePlace,
        known: &mut Vec<Manifest>,
        tell: &mut dyn FnMut(Event<'_>),
    ) -> Result<(), CarryError> {
        known.sort_by_key(|there| there.committed_ms);
        if self.rule.keep > 0 {
            let mut kept = BTreeSet::new();
            let keep = self.rule.keep as usize;
            let (mut stay, mut go) = (Vec::new(), Vec::new());
            for there in known.drain(..).rev() {
                let is_kept = kept.contains(&there.run) || kept.len() < keep;
                match is_kept {
                    true => {
                        kept.insert(there.run);
                        stay.push(there);
                    }
                    false => go.push(there),
                }
            }
            stay.reverse();
            *known = stay;
            for there in &go {
                let alone = there.disks.first().map(|entry| &entry.disk);
                for name in [None, alone] {
                    let object = place.manifest(there.committed_ms, there.run, name);
                    self.runtime.block_on(self.store.delete(&object))?;
                }
            }
            if !go.is_empty() {
                tell(Event::Removed(go.len()));
            }
        }
        let needed: BTreeSet<SnapshotId> = known
            .iter()
            .flat_map(|there| &there.disks)
            .flat_map(|disk| &disk.links)
            .map(|link| link.snapshot)
            .collect();
        for (object, _) in self.runtime.block_on(self.store.list(&place.disks))? {
            if place.owner(&object).is_some_and(|snapshot| !needed.contains(&snapshot)) {
                self.runtime.block_on(self.store.delete(&object))?;
            }
        }
        Ok(())
    }
}

/// Of a run that was imported itself the other one's name goes on: it is the same content.
fn run_id(run: &Run) -> BackupId {
    run.origin.as_ref().and_then(|origin| origin.run).unwrap_or(run.backup)
}

fn taken_ms(run: &Run) -> i64 {
    run.origin.as_ref().map_or(run.committed_ms, |origin| origin.taken_ms)
}

/// True when all that is meant of a run is in a manifest.
fn holds(there: &Manifest, id: BackupId, run: &Run, which: &Which) -> bool {
    let mut disks = run.snapshots.iter().filter(|snapshot| which.takes_disk(&snapshot.disk));
    there.run == id && disks.all(|snapshot| there.disk(&snapshot.disk).is_some())
}
