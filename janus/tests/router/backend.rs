//! A small backup server: takes starts and blocks, remembers what it saw, misbehaves on demand.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt, future::BoxFuture, stream};
use http::{HeaderMap, Request, Response};
use hyper::body::Incoming;
use janus_proto::{
    error::{ErrorReason, status},
    listener::{self, Limits},
    metadata,
    pb::{
        self,
        backup_service_server::{BackupService, BackupServiceServer},
        catalog_service_server::{CatalogService, CatalogServiceServer},
        restore_service_server::{RestoreService, RestoreServiceServer},
    },
};
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Status, Streaming, body::Body};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::Service;

use crate::site::{Keys, Line};

/// What the next start meets, or the next list of snapshots, which is never stuck.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    Fine,
    Refuse(ErrorReason),
    /// Never answers, while health does.
    Stuck,
}

pub struct Seen {
    pub mood: Mutex<Mood>,
    pub starts: AtomicUsize,
    /// Highest use counter of a start.
    pub use_counter: AtomicU64,
    /// Headers and URI of the last call.
    pub headers: Mutex<HeaderMap>,
    pub uri: Mutex<http::Uri>,
    pub bytes: AtomicU64,
    pub sum: Mutex<blake3::Hasher>,
    /// Uploads that broke or were given up.
    pub broken: AtomicUsize,
    pub uploads: AtomicUsize,
    /// Session and bytes of the uploads that came whole.
    pub whole: Mutex<Vec<(String, u64)>>,
    pub snapshots: Mutex<Vec<pb::Snapshot>>,
}

/// A server named `name` behind a line.
pub struct Backend {
    pub line: Line,
    pub seen: Arc<Seen>,
    pub health: HealthReporter,
    /// Ends it in good order.
    pub stop: CancellationToken,
    _stop: DropGuard,
}

impl Backend {
    pub async fn new(keys: &Keys, name: &'static str) -> Self {
        Self::draining_for(keys, name, Duration::from_millis(100)).await
    }

    /// A server whose open calls may go on for `drain` after its end has begun.
    pub async fn draining_for(keys: &Keys, name: &'static str, drain: Duration) -> Self {
        let seen = Arc::new(Seen {
            mood: Mutex::new(Mood::Fine),
            starts: AtomicUsize::new(0),
            use_counter: AtomicU64::new(0),
            headers: Mutex::default(),
            uri: Mutex::default(),
            bytes: AtomicU64::new(0),
            sum: Mutex::default(),
            broken: AtomicUsize::new(0),
            uploads: AtomicUsize::new(0),
            whole: Mutex::default(),
            snapshots: Mutex::default(),
        });
        let (health, health_service) = tonic_health::server::health_reporter();
        for service in ["", "janus.v1.BackupService", "janus.v1.RestoreService"] {
            health.set_service_status(service, ServingStatus::Serving).await;
        }
        let routes = tonic::service::Routes::new(health_service)
            .add_service(
                BackupServiceServer::new(Fake(name, seen.clone()))
                    .max_decoding_message_size(8 << 20),
            )
            .add_service(RestoreServiceServer::new(Fake(name, seen.clone())))
            .add_service(CatalogServiceServer::new(Fake(name, seen.clone())));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (identity, stop) = (keys.identity(&format!("server/{name}")), CancellationToken::new());
        let limits = Limits { drain, ..Limits::default() };
        let named = Named { name, seen: seen.clone(), routes };
        tokio::spawn(listener::serve(listener, identity, named, limits, stop.clone()));
        let _stop = stop.clone().drop_guard();
        Self { line: Line::new(address).await, seen, health, stop, _stop }
    }

    pub fn address(&self) -> SocketAddr {
        self.line.address
    }

    pub fn starts(&self) -> usize {
        self.seen.starts.load(Ordering::SeqCst)
    }

    pub fn set_mood(&self, mood: Mood) {
        *self.seen.mood.lock().unwrap() = mood;
    }

    pub fn header(&self, name: &str) -> Vec<String> {
        let headers = self.seen.headers.lock().unwrap();
        headers.get_all(name).iter().map(|value| value.to_str().unwrap().to_string()).collect()
    }
}

/// Puts the server's name into each answer, as real servers do.
#[derive(Clone)]
struct Named {
    name: &'static str,
    seen: Arc<Seen>,
    routes: tonic::service::Routes,
}

impl Service<Request<Incoming>> for Named {
    type Response = Response<Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        if !request.uri().path().starts_with("/grpc.") {
            *self.seen.headers.lock().unwrap() = request.headers().clone();
            *self.seen.uri.lock().unwrap() = request.uri().clone();
        }
        let (mut routes, name) = (self.routes.clone(), self.name);
        Box::pin(async move {
            let mut response = routes.call(request.map(Body::new)).await?;
            response.headers_mut().insert(metadata::SERVER, http::HeaderValue::from_static(name));
            Ok(response)
        })
    }
}

struct Fake(&'static str, Arc<Seen>);

/// Counts an upload as broken unless it is told otherwise.
struct Upload(Arc<Seen>, bool);

impl Upload {
    fn done(mut self) {
        self.1 = true;
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if !self.1 {
            self.0.broken.fetch_add(1, Ordering::SeqCst);
        }
    }
}

type Acknowledgements = Pin<Box<dyn Stream<Item = Result<pb::WriteBlocksResponse, Status>> + Send>>;

#[tonic::async_trait]
impl BackupService for Fake {
    async fn start_backup(
        &self,
        request: tonic::Request<pb::StartBackupRequest>,
    ) -> Result<tonic::Response<pb::StartBackupResponse>, Status> {
        let mood = *self.1.mood.lock().unwrap();
        match mood {
            Mood::Fine => {}
            Mood::Refuse(reason) => return Err(status(reason, format!("{} refuses", self.0))),
            Mood::Stuck => std::future::pending().await,
        }
        let counter = request.metadata().get(metadata::USE).unwrap().clone();
        let given: u64 = counter.to_str().unwrap().parse().unwrap();
        let known = self.1.use_counter.fetch_max(given, Ordering::SeqCst);
        if given > known.saturating_add(metadata::MAX_USE_JUMP) {
            return Err(status(ErrorReason::InvalidField, "a use counter far above the known one"));
        }
        self.1.starts.fetch_add(1, Ordering::SeqCst);
        let mut response = tonic::Response::new(pb::StartBackupResponse {
            backup_id: request.into_inner().backup_id,
            server_id: self.0.into(),
            ..Default::default()
        });
        response.metadata_mut().insert(metadata::USE, counter);
        Ok(response)
    }

    type WriteBlocksStream = Acknowledgements;

    /// Session "early" is refused before its blocks are read, "hold" is never answered, "fail" ends with a status after
    /// its acknowledgement.
    async fn write_blocks(
        &self,
        request: tonic::Request<Streaming<pb::WriteBlocksRequest>>,
    ) -> Result<tonic::Response<Acknowledgements>, Status> {
        let (seen, mut blocks) = (self.1.clone(), request.into_inner());
        let first = blocks.message().await?.unwrap_or_default();
        if first.session_id == "early" {
            return Err(status(ErrorReason::SessionExpired, "no such session"));
        }
        seen.uploads.fetch_add(1, Ordering::SeqCst);
        let upload = Upload(seen.clone(), false);
        let end = (first.session_id == "fail")
            .then(|| Err(status(ErrorReason::StoreFull, "the disk is full")));
        let answers = stream::once(async move {
            let (mut count, mut bytes) = (1, 0);
            while let Some(message) = blocks.next().await {
                let data = message?.batch.unwrap_or_default().data;
                bytes += data.len() as u64;
                seen.bytes.fetch_add(data.len() as u64, Ordering::SeqCst);
                seen.sum.lock().unwrap().update(&data);
                count += 1;
            }
            if first.session_id == "hold" {
                std::future::pending::<()>().await;
            }
            upload.done();
            seen.whole.lock().unwrap().push((first.session_id, bytes));
            Ok(pb::WriteBlocksResponse { received_messages: count, ..Default::default() })
        });
        Ok(tonic::Response::new(Box::pin(answers.chain(stream::iter(end)))))
    }

    async fn commit_backup(
        &self,
        _: tonic::Request<pb::CommitBackupRequest>,
    ) -> Result<tonic::Response<pb::CommitBackupResponse>, Status> {
        Err(status(ErrorReason::HeadMoved, format!("the head on {} has moved", self.0)))
    }

    async fn abort_backup(
        &self,
        _: tonic::Request<pb::AbortBackupRequest>,
    ) -> Result<tonic::Response<pb::AbortBackupResponse>, Status> {
        Ok(tonic::Response::new(pb::AbortBackupResponse {}))
    }

    async fn get_backup(
        &self,
        _: tonic::Request<pb::GetBackupRequest>,
    ) -> Result<tonic::Response<pb::GetBackupResponse>, Status> {
        Ok(tonic::Response::new(pb::GetBackupResponse::default()))
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl RestoreService for Fake {
    async fn open_snapshot(
        &self,
        _: tonic::Request<pb::OpenSnapshotRequest>,
    ) -> Result<tonic::Response<pb::OpenSnapshotResponse>, Status> {
        Ok(tonic::Response::new(pb::OpenSnapshotResponse::default()))
    }

    async fn close_snapshot(
        &self,
        _: tonic::Request<pb::CloseSnapshotRequest>,
    ) -> Result<tonic::Response<pb::CloseSnapshotResponse>, Status> {
        Ok(tonic::Response::new(pb::CloseSnapshotResponse {}))
    }

    type ReadHashesStream = Answers<pb::ReadHashesResponse>;

    async fn read_hashes(
        &self,
        _: tonic::Request<pb::ReadHashesRequest>,
    ) -> Result<tonic::Response<Self::ReadHashesStream>, Status> {
        Ok(tonic::Response::new(Box::pin(stream::empty())))
    }

    type ReadBlocksStream = Answers<pb::ReadBlocksResponse>;

    /// 1 GiB in messages of 1 MiB; `bytes` counts what was taken from here.
    async fn read_blocks(
        &self,
        _: tonic::Request<pb::ReadBlocksRequest>,
    ) -> Result<tonic::Response<Self::ReadBlocksStream>, Status> {
        let (seen, data) = (self.1.clone(), bytes::Bytes::from(vec![7; 1 << 20]));
        let answers = stream::repeat(data).take(1024).map(move |data| {
            seen.bytes.fetch_add(data.len() as u64, Ordering::SeqCst);
            let batch = Some(pb::BlockBatch { data, ..Default::default() });
            Ok(pb::ReadBlocksResponse { batch, ..Default::default() })
        });
        Ok(tonic::Response::new(Box::pin(answers)))
    }
}

#[tonic::async_trait]
impl CatalogService for Fake {
    async fn list_machines(
        &self,
        _: tonic::Request<pb::ListMachinesRequest>,
    ) -> Result<tonic::Response<pb::ListMachinesResponse>, Status> {
        Ok(tonic::Response::new(pb::ListMachinesResponse::default()))
    }

    async fn list_disks(
        &self,
        _: tonic::Request<pb::ListDisksRequest>,
    ) -> Result<tonic::Response<pb::ListDisksResponse>, Status> {
        Ok(tonic::Response::new(pb::ListDisksResponse::default()))
    }

    /// Pages of two.
    async fn list_snapshots(
        &self,
        request: tonic::Request<pb::ListSnapshotsRequest>,
    ) -> Result<tonic::Response<pb::ListSnapshotsResponse>, Status> {
        if let Mood::Refuse(reason) = *self.1.mood.lock().unwrap() {
            return Err(status(reason, format!("{} refuses", self.0)));
        }
        let all = self.1.snapshots.lock().unwrap().clone();
        let begin: usize = request.into_inner().page_token.parse().unwrap_or(0);
        let snapshots: Vec<_> = all.iter().skip(begin).take(2).cloned().collect();
        let next_page_token =
            if begin + 2 < all.len() { (begin + 2).to_string() } else { String::new() };
        Ok(tonic::Response::new(pb::ListSnapshotsResponse {
            snapshots,
            next_page_token,
            unreachable: vec![],
            ..Default::default()
        }))
    }

    async fn get_snapshot(
        &self,
        request: tonic::Request<pb::GetSnapshotRequest>,
    ) -> Result<tonic::Response<pb::GetSnapshotResponse>, Status> {
        let id = request.into_inner().snapshot_id;
        let all = self.1.snapshots.lock().unwrap();
        let found = all.iter().find(|snapshot| snapshot.snapshot_id == id).cloned();
        let found = found.ok_or_else(|| status(ErrorReason::SnapshotUnknown, "not here"))?;
        Ok(tonic::Response::new(pb::GetSnapshotResponse {
            snapshot: Some(found),
            ..Default::default()
        }))
    }
}
