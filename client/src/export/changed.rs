//! `janus:changed`: what differs from an older snapshot of the same disk, told by hashes alone.
//!
//! Segment digests of both are read once; block hashes only of segments that differ and that somebody asks about. Flag 1
//! says changed. Where one of both is larger, all that the older one lacks counts as changed. As for QEMU's dirty
//! bitmaps, so that clients which know these can name it: `qemu:dirty-bitmap:janus-changed`.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use janus_proto::ids::{BLOCK_BYTES, SEGMENT_BLOCKS, segment_count};
use tokio::runtime::Handle;

use super::{Overlay, Tells};
use crate::{
    segment_bits::{self, SegmentBits},
    snapshot::{Opened, ReadError, SnapshotMedium, opened::SegmentHashes},
};

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

/// Two snapshots of one disk.
#[derive(Debug)]
pub struct Changed {
    now: SnapshotMedium,
    then: Opened,
    runtime: Handle,
    /// For each segment whether any block of it changed.
    differs: Vec<bool>,
    /// Of some segments which blocks changed.
    known: Mutex<HashMap<u64, SegmentBits>>,
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

    fn then_bytes(&self) -> u64 {
        self.then.snapshot().size_bytes
    }

    fn size_bytes(&self) -> u64 {
        self.now.snapshot().size_bytes
    }

    /// The blocks of a segment that changed.
    fn bits(&self, segment: u64) -> io::Result<SegmentBits> {
        let find =
            || self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&segment).copied();
        if let Some(bits) = find() {
            return Ok(bits);
        }
        self.runtime.block_on(self.learn(segment)).map_err(io::Error::other)
    }

    /// Reads the hashes of a segment, and of the next ones that differ.
    async fn learn(&self, segment: u64) -> Result<SegmentBits, ReadError> {
        let differing =
            (segment..self.differs.len() as u64).filter(|at| self.differs[*at as usize]);
        let segments: Vec<u64> = differing.take(TOGETHER).collect();
        // The older one may be of a smaller disk.
        let both = segments.iter().copied().filter(|at| *at < segment_count(self.then_bytes()));
        let both: Vec<u64> = both.collect();
        let (ours, theirs) = tokio::try_join!(
            self.now.opened().segment_hashes(&segments),
            self.then.segment_hashes(&both)
        )?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() + TOGETHER > MOST {
            known.clear();
        }
        let mut wanted = SegmentBits::default();
        let theirs = theirs.iter().map(Some).chain(std::iter::repeat(None));
        for ((at, ours), theirs) in segments.into_iter().zip(ours).zip(theirs) {
            let bits = differing_blocks(&ours, theirs);
            if at == segment {
                wanted = bits;
            }
            known.insert(at, bits);
        }
        Ok(wanted)
    }
}

fn differing_blocks(ours: &SegmentHashes, theirs: Option<&SegmentHashes>) -> SegmentBits {
    let is_other = |at| theirs.is_none_or(|theirs| theirs.of(at) != ours.of(at));
    segment_bits::of(ours.len(), is_other)
}

impl Tells for Changed {
    fn tell(&self, offset: u64) -> io::Result<(u64, u32)> {
        let block = offset / BLOCK_BYTES;
        let segment = block / SEGMENT_BLOCKS;
        let rest = self.differs.get(segment as usize..).unwrap_or_default();
        let same = rest.iter().take_while(|differs| !**differs).count() as u64;
        let (end, flags) = match same {
            0 => {
                let (changed, end) =
                    segment_bits::run(&self.bits(segment)?, block % SEGMENT_BLOCKS);
                (segment * SEGMENT_BLOCKS + end, if changed { CHANGED } else { 0 })
            }
            same => ((segment + same) * SEGMENT_BLOCKS, 0),
        };
        Ok(((end * BLOCK_BYTES).min(self.size_bytes()), flags))
    }
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
    use janus_proto::ids::BlockHash;

    use super::*;

    fn hash(of: u8) -> BlockHash {
        BlockHash([of; 32])
    }

    #[test]
    fn what_differs_or_is_new_changed_and_what_is_gone_does_not_matter() {
        let ours = SegmentHashes::of_whole(&[1, 2, 3, 4].map(hash));
        let bits = |theirs: &[u8]| {
            let theirs: Vec<_> = theirs.iter().map(|of| hash(*of)).collect();
            differing_blocks(&ours, Some(&SegmentHashes::of_whole(&theirs)))[0]
        };
        assert_eq!(bits(&[1, 2, 3, 4]), 0);
        assert_eq!(bits(&[1, 9, 3, 4, 5]), 0b10);
        assert_eq!(bits(&[1, 2]), 0b1100);
        assert_eq!(bits(&[]), 0b1111);
        assert_eq!(differing_blocks(&ours, None)[0], 0b1111);
    }
}
