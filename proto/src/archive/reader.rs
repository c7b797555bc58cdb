//! A file that lies in parts, read as a file: frames are fetched as they are needed, some ahead, and kept for a while.

use std::{
    collections::{BTreeSet, VecDeque},
    ops::Range,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use bytes::Bytes;
use tokio::runtime::Handle;

use super::{
    ArchiveError, FRAME_BYTES, FileEntry, PART_FRAMES, Store,
    index::{self, Index},
    names::FileName,
    told,
};
use crate::{
    ids::BlockHash,
    storage::{Elsewhere, File},
};

/// Frames that are fetched at once: a segment of a disk.
const GROUP: u64 = 4;

/// Number of a file, and of a frame in it.
type Key = (u32, u64);

/// Frames that were read last, of all files that share it.
#[derive(Debug)]
pub struct Frames {
    kept: Mutex<VecDeque<(Key, Arc<[u8]>)>>,
    most: usize,
    files: AtomicU32,
}

impl Frames {
    /// As many frames.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { kept: Mutex::default(), most: most.max(1), files: AtomicU32::new(0) })
    }

    fn get(&self, key: Key) -> Option<Arc<[u8]>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().rposition(|(known, _)| *known == key)?;
        // The last are those that were used last.
        let found = kept.remove(at)?;
        let frame = found.1.clone();
        kept.push_back(found);
        Some(frame)
    }

    fn keep(&self, key: Key, frame: Arc<[u8]>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(known, _)| *known != key);
        while kept.len() >= self.most {
            kept.pop_front();
        }
        kept.push_back((key, frame));
    }
}

/// How parts are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// As little as is needed.
    Frames,
    /// Whole, compared with their sums.
    Whole,
}

/// A file of an archive. Reads block, on threads that may.
#[derive(Debug)]
pub struct Packed {
    store: Store,
    runtime: Handle,
    name: FileName,
    index: Arc<Index>,
    frames: Arc<Frames>,
    number: u32,
    reading: Reading,
    /// Parts that were read whole.
    seen: Mutex<BTreeSet<u64>>,
}

/// Fetches the index of a file.
///
/// # Errors
/// When it can't be had, or isn't the one that the manifest means.
pub async fn fetch_index(
    store: &Store,
    name: &FileName,
    entry: &FileEntry,
) -> Result<Index, ArchiveError> {
    let object = name.index(&entry.index_sum);
    let damaged = |reason: String| ArchiveError::damaged(told(&object), reason);
    let bytes =
        Index::encoded_bytes(entry.length_bytes).ok_or_else(|| damaged("too large".into()))?;
    let bytes = store.get(&object, bytes).await?;
    if blake3::hash(&bytes).as_bytes() != &entry.index_sum.0 {
        return Err(damaged("its sum is not the manifest's".into()));
    }
    let index = Index::decode(entry.length_bytes, &bytes).map_err(damaged)?;
    match index.stored_bytes() == entry.stored_bytes {
        true => Ok(index),
        false => Err(damaged("its parts are not as long as the manifest says".into())),
    }
}

impl Packed {
    /// A file with this index.
    pub fn new(
        store: &Store,
        runtime: &Handle,
        name: FileName,
        index: Arc<Index>,
        frames: &Arc<Frames>,
        reading: Reading,
    ) -> Self {
        let number = frames.files.fetch_add(1, Ordering::Relaxed);
        Self {
            store: store.clone(),
            runtime: runtime.clone(),
            name,
            index,
            frames: frames.clone(),
            number,
            reading,
            seen: Mutex::default(),
        }
    }

    /// As a file.
    pub fn into_file(self: Arc<Self>) -> File {
        File::elsewhere(PathBuf::from(self.name.as_str()), Box::new(self))
    }

    /// Reads the parts that were not read yet, and says what is wrong with each.
    ///
    /// # Errors
    /// When the store can't be asked.
    pub fn read_rest(&self) -> Result<Vec<ArchiveError>, ArchiveError> {
        let mut wrong = Vec::new();
        for part in 0..self.index.part_count() {
            if self.seen.lock().unwrap_or_else(PoisonError::into_inner).contains(&part) {
                continue;
            }
            match self.fetch(part * PART_FRAMES) {
                Err(error) if error.is_damage() => wrong.push(error),
                fetched => drop(fetched?),
            }
        }
        Ok(wrong)
    }

    /// Fetches a part, or some frames of it, and unpacks them.
    fn fetch(&self, frame: u64) -> Result<Arc<[u8]>, ArchiveError> {
        let part = frame / PART_FRAMES;
        let all = self.index.frames_of(part);
        let damaged = |reason: String| ArchiveError::damaged(self.name.as_str(), reason);
        let sum =
            self.index.sum(part).ok_or_else(|| damaged(format!("there is no part {part}")))?;
        let object = self.name.part(part, sum);
        let wanted = match self.reading {
            Reading::Whole => all.clone(),
            Reading::Frames => frame..(frame / GROUP * GROUP + GROUP).min(all.end),
        };
        let length = |frames: Range<u64>| {
            self.index.lengths(frames).iter().map(|len| u64::from(*len)).sum::<u64>()
        };
        let start = length(all.start..wanted.start);
        let range = start..start + length(wanted.clone());
        let bytes = self.runtime.block_on(async {
            match self.reading {
                Reading::Whole => self.store.get(&object, range.end).await,
                Reading::Frames => self.store.range(&object, range).await,
            }
        })?;
        let damaged = |reason: String| ArchiveError::damaged(told(&object), reason);
        if self.reading == Reading::Whole && BlockHash(*blake3::hash(&bytes).as_bytes()) != *sum {
            return Err(damaged("its sum is wrong".into()));
        }
        let unpacked = self.unpack(wanted, &bytes, frame).map_err(damaged)?;
        if self.reading == Reading::Whole {
            self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(part);
        }
        Ok(unpacked)
    }

    fn unpack(&self, frames: Range<u64>, bytes: &Bytes, wanted: u64) -> Result<Arc<[u8]>, String> {
        let (mut rest, mut found) = (bytes.as_ref(), None);
        for (frame, length) in frames.clone().zip(self.index.lengths(frames)) {
            let (packed, after) =
                rest.split_at_checked(*length as usize).ok_or("it is too short")?;
            rest = after;
            let unpacked: Arc<[u8]> = match index::unpack(packed, self.index.unpacked_bytes(frame))
            {
                Ok(unpacked) => unpacked.into(),
                Err(error) if frame == wanted => return Err(error),
                // A damaged one costs its own bytes only: who wants it asks for it.
                Err(_) => continue,
            };
            if frame == wanted {
                found = Some(unpacked.clone());
            }
            self.frames.keep((self.number, frame), unpacked);
        }
        found.ok_or_else(|| "it lacks a frame".into())
    }

    fn frame(&self, frame: u64) -> Result<Arc<[u8]>, ArchiveError> {
        match self.frames.get((self.number, frame)) {
            Some(known) => Ok(known),
            None => self.fetch(frame),
        }
    }
}

impl Elsewhere for Arc<Packed> {
    fn length_bytes(&self) -> u64 {
        self.index.length_bytes()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.index.length_bytes()) {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let frame = self.frame(at / FRAME_BYTES)?;
            let inside = (at % FRAME_BYTES) as usize;
            let there = frame.get(inside..).unwrap_or_default();
            let count = there.len().min(rest.len());
            if count == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let (piece, after) = rest.split_at_mut(count);
            piece.copy_from_slice(&there[..count]);
            at += count as u64;
            rest = after;
        }
        Ok(())
    }
}
