//! The folder of one disk's cache: its lock, `CURRENT`, the databases by number, and what was moved aside.

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use super::CacheError;
use crate::files::{lock_file, private_folder, replace};

const CURRENT: &str = "CURRENT";
const CURRENT_NEW: &str = "CURRENT.new";
/// Held while a cache is open.
pub(super) const LOCK: &str = "lock";
const DATABASE: &str = "db-";
const CURSOR: &str = "cursor-";
/// A larger file isn't read.
const MAX_CURSOR_BYTES: u64 = 1 << 30;
const QUARANTINE: &str = "quarantine-";

/// A folder that this process has to itself.
pub(super) struct Place {
    path: PathBuf,
    /// The system releases it with the process, however that ends.
    _lock: File,
}

impl Place {
    pub(super) fn lock(path: PathBuf) -> Result<Self, CacheError> {
        private_folder(&path).map_err(at(&path))?;
        let file = path.join(LOCK);
        let lock = lock_file(&file).map_err(at(&file))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path, _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(CacheError::Busy { path: file }),
            Err(TryLockError::Error(source)) => Err(CacheError::Io { path: file, source }),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn database(&self, number: u64) -> PathBuf {
        self.path.join(format!("{DATABASE}{number}"))
    }

    pub(super) fn read_current(&self) -> Result<Option<Vec<u8>>, CacheError> {
        read_current(&self.path)
    }

    /// Replaces `CURRENT`: a crash leaves the old one or the new one. Durable when it returns.
    pub(super) fn write_current(&self, bytes: &[u8]) -> Result<(), CacheError> {
        let current = self.path.join(CURRENT);
        replace(&current, bytes).map_err(at(&current))
    }

    /// The change journals' cursors of this name.
    pub(super) fn read_cursor(&self, name: &str) -> Result<Option<Vec<u8>>, CacheError> {
        let path = self.path.join(format!("{CURSOR}{name}"));
        let read = || {
            let length = fs::metadata(&path)?.len();
            if length > MAX_CURSOR_BYTES { Ok(None) } else { fs::read(&path).map(Some) }
        };
        match read() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map_err(at(&path)),
        }
    }

    /// Keeps the change journals' cursors under this name. Durable when it returns.
    pub(super) fn write_cursor(&self, name: &str, bytes: &[u8]) -> Result<(), CacheError> {
        let path = self.path.join(format!("{CURSOR}{name}"));
        replace(&path, bytes).map_err(at(&path))
    }

    /// Deletes the cursors that `CURRENT` doesn't name.
    pub(super) fn remove_cursors_but(&self, name: &str) -> Result<(), CacheError> {
        let keep = self.path.join(format!("{CURSOR}{name}"));
        for path in self.entries(CURSOR)?.into_iter().filter(|path| *path != keep) {
            fs::remove_file(&path).map_err(at(&path))?;
        }
        Ok(())
    }

    /// Deletes databases that nothing names: of an aborted first run or compaction.
    pub(super) fn remove_databases_but(&self, number: u64) -> Result<(), CacheError> {
        let keep = self.database(number);
        for path in self.entries(DATABASE)?.into_iter().filter(|path| *path != keep) {
            fs::remove_dir_all(&path).map_err(at(&path))?;
        }
        Ok(())
    }

    /// Moves `CURRENT` and all databases into a folder of their own and deletes earlier such folders.
    pub(super) fn quarantine(&self) -> Result<(), CacheError> {
        let earlier = self.entries(QUARANTINE)?;
        let target = self.free_quarantine();
        fs::create_dir(&target).map_err(at(&target))?;
        // CURRENT first: without it the rest is nobody's, whenever a crash comes.
        let mut moved = vec![self.path.join(CURRENT)];
        moved.extend(self.entries(DATABASE)?);
        for path in moved {
            let Some(name) = path.file_name() else { continue };
            match fs::rename(&path, target.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(at(&path)(error));
                }
                _ => {}
            }
        }
        File::open(&self.path).and_then(|folder| folder.sync_all()).map_err(at(&self.path))?;
        for path in earlier {
            fs::remove_dir_all(&path).map_err(at(&path))?;
        }
        Ok(())
    }

    /// Deletes what was moved aside. That it stays costs space only, so it is tried again by the next who comes here.
    pub(super) fn remove_quarantine(&self) {
        let removed = self.entries(QUARANTINE).and_then(|found| {
            found.iter().try_for_each(|path| fs::remove_dir_all(path).map_err(at(path)))
        });
        if let Err(error) = removed {
            tracing::warn!(%error, "a damaged hash cache that was moved aside stays");
        }
    }

    /// The time in the name is for people; nothing reads it.
    fn free_quarantine(&self) -> PathBuf {
        let ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        let named = |ms: u128| self.path.join(format!("{QUARANTINE}{ms}"));
        (ms..).map(named).find(|path| !path.exists()).unwrap_or_else(|| named(ms))
    }

    fn entries(&self, prefix: &str) -> Result<Vec<PathBuf>, CacheError> {
        entries(&self.path, prefix)
    }

    /// Removes everything but the lock.
    pub(super) fn clear(&self) -> Result<(), CacheError> {
        // CURRENT first: without it the rest is nobody's, whenever a crash comes.
        for path in [self.path.join(CURRENT), self.path.join(CURRENT_NEW)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(at(&path)(error));
                }
                _ => {}
            }
        }
        for path in self.entries(CURSOR)? {
            fs::remove_file(&path).map_err(at(&path))?;
        }
        for path in [self.entries(DATABASE)?, self.entries(QUARANTINE)?].concat() {
            fs::remove_dir_all(&path).map_err(at(&path))?;
        }
        Ok(())
    }
}

/// The bytes of a folder's `CURRENT`, which is always whole.
pub(super) fn read_current(folder: &Path) -> Result<Option<Vec<u8>>, CacheError> {
    let path = folder.join(CURRENT);
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CacheError::Io { path, source }),
    }
}

/// Whether a database was moved aside.
pub(super) fn has_quarantine(folder: &Path) -> Result<bool, CacheError> {
    entries(folder, QUARANTINE).map(|found| !found.is_empty())
}

fn entries(folder: &Path, prefix: &str) -> Result<Vec<PathBuf>, CacheError> {
    let read = || -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                found.push(entry.path());
            }
        }
        Ok(found)
    };
    read().map_err(at(folder))
}

pub(super) fn at(path: &Path) -> impl Fn(io::Error) -> CacheError + use<> {
    let path = path.to_path_buf();
    move |source| CacheError::Io { path: path.clone(), source }
}
