//! Sessions: one disk's transfer into a partial image, with everything that survives a crash.
//!
//! Blocks arrive checked. Each message is appended to the journal, then its data is written to its place in the partial
//! image, then it is acknowledged. The image's structures are written once, at commit. Payload slots are taken in the order of
//! the journal, so reading the journal again finds every block.
//!
//! After a crash the tail of the journal may name blocks whose data did not get to the file, and the file may hold data that
//! the journal lost: [`Session::open`] hashes the doubtful blocks again and notes what is truly there. The client compares with
//! these hashes, so no guess is ever committed. Blocks that were not synced are written again then: the system tells only once,
//! maybe an earlier process, that it could not write something, and shows it from its cache as if it had.

mod change;
mod content;
mod files;
mod finish;
pub(crate) mod journal;

use std::{
    collections::{BTreeMap, HashMap},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use janus_proto::{
    hash::{hash_blocks, is_zero, segment_digest, zero_hash},
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, block_count, block_len},
    model::{Batch, Extent},
    pb,
};

pub use self::finish::Finished;
use self::{content::StartContent, files::Files, journal::Journal};
use crate::{
    chain::{opened::OpenedSnapshot, ranges::BlockRanges, store::OpenDisk, table::TableError},
    image::{Geometry, ImageError, Kind, Layout, PAYLOAD_BYTES},
    storage::{self, Disk, File},
};

/// Touches of a segment before it is looked whether all of them still count; and again whenever there are twice as many.
const COMPACT_AT: usize = 64;
const PAYLOAD_BLOCKS: u64 = PAYLOAD_BYTES / BLOCK_BYTES;

/// What can go wrong with a session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The disk that holds the store is full.
    #[error("cannot {action}: free space below {} or enlarge it, then run the backup again", path.display())]
    Full {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The content isn't the one that the commit names.
    #[error("disk {disk}: what was stored has table digest {stored}, the commit names {named}")]
    DigestMismatch {
        /// The disk.
        disk: String,
        /// Of what is stored.
        stored: BlockHash,
        /// Of the commit.
        named: BlockHash,
    },
    /// The head doesn't hold what its table says.
    #[error(
        "{} blocks of the snapshot that the session started from are not what was backed up",
        blocks.blocks()
    )]
    HeadDamaged {
        /// All such blocks that were needed.
        blocks: BlockRanges,
    },
    /// An image of the head, or the new one.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A table of the head, or the new one.
    #[error(transparent)]
    Table(#[from] TableError),
    /// An earlier write failed: the session must be opened again first.
    #[error("an earlier write of this session failed; start the run again to go on")]
    Failed,
}

impl SessionError {
    /// True when the chain that the session started from can't be relied on: only a new base helps.
    pub fn is_head_damage(&self) -> bool {
        match self {
            Self::HeadDamaged { .. } => true,
            Self::Image(error) => !matches!(error, ImageError::Io { .. }),
            Self::Table(error) => !matches!(error, TableError::Io { .. }),
            _ => false,
        }
    }

    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| match storage::is_full(&source) {
            true => Self::Full { action, path },
            false => Self::Io { action, path, source },
        }
    }
}

/// Marks that a client can go on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Marks {
    /// Settled blocks that survive a kill.
    pub received: u64,
    /// Settled blocks that survive a power cut.
    pub durable: u64,
}

/// Blocks of one segment that one message wrote.
#[derive(Debug, Clone, Copy)]
struct Touch {
    first: u16,
    count: u16,
    /// Place of the first hash in the journal; `None`: zeros.
    hashes_at: Option<u64>,
}

/// What the journal says, in memory.
#[derive(Default)]
struct Index {
    touched: BTreeMap<u64, Vec<Touch>>,
    slots: HashMap<u64, u32>,
    marks: Marks,
    /// Blocks with data that were sent, repeated ones too.
    sent_blocks: u64,
}

struct Inner {
    journal: Journal,
    index: Index,
    /// Bytes since the last background sync began.
    unsynced: u64,
    /// A background sync and the mark it will make durable.
    syncing: Option<(Arc<OnceLock<bool>>, u64)>,
    /// The image has structures after its slots from a commit that did not end.
    finished: bool,
    failed: bool,
}

/// An open session.
pub struct Session {
    /// What the run says of it.
    pub disk: OpenDisk,
    storage: Disk,
    folder: PathBuf,
    layout: Layout,
    start: StartContent,
    image: Arc<File>,
    inner: Mutex<Inner>,
    /// Of the index, for those who can't wait for a commit.
    stored_bytes: AtomicU64,
}

/// How far the files of a session can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// The machine did not restart since: all that was written is there.
    SameBoot,
    /// It did: only what was synced.
    Synced,
}

impl Session {
    /// Opens a session, anew or where it was left. `folder` is the machine's; `head` is what it starts from.
    ///
    /// # Errors
    /// When files can't be made or read.
    pub fn open(
        storage: &Disk,
        folder: &Path,
        disk: OpenDisk,
        head: Option<OpenedSnapshot>,
        trust: Trust,
    ) -> Result<Self, SessionError> {
        let start = StartContent::new(head, disk.size_bytes)?;
        let geometry = Geometry {
            disk_bytes: disk.size_bytes,
            logical_sector_bytes: disk.logical_sector_bytes,
        };
        let is_delta = start.head().is_some_and(|head| disk.goes_on(head));
        let kind = if is_delta { Kind::Differencing } else { Kind::Dynamic };
        let layout = disk.format.layout(geometry, kind)?;
        let files = Files::open(storage, folder, &disk)?;
        let image = files.image.clone();
        let (journal, index, unsynced) =
            files.read_journal(&disk, trust, start.head().is_some())?;
        let stored_bytes = AtomicU64::new(index.sent_blocks * BLOCK_BYTES);
        let inner =
            Inner { journal, index, unsynced: 0, syncing: None, finished: false, failed: false };
        let session = Self {
            disk,
            storage: storage.clone(),
            folder: folder.to_owned(),
            layout,
            start,
            image,
            inner: Mutex::new(inner),
            stored_bytes,
        };
        session.repair(trust, &unsynced)?;
        Ok(session)
    }

    /// Blocks that were settled so far.
    pub fn marks(&self) -> Marks {
        self.lock().index.marks
    }

    /// Bytes of data that were sent, which it stores at most. Waits for nothing.
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes.load(Ordering::Relaxed)
    }

    /// True when the session holds something from an earlier stream.
    pub fn is_resumed(&self) -> bool {
        let inner = self.lock();
        inner.index.marks.received > 0 || !inner.index.touched.is_empty()
    }

    /// True when a write failed: the session must be opened again.
    pub fn is_failed(&self) -> bool {
        self.lock().failed
    }

    /// The head the session starts from.
    pub fn head(&self) -> Option<&OpenedSnapshot> {
        self.start.head()
    }

    /// Blocks that must be sent whether they differ from the head or not, since the head has lost them.
    pub fn resend(&self) -> Vec<pb::BlockRange> {
        let end = block_count(self.disk.size_bytes);
        let lost = self.start.head().into_iter().flat_map(|head| head.damaged.iter());
        lost.map(|range| range.start..range.end.min(end))
            .filter(|range| !range.is_empty())
            .map(|range| pb::BlockRange {
                first_block: range.start,
                block_count: range.end - range.start,
            })
            .collect()
    }

    /// Takes in a checked batch and the client's mark. Blocks the thread.
    ///
    /// # Errors
    /// When the files can't be written; the session then refuses more until it is opened again.
    pub fn apply(&self, batch: Option<&Batch>, settled: u64) -> Result<Marks, SessionError> {
        let mut inner = self.lock();
        if inner.failed {
            return Err(SessionError::Failed);
        }
        let settled =
            settled.min(block_count(self.disk.size_bytes)).max(inner.index.marks.received);
        let extents = batch.map_or(&[][..], Batch::extents);
        if extents.is_empty() && settled == inner.index.marks.received {
            self.note_synced(&mut inner)?;
            return Ok(inner.index.marks);
        }
        let hashes = batch.map_or(&[][..], Batch::hashes);
        self.note(&mut inner, extents, hashes, settled)?;
        if let Some(batch) = batch {
            let written = self.write(&inner.index, batch);
            inner.failed = written.is_err();
            inner.unsynced += written?;
        }
        self.note_synced(&mut inner)?;
        self.sync_in_background(&mut inner);
        Ok(inner.index.marks)
    }

    /// Takes in what blocks will be that the stub gets later. After a crash nothing of it counts.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub fn promise(
        &self,
        extents: &[Extent],
        hashes: &[u8],
        settled: u64,
    ) -> Result<(), SessionError> {
        let mut inner = self.lock();
        if inner.failed {
            return Err(SessionError::Failed);
        }
        let settled = settled.max(inner.index.marks.received);
        self.note(&mut inner, extents, hashes, settled)
    }

    /// Writes a record to the journal and takes it in.
    fn note(
        &self,
        inner: &mut Inner,
        extents: &[Extent],
        hashes: &[u8],
        settled: u64,
    ) -> Result<(), SessionError> {
        if inner.finished {
            self.cut(&inner.index)?;
            inner.finished = false;
        }
        let hashes_at = inner
            .journal
            .append(extents, hashes, settled)
            .map_err(SessionError::io("write", &self.journal_path()))?;
        inner.index.note(extents, hashes_at, settled, self.start.head().is_some());
        self.stored_bytes.store(inner.index.sent_blocks * BLOCK_BYTES, Ordering::Relaxed);
        Ok(())
    }

    /// Block hashes of one segment as a commit would store them now.
    ///
    /// # Errors
    /// When the journal or a table can't be read.
    pub fn segment(&self, segment: u64) -> Result<Vec<BlockHash>, SessionError> {
        self.segment_of(&self.lock(), segment)
    }

    /// Digests of all segments as a commit would store them now.
    ///
    /// # Errors
    /// When the journal or a table can't be read.
    pub fn segment_digests(&self) -> Result<Vec<BlockHash>, SessionError> {
        self.digests_of(&self.lock())
    }

    /// Digests of a range of segments as a commit would store them now.
    ///
    /// # Errors
    /// When the journal or a table can't be read.
    pub fn digests_in(&self, range: Range<u64>) -> Result<Vec<BlockHash>, SessionError> {
        let mut digests = self.start.digests_in(range.clone())?;
        let inner = self.lock();
        for (segment, _) in inner.index.touched.range(range.clone()) {
            if let Some(digest) = digests.get_mut((segment - range.start) as usize) {
                *digest = segment_digest(&self.segment_of(&inner, *segment)?);
            }
        }
        Ok(digests)
    }

    fn segment_of(&self, inner: &Inner, segment: u64) -> Result<Vec<BlockHash>, SessionError> {
        let mut hashes = self.start.segment(segment)?;
        for touch in inner.index.touched.get(&segment).into_iter().flatten() {
            let (first, count) = (usize::from(touch.first), usize::from(touch.count));
            let Some(target) = hashes.get_mut(first..first + count) else { continue };
            match touch.hashes_at {
                Some(at) => {
                    let sent = inner
                        .journal
                        .hashes(at, count)
                        .map_err(SessionError::io("read", &self.journal_path()))?;
                    target.copy_from_slice(&sent);
                }
                None => {
                    for (hash, block) in
                        target.iter_mut().zip(segment * SEGMENT_BLOCKS + u64::from(touch.first)..)
                    {
                        *hash = zero_hash(block_len(self.disk.size_bytes, block));
                    }
                }
            }
        }
        Ok(hashes)
    }

    fn digests_of(&self, inner: &Inner) -> Result<Vec<BlockHash>, SessionError> {
        let mut digests = self.start.segment_digests()?;
        for segment in inner.index.touched.keys() {
            if let Some(digest) = digests.get_mut(*segment as usize) {
                *digest = segment_digest(&self.segment_of(inner, *segment)?);
            }
        }
        Ok(digests)
    }

    /// Writes a batch to its slots and returns the bytes written.
    fn write(&self, index: &Index, batch: &Batch) -> Result<u64, SessionError> {
        let failed = |source| SessionError::io("write", &self.image_path())(source);
        for piece in batch.pieces() {
            for part in index.parts(piece.extent) {
                let Some(slot) = index.slots.get(&(part.first / PAYLOAD_BLOCKS)) else { continue };
                let at = self.place(*slot, part.first);
                if piece.extent.zero {
                    self.image.punch(at, part.count * BLOCK_BYTES).map_err(failed)?;
                } else {
                    let from = ((part.first - piece.extent.first) * BLOCK_BYTES) as usize;
                    let to = (from + (part.count * BLOCK_BYTES) as usize).min(piece.data.len());
                    self.image.write_all_at(&piece.data[from..to], at).map_err(failed)?;
                }
            }
        }
        Ok(batch.data_len() as u64)
    }

    /// Makes journal and image agree after a crash, see the module's text.
    fn repair(&self, trust: Trust, unsynced: &[Extent]) -> Result<(), SessionError> {
        let mut inner = self.lock();
        self.cut(&inner.index)?;
        let doubtful: Vec<Extent> = match trust {
            Trust::SameBoot => unsynced.iter().flat_map(|extent| split(*extent)).collect(),
            Trust::Synced => {
                let mut payloads: Vec<u64> = inner.index.slots.keys().copied().collect();
                payloads.sort_unstable();
                payloads
                    .iter()
                    .map(|p| Extent {
                        first: p * PAYLOAD_BLOCKS,
                        count: PAYLOAD_BLOCKS,
                        zero: false,
                    })
                    .collect()
            }
        };
        for extent in doubtful {
            let bytes = self.hash_again(&mut inner, extent)?;
            // An earlier process may have been told that these could not be written, and they still look right in the cache.
            if trust == Trust::SameBoot && !is_zero(&bytes) {
                self.write_again(&inner.index, extent, &bytes)?;
            }
        }
        Ok(())
    }

    /// Byte of the image where `block` lies, whose payload block has `slot`.
    fn place(&self, slot: u32, block: u64) -> u64 {
        self.layout.slot_offset(slot) + block % PAYLOAD_BLOCKS * BLOCK_BYTES
    }

    /// Cuts off what lies behind the last slot.
    fn cut(&self, index: &Index) -> Result<(), SessionError> {
        let cut = self.layout.cut(&self.image, index.slots.len() as u32);
        cut.map_err(|error| self.image_error(error))
    }

    /// Writes what is there already, so that the next sync is about it too.
    fn write_again(&self, index: &Index, extent: Extent, bytes: &[u8]) -> Result<(), SessionError> {
        let Some(slot) = index.slots.get(&(extent.first / PAYLOAD_BLOCKS)) else { return Ok(()) };
        let written = self.image.write_all_at(bytes, self.place(*slot, extent.first));
        written.map_err(SessionError::io("write", &self.image_path()))
    }

    /// Notes the true hashes of blocks inside one payload block, and returns their bytes.
    fn hash_again(&self, inner: &mut Inner, extent: Extent) -> Result<Vec<u8>, SessionError> {
        let payload = extent.first / PAYLOAD_BLOCKS;
        let Some(slot) = inner.index.slots.get(&payload).copied() else { return Ok(Vec::new()) };
        let count =
            extent.count.min(block_count(self.disk.size_bytes).saturating_sub(extent.first));
        let len =
            (extent.first..extent.first + count).map(|b| block_len(self.disk.size_bytes, b)).sum();
        let mut bytes = vec![0; len];
        let at = self.place(slot, extent.first);
        self.image
            .read_exact_at(&mut bytes, at)
            .map_err(SessionError::io("read", &self.image_path()))?;
        let mut found = Vec::new();
        hash_blocks(&bytes, &mut found);
        let segment = extent.first / SEGMENT_BLOCKS;
        let known = self.segment_of(inner, segment)?;
        let is_base = self.layout.kind() == Kind::Dynamic;
        for (block, hash) in (extent.first..).zip(found) {
            let index = block % SEGMENT_BLOCKS;
            // Blocks of a child that were never sent stay the parent's, whatever lies in the slot.
            let counts = is_base || inner.index.is_touched(segment, index as u16);
            if counts && known.get(index as usize) != Some(&hash) {
                let one = Extent { first: block, count: 1, zero: false };
                let settled = inner.index.marks.received;
                let hashes_at = inner
                    .journal
                    .append(&[one], &hash.0, settled)
                    .map_err(SessionError::io("write", &self.journal_path()))?;
                inner.index.note(&[one], hashes_at, settled, self.start.head().is_some());
            }
        }
        Ok(bytes)
    }

    /// Notes a background sync that has ended.
    fn note_synced(&self, inner: &mut Inner) -> Result<(), SessionError> {
        let Some((done, mark)) = inner.syncing.take_if(|(done, _)| done.get().is_some()) else {
            return Ok(());
        };
        // The system tells of a lost write once: a later sync would say all is well. Opened again, the session writes anew
        // what was not synced.
        inner.failed = true;
        if done.get() != Some(&true) {
            return Err(SessionError::Failed);
        }
        inner
            .journal
            .append_synced(mark)
            .map_err(SessionError::io("write", &self.journal_path()))?;
        inner.failed = false;
        inner.index.marks.durable = mark;
        Ok(())
    }

    fn sync_in_background(&self, inner: &mut Inner) {
        if inner.unsynced < self.storage.sync_bytes() || inner.syncing.is_some() {
            return;
        }
        inner.unsynced = 0;
        let done = Arc::new(OnceLock::new());
        inner.syncing = Some((done.clone(), inner.index.marks.received));
        let image = self.image.clone();
        // A thread of its own, since this one belongs to a stream that should go on receiving. It ends by itself.
        self.storage.in_background(move || {
            let synced = image
                .sync_data()
                .inspect_err(|error| tracing::error!(%error, "cannot sync a partial image"));
            let _ = done.set(synced.is_ok());
        });
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere can't leave the index half changed: it is changed after the journal, in one call.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An error of the partial image, with its path and whether the store is full.
    fn image_error(&self, error: ImageError) -> SessionError {
        match error {
            ImageError::Io { action, source } => {
                SessionError::io(action, &self.image_path())(source)
            }
            other => other.into(),
        }
    }

    fn image_path(&self) -> PathBuf {
        self.folder.join(self.disk.partial(self.disk.format.extension()))
    }

    fn journal_path(&self) -> PathBuf {
        self.folder.join(self.disk.journal())
    }
}

impl Index {
    /// Takes one record in: which blocks, where their hashes are, and slots for them.
    fn note(&mut self, extents: &[Extent], hashes_at: u64, settled: u64, has_head: bool) {
        let mut at = hashes_at;
        for extent in extents {
            // Zeros on zeros: nothing to note, and a sparse disk stays cheap.
            let parts: Box<dyn Iterator<Item = Extent>> = match extent.zero && !has_head {
                true => Box::new(self.touched_parts(*extent).into_iter()),
                false => Box::new(split(*extent)),
            };
            for part in parts {
                let segment = part.first / SEGMENT_BLOCKS;
                let hashes_at = (!part.zero).then_some(at);
                let touch = Touch {
                    first: (part.first % SEGMENT_BLOCKS) as u16,
                    count: part.count as u16,
                    hashes_at,
                };
                let touches = self.touched.entry(segment).or_default();
                touches.push(touch);
                compact(touches);
                if !part.zero {
                    self.sent_blocks += part.count;
                    at += part.count * BlockHash::LEN as u64;
                }
                let next = self.slots.len() as u32;
                self.slots.entry(part.first / PAYLOAD_BLOCKS).or_insert(next);
            }
        }
        self.marks.received = self.marks.received.max(settled);
    }

    /// The parts of an extent whose segments were written before.
    fn touched_parts(&self, extent: Extent) -> Vec<Extent> {
        let segments = extent.first / SEGMENT_BLOCKS..=(extent.end() - 1) / SEGMENT_BLOCKS;
        let within = |segment: &u64| {
            let first = extent.first.max(segment * SEGMENT_BLOCKS);
            let end = extent.end().min((segment + 1) * SEGMENT_BLOCKS);
            split(Extent { first, count: end - first, zero: extent.zero })
        };
        self.touched.range(segments).flat_map(|(segment, _)| within(segment)).collect()
    }

    /// The parts of an extent, of zeros at least those that have a slot: an extent of zeros may be as large as the disk.
    fn parts(&self, extent: Extent) -> Box<dyn Iterator<Item = Extent> + '_> {
        if !extent.zero || extent.count / PAYLOAD_BLOCKS < self.slots.len() as u64 {
            return Box::new(split(extent));
        }
        let payloads = extent.first / PAYLOAD_BLOCKS..=(extent.end() - 1) / PAYLOAD_BLOCKS;
        let held = self.slots.keys().filter(move |payload| payloads.contains(payload));
        Box::new(held.map(move |payload| {
            let first = extent.first.max(payload * PAYLOAD_BLOCKS);
            let end = extent.end().min((payload + 1) * PAYLOAD_BLOCKS);
            Extent { first, count: end - first, zero: true }
        }))
    }

    fn is_touched(&self, segment: u64, index: u16) -> bool {
        let touches = self.touched.get(&segment).into_iter().flatten();
        touches.into_iter().any(|touch| (touch.first..touch.first + touch.count).contains(&index))
    }
}

/// Forgets what later messages have replaced, when there is much of it: a client may send the same block for ever.
fn compact(touches: &mut Vec<Touch>) {
    if touches.len() < COMPACT_AT || !touches.len().is_power_of_two() {
        return;
    }
    // Of each block the touch that wrote it last.
    let mut last = vec![None; SEGMENT_BLOCKS as usize];
    for (number, touch) in touches.iter().enumerate() {
        let (first, count) = (usize::from(touch.first), usize::from(touch.count));
        last.iter_mut().skip(first).take(count).for_each(|block| *block = Some(number));
    }
    let mut kept: Vec<(usize, Touch)> = Vec::new();
    for (block, number) in (0u16..).zip(last) {
        let Some((number, touch)) = number.and_then(|n| Some((n, touches.get(n)?))) else {
            continue;
        };
        match kept.last_mut() {
            Some((same, run)) if *same == number && run.first + run.count == block => {
                run.count += 1
            }
            _ => {
                let skipped = u64::from(block - touch.first) * BlockHash::LEN as u64;
                let hashes_at = touch.hashes_at.map(|at| at + skipped);
                kept.push((number, Touch { first: block, count: 1, hashes_at }));
            }
        }
    }
    *touches = kept.into_iter().map(|(_, touch)| touch).collect();
}

/// An extent in parts that each lie within one payload block, hence within one segment.
fn split(extent: Extent) -> impl Iterator<Item = Extent> {
    let mut next = extent.first;
    std::iter::from_fn(move || {
        let first = next;
        next = extent.end().min((first / PAYLOAD_BLOCKS + 1) * PAYLOAD_BLOCKS);
        (first < next).then_some(Extent { first, count: next - first, zero: extent.zero })
    })
}
