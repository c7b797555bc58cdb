//! Chains on disk: where everything lies, what is read at start, and the commit point.
//!
//! ```text
//! <image_path>/.store.json                             id of the store, count of starts; .store.lock is held while in use
//! <image_path>/<user>/<machine>/.machine.json          use counter
//! <image_path>/<user>/<machine>/.pins.json             pinned snapshots
//! <image_path>/<user>/<machine>/.runs/<sequence>.json  run manifests: a run is committed when its file is here
//! <image_path>/<user>/<machine>/.trash/<sequence>.json those of dropped runs, each with a record .why.json
//! <image_path>/<user>/<machine>/.merge/<link>.json     merges that are decided and not finished
//! <image_path>/<user>/<machine>/.open/<backup>.json    runs that are not
//! <image_path>/<user>/<machine>/<disk>/*.vhdx, *.table images and their hashes; *.partial, *.journal of open runs
//! ```
//!
//! Our own files start with a dot, which no name from the wire does. Every JSON file ends in a line with the BLAKE3 sum
//! of what stands before it. A crash leaves each file old or new. Images that no manifest and no open run names are
//! moved to `<disk>/set-aside/` at start, never deleted.

mod merges;
mod pins;
mod trash;

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use janus_proto::ids::{BackupId, DiskId, MachineKey, SessionId, SnapshotId, StoreGeneration};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{FORMAT, History, Run, merge::Intent};
use crate::storage;

const RUNS: &str = ".runs";
const OPEN: &str = ".open";
const MACHINE: &str = ".machine.json";

/// What can go wrong with the store's own files.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
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
}

impl OpenDisk {
    /// The image or table while the run is open, relative to the machine's folder.
    pub fn partial(&self, kind: &str) -> String {
        format!("{}.{kind}.partial", self.stem)
    }

    /// The session's journal, relative to the machine's folder.
    pub fn journal(&self) -> String {
        format!("{}.journal", self.stem)
    }

    /// The image (`vhdx`) or table (`table`) once committed, relative to the machine's folder.
    pub fn published(&self, kind: &str) -> String {
        format!("{}.{kind}", self.stem)
    }

    fn open_files(&self) -> [String; 3] {
        [self.partial("vhdx"), self.partial("table"), self.journal()]
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
}

/// The folder tree of one server, locked for this process.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    separate_folders_by_user: bool,
    /// Id of this store.
    pub generation: StoreGeneration,
    /// Number of this start of the server.
    pub start_epoch: u64,
    _lock: File,
}

impl Store {
    /// Opens or makes the store at `root` and reads all machines.
    ///
    /// # Errors
    /// When the folder can't be written, is in use, or was written by a newer version. Damaged manifests are logged and
    /// left out.
    pub fn open(
        root: &Path,
        separate_folders_by_user: bool,
    ) -> Result<(Self, HashMap<MachineKey, MachineState>), StoreError> {
        storage::make_folder(root).map_err(StoreError::io("make the image path", root))?;
        let lock_path = root.join(".store.lock");
        let lock =
            File::create(&lock_path).map_err(StoreError::io("write to the image path", root))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| StoreError::Locked { path: root.to_owned() })?;
        let file_path = root.join(".store.json");
        let mut file = match read_or_put_aside::<StoreFile>(&file_path)? {
            Some(file) => file,
            None => StoreFile { format: FORMAT, generation: StoreGeneration::new(), starts: 0 },
        };
        file.starts += 1;
        write(&file_path, &file)?;
        let store = Self {
            root: root.to_owned(),
            separate_folders_by_user,
            generation: file.generation,
            start_epoch: file.starts,
            _lock: lock,
        };
        let mut machines = HashMap::new();
        for folder in store.machine_folders()? {
            if let Some((key, state)) = store.load_machine(&folder)? {
                machines.insert(key, state);
            }
        }
        Ok((store, machines))
    }

    /// The image path.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A machine's folder below the image path.
    pub fn relative_folder(&self, machine: &MachineKey) -> String {
        // Names can't hold an '@', so two machines never share a folder.
        let between = if self.separate_folders_by_user { '/' } else { '@' };
        format!("{}{between}{}", machine.user(), machine.machine())
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
        storage::make_folder(&folder).map_err(StoreError::io("make", &folder))?;
        write(
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
            storage::make_folder(&path).map_err(StoreError::io("make", &path))?;
        }
        write(&self.open_path(run), run)
    }

    /// Forgets an open run and, unless it was committed, its partial files.
    ///
    /// # Errors
    /// As the file system says.
    pub fn remove_open(&self, run: &OpenRun) -> Result<(), StoreError> {
        let folder = self.machine_folder(&run.machine);
        for name in run.disks.iter().flat_map(OpenDisk::open_files) {
            let path = folder.join(name);
            storage::remove(&path).map_err(StoreError::io("remove", &path))?;
        }
        let path = self.open_path(run);
        storage::remove(&path).map_err(StoreError::io("remove", &path))
    }

    /// Publishes a run: gives its synced partial files their names, then writes the manifest, the commit point.
    ///
    /// # Errors
    /// As the file system says. The run is not committed then, its files have their partial names again, and publishing
    /// may be tried again.
    pub fn publish(&self, run: &Run, open: &OpenRun) -> Result<(), StoreError> {
        let folder = self.machine_folder(&run.machine);
        let published = name_and_publish(&folder, run, open);
        if published.is_err() {
            take_back(&folder, open)?;
        }
        published
    }

    fn open_path(&self, run: &OpenRun) -> PathBuf {
        self.machine_folder(&run.machine).join(OPEN).join(format!("{}.json", run.backup))
    }

    fn machine_folders(&self) -> Result<Vec<PathBuf>, StoreError> {
        let first = folders_in(&self.root)?;
        if !self.separate_folders_by_user {
            return Ok(first);
        }
        let mut all = Vec::new();
        for user in first {
            all.extend(folders_in(&user)?);
        }
        Ok(all)
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
    ) -> Result<Option<(MachineKey, MachineState)>, StoreError> {
        let path = folder.join(MACHINE);
        let mut file = match read_or_put_aside::<MachineFile>(&path)? {
            Some(file) => file,
            // Counters are raised by the next start; what was backed up counts.
            None => match self.machine_of(folder) {
                Some(machine) if has_manifests(folder)? => {
                    tracing::error!(path = %path.display(), "a machine's file is missing or damaged: it is made again");
                    let counters = Counters::default();
                    let file = MachineFile { format: FORMAT, machine, counters };
                    write(&path, &file)?;
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
        state.last_sequence = last_sequence(folder)?.max(file.counters.purged_sequence);
        let mut unread = false;
        for path in files_in(&folder.join(RUNS), "json")? {
            match read::<Run>(&path) {
                Ok(Some(run)) if run.machine == file.machine => state.history.add(Arc::new(run)),
                Ok(_) => {
                    tracing::error!(path = %path.display(), "a run manifest of another machine is left out");
                    unread = true;
                }
                Err(error @ StoreError::Newer { .. }) => return Err(error),
                Err(error @ StoreError::Damaged { .. }) => {
                    tracing::error!(%error, "a run manifest is left out; its images stay where they are");
                    put_aside(&path)?;
                }
                Err(error) => {
                    tracing::error!(%error, "a run manifest can't be read and is left out");
                    unread = true;
                }
            }
        }
        unread |= !files_in(&folder.join(RUNS), DAMAGED)?.is_empty();
        unread |= !trash::load(folder, &file.machine, &mut state.history)?;
        state.incomplete = unread;
        self.finish_merges(&mut file, &mut state)?;
        for path in files_in(&folder.join(OPEN), "json")? {
            match read::<OpenRun>(&path) {
                Ok(Some(run)) if state.history.run(run.backup).is_some() => {
                    self.remove_open(&run)?
                }
                Ok(Some(run)) => {
                    take_back(folder, &run)?;
                    state.open.push(run);
                }
                Ok(None) => {}
                Err(error @ StoreError::Newer { .. }) => return Err(error),
                Err(error) => {
                    tracing::error!(%error, "an open run can't be read and is given up");
                    storage::remove(&path).map_err(StoreError::io("remove", &path))?;
                }
            }
        }
        // What a damaged manifest names may be whole: it stays, for whoever brings the manifest back.
        if !state.incomplete && state.unfinished.is_empty() {
            set_aside_unknown(folder, &state)?;
        }
        Ok(Some((file.machine, state)))
    }
}

/// True when a machine's folder has manifests of runs, kept or dropped.
fn has_manifests(folder: &Path) -> Result<bool, StoreError> {
    let any = |name| Ok::<_, StoreError>(!files_in(&folder.join(name), "json")?.is_empty());
    Ok(any(RUNS)? || any(trash::TRASH)?)
}

/// Highest number that the name of a manifest begins with.
fn last_sequence(folder: &Path) -> Result<u64, StoreError> {
    let number =
        |entry: &fs::DirEntry| entry.file_name().to_str()?.split('.').next()?.parse::<u64>().ok();
    let (runs, trash) = (list(&folder.join(RUNS))?, list(&folder.join(trash::TRASH))?);
    Ok(runs.iter().chain(&trash).filter_map(number).max().unwrap_or(0))
}

fn name_and_publish(folder: &Path, run: &Run, open: &OpenRun) -> Result<(), StoreError> {
    for disk in &open.disks {
        for kind in ["vhdx", "table"] {
            let path = folder.join(disk.published(kind));
            fs::rename(folder.join(disk.partial(kind)), &path)
                .map_err(StoreError::io("publish", &path))?;
        }
        let disk_folder = folder.join(disk.disk.as_str());
        storage::sync_folder(&disk_folder).map_err(StoreError::io("sync", &disk_folder))?;
    }
    let path = trash::manifest_path(&folder.join(RUNS), run);
    if path.exists() {
        let source = io::Error::from(io::ErrorKind::AlreadyExists);
        return Err(StoreError::Io { action: "write over", path, source });
    }
    write(&path, run)
}

/// Undoes the renames of a publication that did not reach its manifest.
fn take_back(folder: &Path, run: &OpenRun) -> Result<(), StoreError> {
    for disk in &run.disks {
        for kind in ["vhdx", "table"] {
            let path = folder.join(disk.published(kind));
            if path.exists() {
                fs::rename(&path, folder.join(disk.partial(kind)))
                    .map_err(StoreError::io("take back", &path))?;
            }
        }
    }
    Ok(())
}

/// Moves files that nothing names to `set-aside`, so that they are neither used nor lost.
fn set_aside_unknown(folder: &Path, state: &MachineState) -> Result<(), StoreError> {
    let mut known: HashSet<PathBuf> = HashSet::new();
    for held in state.history.links() {
        known.insert(folder.join(&held.snapshot().image));
        known.insert(folder.join(&held.snapshot().table));
    }
    for name in state.open.iter().flat_map(|run| &run.disks).flat_map(OpenDisk::open_files) {
        known.insert(folder.join(name));
    }
    for disk_folder in folders_in(folder)? {
        for entry in list(&disk_folder)? {
            let path = entry.path();
            if path.is_dir() || known.contains(&path) {
                continue;
            }
            let aside = disk_folder.join("set-aside");
            storage::make_folder(&aside).map_err(StoreError::io("make", &aside))?;
            tracing::warn!(path = %path.display(), "no run names this file: set aside");
            fs::rename(&path, aside.join(entry.file_name()))
                .map_err(StoreError::io("set aside", &path))?;
        }
    }
    Ok(())
}

fn list(folder: &Path) -> Result<Vec<fs::DirEntry>, StoreError> {
    match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries.and_then(Iterator::collect).map_err(StoreError::io("list", folder)),
    }
}

/// Folders of users, machines or disks: our own start with a dot.
fn folders_in(folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let own = |entry: &&fs::DirEntry| entry.file_name().as_encoded_bytes().starts_with(b".");
    let entries = list(folder)?;
    Ok(entries
        .iter()
        .filter(|entry| !own(entry))
        .map(fs::DirEntry::path)
        .filter(|path| path.is_dir())
        .collect())
}

fn files_in(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, StoreError> {
    let entries = list(folder)?;
    let paths = entries.iter().map(fs::DirEntry::path);
    Ok(paths.filter(|path| path.extension().is_some_and(|e| e == extension)).collect())
}

/// Largest JSON file we read: a run of 64 disks is far below.
const MAX_FILE_BYTES: u64 = 4 << 20;

fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    let damaged =
        |e: serde_json::Error| StoreError::Damaged { path: path.to_owned(), reason: e.to_string() };
    let mut bytes = serde_json::to_vec_pretty(value).map_err(damaged)?;
    bytes.push(b'\n');
    let sum = blake3::hash(&bytes);
    bytes.extend_from_slice(format!("{sum}\n").as_bytes());
    storage::replace(path, &bytes).map_err(StoreError::io("write", path))
}

/// Extension of files that could not be read. They are kept, and never written over.
const DAMAGED: &str = "damaged";

/// A file that can be made again: a damaged one is kept beside and counts as missing.
fn read_or_put_aside<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    match read(path) {
        Err(error @ StoreError::Damaged { .. }) => {
            tracing::error!(%error, "a file is put aside");
            put_aside(path)?;
            Ok(None)
        }
        other => other,
    }
}

/// Gives a damaged file a name that nothing else has.
fn put_aside(path: &Path) -> Result<(), StoreError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!("{name}.{}.{DAMAGED}", uuid::Uuid::now_v7().simple()));
    fs::rename(path, &aside).map_err(StoreError::io("put aside", path))
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    let damaged = |reason: String| StoreError::Damaged { path: path.to_owned(), reason };
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Ok(metadata) if metadata.len() > MAX_FILE_BYTES => return Err(damaged("too long".into())),
        other => other.map_err(StoreError::io("read", path))?,
    };
    let bytes = fs::read(path).map_err(StoreError::io("read", path))?;
    let split = bytes.len().checked_sub(65).ok_or_else(|| damaged("too short".into()))?;
    let (json, sum) = bytes.split_at(split);
    if sum.strip_suffix(b"\n") != Some(blake3::hash(json).to_string().as_bytes()) {
        return Err(damaged("its sum is wrong".into()));
    }
    let value: serde_json::Value =
        serde_json::from_slice(json).map_err(|e| damaged(e.to_string()))?;
    let format = value.get("format").and_then(serde_json::Value::as_u64).unwrap_or_default();
    if format > u64::from(FORMAT) {
        return Err(StoreError::Newer { path: path.to_owned(), format });
    }
    serde_json::from_value(value).map(Some).map_err(|e| damaged(e.to_string()))
}
