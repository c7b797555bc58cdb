//! Copy on write: a disk that never changes, and a sparse file with what was written over it.
//!
//! A block is either as it is on the disk or wholly in the scratch file. Nothing written reaches the disk's server. The file is
//! new each time and goes with the overlay; what a crash leaves of it is of no use any more and may be removed.

use std::{
    fs::{File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use janus_proto::ids::{BLOCK_BYTES as BLOCK, SEGMENT_BYTES};
use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use crate::source::{
    Stretch,
    medium::{FileMedium, Medium},
};

mod blocks;

use self::blocks::Blocks;

/// Writers of the same segment take turns; of others, mostly not.
const TURNS: u64 = 64;
/// Zeros that are written at once where the file system can't make holes.
const ZEROS: &[u8] = &[0; 256 << 10];

/// Why there is no scratch file.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// It would be overwritten.
    #[error("{}: exists already; a scratch file is new each time: remove it, or choose another --write", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// It can't be made.
    #[error("{}: the scratch file can't be made: {source}", path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// A disk with what was written over it.
#[derive(Debug)]
pub struct Overlay {
    base: Arc<dyn Medium>,
    file: File,
    /// The same file, for reading and its holes.
    scratch: FileMedium,
    path: PathBuf,
    written: RwLock<Blocks>,
    turns: Vec<Mutex<()>>,
}

impl Overlay {
    /// Over `base`, with a new file at `path`, which only this user may read.
    ///
    /// # Errors
    /// When there is one, or it can't be made.
    pub fn create(base: Arc<dyn Medium>, path: &Path) -> Result<Self, OverlayError> {
        let created = |path: &Path| {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create_new(true).mode(0o600).open(path)?;
            file.set_len(base.size_bytes())?;
            Ok((file.try_clone()?, file))
        };
        let (file, again) = created(path).map_err(|source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => OverlayError::Exists { path: path.to_owned() },
            _ => OverlayError::Create { path: path.to_owned(), source },
        })?;
        let (size, sector) = (base.size_bytes(), base.sector_bytes());
        let scratch = FileMedium::new(again.into(), size, sector, false);
        let turns = (0..TURNS).map(|_| Mutex::new(())).collect();
        let path = path.to_owned();
        Ok(Self { base, file, scratch, path, written: RwLock::default(), turns })
    }

    /// Writes `data`, which ends on the disk.
    ///
    /// # Errors
    /// When the file can't take it, or a block that is written in part can't be read from the disk.
    pub fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let range = offset..offset + data.len() as u64;
        let _turns = self.take_turns(&range);
        self.fill_edges(&range)?;
        self.file.write_all_at(data, offset)?;
        self.mark(&range);
        Ok(())
    }

    /// Makes a range read as zeros; `may_punch`: as a hole.
    ///
    /// # Errors
    /// As [`Overlay::write`].
    pub fn zero(&self, range: Range<u64>, may_punch: bool) -> io::Result<()> {
        let _turns = self.take_turns(&range);
        self.fill_edges(&range)?;
        self.clear(&range, may_punch)?;
        self.mark(&range);
        Ok(())
    }

    /// The range's content is of no use any more: whole blocks become holes.
    ///
    /// # Errors
    /// When the file can't do it.
    pub fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let start = range.start.next_multiple_of(BLOCK);
        let is_to_the_end = range.end == self.base.size_bytes();
        let end = if is_to_the_end { range.end } else { range.end / BLOCK * BLOCK };
        if start < end { self.zero(start..end, true) } else { Ok(()) }
    }

    /// All that was written before is on the disk that the scratch file is on.
    ///
    /// # Errors
    /// When it can't be said that it is.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn clear(&self, range: &Range<u64>, may_punch: bool) -> io::Result<()> {
        let how = if may_punch { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        let how = how | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, how, range.start, range.end - range.start) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            done => return Ok(done?),
        }
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..len as usize], at)?;
            at += len;
        }
        Ok(())
    }

    /// Whoever writes a block in part copies the rest of it first: nobody else may write to it meanwhile.
    fn take_turns(&self, range: &Range<u64>) -> Vec<MutexGuard<'_, ()>> {
        let segments = range.start / SEGMENT_BYTES..=range.end.saturating_sub(1) / SEGMENT_BYTES;
        let mut turns: Vec<u64> = segments.take(TURNS as usize).map(|s| s % TURNS).collect();
        // In one order, so that nobody waits for one who waits for him.
        turns.sort_unstable();
        let take = |turn: u64| self.turns[turn as usize].lock();
        turns.into_iter().map(|turn| take(turn).unwrap_or_else(PoisonError::into_inner)).collect()
    }

    /// Copies blocks that the range begins or ends in.
    fn fill_edges(&self, range: &Range<u64>) -> io::Result<()> {
        let size = self.base.size_bytes();
        let last = (range.end - 1) / BLOCK;
        for block in [range.start / BLOCK, last] {
            let whole = block * BLOCK..size.min((block + 1) * BLOCK);
            let is_covered = range.start <= whole.start && whole.end <= range.end;
            if is_covered || self.blocks(|blocks| blocks.contains(block)) {
                continue;
            }
            let mut content = [0; BLOCK as usize];
            let content = &mut content[..(whole.end - whole.start) as usize];
            self.base.read_exact_at(content, whole.start)?;
            self.file.write_all_at(content, whole.start)?;
        }
        Ok(())
    }

    fn mark(&self, range: &Range<u64>) {
        let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
        self.written.write().unwrap_or_else(PoisonError::into_inner).insert(blocks);
    }

    fn blocks<T>(&self, look: impl FnOnce(&Blocks) -> T) -> T {
        look(&self.written.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether what begins at `offset` was written, and where that ends.
    pub fn is_written(&self, offset: u64) -> (bool, u64) {
        let size = self.base.size_bytes();
        let (is_in, end) = self.blocks(|blocks| blocks.run(offset / BLOCK, size.div_ceil(BLOCK)));
        (is_in, size.min(end * BLOCK))
    }
}

impl Medium for Overlay {
    fn size_bytes(&self) -> u64 {
        self.base.size_bytes()
    }

    fn sector_bytes(&self) -> u32 {
        self.base.sector_bytes()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut rest, mut at) = (buffer, offset);
        while !rest.is_empty() {
            let (is_written, end) = self.is_written(at);
            let len = end.saturating_sub(at).min(rest.len() as u64);
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (piece, after) = rest.split_at_mut(len as usize);
            match is_written {
                true => self.scratch.read_exact_at(piece, at)?,
                false => self.base.read_exact_at(piece, at)?,
            }
            (rest, at) = (after, at + len);
        }
        Ok(())
    }

    fn stretch(&self, offset: u64) -> Stretch {
        let (is_written, end) = self.is_written(offset);
        let stretch = match is_written {
            true => self.scratch.stretch(offset),
            false => self.base.stretch(offset),
        };
        Stretch { end: stretch.end.min(end), hole: stretch.hole }
    }

    fn expect(&self, range: Range<u64>) {
        if !self.is_written(range.start).0 {
            self.base.expect(range);
        }
    }

    fn is_near(&self, range: Range<u64>) -> bool {
        let (is_written, end) = self.is_written(range.start);
        // What was written lately is in memory.
        if is_written && end >= range.end { true } else { self.base.is_near(range) }
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the scratch file stays");
        }
    }
}

#[cfg(test)]
mod tests;
