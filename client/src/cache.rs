//! Block hashes of one disk in sled: what was read last (T), and for each server what it still lacks of that.
//!
//! Invariant: *for every server S and block b that is not in changed(S), T\[b\] is the hash of b in head(S)*. A run stages
//! its hashes under fresh keys; one small file, `CURRENT`, names everything that counts and is replaced by
//! write, sync, rename after the values it names are synced. So a crash leaves the old state or the new one, and because
//! each state speaks of snapshots that never change, even an older state is true. Values are written once, carry
//! sums, and their presence is recorded: lost, torn or stale pages are found when read. Damage is never
//! repaired: the database is moved aside and an empty one takes its place, which costs time, never data.
//!
//! ```text
//! <cache_path>/<disk_id>/lock          held while open: one process at a time
//!                        CURRENT       sum + manifest (JSON): layers, heads, changed sets, the cursors' digest
//!                        cursor-…      where the change journals stood; may be lost
//!                        db-<n>/       sled; compaction builds n+1 and switches by CURRENT
//!                        quarantine-…/ the last damaged database, for whoever wants to know why; it goes with the next backup but one
//! ```
//!
//! All calls block (disk): keep them off async threads.

use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use janus_proto::{
    hash::{segment_digest, table_digest, zero_segment_of},
    ids::{
        BLOCK_BYTES, BlockHash, DiskId, SEGMENT_BLOCKS, ServerId, SnapshotId, StoreGeneration,
        block_count, segment_count,
    },
};
use serde::{Deserialize, Serialize};

mod block_set;
mod compact;
mod cursor;
mod engine;
mod layer;
mod look;
mod manifest;
mod place;
mod segment_set;
mod stage;
mod state;
#[cfg(test)]
mod tests;

pub use self::{
    block_set::MustSend,
    look::{KnownServer, Summary, summaries},
    stage::Stage,
};

use self::{block_set::BlockSet, cursor::Cursor, engine::Engine, place::Place, state::State};
use crate::segment_bits::SEGMENT_WORDS;

/// The newest snapshot of the disk on one server, as far as this machine knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The snapshot.
    pub snapshot_id: SnapshotId,
    /// Table digest of its content.
    pub table_digest: BlockHash,
    /// Store it is in; a rebuilt store's equal ids prove nothing.
    pub store_generation: StoreGeneration,
}

/// Why a cache knows nothing yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FreshReason {
    /// There was none.
    New,
    /// It was damaged and has been moved aside; the text says what was found.
    Damaged(String),
    /// A newer program wrote it (its format number); moved aside.
    Newer(u32),
}

impl fmt::Display for FreshReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::New => f.write_str("there was no hash cache yet"),
            Self::Damaged(what) => write!(f, "the hash cache was damaged and moved aside: {what}"),
            Self::Newer(format) => write!(
                f,
                "the hash cache has format {format} of a newer program and was moved aside"
            ),
        }
    }
}

/// What can go wrong. Only `Busy`, and `Io` of a folder that we may not use, should end a backup: after `Damaged`, [`DiskCache::reset`]
/// and go on; where there is no room ([`CacheError::is_no_room`]), go on without.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Another process has this disk's cache open.
    #[error("hash cache {} is in use by another process", path.display())]
    Busy {
        /// The lock file.
        path: PathBuf,
    },
    /// A value is missing, torn, stale or unreadable, or sled gave up. Nothing wrong was handed out.
    #[error("hash cache {} is damaged: {what}", path.display())]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// The surroundings: no space, no permission, read-only.
    #[error("hash cache {}", path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// T changed after this stage was begun (commit, adopt, reset), so its differences are against something else.
    #[error("staged hashes belong to an earlier state of the hash cache")]
    StaleStage,
    /// A position past the end of the disk.
    #[error("block {index} of segment {segment} is past the end of the disk")]
    PastEnd {
        /// The segment.
        segment: u64,
        /// Block in it.
        index: usize,
    },
}

impl CacheError {
    /// True when its folder takes nothing, or the system has nothing left, so that an empty cache would fare no better.
    pub fn is_no_room(&self) -> bool {
        use io::ErrorKind as Kind;
        let Self::Io { source, .. } = self else { return false };
        crate::files::takes_nothing(source)
            || matches!(source.kind(), Kind::OutOfMemory | Kind::WouldBlock)
    }

    /// With what the system said.
    fn in_full(&self) -> String {
        let cause = std::error::Error::source(self).map(|cause| format!(": {cause}"));
        format!("{self}{}", cause.unwrap_or_default())
    }

    /// True when the disk has lost what is there, so that an empty cache beside it may fare better.
    fn is_unreadable(&self) -> bool {
        matches!(self, Self::Io { source, .. } if crate::files::is_unreadable(source))
    }
}

/// Says that a backup goes on without a cache, and what to do.
pub fn warn_no_cache(disk: &DiskId, why: &CacheError) {
    let why = why.in_full();
    tracing::warn!(%disk, "{why}; going on without remembering hashes: the next backup compares with its server; make room there, or set cache_path to another disk");
}

/// The hash cache of one disk. Cloning shares it; all methods may be called by several threads at once.
#[derive(Clone)]
pub struct DiskCache {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    place: Place,
    size_bytes: u64,
    live: RwLock<Live>,
}

struct Live {
    engine: Engine,
    state: State,
    fresh: Option<FreshReason>,
}

impl DiskCache {
    /// Opens the cache of `disk` in folder `dir`, for a disk that now has `size_bytes`.
    ///
    /// A missing, damaged or newer database gives an empty cache, see [`DiskCache::fresh_reason`]. When the size differs from
    /// the stored one, everything from the first block that is not full in both sizes is unknown: zero in T, in every
    /// changed set; and the cursor is dropped. A head of another size counts as a session of this size starts from it: cut off,
    /// or followed by zeros.
    ///
    /// # Errors
    /// `Busy` when another process has it, `Io` when the folder can't be used.
    pub fn open(dir: &Path, disk: &DiskId, size_bytes: u64) -> Result<Self, CacheError> {
        let place = Place::lock(dir.join(disk.as_str()))?;
        let live = Live::load(&place, size_bytes)?;
        Ok(Self { shared: Arc::new(Shared { place, size_bytes, live: RwLock::new(live) }) })
    }

    /// The [`DiskCache::cursor`] of the cache of `disk` in folder `dir`, whatever size the disk has; empty where nothing is known.
    ///
    /// # Errors
    /// As [`DiskCache::open`].
    pub fn peek_cursor(dir: &Path, disk: &DiskId) -> Result<Vec<u8>, CacheError> {
        match Self::read_cursor(dir.join(disk.as_str())) {
            Err(error) if error.is_no_room() => Ok(Vec::new()),
            read => read,
        }
    }

    fn read_cursor(folder: PathBuf) -> Result<Vec<u8>, CacheError> {
        if !folder.exists() {
            return Ok(Vec::new());
        }
        let place = Place::lock(folder)?;
        let current = place.read_current()?.and_then(|bytes| manifest::parse(&bytes).ok());
        let name = current.map(|manifest| manifest.cursor).unwrap_or_default();
        Ok(Cursor::load(&place, &name)?.bytes().to_vec())
    }

    /// Why this cache was empty when it was opened or reset; `None` when it was loaded.
    pub fn fresh_reason(&self) -> Option<FreshReason> {
        self.shared.read().fresh.clone()
    }

    /// Size of the disk in bytes, as given to `open`.
    pub fn size_bytes(&self) -> u64 {
        self.shared.size_bytes
    }

    /// Newest known snapshot on `server`. `None`: nothing is known, or T holds an open session's content there; both mean
    /// that the server must be compared with ([`DiskCache::segment_digests`], [`DiskCache::adopt`]) before a delta.
    pub fn head(&self, server: &ServerId) -> Option<Head> {
        self.shared.read().state.servers.get(server)?.head
    }

    /// Servers whose newest snapshot is known.
    pub fn servers(&self) -> Vec<ServerId> {
        let live = self.shared.read();
        let known = live.state.servers.iter().filter(|(_, known)| known.head.is_some());
        known.map(|(server, _)| server.clone()).collect()
    }

    /// Size that the disk had at the last backup, where that is another one than now.
    pub fn resized_from(&self) -> Option<u64> {
        self.shared.read().state.resized_from
    }

    /// Where the change journal stood when T was the disk's content; empty: unknown, everything must be read.
    pub fn cursor(&self) -> Vec<u8> {
        self.shared.read().state.cursor.bytes().to_vec()
    }

    /// Tells cursors apart: as long as it is the same, T is the content that [`DiskCache::cursor`] speaks of.
    pub fn cursor_digest(&self) -> Option<BlockHash> {
        self.shared.read().state.cursor.digest()
    }

    /// True when T is all zeros in `segment` without a look at the database: nothing was ever stored there.
    pub fn is_zero_segment(&self, segment: u64) -> bool {
        !self.shared.read().state.holds(segment)
    }

    /// T of one segment: a hash for each of its blocks, fewer than 1024 in the disk's last segment.
    ///
    /// # Errors
    /// `Damaged` when a stored value is not exactly what was written; `PastEnd`.
    pub fn segment(&self, segment: u64) -> Result<Vec<BlockHash>, CacheError> {
        self.shared.segment(segment)
    }

    /// Digests of all segments of T, to compare with a server's.
    ///
    /// # Errors
    /// As [`DiskCache::segment`].
    pub fn segment_digests(&self) -> Result<Vec<BlockHash>, CacheError> {
        let size_bytes = self.shared.size_bytes;
        let digest = |segment| match self.is_zero_segment(segment) {
            true => Ok(zero_segment_of(size_bytes, segment)),
            false => self.segment(segment).map(|hashes| segment_digest(&hashes)),
        };
        (0..segment_count(size_bytes)).map(digest).collect()
    }

    /// The blocks that must go to `server` even where T equals the disk: changed(S), or everything when it is unknown.
    /// A picture of this moment.
    pub fn must_send(&self, server: &ServerId) -> MustSend {
        let live = self.shared.read();
        let set = live
            .state
            .servers
            .get(server)
            .map_or_else(|| Arc::new(BlockSet::everything()), |k| k.changed.clone());
        MustSend::new(set, block_count(self.shared.size_bytes))
    }

    /// Begins to stage changes of T. Nothing of them is seen before [`DiskCache::commit`] or
    /// [`DiskCache::adopt_stage`]; dropped, nothing happened.
    pub fn stage(&self) -> Stage {
        let generation = self.shared.read().state.generation;
        Stage::new(self.clone(), generation)
    }

    /// Switches to the disk's content as `server` has just committed it: T with the staged blocks, of which `head` is the
    /// snapshot. The staged blocks join every other server's changed set. Durable when it returns; may then compact,
    /// whose failure is only logged. `cursor` says where the change journal stood when reading began; empty: unknown.
    ///
    /// The caller vouches that each block was compared with T (or not changed since `cursor()`) and staged where it
    /// differed, and that every block of `must_send(server)` was sent.
    ///
    /// # Errors
    /// `StaleStage`, `Io` or `Damaged`; the state then is the old one (or, after a failed last sync, either).
    pub fn commit(
        &self,
        stage: Stage,
        server: &ServerId,
        head: Head,
        cursor: Vec<u8>,
    ) -> Result<(), CacheError> {
        self.shared.switch(stage, Some((server, Some(head))), Some(cursor))
    }

    /// Switches to content that was read and is on no server yet: T with the staged blocks, which every server lacks. Forgets
    /// the cursor: what was read here was no run of any server. Durable when it returns.
    ///
    /// # Errors
    /// As [`DiskCache::commit`].
    pub fn learn(&self, stage: Stage) -> Result<(), CacheError> {
        self.shared.switch(stage, None, Some(Vec::new()))
    }

    /// Makes T equal to what `server` has: `differing` yields all block hashes of the segments whose digests differ from
    /// [`DiskCache::segment_digests`]. The changed blocks join every other server's changed set, this server's
    /// becomes empty, its head `head`; with `None` (an open session's content) that lasts while this cache is open.
    /// Forgets the cursor when anything differed, since T is then no longer the disk's content at that time.
    ///
    /// # Errors
    /// As [`DiskCache::commit`].
    pub fn adopt(
        &self,
        server: &ServerId,
        head: Option<Head>,
        differing: impl IntoIterator<Item = (u64, Vec<BlockHash>)>,
    ) -> Result<(), CacheError> {
        let stage = self.stage();
        for (segment, hashes) in differing {
            stage.put_hashes(segment, &hashes)?;
        }
        self.adopt_stage(stage, server, head)
    }

    /// [`DiskCache::adopt`] for hashes that arrive piece by piece: fill a stage by [`Stage::put_hashes`], then this.
    ///
    /// # Errors
    /// As [`DiskCache::commit`].
    pub fn adopt_stage(
        &self,
        stage: Stage,
        server: &ServerId,
        head: Option<Head>,
    ) -> Result<(), CacheError> {
        self.shared.switch(stage, Some((server, head)), None)
    }

    /// Forgets the change journals' cursors: the next backup reads everything. Durable when it returns.
    ///
    /// # Errors
    /// `Io` or `Damaged`.
    pub fn forget_cursor(&self) -> Result<(), CacheError> {
        self.shared.change(|next| std::mem::take(&mut next.cursor).digest().is_some())
    }

    /// Reads all that is stored and compares it with its sums; where a server has exactly T, the whole with that snapshot's table
    /// digest, too. Returns how many servers that proved.
    ///
    /// # Errors
    /// `Damaged`, as [`DiskCache::segment`] or when the whole is another.
    pub fn verify(&self) -> Result<usize, CacheError> {
        let digest = table_digest(self.shared.size_bytes, &self.segment_digests()?);
        let mut proven = 0;
        for server in self.servers() {
            let Some(head) = self.head(&server).filter(|_| self.must_send(&server).is_same())
            else {
                continue;
            };
            if head.table_digest != digest {
                let what = format!("its hashes are not those of snapshot {}", head.snapshot_id);
                return Err(CacheError::Damaged { path: self.shared.place.path().into(), what });
            }
            proven += 1;
        }
        Ok(proven)
    }

    /// Removes all that is known of `disk` in folder `dir`.
    ///
    /// # Errors
    /// `Busy` when another process has it, `Io` when it can't be removed.
    pub fn remove(dir: &Path, disk: &DiskId) -> Result<(), CacheError> {
        Place::lock(dir.join(disk.as_str()))?.clear()
    }

    /// Forgets what `server` has: its next backup compares first. Durable when it returns.
    ///
    /// # Errors
    /// `Io` or `Damaged`.
    pub fn forget(&self, server: &ServerId) -> Result<(), CacheError> {
        self.shared.change(|next| next.servers.remove(server).is_some())
    }

    /// Moves the database aside after `Damaged` and goes on with an empty one; stages begun before are stale.
    ///
    /// # Errors
    /// `Io` when the folder can't be used.
    pub fn reset(&self, why: &CacheError) -> Result<(), CacheError> {
        self.shared.reset(FreshReason::Damaged(why.to_string()))
    }
}

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, Live> {
        // A panic elsewhere can't leave half a state: it is replaced by one assignment.
        self.live.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Live> {
        self.live.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn segment(&self, segment: u64) -> Result<Vec<BlockHash>, CacheError> {
        if segment >= segment_count(self.size_bytes) {
            return Err(CacheError::PastEnd { segment, index: 0 });
        }
        let hashes = {
            let live = self.read();
            live.state.segment(&live.engine, segment)?
        };
        self.bound_memory()?;
        Ok(hashes)
    }

    /// sled keeps pages far beyond its capacity until it is reopened.
    fn bound_memory(&self) -> Result<(), CacheError> {
        if !self.read().engine.is_swollen() {
            return Ok(());
        }
        let mut live = self.write();
        if live.engine.is_swollen() { live.engine.reopen() } else { Ok(()) }
    }

    fn switch(
        &self,
        stage: Stage,
        server: Option<(&ServerId, Option<Head>)>,
        cursor: Option<Vec<u8>>,
    ) -> Result<(), CacheError> {
        let mut live = self.write();
        if stage.generation() != live.state.generation {
            return Err(CacheError::StaleStage);
        }
        let mut next = live.state.clone();
        next.apply(stage.finish(), server, cursor);
        next.persist(&self.place, &live.engine)?;
        let old = std::mem::replace(&mut live.state, next);
        live.sweep(&old, &self.place);
        // Not by the process that moved it aside: until the backup after that one it can be looked at.
        if matches!(server, Some((_, Some(_)))) && live.fresh.is_none() {
            self.place.remove_quarantine();
        }
        live.compact_if_due(&self.place);
        Ok(())
    }

    /// Changes what is known but not T, if `change` says so.
    fn change(&self, change: impl FnOnce(&mut State) -> bool) -> Result<(), CacheError> {
        let mut live = self.write();
        let mut next = live.state.clone();
        if change(&mut next) {
            next.persist(&self.place, &live.engine)?;
            live.state = next;
        }
        Ok(())
    }

    fn reset(&self, reason: FreshReason) -> Result<(), CacheError> {
        let mut live = self.write();
        let generation = live.state.generation + 1;
        live.engine.close();
        *live = Live::fresh(&self.place, self.size_bytes, reason)?;
        // Past every stage that may still be open.
        live.state.generation = generation;
        Ok(())
    }
}

impl Live {
    /// The stored state, or a fresh one when it can't be trusted.
    fn load(place: &Place, size_bytes: u64) -> Result<Self, CacheError> {
        let bytes = match place.read_current() {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Self::fresh(place, size_bytes, FreshReason::New),
            Err(error) if error.is_unreadable() => {
                return Self::fresh(place, size_bytes, FreshReason::Damaged(error.in_full()));
            }
            Err(error) => return Err(error),
        };
        let stored = match manifest::parse(&bytes) {
            Ok(stored) => stored,
            Err(reason) => return Self::fresh(place, size_bytes, reason),
        };
        match Self::load_stored(place, size_bytes, stored) {
            Ok(live) => Ok(live),
            Err(CacheError::Damaged { what, .. }) => {
                Self::fresh(place, size_bytes, FreshReason::Damaged(what))
            }
            Err(error) if error.is_unreadable() => {
                Self::fresh(place, size_bytes, FreshReason::Damaged(error.in_full()))
            }
            Err(other) => Err(other),
        }
    }

    fn load_stored(
        place: &Place,
        size_bytes: u64,
        stored: manifest::Manifest,
    ) -> Result<Self, CacheError> {
        place.remove_databases_but(stored.database)?;
        let engine = Engine::open(place.database(stored.database), stored.database)?;
        let mut state = State::load(place, &engine, stored)?;
        state.sweep_orphans(&engine)?;
        state.resize(size_bytes);
        Ok(Self { engine, state, fresh: None })
    }

    /// An empty cache; whatever is there is moved aside.
    fn fresh(place: &Place, size_bytes: u64, reason: FreshReason) -> Result<Self, CacheError> {
        if reason == FreshReason::New {
            // Databases that no CURRENT ever named: a first run that did not get to its end.
            place.remove_databases_but(0)?;
        } else {
            tracing::warn!(cache = %place.path().display(), "{reason}");
            place.quarantine()?;
        }
        let number = 1;
        let engine = Engine::open(place.database(number), number)?;
        Ok(Self { engine, state: State::empty(size_bytes), fresh: Some(reason) })
    }

    /// Removes values that only the state before named; a failure is repeated by the sweep of the next open.
    fn sweep(&self, old: &State, place: &Place) {
        let removed = self.state.remove_superseded(old, &self.engine);
        let removed = removed.and_then(|()| place.remove_cursors_but(&self.state.cursor.name()));
        if let Err(error) = removed {
            tracing::warn!(%error, "old values stay in the hash cache until it is opened again");
        }
    }

    fn compact_if_due(&mut self, place: &Place) {
        if !self
            .state
            .is_compaction_due(self.engine.allocated_bytes(), self.engine.first_opening_took())
        {
            return;
        }
        if let Err(error) = compact::compact(place, &mut self.engine, &mut self.state) {
            tracing::warn!(%error, "could not compact the hash cache; it stays as it was");
        }
    }
}

/// Blocks in `segment` of a disk of `size_bytes`.
fn blocks_in(size_bytes: u64, segment: u64) -> usize {
    block_count(size_bytes)
        .saturating_sub(segment.saturating_mul(SEGMENT_BLOCKS))
        .min(SEGMENT_BLOCKS) as usize
}

/// First block that is not a full one in both sizes: from here on nothing known of one holds for the other.
fn first_resized_block(old_bytes: u64, new_bytes: u64) -> u64 {
    old_bytes.min(new_bytes) / BLOCK_BYTES
}

/// Sets of each server, by id.
type Servers = BTreeMap<ServerId, state::Known>;
