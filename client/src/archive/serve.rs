//! The calls that an archive answers; see `catalog.proto` and `restore.proto`.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use janus_proto::{
    archive::{ArchiveError, Archived, Store},
    asked::{self, by_segment},
    error::{ErrorReason, status},
    hash::{hash_blocks, zero_hash, zero_segment_of},
    ids::{
        BLOCK_BYTES, BlockHash, DiskId, MachineKey, SEGMENT_BLOCKS, SnapshotId, block_count,
        block_len, segment_count,
    },
    model::{Batch, Extent, MAX_BATCH_BYTES, MAX_HASHES},
    pb::{
        self, HashLevel, catalog_service_server::CatalogService, read_hashes_request::Of,
        restore_service_server::RestoreService,
    },
};
use tokio::{
    runtime::Handle,
    sync::{OnceCell, mpsc},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::Catalog;

/// How long a handle lasts: as long as this process, so it is long.
const LEASE_SECONDS: u32 = 3600;
/// Messages on their way.
const QUEUE: usize = 4;
/// Extents after which a message is sent though it is not full.
const ENOUGH_EXTENTS: usize = 1024;

type Opening = Arc<OnceCell<Arc<Archived>>>;
type Answers<T> = mpsc::Sender<Result<T, Status>>;

/// An archive.
pub(super) struct Archive {
    store: Store,
    catalog: Catalog,
    /// Disks that are open. Handles are ids of snapshots.
    opened: Mutex<HashMap<SnapshotId, Opening>>,
}

impl Archive {
    pub(super) fn new(store: Store, catalog: Catalog) -> Self {
        Self { store, catalog, opened: Mutex::default() }
    }

    fn known(&self, id: &str) -> Result<SnapshotId, Status> {
        let id: SnapshotId = id.parse()?;
        let unknown =
            || status(ErrorReason::SnapshotUnknown, format!("snapshot {id} is not in the archive"));
        self.catalog.snapshots.contains_key(&id).then_some(id).ok_or_else(unknown)
    }

    /// The disk of a snapshot, opened once.
    async fn disk(&self, handle: &str) -> Result<Arc<Archived>, Status> {
        let id = self.known(handle)?;
        let opening = {
            let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
            opened.entry(id).or_default().clone()
        };
        let opened = opening.get_or_try_init(|| async {
            let unknown = || status(ErrorReason::SnapshotUnknown, handle.to_owned());
            let found = self.catalog.snapshots.get(&id).ok_or_else(unknown)?;
            let (store, manifest) = (self.store.clone(), found.manifest.clone());
            let disk: DiskId = found.wire.disk_id.parse()?;
            let runtime = Handle::current();
            let open = move || Archived::open(&store, &runtime, &manifest, &disk);
            let opened = tokio::task::spawn_blocking(open)
                .await
                .map_err(|_| Status::cancelled("stopped"))?;
            opened.map(Arc::new).map_err(failed)
        });
        opened.await.cloned()
    }

    fn machine(&self, named: &str, address: Option<&str>) -> Result<Option<MachineKey>, Status> {
        let named = Some(named).filter(|named| !named.is_empty()).or(address);
        if let Some(named) = named {
            return Ok(Some(named.parse()?));
        }
        if let Some(own) = &self.catalog.own {
            return Ok(Some(own.clone()));
        }
        let mut machines: Vec<&str> =
            self.catalog.snapshots.values().map(|found| found.wire.machine.as_str()).collect();
        machines.sort_unstable();
        machines.dedup();
        match machines.len() {
            0 | 1 => Ok(None),
            _ => Err(status(
                ErrorReason::InvalidField,
                format!("the archive has several machines, say which: {}", machines.join(", ")),
            )),
        }
    }
}

/// What a failure means to who called.
fn failed(error: ArchiveError) -> Status {
    match error {
        ArchiveError::Damaged { .. } | ArchiveError::Missing { .. } => {
            status(ErrorReason::StoreDamaged, error.to_string())
        }
        ArchiveError::Newer { .. } => status(ErrorReason::VersionUnsupported, error.to_string()),
        ArchiveError::Stopped => Status::cancelled("stopped"),
        error if error.passes() => Status::unavailable(error.to_string()),
        error => status(ErrorReason::StoreDamaged, error.to_string()),
    }
}

#[tonic::async_trait]
impl CatalogService for Archive {
    async fn list_machines(
        &self,
        _: Request<pb::ListMachinesRequest>,
    ) -> Result<Response<pb::ListMachinesResponse>, Status> {
        Err(Status::unimplemented("an archive lists snapshots"))
    }

    async fn list_disks(
        &self,
        _: Request<pb::ListDisksRequest>,
    ) -> Result<Response<pb::ListDisksResponse>, Status> {
        Err(Status::unimplemented("an archive lists snapshots"))
    }

    async fn list_snapshots(
        &self,
        request: Request<pb::ListSnapshotsRequest>,
    ) -> Result<Response<pb::ListSnapshotsResponse>, Status> {
        let address = request.metadata().get(janus_proto::metadata::MACHINE);
        let address = address.and_then(|value| value.to_str().ok()).map(str::to_owned);
        let pb::ListSnapshotsRequest { machine, disk_id, .. } = request.into_inner();
        let machine = self.machine(&machine, address.as_deref())?;
        let all = self.catalog.snapshots.values().map(|found| &found.wire);
        let meant = all.filter(|wire| {
            machine.as_ref().is_none_or(|machine| machine.as_str() == wire.machine)
                && (disk_id.is_empty() || disk_id == wire.disk_id)
        });
        let snapshots = meant.cloned().collect();
        Ok(Response::new(pb::ListSnapshotsResponse { snapshots, ..Default::default() }))
    }

    async fn get_snapshot(
        &self,
        request: Request<pb::GetSnapshotRequest>,
    ) -> Result<Response<pb::GetSnapshotResponse>, Status> {
        let id = self.known(&request.into_inner().snapshot_id)?;
        let snapshot = self.catalog.snapshots.get(&id).map(|found| found.wire.clone());
        Ok(Response::new(pb::GetSnapshotResponse { snapshot, addresses: None }))
    }
}

#[tonic::async_trait]
impl RestoreService for Archive {
    async fn open_snapshot(
        &self,
        request: Request<pb::OpenSnapshotRequest>,
    ) -> Result<Response<pb::OpenSnapshotResponse>, Status> {
        let id = self.known(&request.into_inner().snapshot_id)?;
        let snapshot = self.catalog.snapshots.get(&id).map(|found| found.wire.clone());
        let handle = id.to_string();
        Ok(Response::new(pb::OpenSnapshotResponse {
            handle,
            lease_seconds: LEASE_SECONDS,
            snapshot,
        }))
    }

    async fn close_snapshot(
        &self,
        request: Request<pb::CloseSnapshotRequest>,
    ) -> Result<Response<pb::CloseSnapshotResponse>, Status> {
        let id = self.known(&request.into_inner().handle)?;
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        Ok(Response::new(pb::CloseSnapshotResponse {}))
    }

    type ReadHashesStream = ReceiverStream<Result<pb::ReadHashesResponse, Status>>;

    async fn read_hashes(
        &self,
        request: Request<pb::ReadHashesRequest>,
    ) -> Result<Response<Self::ReadHashesStream>, Status> {
        let request = request.into_inner();
        let Some(Of::Handle(handle)) = &request.of else {
            return Err(Status::unimplemented("an archive has no sessions"));
        };
        let disk = self.disk(handle).await?;
        let size = disk.entry().size_bytes;
        let is_segments = request.level() == HashLevel::Segment;
        let total = if is_segments { segment_count(size) } else { block_count(size) };
        let ranges = asked::ranges(&request.ranges, total)?;
        let hash_bytes = asked::hash_bytes(request.hash_bytes)?;
        let (answers, stream) = mpsc::channel(QUEUE);
        tokio::task::spawn_blocking(move || {
            let sent = match is_segments {
                true => send_digests(&disk, &ranges, hash_bytes, &answers),
                false => send_hashes(&disk, &ranges, hash_bytes, &answers),
            };
            if let Err(Some(error)) = sent {
                let _ = answers.blocking_send(Err(error));
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type ReadBlocksStream = ReceiverStream<Result<pb::ReadBlocksResponse, Status>>;

    async fn read_blocks(
        &self,
        request: Request<pb::ReadBlocksRequest>,
    ) -> Result<Response<Self::ReadBlocksStream>, Status> {
        let request = request.into_inner();
        let disk = self.disk(&request.handle).await?;
        let ranges = asked::ranges(&request.ranges, block_count(disk.entry().size_bytes))?;
        let (answers, stream) = mpsc::channel(QUEUE);
        tokio::task::spawn_blocking(move || {
            let mut message = Message::new(&disk, &answers);
            let sent =
                ranges.into_iter().flat_map(by_segment).try_for_each(|part| message.add_part(part));
            if let Err(Some(error)) = sent.and_then(|()| message.flush()) {
                let _ = answers.blocking_send(Err(error));
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Nobody wants the rest, or why there is none.
type Ended = Option<Status>;

fn send<T>(answers: &Answers<T>, answer: T) -> Result<(), Ended> {
    answers.blocking_send(Ok(answer)).map_err(|_| None)
}

fn send_digests(
    disk: &Archived,
    ranges: &[Range<u64>],
    hash_bytes: usize,
    answers: &Answers<pb::ReadHashesResponse>,
) -> Result<(), Ended> {
    for range in ranges {
        let mut first = range.start;
        while first < range.end {
            let digests = disk.tables.digests_in(first..range.end.min(first + MAX_HASHES as u64));
            if digests.is_empty() {
                return Ok(());
            }
            send(answers, asked::hashes(first, &digests, hash_bytes))?;
            first += digests.len() as u64;
        }
    }
    Ok(())
}

fn send_hashes(
    disk: &Archived,
    ranges: &[Range<u64>],
    hash_bytes: usize,
    answers: &Answers<pb::ReadHashesResponse>,
) -> Result<(), Ended> {
    for part in ranges.iter().cloned().flat_map(by_segment) {
        let all = disk.segment(part.start / SEGMENT_BLOCKS).map_err(|error| Some(failed(error)))?;
        let start = (part.start % SEGMENT_BLOCKS) as usize;
        let wanted = all.get(start..start + (part.end - part.start) as usize).unwrap_or_default();
        send(answers, asked::hashes(part.start, wanted, hash_bytes))?;
    }
    Ok(())
}

/// A message of blocks in the making.
struct Message<'a> {
    disk: &'a Archived,
    answers: &'a Answers<pb::ReadBlocksResponse>,
    extents: Vec<Extent>,
    hashes: Vec<u8>,
    data: Vec<u8>,
    /// What was said last: one object has many blocks.
    said: String,
}

impl<'a> Message<'a> {
    fn new(disk: &'a Archived, answers: &'a Answers<pb::ReadBlocksResponse>) -> Self {
        let (extents, hashes, data) = (Vec::new(), Vec::new(), Vec::new());
        Self { disk, answers, extents, hashes, data, said: String::new() }
    }

    fn say(&mut self, what: &str) {
        if self.said != what {
            tracing::error!("{what}");
            what.clone_into(&mut self.said);
        }
    }

    /// Adds blocks of one segment.
    fn add_part(&mut self, part: Range<u64>) -> Result<(), Ended> {
        let (segment, size) = (part.start / SEGMENT_BLOCKS, self.disk.entry().size_bytes);
        if self.disk.tables.digest(segment) == zero_segment_of(size, segment) {
            self.push(part.start, part.end - part.start, true);
            return Ok(());
        }
        let hashes = match self.disk.segment(segment) {
            Ok(hashes) => hashes,
            Err(error) if error.is_damage() => {
                self.say(&format!("hashes of blocks can't be read: {error}"));
                return self.lose(part);
            }
            Err(error) => return Err(Some(failed(error))),
        };
        let hash_of = |block: u64| hashes.get((block % SEGMENT_BLOCKS) as usize).copied();
        let is_zero = |block: u64| hash_of(block) == Some(zero_hash(block_len(size, block)));
        let mut at = part.start;
        while at < part.end {
            let zero = is_zero(at);
            let most = if zero {
                part.end
            } else {
                part.end.min(at + (MAX_BATCH_BYTES as u64 / BLOCK_BYTES))
            };
            let end = (at..most).find(|block| is_zero(*block) != zero).unwrap_or(most);
            match zero {
                true => self.push(at, end - at, true),
                false => self.add_blocks(at..end, &hashes)?,
            }
            at = end;
        }
        Ok(())
    }

    /// Reads blocks that aren't zeros, and compares them.
    fn add_blocks(&mut self, run: Range<u64>, hashes: &[BlockHash]) -> Result<(), Ended> {
        let size = self.disk.entry().size_bytes;
        let start = run.start * BLOCK_BYTES;
        let mut data = vec![0; ((run.end * BLOCK_BYTES).min(size) - start) as usize];
        let mut found = Vec::new();
        match self.disk.read_at(start, &mut data) {
            Ok(()) => hash_blocks(&data, &mut found),
            Err(error) if error.is_damage() && run.end - run.start > 1 => {}
            Err(error) if error.is_damage() => {
                self.say(&format!("blocks are lost: {error}"));
                return self.lose(run);
            }
            Err(error) => return Err(Some(failed(error))),
        }
        let first = (run.start % SEGMENT_BLOCKS) as usize;
        let wanted = hashes.get(first..).unwrap_or_default();
        if !found.is_empty() && wanted.starts_with(&found) {
            return self.add(run, &found, &data);
        }
        if run.end - run.start == 1 {
            self.say("blocks are not what was archived");
            return self.lose(run);
        }
        // Which of them is it?
        run.into_iter().try_for_each(|block| self.add_blocks(block..block + 1, hashes))
    }

    fn add(&mut self, run: Range<u64>, hashes: &[BlockHash], data: &[u8]) -> Result<(), Ended> {
        if self.data.len() + data.len() > MAX_BATCH_BYTES || self.extents.len() >= ENOUGH_EXTENTS {
            self.flush()?;
        }
        self.push(run.start, run.end - run.start, false);
        self.hashes.extend(hashes.iter().flat_map(|hash| hash.0));
        self.data.extend_from_slice(data);
        Ok(())
    }

    fn push(&mut self, first: u64, count: u64, zero: bool) {
        match self.extents.last_mut() {
            Some(last) if last.zero == zero && last.end() == first => last.count += count,
            _ => self.extents.push(Extent { first, count, zero }),
        }
    }

    fn lose(&mut self, blocks: Range<u64>) -> Result<(), Ended> {
        self.flush()?;
        let damaged =
            pb::BlockRange { first_block: blocks.start, block_count: blocks.end - blocks.start };
        send(self.answers, pb::ReadBlocksResponse { batch: None, damaged: vec![damaged] })
    }

    fn flush(&mut self) -> Result<(), Ended> {
        let extents = std::mem::take(&mut self.extents);
        if extents.is_empty() {
            return Ok(());
        }
        let (hashes, data) = (std::mem::take(&mut self.hashes), std::mem::take(&mut self.data));
        let size = self.disk.entry().size_bytes;
        let batch = Batch::new(size, extents, Bytes::from(hashes), Bytes::from(data));
        let batch = batch.map_err(|error| Some(Status::from(error)))?;
        let batch = Some(batch.into_wire(pb::Encoding::None));
        send(self.answers, pb::ReadBlocksResponse { batch, damaged: Vec::new() })
    }
}
