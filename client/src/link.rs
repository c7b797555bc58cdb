//! Calls: which URL, which server, which deadline, and what a failure means.

use std::{
    fmt,
    sync::OnceLock,
    time::{Duration, Instant},
};

use janus_proto::{
    channel::{self, ConnectError, ConnectOptions, Dialer, Expect, add_proof, race},
    error,
    ids::{BackupId, MachineKey, ServerId},
    metadata,
    pb::{
        self, ErrorReason, backup_service_client::BackupServiceClient,
        catalog_service_client::CatalogServiceClient, restore_service_client::RestoreServiceClient,
        server_info_service_client::ServerInfoServiceClient,
        table_service_client::TableServiceClient,
    },
    proof::Statement,
    tls::Role,
    trace::{TRACEPARENT, TraceContext},
};
use serde::{Deserialize, Serialize};
use tonic::{
    Code, Request, Response, Status, Streaming, metadata::MetadataValue, transport::Channel,
};

/// Deadline of calls that a server answers from memory.
pub const QUICK: Duration = Duration::from_secs(20);
/// Deadline of StartBackup: janus may probe servers, a server may prepare images.
pub const START: Duration = Duration::from_secs(60);
/// Deadline of one CommitBackup call; a lost one is asked after.
pub const COMMIT: Duration = Duration::from_secs(3600);
/// A server that can't be reached directly within this is reached through janus.
const DIRECT: Duration = Duration::from_millis(300);
/// URLs of one server that are tried.
const MAX_DIRECT: usize = 8;

/// Bounds of the pause that a busy janus or server may ask for.
const SHORTEST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How long a stream waits for its place behind others before its command fails.
pub const PATIENCE: Duration = Duration::from_secs(3600);

/// Longest silence of a stream that should be flowing.
const SILENCE: Duration = Duration::from_secs(120);

/// A call that failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No URL answers.
    #[error("no server can be reached: {}", lines(.0))]
    Unreachable(Vec<ConnectError>),
    /// A server answered with an error, or the connection broke.
    #[error("{doing}: {}", told(status))]
    Call {
        /// What was wanted.
        doing: &'static str,
        /// What came back.
        status: Box<Status>,
    },
    /// An answer that makes no sense.
    #[error(
        "{doing}: the server's answer is invalid: {source}; it may be of another version: update the older one of it and this client (`janus-client test` tells versions)"
    )]
    Answer {
        /// What was wanted.
        doing: &'static str,
        /// What is wrong with it.
        source: error::WireError,
    },
}

fn lines(errors: &[ConnectError]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// One line about a status: our own errors by reason and message, transport errors explained.
fn told(status: &Status) -> String {
    match error::reason(status) {
        Some(reason) => format!("{} ({})", status.message(), reason_name(reason)),
        None if status.code() == Code::Unimplemented => {
            "the other end doesn't know this call, so it is older than this client: update it"
                .into()
        }
        None => channel::explain(status),
    }
}

/// Name of a reason without its prefix, as users see it.
pub fn reason_name(reason: ErrorReason) -> &'static str {
    let name = reason.as_str_name();
    name.strip_prefix("ERROR_REASON_").unwrap_or(name)
}

impl LinkError {
    /// Makes the error of a call.
    pub fn call(doing: &'static str) -> impl FnOnce(Status) -> Self {
        move |status| Self::Call { doing, status: Box::new(status) }
    }

    /// Makes the error of an answer.
    pub fn answer(doing: &'static str) -> impl FnOnce(error::WireError) -> Self {
        move |source| Self::Answer { doing, source }
    }

    /// The reason the server gave, if it gave one.
    pub fn reason(&self) -> Option<ErrorReason> {
        match self {
            Self::Call { status, .. } => error::reason(status),
            _ => None,
        }
    }

    /// The time after which to come back, when all places are taken for now.
    pub fn busy(&self) -> Option<Duration> {
        let Self::Call { status, .. } = self else { return None };
        let is_busy = error::reason(status) == Some(ErrorReason::TooMany);
        let asked = error::retry_delay(status).unwrap_or_default();
        is_busy.then(|| asked.clamp(SHORTEST_PAUSE, LONGEST_PAUSE))
    }

    /// True when the link or the handle that the call went by is of no use any more, and another may be had.
    pub fn is_lost(&self) -> bool {
        self.remedy() == Remedy::Reconnect || self.reason() == Some(ErrorReason::HandleExpired)
    }

    /// The server that answered with this error, as far as it said so.
    pub fn answered_by(&self) -> Option<ServerId> {
        let Self::Call { status, .. } = self else { return None };
        status.metadata().get(metadata::SERVER)?.to_str().ok()?.parse().ok()
    }

    /// The run that keeps ours away, if that is why.
    pub fn lease_holder(&self) -> Option<BackupId> {
        let Self::Call { status, .. } = self else { return None };
        error::lease_holder(status)
    }

    /// What this failure is good for.
    pub fn remedy(&self) -> Remedy {
        use ErrorReason as R;
        let Self::Call { status, .. } = self else {
            return if matches!(self, Self::Unreachable(_)) {
                Remedy::Reconnect
            } else {
                Remedy::None
            };
        };
        match error::reason(status) {
            Some(R::NoServerReady | R::ServerUnreachable | R::WrongServer | R::Draining) => {
                Remedy::Reconnect
            }
            Some(R::TooMany | R::StoreFailed | R::BlockHashMismatch) => Remedy::Reconnect,
            Some(R::SessionExpired | R::RunState | R::HeadMoved) => Remedy::NewRun,
            Some(R::StoreFull | R::QuotaExceeded) => Remedy::NewRun,
            Some(_) => Remedy::None,
            None => transport_remedy(status.code()),
        }
    }
}

/// Statuses without a reason of ours come from the transport, or from a proxy in between.
fn transport_remedy(code: Code) -> Remedy {
    match code {
        Code::Unavailable
        | Code::Unknown
        | Code::Internal
        | Code::Cancelled
        | Code::DeadlineExceeded => Remedy::Reconnect,
        Code::Aborted | Code::NotFound => Remedy::NewRun,
        _ => Remedy::None,
    }
}

/// What a failure is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Connect again and go on from what was received.
    Reconnect,
    /// This run is over; a new one may succeed.
    NewRun,
    /// Trying again brings nothing.
    None,
}

/// The answers of a call that streams them.
///
/// # Errors
/// When the call fails, or nothing comes of it for too long.
pub async fn stream_of<T>(
    call: impl Future<Output = Result<Response<Streaming<T>>, Status>>,
    doing: &'static str,
) -> Result<Streaming<T>, LinkError> {
    Ok(unless_silent(call, doing).await?.into_inner())
}

/// The next message of a stream that should be flowing; `None`: that was all.
///
/// # Errors
/// When the stream breaks, or nothing comes for too long.
pub async fn next_of<T>(
    answers: &mut Streaming<T>,
    doing: &'static str,
) -> Result<Option<T>, LinkError> {
    unless_silent(answers.message(), doing).await
}

async fn unless_silent<T>(
    answer: impl Future<Output = Result<T, Status>>,
    doing: &'static str,
) -> Result<T, LinkError> {
    let answer = tokio::time::timeout(SILENCE, answer).await;
    let answer = answer.map_err(|_| Status::deadline_exceeded("the server went silent"));
    answer.flatten().map_err(LinkError::call(doing))
}

/// How often a lost server is looked for.
const PAUSE: Duration = Duration::from_millis(500);

/// A server that is waited for: since when nothing has come of it.
#[derive(Debug, Default)]
pub struct Waiting {
    since: Option<Instant>,
}

impl Waiting {
    /// Something has come.
    pub fn is_over(&mut self) {
        self.since = None;
    }

    /// How long to wait after a failed call to `server`; `None`: trying again brings nothing, or has for `longest`.
    pub fn pause(
        &mut self,
        error: &LinkError,
        server: &str,
        longest: Duration,
    ) -> Option<Duration> {
        let is_first = self.since.is_none();
        let since = self.since.get_or_insert_with(Instant::now).elapsed();
        if let Some(pause) = error.busy().filter(|_| since < PATIENCE) {
            tracing::warn!(server, %error, ?pause, "waiting for a place");
            return Some(pause);
        }
        if !error.is_lost() || since > longest {
            return None;
        }
        if is_first {
            tracing::warn!(server, %error, "connection lost; going on as soon as the server answers");
        }
        Some(PAUSE)
    }
}

/// The trace of this process: a command is one run, and all its calls belong together.
pub fn trace() -> TraceContext {
    static TRACE: OnceLock<TraceContext> = OnceLock::new();
    *TRACE.get_or_init(TraceContext::fresh)
}

/// Connects to a server that must prove to be the wanted one.
async fn directly(url: String, wanted: Role, dialer: Dialer) -> Result<Channel, ()> {
    let options = ConnectOptions { connect_timeout: DIRECT, expect: Expect::Server };
    let connection = channel::connect_through(&url, dialer, options).await.map_err(|error| {
        tracing::debug!(server = %wanted, url, %error, "not reached directly");
    })?;
    if connection.peer.role != wanted {
        tracing::debug!(server = %wanted, url, peer = %connection.peer, "another server");
        return Err(());
    }
    tracing::info!(server = %wanted, url, "streams go straight to the server");
    Ok(connection.channel)
}

/// Where a call is to go.
#[derive(Debug, Clone, Default)]
pub struct Address {
    /// Only this server.
    pub server: Option<ServerId>,
    /// Run the call belongs to.
    pub run: Option<BackupId>,
    /// Machine the call is about; operators must say it.
    pub machine: Option<MachineKey>,
}

impl Address {
    /// A request that goes there; `deadline` is left out for streams.
    pub fn request<T>(&self, message: T, deadline: Option<Duration>) -> Request<T> {
        let mut request = Request::new(message);
        let texts = [
            (metadata::SERVER, self.server.as_ref().map(ToString::to_string)),
            (metadata::RUN, self.run.as_ref().map(ToString::to_string)),
            (metadata::MACHINE, self.machine.as_ref().map(ToString::to_string)),
        ];
        for (name, text) in texts {
            // Names and ids are ASCII by their types.
            if let Some(value) = text.and_then(|text| MetadataValue::try_from(text).ok()) {
                request.metadata_mut().insert(name, value);
            }
        }
        let traceparent = TraceContext::current().unwrap_or_else(|| trace().next()).to_string();
        if let Ok(value) = MetadataValue::try_from(traceparent) {
            request.metadata_mut().insert(TRACEPARENT, value);
        }
        if let Some(deadline) = deadline {
            request.set_timeout(deadline);
        }
        request
    }
}

/// Whether streams may leave the way on which they were started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direct {
    /// Everything goes through janus.
    #[default]
    Never,
    /// Streams go straight to the server where it can be reached at once.
    Prefer,
}

/// A connection to janus or a server.
#[derive(Clone)]
pub struct Link {
    /// What made it, and signs what is asked through it.
    dialer: Dialer,
    url: String,
    channel: Channel,
    peer: Role,
    /// Of streams: straight to the server, past janus.
    direct: Option<Channel>,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Link({}, {})", self.url, self.peer)
    }
}

impl Link {
    /// Connects to one URL.
    ///
    /// # Errors
    /// When nobody of the right role answers there.
    pub async fn connect(url: &str, dialer: &Dialer) -> Result<Self, ConnectError> {
        let options = ConnectOptions::default();
        let connection = channel::connect_through(url, dialer.clone(), options).await?;
        let (channel, peer) = (connection.channel, connection.peer.role);
        Ok(Self { dialer: dialer.clone(), url: url.to_owned(), channel, peer, direct: None })
    }

    /// The same link, with its streams straight to `server` where one of `urls` leads to it at once. A peer that doesn't
    /// prove to be this server of our group is none. Otherwise nothing changes, and nobody has to know.
    pub async fn prefer_direct(self, server: &ServerId, urls: &[String], dialer: &Dialer) -> Self {
        let wanted = Role::Server(server.clone());
        if self.peer == wanted {
            return self;
        }
        let first = urls.iter().take(MAX_DIRECT);
        let tries: Vec<_> =
            first.map(|url| directly(url.clone(), wanted.clone(), dialer.clone())).collect();
        // There is no time for head starts.
        let first = tokio::time::timeout(DIRECT, race(tries, Duration::ZERO)).await;
        let direct = first.ok().and_then(|raced| raced.won).map(|(_, channel)| channel);
        Self { direct, ..self }
    }

    /// Where streams go.
    fn bulk(&self) -> Channel {
        self.direct.clone().unwrap_or_else(|| self.channel.clone())
    }

    /// Where it leads.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Who answered.
    pub fn peer(&self) -> &Role {
        &self.peer
    }

    /// Client of BackupService.
    pub fn backup(&self) -> BackupServiceClient<Channel> {
        BackupServiceClient::new(self.channel.clone())
    }

    /// Client of RestoreService.
    pub fn restore(&self) -> RestoreServiceClient<Channel> {
        RestoreServiceClient::new(self.channel.clone())
    }

    /// Starts a run, in our own name.
    ///
    /// # Errors
    /// The server's, or the transport's.
    pub async fn start_backup(
        &self,
        address: &Address,
        message: pb::StartBackupRequest,
        use_counter: u64,
    ) -> Result<Response<pb::StartBackupResponse>, Status> {
        let statement = Statement::start(&message, address.machine.as_ref());
        let mut request = self.proven(address, message, &statement, START);
        request.metadata_mut().insert(metadata::USE, use_counter.into());
        self.backup().start_backup(request).await
    }

    /// Commits a run, in our own name.
    ///
    /// # Errors
    /// The server's, or the transport's.
    pub async fn commit_backup(
        &self,
        address: &Address,
        message: pb::CommitBackupRequest,
    ) -> Result<Response<pb::CommitBackupResponse>, Status> {
        let statement = Statement::commit(&message, address.machine.as_ref());
        let request = self.proven(address, message, &statement, COMMIT);
        self.backup().commit_backup(request).await
    }

    /// Opens a snapshot, in our own name.
    ///
    /// # Errors
    /// The server's, or the transport's.
    pub async fn open_snapshot(
        &self,
        address: &Address,
        message: pb::OpenSnapshotRequest,
    ) -> Result<pb::OpenSnapshotResponse, LinkError> {
        let statement = Statement::open(&message);
        let request = self.proven(address, message, &statement, QUICK);
        let opened = self.restore().open_snapshot(request).await;
        Ok(opened.map_err(LinkError::call("opening the snapshot"))?.into_inner())
    }

    /// A request that carries our signature over what it asks.
    fn proven<T>(
        &self,
        address: &Address,
        message: T,
        statement: &Statement,
        deadline: Duration,
    ) -> Request<T> {
        let mut request = address.request(message, Some(deadline));
        add_proof(&mut request, &*self.dialer, statement, address.server.as_ref());
        request
    }

    /// Client of BackupService for streams of blocks.
    pub fn bulk_backup(&self) -> BackupServiceClient<Channel> {
        BackupServiceClient::new(self.bulk())
    }

    /// Client of RestoreService for streams of blocks and hashes.
    pub fn bulk_restore(&self) -> RestoreServiceClient<Channel> {
        RestoreServiceClient::new(self.bulk())
    }

    /// Client of CatalogService.
    pub fn catalog(&self) -> CatalogServiceClient<Channel> {
        CatalogServiceClient::new(self.channel.clone())
    }

    /// Client of TableService.
    pub fn tables(&self) -> TableServiceClient<Channel> {
        TableServiceClient::new(self.channel.clone())
    }

    /// Client of ServerInfoService.
    pub fn info(&self) -> ServerInfoServiceClient<Channel> {
        ServerInfoServiceClient::new(self.channel.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_become_metadata() {
        let address = Address {
            server: Some("a".parse().unwrap()),
            run: None,
            machine: Some(MachineKey::new("u", "m").unwrap()),
        };
        let request = address.request((), Some(QUICK));
        assert_eq!(request.metadata().get(metadata::SERVER).unwrap(), "a");
        assert_eq!(request.metadata().get(metadata::MACHINE).unwrap(), "u/m");
        assert!(request.metadata().get(metadata::RUN).is_none());
        assert!(request.metadata().get("grpc-timeout").is_some());
        let traceparent = |request: &Request<()>| {
            let text = request.metadata().get(TRACEPARENT).unwrap().to_str().unwrap().to_owned();
            (text.parse::<TraceContext>().unwrap().trace_id(), text)
        };
        let (one, other) = (traceparent(&request), traceparent(&address.request((), None)));
        assert!(one.0 == other.0 && one.1 != other.1, "{one:?} {other:?}");
    }

    #[test]
    fn failures_say_what_they_are_good_for() {
        let remedy = |status| LinkError::call("test")(status).remedy();
        let call = |status| LinkError::call("testing")(status);
        let busy = call(error::status(ErrorReason::TooMany, ""));
        assert_eq!(busy.busy(), Some(Duration::from_secs(5)));
        assert_eq!(call(error::status(ErrorReason::Draining, "")).busy(), None);
        assert_eq!(remedy(error::status(ErrorReason::Draining, "")), Remedy::Reconnect);
        assert_eq!(remedy(error::status(ErrorReason::SessionExpired, "")), Remedy::NewRun);
        assert_eq!(remedy(error::status(ErrorReason::NotAllowed, "")), Remedy::None);
        assert_eq!(remedy(error::status(ErrorReason::EpochSuperseded, "")), Remedy::None);
        assert_eq!(remedy(Status::unavailable("broken")), Remedy::Reconnect);
        assert_eq!(LinkError::Unreachable(vec![]).remedy(), Remedy::Reconnect);
        let text = LinkError::call("starting the backup")(error::status(
            ErrorReason::StoreFull,
            "no space on a",
        ));
        assert_eq!(text.to_string(), "starting the backup: no space on a (STORE_FULL)");
        let missing = error::WireError::Missing { field: "snapshots" };
        let text = LinkError::answer("listing")(missing).to_string();
        assert!(text.contains("listing: ") && text.contains("snapshots"), "{text}");
        assert!(text.contains("update the older one"), "{text}");
    }
}
