//! A restore in work: what is found to be missing becomes pieces, sources take them, and what nobody can bring is noted.

use std::{
    ops::Range,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::try_join_all;
use janus_proto::{
    ids::{BlockHash, block_len},
    ranges::Ranges,
};
use tokio::sync::mpsc;

use super::{
    RestoreError,
    counts::Counts,
    part::{Part, Piece, ranges},
    queue::Queue,
    serve::ServeError,
    source::Source,
    table::Table,
    writers::Writers,
};
use crate::snapshot::Opened;

/// Most segments of a piece of which all is fetched: 64 MiB.
const WHOLE: u64 = 16;
/// Most segments of a piece of which block hashes are compared.
const COMPARED: u64 = 64;
/// A disk is at least so many pieces, so that sources can share it.
const PIECES: u64 = 32;

/// What all that work on a restore share.
pub(super) struct Work {
    pub(super) size_bytes: u64,
    /// Those that are restored.
    pub(super) segments: Range<u64>,
    pub(super) table: Table,
    pub(super) queue: Queue,
    pub(super) writers: Writers,
    pub(super) counts: Arc<Counts>,
    /// The first one holds the snapshot, or only its table.
    pub(super) sources: Vec<Source>,
    /// It has only the table.
    pub(super) is_away: bool,
    pub(super) failover_after: Duration,
    /// What is lost is to be zeros, not what the target had.
    pub(super) zero_lost: bool,
    pub(super) lost: Mutex<Vec<Range<u64>>>,
}

/// Ranges in order, those that touch as one.
pub(super) fn merged(ranges: Mutex<Vec<Range<u64>>>) -> Vec<Range<u64>> {
    let mut ranges = ranges.into_inner().unwrap_or_else(PoisonError::into_inner);
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged = Ranges::new();
    ranges.into_iter().for_each(|range| merged.push(range));
    merged.iter().collect()
}

type Doing<'a> = Pin<Box<dyn Future<Output = Result<(), RestoreError>> + Send + 'a>>;

impl Work {
    /// Works until all of it is done or given up.
    pub(super) async fn run(&self, parts: &mut mpsc::Receiver<Part>) -> Result<(), RestoreError> {
        let mut all: Vec<Doing<'_>> = vec![Box::pin(self.feed(parts)), Box::pin(self.bury())];
        if self.is_away {
            self.queue.retire(0);
        }
        for source in &self.sources {
            all.push(Box::pin(self.first_lane(source)));
        }
        // A second stream of the holder: one is made while the other is written.
        if let Some(holder) = self.sources.first() {
            all.push(Box::pin(self.second_lane(holder)));
        }
        try_join_all(all).await.map(|_| ())
    }

    /// Who knows what the snapshot is.
    pub(super) fn holder(&self) -> Option<&Opened> {
        let is_there = self.is_away || self.queue.is_source(0);
        self.sources.first().map(|source| &source.opened).filter(|_| is_there)
    }

    async fn first_lane(&self, source: &Source) -> Result<(), RestoreError> {
        if source.number == 0 {
            return self.lane(source).await;
        }
        if !self.join(source).await {
            return Ok(());
        }
        let learning = async {
            tokio::select! {
                biased;
                () = self.queue.ended(0) => {}
                () = self.learn(source) => {}
            }
            Ok(())
        };
        tokio::try_join!(learning, self.lane(source)).map(|_| ())
    }

    async fn second_lane(&self, source: &Source) -> Result<(), RestoreError> {
        tokio::select! {
            biased;
            () = self.queue.ended(source.number) => return Ok(()),
            () = source.packing.decided() => {}
        }
        self.lane(source).await
    }

    /// Learns what another snapshot has; false when it can't be had.
    async fn join(&self, source: &Source) -> bool {
        while self.queue.is_source(source.number) {
            tokio::select! {
                biased;
                () = self.queue.ended(source.number) => return false,
                digests = source.opened.digests_once() => match digests {
                    Ok(digests) => {
                        source.set_digests(digests);
                        return true;
                    }
                    Err(error) => self.pause(source, error).await,
                },
            }
        }
        false
    }

    /// Hashes of segments that another snapshot doesn't have as they are, so that it can be of use for them when the holder
    /// is lost.
    async fn learn(&self, source: &Source) {
        let Some(holder) = self.holder() else { return };
        let differs = |segment: &u64| {
            let wanted = self.table.digest(*segment);
            let zeros = janus_proto::hash::zero_segment_of(self.size_bytes, *segment);
            source.digest(*segment).is_some_and(|digest| wanted != Some(digest))
                && wanted != Some(&zeros)
        };
        let segments: Vec<u64> = self.segments.clone().filter(differs).collect();
        if let Err(error) = self.table.learn(holder, &segments).await {
            tracing::debug!(?error, "hashes of the snapshot can't be had before they are needed");
        }
    }

    /// Makes pieces of what is found.
    async fn feed(&self, parts: &mut mpsc::Receiver<Part>) -> Result<(), RestoreError> {
        let segments = (self.segments.end - self.segments.start) / PIECES;
        let compared = segments.clamp(1, COMPARED);
        let share = compared / segments.clamp(1, WHOLE);
        let (mut gathered, mut weight) = (Vec::new(), 0);
        while let Some(part) = parts.recv().await {
            weight += if part.has_content { 1 } else { share };
            gathered.push(part);
            if weight >= compared {
                self.queue.add(Piece::new(std::mem::take(&mut gathered))).await;
                weight = 0;
            }
        }
        if !gathered.is_empty() {
            self.queue.add(Piece::new(gathered)).await;
        }
        self.queue.complete();
        Ok(())
    }

    /// Notes what nobody can bring.
    async fn bury(&self) -> Result<(), RestoreError> {
        while let Some(mut piece) = self.queue.take_hopeless().await {
            for part in &mut piece.parts {
                self.prove(part).await;
                let mut blocks = part.needed(None);
                if blocks.is_empty() {
                    // Each block came with its hash, and still the segment isn't the snapshot's: nothing of it is believed.
                    blocks = part.blocks().collect();
                }
                let missing: u64 =
                    blocks.iter().map(|block| block_len(self.size_bytes, *block) as u64).sum();
                self.counts.verified_blocks(part, part.bytes() - missing);
                let lost = ranges(blocks.iter().copied());
                if self.zero_lost {
                    let there = ranges(blocks.into_iter().filter(|block| !part.is_zero(*block)));
                    let zeroed = self.writers.zero(there).await.wait().await;
                    match zeroed.map_err(ServeError::from) {
                        Ok(_) => {}
                        Err(ServeError::Target(error)) => return Err(error.into()),
                        Err(_) => return Err(RestoreError::Interrupted),
                    }
                }
                self.lost.lock().unwrap_or_else(PoisonError::into_inner).extend(lost);
            }
            self.queue.done();
        }
        Ok(())
    }

    /// Compares block by block what is there of a segment that is not whole, as far as it is known what it should be.
    async fn prove(&self, part: &mut Part) {
        let holder = self.holder();
        let whole = match self.table.get(part.segment).filter(|hashes| hashes.is_whole()) {
            Some(hashes) => Some(hashes),
            None => match holder {
                Some(holder) => {
                    let asked = self.table.ask(holder, &[part.segment], BlockHash::LEN).await;
                    asked.ok().and_then(|hashes| hashes.into_iter().next())
                }
                None => None,
            },
        };
        if let Some(whole) = whole {
            part.doubt();
            part.prove(&whole);
        }
    }
}
