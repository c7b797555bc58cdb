//! Calls that are tried once: for who has somewhere else to turn to when a server is lost.

use std::ops::Range;

use janus_proto::{
    error::WireError,
    ids::{BlockHash, SEGMENT_BLOCKS, block_count},
    model::{MAX_HASHES, MAX_RANGES},
    pb::{
        BlockRange, Encoding, HashBatch, HashLevel, ReadBlocksRequest, ReadBlocksResponse,
        ReadHashesRequest, read_hashes_request::Of,
    },
};
use tonic::Streaming;

use super::{Opened, Place};
use crate::link::{LinkError, next_of, stream_of};

const READING: &str = "reading blocks";
const HASHES: &str = "reading hashes";

/// Hashes of all blocks of a segment, or the first bytes of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentHashes {
    bytes: Vec<u8>,
    hash_bytes: usize,
}

impl SegmentHashes {
    /// Whole hashes.
    #[cfg(test)]
    pub(crate) fn of_whole(hashes: &[BlockHash]) -> Self {
        let bytes = hashes.iter().flat_map(|hash| hash.0).collect();
        Self { bytes, hash_bytes: BlockHash::LEN }
    }

    /// How many blocks the segment has.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.hash_bytes.max(1)
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What is known of the hash of a block, by its number in the segment.
    pub fn of(&self, block: usize) -> &[u8] {
        self.bytes.get(block * self.hash_bytes..(block + 1) * self.hash_bytes).unwrap_or_default()
    }

    /// True when a block can be one with this hash.
    pub fn fits(&self, block: usize, hash: &BlockHash) -> bool {
        let known = self.of(block);
        !known.is_empty() && hash.0.starts_with(known)
    }

    /// True when all of each hash is known.
    pub fn is_whole(&self) -> bool {
        self.hash_bytes == BlockHash::LEN
    }

    /// The hashes, where they are whole.
    pub fn whole(&self) -> Option<Vec<BlockHash>> {
        let hashes = self.bytes.chunks_exact(BlockHash::LEN);
        let hashes = hashes.map(|hash| BlockHash::from_wire("hashes", hash));
        self.is_whole().then(|| hashes.collect::<Result<_, _>>().ok())?
    }

    /// Bytes of memory.
    pub fn memory_bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// Blocks on their way. What is asked for comes in order.
pub struct Blocks<'a> {
    opened: &'a Opened,
    place: std::sync::Arc<Place>,
    answers: Streaming<ReadBlocksResponse>,
}

impl Blocks<'_> {
    /// The next message, as it came; `None`: that was all.
    ///
    /// # Errors
    /// When the stream broke.
    pub async fn next(&mut self) -> Result<Option<ReadBlocksResponse>, LinkError> {
        let answer = next_of(&mut self.answers, READING).await;
        let answer = answer.map_err(|error| self.opened.lost(&self.place, error))?;
        if let Some(batch) = answer.as_ref().and_then(|answer| answer.batch.as_ref()) {
            let len = batch.data.len() as u64;
            self.opened.fetched.fetch_add(len, std::sync::atomic::Ordering::Relaxed);
        }
        Ok(answer)
    }
}

impl Opened {
    /// Asks for blocks; at most [`MAX_RANGES`] ranges, ascending.
    ///
    /// # Errors
    /// When the server can't be reached or refuses.
    pub async fn blocks_once(
        &self,
        ranges: &[Range<u64>],
        encoding: Encoding,
    ) -> Result<Blocks<'_>, LinkError> {
        let place = self.place().await?;
        let message = ReadBlocksRequest {
            handle: place.handle.clone(),
            ranges: ranges.iter().map(wire).collect(),
            encodings: vec![encoding.into()],
            name_damaged: true,
        };
        let request = self.address().request(message, None);
        let mut client = place.link.bulk_restore();
        let answers = stream_of(client.read_blocks(request), READING).await;
        let answers = answers.map_err(|error| self.lost(&place, error))?;
        Ok(Blocks { opened: self, place, answers })
    }

    /// Hashes of the blocks of some segments, ascending, of each the first `hash_bytes` (older servers send them whole).
    ///
    /// # Errors
    /// When the server can't be reached or refuses, or the answer isn't what was asked for.
    pub async fn segment_hashes_once(
        &self,
        segments: &[u64],
        hash_bytes: usize,
    ) -> Result<Vec<SegmentHashes>, LinkError> {
        let mut found = Vec::with_capacity(segments.len());
        for segments in segments.chunks(MAX_RANGES) {
            let place = self.place().await?;
            let read = self.read_hashes(&place, segments, hash_bytes, &mut found).await;
            read.map_err(|error| self.lost(&place, error))?;
        }
        Ok(found)
    }

    async fn read_hashes(
        &self,
        place: &Place,
        segments: &[u64],
        hash_bytes: usize,
        found: &mut Vec<SegmentHashes>,
    ) -> Result<(), LinkError> {
        let blocks = block_count(self.snapshot().size_bytes);
        let range_of = |segment: &u64| {
            let first = segment * SEGMENT_BLOCKS;
            first..(first + SEGMENT_BLOCKS).min(blocks)
        };
        let message = ReadHashesRequest {
            level: HashLevel::Block.into(),
            ranges: segments.iter().map(|segment| wire(&range_of(segment))).collect(),
            of: Some(Of::Handle(place.handle.clone())),
            hash_bytes: hash_bytes as u32,
        };
        let request = self.address().request(message, None);
        let mut client = place.link.bulk_restore();
        let mut answers = stream_of(client.read_hashes(request), HASHES).await?;
        let mut wanted = Wanted::new(segments.iter().map(range_of).collect());
        while let Some(answer) = next_of(&mut answers, HASHES).await? {
            let Some(batch) = answer.batch else { continue };
            wanted.take(&batch, found).map_err(LinkError::answer(HASHES))?;
        }
        wanted.finish().map_err(LinkError::answer(HASHES))
    }
}

fn wire(range: &Range<u64>) -> BlockRange {
    BlockRange { first_block: range.start, block_count: range.end - range.start }
}

/// What has not come yet of the hashes of some ranges, each of one segment.
struct Wanted {
    left: std::collections::VecDeque<Range<u64>>,
    current: Vec<u8>,
    /// Hashes in it.
    count: usize,
}

impl Wanted {
    fn new(ranges: Vec<Range<u64>>) -> Self {
        Self { left: ranges.into(), current: Vec::new(), count: 0 }
    }

    /// Takes a message in, which may hold the end of one segment and the beginning of the next.
    fn take(&mut self, batch: &HashBatch, found: &mut Vec<SegmentHashes>) -> Result<(), WireError> {
        let hash_bytes = match batch.hash_bytes as usize {
            0 => BlockHash::LEN,
            some if some <= BlockHash::LEN => some,
            _ => return Err(WireError::invalid("hash_bytes", "more than a hash has".to_owned())),
        };
        if !batch.hashes.len().is_multiple_of(hash_bytes)
            || batch.hashes.len() > MAX_HASHES * hash_bytes
        {
            let (expected, actual) = (hash_bytes, batch.hashes.len());
            return Err(WireError::Length { field: "hashes", expected, actual });
        }
        for (block, hash) in (batch.first..).zip(batch.hashes.chunks_exact(hash_bytes)) {
            let range = self.left.front_mut().filter(|range| range.start == block);
            let range = range.ok_or_else(|| out_of_order(block))?;
            self.current.extend_from_slice(hash);
            range.start += 1;
            self.count += 1;
            if range.is_empty() {
                self.left.pop_front();
                let bytes = std::mem::take(&mut self.current);
                // Messages of one segment may not differ in how long their hashes are.
                let expected = std::mem::take(&mut self.count) * hash_bytes;
                if bytes.len() != expected {
                    let actual = bytes.len();
                    return Err(WireError::Length { field: "hashes", expected, actual });
                }
                found.push(SegmentHashes { bytes, hash_bytes });
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<(), WireError> {
        match self.left.front() {
            Some(range) => Err(out_of_order(range.start)),
            None => Ok(()),
        }
    }
}

fn out_of_order(at: u64) -> WireError {
    WireError::invalid("first", format!("hashes are missing or out of order at {at}"))
}

#[cfg(test)]
// A list of one range is meant.
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    fn batch(first: u64, hashes: &[[u8; 3]]) -> HashBatch {
        HashBatch { first, hashes: hashes.concat().into(), hash_bytes: 3 }
    }

    #[test]
    fn short_hashes_are_told_apart_by_segment() {
        let (mut wanted, mut found) = (Wanted::new(vec![0..2, 1024..1025]), Vec::new());
        wanted.take(&batch(0, &[[1; 3], [2; 3]]), &mut found).unwrap();
        wanted.take(&batch(1024, &[[3; 3]]), &mut found).unwrap();
        wanted.finish().unwrap();
        assert_eq!(found.len(), 2);
        let mut hash = [9; 32];
        hash[..3].fill(2);
        assert!(found[0].fits(1, &BlockHash(hash)) && !found[0].fits(0, &BlockHash(hash)));
        assert!(!found[1].fits(1, &BlockHash(hash)));
        assert_eq!(found[0].whole(), None);
    }

    #[test]
    fn older_servers_send_them_whole() {
        let hash = BlockHash([7; 32]);
        let whole = HashBatch { first: 0, hashes: vec![7; 64].into(), hash_bytes: 0 };
        let (mut wanted, mut found) = (Wanted::new(vec![0..2]), Vec::new());
        wanted.take(&whole, &mut found).unwrap();
        wanted.finish().unwrap();
        assert!(found[0].fits(1, &hash) && !found[0].fits(1, &BlockHash([8; 32])));
        assert_eq!(found[0].whole(), Some(vec![hash; 2]));
        // Two messages of one segment that differ in what they send.
        let (mut wanted, mut found) = (Wanted::new(vec![0..3]), Vec::new());
        wanted.take(&whole, &mut found).unwrap();
        assert!(wanted.take(&batch(2, &[[7; 3]]), &mut found).is_err());
    }

    #[test]
    fn what_was_not_asked_for_or_is_missing_is_an_error() {
        let mut found = Vec::new();
        for wrong in [batch(1, &[[1; 3]]), batch(0, &[[1; 3]; 3])] {
            assert!(Wanted::new(vec![0..2]).take(&wrong, &mut found).is_err());
        }
        let mut wanted = Wanted::new(vec![0..2]);
        wanted.take(&batch(0, &[[1; 3]]), &mut found).unwrap();
        assert!(wanted.finish().is_err());
        let odd = HashBatch { first: 0, hashes: vec![1; 4].into(), hash_bytes: 3 };
        assert!(Wanted::new(vec![0..2]).take(&odd, &mut found).is_err());
        let long = HashBatch { first: 0, hashes: vec![1; 66].into(), hash_bytes: 33 };
        assert!(Wanted::new(vec![0..2]).take(&long, &mut found).is_err());
    }
}
