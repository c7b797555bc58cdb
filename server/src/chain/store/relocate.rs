//! Moves a store to another path: every file is copied, read again and compared; then the new place is the store.
//!
//! While `<new>/.moving.json` is there no server opens the new place, and with `<old>/.moved.json` none opens the old one. The
//! second is written when everything is copied and synced, then the first is removed: at each moment one of the two can be
//! opened, or the move goes on. A file gets its name at the new place when it has been compared, with the time of its
//! original. With equal time and length an earlier move may have copied it, and it is compared again: a merge can give an image
//! the name, the length and, of a VHD, the time of the one that was copied. What was copied of a file that is not whole is kept
//! too.
//!
//! Nothing of the old place is removed.

use std::{
    collections::HashSet,
    io,
    path::{Path, PathBuf},
};

use janus_proto::{buffers::Buffer, ids::StoreGeneration, show};
use serde::{Deserialize, Serialize};

use super::{
    FORMAT, STORE, StoreError, StoreFile, StoreLock, exists, is_folder, list, read, write,
};
use crate::storage::{Access, Cloning, Disk, File, Metadata};

const MOVING: &str = ".moving.json";
const MOVED: &str = ".moved.json";
/// What a file is called until it is whole.
const PARTIAL: &str = ".moving";
/// What only a running server needs.
const NOT_COPIED: [&str; 4] = [".store.lock", ".admin.sock", MOVING, MOVED];

/// Why a store is not moved.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// Something of the store's own files.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// One place lies in the other.
    #[error("{} and {} lie in each other: choose a folder beside the store", from.display(), to.display())]
    Nested {
        /// The old place.
        from: PathBuf,
        /// The new one.
        to: PathBuf,
    },
    /// Something else is there.
    #[error("{} is not empty and not the copy of this store that an earlier move began: choose an empty folder", path.display())]
    Occupied {
        /// The new place.
        path: PathBuf,
    },
    /// The new place is gone.
    #[error("{} was moved to {}, where there is no store any more: bring that folder back; or remove {} to go on with what was here then, losing every backup made there since",
        from.display(), to.display(), marker.display())]
    Vanished {
        /// The old place.
        from: PathBuf,
        /// The new one.
        to: PathBuf,
        /// What says so.
        marker: PathBuf,
    },
    /// It can't fit.
    #[error("{} has {} free, {} are needed for what is not copied yet: make room there and move again, it goes on",
        path.display(), show::amount(*free_bytes), show::amount(*needed_bytes))]
    NoRoom {
        /// The new place.
        path: PathBuf,
        /// What is missing there.
        needed_bytes: u64,
        /// What is free.
        free_bytes: u64,
    },
    /// The copy is not what was copied, twice.
    #[error("the copy {} reads differently from its original: one of the two disks is failing", path.display())]
    Differs {
        /// The copy.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot {action} {}: {source}; what was copied stays, move again to go on", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl MoveError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// What a move did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Moved {
    /// Files of the store.
    pub files: u64,
    /// Of them those that an earlier move had copied, as a comparison of all their bytes has shown.
    pub found_files: u64,
    /// Bytes that were copied, holes left out.
    pub copied_bytes: u64,
    /// Bytes that both places share now.
    pub shared_bytes: u64,
}

/// Where the other place is.
#[derive(Serialize, Deserialize)]
struct Marker {
    format: u32,
    generation: StoreGeneration,
    path: PathBuf,
}

/// Refuses a place that is not, or no longer, a store to be opened.
pub(super) fn check_not_moved(storage: &Disk, root: &Path) -> Result<(), StoreError> {
    if let Some(marker) = read::<Marker>(storage, &root.join(MOVED))? {
        return Err(StoreError::Moved { path: root.to_owned(), to: marker.path });
    }
    if let Some(marker) = read::<Marker>(storage, &root.join(MOVING))? {
        return Err(StoreError::Moving { path: root.to_owned(), from: marker.path });
    }
    Ok(())
}

/// Moves the store at `from` to `to`, or goes on with it. `progress` hears of each file before it is copied: its number, the
/// number of all, and its path.
///
/// # Errors
/// When a server has one of the places, `to` holds something else, or a file system refuses. The old place is the store then,
/// and another call goes on.
pub fn relocate(
    storage: &Disk,
    from: &Path,
    to: &Path,
    progress: &dyn Fn(usize, usize, &Path),
) -> Result<Moved, MoveError> {
    let [from, to] = [absolute(from)?, absolute(to)?];
    if from.starts_with(&to) || to.starts_with(&from) {
        return Err(MoveError::Nested { from, to });
    }
    let _from_lock = StoreLock::take(storage, &from)?;
    let store = read::<StoreFile>(storage, &from.join(STORE))?;
    let generation = store.ok_or_else(|| StoreError::NoStore { path: from.clone() })?.generation;
    let moved = read::<Marker>(storage, &from.join(MOVED))?;
    if let Some(marker) = moved.as_ref().filter(|marker| marker.path != to) {
        return Err(StoreError::Moved { path: from, to: marker.path.clone() }.into());
    }
    if moved.is_some() && !exists(storage, &to.join(STORE))? {
        return Err(MoveError::Vanished { marker: from.join(MOVED), from, to });
    }
    storage.make_folder(&to).map_err(MoveError::io("make", &to))?;
    let _to_lock = StoreLock::take(storage, &to)?;
    if moved.is_some() {
        // It may have been written just before a kill: the old place must not be the store again after a power cut.
        storage.sync_folder(&from).map_err(MoveError::io("sync", &from))?;
        finish(storage, &to)?;
        return Ok(Moved::default());
    }
    begin(storage, &from, &to, generation)?;
    let moved = Move { storage, from: &from, to: &to, progress }.copy_all()?;
    write(storage, &from.join(MOVED), &Marker { format: FORMAT, generation, path: to.clone() })?;
    finish(storage, &to)?;
    Ok(moved)
}

fn absolute(path: &Path) -> Result<PathBuf, MoveError> {
    std::path::absolute(path).map_err(MoveError::io("find", path))
}

/// Makes sure that the new place is ours.
fn begin(
    storage: &Disk,
    from: &Path,
    to: &Path,
    generation: StoreGeneration,
) -> Result<(), MoveError> {
    let occupied = || MoveError::Occupied { path: to.to_owned() };
    match read::<Marker>(storage, &to.join(MOVING))? {
        Some(marker) if marker.generation == generation && marker.path == from => {
            // As above: without it what is copied would look like a store.
            return storage.sync_folder(to).map_err(MoveError::io("sync", to));
        }
        Some(_) => return Err(occupied()),
        None => {}
    }
    // The root of a file system has a folder of its own; a marker that was not finished is ours.
    let harmless = [".store.lock", "lost+found", ".moving.json.new"];
    let mut others = list(storage, to)?.into_iter();
    if others.any(|path| !harmless.iter().any(|name| path.ends_with(name))) {
        return Err(occupied());
    }
    let path = from.to_owned();
    Ok(write(storage, &to.join(MOVING), &Marker { format: FORMAT, generation, path })?)
}

fn finish(storage: &Disk, to: &Path) -> Result<(), MoveError> {
    let marker = to.join(MOVING);
    storage.remove(&marker).map_err(MoveError::io("remove", &marker))?;
    storage.sync_folder(to).map_err(MoveError::io("sync", to))
}

struct Move<'a> {
    storage: &'a Disk,
    from: &'a Path,
    to: &'a Path,
    progress: &'a dyn Fn(usize, usize, &Path),
}

/// A file to be copied, by its path below the places.
struct Entry {
    path: PathBuf,
    metadata: Metadata,
}

impl Move<'_> {
    fn copy_all(&self) -> Result<Moved, MoveError> {
        let (mut folders, mut files) = (vec![PathBuf::new()], Vec::new());
        self.look(Path::new(""), &mut folders, &mut files)?;
        self.clear(&folders, &files)?;
        let mut moved = Moved { files: files.len() as u64, ..Moved::default() };
        let mut left: u64 = files.iter().map(|file| file.metadata.allocated_bytes).sum();
        for folder in &folders {
            let path = self.to.join(folder);
            self.storage.make_folder(&path).map_err(MoveError::io("make", &path))?;
        }
        for (number, file) in files.iter().enumerate() {
            (self.progress)(number, files.len(), &file.path);
            if self.is_copied(file)? {
                moved.found_files += 1;
            } else {
                self.copy(file, left, &mut moved)?;
            }
            left -= file.metadata.allocated_bytes;
        }
        for folder in folders.iter().rev() {
            let path = self.to.join(folder);
            self.storage.sync_folder(&path).map_err(MoveError::io("sync", &path))?;
        }
        Ok(moved)
    }

    /// Lists what is below a folder.
    fn look(
        &self,
        folder: &Path,
        folders: &mut Vec<PathBuf>,
        files: &mut Vec<Entry>,
    ) -> Result<(), MoveError> {
        for path in list(self.storage, &self.from.join(folder))? {
            let name = folder.join(path.file_name().unwrap_or_default());
            if NOT_COPIED.iter().any(|other| name == Path::new(other))
                || name.ends_with("lost+found")
            {
                continue;
            }
            let metadata = self.storage.metadata(&path).map_err(MoveError::io("look at", &path))?;
            match metadata {
                Some(metadata) if metadata.is_folder => {
                    folders.push(name.clone());
                    self.look(&name, folders, files)?;
                }
                Some(metadata) => files.push(Entry { path: name, metadata }),
                None => {}
            }
        }
        Ok(())
    }

    /// Removes what an earlier move has copied and the store no longer has.
    fn clear(&self, folders: &[PathBuf], files: &[Entry]) -> Result<(), MoveError> {
        let mut wanted: HashSet<PathBuf> = folders.iter().map(|path| self.to.join(path)).collect();
        for file in files {
            let path = self.to.join(&file.path);
            wanted.insert(partial(&path));
            wanted.insert(path);
        }
        wanted.extend(NOT_COPIED.map(|name| self.to.join(name)));
        self.clear_below(self.to, &wanted)
    }

    fn clear_below(&self, folder: &Path, wanted: &HashSet<PathBuf>) -> Result<(), MoveError> {
        for path in list(self.storage, folder)? {
            let removed = match (is_folder(self.storage, &path)?, wanted.contains(&path)) {
                (true, _) if path.ends_with("lost+found") => continue,
                (false, true) => continue,
                (false, false) => self.storage.remove(&path),
                (true, is_wanted) => {
                    self.clear_below(&path, wanted)?;
                    if is_wanted { Ok(()) } else { self.storage.remove_folder(&path) }
                }
            };
            removed.map_err(MoveError::io("remove", &path))?;
        }
        Ok(())
    }

    /// Whether an earlier move has copied a file as it is now. Length and time alone don't tell.
    fn is_copied(&self, file: &Entry) -> Result<bool, MoveError> {
        let (from_path, to_path) = (self.from.join(&file.path), self.to.join(&file.path));
        let there = self.storage.metadata(&to_path).map_err(MoveError::io("look at", &to_path))?;
        let len = file.metadata.length_bytes;
        let seems_equal =
            |there: Metadata| there.length_bytes == len && there.modified == file.metadata.modified;
        if !there.is_some_and(seems_equal) {
            return Ok(false);
        }
        let open = |path: &Path| {
            self.storage.open_data(path, Access::Read).map_err(MoveError::io("open", path))
        };
        let copy = Copy { from: open(&from_path)?, to: open(&to_path)?, len };
        copy.is_equal().map_err(MoveError::io("compare", &from_path))
    }

    /// `left_bytes`: what this file and those after it take.
    fn copy(&self, file: &Entry, left_bytes: u64, moved: &mut Moved) -> Result<(), MoveError> {
        let (from_path, to_path) = (self.from.join(&file.path), self.to.join(&file.path));
        let partial = partial(&to_path);
        let from = self.storage.open_data(&from_path, Access::Read);
        let from = from.map_err(MoveError::io("open", &from_path))?;
        let to = self.storage.open_data(&partial, Access::Create);
        let to = to.map_err(MoveError::io("make", &partial))?;
        let copy = Copy { from, to, len: file.metadata.length_bytes };
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::StorageFull => self.no_room(left_bytes, source, &partial),
            _ => MoveError::io("copy", &from_path)(source),
        };
        if copy.share().map_err(failed)? {
            moved.shared_bytes += copy.len;
        } else {
            moved.copied_bytes += copy.whole(failed, &to_path)?;
        }
        // Durable before the name, with its time: that says later that it is whole.
        let named = copy
            .to
            .set_modified(file.metadata.modified)
            .and_then(|()| copy.to.sync_all())
            .and_then(|()| self.storage.rename(&partial, &to_path));
        named.map_err(MoveError::io("finish", &to_path))
    }

    fn no_room(&self, needed_bytes: u64, source: io::Error, path: &Path) -> MoveError {
        match self.storage.space(self.to) {
            Ok((free_bytes, _)) => {
                MoveError::NoRoom { path: self.to.to_owned(), needed_bytes, free_bytes }
            }
            Err(_) => MoveError::io("write", path)(source),
        }
    }
}

fn partial(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(PARTIAL);
    path.with_file_name(name)
}

/// One file on its way.
struct Copy {
    from: File,
    to: File,
    len: u64,
}

impl Copy {
    /// Lets both files share all blocks, where that can be.
    fn share(&self) -> io::Result<bool> {
        if self.len == 0 || self.to.metadata()?.length_bytes > 0 {
            return Ok(false);
        }
        Ok(self.to.clone_all(&self.from)? == Cloning::Done)
    }

    /// Copies from where an earlier move stopped, and compares all; what differs then is copied once more. Returns the bytes
    /// that were copied.
    fn whole(
        &self,
        failed: impl Fn(io::Error) -> MoveError,
        path: &Path,
    ) -> Result<u64, MoveError> {
        let begun = self.to.metadata().map_err(&failed)?.length_bytes;
        let mut copied = self.copy_from(begun.min(self.len)).map_err(&failed)?;
        if !self.is_equal().map_err(&failed)? {
            copied += self.copy_from(0).map_err(&failed)?;
            if !self.is_equal().map_err(&failed)? {
                return Err(MoveError::Differs { path: path.to_owned() });
            }
        }
        Ok(copied)
    }

    fn copy_from(&self, start: u64) -> io::Result<u64> {
        // Of the last span nobody knows how much got there.
        let mut at = start.saturating_sub(1) / SPAN * SPAN;
        self.to.set_len(at)?;
        let (mut copied, mut span) = (0, at / SPAN);
        while let Some(data) = self.from.next_data(at)?.filter(|data| data.start < self.len) {
            let start = data.start.max(at);
            if start / SPAN != span {
                self.to.sync_data()?;
                span = start / SPAN;
            }
            let end = data.end.min((start / PIECE + 1) * PIECE).min(self.len);
            self.to.copy_range(start, &self.from, start, end - start)?;
            copied += end - start;
            at = end;
        }
        self.to.sync_data()?;
        // Only now: the length says which span was the last.
        self.to.set_len(self.len)?;
        self.to.sync_data()?;
        Ok(copied)
    }

    /// Reads both files wherever one of them has data.
    fn is_equal(&self) -> io::Result<bool> {
        let (mut ours, mut copy) = (Buffer::take(), Buffer::take());
        let mut at = 0;
        loop {
            let data = [self.from.next_data(at)?, self.to.next_data(at)?];
            let start = data.iter().flatten().map(|data| data.start).min();
            let Some(start) = start.filter(|start| *start < self.len) else { return Ok(true) };
            let start = (start / PIECE * PIECE).max(at);
            let end = ((start / PIECE + 1) * PIECE).min(self.len);
            let len = (end - start) as usize;
            self.from.read_exact_at(&mut ours[..len], start)?;
            self.to.read_exact_at(&mut copy[..len], start)?;
            if ours[..len] != copy[..len] {
                return Ok(false);
            }
            at = end;
        }
    }
}

/// A copy is synced before more than this is written behind it, and a move that goes on writes the last of these again: what a
/// failed sync was to write may be lost although it reads well from memory.
const SPAN: u64 = 64 * PIECE;
/// Bytes copied and compared at once: a buffer.
const PIECE: u64 = janus_proto::model::MAX_BATCH_BYTES as u64;
