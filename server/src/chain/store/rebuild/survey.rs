//! What is there, and what is to be done about it. Only reads.

use std::{
    collections::HashSet,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use janus_proto::ids::MachineKey;
use uuid::Uuid;

use super::{
    super::{
        DAMAGED, MACHINE, MachineFile, OPEN, OpenRun, RUNS, StoreError, exists, files_in,
        folders_in, free_name, is_folder, list, merges::MERGES, read, relative_folder, trash,
    },
    Plan, Step,
    steps::forget,
};
use crate::{
    chain::{
        Held, History, Run, Snapshot, TrashRecord, TrashedRun, health::Health, stub, table::Table,
    },
    image::Image,
    storage::{Access, Disk},
};

const ASIDE: &str = "set-aside";

/// The folders of machines, and what brings them to where the settings want them.
pub(super) struct Folders {
    pub machines: Vec<(PathBuf, MachineKey)>,
    pub steps: Vec<Step>,
}

/// Finds machines in either layout.
pub(super) fn folders(storage: &Disk, root: &Path, separate: bool) -> Result<Folders, StoreError> {
    let mut found = Folders { machines: Vec::new(), steps: Vec::new() };
    let mut targets = HashSet::new();
    for folder in machine_folders(storage, root)? {
        let Some(key) = key_of(storage, root, &folder)? else { continue };
        let target = root.join(relative_folder(separate, &key));
        let is_free =
            targets.insert(target.clone()) && (folder == target || !exists(storage, &target)?);
        let (to, why) = match (folder == target, is_free) {
            (true, _) => {
                found.machines.push((folder, key));
                continue;
            }
            (false, true) => (target, "this is where the settings have this machine"),
            (false, false) => {
                let name = folder.file_name().unwrap_or_default();
                let to = free_name(storage, &root.join(format!(".{ASIDE}")).join(name))?;
                (to, "another folder is this machine's")
            }
        };
        if is_free {
            found.machines.push((folder.clone(), key));
        }
        found.steps.push(Step::Move { from: folder, to, why });
    }
    Ok(found)
}

fn machine_folders(storage: &Disk, root: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let mut found = Vec::new();
    for first in folders_in(storage, root)? {
        if is_machine(storage, &first)? {
            found.push(first);
            continue;
        }
        for second in folders_in(storage, &first)? {
            if is_machine(storage, &second)? {
                found.push(second);
            }
        }
    }
    Ok(found)
}

fn is_machine(storage: &Disk, folder: &Path) -> Result<bool, StoreError> {
    for name in [MACHINE, RUNS, trash::TRASH, OPEN] {
        if exists(storage, &folder.join(name))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whose folder it is: by its file, else by the newest manifest that can be read, else by its name.
fn key_of(storage: &Disk, root: &Path, folder: &Path) -> Result<Option<MachineKey>, StoreError> {
    if let Some(file) = readable::<MachineFile>(storage, &folder.join(MACHINE))? {
        return Ok(Some(file.machine));
    }
    for path in files_in(storage, &folder.join(RUNS), "json")?.iter().rev() {
        if let Some(run) = readable::<Run>(storage, path)? {
            return Ok(Some(run.machine));
        }
    }
    let below = folder.strip_prefix(root).ok().and_then(Path::to_str).unwrap_or_default();
    let names = below.split_once('/').or_else(|| below.split_once('@'));
    Ok(names.and_then(|(user, machine)| MachineKey::new(user, machine).ok()))
}

/// A file's value; `None` when it is absent or damaged.
fn readable<T: serde::de::DeserializeOwned>(
    storage: &Disk,
    path: &Path,
) -> Result<Option<T>, StoreError> {
    match read(storage, path) {
        Err(StoreError::Damaged { .. }) => Ok(None),
        other => other,
    }
}

/// Adds what is to be done in one machine's folder. False when merges must be finished before all of that can be said: there is
/// more to be done then.
pub(super) fn machine(
    storage: &Disk,
    folder: &Path,
    key: &MachineKey,
    plan: &mut Plan,
) -> Result<bool, StoreError> {
    let mut survey =
        Survey { storage, folder, key, history: History::default(), incomplete: false };
    survey.manifests(RUNS, plan)?;
    survey.manifests(trash::TRASH, plan)?;
    survey.own_file(plan)?;
    // Until merges are finished, which opening the store does, files have other names than manifests say.
    if !files_in(storage, &folder.join(MERGES), "json")?.is_empty() {
        survey.forget_proofs(Vec::new(), plan)?;
        survey.open_runs(plan)?;
        return Ok(false);
    }
    let returning = survey.returning(plan)?;
    survey.open_runs(plan)?;
    survey.orphans(&returning, plan)?;
    Ok(true)
}

struct Survey<'a> {
    storage: &'a Disk,
    folder: &'a Path,
    key: &'a MachineKey,
    history: History,
    /// A manifest can't be read: what it names must stay.
    incomplete: bool,
}

impl Survey<'_> {
    /// Takes manifests in, also those that were put aside as damaged and can be read now.
    fn manifests(&mut self, place: &str, plan: &mut Plan) -> Result<(), StoreError> {
        let place = self.folder.join(place);
        for path in files_in(self.storage, &place, "json")? {
            if path.to_string_lossy().ends_with(trash::WHY) {
                continue;
            }
            match self.manifest(&path)? {
                Ok(run) => self.add(&place, run),
                Err(reason) => self.leave_out(path, reason, plan),
            }
        }
        for path in files_in(self.storage, &place, DAMAGED)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let Some((stem, _)) = name.split_once(".json.") else { continue };
            let to = place.join(format!("{stem}.json"));
            match self.manifest(&path)? {
                Ok(run) if number_of(&to) == Some(run.sequence) && !exists(self.storage, &to)? => {
                    self.add(&place, run);
                    let why = "this manifest can be read again";
                    plan.steps.push(Step::Move { from: path, to, why });
                }
                Ok(_) => self.leave_out(path, "another manifest has its place".into(), plan),
                Err(reason) => self.leave_out(path, reason, plan),
            }
        }
        Ok(())
    }

    /// A run that can be used, or why not.
    fn manifest(&self, path: &Path) -> Result<Result<Run, String>, StoreError> {
        let run = match read::<Run>(self.storage, path) {
            Ok(Some(run)) => run,
            Ok(None) => return Ok(Err("it is gone".into())),
            Err(error @ StoreError::Newer { .. }) => return Err(error),
            Err(error) => return Ok(Err(error.to_string())),
        };
        if run.machine != *self.key {
            return Ok(Err(format!("it is of machine {}", run.machine)));
        }
        if self.history.run(run.backup).is_some() {
            return Ok(Err("its run is here already".into()));
        }
        let mut names = run.snapshots.iter().flat_map(|one| [&one.image, &one.table]);
        if let Some(name) = names.find(|name| !is_below(name)) {
            return Ok(Err(format!("it names {name:?}, which is no file of a disk")));
        }
        drop(names);
        Ok(Ok(run))
    }

    fn add(&mut self, place: &Path, run: Run) {
        let run = Arc::new(run);
        if place.ends_with(trash::TRASH) {
            let record = TrashRecord {
                format: super::FORMAT,
                backup: run.backup,
                trashed_ms: 0,
                reason: String::new(),
                purge_not_before_ms: i64::MAX,
                purging: true,
            };
            self.history.add_trashed(TrashedRun { run, record });
        } else {
            self.history.add(run);
        }
    }

    fn leave_out(&mut self, path: PathBuf, reason: String, plan: &mut Plan) {
        self.incomplete = true;
        plan.unread.push((path, reason));
    }

    fn own_file(&self, plan: &mut Plan) -> Result<(), StoreError> {
        if readable::<MachineFile>(self.storage, &self.folder.join(MACHINE))?.is_some() {
            return Ok(());
        }
        let mut use_counter = self.history.use_counter();
        for path in files_in(self.storage, &self.folder.join(OPEN), "json")? {
            let open = readable::<OpenRun>(self.storage, &path)?;
            use_counter = use_counter.max(open.map_or(0, |open| open.use_counter));
        }
        let (folder, machine) = (self.folder.to_owned(), self.key.clone());
        plan.steps.push(Step::MakeMachine { folder, machine, use_counter });
        Ok(())
    }

    /// Files that are missing and lie in `set-aside`, if they are truly those that a manifest means.
    fn returning(&self, plan: &mut Plan) -> Result<HashSet<PathBuf>, StoreError> {
        let (mut moves, mut images) = (Vec::new(), Vec::new());
        for held in self.history.links_oldest_first() {
            let snapshot = held.snapshot();
            for name in [&snapshot.image, &snapshot.table] {
                let to = self.folder.join(name);
                let from = aside(&to);
                if exists(self.storage, &to)? || !exists(self.storage, &from)? {
                    continue;
                }
                if self.belongs(&from, snapshot, *name == snapshot.image) {
                    images.push(snapshot.data_write);
                    let why = "a manifest names it";
                    moves.push(Step::Move { from, to, why });
                } else {
                    let reason = format!("it is not the file of snapshot {}", snapshot.id);
                    plan.unread.push((from, reason));
                }
            }
        }
        self.forget_proofs(images, plan)?;
        let returning = moves.iter().filter_map(|step| match step {
            Step::Move { to, .. } => Some(to.clone()),
            _ => None,
        });
        let returning = returning.collect();
        plan.steps.extend(moves);
        Ok(returning)
    }

    fn belongs(&self, path: &Path, snapshot: &Snapshot, is_image: bool) -> bool {
        let Ok(file) = self.storage.open(path, Access::Read) else { return false };
        if is_image {
            Image::open(file).is_ok_and(|image| image.data_write() == snapshot.data_write)
        } else {
            Table::open(file).is_ok_and(|table| table.header().snapshot == snapshot.id)
        }
    }

    fn forget_proofs(&self, returning: Vec<Uuid>, plan: &mut Plan) -> Result<(), StoreError> {
        let known = Health::read(self.storage, self.folder, self.key)?;
        let mut after = known.clone();
        forget(&mut after, &returning);
        if after != known {
            let (folder, machine) = (self.folder.to_owned(), self.key.clone());
            plan.steps.push(Step::ForgetProofs { folder, machine, returning });
        }
        Ok(())
    }

    /// Runs that were not committed. One that was is cleared away when the store is opened.
    fn open_runs(&self, plan: &mut Plan) -> Result<(), StoreError> {
        if self.incomplete {
            return Ok(());
        }
        for from in files_in(self.storage, &self.folder.join(OPEN), "json")? {
            let run = readable::<OpenRun>(self.storage, &from)?;
            if run.is_some_and(|run| self.history.run(run.backup).is_some()) {
                continue;
            }
            let to = free_name(self.storage, &from.with_extension("ended"))?;
            plan.steps.push(Step::Move {
                from,
                to,
                why: "open runs end: their clients begin again",
            });
        }
        Ok(())
    }

    /// Files that nothing names.
    fn orphans(&self, returning: &HashSet<PathBuf>, plan: &mut Plan) -> Result<(), StoreError> {
        if self.incomplete || self.history.lacks_links() {
            return Ok(());
        }
        let named = |held: &Held| stub::files(self.folder, held.snapshot());
        let known: HashSet<PathBuf> = self.history.links().flat_map(named).collect();
        for disk in folders_in(self.storage, self.folder)? {
            for from in list(self.storage, &disk)? {
                if known.contains(&from)
                    || returning.contains(&from)
                    || is_folder(self.storage, &from)?
                {
                    continue;
                }
                let to = free_name(self.storage, &aside(&from))?;
                plan.steps.push(Step::Move { from, to, why: NOBODYS });
            }
        }
        Ok(())
    }
}

/// Why a file goes out of the way that nothing names.
pub(super) const NOBODYS: &str = "no manifest names it";

/// Number that a manifest's name begins with.
fn number_of(path: &Path) -> Option<u64> {
    path.file_stem()?.to_str()?.parse().ok()
}

/// True for `<disk>/<file>`.
fn is_below(name: &str) -> bool {
    let parts: Vec<Component<'_>> = Path::new(name).components().collect();
    parts.len() == 2 && parts.iter().all(|part| matches!(part, Component::Normal(_)))
}

/// Where a file of a disk lies when it was set aside.
fn aside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default();
    path.parent().unwrap_or(path).join(ASIDE).join(name)
}
