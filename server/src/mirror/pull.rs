//! Reads one table from its server and puts it on the shelf: slowly, and going on where a stream broke.

use std::{sync::Arc, time::Duration};

use janus_proto::{
    error::{WireError, shorten},
    ids::{BlockHash, SnapshotId},
    pb,
};
use tokio::time::sleep;
use tonic::Status;

use super::{Mirror, MirrorError, record::Description, shelf::Fresh};
use crate::{
    blocking,
    chain::table::{Differing, SegmentBitmap},
    pace::Rate,
    peer::{Peers, is_away, unless_silent},
    space::Space,
};

/// What all tables together may take of a link: 16 Mbit/s. The hashes of 256 GiB of new data are through in 17 minutes.
const BYTES_PER_SECOND: u64 = 2 << 20;
/// Streams that bring nothing before a table is left for later.
const TRIES: u32 = 3;
const PAUSE: Duration = Duration::from_millis(500);
/// Free space is asked for after so many bytes.
const LOOK_BYTES: u64 = 8 << 20;

/// Why a table was not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum PullError {
    /// A call failed.
    #[error("{}", crate::peer::told(.0))]
    Call(#[from] Status),
    /// What came makes no sense.
    #[error("what came makes no sense: {0}")]
    Wire(#[from] WireError),
    /// It can't be kept.
    #[error(transparent)]
    Mirror(#[from] MirrorError),
}

impl PullError {
    /// True when the server or janus is away, or busy: nothing is wrong.
    pub(super) fn is_away(&self) -> bool {
        matches!(self, Self::Call(status) if is_away(status))
    }

    /// True when nothing more can be kept now.
    pub(super) fn is_full(&self) -> bool {
        matches!(self, Self::Mirror(MirrorError::Full))
    }
}

/// Reads the table of a snapshot; returns the bytes of hashes that came, and what it is a difference to.
pub(super) async fn pull(
    mirror: &Arc<Mirror>,
    peers: &Peers,
    wanted: &Description,
) -> Result<(u64, Option<SnapshotId>), PullError> {
    let (mut pulling, mut tries) = (Pulling::new(mirror, wanted), 0);
    let pulled = loop {
        let before = pulling.bytes;
        match pulling.stream(peers).await {
            Ok(()) => break Ok(()),
            Err(error) => {
                tries = if pulling.bytes > before { 1 } else { tries + 1 };
                if !error.is_away() || tries >= TRIES {
                    break Err(error);
                }
            }
        }
        sleep(PAUSE).await;
    };
    let (bytes, fresh) = (pulling.bytes, pulling.fresh);
    let base = fresh.as_ref().and_then(Fresh::base);
    let mirror = mirror.clone();
    match (pulled, fresh) {
        (Ok(()), Some(fresh)) => {
            blocking(move || mirror.shelf.publish(fresh)).await??;
            Ok((bytes, base))
        }
        (Ok(()), None) => Err(WireError::Missing { field: "start" }.into()),
        (Err(error), fresh) => {
            if let Some(fresh) = fresh {
                blocking(move || mirror.shelf.discard(fresh)).await?;
            }
            Err(error)
        }
    }
}

struct Pulling<'a> {
    mirror: &'a Arc<Mirror>,
    wanted: &'a Description,
    fresh: Option<Fresh>,
    rate: Rate,
    bytes: u64,
    unlooked: u64,
}

impl<'a> Pulling<'a> {
    fn new(mirror: &'a Arc<Mirror>, wanted: &'a Description) -> Self {
        let rate = Rate::new(BYTES_PER_SECOND, Duration::ZERO);
        Self { mirror, wanted, fresh: None, rate, bytes: 0, unlooked: LOOK_BYTES }
    }

    /// One stream, to its end.
    async fn stream(&mut self, peers: &Peers) -> Result<(), PullError> {
        let since = match &self.fresh {
            Some(fresh) => fresh.base(),
            None => self.mirror.shelf.nearest(self.wanted),
        };
        let message = pb::ReadTableRequest {
            snapshot_id: self.wanted.id.to_string(),
            since_snapshot_id: since.map(|id| id.to_string()).unwrap_or_default(),
            first_segment: self.fresh.as_ref().map_or(0, Fresh::next),
        };
        let mut answers = unless_silent(peers.table(&self.wanted.server, message)).await?;
        while let Some(answer) = unless_silent(answers.message()).await? {
            self.take(answer, since).await?;
        }
        Ok(())
    }

    /// Takes a message in, then waits as long as it has its share of the link.
    async fn take(
        &mut self,
        answer: pb::ReadTableResponse,
        since: Option<SnapshotId>,
    ) -> Result<(), PullError> {
        if let Some(start) = answer.start {
            self.start(start, since).await?;
        }
        let mut fresh = self.fresh.take().ok_or(WireError::Missing { field: "start" })?;
        let segments = answer.segments.iter().map(differing).collect::<Result<Vec<_>, _>>();
        let segments = match segments {
            Ok(segments) => segments,
            Err(error) => {
                self.fresh = Some(fresh);
                return Err(error.into());
            }
        };
        let bytes: u64 =
            segments.iter().map(|one| (one.hashes.len() * BlockHash::LEN) as u64).sum();
        self.unlooked += bytes;
        let looks = self.unlooked >= LOOK_BYTES;
        let mirror = self.mirror.clone();
        let (fresh, taken) = blocking(move || {
            let mut taken = if looks { mirror.check_space() } else { Ok(()) };
            for segment in &segments {
                taken = taken.and_then(|()| fresh.push(segment));
            }
            (fresh, taken)
        })
        .await?;
        self.fresh = Some(fresh);
        taken?;
        if looks {
            self.unlooked = 0;
        }
        self.bytes += bytes;
        self.rate.pay(bytes).await;
        Ok(())
    }

    /// Makes sure that what comes is what is wanted, and begins with it.
    async fn start(
        &mut self,
        start: pb::TableStart,
        since: Option<SnapshotId>,
    ) -> Result<(), PullError> {
        let sent = start.snapshot.ok_or(WireError::Missing { field: "snapshot" })?;
        let sent = Description::try_from(sent)?;
        let wanted = self.wanted;
        let is_wanted = (sent.id, sent.digest, sent.size_bytes)
            == (wanted.id, wanted.digest, wanted.size_bytes);
        let base = match start.since_snapshot_id.as_str() {
            "" => None,
            id => Some(id.parse::<SnapshotId>()?),
        };
        if !is_wanted || (base.is_some() && base != since) {
            let what = shorten(&start.since_snapshot_id).to_string();
            let reason = format!("another snapshot's, or since {what:?}");
            return Err(WireError::invalid("start", reason).into());
        }
        // It goes on only as what it was begun as.
        if let Some(fresh) = self.fresh.take_if(|fresh| fresh.base() != base) {
            let mirror = self.mirror.clone();
            blocking(move || mirror.shelf.discard(fresh)).await?;
            return Err(Status::unavailable("the snapshot that it differs from has gone").into());
        }
        if self.fresh.is_none() {
            let (mirror, wanted) = (self.mirror.clone(), wanted.clone());
            let begun = blocking(move || mirror.shelf.begin(&wanted, base)).await?;
            self.fresh = Some(begun?);
        }
        Ok(())
    }
}

impl Mirror {
    /// Blocks.
    pub(super) fn check_space(&self) -> Result<(), MirrorError> {
        match Space::ask(self.runs.store(), self.reserve) {
            // An eighth more than the reserve: what is read next must fit, too.
            Some(space) if space.is_low(true) => Err(MirrorError::Full),
            _ => Ok(()),
        }
    }
}

/// A segment as it came, as far as that can be told without the disk.
pub(crate) fn differing(wire: &pb::TableSegment) -> Result<Differing, WireError> {
    let mut present = SegmentBitmap::default();
    let expected = present.0.len() * 8;
    if wire.present.len() != expected {
        return Err(WireError::Length { field: "present", expected, actual: wire.present.len() });
    }
    for (word, bytes) in present.0.iter_mut().zip(wire.present.as_chunks().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    let (hashes, rest) = wire.hashes.as_chunks();
    if !rest.is_empty() || hashes.len() != present.count() {
        let expected = present.count() * BlockHash::LEN;
        return Err(WireError::Length { field: "hashes", expected, actual: wire.hashes.len() });
    }
    Ok(Differing {
        segment: wire.segment,
        digest: BlockHash::from_wire("digest", &wire.digest)?,
        present,
        hashes: hashes.iter().map(|hash| BlockHash(*hash)).collect(),
    })
}
