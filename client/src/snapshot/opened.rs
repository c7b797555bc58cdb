//! A snapshot opened on its server. The handle is got when it is first needed and again after a link was lost, by the next
//! URL; its lease is kept as long as this lives.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use janus_proto::{
    ids::{BlockHash, MachineKey, ServerId},
    model::Batch,
    pb::{
        BlockRange, CloseSnapshotRequest, Encoding, HashLevel, OpenSnapshotRequest,
        ReadBlocksResponse, ReadHashesRequest, Snapshot, read_hashes_request::Of,
    },
};
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;

use super::{BadData, ReadError};
use crate::{
    catalog::Found,
    link::{Address, Direct, Link, LinkError, QUICK, Waiting, next_of},
    reconcile,
    ways::Ways,
};

mod once;

pub use self::once::{Blocks, SegmentHashes};

/// How snapshots are reached.
#[derive(Debug, Clone)]
pub struct Reach {
    /// The ways to janus or servers.
    pub ways: Ways,
    /// Whether streams may go past janus.
    pub direct: Direct,
    /// How long a lost server is waited for.
    pub failover_after: Duration,
    /// Whose snapshots; `None`: our own.
    pub machine: Option<MachineKey>,
}

/// A snapshot and its place; opened when first read.
pub struct Opened {
    reach: Reach,
    snapshot: Snapshot,
    urls: Vec<String>,
    address: Address,
    /// Only its hashes are wanted, of a server that mirrors its table.
    is_table: bool,
    state: Mutex<State>,
    fetched: AtomicU64,
}

struct State {
    /// Place in the URLs of the next connection.
    at: usize,
    place: Option<Arc<Place>>,
}

/// A link with a handle that is good on it.
pub struct Place {
    /// The link.
    pub link: Link,
    /// The snapshot's handle.
    pub handle: String,
    is_over: AtomicBool,
    _lease: AbortOnDropHandle<()>,
}

/// A part of what was asked for, in order.
#[derive(Debug)]
pub enum Part {
    /// Blocks, not yet compared with their hashes ([`Batch::verify`]); what the batches leave out is zeros.
    Blocks(Batch),
    /// Blocks that the server has lost.
    Lost(Range<u64>),
}

/// Who takes the parts of a snapshot.
pub trait Sink: Send {
    /// Takes one; false: no more is wanted.
    fn take(&mut self, part: Part) -> impl Future<Output = bool> + Send;
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Snapshot { snapshot_id, server_id, .. } = &self.snapshot;
        f.debug_struct("Opened").field("snapshot", snapshot_id).field("server", server_id).finish()
    }
}

impl Opened {
    /// The snapshot that was found; no call is made.
    ///
    /// # Errors
    /// When what the catalog says of it makes no sense.
    pub fn new(reach: Reach, found: Found) -> Result<Self, ReadError> {
        let Found { at, snapshot, server_urls } = found;
        let bad = |source| ReadError::Damaged {
            server: snapshot.server_id.clone(),
            source: BadData::Message(source),
        };
        let server: ServerId = snapshot.server_id.parse().map_err(bad)?;
        super::select::check_size(&snapshot).map_err(bad)?;
        let address = Address { server: Some(server), run: None, machine: reach.machine.clone() };
        Ok(Self {
            reach,
            urls: server_urls,
            address,
            is_table: false,
            state: Mutex::new(State { at, place: None }),
            fetched: AtomicU64::new(0),
            snapshot,
        })
    }

    /// The table of a snapshot of another server, on the server that it is said to be on: only hashes can be read.
    ///
    /// # Errors
    /// As [`Opened::new`].
    pub fn table(reach: Reach, found: Found) -> Result<Self, ReadError> {
        Ok(Self { is_table: true, ..Self::new(reach, found)? })
    }

    /// What it is.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Its server, and the machine that the calls are about.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Data received so far, as packed.
    pub fn fetched_bytes(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// Reads ranges of blocks, ascending, [`MAX_RANGES`](janus_proto::model::MAX_RANGES) at most, and hands each part on as it comes; after a lost link it goes on from there.
    /// Ends early where `sink` says false.
    ///
    /// # Errors
    /// When the server can't be reached for as long as it is waited for, refuses, or sends what makes no sense.
    pub async fn read_blocks(
        &self,
        ranges: &[Range<u64>],
        encoding: Encoding,
        sink: &mut impl Sink,
    ) -> Result<(), ReadError> {
        let mut next = ranges.first().map_or(0, |range| range.start);
        let mut waiting = Waiting::default();
        loop {
            let before = next;
            let error = match self.read_once(ranges, encoding, &mut next, sink).await {
                Ok(()) => return Ok(()),
                Err(ReadError::Link(error)) => error,
                Err(other) => return Err(other),
            };
            if next > before {
                waiting.is_over();
            }
            self.wait(error, &mut waiting).await?;
        }
    }

    async fn read_once(
        &self,
        ranges: &[Range<u64>],
        encoding: Encoding,
        next: &mut u64,
        sink: &mut impl Sink,
    ) -> Result<(), ReadError> {
        let left: Vec<_> = ranges
            .iter()
            .filter(|range| range.end > *next)
            .map(|range| range.start.max(*next)..range.end)
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        let mut blocks = self.blocks_once(&left, encoding).await?;
        while let Some(answer) = blocks.next().await? {
            for part in self.parts(answer)? {
                let end = match &part {
                    Part::Blocks(batch) => batch.extents().last().map_or(*next, |last| last.end()),
                    Part::Lost(range) => range.end,
                };
                if !sink.take(part).await {
                    return Ok(());
                }
                *next = end.max(*next);
            }
        }
        *next = u64::MAX;
        Ok(())
    }

    fn parts(&self, answer: ReadBlocksResponse) -> Result<Vec<Part>, ReadError> {
        let mut parts = Vec::with_capacity(answer.damaged.len() + 1);
        for range in &answer.damaged {
            let end = range.first_block.saturating_add(range.block_count);
            parts.push(Part::Lost(range.first_block..end));
        }
        if let Some(batch) = answer.batch {
            let batch = Batch::from_wire(self.snapshot.size_bytes, batch);
            parts.push(Part::Blocks(batch.map_err(|error| self.bad(error))?));
        }
        Ok(parts)
    }

    /// Digests of all its segments.
    ///
    /// # Errors
    /// As [`Opened::read_blocks`].
    pub async fn segment_digests(&self) -> Result<Vec<BlockHash>, ReadError> {
        let mut waiting = Waiting::default();
        loop {
            match self.digests_once().await {
                Ok(digests) => return Ok(digests),
                Err(error) => self.wait(error, &mut waiting).await?,
            }
        }
    }

    /// The same, tried once.
    ///
    /// # Errors
    /// When the server can't be reached or refuses, or the answer isn't complete.
    pub async fn digests_once(&self) -> Result<Vec<BlockHash>, LinkError> {
        let place = self.place().await?;
        let (of, size_bytes) = (Of::Handle(place.handle.clone()), self.snapshot.size_bytes);
        let read = reconcile::read_segment_digests(&place.link, &self.address, of, size_bytes);
        read.await.map_err(|error| self.lost(&place, error))
    }

    /// Hashes of all blocks of some segments, ascending.
    ///
    /// # Errors
    /// As [`Opened::read_blocks`].
    pub async fn segment_hashes(&self, segments: &[u64]) -> Result<Vec<SegmentHashes>, ReadError> {
        let mut waiting = Waiting::default();
        loop {
            match self.segment_hashes_once(segments, BlockHash::LEN).await {
                Ok(hashes) => return Ok(hashes),
                Err(error) => self.wait(error, &mut waiting).await?,
            }
        }
    }

    /// The link and handle of now.
    ///
    /// # Errors
    /// When there is none, and none can be had at once.
    pub async fn place(&self) -> Result<Arc<Place>, LinkError> {
        let mut state = self.state.lock().await;
        if let Some(place) = state.place.take_if(|place| place.is_over.load(Ordering::Relaxed)) {
            drop(place);
            // Another janus may reach the server that this one has lost.
            state.at = state.at.wrapping_add(1);
        }
        if let Some(place) = &state.place {
            return Ok(place.clone());
        }
        let link = self.reach.ways.beginning_with(state.at).connect().await?;
        let link = match (self.reach.direct, &self.address.server) {
            (Direct::Prefer, Some(server)) => {
                link.prefer_direct(server, &self.urls, self.reach.ways.dialer()).await
            }
            _ => link,
        };
        let (snapshot_id, table) = (self.snapshot.snapshot_id.clone(), self.is_table);
        let message = OpenSnapshotRequest { snapshot_id, table, ..Default::default() };
        let opened = link.open_snapshot(&self.address, message).await;
        if opened.is_err() {
            state.at = state.at.wrapping_add(1);
        }
        let opened = opened?;
        let lease = Duration::from_secs(opened.lease_seconds.clamp(3, 3600).into());
        let keeping = keep_open(link.clone(), self.address.clone(), opened.handle.clone(), lease);
        let place = Arc::new(Place {
            link,
            handle: opened.handle,
            is_over: AtomicBool::new(false),
            _lease: AbortOnDropHandle::new(tokio::spawn(keeping)),
        });
        state.place = Some(place.clone());
        Ok(place)
    }

    /// The next call makes a new link, where this failure was its end.
    fn lost(&self, place: &Place, error: LinkError) -> LinkError {
        if error.is_lost() && error.busy().is_none() {
            place.is_over.store(true, Ordering::Relaxed);
        }
        error
    }

    /// Waits before the next try.
    ///
    /// # Errors
    /// The failure itself, where trying again brings nothing or has been going on for too long.
    async fn wait(&self, error: LinkError, waiting: &mut Waiting) -> Result<(), ReadError> {
        let (server, longest) = (&self.snapshot.server_id, self.reach.failover_after);
        let Some(pause) = waiting.pause(&error, server, longest) else {
            return Err(error.into());
        };
        tokio::time::sleep(pause).await;
        Ok(())
    }

    fn bad(&self, source: impl Into<BadData>) -> ReadError {
        ReadError::Damaged { server: self.snapshot.server_id.clone(), source: source.into() }
    }

    /// Gives the handle back; without this it expires by itself.
    pub async fn close(&self) {
        let Some(place) = self.state.lock().await.place.take() else { return };
        let message = CloseSnapshotRequest { handle: place.handle.clone(), ..Default::default() };
        let _ =
            place.link.restore().close_snapshot(self.address.request(message, Some(QUICK))).await;
    }
}

/// Who reads seldom must not let the handle expire: reads a few hashes now and then. Never ends.
async fn keep_open(link: Link, address: Address, handle: String, lease: Duration) {
    loop {
        tokio::time::sleep(lease / 3).await;
        let message = ReadHashesRequest {
            level: HashLevel::Segment.into(),
            ranges: vec![BlockRange { first_block: 0, block_count: 1 }],
            of: Some(Of::Handle(handle.clone())),
            hash_bytes: 0,
        };
        let request = address.request(message, Some(QUICK));
        if let Ok(answers) = link.restore().read_hashes(request).await {
            let mut answers = answers.into_inner();
            while let Ok(Some(_)) = next_of(&mut answers, "keeping the snapshot open").await {}
        }
    }
}
