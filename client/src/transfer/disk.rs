//! One disk of a run: what the session holds, what the scan found, what was sent.

use std::{collections::BTreeMap, sync::Arc};

use janus_proto::{
    hash,
    ids::{BlockHash, SEGMENT_BLOCKS, block_count, segment_count},
    pb::read_hashes_request::Of,
};
use tokio::runtime::Handle;

use super::{Run, Session, TransferError};
use crate::{
    backup::Disk,
    cache::{CacheError, DiskCache, MustSend, Stage, warn_no_cache},
    progress::Progress,
    reading::{Planned, Reading},
    reconcile::HashReader,
    scan::{HashTable, ScanError, Scanned, SessionContent},
    seal::{DiskSeal, SealedDisk},
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
    /// What seals it.
    pub seal: Option<Arc<DiskSeal>>,
    /// Its hash cache; none where there is no room for it.
    pub cache: Option<DiskCache>,
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
    /// Without a cache: segment digests of what the session held when it was compared with.
    theirs: Arc<Vec<BlockHash>>,
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
    /// The server has told this process that blocks below this one are settled.
    acknowledged: u64,
}

impl DiskTransfer {
    /// A transfer of `disk` into `session` on the run's server.
    pub fn new(disk: &Disk, progress: Arc<Progress>, run: &Run, session: &Session) -> Self {
        let (source, cache) = (disk.source.clone(), disk.cache.clone());
        let head = cache.as_ref().and_then(|cache| cache.head(&run.server));
        let known = session.head.is_some() && head == session.head;
        let from_zeros = session.head.is_none() && !session.resumed;
        let segments = segment_count(source.size_bytes());
        let size = source.size_bytes();
        Self {
            theirs: Arc::default(),
            must: cache
                .as_ref()
                .filter(|_| known && !session.resumed)
                .map(|cache| cache.must_send(&run.server)),
            compare: if from_zeros { Compare::Full } else { Compare::Cache },
            content: if from_zeros { SessionContent::Zeros } else { SessionContent::Table },
            must_reconcile: !from_zeros && (!known || session.resumed),
            from_zeros,
            resend: segments_of(&session.resend, block_count(size)),
            sent: BTreeMap::new(),
            stage: cache.as_ref().map(DiskCache::stage),
            digests: (0..segments).map(|segment| hash::zero_segment_of(size, segment)).collect(),
            figures: DiskFigures::default(),
            shown: 0,
            scanned: 0,
            acknowledged: 0,
            planned: disk.reading.clone(),
            reading: Arc::new(Reading::everything()),
            seal: disk.seal.clone(),
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
        let reader = self.reader(run, session);
        match &self.cache {
            Some(cache) => {
                let differing = reader.adopt_into(cache, &run.server, head).await?;
                tracing::info!(disk = %session.disk_id, server = %run.server, differing_segments = differing, "compared hashes with the server");
            }
            None => self.theirs = Arc::new(reader.segment_digests().await?),
        }
        self.must = None;
        self.sent.clear();
        self.content = SessionContent::Table;
        self.compare = Compare::Reconciled;
        self.stage = self.cache.as_ref().map(DiskCache::stage);
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
    pub fn reset_cache(&mut self, why: &CacheError) -> Result<(), CacheError> {
        let Some(cache) = &self.cache else { return Ok(()) };
        tracing::warn!(disk = %self.source.disk_id(), %why, "the hash cache is damaged; comparing with the server instead");
        cache.reset(why)?;
        self.compare_again();
        Ok(())
    }

    /// Goes on without a cache: what the server has is asked of the server.
    pub fn drop_cache(&mut self, why: &CacheError) {
        warn_no_cache(self.source.disk_id(), why);
        self.cache = None;
        self.compare_again();
    }

    /// Trusts nothing that is known of the session.
    pub fn compare_again(&mut self) {
        self.must_reconcile = true;
        self.scanned = 0;
        self.stage = self.cache.as_ref().map(DiskCache::stage);
    }

    /// The blocks to send whether they differ or not, as of now. Those that were sent before the connection broke are
    /// among them: the session may hold them, and the table doesn't say so.
    pub fn must(&self) -> Must {
        Must { server: self.must.clone(), resend: self.resend.clone(), sent: self.sent.clone() }
    }

    /// What the next scan reads, now that the cache is what it is.
    pub fn plan_scan(&mut self) -> Arc<Reading> {
        self.reading = self.planned.now(self.cache.as_ref().and_then(DiskCache::cursor_digest));
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
            match stage.put(scanned.segment, &scanned.changes) {
                // What it has can still be read, and is as true as before.
                Err(error) if error.is_no_room() => {
                    warn_no_cache(self.source.disk_id(), &error);
                    self.stage = None;
                }
                put => put?,
            }
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

    /// The server has told that blocks below this one are settled.
    pub fn acknowledge(&mut self, block: u64) {
        self.acknowledged = self.acknowledged.max(block);
    }

    /// Blocks sent in this run of which the server has not told this process that it has them.
    pub fn unacknowledged_blocks(&self) -> u64 {
        let blocks = block_count(self.source.size_bytes());
        let known = self.acknowledged.min(blocks);
        let sent = self.sent.range(known / SEGMENT_BLOCKS..);
        let count = |(segment, bits): (&u64, &SegmentBits)| {
            count_below(*segment, bits, blocks) - count_below(*segment, bits, known)
        };
        sent.map(count).sum()
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

    /// The content read, as a run's seal speaks of it.
    pub fn sealed_content(&self) -> SealedDisk<'_> {
        SealedDisk {
            disk: self.source.disk_id(),
            size_bytes: self.source.size_bytes(),
            logical_sector_bytes: self.source.sector_bytes(),
            table_digest: self.table_digest(),
        }
    }

    /// The staged hashes, once; none where there was no room for them.
    pub fn take_stage(&mut self) -> Option<Stage> {
        self.stage.take()
    }

    /// The table as the scan reads it.
    pub fn table(&self, run: &Run, session: &Session) -> Box<dyn HashTable + Send> {
        match &self.cache {
            Some(cache) => Box::new(CacheTable::new(cache.clone())),
            None => Box::new(ServerTable {
                size_bytes: self.source.size_bytes(),
                digests: self.theirs.clone(),
                reader: self.reader(run, session),
                handle: Handle::current(),
            }),
        }
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
    fn segment(&self, segment: u64) -> Result<Option<Vec<BlockHash>>, ScanError> {
        if self.cache.is_zero_segment(segment) {
            return Ok(None);
        }
        self.cache.segment(segment).map(Some).map_err(|error| ScanError::Table(error.to_string()))
    }
}

/// What the session holds, asked of its server as it is needed: for machines without room for a cache. A call for each segment
/// that differs, by as many threads as the scan has.
struct ServerTable {
    size_bytes: u64,
    /// None: the session began with zeros.
    digests: Arc<Vec<BlockHash>>,
    reader: HashReader,
    handle: Handle,
}

impl HashTable for ServerTable {
    fn segment(&self, segment: u64) -> Result<Option<Vec<BlockHash>>, ScanError> {
        match self.digest(segment) {
            None => Ok(None),
            Some(_) => {
                let asked = self.handle.block_on(self.reader.block_hashes(segment));
                Ok(Some(asked.map_err(Box::new)?))
            }
        }
    }

    fn digest(&self, segment: u64) -> Option<BlockHash> {
        let digest = self.digests.get(segment as usize).copied();
        digest.filter(|digest| *digest != hash::zero_segment_of(self.size_bytes, segment))
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
