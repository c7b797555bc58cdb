//! Archives: copies of chosen runs in an object store or a folder, for the day when all servers are gone.
//!
//! What lies there is described in [`janus_proto::archive`]. A disk goes there as an image of what differs from the last archived
//! state of that disk, found by the tables of both, whatever chain it has here: runs in between need not be there. A part of an
//! image is computed, packed, and sent, unless one of its name, with its sum, and of its size is there: so what a killed archive
//! has sent is used by the next one, or removed. Everything here blocks, on a runtime of its own for the calls.

mod source;
mod there;
mod upload;
mod verify;
mod write;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
};

use janus_proto::{
    archive::{
        ArchiveError, Archived, DiskEntry, Manifest, Path, Place, Store,
        manifest::RunFacts,
        names::MachinePlace,
        runs::{self as archived_runs, Listed},
    },
    grants::Which,
    ids::{BackupId, DiskId, MachineKey, ServerId},
    table::TableStack,
};
use tokio_util::sync::CancellationToken;

use self::there::{Objects, There};
pub use self::{
    source::{choose, open_run},
    verify::Verified,
};
use crate::{
    carry::CarryError,
    chain::{Held, Run},
    config::Archive as Rule,
    runs::Runs,
    seed::SeedError,
};

/// Places of archives at work: two at one place could take each other's parts for what a killed one left.
static AT_WORK: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Keeps others away from an archive until it is dropped.
#[derive(Debug)]
pub struct Alone(String);

impl Alone {
    /// `None`: another one is at work there, whatever its name.
    pub fn with(rule: &Rule) -> Option<Self> {
        let folder = rule.url.strip_prefix("file://").map(std::fs::canonicalize);
        let place = match folder {
            Some(Ok(folder)) => folder.display().to_string(),
            _ => format!("{} {}", rule.endpoint, rule.url.trim_end_matches('/')),
        };
        let mut at_work = AT_WORK.lock().unwrap_or_else(PoisonError::into_inner);
        // Not `then_some`: one that is made and dropped here would take the place from who has it.
        at_work.insert(place.clone()).then(|| Self(place))
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        AT_WORK.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

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
    /// New bases of which nothing that is there is a part, also of a run that is there.
    pub full: bool,
}

/// An archive that is open.
pub struct Archive {
    runtime: tokio::runtime::Runtime,
    store: Store,
    own: ServerId,
    name: String,
    rule: Rule,
}

impl Archive {
    /// Opens the archive of a section `[archive.NAME]` of the settings, as the server `own`.
    ///
    /// # Errors
    /// When it can't be set up like this.
    pub fn open(
        name: &str,
        rule: &Rule,
        own: &ServerId,
        stop: &CancellationToken,
    ) -> Result<Self, CarryError> {
        let place = rule.place();
        let place =
            place.map_err(|reason| ArchiveError::Setup { url: rule.url.clone(), reason })?;
        Ok(Self { name: name.to_owned(), ..Self::at(&place, rule, own, stop)? })
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
        Ok(Self { runtime, store, own: own.clone(), name: String::new(), rule: rule.clone() })
    }

    /// Bytes of objects that were written.
    pub fn sent_bytes(&self) -> u64 {
        self.store.sent_bytes()
    }

    /// Bytes of objects that were read.
    pub fn received_bytes(&self) -> u64 {
        self.store.received_bytes()
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
        let (mut known, mut damaged) = (Vec::new(), BTreeMap::new());
        for Listed { object, manifest } in self.runs(&self.own, machine)? {
            match manifest {
                Ok(manifest) => known.push(There { object, manifest }),
                Err(error) => drop(damaged.insert(object, error)),
            }
        }
        let mut objects = self.objects(&place)?;
        for run in self.chosen(runs, machine, which, wish, &known) {
            // Readers take the last that has it.
            let held = known.iter().rev().find(|there| holds(&there.manifest, &run, which));
            if let Some(there) = held.filter(|_| !wish.full) {
                if self.has_all(&there.manifest, &place, &objects)? {
                    tell(Event::Here(&there.manifest));
                    continue;
                }
                tracing::warn!(%machine, run = %run.backup, "objects of its archived backup are missing or have another size: it is sent again");
            }
            match self.archive_run(runs, &run, (&place, &objects), &known, which, wish, hear) {
                Ok((mut manifest, sent)) => {
                    let object = match held {
                        Some(there) => there.object.clone(),
                        None => place.manifest(run.taken_ms(), run_id(&run), which.alone()),
                    };
                    // Disks of the same run may have come here one by one, or have gone here.
                    let there = known.iter().find(|there| there.object == object);
                    let others = there.map(|there| &there.manifest.disks[..]).unwrap_or_default();
                    let others = others.iter().filter(|entry| manifest.disk(&entry.disk).is_none());
                    let others: Vec<_> = others.cloned().collect();
                    manifest.disks.extend(others);
                    let was_there = there.is_some() || damaged.contains_key(&object);
                    self.commit(&object, &manifest, was_there)?;
                    tell(Event::Archived(&manifest, &sent));
                    damaged.remove(&object);
                    known.retain(|there| there.object != object);
                    known.push(There { object, manifest });
                }
                Err(CarryError::Stopped | CarryError::Archive(ArchiveError::Stopped)) => {
                    return Err(CarryError::Stopped);
                }
                Err(error) => tell(Event::Failed(&run, &error)),
            }
            objects = self.objects(&place)?;
        }
        damaged.values().for_each(|error| tell(Event::Damaged(error)));
        // What a manifest that can't be read needs isn't known.
        if damaged.is_empty() {
            if self.rule.keep > 0 {
                match self.thin(&mut known)? {
                    0 => {}
                    gone => tell(Event::Removed(gone)),
                }
            }
            self.clean(&place, &objects, &known)?;
        }
        Ok(())
    }

    /// Writes a manifest, the commit point of its run, over the one of the same run where there was one.
    fn commit(
        &self,
        object: &Path,
        manifest: &Manifest,
        was_there: bool,
    ) -> Result<(), CarryError> {
        let bytes = manifest.to_bytes();
        let bytes =
            bytes.map_err(|reason| ArchiveError::Damaged { object: object.to_string(), reason })?;
        let bytes = bytes.into();
        self.runtime.block_on(async {
            match was_there {
                true => self.store.put(object, &bytes).await,
                false => self.store.create(object, &bytes).await,
            }
        })?;
        Ok(())
    }

    /// True when all objects of a run are there, as far as names and sizes tell.
    fn has_all(
        &self,
        manifest: &Manifest,
        place: &MachinePlace,
        objects: &Objects,
    ) -> Result<bool, CarryError> {
        for entry in &manifest.disks {
            if !self.is_there(entry, place, objects)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Runs that are to be archived, the oldest first.
    fn chosen(
        &self,
        runs: &Runs,
        machine: &MachineKey,
        which: &Which,
        wish: Wish,
        known: &[There],
    ) -> Vec<Arc<Run>> {
        let Some(here) = runs.machine(machine) else { return Vec::new() };
        let newest_there = known.iter().map(|there| there.manifest.committed_ms).max();
        let (mut disks, mut chosen): (BTreeSet<DiskId>, BTreeMap<u64, Arc<Run>>) =
            Default::default();
        for held in here.snapshots() {
            let disk = &held.snapshot().disk;
            if !which.takes_disk(disk) {
                continue;
            }
            let is_newest = disks.insert(disk.clone());
            let is_newer = newest_there.is_none_or(|newest| held.run.taken_ms() > newest);
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
        (place, objects): (&MachinePlace, &Objects),
        known: &[There],
        which: &Which,
        wish: Wish,
        hear: &dyn Fn(u64, u64) -> bool,
    ) -> Result<(Manifest, Vec<Sent>), CarryError> {
        // What may be damaged is not gone on with.
        let nothing = Objects::new();
        let (usable, objects) = if wish.full { (&[][..], &nothing) } else { (known, objects) };
        let (mut entries, mut sent) = (Vec::new(), Vec::new());
        for held in Held::all(run).filter(|held| which.takes_disk(&held.snapshot().disk)) {
            let snapshot = held.snapshot();
            let same = there::entries(usable, &snapshot.disk).find(|entry| {
                entry.snapshot() == Some(snapshot.id) && entry.table_digest == snapshot.table_digest
            });
            if let Some(entry) = same
                && self.is_there(entry, place, objects)?
            {
                entries.push(entry.clone());
                continue;
            }
            let before = self.before(runs, &run.machine, &held, place, usable, objects)?;
            let there = (known, objects, wish.full);
            let (entry, of_disk) = self.write_disk(runs, &held, place, before, there, hear)?;
            entries.push(entry);
            sent.push(of_disk);
        }
        let facts = RunFacts {
            server: self.own.clone(),
            run: run_id(run),
            machine: run.machine.clone(),
            committed_ms: run.taken_ms(),
            seal: run.client_seal.clone(),
        };
        Ok((Manifest::new(facts, entries), sent))
    }

    /// The last archived state of a disk, where a delta to it can be made.
    fn before(
        &self,
        runs: &Arc<Runs>,
        machine: &MachineKey,
        held: &Held,
        place: &MachinePlace,
        known: &[There],
        objects: &Objects,
    ) -> Result<Option<(DiskEntry, TableStack)>, CarryError> {
        let snapshot = held.snapshot();
        let mut whole = None;
        for entry in there::entries(known, &snapshot.disk).rev() {
            // What is there of the same snapshot is incomplete, else it would not be sent again.
            let is_other = entry.links.iter().all(|link| link.snapshot != snapshot.id);
            if is_other && self.is_there(entry, place, objects)? {
                whole = Some(entry);
                break;
            }
            tracing::warn!(%machine, disk = %entry.disk, "objects of an archived chain are missing: nothing is built on it");
        }
        let fits = |entry: &&DiskEntry| {
            entry.size_bytes == snapshot.size_bytes
                && entry.logical_sector_bytes == snapshot.logical_sector_bytes
                && entry.links.len() < self.rule.full_every as usize
        };
        let Some(entry) = whole.filter(fits) else { return Ok(None) };
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
}

/// Of a run that was imported itself the other one's name goes on: it is the same content.
fn run_id(run: &Run) -> BackupId {
    run.origin.as_ref().and_then(|origin| origin.run).unwrap_or(run.backup)
}

/// True when all that is meant of a run is in a manifest.
fn holds(there: &Manifest, run: &Run, which: &Which) -> bool {
    let mut disks = run.snapshots.iter().filter(|snapshot| which.takes_disk(&snapshot.disk));
    there.run == run_id(run) && disks.all(|snapshot| there.disk(&snapshot.disk).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_place_has_one_writer_whatever_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let at = |url: String| Rule { url, ..Rule::default() };
        let path = folder.path().display();
        let first = Alone::with(&at(format!("file://{path}"))).unwrap();
        assert!(Alone::with(&at(format!("file://{path}/."))).is_none());
        drop(first);
        assert!(Alone::with(&at(format!("file://{path}/."))).is_some());
        let _bucket = Alone::with(&at("s3://bucket/of/us".into())).unwrap();
        assert!(Alone::with(&at("s3://bucket/of/us/".into())).is_none());
        assert!(Alone::with(&at("s3://bucket/of/others".into())).is_some());
    }
}
