//! One disk of a run: what the session holds, what the scan found, what was sent.

use std::{collections::BTreeMap, sync::Arc};

use janus_proto::{
    hash,
    ids::{BlockHash, SEGMENT_BLOCKS, block_count, segment_count},
    pb::read_hashes_request::Of,
};

use super::{Run, Session, TransferError};
use crate::{
    backup::Disk,
    cache::{CacheError, DiskCache, MustSend, Stage},
    progress::Progress,
    reading::{Planned, Reading},
    reconcile::HashReader,
    scan::{HashTable, Scanned, SessionContent},
    segment_bits::{SEGMENT_WORDS, SegmentBits},
    source::Source,
};

/// How the blocks to send were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Compare {
    /// The cache knew the server's head.
    Cache,
    /// The server's hashes were read first.
    Reconciled,
    /// The server had nothing.
    Full,
}

impl Compare {
    /// As it is printed.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cache => "cache",
            Self::Reconciled => "reconciled",
            Self::Full => "full",
        }
    }
}

/// Figures of one disk.
#[derive(Debug, Default, Clone, Copy)]
pub struct DiskFigures {
    /// Bytes read from the disk; holes cost none.
    pub read_bytes: u64,
    /// Data sent, before packing.
    pub sent_bytes: u64,
    /// Data sent, as packed.
    pub wire_bytes: u64,
}

/// The transfer of one disk. Owned by one task at a time; its scan runs on threads.
pub struct DiskTransfer {
    /// The disk.
    pub source: Arc<Source>,
    /// Its hash cache.
    pub cache: DiskCache,
    /// What is printed while it runs.
    pub progress: Arc<Progress>,
    /// How the blocks to send were found.
    pub compare: Compare,
    /// What of it is to be read.
    planned: Arc<Planned>,
    /// What its latest scan read.
    pub reading: Arc<Reading>,
    /// Figures so far.
    pub figures: DiskFigures,
    /// What the session holds.
    pub content: SessionContent,
    must: Option<MustSend>,
    resend: BTreeMap<u64, SegmentBits>,
    /// Blocks sent in this session: only the server knows whether they arrived.
    sent: BTreeMap<u64, SegmentBits>,
    stage: Option<Stage>,
    digests: Vec<BlockHash>,
    must_reconcile: bool,
    from_zeros: bool,
    /// Segments from the first on that progress has shown: what is scanned again shows as standing still.
    shown: u64,
    /// Segments from the first on that were compared with what the session holds.
    scanned: u64,
}

impl DiskTransfer {
    /// A transfer of `disk` into `session` on the run's server.
    pub fn new(disk: &Disk, progress: Arc<Progress>, run: &Run, session: &Session) -> Self {
        let (source, cache) = (disk.source.clone(), disk.cache.clone());
        let known = session.head.is_some() && cache.head(&run.server) == session.head;
        let from_zeros = session.head.is_none() && !session.resumed;
        let segments = segment_count(source.size_bytes());
        let size = source.size_bytes();
        Self {
            must: (known && !session.resumed).then(|| cache.must_send(&run.server)),
            compare: if from_zeros { Compare::Full } else { Compare::Cache },
            content: if from_zeros { SessionContent::Zeros } else { SessionContent::Table },
            must_reconcile: !from_zeros && (!known || session.resumed),
            from_zeros,
            resend: segments_of(&session.resend, block_count(size)),
            sent: BTreeMap::new(),
            stage: Some(cache.stage()),
            digests: (0..segments).map(|segment| hash::zero_segment_of(size, segment)).collect(),
            figures: DiskFigures::default(),
            shown: 0,
            scanned: 0,
            planned: disk.reading.clone(),
            reading: Arc::new(Reading::everything()),
            source,
            cache,
            progress,
        }
    }

    /// True when the table must be made equal to the session's content before the next scan.
    pub fn must_reconcile(&self) -> bool {
        self.must_reconcile
    }

    /// Makes the table equal to what the session holds.
    ///
    /// # Errors
    /// When a call or the cache fails.
    pub async fn reconcile(&mut self, run: &Run, session: &Session) -> Result<(), TransferError> {
        // Only an untouched session holds exactly the head's content.
        let untouched = !session.resumed && self.sent.is_empty() && !self.from_zeros;
        let head = session.head.filter(|_| untouched);
        let differing =
            self.reader(run, session).adopt_into(&self.cache, &run.server, head).await?;
        tracing::info!(disk = %session.disk_id, server = %run.server, differing_segments = differing, "compared hashes with the server");
        self.must = None;
        self.sent.clear();
        self.content = SessionContent::Table;
        self.compare = Compare::Reconciled;
        self.stage = Some(self.cache.stage());
        self.must_reconcile = false;
        Ok(())
    }

    /// Reads the session's hashes.
    pub fn reader(&self, run: &Run, session: &Session) -> HashReader {
        HashReader {
            link: run.link.clone(),
            address: run.address(),
            of: Of::SessionId(session.id.to_string()),
            size_bytes: self.source.size_bytes(),
        }
    }

    /// After damage was found in the cache: begins with an empty one, so the server's hashes are read again.
    ///
    /// # Errors
    /// When no new cache can be made either.
    pub fn reset_cache(&mut self, why: &str) -> Result<(), TransferError> {
        tracing::warn!(disk = %self.source.disk_id(), why, "the hash cache is damaged; comparing with the server instead");
        let damaged = CacheError::Damaged {
            path: self.source.disk_id().as_str().into(),
            what: why.to_owned(),
        };
        self.cache.reset(&damaged)?;
        self.compare_again();
        Ok(())
    }

    /// Trusts nothing that is known of the session.
    pub fn compare_again(&mut self) {
        self.must_reconcile = true;
        self.scanned = 0;
        self.stage = Some(self.cache.stage());
    }

    /// The blocks to send whether they differ or not, as of now. Those that were sent before the connection broke are
    /// among them: the session may hold them, and the table doesn't say so.
    pub fn must(&self) -> Must {
        Must { server: self.must.clone(), resend: self.resend.clone(), sent: self.sent.clone() }
    }

    /// What the next scan reads, now that the cache is what it is.
    pub fn plan_scan(&mut self) -> Arc<Reading> {
        self.reading = self.planned.now(self.cache.cursor_digest());
        self.reading.clone()
    }

    /// A change journal was wrong: the next scan reads everything.
    pub fn miss(&mut self, offset: u64) {
        tracing::error!(disk = %self.source.disk_id(), offset, "a block has changed of which the change journal says nothing: the journal is off for this disk from now on, and everything is compared");
        self.planned.miss(offset, time::OffsetDateTime::now_utc().unix_timestamp());
        self.scanned = 0;
    }

    /// What the next run has to know of the change journals.
    pub fn cursor(&self) -> Vec<u8> {
        self.planned.cursor()
    }

    /// Everything in these segments must be sent: the session's content differs there from what we think.
    pub fn distrust(&mut self, segments: &[u64]) {
        for segment in segments {
            self.sent.insert(*segment, [u64::MAX; SEGMENT_WORDS]);
        }
    }

    /// Notes what the scan found in a segment, before its messages go out.
    ///
    /// # Errors
    /// When the cache can't take it.
    pub fn note(&mut self, scanned: &Scanned) -> Result<(), CacheError> {
        let size = self.source.size_bytes();
        self.figures.read_bytes += scanned.read.total();
        self.progress.read(scanned.read.total());
        self.progress.scanned((scanned.segment + 1).saturating_sub(self.shown));
        self.shown = self.shown.max(scanned.segment + 1);
        if scanned.segment == self.scanned {
            self.scanned += 1;
        }
        let digest = scanned.digest.unwrap_or_else(|| hash::zero_segment_of(size, scanned.segment));
        if let Some(place) = self.digests.get_mut(scanned.segment as usize) {
            *place = digest;
        }
        if let Some(stage) = &self.stage
            && (!scanned.changes.is_empty() || stage.holds(scanned.segment))
        {
            stage.put(scanned.segment, &scanned.changes)?;
        }
        if scanned.sent != SegmentBits::default() {
            self.sent.insert(scanned.segment, scanned.sent);
        }
        Ok(())
    }

    /// Segments from the first on that this process has read and compared.
    pub fn scanned(&self) -> u64 {
        self.scanned
    }

    /// Blocks sent in this run, zero blocks included.
    pub fn changed_blocks(&self) -> u64 {
        let blocks = block_count(self.source.size_bytes());
        self.sent.iter().map(|(segment, bits)| count_below(*segment, bits, blocks)).sum()
    }

    /// Digests of all segments as they were read.
    pub fn digests(&self) -> &[BlockHash] {
        &self.digests
    }

    /// Digest that names the whole content read.
    pub fn table_digest(&self) -> BlockHash {
        hash::table_digest(self.source.size_bytes(), &self.digests)
    }

    /// The staged hashes, once.
    pub fn take_stage(&mut self) -> Option<Stage> {
        self.stage.take()
    }

    /// The table as the scan reads it.
    pub fn table(&self) -> CacheTable {
        CacheTable::new(self.cache.clone())
    }
}

/// How many of a segment's bits are blocks of a disk of so many.
pub(crate) fn count_below(segment: u64, bits: &SegmentBits, blocks: u64) -> u64 {
    let words = bits.iter().enumerate().map(|(word, bits)| {
        let first = segment * SEGMENT_BLOCKS + word as u64 * 64;
        let valid = blocks.saturating_sub(first).min(64) as usize;
        u64::from((bits & crate::delta::mask(valid)).count_ones())
    });
    words.sum()
}

fn segments_of(ranges: &[(u64, u64)], blocks: u64) -> BTreeMap<u64, SegmentBits> {
    let mut found: BTreeMap<u64, SegmentBits> = BTreeMap::new();
    for (first, count) in ranges {
        for block in *first..first.saturating_add(*count).min(blocks) {
            let (segment, place) = (block / SEGMENT_BLOCKS, block % SEGMENT_BLOCKS);
            found.entry(segment).or_default()[(place / 64) as usize] |= 1 << (place % 64);
        }
    }
    found
}

/// Blocks to send whether they differ or not.
pub struct Must {
    server: Option<MustSend>,
    resend: BTreeMap<u64, SegmentBits>,
    sent: BTreeMap<u64, SegmentBits>,
}

impl Must {
    /// Those of one segment.
    pub fn bits(&self, segment: u64) -> SegmentBits {
        let mut bits = self
            .server
            .as_ref()
            .map_or_else(SegmentBits::default, |must| must.segment_bits(segment));
        for more in [self.resend.get(&segment), self.sent.get(&segment)].into_iter().flatten() {
            bits.iter_mut().zip(more).for_each(|(word, more)| *word |= more);
        }
        bits
    }
}

/// The cache as the scan sees it.
pub struct CacheTable {
    cache: DiskCache,
}

impl CacheTable {
    /// The table of this cache.
    pub fn new(cache: DiskCache) -> Self {
        Self { cache }
    }
}

impl HashTable for CacheTable {
    fn segment(&self, segment: u64) -> Result<Option<Vec<BlockHash>>, String> {
        if self.cache.is_zero_segment(segment) {
            return Ok(None);
        }
        self.cache.segment(segment).map(Some).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resend_ranges_become_bits_inside_the_disk() {
        let bits = segments_of(&[(1022, 4), (5000, u64::MAX)], 5002);
        assert_eq!(bits[&0][15], 0b11 << 62);
        assert_eq!(bits[&1][0], 0b11);
        let last = 5000 / SEGMENT_BLOCKS;
        assert_eq!(bits[&last].iter().map(|w| w.count_ones()).sum::<u32>(), 2);
    }

    #[test]
    fn distrusted_segments_count_only_blocks_of_the_disk() {
        assert_eq!(count_below(1, &[u64::MAX; 16], 1024 + 70), 70);
    }
}
