//! Chains on disk: where everything lies, what is read at start, and the commit point.
//!
//! ```text
//! <image_path>/.moved.json, .moving.json               see [`relocate`]
//! <image_path>/.store.json                             id of the store, count of starts; .store.lock is held while in use
//! <image_path>/.clock.json                             how much time the server has seen pass: see [`crate::guard::clock`]
//! <image_path>/.holds.json                             what other servers fill stubs from, .seeds.json: seedings that wait
//! <image_path>/.audit/                                 who did what: see [`crate::audit`]
//! <image_path>/.spare                                  space for a full disk: see [`spare`]
//! <image_path>/<user>/<machine>/.machine.json          use counter
//! <image_path>/<user>/<machine>/.pins.json             pinned snapshots
//! <image_path>/<user>/<machine>/.guard.json           locks and alarms, .changes.json: what the last runs changed
//! <image_path>/<user>/<machine>/.health.json           what is known of the images: see [`super::health`]
//! <image_path>/<user>/<machine>/.proofs.json           what was proven: see [`crate::prove::record`]
//! <image_path>/<user>/<machine>/.runs/<sequence>.json  run manifests: a run is committed when its file is here
//! <image_path>/<user>/<machine>/.trash/<sequence>.json those of dropped runs, each with a record .why.json
//! <image_path>/<user>/<machine>/.merge/<link>.json     merges that are decided and not finished
//! <image_path>/<user>/<machine>/.open/<backup>.json    runs that are not
//! <image_path>/<user>/<machine>/<disk>/*.vhdx or *.vhd, *.table
//!                                                      images and their hashes; *.partial, *.journal of open runs
//! ```
//!
//! Our own files start with a dot, which no name from the wire does. Every JSON file ends in a line with the BLAKE3 sum
//! of what stands before it. A crash leaves each file old or new. Images that no manifest and no open run names are
//! moved to `<disk>/set-aside/` at start, never deleted.

pub mod faults;
mod folders;
mod guard;
mod lock;
mod merges;
mod pins;
mod publish;
pub mod rebuild;
mod records;
pub mod relocate;
mod small;
mod spare;
mod trash;

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use janus_proto::ids::{BackupId, DiskId, MachineKey, SessionId, SnapshotId, StoreGeneration};
use serde::{Deserialize, Serialize};

pub(super) use self::records::read;
use self::{
    faults::{Fault, Faults},
    folders::{check_layout, exists, files_in, folders_in, free_name, is_folder, list},
    lock::StoreLock,
    publish::take_back,
    records::{DAMAGED, put_aside},
};
pub(crate) use self::{
    records::{parse, read_large_or_put_aside, read_or_put_aside, with_sum, write, write_large},
    small::SmallFile,
};
use super::{
    FORMAT, Held, History, Origin, Run, health::Health, merge::Intent, opened::OpenedSnapshot, stub,
};
use crate::{
    guard::{Changes, Guarded},
    image::Format,
    prove::record::Proofs,
    storage::Disk,
};

const STORE: &str = ".store.json";
const RUNS: &str = ".runs";
const OPEN: &str = ".open";
const MACHINE: &str = ".machine.json";

/// What can go wrong with the store's own files.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No store.
    #[error("{} holds no store: check image_path in --config, or whether this user may read it", path.display())]
    NoStore {
        /// Where there should be one.
        path: PathBuf,
    },
    /// Another process has the store.
    #[error("{} is in use by another janus-server: stop it or choose another image_path", path.display())]
    Locked {
        /// The store.
        path: PathBuf,
    },
    /// Written by a newer version.
    #[error("{} has format {format}, this program knows {FORMAT}: upgrade janus-server", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u64,
    },
    /// Content that this program did not write like this.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It was moved.
    #[error("the store of {} was moved to {}: set image_path to that", path.display(), to.display())]
    Moved {
        /// The old place.
        path: PathBuf,
        /// The new one.
        to: PathBuf,
    },
    /// Only a part of it is here.
    #[error("the move of {} to {} is not finished: `janus-server move` goes on with it", from.display(), path.display())]
    Moving {
        /// The old place.
        from: PathBuf,
        /// The new one.
        path: PathBuf,
    },
    /// Nothing can be written.
    #[error("{} is on a file system that is mounted read-only: find out why (`dmesg` tells of disks that fail), then `mount -o remount,rw` it, or set image_path to another disk", path.display())]
    ReadOnly {
        /// The image path.
        path: PathBuf,
    },
    /// What a machine has here can't be used.
    #[error("machine {machine} can't be used on this server: {fault}")]
    Faulty {
        /// The machine.
        machine: MachineKey,
        /// Why not.
        fault: Fault,
    },
    /// Machines' folders are where the other setting has them.
    #[error("{} is a machine's folder as with separate_folders_by_user = {}: set that back, or `janus-server rebuild` brings all folders where this setting has them", path.display(), !separate)]
    OtherLayout {
        /// One of them.
        path: PathBuf,
        /// The setting.
        separate: bool,
    },
    /// A run's manifest is there, but the disk has failed to make it durable, and to remove it.
    #[error("whether {} is on the disk is unknown, the disk has failed: {source}", path.display())]
    InDoubt {
        /// The manifest.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// The file system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl StoreError {
    /// An error of the file system.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// One disk of an open run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenDisk {
    /// The disk.
    pub disk: DiskId,
    /// Its session.
    pub session: SessionId,
    /// What the snapshot will be called.
    pub snapshot: SnapshotId,
    /// Size of the disk in bytes.
    pub size_bytes: u64,
    /// 512 or 4096.
    pub logical_sector_bytes: u32,
    /// Head the session starts from.
    pub head: Option<SnapshotId>,
    /// Path of the image without its extension, relative to the machine's folder.
    pub stem: String,
    /// Format of the image.
    #[serde(default)]
    pub format: Format,
    /// It will be a stub: only hashes are received.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stub: bool,
}

impl OpenDisk {
    /// The image or table while the run is open, by the extension of its format or `table`, relative to the machine's folder.
    pub fn partial(&self, kind: &str) -> String {
        format!("{}.{kind}.partial", self.stem)
    }

    /// The session's journal, relative to the machine's folder.
    pub fn journal(&self) -> String {
        format!("{}.journal", self.stem)
    }

    /// True when the image will be a delta to `head`: a child only goes on a parent of the same shape and format.
    pub fn goes_on(&self, head: &OpenedSnapshot) -> bool {
        let snapshot = head.held.snapshot();
        snapshot.size_bytes == self.size_bytes
            && snapshot.logical_sector_bytes == self.logical_sector_bytes
            && head.newest_format() == Some(self.format)
    }

    /// The image (by the extension of its format) or table (`table`) as manifests name it, relative to the machine's folder.
    pub fn published(&self, kind: &str) -> String {
        format!("{}.{kind}", self.stem)
    }

    /// The file that a commit makes of it.
    fn published_file(&self, kind: &str) -> String {
        match self.stub && kind == self.format.extension() {
            true => stub::name(&self.published(kind)),
            false => self.published(kind),
        }
    }

    /// What the two files of a snapshot end in.
    fn kinds(&self) -> [&'static str; 2] {
        [self.format.extension(), "table"]
    }

    fn open_files(&self) -> [String; 3] {
        let [image, table] = self.kinds().map(|kind| self.partial(kind));
        [image, table, self.journal()]
    }
}

/// A run that is neither committed nor aborted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenRun {
    /// Version of this file.
    pub format: u32,
    /// The run.
    pub backup: BackupId,
    /// Whose it is.
    pub machine: MachineKey,
    /// Raised by each takeover.
    pub epoch: u64,
    /// Counter of its start.
    pub use_counter: u64,
    /// Unix milliseconds of the last takeover.
    pub started_ms: i64,
    /// Boot of the machine the last blocks were received in: after another boot only synced blocks count.
    pub boot: String,
    /// What it is made from, when that is no backup of a client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// Its disks.
    pub disks: Vec<OpenDisk>,
}

#[derive(Serialize, Deserialize)]
struct StoreFile {
    format: u32,
    generation: StoreGeneration,
    starts: u64,
}

#[derive(Serialize, Deserialize)]
struct MachineFile {
    format: u32,
    machine: MachineKey,
    #[serde(flatten)]
    counters: Counters,
}

/// What only grows, whatever becomes of a machine's runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Counter of the newest start.
    pub use_counter: u64,
    /// Highest number that a purged run had.
    #[serde(default)]
    pub purged_sequence: u64,
    /// Time of its commit, Unix milliseconds.
    #[serde(default)]
    pub purged_ms: i64,
}

/// What one machine has here.
#[derive(Debug, Default)]
pub struct MachineState {
    /// Committed runs.
    pub history: History,
    /// Counters of its file.
    pub counters: Counters,
    /// Runs not yet committed.
    pub open: Vec<OpenRun>,
    /// Highest number of a run manifest, readable or not: no number is used twice.
    pub last_sequence: u64,
    /// Some manifests could not be read: what they name must stay.
    pub incomplete: bool,
    /// Merges that could not be finished yet.
    pub unfinished: Vec<Intent>,
    /// What is known of the images.
    pub health: Health,
    /// What was proven of its backups.
    pub proofs: Proofs,
    /// What protects its runs.
    pub guarded: Guarded,
    /// What its last runs have changed.
    pub changes: Changes,
    /// What of it can't be used.
    pub faults: Faults,
}

/// The folder tree of one server, locked for this process.
#[derive(Debug)]
pub struct Store {
    storage: Disk,
    root: PathBuf,
    separate_folders_by_user: bool,
    /// Id of this store.
    pub generation: StoreGeneration,
    /// Number of this start of the server.
    pub start_epoch: u64,
    /// What can't be read and belongs to no machine that is known.
    faults: Vec<Fault>,
    /// What nobody but a rebuild takes from it.
    lock: StoreLock,
}

/// What becomes of files that nothing names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unknown {
    /// They are moved to `set-aside`.
    SetAside,
    /// They stay, for whoever wants to tell of them.
    Stays,
}

impl Store {
    /// Opens or makes the store at `root` and reads all machines.
    ///
    /// # Errors
    /// When the folder can't be written, is in use, or was written by a newer version. Damaged manifests are logged and
    /// left out, machines and disks that can't be read too: see [`faults`].
    pub fn open(
        root: &Path,
        separate_folders_by_user: bool,
    ) -> Result<(Self, HashMap<MachineKey, MachineState>), StoreError> {
        Self::open_on(Disk::default(), root, separate_folders_by_user)
    }

    /// The same on a given disk: tests watch what is done there, and make it fail.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_on(
        storage: Disk,
        root: &Path,
        separate_folders_by_user: bool,
    ) -> Result<(Self, HashMap<MachineKey, MachineState>), StoreError> {
        storage.make_folder(root).map_err(StoreError::io("make the image path", root))?;
        let lock = StoreLock::of_store(&storage, root)?;
        check_layout(&storage, root, separate_folders_by_user)?;
        Self::open_locked(storage, root, separate_folders_by_user, lock, Unknown::SetAside)
    }

    /// The same with a lock that was taken before.
    fn open_locked(
        storage: Disk,
        root: &Path,
        separate_folders_by_user: bool,
        lock: StoreLock,
        unknown: Unknown,
    ) -> Result<(Self, HashMap<MachineKey, MachineState>), StoreError> {
        let file_path = root.join(STORE);
        let mut file = match read_or_put_aside::<StoreFile>(&storage, &file_path)? {
            Some(file) => file,
            None => StoreFile { format: FORMAT, generation: StoreGeneration::new(), starts: 0 },
        };
        file.starts += 1;
        spare::write_even_if_full(&storage, root, &file_path, &file)?;
        let mut store = Self {
            storage,
            root: root.to_owned(),
            separate_folders_by_user,
            generation: file.generation,
            start_epoch: file.starts,
            faults: Vec::new(),
            lock,
        };
        let mut machines = HashMap::new();
        for folder in store.machine_folders()? {
            let loaded = store.load_machine(&folder, unknown);
            if let Some((key, state)) = loaded.or_else(|error| store.without(&folder, error))? {
                machines.insert(key, state);
            }
        }
        store.keep_spare();
        Ok((store, machines))
    }

    /// Makes a copied store one of its own: a new generation, while nothing has the store.
    ///
    /// # Errors
    /// When a server has it, a newer version wrote it, or the file system refuses.
    pub fn renew(storage: &Disk, root: &Path) -> Result<StoreGeneration, StoreError> {
        let _lock = StoreLock::of_store(storage, root)?;
        rebuild::renew_generation(storage, root)
    }

    /// What the store lies on.
    pub fn storage(&self) -> &Disk {
        &self.storage
    }

    /// Free and total bytes below the image path.
    ///
    /// # Errors
    /// As the file system says.
    pub fn space(&self) -> io::Result<(u64, u64)> {
        self.storage.space(&self.root)
    }

    /// True when nothing can be written, as far as the file system says.
    pub fn is_read_only(&self) -> bool {
        self.storage.is_read_only(&self.root)
    }

    /// The image path.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A machine's folder below the image path.
    pub fn relative_folder(&self, machine: &MachineKey) -> String {
        relative_folder(self.separate_folders_by_user, machine)
    }

    /// A machine's folder.
    pub fn machine_folder(&self, machine: &MachineKey) -> PathBuf {
        self.root.join(self.relative_folder(machine))
    }

    /// Makes a machine's counters durable.
    ///
    /// # Errors
    /// As the file system says.
    pub fn save_counters(
        &self,
        machine: &MachineKey,
        counters: Counters,
    ) -> Result<(), StoreError> {
        let folder = self.machine_folder(machine);
        self.storage.make_folder(&folder).map_err(StoreError::io("make", &folder))?;
        write(
            &self.storage,
            &folder.join(MACHINE),
            &MachineFile { format: FORMAT, machine: machine.clone(), counters },
        )
    }

    /// Makes an open run durable, with its folders.
    ///
    /// # Errors
    /// As the file system says.
    pub fn save_open(&self, run: &OpenRun) -> Result<(), StoreError> {
        let folder = self.machine_folder(&run.machine);
        for name in run.disks.iter().map(|disk| disk.disk.as_str()).chain([OPEN, RUNS]) {
            let path = folder.join(name);
            self.storage.make_folder(&path).map_err(StoreError::io("make", &path))?;
        }
        write(&self.storage, &self.open_path(run), run)
    }

    /// Forgets an open run, durably, and, unless it was committed, its partial files. May be repeated.
    ///
    /// # Errors
    /// As the file system says.
    pub fn remove_open(&self, run: &OpenRun) -> Result<(), StoreError> {
        let folder = self.machine_folder(&run.machine);
        for name in run.disks.iter().flat_map(OpenDisk::open_files) {
            let path = folder.join(name);
            self.storage.remove(&path).map_err(StoreError::io("remove", &path))?;
        }
        let path = self.open_path(run);
        self.storage.remove(&path).map_err(StoreError::io("remove", &path))?;
        // Its file names may be given to other runs from now on: it must not come back after a power cut.
        let open = folder.join(OPEN);
        self.storage.sync_folder(&open).map_err(StoreError::io("sync", &open))
    }

    /// True when a file or an open run has this name: a path without its extension, relative to the machine's folder.
    ///
    /// # Errors
    /// As the file system says.
    pub fn is_taken(&self, machine: &MachineKey, stem: &str) -> Result<bool, StoreError> {
        let folder = self.machine_folder(machine);
        for kind in
            ["vhdx", "vhdx.stub", "vhdx.partial", "vhd", "vhd.stub", "vhd.partial", "journal"]
        {
            if exists(&self.storage, &folder.join(format!("{stem}.{kind}")))? {
                return Ok(true);
            }
        }
        // A run whose files are gone, but whose end the disk has refused, is still one after a restart.
        for path in files_in(&self.storage, &folder.join(OPEN), "json")? {
            let open = read::<OpenRun>(&self.storage, &path)?;
            if open.is_some_and(|run| run.disks.iter().any(|disk| disk.stem == stem)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn open_path(&self, run: &OpenRun) -> PathBuf {
        self.machine_folder(&run.machine).join(OPEN).join(format!("{}.json", run.backup))
    }

    /// The machine whose folder this is, by its name alone.
    fn machine_of(&self, folder: &Path) -> Option<MachineKey> {
        let below = folder.strip_prefix(&self.root).ok()?.to_str()?;
        let (user, machine) =
            below.split_once(if self.separate_folders_by_user { '/' } else { '@' })?;
        MachineKey::new(user, machine).ok()
    }

    fn load_machine(
        &self,
        folder: &Path,
        unknown: Unknown,
    ) -> Result<Option<(MachineKey, MachineState)>, StoreError> {
        let path = folder.join(MACHINE);
        let mut file = match read_or_put_aside::<MachineFile>(&self.storage, &path)? {
            Some(file) => file,
            // Counters are raised by the next start; what was backed up counts.
            None => match self.machine_of(folder) {
                Some(machine) if has_manifests(&self.storage, folder)? => {
                    tracing::error!(path = %path.display(), "a machine's file is missing or damaged: it is made again");
                    let counters = Counters::default();
                    let file = MachineFile { format: FORMAT, machine, counters };
                    write(&self.storage, &path, &file)?;
                    file
                }
                _ => return Ok(None),
            },
        };
        if self.machine_folder(&file.machine) != folder {
            let reason = format!("it belongs to machine {}, whose folder is another", file.machine);
            return Err(StoreError::Damaged { path, reason });
        }
        let mut state = MachineState { counters: file.counters, ..MachineState::default() };
        state.faults = self.look_for_faults(folder, &file)?;
        let last = last_sequence(&self.storage, folder)?;
        state.last_sequence = last.max(file.counters.purged_sequence);
        state.health = Health::load(&self.storage, folder, &file.machine)?;
        state.proofs = Proofs::load(&self.storage, folder, &file.machine, self.generation)?;
        self.load_guard(folder, &file.machine, &mut state)?;
        let mut unread = false;
        for path in files_in(&self.storage, &folder.join(RUNS), "json")? {
            match read::<Run>(&self.storage, &path) {
                Ok(Some(run)) if run.machine == file.machine => state.history.add(Arc::new(run)),
                Ok(_) => {
                    tracing::error!(path = %path.display(), "a run manifest of another machine is left out");
                    unread = true;
                }
                Err(error @ StoreError::Newer { .. }) => return Err(error),
                Err(error @ StoreError::Damaged { .. }) => {
                    tracing::error!(%error, "a run manifest is left out; its images stay where they are");
                    put_aside(&self.storage, &path)?;
                }
                Err(error) => {
                    tracing::error!(%error, "a run manifest can't be read and is left out");
                    unread = true;
                }
            }
        }
        unread |= !files_in(&self.storage, &folder.join(RUNS), DAMAGED)?.is_empty();
        unread |= !trash::load(&self.storage, folder, &file.machine, &mut state.history)?;
        state.incomplete = unread;
        // Its file may have been lost.
        file.counters.use_counter = file.counters.use_counter.max(state.history.use_counter());
        state.counters = file.counters;
        self.finish_merges(&mut file, &mut state)?;
        let is_readable = |disk: &DiskId| !state.faults.disks.contains_key(disk);
        let looked =
            state.health.look_for_stubs(&self.storage, folder, &state.history, &is_readable);
        looked.map_err(StoreError::io("look for stubs in", folder))?;
        for path in files_in(&self.storage, &folder.join(OPEN), "json")? {
            match read::<OpenRun>(&self.storage, &path) {
                // Its files can't be looked at.
                Ok(Some(run))
                    if state.faults.of_disks(run.disks.iter().map(|d| &d.disk)).is_some() => {}
                Ok(Some(run)) if state.history.run(run.backup).is_some() => {
                    // It is told as committed from now on, but its commit may have been killed before the last sync.
                    let runs = folder.join(RUNS);
                    self.storage.sync_folder(&runs).map_err(StoreError::io("sync", &runs))?;
                    self.remove_open(&run)?
                }
                // Its manifest may be the one that can't be read.
                Ok(Some(_)) if unread => {}
                Ok(Some(run)) => {
                    take_back(&self.storage, folder, &run, &published_files(folder, &state))?;
                    state.open.push(run);
                }
                Ok(None) => {}
                Err(error @ StoreError::Newer { .. }) => return Err(error),
                Err(error @ StoreError::Io { .. }) => {
                    tracing::error!(%error, "an open run can't be read and is left alone");
                    unread = true;
                }
                Err(error) => {
                    tracing::error!(%error, "an open run can't be read: it is given up, its file is put aside");
                    put_aside(&self.storage, &path)?;
                }
            }
        }
        // What a damaged or lost manifest names may be whole: it stays, for whoever brings the manifest back.
        let is_complete = !state.incomplete && !state.history.lacks_links();
        if is_complete
            && unknown == Unknown::SetAside
            && state.unfinished.is_empty()
            && let Err(error) = set_aside_unknown(&self.storage, folder, &state)
        {
            tracing::error!(machine = %file.machine, %error, "what no run names stays where it is");
        }
        Ok(Some((file.machine, state)))
    }
}

fn relative_folder(separate_folders_by_user: bool, machine: &MachineKey) -> String {
    // Names can't hold an '@', so two machines never share a folder.
    let between = if separate_folders_by_user { '/' } else { '@' };
    format!("{}{between}{}", machine.user(), machine.machine())
}

/// True when a machine's folder has manifests of runs, kept or dropped.
fn has_manifests(storage: &Disk, folder: &Path) -> Result<bool, StoreError> {
    let any =
        |name| Ok::<_, StoreError>(!files_in(storage, &folder.join(name), "json")?.is_empty());
    Ok(any(RUNS)? || any(trash::TRASH)?)
}

/// Highest number that the name of a manifest begins with.
fn last_sequence(storage: &Disk, folder: &Path) -> Result<u64, StoreError> {
    let number =
        |path: &PathBuf| path.file_name()?.to_str()?.split('.').next()?.parse::<u64>().ok();
    let (runs, trash) =
        (list(storage, &folder.join(RUNS))?, list(storage, &folder.join(trash::TRASH))?);
    Ok(runs.iter().chain(&trash).filter_map(number).max().unwrap_or(0))
}

/// Images and tables that manifests name, those in the trash too.
fn published_files(folder: &Path, state: &MachineState) -> HashSet<PathBuf> {
    let files = |held: &Held| stub::files(folder, held.snapshot());
    state.history.links().flat_map(files).collect()
}

/// Moves files that nothing names to `set-aside`, so that they are neither used nor lost.
fn set_aside_unknown(
    storage: &Disk,
    folder: &Path,
    state: &MachineState,
) -> Result<(), StoreError> {
    let mut known = published_files(folder, state);
    for name in state.open.iter().flat_map(|run| &run.disks).flat_map(OpenDisk::open_files) {
        known.insert(folder.join(name));
    }
    for disk_folder in state.faults.readable_disks(storage, folder)? {
        for path in list(storage, &disk_folder)? {
            if known.contains(&path) || is_folder(storage, &path)? {
                continue;
            }
            let aside = disk_folder.join("set-aside");
            storage.make_folder(&aside).map_err(StoreError::io("make", &aside))?;
            tracing::warn!(path = %path.display(), "no run names this file: set aside");
            let to = free_name(storage, &aside.join(path.file_name().unwrap_or_default()))?;
            storage.rename(&path, &to).map_err(StoreError::io("set aside", &path))?;
        }
    }
    Ok(())
}
