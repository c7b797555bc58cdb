//! Calls to other servers: through janus, or straight to one of them.

use std::time::Duration;

use janus_proto::{
    channel::{self, ConnectOptions, Dialer, Expect, add_proof, explain},
    error,
    ids::{MachineKey, ServerId},
    metadata,
    model::MAX_MESSAGE_BYTES,
    pb::{
        self, ErrorReason, catalog_service_client::CatalogServiceClient,
        restore_service_client::RestoreServiceClient,
        server_info_service_client::ServerInfoServiceClient,
        table_service_client::TableServiceClient,
    },
    proof::Statement,
    tls::Role,
};
use tokio::time::timeout;
use tonic::{Code, Request, Status, Streaming, metadata::MetadataValue, transport::Channel};

/// Deadline of calls that are answered from memory.
pub(crate) const QUICK: Duration = Duration::from_secs(20);
/// Longest silence of a server that should be sending.
const SILENCE: Duration = Duration::from_secs(60);
/// Pages read before an endless list is no longer believed.
const MAX_PAGES: usize = 10_000;
const PAGE: u32 = 250;

/// A janus that leads to the other servers, or one of them.
#[derive(Clone)]
pub(crate) struct Peers {
    dialer: Dialer,
    pub(crate) url: String,
    pub(crate) role: Role,
    channel: Channel,
}

/// The first of some URLs at which somebody of the right role answers; else why the last doesn't.
pub(crate) async fn connect(
    urls: &[String],
    expect: Expect,
    dialer: &Dialer,
) -> Result<Peers, String> {
    let mut reason = "no janus_urls".to_owned();
    for url in urls {
        let options = ConnectOptions::expecting(expect);
        match channel::connect_through(url, dialer.clone(), options).await {
            Ok(connection) => {
                let (channel, role) = (connection.channel, connection.peer.role);
                return Ok(Peers { dialer: dialer.clone(), url: url.clone(), role, channel });
            }
            Err(error) => reason = error.to_string(),
        }
    }
    Err(reason)
}

/// True when whoever was called can't be reached now.
pub(crate) fn is_away(status: &Status) -> bool {
    use ErrorReason as R;
    match error::reason(status) {
        Some(reason) => matches!(
            reason,
            R::NoServerReady | R::ServerUnreachable | R::WrongServer | R::Draining | R::TooMany
        ),
        None => matches!(
            status.code(),
            Code::Unavailable
                | Code::Unknown
                | Code::Internal
                | Code::Cancelled
                | Code::DeadlineExceeded
        ),
    }
}

/// What to tell people of a failed call.
pub(crate) fn told(status: &Status) -> String {
    match error::reason(status) {
        Some(_) => status.message().to_owned(),
        None => explain(status),
    }
}

pub(crate) fn request<T>(message: T, server: Option<&ServerId>) -> Request<T> {
    let mut request = Request::new(message);
    // Names are ASCII by their type.
    if let Some(value) = server.and_then(|server| MetadataValue::try_from(server.as_str()).ok()) {
        request.metadata_mut().insert(metadata::SERVER, value);
    }
    request
}

/// All pages of a list: `page` reads the one of a token, and says the next one's.
async fn pages<T, F: Future<Output = Result<(Vec<T>, String), Status>>>(
    page: impl Fn(String) -> F,
) -> Result<Vec<T>, Status> {
    let (mut all, mut token) = (Vec::new(), String::new());
    for _ in 0..MAX_PAGES {
        let (items, next) = page(token).await?;
        all.extend(items);
        token = next;
        if token.is_empty() {
            break;
        }
    }
    Ok(all)
}

/// The answer of a server that should be answering, or the next message of a stream that should be flowing.
///
/// # Errors
/// Its own, or that nothing came for too long.
pub(crate) async fn unless_silent<T>(
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let silent = |_| Status::deadline_exceeded("the server went silent");
    timeout(SILENCE, answer).await.map_err(silent)?
}

impl Peers {
    /// What a janus knows of its servers.
    pub(crate) async fn router_status(&self) -> Result<pb::GetRouterStatusResponse, Status> {
        let mut request = request(pb::GetRouterStatusRequest {}, None);
        request.set_timeout(QUICK);
        let mut client = ServerInfoServiceClient::new(self.channel.clone());
        Ok(client.get_router_status(request).await?.into_inner())
    }

    /// Opens a snapshot of `server`, in this server's own name.
    pub(crate) async fn open_snapshot(
        &self,
        message: pb::OpenSnapshotRequest,
        server: &ServerId,
    ) -> Result<pb::OpenSnapshotResponse, Status> {
        let statement = Statement::open(&message);
        let mut request = request(message, Some(server));
        request.set_timeout(QUICK);
        add_proof(&mut request, &*self.dialer, &statement, Some(server));
        Ok(self.restore().open_snapshot(request).await?.into_inner())
    }

    fn catalog(&self) -> CatalogServiceClient<Channel> {
        CatalogServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// All machines, with how they stand on each server, as far as janus knows.
    pub(crate) async fn machines(&self) -> Result<Vec<pb::MachineInfo>, Status> {
        pages(|page_token| async move {
            let mut request =
                request(pb::ListMachinesRequest { page_size: PAGE, page_token }, None);
            request.set_timeout(QUICK);
            let page = self.catalog().list_machines(request).await?.into_inner();
            Ok((page.machines, page.next_page_token))
        })
        .await
    }

    /// All snapshots of a machine on one server, which answers itself, newest first.
    pub(crate) async fn snapshots(
        &self,
        server: &ServerId,
        machine: &MachineKey,
    ) -> Result<Vec<pb::Snapshot>, Status> {
        let mut snapshots = pages(|page_token| async move {
            let message = pb::ListSnapshotsRequest {
                machine: machine.to_string(),
                disk_id: String::new(),
                page_size: PAGE,
                page_token,
            };
            let mut request = request(message, Some(server));
            request.set_timeout(QUICK);
            let page = self.catalog().list_snapshots(request).await?.into_inner();
            Ok((page.snapshots, page.next_page_token))
        })
        .await?;
        snapshots.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.committed_ms));
        Ok(snapshots)
    }

    /// RestoreService of whoever the calls go to.
    pub(crate) fn restore(&self) -> RestoreServiceClient<Channel> {
        RestoreServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// The table of a snapshot on a server, in this server's own name. Its stream may take as long as it takes; each message has a deadline of its own.
    pub(crate) async fn table(
        &self,
        server: &ServerId,
        message: pb::ReadTableRequest,
    ) -> Result<Streaming<pb::ReadTableResponse>, Status> {
        let tables = TableServiceClient::new(self.channel.clone());
        let mut tables = tables.max_decoding_message_size(MAX_MESSAGE_BYTES);
        let statement = Statement::table(&message);
        let mut request = request(message, Some(server));
        add_proof(&mut request, &*self.dialer, &statement, Some(server));
        Ok(tables.read_table(request).await?.into_inner())
    }
}
