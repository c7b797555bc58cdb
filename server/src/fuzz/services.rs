//! The services themselves, with a store on the disk: sequences of calls that are well-formed, and of others, as a machine with a
//! valid certificate may send them. Each byte of the input is a choice: which call, of which run, with which numbers.
//!
//! Whatever is sent: no panic, no failure of the store, and the snapshot of the other machine is as it was, and told to nobody.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::Request;
use hyper::body::Body as _;
use janus_proto::{
    error::{ErrorReason, reason},
    hash::{hash_block, segment_digest, table_digest, zero_hash},
    ids::{BackupId, BlockHash, MachineKey, SessionId},
    pb::{
        self, backup_service_server::BackupServiceServer,
        catalog_service_server::CatalogServiceServer, read_hashes_request::Of,
        restore_service_server::RestoreServiceServer,
        server_info_service_server::ServerInfoServiceServer,
        table_service_server::TableServiceServer,
    },
    tls::{Principal, Role},
};
use prost::Message;
use tokio::runtime::Runtime;
use tonic::{Status, body::Body, service::Routes};
use tower::Service;

use crate::{
    backup::Backup,
    bounds::{Bounds, Plan},
    caller::Caller,
    catalog::Catalog,
    chain::store::Store,
    config::{Settings, Size},
    info::Info,
    mirror::Mirror,
    restore::Restore,
    runs::{Limits, Runs},
    tables::Tables,
};

/// Calls of one input.
const MOST_CALLS: usize = 24;
/// Sizes of disks, allowed and not.
const SIZES: [u64; 12] = [
    0,
    512,
    4096,
    8192,
    (1 << 20) + 512,
    4 << 20,
    (4 << 20) + 4096,
    64 << 20,
    8 << 30,
    65 << 40,
    1 << 63,
    u64::MAX - 511,
];
const NUMBERS: [u64; 10] = [0, 1, 2, 255, 256, 1023, 1024, 1 << 32, 1 << 63, u64::MAX];
const BLOCK: usize = 4096;

/// Sequences of calls.
pub fn fuzz_services(bytes: &[u8]) {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    // Each thread more has an arena of its own in the address space, which is measured.
    let Ok(runtime) = builder.enable_all().max_blocking_threads(2).build() else {
        return;
    };
    let Some(mut scene) = Scene::new(&runtime) else { return };
    let mut input = Input(bytes);
    for _ in 0..MOST_CALLS {
        let Some(choice) = input.next() else { break };
        scene.call(choice, &mut input);
    }
    scene.close();
}

/// A start of one disk of 4 MiB, a block of data, a commit.
const BACKUP: [u8; 23] = [0, 1, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 1, 9, 0, 0, 2, 3, 0, 0, 0, 0];

/// Some that reach far.
pub(super) fn service_seeds() -> Vec<Vec<u8>> {
    // The snapshot is opened, its blocks, hashes and table are read, it is listed and closed.
    let reads = [6, 0, 0, 7, 1, 0, 8, 0, 1, 2, 0, 0, 10, 0, 1, 0, 11, 1, 0, 0, 0, 12, 0, 9, 1];
    // A second one over it: zeros in the middle, packed; then the same start again, hashes of the session, an abort.
    let delta = [0, 1, 5, 0, 0, 2, 0, 0, 1, 0, 1, 1, 1, 0, 3, 2, 1, 7, 0, 1, 4, 7, 2];
    let again = [0, 1, 5, 0, 1, 0, 8, 1, 0, 1, 0, 0, 5, 0, 4, 0];
    // Another's, and what never was.
    let others = [6, 3, 0, 10, 3, 0, 0, 12, 3, 11, 2, 0, 0, 0, 6, 1, 1, 7, 0, 0, 4, 1, 1, 9, 0, 0];
    // Raw bytes.
    let raw = [13, 0, 3, 8, 1, 1, 13, 1, 2, 255, 255, 13, 2, 5, 0, 0, 0, 0, 9];
    vec![
        [&BACKUP[..], &reads].concat(),
        [&BACKUP[..], &delta, &again].concat(),
        [&others[..], &raw].concat(),
    ]
}

/// Bytes as choices.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn next(&mut self) -> Option<usize> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(usize::from(*first))
    }

    /// Where the input is over: the first choice.
    fn choice(&mut self) -> usize {
        self.next().unwrap_or(0)
    }

    fn number(&mut self) -> u64 {
        let choice = self.choice();
        NUMBERS.get(choice).copied().unwrap_or(choice as u64)
    }

    fn of<'b, T: ?Sized>(&mut self, all: &'b [Box<T>]) -> Option<&'b T> {
        let choice = self.choice();
        all.get(choice % all.len().max(1)).map(|one| &**one)
    }

    fn bytes(&mut self) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(self.choice().min(self.0.len()));
        self.0 = rest;
        taken
    }
}

struct Scene<'a> {
    runtime: &'a Runtime,
    folder: Folder,
    runs: Arc<Runs>,
    services: Bounds<Routes>,
    bad: Caller,
    good: Caller,
    good_snapshot: String,
    /// Names that were told, and some that never were.
    backups: Vec<Box<str>>,
    sessions: Vec<Box<str>>,
    snapshots: Vec<Box<str>>,
    handles: Vec<Box<str>>,
    epoch: u64,
}

/// Removed at the end.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Folder {
    fn new() -> Option<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let memory = PathBuf::from("/dev/shm");
        let parent = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = Self(parent.join(format!("janus-fuzz-{}-{count}", std::process::id())));
        fs::create_dir_all(&folder.0).ok()?;
        Some(folder)
    }
}

fn caller(machine: &str) -> Option<Caller> {
    let role = Role::Client(machine.parse::<MachineKey>().ok()?);
    let limits = Default::default();
    Some(Caller::at_peer(Principal::new("fuzz", role, limits, Bytes::new())))
}

impl<'a> Scene<'a> {
    fn new(runtime: &'a Runtime) -> Option<Self> {
        let folder = Folder::new()?;
        let (store, machines) = Store::open(&folder.0, true).ok()?;
        let settings = Settings {
            max_machine_size: "16 GiB".into(),
            reserve: "0%".into(),
            ..Settings::default()
        };
        let runs = Runs::new(store, machines, Duration::from_secs(60));
        let runs = Arc::new(runs.with_limits(Limits::of(&settings)));
        let mirror = Arc::new(Mirror::new(runs.clone(), Size::Bytes(0)));
        let name = "server".to_owned();
        let here = pb::ServerAddresses { server_id: name.clone(), urls: Vec::new() };
        let restore = Restore::new(runs.clone(), mirror.clone(), name.clone());
        let routes = Routes::new(BackupServiceServer::new(Backup::new(runs.clone(), here.clone())))
            .add_service(RestoreServiceServer::new(restore))
            .add_service(TableServiceServer::new(Tables::new(runs.clone(), mirror, name.clone())))
            .add_service(CatalogServiceServer::new(Catalog::new(runs.clone(), here)))
            .add_service(ServerInfoServiceServer::new(Info::new(
                runs.clone(),
                name,
                Default::default(),
            )))
            .prepare();
        let plan = Plan { streams: 8, streams_of_one_caller: 4, stall: Duration::from_secs(60) };
        let never = || BackupId::new().to_string().into_boxed_str();
        let mut scene = Self {
            runtime,
            folder,
            runs,
            services: Bounds::new(routes, plan),
            bad: caller("eve/bad")?,
            good: caller("alice/good")?,
            good_snapshot: String::new(),
            backups: vec![never(), never()],
            sessions: vec![never()],
            snapshots: vec![never(), "../x".into(), "".into()],
            handles: vec![never()],
            epoch: 0,
        };
        scene.good_snapshot = scene.good_backup()?;
        scene.snapshots.push(scene.good_snapshot.clone().into());
        Some(scene)
    }

    /// A snapshot of the good machine: one block of sevens and one of zeros.
    fn good_backup(&mut self) -> Option<String> {
        let backup_id = BackupId::new().to_string();
        let disks = vec![pb::DiskStart {
            disk_id: "disk".into(),
            size_bytes: 2 * BLOCK as u64,
            logical_sector_bytes: 512,
        }];
        let start =
            pb::StartBackupRequest { backup_id: backup_id.clone(), disks, ..Default::default() };
        let good = self.good.clone();
        let started: pb::StartBackupResponse =
            self.ask(&good, "BackupService/StartBackup", &[start]).ok()?.pop()?;
        let session_id = started.sessions.first()?.session_id.clone();
        let hash = hash_block(&[7; BLOCK]);
        let batch = pb::BlockBatch {
            extents: vec![pb::BlockExtent { first_block: 0, block_count: 1, zero: false }],
            hashes: Bytes::copy_from_slice(&hash.0),
            data: Bytes::from_static(&[7; BLOCK]),
            encoding: pb::Encoding::None.into(),
        };
        let write = pb::WriteBlocksRequest {
            session_id,
            epoch: started.epoch,
            batch: Some(batch),
            settled_block: 2,
        };
        self.ask::<_, pb::WriteBlocksResponse>(&good, "BackupService/WriteBlocks", &[write])
            .ok()?;
        let content = segment_digest(&[hash, zero_hash(BLOCK)]);
        let digest = table_digest(2 * BLOCK as u64, &[content]);
        let commit = pb::CommitBackupRequest {
            backup_id,
            epoch: started.epoch,
            disks: vec![pb::DiskCommit {
                disk_id: "disk".into(),
                table_digest: Bytes::copy_from_slice(&digest.0),
                consistency: pb::Consistency::Frozen.into(),
                ..Default::default()
            }],
            client_seal: Bytes::new(),
        };
        let committed: pb::CommitBackupResponse =
            self.ask(&good, "BackupService/CommitBackup", &[commit]).ok()?.pop()?;
        Some(committed.snapshots.first()?.snapshot_id.clone())
    }

    /// Calls a method; its answers.
    fn ask<Q: Message, A: Message + Default>(
        &mut self,
        caller: &Caller,
        method: &str,
        requests: &[Q],
    ) -> Result<Vec<A>, Status> {
        let mut body = BytesMut::new();
        for request in requests {
            body.put_u8(0);
            body.put_u32(request.encoded_len() as u32);
            body.extend_from_slice(&request.encode_to_vec());
        }
        let mut answer = self.send(caller, method, body.freeze())?;
        let mut answers = Vec::new();
        while answer.len() >= 5 {
            answer.advance(1);
            let len = answer.get_u32() as usize;
            assert!(len <= answer.len(), "an answer that is cut");
            let message = A::decode(answer.split_to(len));
            answers.extend(message.map_err(|error| Status::internal(error.to_string())));
        }
        Ok(answers)
    }

    /// Sends bytes to a method; what comes back, unless that is an error.
    fn send(&mut self, caller: &Caller, method: &str, body: Bytes) -> Result<Bytes, Status> {
        let mut request = Request::post(format!("http://server/janus.v1.{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Body::new(http_body_of(body)))
            .map_err(|error| Status::internal(error.to_string()))?;
        request.extensions_mut().insert(caller.clone());
        let services = &mut self.services;
        let (status, data) = self.runtime.block_on(async {
            std::future::poll_fn(|context| services.poll_ready(context)).await.ok();
            let Ok(response) = services.call(request).await;
            let status = Status::from_header_map(response.headers());
            let mut body = std::pin::pin!(response.into_body());
            let (mut data, mut status) = (BytesMut::new(), status);
            while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
                let Ok(frame) = frame else { break };
                match frame.into_data() {
                    Ok(piece) => data.extend_from_slice(&piece),
                    Err(frame) => {
                        let trailers = frame.trailers_ref();
                        status = status.or(trailers.and_then(Status::from_header_map));
                    }
                }
            }
            (status, data.freeze())
        });
        match status.filter(|status| status.code() != tonic::Code::Ok) {
            None => Ok(data),
            Some(status) => {
                let ours = [ErrorReason::StoreFailed, ErrorReason::StoreDamaged];
                assert!(
                    !reason(&status).is_some_and(|reason| ours.contains(&reason)),
                    "{method}: {status:?}"
                );
                Err(status)
            }
        }
    }

    /// One call of the bad machine.
    fn call(&mut self, choice: usize, input: &mut Input) {
        match choice % 14 {
            0 => self.start(input),
            1 | 2 => self.write(input),
            3 => self.commit(input),
            4 => {
                let backup_id = name(input.of(&self.backups));
                self.told::<_, pb::AbortBackupResponse>(
                    "BackupService/AbortBackup",
                    &[pb::AbortBackupRequest { backup_id }],
                );
            }
            5 => {
                let backup_id = name(input.of(&self.backups));
                self.told::<_, pb::GetBackupResponse>(
                    "BackupService/GetBackup",
                    &[pb::GetBackupRequest { backup_id }],
                );
            }
            6 => {
                let snapshot_id = name(input.of(&self.snapshots));
                let is_anothers = snapshot_id == self.good_snapshot;
                let table = input.choice() % 2 == 1;
                let opened: Vec<pb::OpenSnapshotResponse> = self.told(
                    "RestoreService/OpenSnapshot",
                    &[pb::OpenSnapshotRequest { snapshot_id, table, ..Default::default() }],
                );
                assert!(opened.is_empty() || !is_anothers, "another's snapshot was opened");
                self.handles.extend(opened.into_iter().map(|one| one.handle.into_boxed_str()));
            }
            7 => {
                let handle = name(input.of(&self.handles));
                let ranges = ranges(input);
                let read = pb::ReadBlocksRequest { handle, ranges, ..Default::default() };
                self.told::<_, pb::ReadBlocksResponse>("RestoreService/ReadBlocks", &[read]);
            }
            8 => {
                let of = match input.choice() % 3 {
                    0 => Some(Of::Handle(name(input.of(&self.handles)))),
                    1 => Some(Of::SessionId(name(input.of(&self.sessions)))),
                    _ => None,
                };
                let read = pb::ReadHashesRequest {
                    level: (input.choice() % 4) as i32,
                    hash_bytes: input.choice() as u32,
                    ranges: ranges(input),
                    of,
                };
                self.told::<_, pb::ReadHashesResponse>("RestoreService/ReadHashes", &[read]);
            }
            9 => {
                let handle = name(input.of(&self.handles));
                self.told::<_, pb::CloseSnapshotResponse>(
                    "RestoreService/CloseSnapshot",
                    &[pb::CloseSnapshotRequest { handle, ..Default::default() }],
                );
            }
            10 => {
                let snapshot_id = name(input.of(&self.snapshots));
                let is_anothers = snapshot_id == self.good_snapshot;
                let since_snapshot_id = name(input.of(&self.snapshots));
                let first_segment = input.number();
                let read = pb::ReadTableRequest { snapshot_id, since_snapshot_id, first_segment };
                let told: Vec<pb::ReadTableResponse> = self.told("TableService/ReadTable", &[read]);
                assert!(told.is_empty() || !is_anothers, "another's table was read");
            }
            11 => self.list(input),
            12 => {
                let snapshot_id = name(input.of(&self.snapshots));
                self.told::<_, pb::GetSnapshotResponse>(
                    "CatalogService/GetSnapshot",
                    &[pb::GetSnapshotRequest { snapshot_id }],
                );
            }
            _ => {
                const METHODS: [&str; 6] = [
                    "BackupService/StartBackup",
                    "BackupService/WriteBlocks",
                    "BackupService/CommitBackup",
                    "RestoreService/ReadBlocks",
                    "TableService/ListTables",
                    "ServerInfoService/GetServerInfo",
                ];
                let method = METHODS[input.choice() % METHODS.len()];
                let bytes = Bytes::copy_from_slice(input.bytes());
                let bad = self.bad.clone();
                let _ = self.send(&bad, method, bytes);
            }
        }
    }

    /// A call of the bad machine; nothing that it is told names the other one's snapshot.
    fn told<Q: Message, A: Message + Default + std::fmt::Debug>(
        &mut self,
        method: &str,
        requests: &[Q],
    ) -> Vec<A> {
        let bad = self.bad.clone();
        let answers: Vec<A> = self.ask(&bad, method, requests).unwrap_or_default();
        for answer in &answers {
            let text = format!("{answer:?}");
            assert!(!text.contains(&self.good_snapshot), "{method} tells of another's snapshot");
        }
        answers
    }

    fn start(&mut self, input: &mut Input) {
        let disks = (0..input.choice() % 4).map(|number| pb::DiskStart {
            disk_id: ["disk", "b", "../x", "disk"][number % 4].into(),
            size_bytes: SIZES[input.choice() % SIZES.len()],
            logical_sector_bytes: [512, 4096, 0, 7][input.choice() % 4],
        });
        let disks: Vec<_> = disks.collect();
        let backup_id = match input.choice() % 2 {
            0 => BackupId::new().to_string(),
            _ => name(input.of(&self.backups)),
        };
        let start =
            pb::StartBackupRequest { backup_id: backup_id.clone(), disks, ..Default::default() };
        let started: Vec<pb::StartBackupResponse> =
            self.told("BackupService/StartBackup", &[start]);
        for started in started {
            self.epoch = started.epoch;
            self.backups.insert(0, backup_id.clone().into());
            let sessions = started.sessions.into_iter();
            let sessions = sessions.map(|session| session.session_id.into_boxed_str());
            self.sessions.splice(0..0, sessions);
        }
    }

    fn write(&mut self, input: &mut Input) {
        let session_id = name(input.of(&self.sessions));
        let epoch = if input.choice() == 1 { input.number() } else { self.epoch };
        let count = 1 + input.choice() % 3;
        let messages = (0..count).map(|_| {
            let batch = (input.choice() % 8 != 7).then(|| batch(input));
            let settled_block = input.number();
            pb::WriteBlocksRequest { session_id: session_id.clone(), epoch, batch, settled_block }
        });
        let messages: Vec<_> = messages.collect();
        self.told::<_, pb::WriteBlocksResponse>("BackupService/WriteBlocks", &messages);
    }

    fn commit(&mut self, input: &mut Input) {
        let backup_id = name(input.of(&self.backups));
        let epoch = if input.choice() == 1 { input.number() } else { self.epoch };
        let is_true = input.choice() % 4 != 3;
        let disks = self.sessions.iter().filter_map(|id| {
            let id: SessionId = id.parse().ok()?;
            let machine = self.bad.principal.machine()?;
            let session = self.runs.run_of(id, machine).ok()?.session(id).ok()?;
            let digest = match is_true {
                true => table_digest(session.disk.size_bytes, &session.segment_digests().ok()?),
                false => BlockHash([9; 32]),
            };
            Some(pb::DiskCommit {
                disk_id: session.disk.disk.to_string(),
                expected_head_id: session.disk.head.map(|id| id.to_string()).unwrap_or_default(),
                table_digest: Bytes::copy_from_slice(&digest.0),
                consistency: pb::Consistency::Crash.into(),
                skipped_bytes: 0,
            })
        });
        let client_seal = Bytes::from(vec![1; input.choice() * 20]);
        let disks = disks.collect();
        let commit = pb::CommitBackupRequest { backup_id, epoch, disks, client_seal };
        let committed: Vec<pb::CommitBackupResponse> =
            self.told("BackupService/CommitBackup", &[commit]);
        let snapshots = committed.into_iter().flat_map(|one| one.snapshots);
        let snapshots = snapshots.map(|one| one.snapshot_id.into_boxed_str());
        self.snapshots.splice(0..0, snapshots);
    }

    fn list(&mut self, input: &mut Input) {
        let machine = ["", "eve/bad", "alice/good", "../x", "/"][input.choice() % 5].to_owned();
        let page_size = input.number() as u32;
        let page_token = match input.choice() % 3 {
            0 => String::new(),
            1 => name(input.of(&self.snapshots)),
            _ => String::from_utf8_lossy(input.bytes()).into_owned(),
        };
        match input.choice() % 4 {
            0 => drop(self.told::<_, pb::ListSnapshotsResponse>(
                "CatalogService/ListSnapshots",
                &[pb::ListSnapshotsRequest {
                    machine,
                    page_size,
                    page_token,
                    ..Default::default()
                }],
            )),
            1 => drop(self.told::<_, pb::ListDisksResponse>(
                "CatalogService/ListDisks",
                &[pb::ListDisksRequest { machine, page_size, page_token }],
            )),
            2 => drop(self.told::<_, pb::ListMachinesResponse>(
                "CatalogService/ListMachines",
                &[pb::ListMachinesRequest { page_size, page_token }],
            )),
            _ => drop(self.told::<_, pb::ListTablesResponse>(
                "TableService/ListTables",
                &[pb::ListTablesRequest { machine, page_size, page_token }],
            )),
        }
    }

    /// The good machine's snapshot is as it was.
    fn close(mut self) {
        let good = self.good.clone();
        let open = pb::OpenSnapshotRequest {
            snapshot_id: self.good_snapshot.clone(),
            ..Default::default()
        };
        let opened: Result<Vec<pb::OpenSnapshotResponse>, _> =
            self.ask(&good, "RestoreService/OpenSnapshot", &[open]);
        let handle = opened.ok().and_then(|mut opened| Some(opened.pop()?.handle));
        let read =
            pb::ReadBlocksRequest { handle: handle.unwrap_or_default(), ..Default::default() };
        let read: Result<Vec<pb::ReadBlocksResponse>, _> =
            self.ask(&good, "RestoreService/ReadBlocks", &[read]);
        let data = read.unwrap_or_default().into_iter().filter_map(|answer| answer.batch);
        let data: Vec<u8> = data.flat_map(|batch| batch.data).collect();
        assert!(data == [7; BLOCK], "the other machine's snapshot is lost");
        drop(self.services);
        drop(self.folder);
    }
}

fn name(of: Option<&str>) -> String {
    of.unwrap_or_default().to_owned()
}

fn ranges(input: &mut Input) -> Vec<pb::BlockRange> {
    let range = |input: &mut Input| pb::BlockRange {
        first_block: input.number(),
        block_count: input.number(),
    };
    (0..input.choice() % 4).map(|_| range(input)).collect()
}

/// Blocks whose hashes mostly are right.
fn batch(input: &mut Input) -> pb::BlockBatch {
    let (mut extents, mut hashes, mut data) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..1 + input.choice() % 3 {
        let (first_block, block_count) = (input.number(), input.number());
        let zero = input.choice().is_multiple_of(2);
        extents.push(pb::BlockExtent { first_block, block_count, zero });
        if !zero {
            let block = [input.choice() as u8; BLOCK];
            for _ in 0..block_count.min(64) {
                hashes.extend(hash_block(&block).0);
                data.extend(block);
            }
        }
    }
    if input.choice() % 16 == 15 {
        data.extend(input.bytes());
    }
    let batch = pb::BlockBatch {
        extents,
        hashes: hashes.into(),
        data: data.into(),
        encoding: pb::Encoding::None.into(),
    };
    match input.choice() % 6 {
        1 => janus_proto::model::pack(batch, pb::Encoding::Lz4),
        2 => janus_proto::model::pack(batch, pb::Encoding::Zstd),
        3 => pb::BlockBatch { encoding: pb::Encoding::Zstd.into(), ..batch },
        4 => pb::BlockBatch { encoding: input.choice() as i32, ..batch },
        _ => batch,
    }
}

/// A body of one piece.
fn http_body_of(bytes: Bytes) -> impl hyper::body::Body<Data = Bytes, Error = Status> + Send {
    struct Whole(Option<Bytes>);
    impl hyper::body::Body for Whole {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, Status>>> {
            std::task::Poll::Ready(self.0.take().map(|bytes| Ok(hyper::body::Frame::data(bytes))))
        }
    }
    Whole(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_reach_commits_and_restores() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut scene = Scene::new(&runtime).unwrap();
        let (snapshots, handles) = (scene.snapshots.len(), scene.handles.len());
        let seed = service_seeds().swap_remove(0);
        let mut input = Input(&seed);
        while let Some(choice) = input.next() {
            scene.call(choice, &mut input);
        }
        assert_eq!((scene.snapshots.len(), scene.handles.len()), (snapshots + 1, handles + 1));
        let own = scene.snapshots[0].to_string();
        let good = scene.good.clone();
        let open = pb::OpenSnapshotRequest { snapshot_id: own, ..Default::default() };
        let opened: Result<Vec<pb::OpenSnapshotResponse>, _> =
            scene.ask(&good, "RestoreService/OpenSnapshot", &[open]);
        assert_eq!(opened.unwrap_err().code(), tonic::Code::NotFound, "nor the other way round");
        scene.close();
    }
}
