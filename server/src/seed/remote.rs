//! A snapshot on another server, as the content of an import.
//!
//! Its segment digests come when it is opened and must give its table digest. Hashes come for many segments at once, blocks for
//! one segment at once: those that the import names before it reads them. A call that fails because the other server is away is
//! made again for some time.

use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use janus_proto::{
    error::WireError,
    hash::{segment_digest, table_digest},
    ids::{
        BLOCK_BYTES, BlockHash, MAX_DISK_BYTES, SEGMENT_BLOCKS, block_count, block_len,
        segment_count,
    },
    model::{Batch, Extent},
    pb::{self, BlockRange, Encoding, HashBatch, HashLevel, read_hashes_request::Of},
};
use tokio::{runtime::Handle, time::timeout};
use tonic::{Status, Streaming};

use super::{CallError, Link};
use crate::{
    carry::{CarryError, Content},
    peer::{QUICK, request, unless_silent},
};

/// Segments whose hashes are asked for at once: 2 MiB of hashes.
const HASHED_AT_ONCE: usize = 64;

/// The snapshot.
pub(crate) struct Remote {
    runtime: Handle,
    source: Source,
    snapshot: pb::Snapshot,
    digests: Vec<BlockHash>,
    ahead: RefCell<Ahead>,
}

/// Where it is.
struct Source {
    link: Link,
    snapshot_id: String,
    /// It is needed again, also after this.
    hold: bool,
    /// While it is open there.
    handle: Mutex<Option<String>>,
}

/// What was asked for and not yet taken.
#[derive(Default)]
struct Ahead {
    segments: VecDeque<u64>,
    hashes: VecDeque<(u64, Vec<BlockHash>)>,
    /// By the first block.
    blocks: BTreeMap<u64, Bytes>,
}

impl Remote {
    /// Opens a snapshot and reads what its segments are.
    pub(super) fn open(
        runtime: &Handle,
        link: Link,
        snapshot: pb::Snapshot,
        hold: bool,
    ) -> Result<Self, CarryError> {
        if snapshot.size_bytes > MAX_DISK_BYTES {
            return Err(link.error(format!("snapshot {} is too large", snapshot.snapshot_id)));
        }
        let source = Source {
            link,
            snapshot_id: snapshot.snapshot_id.clone(),
            hold,
            handle: Mutex::default(),
        };
        let runtime = runtime.clone();
        let count = segment_count(snapshot.size_bytes);
        let digests = runtime.block_on(source.again(|| source.digests(count)))?;
        let expected = BlockHash::from_wire("table_digest", &snapshot.table_digest);
        if expected.ok() != Some(table_digest(snapshot.size_bytes, &digests)) {
            let id = &snapshot.snapshot_id;
            return Err(source.link.error(format!("its hashes are not those of snapshot {id}")));
        }
        Ok(Self { runtime, source, snapshot, digests, ahead: RefCell::default() })
    }

    /// Length of a block of its disk in bytes.
    pub(crate) fn block_len(&self, block: u64) -> Option<usize> {
        let size = self.snapshot.size_bytes;
        (block < block_count(size)).then(|| block_len(size, block))
    }

    /// Hashes of one segment, if its disk is as long.
    pub(crate) fn hashes_of(&self, segment: u64) -> Result<Option<Vec<BlockHash>>, CarryError> {
        match self.digest(segment) {
            Some(_) => self.hashes(segment),
            None => Ok(None),
        }
    }

    /// Tells the other server that it is still needed; false: it can't be had there now.
    pub(crate) fn touch(&self) -> bool {
        if self.digests.is_empty() {
            return true;
        }
        let first = self.blocks_of(0);
        let first = first.start..first.end.min(1);
        let hashes = self.source.again(|| self.source.hashes(std::slice::from_ref(&first)));
        self.runtime.block_on(hashes).is_ok()
    }

    /// Closes it, and tells the other server that nothing of this disk is needed there any more.
    pub(crate) fn release(&self) {
        self.runtime.block_on(self.source.close(true));
    }

    fn blocks_of(&self, segment: u64) -> Range<u64> {
        let end = block_count(self.snapshot.size_bytes);
        segment * SEGMENT_BLOCKS..((segment + 1) * SEGMENT_BLOCKS).min(end)
    }
}

impl Content for Remote {
    fn digest(&self, segment: u64) -> Option<BlockHash> {
        self.digests.get(segment as usize).copied()
    }

    fn expect_segments(&self, segments: &[u64]) {
        self.ahead.borrow_mut().segments = segments.iter().copied().collect();
    }

    fn hashes(&self, segment: u64) -> Result<Option<Vec<BlockHash>>, CarryError> {
        let mut ahead = self.ahead.borrow_mut();
        while let Some((known, hashes)) = ahead.hashes.pop_front() {
            if known == segment {
                return Ok(Some(hashes));
            }
        }
        while ahead.segments.front().is_some_and(|next| *next <= segment) {
            ahead.segments.pop_front();
        }
        let mut wanted = vec![segment];
        let more = ahead.segments.len().min(HASHED_AT_ONCE - 1);
        wanted.extend(ahead.segments.drain(..more));
        let ranges: Vec<Range<u64>> = wanted.iter().map(|one| self.blocks_of(*one)).collect();
        let hashes = self.runtime.block_on(self.source.again(|| self.source.hashes(&ranges)))?;
        for (segment, hashes) in wanted.into_iter().zip(hashes) {
            if self.digest(segment) != Some(segment_digest(&hashes)) {
                let reason = format!("the hashes of segment {segment} are not its snapshot's");
                return Err(self.source.link.error(reason));
            }
            ahead.hashes.push_back((segment, hashes));
        }
        Ok(ahead.hashes.pop_front().map(|(_, hashes)| hashes))
    }

    fn expect(&self, extents: &[Extent]) -> Result<(), CarryError> {
        let size = self.snapshot.size_bytes;
        let blocks = self.source.again(|| self.source.blocks(size, extents));
        self.ahead.borrow_mut().blocks = self.runtime.block_on(blocks)?;
        Ok(())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CarryError> {
        let ahead = self.ahead.borrow();
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let found = ahead.blocks.range(..=at / BLOCK_BYTES).next_back();
            let rest = found.and_then(|(first, data)| {
                data.get((at - first * BLOCK_BYTES) as usize..).filter(|rest| !rest.is_empty())
            });
            let Some(rest) = rest else { return Err(self.lost(at / BLOCK_BYTES)) };
            let count = rest.len().min(buffer.len() - done);
            buffer[done..done + count].copy_from_slice(&rest[..count]);
            done += count;
        }
        Ok(())
    }

    fn wrong(&self, block: u64) -> CarryError {
        self.source
            .link
            .error(format!("block {block} of disk {} doesn't have its hash", self.snapshot.disk_id))
    }
}

impl Remote {
    fn lost(&self, block: u64) -> CarryError {
        self.source.link.error(format!(
            "block {block} of disk {} is lost there: `janus-server verify {}` on it tells what else is, and the machine's next backup to it heals its newest snapshot",
            self.snapshot.disk_id, self.snapshot.machine
        ))
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // Without this the handle expires by itself.
        self.runtime.block_on(self.source.close(false));
    }
}

impl Source {
    /// Makes a call, again for as long as the other server is away but not for too long.
    async fn again<T, F: Future<Output = Result<T, CallError>>>(
        &self,
        call: impl Fn() -> F,
    ) -> Result<T, CarryError> {
        let forget = || drop(self.lock().take());
        self.link.again(call, forget).await
    }

    fn lock(&self) -> MutexGuard<'_, Option<String>> {
        self.handle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn handle(&self) -> Result<String, Status> {
        if let Some(handle) = self.lock().clone() {
            return Ok(handle);
        }
        let message = pb::OpenSnapshotRequest {
            snapshot_id: self.snapshot_id.clone(),
            table: false,
            hold: self.hold,
        };
        let opened = self.link.peers.open_snapshot(message, &self.link.server).await?.handle;
        Ok(self.lock().insert(opened).clone())
    }

    async fn close(&self, release: bool) {
        let Some(handle) = self.lock().take() else { return };
        let message = pb::CloseSnapshotRequest { handle, release };
        let mut request = request(message, Some(&self.link.server));
        request.set_timeout(QUICK);
        let _ = timeout(QUICK, self.link.peers.restore().close_snapshot(request)).await;
    }

    async fn read_hashes(
        &self,
        level: HashLevel,
        ranges: &[Range<u64>],
    ) -> Result<Streaming<pb::ReadHashesResponse>, Status> {
        let message = pb::ReadHashesRequest {
            level: level.into(),
            ranges: ranges.iter().map(wire).collect(),
            of: Some(Of::Handle(self.handle().await?)),
            hash_bytes: 0,
        };
        let request = request(message, Some(&self.link.server));
        let mut client = self.link.peers.restore();
        Ok(unless_silent(client.read_hashes(request)).await?.into_inner())
    }

    /// The digests of so many segments.
    async fn digests(&self, count: u64) -> Result<Vec<BlockHash>, CallError> {
        if count == 0 {
            return Ok(Vec::new());
        }
        let mut answers = self.read_hashes(HashLevel::Segment, &[]).await?;
        let mut digests = Vec::new();
        while let Some(answer) = unless_silent(answers.message()).await? {
            let Some(batch) = answer.batch else { continue };
            take(batch, std::slice::from_ref(&(0..count)), &mut digests)?;
        }
        match digests.len() as u64 == count {
            true => Ok(digests),
            false => Err(missing(digests.len() as u64).into()),
        }
    }

    /// The hashes of the blocks of some ranges, each on its own.
    async fn hashes(&self, ranges: &[Range<u64>]) -> Result<Vec<Vec<BlockHash>>, CallError> {
        let mut answers = self.read_hashes(HashLevel::Block, ranges).await?;
        let mut all = Vec::new();
        while let Some(answer) = unless_silent(answers.message()).await? {
            let Some(batch) = answer.batch else { continue };
            take(batch, ranges, &mut all)?;
        }
        let mut all = all.into_iter();
        let each = ranges.iter().map(|range| {
            let hashes: Vec<_> = all.by_ref().take((range.end - range.start) as usize).collect();
            let is_whole = hashes.len() as u64 == range.end - range.start;
            is_whole.then_some(hashes).ok_or_else(|| missing(range.start).into())
        });
        each.collect()
    }

    /// The data of some extents, by their first blocks.
    async fn blocks(
        &self,
        size_bytes: u64,
        extents: &[Extent],
    ) -> Result<BTreeMap<u64, Bytes>, CallError> {
        let message = pb::ReadBlocksRequest {
            handle: self.handle().await?,
            ranges: extents.iter().map(|extent| wire(&(extent.first..extent.end()))).collect(),
            encodings: vec![Encoding::Lz4.into(), Encoding::None.into()],
            name_damaged: true,
        };
        let request = request(message, Some(&self.link.server));
        let mut client = self.link.peers.restore();
        let mut answers = unless_silent(client.read_blocks(request)).await?.into_inner();
        let wanted: u64 = extents.iter().map(|extent| extent.count).sum();
        let (mut blocks, mut count) = (BTreeMap::new(), 0);
        while let Some(answer) = unless_silent(answers.message()).await? {
            let Some(batch) = answer.batch else { continue };
            let batch = Batch::from_wire(size_bytes, batch)?;
            for piece in batch.pieces().filter(|piece| !piece.extent.zero) {
                count += piece.extent.count;
                if count > wanted {
                    return Err(WireError::invalid("extents", "more than was asked for").into());
                }
                blocks.insert(piece.extent.first, Bytes::copy_from_slice(piece.data));
            }
        }
        Ok(blocks)
    }
}

fn wire(range: &Range<u64>) -> BlockRange {
    BlockRange { first_block: range.start, block_count: range.end - range.start }
}

fn missing(at: u64) -> WireError {
    WireError::invalid("first", format!("hashes are missing or out of order at {at}"))
}

/// Takes hashes in that come in the order of `ranges`; `taken` has those that came before.
fn take(
    batch: HashBatch,
    ranges: &[Range<u64>],
    taken: &mut Vec<BlockHash>,
) -> Result<(), WireError> {
    let (hashes, rest) = batch.hashes.as_chunks();
    if !rest.is_empty() {
        let (expected, actual) = (BlockHash::LEN, batch.hashes.len());
        return Err(WireError::Length { field: "hashes", expected, actual });
    }
    let wanted = ranges.iter().cloned().flatten().skip(taken.len());
    let is_next = (batch.first..).take(hashes.len()).eq(wanted.take(hashes.len()));
    if !is_next {
        return Err(missing(batch.first));
    }
    taken.extend(hashes.iter().map(|hash| BlockHash(*hash)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_taken_in_the_order_of_what_was_asked_for() {
        let batch = |first, count: usize| HashBatch {
            first,
            hashes: vec![7; count * BlockHash::LEN].into(),
            ..Default::default()
        };
        let ranges = [0..3, 1024..1026];
        let mut taken = Vec::new();
        take(batch(0, 2), &ranges, &mut taken).unwrap();
        take(batch(2, 1), &ranges, &mut taken).unwrap();
        assert!(take(batch(3, 1), &ranges, &mut taken).is_err(), "not asked for");
        take(batch(1024, 2), &ranges, &mut taken).unwrap();
        assert_eq!(taken.len(), 5);
        assert!(take(batch(1026, 1), &ranges, &mut taken).is_err(), "more than was asked for");
        let odd = HashBatch { first: 0, hashes: vec![1; 33].into(), ..Default::default() };
        assert!(take(odd, &ranges, &mut Vec::new()).is_err());
    }
}
