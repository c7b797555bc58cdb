//! The structures of a disk whose server is away: each block comes from a snapshot elsewhere that has the same one at the same
//! place. For a look at its partition table; the disk itself is restored segment by segment.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use janus_proto::{
    hash::{segment_digest, zero_hash, zero_segment_of},
    ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, SEGMENT_BYTES, block_len},
    image::sector_bytes,
};
use tokio::runtime::Handle;

use super::{Restore, away::Away};
use crate::{
    catalog::Found,
    snapshot::{Opened, SnapshotMedium},
    source::{
        medium::{Medium, Stretch},
        view::ReadAt,
    },
};

/// Of the blocks of a segment.
type Hashes = Arc<Vec<BlockHash>>;

/// Of each of the others so much is kept, in bytes.
const MEMORY: u64 = 1 << 20;

/// The disk, as far as others have it. What nobody has is [`io::ErrorKind::NotFound`].
#[derive(Debug)]
pub(super) struct Elsewhere {
    away: Away,
    others: Vec<SnapshotMedium>,
    runtime: Handle,
    /// Hashes of segments: of the table as number 0, then of the others.
    hashes: Mutex<HashMap<(usize, u64), Hashes>>,
}

impl Elsewhere {
    pub(super) fn new(restore: &Restore, away: Away, runtime: Handle) -> Self {
        let medium = |found: Found| {
            let seal = restore.keys.open(&found.snapshot).ok()?;
            let opened = Opened::new(restore.reach.clone(), found).ok()?;
            Some(SnapshotMedium::new(opened, seal, restore.packing, MEMORY, runtime.clone()))
        };
        let others = away.neighbours.iter().cloned().filter_map(medium).collect();
        Self { away, others, runtime, hashes: Mutex::default() }
    }

    /// Gives the others' handles back.
    pub(super) async fn into_away(self) -> Away {
        futures::future::join_all(self.others.iter().map(SnapshotMedium::close)).await;
        self.away
    }

    /// Hashes of a segment's blocks in the table, or in one of the others.
    fn hashes(&self, number: usize, segment: u64) -> io::Result<Hashes> {
        let lock = || self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().get(&(number, segment)) {
            return Ok(known.clone());
        }
        let other = number.checked_sub(1).and_then(|other| self.others.get(other));
        let opened = other.map_or(&self.away.table, SnapshotMedium::opened);
        let asked = self.runtime.block_on(opened.segment_hashes(&[segment]));
        let hashes = asked.map_err(|error| io::Error::other(error.to_string()))?;
        let whole = hashes.first().and_then(|hashes| hashes.whole()).unwrap_or_default();
        let is_right =
            number > 0 || self.away.digests.get(segment as usize) == Some(&segment_digest(&whole));
        if !is_right {
            return Err(io::Error::other(format!("the hashes of segment {segment} are wrong")));
        }
        let whole = Arc::new(whole);
        lock().insert((number, segment), whole.clone());
        Ok(whole)
    }

    /// Fills `bytes` with a whole block.
    fn block(&self, block: u64, bytes: &mut [u8]) -> io::Result<()> {
        let (segment, place) = (block / SEGMENT_BLOCKS, (block % SEGMENT_BLOCKS) as usize);
        let wanted = self.hashes(0, segment)?.get(place).copied();
        let wanted = wanted.ok_or(io::ErrorKind::UnexpectedEof)?;
        if wanted == zero_hash(bytes.len()) {
            bytes.fill(0);
            return Ok(());
        }
        for (number, other) in (1..).zip(&self.others) {
            // One that doesn't answer has nothing.
            let has = |hashes: Hashes| hashes.get(place) == Some(&wanted);
            if self.hashes(number, segment).is_ok_and(has)
                && Medium::read_exact_at(other, bytes, block * BLOCK_BYTES).is_ok()
            {
                return Ok(());
            }
        }
        let at = block * BLOCK_BYTES;
        let what = format!("bytes {at}-{} are on no server that answers", at + BLOCK_BYTES - 1);
        Err(io::Error::new(io::ErrorKind::NotFound, what))
    }
}

impl Medium for Elsewhere {
    fn size_bytes(&self) -> u64 {
        self.away.table.snapshot().size_bytes
    }

    fn sector_bytes(&self) -> u32 {
        sector_bytes(self.away.table.snapshot().logical_sector_bytes)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let size_bytes = self.size_bytes();
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= size_bytes);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let (mut rest, mut at) = (buffer, offset);
        let mut whole = vec![0; BLOCK_BYTES as usize];
        while at < end {
            let block = at / BLOCK_BYTES;
            let whole = &mut whole[..block_len(size_bytes, block)];
            self.block(block, whole)?;
            let from = (at % BLOCK_BYTES) as usize;
            let take = rest.len().min(whole.len() - from);
            let (now, later) = rest.split_at_mut(take);
            now.copy_from_slice(&whole[from..from + take]);
            (rest, at) = (later, at + take as u64);
        }
        Ok(())
    }

    fn stretch(&self, offset: u64) -> Stretch {
        let size_bytes = self.size_bytes();
        let is_hole = |segment: u64| {
            let digest = self.away.digests.get(segment as usize);
            digest == Some(&zero_segment_of(size_bytes, segment))
        };
        let first = offset / SEGMENT_BYTES;
        let hole = is_hole(first);
        let mut last = first;
        while hole && is_hole(last + 1) {
            last += 1;
        }
        Stretch { end: ((last + 1) * SEGMENT_BYTES).min(size_bytes), hole }
    }
}

impl ReadAt for Elsewhere {
    fn len(&self) -> u64 {
        self.size_bytes()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        Medium::read_exact_at(self, buffer, offset)
    }
}
