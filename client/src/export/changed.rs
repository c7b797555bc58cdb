//! `janus:changed`: what differs from an older snapshot of the same disk, told by hashes alone.
//!
//! Segment digests of both are read once; block hashes only of segments that differ and that somebody asks about. Flag 1
//! says changed. Where one of both is larger, all that the older one lacks counts as changed. As for QEMU's dirty
//! bitmaps, so that clients which know these can name it: `qemu:dirty-bitmap:janus-changed`.

use std::{
    collections::HashMap,
    io,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use janus_proto::ids::{BLOCK_BYTES, BlockHash, SEGMENT_BLOCKS, block_count};
use tokio::runtime::Handle;

use super::{Overlay, Tells};
use crate::snapshot::{Opened, ReadError, SnapshotMedium};

/// Name of the context.
pub const NAME: &str = "janus:changed";
/// The same under the name that clients take for a dirty bitmap.
pub const BITMAP_NAME: &str = "qemu:dirty-bitmap:janus-changed";

/// The flag of what changed; of dirty bitmaps, too.
const CHANGED: u32 = 1;
/// Segments whose hashes are read at once: 512 KiB from both servers together.
const TOGETHER: usize = 8;
/// Segments of which is known which blocks changed: 4 MiB.
const MOST: usize = 1 << 14;
const WORDS: usize = SEGMENT_BLOCKS as usize / 64;

/// A bit for each block of a segment: it changed.
type Bits = [u64; WORDS];

/// Two snapshots of one disk.
#[derive(Debug)]
pub struct Changed {
    now: SnapshotMedium,
    then: Opened,
    runtime: Handle,
    /// For each segment whether any block of it changed.
    differs: Vec<bool>,
    known: Mutex<HashMap<u64, Bits>>,
}

impl Changed {
    /// Compares the segments of both. `runtime` makes later calls.
    ///
    /// # Errors
    /// When one of both can't be read.
    pub async fn compare(
        now: SnapshotMedium,
        then: Opened,
        runtime: Handle,
    ) -> Result<Self, ReadError> {
        let (ours, theirs) =
            tokio::try_join!(now.opened().segment_digests(), then.segment_digests())?;
        let differs =
            (0..).zip(&ours).map(|(at, digest): (usize, _)| theirs.get(at) != Some(digest));
        let (differs, known) = (differs.collect(), Mutex::default());
        Ok(Self { now, then, runtime, differs, known })
    }

    /// How many bytes lie in segments that differ.
    pub fn segments_bytes(&self) -> u64 {
        let segments = self.differs.iter().filter(|differs| **differs).count() as u64;
        (segments * SEGMENT_BLOCKS * BLOCK_BYTES).min(self.size_bytes())
    }

    fn size_bytes(&self) -> u64 {
        self.now.snapshot().size_bytes
    }

    /// The blocks of a segment that changed.
    fn bits(&self, segment: u64) -> io::Result<Bits> {
        let find =
            || self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&segment).copied();
        if let Some(bits) = find() {
            return Ok(bits);
        }
        self.runtime.block_on(self.learn(segment)).map_err(io::Error::other)
    }

    /// Reads the hashes of a segment, and of the next ones that differ.
    async fn learn(&self, segment: u64) -> Result<Bits, ReadError> {
        let differing =
            (segment..self.differs.len() as u64).filter(|at| self.differs[*at as usize]);
        let segments: Vec<u64> = differing.take(TOGETHER).collect();
        let (ours, theirs) =
            tokio::try_join!(hashes(self.now.opened(), &segments), hashes(&self.then, &segments))?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() + TOGETHER > MOST {
            known.clear();
        }
        let mut wanted = [0; WORDS];
        for ((at, ours), theirs) in segments.into_iter().zip(ours).zip(theirs) {
            let bits = differing_blocks(&ours, &theirs);
            if at == segment {
                wanted = bits;
            }
            known.insert(at, bits);
        }
        Ok(wanted)
    }
}

/// Hashes of the blocks of segments; of those that a disk has no longer, none.
async fn hashes(of: &Opened, segments: &[u64]) -> Result<Vec<Vec<BlockHash>>, ReadError> {
    let blocks = block_count(of.snapshot().size_bytes);
    let range = |segment: &u64| {
        let first = segment * SEGMENT_BLOCKS;
        first.min(blocks)..(first + SEGMENT_BLOCKS).min(blocks)
    };
    let ranges: Vec<Range<u64>> = segments.iter().map(range).collect();
    let there: Vec<_> = ranges.iter().filter(|range| !range.is_empty()).cloned().collect();
    let mut hashes = match there.is_empty() {
        true => Vec::new(),
        false => of.block_hashes(&there).await?,
    };
    let mut found = Vec::with_capacity(segments.len());
    for range in ranges {
        let rest = hashes.split_off(hashes.len().min((range.end - range.start) as usize));
        found.push(std::mem::replace(&mut hashes, rest));
    }
    Ok(found)
}

fn differing_blocks(ours: &[BlockHash], theirs: &[BlockHash]) -> Bits {
    let mut bits = [0; WORDS];
    for (at, hash) in ours.iter().enumerate().take(SEGMENT_BLOCKS as usize) {
        bits[at / 64] |= u64::from(theirs.get(at) != Some(hash)) << (at % 64);
    }
    bits
}

impl Tells for Changed {
    fn tell(&self, offset: u64) -> io::Result<(u64, u32)> {
        let block = offset / BLOCK_BYTES;
        let segment = block / SEGMENT_BLOCKS;
        let rest = self.differs.get(segment as usize..).unwrap_or_default();
        let same = rest.iter().take_while(|differs| !**differs).count() as u64;
        let (end, flags) = match same {
            0 => {
                let (changed, end) = run(&self.bits(segment)?, block % SEGMENT_BLOCKS);
                (segment * SEGMENT_BLOCKS + end, if changed { CHANGED } else { 0 })
            }
            same => ((segment + same) * SEGMENT_BLOCKS, 0),
        };
        Ok(((end * BLOCK_BYTES).min(self.size_bytes()), flags))
    }
}

/// The bit at `first`, and where bits like it end.
fn run(bits: &Bits, first: u64) -> (bool, u64) {
    let is_set = |at: u64| bits[(at / 64) as usize] >> (at % 64) & 1 == 1;
    let end = (first..SEGMENT_BLOCKS).find(|at| is_set(*at) != is_set(first));
    (is_set(first), end.unwrap_or(SEGMENT_BLOCKS))
}

/// The same where clients write: what they wrote is changed, too.
#[derive(Debug)]
pub struct OrWritten(pub Changed, pub Arc<Overlay>);

impl Tells for OrWritten {
    fn tell(&self, offset: u64) -> io::Result<(u64, u32)> {
        let (is_written, end) = self.1.is_written(offset);
        if is_written {
            return Ok((end, CHANGED));
        }
        let (until, flags) = self.0.tell(offset)?;
        Ok((until.min(end), flags))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(of: u8) -> BlockHash {
        BlockHash([of; 32])
    }

    #[test]
    fn what_differs_or_is_new_changed_and_what_is_gone_does_not_matter() {
        let ours: Vec<_> = [1, 2, 3, 4].map(hash).into();
        let bits = |theirs: &[u8]| {
            differing_blocks(&ours, &theirs.iter().map(|of| hash(*of)).collect::<Vec<_>>())[0]
        };
        assert_eq!(bits(&[1, 2, 3, 4]), 0);
        assert_eq!(bits(&[1, 9, 3, 4, 5]), 0b10);
        assert_eq!(bits(&[1, 2]), 0b1100);
        assert_eq!(bits(&[]), 0b1111);
    }

    #[test]
    fn runs_end_where_the_bits_change() {
        let mut bits = [0; WORDS];
        bits[0] = 1 << 63;
        bits[1] = 0b11;
        assert_eq!(run(&bits, 0), (false, 63));
        assert_eq!(run(&bits, 64), (true, 66));
        assert_eq!(run(&bits, 63), (true, 66));
        assert_eq!(run(&bits, 66), (false, SEGMENT_BLOCKS));
    }
}
