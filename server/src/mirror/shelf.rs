//! Mirrored tables on disk: see [`super::record`] for names and formats.
//!
//! Each is a difference to another one of the same server and disk, older or newer, or to zeros; so a disk's tables are a tree. One
//! that goes hands its place to those above it: they are written anew without it first. A crash leaves each table as it was or
//! as it is to be, and files that no record names, which go when the shelf is read.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use janus_proto::ids::{MachineKey, ServerId, SnapshotId};

use super::{
    MirrorError,
    record::{Description, Record, made_ms},
    share::Share,
};
use crate::{
    chain::table::{Difference, Differing, Table, TableHeader, TableStack, TableWriter},
    storage::{Access, Disk},
};

/// Folder of all mirrored tables, below the image path.
const FOLDER: &str = ".mirror";
/// Differences on top of each other: a longer way is cut short.
const MOST_LINKS: usize = 64;

/// A table that is kept.
#[derive(Debug)]
pub struct Kept {
    /// Of this snapshot.
    pub description: Description,
    base: Option<SnapshotId>,
    number: u32,
    share: Mutex<Option<Arc<Share>>>,
}

impl Kept {
    fn new(record: Record, share: Option<Arc<Share>>) -> Self {
        let Record { description, base, number } = record;
        Self { description, base, number, share: Mutex::new(share) }
    }

    fn record(&self) -> Record {
        let (base, number) = (self.base, self.number);
        Record { description: self.description.clone(), base, number }
    }

    /// What this server had of it when that was counted last.
    pub(super) fn share(&self) -> Option<Arc<Share>> {
        self.share.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_share(&self, share: Share) {
        *self.share.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(share));
    }
}

/// All mirrored tables of a server. Everything but looking at descriptions blocks.
pub struct Shelf {
    storage: Disk,
    root: PathBuf,
    state: Mutex<State>,
    /// Files are opened together, so that none is replaced in between.
    files: RwLock<()>,
}

#[derive(Default)]
struct State {
    kept: BTreeMap<SnapshotId, Arc<Kept>>,
    /// To be looked over.
    doubtful: BTreeSet<SnapshotId>,
}

/// A table that is being written.
pub struct Fresh {
    record: Record,
    path: PathBuf,
    writer: TableWriter,
    since: TableStack,
    next: u64,
}

impl Fresh {
    /// The first segment that may come next.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// What it is a difference to.
    pub fn base(&self) -> Option<SnapshotId> {
        self.record.base
    }

    /// Adds a segment, after all before it.
    ///
    /// # Errors
    /// When it isn't what it says, or can't be written.
    pub fn push(&mut self, differing: &Differing) -> Result<(), MirrorError> {
        differing.over(&self.since)?;
        self.push_own(differing)
    }

    /// The same without a look at what we have made ourselves.
    fn push_own(&mut self, differing: &Differing) -> Result<(), MirrorError> {
        let Differing { segment, digest, present, hashes } = differing;
        self.writer.push(*segment, present, hashes, *digest)?;
        self.next = segment.saturating_add(1);
        Ok(())
    }
}

/// Bytes that the mirrored tables below an image path take; what can't be looked at has none.
pub fn stored_bytes(storage: &Disk, image_path: &Path) -> u64 {
    // By server, user, machine and disk.
    below(storage, &image_path.join(FOLDER), 5)
}

fn below(storage: &Disk, folder: &Path, levels: u32) -> u64 {
    let entries = storage.list(folder).unwrap_or_default();
    let bytes = entries.iter().map(|path| match storage.is_folder(path) {
        Ok(true) if levels > 0 => below(storage, path, levels - 1),
        _ => storage.metadata(path).ok().flatten().map_or(0, |file| file.allocated_bytes),
    });
    bytes.sum()
}

impl Shelf {
    /// A shelf below the image path, empty until [`Shelf::load`].
    pub fn new(storage: Disk, image_path: &Path) -> Self {
        let root = image_path.join(FOLDER);
        Self { storage, root, state: Mutex::default(), files: RwLock::default() }
    }

    /// Reads what is there. What can't be read, lacks its base or is named by nobody goes: it is read again from its server. All
    /// of it is to be looked over.
    pub fn load(&self) {
        let mut records: BTreeMap<SnapshotId, Record> = BTreeMap::new();
        let mut folders = BTreeSet::new();
        let listed = self.records(&mut records, &mut folders);
        if let Err(error) = listed {
            tracing::warn!(%error, "mirrored tables can't be read");
        }
        // Those that hang on nothing, and then those that hang on them.
        loop {
            let lost: Vec<SnapshotId> = records
                .values()
                .filter(|record| self.is_lost(record, &records))
                .map(|record| record.description.id)
                .collect();
            if lost.is_empty() {
                break;
            }
            for id in lost {
                tracing::warn!(snapshot = %id, "a mirrored table has lost what it is built on; it will be read again");
                records.remove(&id);
            }
        }
        for folder in &folders {
            self.sweep(folder, &records);
        }
        let doubtful = records.keys().copied().collect();
        let kept = records
            .into_iter()
            .map(|(id, record)| (id, Arc::new(Kept::new(record, None))))
            .collect();
        *self.lock() = State { kept, doubtful };
    }

    /// Reads the records of all folders: server, user, machine, disk.
    fn records(
        &self,
        records: &mut BTreeMap<SnapshotId, Record>,
        folders: &mut BTreeSet<PathBuf>,
    ) -> Result<(), MirrorError> {
        let list = |path: &Path| self.storage.list(path).map_err(MirrorError::io("list", path));
        let mut level = vec![self.root.clone()];
        for _ in 0..4 {
            let mut below = Vec::new();
            for folder in level {
                below.extend(list(&folder)?);
            }
            below.retain(|path| self.storage.is_folder(path).unwrap_or(false));
            level = below;
        }
        for folder in level {
            for path in list(&folder)? {
                if path.extension().is_none_or(|extension| extension != "json") {
                    continue;
                }
                match Record::read(&self.storage, &path) {
                    Ok(Some(record)) if self.record_path(&record.description) == path => {
                        records.insert(record.description.id, record);
                    }
                    Ok(_) => {
                        tracing::warn!(path = %path.display(), "a record of a mirrored table is in the wrong place; it goes")
                    }
                    Err(error) => tracing::warn!(%error, "a mirrored table will be read again"),
                }
            }
            folders.insert(folder);
        }
        Ok(())
    }

    /// Its table is gone, or what it is built on is not here, or it is built on itself.
    fn is_lost(&self, record: &Record, records: &BTreeMap<SnapshotId, Record>) -> bool {
        let mut base = record.base;
        for _ in 0..=records.len() {
            let Some(id) = base else {
                let path = self.folder(&record.description).join(record.table());
                return !self.storage.exists(&path).unwrap_or(false);
            };
            let below =
                records.get(&id).filter(|below| fits(&below.description, &record.description));
            let Some(below) = below else { return true };
            base = below.base;
        }
        true
    }

    /// Removes files that no record names.
    fn sweep(&self, folder: &Path, records: &BTreeMap<SnapshotId, Record>) {
        let named = |path: &PathBuf| {
            records.values().any(|record| {
                self.folder(&record.description) == folder
                    && (path.ends_with(record.table())
                        || path.ends_with(Record::name(record.description.id)))
            })
        };
        let files = self.storage.list(folder).unwrap_or_default();
        for path in files.iter().filter(|path| !named(path)) {
            let _ = self.storage.remove(path);
        }
        self.tidy(folder);
    }

    /// Removes folders that are empty, up to our own.
    fn tidy(&self, folder: &Path) {
        let above = folder.ancestors().take_while(|path| path.starts_with(&self.root));
        for path in above {
            if self.storage.remove_folder(path).is_err() {
                return;
            }
        }
    }

    fn folder(&self, description: &Description) -> PathBuf {
        self.root.join(description.folder())
    }

    fn record_path(&self, description: &Description) -> PathBuf {
        self.folder(description).join(Record::name(description.id))
    }

    /// One of them.
    pub fn get(&self, id: SnapshotId) -> Option<Arc<Kept>> {
        self.lock().kept.get(&id).cloned()
    }

    /// All of them, the newest first.
    pub fn all(&self) -> Vec<Arc<Kept>> {
        let mut all: Vec<_> = self.lock().kept.values().cloned().collect();
        newest_first(&mut all);
        all
    }

    /// Those of a machine, newest first.
    pub fn of_machine(&self, machine: &MachineKey) -> Vec<Arc<Kept>> {
        let state = self.lock();
        let of_machine = state.kept.values().filter(|kept| kept.description.machine == *machine);
        let mut of_machine: Vec<_> = of_machine.cloned().collect();
        drop(state);
        newest_first(&mut of_machine);
        of_machine
    }

    /// Whose tables there are.
    pub fn owners(&self) -> BTreeSet<(ServerId, MachineKey)> {
        let state = self.lock();
        let owner =
            |kept: &Arc<Kept>| (kept.description.server.clone(), kept.description.machine.clone());
        state.kept.values().map(owner).collect()
    }

    /// Something is wrong with it, or with what it is built on: all that is to be looked over.
    pub fn doubt(&self, id: SnapshotId) {
        let mut state = self.lock();
        let way = way(&state, id).unwrap_or_default();
        state.doubtful.extend(way.iter().map(|kept| kept.description.id));
    }

    /// One that is to be looked over; it isn't doubtful any more.
    pub fn take_doubtful(&self) -> Option<SnapshotId> {
        self.lock().doubtful.pop_last()
    }

    /// What a new table is best built on: the one nearest in time, where there is one.
    pub fn nearest(&self, to: &Description) -> Option<SnapshotId> {
        let state = self.lock();
        let fitting = state.kept.values().filter(|kept| fits(&kept.description, to));
        let nearest =
            fitting.min_by_key(|kept| made_ms(kept.description.id).abs_diff(made_ms(to.id)))?;
        let way = way(&state, nearest.description.id)?;
        match way.len() < MOST_LINKS {
            true => way.first(),
            false => way.last(),
        }
        .map(|kept| kept.description.id)
    }

    /// Opens a table, with all that it is built on.
    ///
    /// # Errors
    /// When it isn't here, or a file is damaged.
    pub fn open(&self, id: SnapshotId) -> Result<TableStack, MirrorError> {
        let _files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        let way = way(&self.lock(), id).ok_or(MirrorError::Unknown { id })?;
        let mut tables = Vec::with_capacity(way.len());
        for kept in &way {
            tables.push(Arc::new(self.open_table(&kept.record())?));
        }
        let disk_bytes = way.first().map_or(0, |kept| kept.description.size_bytes);
        Ok(TableStack::new(tables, disk_bytes)?)
    }

    fn open_table(&self, record: &Record) -> Result<Table, MirrorError> {
        let path = self.folder(&record.description).join(record.table());
        let file = self.storage.open(&path, Access::Read).map_err(MirrorError::io("open", path))?;
        let table = Table::open(file)?;
        let Description { id, size_bytes, .. } = record.description;
        match table.header() == (TableHeader { snapshot: id, disk_bytes: size_bytes }) {
            true => Ok(table),
            false => Err(MirrorError::Foreign { id }),
        }
    }

    /// Begins a table that is a difference to `base`, or to zeros. What is here of the snapshot stays until it is published.
    ///
    /// # Errors
    /// When the base can't be opened, is of another disk, or the file can't be made.
    pub fn begin(
        &self,
        description: &Description,
        base: Option<SnapshotId>,
    ) -> Result<Fresh, MirrorError> {
        let Description { id, size_bytes, .. } = *description;
        let since = match base {
            None => TableStack::new(Vec::new(), size_bytes)?,
            Some(base) => {
                let fitting = self.get(base).filter(|kept| fits(&kept.description, description));
                fitting.ok_or(MirrorError::Unknown { id: base })?;
                self.open(base)?
            }
        };
        let number = self.get(id).map_or(0, |kept| kept.number.wrapping_add(1));
        let record = Record { description: description.clone(), base, number };
        let folder = self.folder(description);
        self.storage.make_folder(&folder).map_err(MirrorError::io("make", &folder))?;
        let path = folder.join(format!("{}.partial", record.table()));
        let file = self.storage.open(&path, Access::Create);
        let file = file.map_err(MirrorError::io("make", &path))?;
        let writer =
            TableWriter::create(file, TableHeader { snapshot: id, disk_bytes: size_bytes })?;
        Ok(Fresh { record, path, writer, since, next: 0 })
    }

    /// Gives up a table that was begun.
    pub fn discard(&self, fresh: Fresh) {
        let path = fresh.path.clone();
        drop(fresh);
        let _ = self.storage.remove(&path);
        if let Some(folder) = path.parent() {
            self.tidy(folder);
        }
    }

    /// Completes a table, if it is the snapshot's: from then on it exists, in the place of what was here of this snapshot.
    ///
    /// # Errors
    /// When it is not the snapshot's, or a file can't be written; nothing has changed then.
    pub fn publish(&self, fresh: Fresh) -> Result<(), MirrorError> {
        let path = fresh.path.clone();
        let published = self.put(fresh);
        if published.is_err() {
            let _ = self.storage.remove(&path);
        }
        published
    }

    fn put(&self, fresh: Fresh) -> Result<(), MirrorError> {
        let Fresh { record, path: partial, writer, since, .. } = fresh;
        let Description { id, digest, .. } = record.description;
        let file = writer.finish()?;
        let stack = since.with(Arc::new(Table::open(file)?))?;
        if stack.table_digest()? != digest {
            return Err(MirrorError::Foreign { id });
        }
        let folder = self.folder(&record.description);
        let path = folder.join(record.table());
        let file = self.storage.open(&partial, Access::Write);
        let file = file.map_err(MirrorError::io("open", &partial))?;
        file.sync_all().map_err(MirrorError::io("sync", &partial))?;
        let old = self.get(id);
        // What hangs on a table that goes in the meantime would be lost with it.
        let _files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        self.storage.rename(&partial, &path).map_err(MirrorError::io("rename", &partial))?;
        self.storage.sync_folder(&folder).map_err(MirrorError::io("sync", &folder))?;
        record.write(&self.storage, &self.record_path(&record.description))?;
        let share = old.as_ref().and_then(|old| old.share());
        self.lock().kept.insert(id, Arc::new(Kept::new(record, share)));
        if let Some(old) = old {
            let old = folder.join(old.record().table());
            let _ = self.storage.remove(&old);
        }
        Ok(())
    }

    /// Removes a table. Those that are built on it are written anew first: the first one takes its place, and it is what the
    /// others are built on then. What can't be read goes with it.
    ///
    /// # Errors
    /// When files can't be written or removed.
    pub fn remove(&self, id: SnapshotId) -> Result<(), MirrorError> {
        let Some(kept) = self.get(id) else { return Ok(()) };
        let mut base = kept.base;
        for above in self.above(id) {
            let above = &above.description;
            match self.rebuild(above, base) {
                Ok(()) if base.is_none() => base = Some(above.id),
                Ok(()) => {}
                Err(error) if error.is_damage() => self.remove_all(above.id)?,
                Err(error) => return Err(error),
            }
        }
        self.remove_one(&kept)
    }

    /// Writes a table anew, as a difference to another one.
    fn rebuild(&self, of: &Description, base: Option<SnapshotId>) -> Result<(), MirrorError> {
        let stack = self.open(of.id)?;
        let mut fresh = self.begin(of, base)?;
        let since = fresh.since.clone();
        let mut written = Ok(());
        for differing in Difference::new(&stack, &since, 0)? {
            written = differing.map_err(MirrorError::from).and_then(|one| fresh.push_own(&one));
            if written.is_err() {
                break;
            }
        }
        match written {
            Ok(()) => self.publish(fresh),
            Err(error) => {
                self.discard(fresh);
                Err(error)
            }
        }
    }

    /// Removes a table with all that is built on it.
    ///
    /// # Errors
    /// When files can't be removed.
    pub fn remove_all(&self, id: SnapshotId) -> Result<(), MirrorError> {
        for above in self.above(id) {
            self.remove_all(above.description.id)?;
        }
        self.get(id).map_or(Ok(()), |kept| self.remove_one(&kept))
    }

    fn remove_one(&self, kept: &Kept) -> Result<(), MirrorError> {
        let (description, folder) = (&kept.description, self.folder(&kept.description));
        let _files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        let path = self.record_path(description);
        self.storage.remove(&path).map_err(MirrorError::io("remove", &path))?;
        let mut state = self.lock();
        state.kept.remove(&description.id);
        state.doubtful.remove(&description.id);
        drop(state);
        let path = folder.join(kept.record().table());
        self.storage.remove(&path).map_err(MirrorError::io("remove", &path))?;
        self.tidy(&folder);
        Ok(())
    }

    /// Whether others are built on a table.
    pub fn is_built_on(&self, id: SnapshotId) -> bool {
        self.lock().kept.values().any(|kept| kept.base == Some(id))
    }

    /// Those that are built on a table, newest first.
    fn above(&self, id: SnapshotId) -> Vec<Arc<Kept>> {
        let mut above = self.all();
        above.retain(|kept| kept.base == Some(id));
        above
    }

    /// Reads all of a table's own pages. True: it is whole, or stopped.
    ///
    /// # Errors
    /// When it isn't.
    pub fn check(&self, id: SnapshotId, is_over: &dyn Fn() -> bool) -> Result<(), MirrorError> {
        let kept = self.get(id).ok_or(MirrorError::Unknown { id })?;
        let stack = self.open(id)?;
        if stack.table_digest()? != kept.description.digest {
            return Err(MirrorError::Foreign { id });
        }
        for segment in stack.newest_segments() {
            if is_over() {
                return Ok(());
            }
            stack.segment(segment)?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The tables that one is read through, itself first; `None` when one is missing.
fn way(state: &State, id: SnapshotId) -> Option<Vec<Arc<Kept>>> {
    let (mut way, mut next) = (Vec::new(), Some(id));
    while let Some(id) = next {
        let kept = state.kept.get(&id)?;
        if way.len() > state.kept.len() {
            return None;
        }
        way.push(kept.clone());
        next = kept.base;
    }
    Some(way)
}

/// One can be a difference to the other.
fn fits(base: &Description, of: &Description) -> bool {
    base.id != of.id
        && (&base.server, &base.machine, &base.disk) == (&of.server, &of.machine, &of.disk)
        && base.size_bytes == of.size_bytes
}

fn newest_first(kept: &mut [Arc<Kept>]) {
    kept.sort_by_key(|kept| std::cmp::Reverse(kept.description.id));
}

#[cfg(test)]
mod tests;
