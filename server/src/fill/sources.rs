//! Where blocks of a stub can be had.

use std::{
    collections::{BTreeSet, VecDeque},
    ops::Range,
    sync::Arc,
};

use janus_proto::{
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, ServerId, block_len},
    model::Extent,
    pb,
};

use super::{FillError, stub::Stub};
use crate::{
    carry::{CarryError, Content},
    chain::{
        Held,
        opened::{OpenedSnapshot, Salvage},
        ranges::{BlockRanges, segment_blocks},
    },
    runs::Runs,
    seed::{Remote, Seeder},
};

/// Snapshots of this server that are looked at.
const MOST_HERE: usize = 32;
/// Snapshots of other servers.
const MOST_THERE: usize = 12;

/// One that may have blocks.
pub(super) struct Source {
    of: Of,
    /// It doesn't answer, or what it answers is wrong: not asked again before all are looked for anew.
    pub(super) has_failed: bool,
}

enum Of {
    /// A newer snapshot here.
    Here(Box<OpenedSnapshot>),
    /// One on another server, that was not opened yet.
    Candidate(Arc<Seeder>, ServerId, Box<pb::Snapshot>),
    /// One on another server.
    There(Box<Remote>),
}

/// All of them, the best first.
pub(super) struct Sources {
    all: Vec<Source>,
    /// The one whose turn it is, and the segments that it wasn't asked for yet.
    current: usize,
    todo: Option<VecDeque<u64>>,
    /// Why others couldn't be found.
    pub(super) failed: Option<CarryError>,
    /// What of the stub none of them has, once that was looked for.
    nobodys: Option<BlockRanges>,
}

impl Sources {
    /// Snapshots here that hold blocks of their own where something is missing.
    pub(super) fn here(runs: &Runs, stub: &Held, missing: &BlockRanges) -> Self {
        let (machine, snapshot) = (runs.machine(&stub.run.machine), stub.snapshot());
        let all = machine.map(|machine| machine.snapshots()).unwrap_or_default();
        let others = all.into_iter().filter(|held| {
            held.snapshot().disk == snapshot.disk && held.snapshot().id != snapshot.id
        });
        let opened = others.take(MOST_HERE).filter_map(|held| runs.open_for_reading(&held).ok());
        let helps = |opened: &OpenedSnapshot| {
            let mut own = opened.tables.newest_segments();
            own.any(|segment| missing.intersects(&segment_blocks(segment)))
        };
        let source = |opened| Source { of: Of::Here(Box::new(opened)), has_failed: false };
        let all = opened.filter(helps).map(source).collect();
        Self { all, current: 0, todo: None, failed: None, nobodys: None }
    }

    /// Snapshots of the disk on other servers: the one that the hashes came from, then the nearest in time.
    pub(super) fn add_there(
        &mut self,
        seeder: &Arc<Seeder>,
        stub: &Held,
        own: &ServerId,
    ) -> Result<(), CarryError> {
        let run = stub.run.origin.as_ref().and_then(|origin| origin.run).map(|run| run.to_string());
        let disk = stub.snapshot().disk.as_str();
        let mut found: Vec<(ServerId, pb::Snapshot)> = Vec::new();
        for server in seeder.holders(&stub.run.machine)? {
            if server == *own {
                continue;
            }
            match seeder.snapshots_of(&server, &stub.run.machine) {
                Ok(snapshots) => {
                    let of_disk = snapshots.into_iter().filter(|one| one.disk_id == disk);
                    found.extend(of_disk.map(|snapshot| (server.clone(), snapshot)));
                }
                Err(CarryError::Stopped) => return Err(CarryError::Stopped),
                // One that is away has nothing now.
                Err(error) => self.failed = Some(error),
            }
        }
        found.sort_by_key(|(_, snapshot)| {
            let is_it = Some(&snapshot.backup_id) == run.as_ref();
            (!is_it, snapshot.missing_blocks, (snapshot.committed_ms - stub.run.committed_ms).abs())
        });
        for (server, snapshot) in found.into_iter().take(MOST_THERE) {
            let of = Of::Candidate(seeder.clone(), server, Box::new(snapshot));
            self.all.push(Source { of, has_failed: false });
        }
        Ok(())
    }

    /// All of them, for what is wanted at once.
    pub(super) fn all(&mut self) -> impl Iterator<Item = &mut Source> {
        self.all.iter_mut().filter(|source| !source.has_failed)
    }

    /// True when one doesn't answer: better to look for all anew next time.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.is_some() || self.all.iter().any(|source| source.has_failed)
    }

    /// True when one that was open failed.
    pub(super) fn has_lost(&self) -> bool {
        self.all.iter().any(|source| source.has_failed && matches!(source.of, Of::There(_)))
    }

    /// The next segment to fill, and the source to ask for it; `None` when all were asked for all.
    pub(super) fn next(&mut self, missing: &BlockRanges) -> Option<(u64, &mut Source)> {
        loop {
            let source = self.all.get(self.current)?;
            let todo = self.todo.get_or_insert_with(|| source.todo(missing));
            match todo.pop_front().filter(|_| !source.has_failed) {
                Some(segment) => return Some((segment, self.all.get_mut(self.current)?)),
                None => (self.current, self.todo) = (self.current + 1, None),
            }
        }
    }

    /// Blocks that none of them has, as far as hashes tell. As many as it takes are opened for that, the best first, and stay open.
    pub(super) fn nobodys(&mut self, stub: &mut Stub<'_>) -> Result<BlockRanges, FillError> {
        if let Some(nobodys) = &self.nobodys {
            return Ok(nobodys.clone());
        }
        let mut nobodys = stub.missing.clone();
        for source in self.all() {
            if nobodys.is_empty() {
                break;
            }
            match stub.had_by(source, &nobodys) {
                Ok(had) => had.iter().for_each(|range| nobodys.remove(range)),
                Err(FillError::Source(CarryError::Stopped)) => {
                    return Err(CarryError::Stopped.into());
                }
                Err(FillError::Source(error)) => source.fail(&error),
                Err(error) => return Err(error),
            }
        }
        Ok(self.nobodys.insert(nobodys).clone())
    }

    /// Keeps those open that are read; false: one is lost.
    pub(super) fn touch(&self) -> bool {
        let is_here = |source: &Source| match &source.of {
            Of::There(remote) => remote.touch(),
            _ => true,
        };
        // All of them, whatever comes of one.
        self.all.iter().filter(|source| !is_here(source)).count() == 0
    }

    /// Tells other servers that the stub needs nothing of them any more.
    pub(super) fn release(&self) {
        for source in &self.all {
            if let Of::There(remote) = &source.of {
                remote.release();
            }
        }
    }
}

impl Source {
    /// Segments that it may help with.
    fn todo(&self, missing: &BlockRanges) -> VecDeque<u64> {
        let segments = segments_of(missing);
        match &self.of {
            Of::Here(opened) => {
                let own: BTreeSet<u64> = opened.tables.newest_segments().collect();
                segments.intersection(&own).copied().collect()
            }
            _ => segments.into_iter().collect(),
        }
    }

    /// It doesn't answer, or what it answers is wrong.
    pub(super) fn fail(&mut self, error: &CarryError) {
        tracing::debug!(%error, "a source of a stub fails");
        self.has_failed = true;
    }

    /// Opens it, unless it is open.
    fn open(&mut self) -> Result<(), CarryError> {
        if let Of::Candidate(seeder, server, snapshot) = &self.of {
            let remote = seeder.remote(server, snapshot.as_ref().clone(), true)?;
            self.of = Of::There(Box::new(remote));
        }
        Ok(())
    }

    /// Which of these blocks of a segment it has, as far as hashes tell.
    pub(super) fn had(
        &mut self,
        segment: u64,
        digest: BlockHash,
        hashes: &[BlockHash],
        wanted: &[Extent],
    ) -> Result<BlockRanges, CarryError> {
        self.open()?;
        match &self.of {
            Of::Here(opened) => Ok(had_here(opened, segment, hashes, wanted)),
            Of::There(remote) => had_there(remote, segment, digest, hashes, wanted),
            Of::Candidate(..) => Ok(BlockRanges::default()),
        }
    }

    /// Reads to their places in the buffer of a segment what it has of these blocks, which have these hashes; says which.
    pub(super) fn read(
        &mut self,
        segment: u64,
        digest: BlockHash,
        hashes: &[BlockHash],
        wanted: &[Extent],
        buffer: &mut [u8],
    ) -> Result<BlockRanges, CarryError> {
        self.open()?;
        match &self.of {
            Of::Here(opened) => Ok(read_here(opened, segment, hashes, wanted, buffer)),
            Of::There(remote) => read_there(remote, segment, digest, hashes, wanted, buffer),
            Of::Candidate(..) => Ok(BlockRanges::default()),
        }
    }
}

/// Segments that have blocks of a set.
pub(super) fn segments_of(blocks: &BlockRanges) -> BTreeSet<u64> {
    let of = |range: Range<u64>| range.start / SEGMENT_BLOCKS..range.end.div_ceil(SEGMENT_BLOCKS);
    blocks.iter().flat_map(of).collect()
}

/// Which of these blocks of a segment have the same hash in `known`, and may be had.
fn common(
    segment: u64,
    hashes: &[BlockHash],
    known: &[BlockHash],
    wanted: &[Extent],
    may_be_had: impl Fn(usize) -> bool,
) -> BlockRanges {
    let start = segment * SEGMENT_BLOCKS;
    let mut common = BlockRanges::default();
    for block in wanted.iter().flat_map(|extent| extent.first..extent.end()) {
        let index = (block - start) as usize;
        let is_same = hashes.get(index).is_some_and(|hash| known.get(index) == Some(hash));
        if is_same && may_be_had(index) {
            common.insert(block..block + 1);
        }
    }
    common
}

/// Which blocks an opened snapshot holds itself, with these hashes.
fn had_here(
    opened: &OpenedSnapshot,
    segment: u64,
    hashes: &[BlockHash],
    wanted: &[Extent],
) -> BlockRanges {
    let (Ok(own), Ok(holders)) = (opened.tables.segment(segment), opened.tables.holders(segment))
    else {
        return BlockRanges::default();
    };
    let is_here = |index: usize| {
        let holder = holders.get(index).copied().flatten();
        holder.is_some_and(|holder| !opened.is_stub(holder))
    };
    common(segment, hashes, &own, wanted, is_here)
}

fn read_here(
    opened: &OpenedSnapshot,
    segment: u64,
    hashes: &[BlockHash],
    wanted: &[Extent],
    buffer: &mut [u8],
) -> BlockRanges {
    let mut came = BlockRanges::default();
    let start = segment * SEGMENT_BLOCKS;
    let mut salvage = Salvage::new(opened);
    for block in had_here(opened, segment, hashes, wanted).iter().flatten() {
        let index = (block - start) as usize;
        let Some(hash) = hashes.get(index) else { continue };
        let from = index * BLOCK_BYTES as usize;
        let length = block_len(opened.tables.disk_bytes(), block);
        let Some(bytes) = buffer.get_mut(from..from + length) else { continue };
        if salvage.read(block, *hash, bytes) {
            came.insert(block..block + 1);
        }
    }
    came
}

/// Which blocks a snapshot elsewhere has, with these hashes.
fn had_there(
    remote: &Remote,
    segment: u64,
    digest: BlockHash,
    hashes: &[BlockHash],
    wanted: &[Extent],
) -> Result<BlockRanges, CarryError> {
    if remote.digest(segment) == Some(digest) {
        let mut all = BlockRanges::default();
        wanted.iter().for_each(|extent| all.insert(extent.first..extent.end()));
        return Ok(all);
    }
    let known = remote.hashes_of(segment)?.unwrap_or_default();
    Ok(common(segment, hashes, &known, wanted, |_| true))
}

fn read_there(
    remote: &Remote,
    segment: u64,
    digest: BlockHash,
    hashes: &[BlockHash],
    wanted: &[Extent],
    buffer: &mut [u8],
) -> Result<BlockRanges, CarryError> {
    let start = segment * SEGMENT_BLOCKS;
    let had = had_there(remote, segment, digest, hashes, wanted)?;
    let extents: Vec<Extent> = had.iter().map(Extent::of_data).collect();
    let mut came = BlockRanges::default();
    if extents.is_empty() {
        return Ok(came);
    }
    remote.expect(&extents)?;
    for block in extents.iter().flat_map(|extent| extent.first..extent.end()) {
        let from = ((block - start) * BLOCK_BYTES) as usize;
        let Some(length) = remote.block_len(block) else { continue };
        let Some(bytes) = buffer.get_mut(from..from + length) else { continue };
        // What is lost there is not among what came.
        if remote.read_at(block * BLOCK_BYTES, bytes).is_ok() {
            came.insert(block..block + 1);
        }
    }
    Ok(came)
}
