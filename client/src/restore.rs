//! Brings a disk back: blocks come in over the network, threads check and write them, the whole is compared with the
//! snapshot's digest before the result gets its name.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use janus_proto::{
    error::WireError,
    hash::table_digest,
    ids::{BlockHash, MAX_DISK_BYTES, ServerId, block_count},
    pb::{
        BlockRange, CloseSnapshotRequest, ErrorReason, HashLevel, OpenSnapshotRequest,
        ReadBlocksRequest, ReadHashesRequest, Snapshot, read_hashes_request::Of,
    },
    show::amount,
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    catalog::Found,
    link::{Address, Direct, Link, LinkError, PATIENCE, QUICK, Remedy},
    packing::Wish,
    progress::Progress,
    reconcile,
    snapshot::{SelectError, Selection},
    ways::Ways,
};

mod assembly;
mod lost;
mod pieces;
mod target;
mod writers;

pub use self::{lost::Lost, target::TargetError};

use self::{
    assembly::Assembly,
    pieces::{Pieces, Seen},
    target::Target,
    writers::Writers,
};

const READING: &str = "reading blocks";
/// Longest silence of a stream that should be flowing.
const SILENCE: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(500);

/// Why a disk was not restored. The target is as it was, unless it is a device.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// There is no such snapshot, or it can't be had.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// A call failed.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The target can't be used or written.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// A block is not what was backed up.
    #[error(
        "server {server} sent wrong data: {source}; restore another snapshot, or the same from another server"
    )]
    Damaged {
        /// The server.
        server: String,
        /// What is wrong.
        source: DamageError,
    },
    /// Blocks are lost.
    #[error(
        "{} of this snapshot are lost on server {server}, bytes {}; restore another snapshot, the same disk from another server, or what is left: --partial MAP",
        amount(lost.bytes()),
        lost.said()
    )]
    Lost {
        /// The server.
        server: String,
        /// Which.
        lost: Lost,
    },
    /// The map of lost blocks.
    #[error("{}: the map of what is lost can't be written: {source}", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Asked to stop.
    #[error("interrupted; nothing was restored")]
    Interrupted,
}

/// What is wrong with received data.
#[derive(Debug, thiserror::Error)]
pub enum DamageError {
    /// A message that makes no sense.
    #[error(transparent)]
    Message(#[from] WireError),
    /// A block doesn't have its hash.
    #[error(transparent)]
    Block(#[from] janus_proto::model::HashMismatch),
    /// A part isn't the snapshot's.
    #[error("segment {segment} is not the snapshot's")]
    Segment {
        /// Its number.
        segment: u64,
    },
    /// The whole isn't the snapshot.
    #[error("all blocks together have digest {actual}, the snapshot has {expected}")]
    Whole {
        /// Of what was received.
        actual: BlockHash,
        /// Of the snapshot.
        expected: BlockHash,
    },
}

/// A restore to do.
pub struct Restore {
    /// The ways to janus or servers.
    pub ways: Ways,
    /// What to restore.
    pub wanted: Selection,
    /// File or block device.
    pub to: PathBuf,
    /// Replace a file, overwrite a device.
    pub force: bool,
    /// Restore what is left of a damaged snapshot, with zeros for what is lost, and write a map of that here.
    pub partial: Option<PathBuf>,
    /// How data may be packed.
    pub packing: Wish,
    /// Threads that check and write.
    pub threads: usize,
    /// How long a lost server is waited for.
    pub failover_after: Duration,
    /// Whether streams may go past janus.
    pub direct: Direct,
    /// What is shown meanwhile.
    pub progress: Arc<Progress>,
    /// Asks it to stop.
    pub stop: CancellationToken,
}

/// A disk that was restored.
#[derive(Debug)]
pub struct RestoreReport {
    /// From this snapshot.
    pub snapshot: Snapshot,
    /// Data received, as packed.
    pub fetched_bytes: u64,
    /// Data written; zeros are left out.
    pub written_bytes: u64,
    /// What is lost, and zeros now.
    pub lost: Lost,
    /// How long it took.
    pub seconds: f64,
}

impl Restore {
    /// Restores.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub async fn run(&self) -> Result<RestoreReport, RestoreError> {
        let began = Instant::now();
        if let Some(path) = self.partial.clone().filter(|path| path.exists()) {
            let source = std::io::ErrorKind::AlreadyExists.into();
            return Err(RestoreError::Map { path, source });
        }
        // Before the disk was restored for nothing.
        if let Some(path) = self.partial.clone().filter(|path| !folder_of(path).is_dir()) {
            let source = std::io::ErrorKind::NotADirectory.into();
            return Err(RestoreError::Map { path, source });
        }
        let found = self.wanted.find(&self.ways).await?;
        let snapshot = found.snapshot.clone();
        if snapshot.size_bytes > MAX_DISK_BYTES {
            return Err(self.damaged(
                &snapshot,
                WireError::Invalid { field: "size_bytes", reason: "too large".into() },
            ));
        }
        let target = Arc::new(Target::open(&self.to, snapshot.size_bytes, self.force)?);
        self.progress.set_total(snapshot.size_bytes);
        let mut writers = Writers::start(self.threads, &target, snapshot.size_bytes);
        let mut assembly = Assembly::new(snapshot.size_bytes);
        let fetched = tokio::select! {
            fetched = self.fetch_all(&found, &mut assembly, &writers) => fetched,
            () = self.stop.cancelled() => Err(RestoreError::Interrupted),
        };
        // A writer's failure is the cause when both failed.
        let written_bytes =
            writers.finish().await.map_err(|error| self.writer_failed(&snapshot, error))?;
        let fetched_bytes = fetched?;
        let lost = self.check_whole(&snapshot, assembly)?;
        let done = tokio::task::spawn_blocking(move || target.publish()).await;
        done.map_err(|_| RestoreError::Interrupted)??;
        Ok(RestoreReport {
            snapshot,
            fetched_bytes,
            written_bytes,
            lost,
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    /// Reads the whole disk, over as many streams as it takes; returns the bytes received.
    async fn fetch_all(
        &self,
        found: &Found,
        assembly: &mut Assembly,
        writers: &Writers,
    ) -> Result<u64, RestoreError> {
        let Found { snapshot, server_urls, .. } = found;
        let mut at = found.at;
        let server: ServerId =
            snapshot.server_id.parse().map_err(|error| self.damaged(snapshot, error))?;
        let address = Address {
            server: Some(server.clone()),
            run: None,
            machine: self.wanted.machine.clone(),
        };
        let mut fetched = 0;
        let (mut lost_at, mut reached) = (None::<Instant>, 0);
        loop {
            let through = match self.ways.beginning_with(at).connect().await {
                Ok(link) if self.direct == Direct::Prefer => {
                    Ok(link.prefer_direct(&server, server_urls, self.ways.dialer()).await)
                }
                other => other,
            };
            let error = match self
                .open_and_fetch(through, &address, snapshot, assembly, writers, &mut fetched)
                .await
            {
                Ok(()) => return Ok(fetched),
                Err(RestoreError::Link(error)) => error,
                Err(other) => return Err(other),
            };
            if assembly.next_block() > reached {
                (lost_at, reached) = (None, assembly.next_block());
            }
            let expired = error.reason() == Some(ErrorReason::HandleExpired);
            let since = *lost_at.get_or_insert_with(Instant::now);
            if let Some(pause) = error.busy().filter(|_| since.elapsed() < PATIENCE) {
                tracing::warn!(server = %snapshot.server_id, %error, ?pause, "waiting for a place");
                tokio::time::sleep(pause).await;
                continue;
            }
            if (error.remedy() != Remedy::Reconnect && !expired)
                || since.elapsed() > self.failover_after
            {
                return Err(error.into());
            }
            tracing::warn!(server = %snapshot.server_id, %error, "connection lost; going on as soon as the server answers");
            // Another janus may reach the server that this one has lost.
            at += 1;
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn open_and_fetch(
        &self,
        link: Result<Link, LinkError>,
        address: &Address,
        snapshot: &Snapshot,
        assembly: &mut Assembly,
        writers: &Writers,
        fetched: &mut u64,
    ) -> Result<(), RestoreError> {
        let link = link?;
        let message = OpenSnapshotRequest { snapshot_id: snapshot.snapshot_id.clone() };
        let request = address.request(message, Some(QUICK));
        let opened = link.restore().open_snapshot(request).await;
        let opened = opened.map_err(LinkError::call("opening the snapshot"))?.into_inner();
        let lease = Duration::from_secs(opened.lease_seconds.clamp(3, 3600).into());
        let result = tokio::select! {
            result = self.fetch(&link, address, &opened.handle, snapshot, assembly, writers, fetched) => result,
            () = keep_open(&link, address, &opened.handle, lease) => Ok(()),
        };
        let close = address.request(CloseSnapshotRequest { handle: opened.handle }, Some(QUICK));
        // The handle expires by itself where this fails.
        let _ = link.restore().close_snapshot(close).await;
        result
    }

    /// Reads some blocks; says how fast they came.
    async fn fetch_piece(
        &self,
        link: &Link,
        request: tonic::Request<ReadBlocksRequest>,
        snapshot: &Snapshot,
        assembly: &mut Assembly,
        writers: &Writers,
        fetched: &mut u64,
    ) -> Result<Seen, RestoreError> {
        let mut answers = link
            .bulk_restore()
            .read_blocks(request)
            .await
            .map_err(LinkError::call(READING))?
            .into_inner();
        let mut seen = Seen::default();
        while let Some(answer) = next(&mut answers).await? {
            for range in &answer.damaged {
                let zeros = assembly.lose(range).map_err(|error| self.damaged(snapshot, error))?;
                self.progress.advance(zeros.1 * janus_proto::ids::BLOCK_BYTES);
                if !writers.give_zeros(zeros).await {
                    return Err(RestoreError::Interrupted); // The writer says why.
                }
            }
            let Some(batch) = answer.batch else { continue };
            seen.message(batch.data.len() as u64);
            *fetched += batch.data.len() as u64;
            let before = assembly.next_block();
            let gaps = assembly.take(&batch).map_err(|error| self.damaged(snapshot, error))?;
            self.progress.advance((assembly.next_block() - before) * janus_proto::ids::BLOCK_BYTES);
            self.progress.fetched(batch.data.len() as u64);
            if !writers.give(gaps, batch).await {
                return Err(RestoreError::Interrupted); // The writer says why.
            }
        }
        Ok(seen)
    }

    #[allow(clippy::too_many_arguments)]
    async fn fetch(
        &self,
        link: &Link,
        address: &Address,
        handle: &str,
        snapshot: &Snapshot,
        assembly: &mut Assembly,
        writers: &Writers,
        fetched: &mut u64,
    ) -> Result<(), RestoreError> {
        let total = block_count(snapshot.size_bytes);
        let mut pieces = Pieces::new(self.packing, total);
        let mut first_block = assembly.next_block();
        while first_block < total {
            let end = pieces.end(first_block);
            let message = ReadBlocksRequest {
                handle: handle.to_owned(),
                ranges: vec![BlockRange { first_block, block_count: end - first_block }],
                encodings: vec![pieces.encoding.into()],
                name_damaged: true,
            };
            let request = address.request(message, None);
            let seen =
                self.fetch_piece(link, request, snapshot, assembly, writers, fetched).await?;
            pieces.seen(&seen);
            first_block = end;
        }
        let rest = assembly.finish();
        if !writers.give_zeros(rest).await {
            return Err(RestoreError::Interrupted);
        }
        if !assembly.lost().is_empty() {
            self.compare_rest(link, address, handle, snapshot, assembly).await?;
        }
        Ok(())
    }

    /// The digest of the whole can't tell any more whether the rest is right: those of its segments can.
    async fn compare_rest(
        &self,
        link: &Link,
        address: &Address,
        handle: &str,
        snapshot: &Snapshot,
        assembly: &Assembly,
    ) -> Result<(), RestoreError> {
        let of = Of::Handle(handle.to_owned());
        let digests =
            reconcile::read_segment_digests(link, address, of, snapshot.size_bytes).await?;
        let actual = table_digest(snapshot.size_bytes, &digests);
        let expected = self.expected(snapshot)?;
        if actual != expected {
            return Err(self.damaged(snapshot, DamageError::Whole { actual, expected }));
        }
        let compared = assembly.compare(&digests);
        compared.map_err(|segment| self.damaged(snapshot, DamageError::Segment { segment }))
    }

    fn expected(&self, snapshot: &Snapshot) -> Result<BlockHash, RestoreError> {
        BlockHash::from_wire("table_digest", &snapshot.table_digest)
            .map_err(|error| self.damaged(snapshot, error))
    }

    /// Compares the whole, or notes what is lost of it.
    fn check_whole(&self, snapshot: &Snapshot, assembly: Assembly) -> Result<Lost, RestoreError> {
        let lost = Lost::new(assembly.lost(), snapshot.size_bytes);
        if !lost.is_empty() {
            let server = snapshot.server_id.clone();
            let Some(path) = self.partial.clone() else {
                return Err(RestoreError::Lost { server, lost });
            };
            tracing::warn!(server, snapshot = %snapshot.snapshot_id, bytes = lost.said(), "lost: zeros take their place");
            let written = lost.write_map(&path, snapshot.size_bytes);
            written.map_err(|source| RestoreError::Map { path, source })?;
            return Ok(lost);
        }
        let (actual, expected) = (assembly.table_digest(), self.expected(snapshot)?);
        if actual == expected {
            Ok(lost)
        } else {
            Err(self.damaged(snapshot, DamageError::Whole { actual, expected }))
        }
    }

    fn damaged(&self, snapshot: &Snapshot, source: impl Into<DamageError>) -> RestoreError {
        RestoreError::Damaged { server: snapshot.server_id.clone(), source: source.into() }
    }

    fn writer_failed(&self, snapshot: &Snapshot, error: writers::WriterError) -> RestoreError {
        match error {
            writers::WriterError::Target(error) => error.into(),
            writers::WriterError::Damage(error) => self.damaged(snapshot, error),
            writers::WriterError::Ended => RestoreError::Interrupted,
        }
    }
}

async fn next(
    answers: &mut tonic::Streaming<janus_proto::pb::ReadBlocksResponse>,
) -> Result<Option<janus_proto::pb::ReadBlocksResponse>, LinkError> {
    match tokio::time::timeout(SILENCE, answers.message()).await {
        Ok(answer) => answer.map_err(LinkError::call(READING)),
        Err(_) => {
            Err(LinkError::call(READING)(Status::deadline_exceeded("the server went silent")))
        }
    }
}

/// A slow target must not let the handle expire: reads a few hashes now and then. Never ends.
async fn keep_open(link: &Link, address: &Address, handle: &str, lease: Duration) {
    loop {
        tokio::time::sleep(lease / 3).await;
        let message = ReadHashesRequest {
            level: HashLevel::Segment.into(),
            ranges: vec![BlockRange { first_block: 0, block_count: 1 }],
            of: Some(Of::Handle(handle.to_owned())),
        };
        let request = address.request(message, Some(QUICK));
        if let Ok(answers) = link.restore().read_hashes(request).await {
            let mut answers = answers.into_inner();
            while let Ok(Some(_)) = answers.message().await {}
        }
    }
}

/// The folder that a file is to be made in.
fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
