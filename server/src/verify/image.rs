//! One image against its table: every block that the table names is read from the image itself and compared with its hash;
//! what the table doesn't name must be the parent's, or zero in a base.
//!
//! So each image of a chain is read once, whatever number of snapshots it serves. Nothing is written.

use std::{
    ops::Range,
    path::Path,
    sync::{Mutex, PoisonError},
};

use janus_proto::{
    buffers::Buffer,
    hash::{hash_blocks, zero_hash},
    ids::{
        BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, SEGMENT_BYTES, block_count, block_len,
        segment_count,
    },
    model::MAX_BATCH_BYTES,
};

use super::Pace;
use crate::{
    chain::{
        Snapshot,
        health::{Damage, MAX_DAMAGED_RANGES},
        opened::{OpenError, is_lost, open_image, open_table},
        ranges::segment_blocks,
        table::{Table, TableError},
    },
    image::{Image, Kind, Source},
    storage::Disk,
};

/// Blocks read and compared at once.
const PIECE_BLOCKS: u64 = MAX_BATCH_BYTES as u64 / BLOCK_BYTES;
/// Segments without a page that are looked up at once.
const GAP_SEGMENTS: u64 = 256;

/// Why a check ended without a verdict.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// Asked to stop.
    #[error("the check was stopped")]
    Stopped,
    /// Not all of it is here.
    #[error("it builds on a stub: `janus-server seed status` tells what that lacks")]
    Stub,
    /// A file can't be read now, though nothing says that it is damaged.
    #[error(transparent)]
    Io(#[from] OpenError),
}

/// An image and its table, opened to be compared.
pub struct ImageCheck {
    snapshot: Snapshot,
    image: Image,
    table: Table,
}

/// A part of an image that is checked at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A segment that the table has a page of.
    Named(u64),
    /// Segments that it has none of.
    Unnamed(Range<u64>),
}

impl Step {
    /// First segment after it.
    pub fn end(&self) -> u64 {
        match self {
            Self::Named(segment) => segment + 1,
            Self::Unnamed(segments) => segments.end,
        }
    }
}

impl ImageCheck {
    /// Opens the image and table of a snapshot in a machine's folder, or says what is lost when one can't be used.
    /// `parent`: the snapshot it is built on, when its manifest is here.
    ///
    /// # Errors
    /// When a file can't be opened now, though it isn't damaged.
    pub fn open(
        storage: &Disk,
        folder: &Path,
        snapshot: &Snapshot,
        parent: Option<&Snapshot>,
    ) -> Result<Result<Self, Damage>, OpenError> {
        let whole = |reason: String| Ok(Err(Damage::whole(snapshot, reason)));
        let table = match open_table(storage, folder, snapshot) {
            Ok(table) => table,
            Err(error) if error.is_damage() => return whole(error.to_string()),
            Err(error) => return Err(error),
        };
        let header = table.header();
        if header.snapshot != snapshot.id || header.disk_bytes != snapshot.size_bytes {
            return whole(format!("its table is that of snapshot {}", header.snapshot));
        }
        let image = match open_image(storage, folder, snapshot) {
            Ok(image) => image,
            Err(error) if error.is_damage() => {
                return Ok(Err(lost_image(snapshot, &table, error.to_string())));
            }
            Err(error) => return Err(error),
        };
        match difference(&image, snapshot, parent) {
            Some(what) => {
                let reason = format!("the image has another {what} than at its commit");
                Ok(Err(lost_image(snapshot, &table, reason)))
            }
            None => Ok(Ok(Self { snapshot: snapshot.clone(), image, table })),
        }
    }

    /// Checks everything from segment `from` on. `done` hears after each step where the next one begins, and what was
    /// found so far; with several threads only at the end.
    ///
    /// # Errors
    /// When it was stopped, or a file can't be read though it isn't damaged.
    pub fn run(
        &self,
        from: u64,
        threads: usize,
        pace: &dyn Pace,
        mut done: impl FnMut(u64, &Damage),
    ) -> Result<Damage, CheckError> {
        let mut found = Damage::default();
        let mut steps = self.steps(from);
        if threads <= 1 {
            let mut buffer = Buffer::take();
            for step in steps {
                self.step(&step, &mut buffer, pace, &mut found)?;
                done(step.end(), &found);
            }
            return Ok(found);
        }
        let steps: Mutex<&mut (dyn Iterator<Item = Step> + Send)> = Mutex::new(&mut steps);
        let results: Vec<_> = std::thread::scope(|scope| {
            let work = || self.some(|| next(&steps), pace);
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or(Err(CheckError::Stopped)))
                .collect()
        });
        for result in results {
            found.extend(&result?);
        }
        done(segment_count(self.snapshot.size_bytes), &found);
        Ok(found)
    }

    /// Looks at damaged places again: what is whole now was a moment's failure, or the image was replaced meanwhile.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn confirm(&self, found: &Damage, pace: &dyn Pace) -> Result<Damage, CheckError> {
        let touched = |step: &Step| match step {
            Step::Named(segment) => found.blocks.intersects(&segment_blocks(*segment)),
            Step::Unnamed(segments) => found
                .blocks
                .intersects(&(segments.start * SEGMENT_BLOCKS..segments.end * SEGMENT_BLOCKS)),
        };
        let mut steps = self.steps(0).filter(touched);
        self.some(|| steps.next(), pace)
    }

    fn some(
        &self,
        mut next: impl FnMut() -> Option<Step>,
        pace: &dyn Pace,
    ) -> Result<Damage, CheckError> {
        let (mut buffer, mut found) = (Buffer::take(), Damage::default());
        while let Some(step) = next() {
            self.step(&step, &mut buffer, pace, &mut found)?;
        }
        Ok(found)
    }

    /// All steps from segment `from` on, ascending.
    fn steps(&self, from: u64) -> impl Iterator<Item = Step> + '_ {
        let end = segment_count(self.snapshot.size_bytes);
        let mut named =
            self.table.digests().map(|(segment, _)| segment).skip_while(move |s| *s < from);
        let mut upcoming = named.next();
        let mut at = from;
        std::iter::from_fn(move || {
            let step = match upcoming {
                Some(segment) if segment == at => {
                    upcoming = named.next();
                    Step::Named(at)
                }
                _ => {
                    let gap = at..upcoming.unwrap_or(end).min(at + GAP_SEGMENTS).min(end);
                    Step::Unnamed(gap)
                }
            };
            at = step.end();
            (at <= end && step != Step::Unnamed(end..end)).then_some(step)
        })
    }

    fn step(
        &self,
        step: &Step,
        buffer: &mut [u8],
        pace: &dyn Pace,
        found: &mut Damage,
    ) -> Result<(), CheckError> {
        match step {
            Step::Named(segment) => self.named(*segment, buffer, pace, found),
            Step::Unnamed(segments) => self.unnamed(segments, buffer, pace, found),
        }
    }

    fn named(
        &self,
        segment: u64,
        buffer: &mut [u8],
        pace: &dyn Pace,
        found: &mut Damage,
    ) -> Result<(), CheckError> {
        let total = block_count(self.snapshot.size_bytes);
        let blocks = segment * SEGMENT_BLOCKS..((segment + 1) * SEGMENT_BLOCKS).min(total);
        let mut expected = vec![None; SEGMENT_BLOCKS as usize];
        match self.table.page(segment) {
            Ok(page) => {
                for (index, hash) in
                    page.iter().flat_map(|page| page.present.blocks().zip(&page.hashes))
                {
                    expected[index] = Some(*hash);
                }
            }
            Err(TableError::Io { source, .. }) if !is_lost(&source) => {
                let path = (&self.snapshot.table).into();
                return Err(OpenError::Io { path, source }.into());
            }
            Err(error) => {
                found.blocks.insert(blocks);
                found.unusable.get_or_insert(error.to_string());
                return Ok(());
            }
        }
        for first in blocks.clone().step_by(PIECE_BLOCKS as usize) {
            let piece = first..(first + PIECE_BLOCKS).min(blocks.end);
            let expected = &expected[(first - blocks.start) as usize..];
            self.piece(&piece, expected, buffer, pace, found)?;
        }
        Ok(())
    }

    /// Segments of which no block may be in the image, or in a base only zeros.
    fn unnamed(
        &self,
        segments: &Range<u64>,
        buffer: &mut [u8],
        pace: &dyn Pace,
        found: &mut Damage,
    ) -> Result<(), CheckError> {
        let size = self.snapshot.size_bytes;
        let bytes = segments.start * SEGMENT_BYTES..(segments.end * SEGMENT_BYTES).min(size);
        pace.take(0)?;
        let suspicious: Vec<Range<u64>> = match self.image.extents(bytes.clone()) {
            Ok(extents) => {
                let wanted = self.absent();
                extents
                    .into_iter()
                    .filter(|(_, source)| *source != wanted)
                    .map(|(range, _)| range)
                    .collect()
            }
            Err(_) => vec![bytes],
        };
        for range in suspicious {
            let blocks = range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES);
            let mut first = blocks.start;
            while first < blocks.end {
                // Pieces begin where they always do.
                let piece = first..((first / PIECE_BLOCKS + 1) * PIECE_BLOCKS).min(blocks.end);
                first = piece.end;
                self.piece(&piece, &[None; PIECE_BLOCKS as usize], buffer, pace, found)?;
            }
        }
        Ok(())
    }

    /// Compares up to 256 blocks of one segment with what they should be.
    fn piece(
        &self,
        blocks: &Range<u64>,
        expected: &[Option<BlockHash>],
        buffer: &mut [u8],
        pace: &dyn Pace,
        found: &mut Damage,
    ) -> Result<(), CheckError> {
        let size = self.snapshot.size_bytes;
        let start = blocks.start * BLOCK_BYTES;
        let Ok(extents) = self.image.extents(start..(blocks.end * BLOCK_BYTES).min(size)) else {
            found.blocks.insert(blocks.clone());
            return Ok(());
        };
        let mut state = [State::default(); PIECE_BLOCKS as usize];
        for (stretch, source) in extents {
            let part = (stretch.start - start) as usize..(stretch.end - start) as usize;
            let touched = &mut state[part.start / BLOCK..part.end.div_ceil(BLOCK)];
            match source {
                Source::Parent => touched.iter_mut().for_each(|state| state.is_parents = true),
                Source::Zero => {
                    buffer[part].fill(0);
                    touched.iter_mut().for_each(|state| state.is_own = true);
                }
                Source::File(at) => {
                    pace.take(part.len() as u64)?;
                    touched.iter_mut().for_each(|state| state.is_own = true);
                    self.read(&mut buffer[part], at, touched);
                }
            }
        }
        let own_hashes =
            hash_own(&buffer[..((blocks.end * BLOCK_BYTES).min(size) - start) as usize], &state);
        for (index, block) in blocks.clone().enumerate() {
            let wanted = match expected.get(index).copied().flatten() {
                None if self.image.kind() == Kind::Differencing => None,
                None => Some(zero_hash(block_len(size, block))),
                named => named,
            };
            if !state[index].is_right(own_hashes[index], wanted) {
                found.blocks.insert(block..block + 1);
            }
        }
        Ok(())
    }

    /// Reads a stretch; when that fails, block by block, so that only those that can't be read count as lost.
    fn read(&self, buffer: &mut [u8], at: u64, states: &mut [State]) {
        if self.image.read_file_at(buffer, at).is_ok() {
            return;
        }
        // A stretch begins inside a block only where a sector bitmap is damaged: then all of it counts.
        let is_whole = buffer.len().div_ceil(BLOCK) == states.len();
        for (index, (piece, state)) in buffer.chunks_mut(BLOCK).zip(states).enumerate() {
            let at = at + index as u64 * BLOCK_BYTES;
            state.is_unreadable = !is_whole || self.image.read_file_at(piece, at).is_err();
        }
    }

    /// What the image says of blocks that it doesn't hold.
    fn absent(&self) -> Source {
        match self.image.kind() {
            Kind::Differencing => Source::Parent,
            Kind::Dynamic => Source::Zero,
        }
    }
}

const BLOCK: usize = BLOCK_BYTES as usize;

/// What an image says of one block.
#[derive(Debug, Clone, Copy, Default)]
struct State {
    is_own: bool,
    is_parents: bool,
    is_unreadable: bool,
}

impl State {
    /// `wanted`: the block's hash, or `None` when it must be the parent's.
    fn is_right(self, own: Option<BlockHash>, wanted: Option<BlockHash>) -> bool {
        match wanted {
            None => self.is_parents && !self.is_own,
            Some(_) => self.is_own && !self.is_parents && !self.is_unreadable && own == wanted,
        }
    }
}

/// Hashes of the blocks that are wholly in the image, at their places.
fn hash_own(bytes: &[u8], states: &[State]) -> Vec<Option<BlockHash>> {
    let blocks = bytes.len().div_ceil(BLOCK);
    let mut hashes = vec![None; blocks];
    let (mut first, mut found) = (0, Vec::with_capacity(blocks));
    while first < blocks {
        let run =
            states[first..blocks].iter().take_while(|state| state.is_own && !state.is_parents);
        let end = first + run.count();
        found.clear();
        hash_blocks(&bytes[first * BLOCK..(end * BLOCK).min(bytes.len())], &mut found);
        hashes[first..end].iter_mut().zip(&found).for_each(|(place, hash)| *place = Some(*hash));
        first = end + 1;
    }
    hashes
}

fn next(steps: &Mutex<&mut (dyn Iterator<Item = Step> + Send)>) -> Option<Step> {
    steps.lock().unwrap_or_else(PoisonError::into_inner).next()
}

/// Damage of a chain whose image here is gone: what its table names.
fn lost_image(snapshot: &Snapshot, table: &Table, reason: String) -> Damage {
    let mut damage = Damage { unusable: Some(reason.clone()), ..Damage::default() };
    for (segment, _) in table.digests() {
        match table.page(segment) {
            Ok(page) => {
                page.iter().for_each(|page| damage.blocks.insert_marked(segment, &page.present));
            }
            Err(_) => damage.blocks.insert(segment_blocks(segment)),
        }
        if damage.blocks.len() > MAX_DAMAGED_RANGES {
            return Damage::whole(snapshot, reason);
        }
    }
    damage
}

/// What of an image is not as it was committed.
fn difference(
    image: &Image,
    snapshot: &Snapshot,
    parent: Option<&Snapshot>,
) -> Option<&'static str> {
    let geometry = image.geometry();
    // Images are padded by up to two sectors.
    let padding = geometry.disk_bytes.checked_sub(snapshot.size_bytes);
    if padding.is_none_or(|padding| padding > 2 * BLOCK_BYTES) {
        return Some("size");
    }
    if geometry.logical_sector_bytes != snapshot.logical_sector_bytes {
        return Some("sector size");
    }
    // A VHD doesn't name its disk.
    let is_other_disk = image.virtual_disk().is_some_and(|disk| disk != snapshot.virtual_disk);
    if image.data_write() != snapshot.data_write || is_other_disk {
        return Some("id");
    }
    let is_child = image.kind() == Kind::Differencing;
    if is_child != snapshot.parent.is_some() {
        return Some("kind");
    }
    let named = image.parent().map(|parent| parent.data_write);
    let is_other = parent.is_some_and(|parent| named != Some(parent.data_write));
    is_other.then_some("parent")
}
