//! sled behind one seam: every value with a sum bound to its key, every call guarded against sled's panics, files synced
//! by ourselves (on Linux `flush` only asks for write-back), memory bounded by reopening.

use std::{
    fs::{self, File},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use sled::IVec;

use super::CacheError;

const CACHE_BYTES: u64 = 16 << 20;
const SUM_BYTES: usize = 16;
/// sled queues thousands of accesses before it evicts a page (measured: memory grows to the size of the payload), so
/// the database is reopened after this much, unless opening is so slow that it would be felt: all who scan wait for it ...
const WINDOW_BYTES: u64 = 32 << 20;
const WINDOW_PER_OPEN: u32 = 100;
/// ... but then at the latest.
const MAX_WINDOW_BYTES: u64 = 2 * WINDOW_BYTES;
/// A closed database's lock may outlive it for a moment in sled's own threads.
const REOPEN_PATIENCE: Duration = Duration::from_secs(10);

/// Name of a value. Encoded big endian after a letter, so that the values of a layer lie together, in disk order.
#[derive(Clone, Copy, Debug)]
pub(super) enum Key {
    /// Hashes of a segment, or of a quarter of it.
    Hashes { layer: u64, segment: u64, piece: u8 },
    /// Part of the set of segments that a layer has.
    Segments { layer: u64, chunk: u32 },
    /// Part of a set of blocks.
    Blocks { set: u64, part: u32 },
}

/// Letters of the kinds of keys.
pub(super) const HASHES: u8 = b'H';
pub(super) const SEGMENTS: u8 = b'S';
pub(super) const BLOCKS: u8 = b'B';

impl Key {
    fn encode(self) -> Vec<u8> {
        let (kind, id) = match self {
            Self::Hashes { layer, .. } => (HASHES, layer),
            Self::Segments { layer, .. } => (SEGMENTS, layer),
            Self::Blocks { set, .. } => (BLOCKS, set),
        };
        let mut key = prefix(kind, id);
        match self {
            Self::Hashes { segment, piece, .. } => {
                key.extend(segment.to_be_bytes());
                key.push(piece);
            }
            Self::Segments { chunk: number, .. } | Self::Blocks { part: number, .. } => {
                key.extend(number.to_be_bytes())
            }
        }
        key
    }
}

fn prefix(kind: u8, id: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(18);
    key.push(kind);
    key.extend(id.to_be_bytes());
    key
}

/// A value whose sum was right.
pub(super) struct Value(IVec);

impl std::ops::Deref for Value {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0[..self.0.len() - SUM_BYTES]
    }
}

/// One open database.
pub(super) struct Engine {
    folder: PathBuf,
    number: u64,
    /// `None` only after a reopening that failed.
    db: Option<sled::Db>,
    /// sled panicked: not even its drop is to be trusted.
    broken: AtomicBool,
    touched_bytes: AtomicU64,
    opened: Instant,
    opening_took: Duration,
    /// Of the first opening by this process: the system has read little of it before.
    first_opening_took: Duration,
}

impl Engine {
    pub(super) fn open(folder: PathBuf, number: u64) -> Result<Self, CacheError> {
        let mut engine = Self {
            folder,
            number,
            db: None,
            broken: AtomicBool::new(false),
            touched_bytes: AtomicU64::new(0),
            opened: Instant::now(),
            opening_took: Duration::ZERO,
            first_opening_took: Duration::ZERO,
        };
        engine.connect()?;
        engine.first_opening_took = engine.opening_took;
        Ok(engine)
    }

    pub(super) fn number(&self) -> u64 {
        self.number
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn damaged(&self, what: impl Into<String>) -> CacheError {
        CacheError::Damaged { path: self.folder.clone(), what: what.into() }
    }

    pub(super) fn put(&self, key: Key, payload: &[u8]) -> Result<(), CacheError> {
        let key = key.encode();
        let mut value = Vec::with_capacity(payload.len() + SUM_BYTES);
        value.extend_from_slice(payload);
        value.extend_from_slice(&sum(&key, payload));
        self.touch(value.len());
        self.guarded(|db| db.insert(&key, value)).map(drop)
    }

    /// The value, if there is one.
    pub(super) fn get(&self, key: Key) -> Result<Option<Value>, CacheError> {
        let key = key.encode();
        match self.guarded(|db| db.get(&key))? {
            Some(value) => self.checked(&key, value).map(Some),
            None => Ok(None),
        }
    }

    /// The values of a segment in a layer, by piece.
    pub(super) fn pieces(&self, layer: u64, segment: u64) -> Result<Vec<(u8, Value)>, CacheError> {
        let mut start = prefix(HASHES, layer);
        start.extend(segment.to_be_bytes());
        let found = self.guarded(|db| db.scan_prefix(&start).collect::<sled::Result<Vec<_>>>())?;
        let piece = |(key, value): (IVec, IVec)| {
            let piece = key.last().copied().unwrap_or_default();
            self.checked(&key, value).map(|value| (piece, value))
        };
        found.into_iter().map(piece).collect()
    }

    /// The chunks of a layer's set of segments, by number.
    pub(super) fn segment_chunks(&self, layer: u64) -> Result<Vec<(u32, Value)>, CacheError> {
        let start = prefix(SEGMENTS, layer);
        let found = self.guarded(|db| db.scan_prefix(&start).collect::<sled::Result<Vec<_>>>())?;
        let chunk = |(key, value): (IVec, IVec)| {
            let Some((_, number)) = key.split_last_chunk::<4>() else {
                return Err(self.damaged("a key has an unknown form"));
            };
            Ok((u32::from_be_bytes(*number), self.checked(&key, value)?))
        };
        found.into_iter().map(chunk).collect()
    }

    /// Ids that have values of a kind, ascending.
    pub(super) fn ids(&self, kind: u8) -> Result<Vec<u64>, CacheError> {
        let mut ids = Vec::new();
        let mut start = vec![kind];
        while let Some((key, _)) =
            self.guarded(|db| db.range(start.as_slice()..).next().transpose())?
        {
            let Some((&[found, ref id @ ..], _)) = key.split_first_chunk::<9>() else {
                return Err(self.damaged("a key has an unknown form"));
            };
            if found != kind {
                break;
            }
            let id = u64::from_be_bytes(*id);
            ids.push(id);
            start = match id.checked_add(1) {
                Some(next) => prefix(kind, next),
                None => break,
            };
        }
        Ok(ids)
    }

    /// Removes all values of one id.
    pub(super) fn remove_all(&self, kind: u8, id: u64) -> Result<(), CacheError> {
        let start = prefix(kind, id);
        self.guarded(|db| {
            db.scan_prefix(&start).keys().try_for_each(|key| db.remove(key?).map(drop))
        })
    }

    /// Returns when everything put so far survives a power cut.
    pub(super) fn sync(&self) -> Result<(), CacheError> {
        self.guarded(|db| db.flush())?;
        sync_tree(&self.folder)
            .map_err(|source| CacheError::Io { path: self.folder.clone(), source })
    }

    /// Bytes that the database takes on disk.
    pub(super) fn allocated_bytes(&self) -> u64 {
        allocated(&self.folder).unwrap_or(0)
    }

    /// How long it took to open it at first.
    pub(super) fn first_opening_took(&self) -> Duration {
        self.first_opening_took
    }

    /// So much was read and written since the last opening that sled's memory is worth giving back.
    pub(super) fn is_swollen(&self) -> bool {
        let touched = self.touched_bytes.load(Ordering::Relaxed);
        touched > MAX_WINDOW_BYTES
            || (touched > WINDOW_BYTES
                && self.opened.elapsed() > self.opening_took * WINDOW_PER_OPEN)
    }

    pub(super) fn reopen(&mut self) -> Result<(), CacheError> {
        self.close();
        self.connect()
    }

    pub(super) fn close(&mut self) {
        let Some(db) = self.db.take() else { return };
        if self.broken.load(Ordering::Relaxed) {
            // Its drop flushes, which could panic or wait for ever; this leaks the memory of one database.
            std::mem::forget(db);
        } else if catch_unwind(AssertUnwindSafe(|| drop(db))).is_err() {
            self.broken.store(true, Ordering::Relaxed);
        }
    }

    fn connect(&mut self) -> Result<(), CacheError> {
        let begun = Instant::now();
        remove_unfinished_snapshots(&self.folder)
            .map_err(|source| CacheError::Io { path: self.folder.clone(), source })?;
        let config = sled::Config::new()
            .path(&self.folder)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(None)
            .use_compression(false);
        let db = loop {
            match catch_unwind(AssertUnwindSafe(|| config.open())) {
                Ok(Ok(db)) => break db,
                Ok(Err(error)) if is_locked(&error) && begun.elapsed() < REOPEN_PATIENCE => {
                    thread::sleep(Duration::from_millis(2));
                }
                Ok(Err(error)) => return Err(self.failed(error)),
                Err(panic) => {
                    return Err(self.damaged(format!("sled panicked: {}", panic_text(&*panic))));
                }
            }
        };
        self.db = Some(db);
        self.touched_bytes = AtomicU64::new(0);
        self.opening_took = begun.elapsed();
        self.opened = Instant::now();
        Ok(())
    }

    fn guarded<T>(&self, call: impl FnOnce(&sled::Db) -> sled::Result<T>) -> Result<T, CacheError> {
        let Some(db) = self.db.as_ref().filter(|_| !self.broken.load(Ordering::Relaxed)) else {
            return Err(self.damaged("the database is closed after a failure"));
        };
        match catch_unwind(AssertUnwindSafe(|| call(db))) {
            Ok(result) => result.map_err(|error| self.failed(error)),
            Err(panic) => {
                self.broken.store(true, Ordering::Relaxed);
                Err(self.damaged(format!("sled panicked: {}", panic_text(&*panic))))
            }
        }
    }

    fn checked(&self, key: &[u8], value: IVec) -> Result<Value, CacheError> {
        self.touch(value.len());
        match value.split_last_chunk::<SUM_BYTES>() {
            Some((payload, stored)) if *stored == sum(key, payload) => Ok(Value(value)),
            _ => Err(self.damaged("a value's sum is wrong")),
        }
    }

    fn touch(&self, bytes: usize) {
        self.touched_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// What the surroundings refuse is not damage: moving the database aside wouldn't help.
    fn failed(&self, error: sled::Error) -> CacheError {
        use io::ErrorKind as Kind;
        match error {
            sled::Error::Io(source)
                if matches!(
                    source.kind(),
                    Kind::PermissionDenied
                        | Kind::StorageFull
                        | Kind::QuotaExceeded
                        | Kind::ReadOnlyFilesystem
                        | Kind::OutOfMemory
                        | Kind::WouldBlock
                ) =>
            {
                CacheError::Io { path: self.folder.clone(), source }
            }
            other => self.damaged(other.to_string()),
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close();
    }
}

/// The payload first: BLAKE3 is fastest on whole aligned chunks.
fn sum(key: &[u8], payload: &[u8]) -> [u8; SUM_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(payload).update(key);
    *hasher.finalize().as_bytes().first_chunk().expect("a BLAKE3 hash is longer than a sum")
}

/// Removes what a process that was killed while it opened the database left of sled's snapshot file.
///
/// sled writes `snap.<position>.generating` and renames it, but takes such a file for a whole snapshot when it opens next
/// (0.34.7, `get_snapshot_files` leaves out another ending), and gives the database up as corrupt. It only writes one
/// while it opens, which is when we hold the folder's lock, so nobody is writing one now.
fn remove_unfinished_snapshots(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        if name.starts_with(b"snap.") && name.ends_with(b".generating") {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn is_locked(error: &sled::Error) -> bool {
    // sled wraps the lock's refusal in a new error of kind Other, with this text.
    matches!(error, sled::Error::Io(source)
        if source.kind() == io::ErrorKind::WouldBlock || source.to_string().contains("could not acquire lock"))
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}

fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
            continue;
        }
        match File::open(entry.path()) {
            Ok(file) => file.sync_all()?,
            // sled may replace its snapshot file at any time.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    File::open(folder)?.sync_all()
}

/// What a folder takes on the file system.
pub(super) fn allocated(folder: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        bytes += if entry.file_type()?.is_dir() {
            allocated(&entry.path())?
        } else {
            allocated_by(&entry.metadata()?)
        };
    }
    Ok(bytes)
}

#[cfg(unix)]
fn allocated_by(file: &fs::Metadata) -> u64 {
    use std::os::unix::fs::MetadataExt;
    file.blocks() * 512
}

#[cfg(not(unix))]
fn allocated_by(file: &fs::Metadata) -> u64 {
    file.len()
}
