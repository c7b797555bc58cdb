//! The accepting end, the same in server and janus: TLS 1.3 with client certificates, HTTP/2, and the caller's
//! [`Principal`] in the extensions of each request.
//!
//! Every task started here is owned and ended before [`serve`] returns; a drain never takes longer than its limit.
//! No caller can take all connections or calls: each has a share. A janus speaks for many, so its calls aren't counted.
//! Whoever hasn't proved yet who it is has places of its own kind, few for each address. Peers that are slow on purpose lose what they hold:
//! a handshake or a first frame that doesn't come, an answer that isn't taken, a request that doesn't end (`punctual.rs`).
//! A [`Door`] says where connections come from: TCP and TLS in the programs, memory in the whole-system simulation.

mod addresses;
mod budget;
mod counted;
mod frames;
mod handshake;
mod limits;
mod stalls;

pub use limits::{Limits, STALL, Windows};

use std::{convert::Infallible, error::Error, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::{Service, ServiceExt};
use tracing::{debug, info, warn};

use self::{
    addresses::{Addresses, Handshaking, Refused},
    budget::Budgets,
    counted::Counted,
    frames::Counting,
    stalls::{Outgoing, in_time},
};
use crate::{
    channel::{MAX_CONCURRENT_STREAMS, MAX_HEADER_BYTES, Observed, Stream, gathered},
    clock::unix_ms,
    error::{ErrorReason, status},
    shares::{Share, Shares},
    tls::{Identity, Principal, Role},
};

/// How long a refused peer gets to read why.
const REFUSAL_TIME: Duration = Duration::from_secs(2);
/// Streams that a caller has taken back before they were looked at: on one more its connection ends (CVE-2023-44487).
const MAX_RESETS_UNSEEN: usize = 20;
/// Streams that a connection has had to be ended for faults of the caller: on one more it ends.
const MAX_FAULTY_STREAMS: usize = 256;
/// A peer connects anew before so little is left of its certificate.
const OLD: Duration = Duration::from_secs(60);
/// How long dropped tasks get to end; they end at their next await.
const DROP_TIME: Duration = Duration::from_secs(1);

type BoxError = Box<dyn Error + Send + Sync>;

/// Address of the caller's end, in the extensions of each request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerAddress(pub SocketAddr);

/// Accepts connections until `shutdown`, then drains and returns.
///
/// `service` gets each request with an [`Arc<Principal>`] and a [`PeerAddress`] in its extensions. Peers without a
/// certificate of our CA don't get through the handshake; those of another group or without a role get
/// UNAUTHENTICATED for every call.
pub async fn serve<S, B>(
    listener: TcpListener,
    identity: Identity,
    service: S,
    limits: Limits,
    shutdown: CancellationToken,
) where
    S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    B: hyper::body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    Door::Tls(listener, identity).serve(service, limits, shutdown).await;
}

/// A connection that needs no handshake: whoever made it says who is at the other end, and at which address.
pub struct Known {
    /// The connection.
    pub stream: Stream,
    /// Who is at its other end.
    pub principal: Principal,
    /// Its address.
    pub address: SocketAddr,
}

/// Where connections come from.
pub enum Door {
    /// TCP, then TLS with certificates on both sides.
    Tls(TcpListener, Identity),
    /// The same, where a caller may also have no certificate yet: its requests come without a [`Principal`] then.
    Open(TcpListener, Identity),
    /// Connections whose other end is known, until the channel is closed.
    Known(mpsc::Receiver<Known>),
}

impl Door {
    /// The address that is listened on.
    ///
    /// # Errors
    /// As the system says; `Unsupported` where there is none.
    pub fn address(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Tls(listener, _) | Self::Open(listener, _) => listener.local_addr(),
            Self::Known(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// As [`serve`].
    pub async fn serve<S, B>(self, service: S, limits: Limits, shutdown: CancellationToken)
    where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError>,
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let hall = Hall::new(limits, shutdown);
        // Also when this future is dropped, nothing goes on.
        let _kill_on_drop = hall.kill.clone().drop_guard();
        match self {
            Self::Tls(listener, identity) => {
                hall.accept_all(&listener, &identity, false, &service).await;
            }
            Self::Open(listener, identity) => {
                hall.accept_all(&listener, &identity, true, &service).await;
            }
            Self::Known(mut connections) => {
                while let Some(Some(known)) =
                    hall.shutdown.run_until_cancelled(connections.recv()).await
                {
                    let connection = hall.connection(known.address);
                    let service = service.clone();
                    hall.spawn(async move {
                        connection.admit(known.stream, Some(known.principal), service).await;
                    });
                }
            }
        }
        hall.drain().await;
    }
}

/// Open connections, and what they share.
struct Hall {
    tasks: TaskTracker,
    kill: CancellationToken,
    places: Arc<Semaphore>,
    /// Places of those who haven't said who they are.
    strangers: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    addresses: Addresses,
    connections: Shares,
    calls: Shares,
    budgets: Budgets,
    limits: Limits,
    shutdown: CancellationToken,
}

impl Hall {
    fn new(limits: Limits, shutdown: CancellationToken) -> Self {
        let addresses = Addresses::new(
            limits.max_handshakes_per_address,
            limits.handshakes_per_second,
            limits.handshakes_saved,
        );
        Self {
            tasks: TaskTracker::new(),
            kill: CancellationToken::new(),
            places: Arc::new(Semaphore::new(limits.max_connections)),
            strangers: Arc::new(Semaphore::new(limits.max_strangers)),
            handshakes: Arc::new(Semaphore::new(limits.max_handshakes)),
            addresses,
            connections: Shares::new(limits.max_connections_per_caller),
            calls: Shares::new(limits.max_calls_per_caller),
            budgets: Budgets::default(),
            limits,
            shutdown,
        }
    }

    /// A place for one more handshake, if there is one.
    fn begin(&self, address: SocketAddr) -> Option<(OwnedSemaphorePermit, Handshaking)> {
        let refused = |limit: usize, why: &str| {
            warn!(%address, limit, "connection closed: {why}");
        };
        let Ok(place) = self.handshakes.clone().try_acquire_owned() else {
            refused(self.limits.max_handshakes, "too many handshakes are under way");
            return None;
        };
        match self.addresses.begin(address.ip()) {
            Ok(handshaking) => Some((place, handshaking)),
            Err(Refused::TooMany) => {
                let limit = self.limits.max_handshakes_per_address;
                refused(limit, "too many handshakes of its address are under way");
                None
            }
            // Not a line for each, or the log would be what the flood costs.
            Err(Refused::TooOften) => {
                debug!(%address, "connection closed: its address connects too often");
                None
            }
        }
    }

    fn connection(&self, address: SocketAddr) -> Connection {
        let executor = OwnedTasks {
            tasks: self.tasks.clone(),
            kill: self.kill.child_token(),
            stall: self.limits.stall,
        };
        Connection {
            address,
            limits: self.limits.clone(),
            places: self.places.clone(),
            strangers: self.strangers.clone(),
            connections: self.connections.clone(),
            calls: self.calls.clone(),
            budgets: self.budgets.clone(),
            shutdown: self.shutdown.clone(),
            executor,
        }
    }

    /// Accepts connections of TCP until shutdown.
    async fn accept_all<S, B>(
        &self,
        listener: &TcpListener,
        identity: &Identity,
        is_open: bool,
        service: &S,
    ) where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError>,
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        while let Some((tcp, address)) = accept(listener, &self.shutdown).await {
            let Some(held) = self.begin(address) else { continue };
            // Asked for each time: the certificate may have been renewed.
            let config = if is_open { identity.open_config() } else { identity.server_config() };
            let (identity, acceptor) = (identity.clone(), config.into());
            let tls = Handshake { identity, acceptor, is_open, tcp, held };
            self.spawn(self.connection(address).run(tls, service.clone()));
        }
    }

    fn spawn(&self, connection: impl Future<Output = ()> + Send + 'static) {
        let kill = self.kill.clone();
        self.tasks.spawn(async move { kill.run_until_cancelled(connection).await });
    }

    async fn drain(self) {
        drain(&self.tasks, &self.kill, self.limits.drain).await;
    }
}

/// The next connection; `None` when `shutdown` begins.
pub(crate) async fn accept(
    listener: &TcpListener,
    shutdown: &CancellationToken,
) -> Option<(TcpStream, SocketAddr)> {
    loop {
        match shutdown.run_until_cancelled(listener.accept()).await? {
            Ok(accepted) => return Some(accepted),
            Err(error) => {
                // Out of file descriptors: without the pause this loop would spin until one is free.
                warn!(%error, "can't accept connections");
                shutdown
                    .run_until_cancelled(tokio::time::sleep(Duration::from_millis(100)))
                    .await?;
            }
        }
    }
}

// Graceful HTTP/2 shutdown waits for ever on a peer that never spoke or stopped answering, hence the hard end.
pub(crate) async fn drain(tasks: &TaskTracker, kill: &CancellationToken, limit: Duration) {
    tasks.close();
    if timeout(limit, tasks.wait()).await.is_ok() {
        return;
    }
    info!(left = tasks.len(), ?limit, "drain took too long: dropping what is left");
    kill.cancel();
    if timeout(DROP_TIME, tasks.wait()).await.is_err() {
        warn!(left = tasks.len(), "tasks that do not end");
    }
}

/// Runs hyper's tasks as ours, so that they end with their connection.
#[derive(Clone)]
pub(crate) struct OwnedTasks {
    pub tasks: TaskTracker,
    pub kill: CancellationToken,
    /// How long a piece of an answer may wait to be taken.
    pub stall: Duration,
}

impl<F> hyper::rt::Executor<F> for OwnedTasks
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, future: F) {
        let (kill, future) = (self.kill.clone(), in_time(future, self.stall));
        self.tasks.spawn(async move { kill.run_until_cancelled(future).await.is_some() });
    }
}

/// A connection whose other end hasn't proved yet who it is.
struct Handshake {
    identity: Identity,
    acceptor: TlsAcceptor,
    /// Somebody without a certificate may come in.
    is_open: bool,
    tcp: TcpStream,
    /// Its place among the handshakes.
    held: (OwnedSemaphorePermit, Handshaking),
}

struct Connection {
    address: SocketAddr,
    limits: Limits,
    places: Arc<Semaphore>,
    strangers: Arc<Semaphore>,
    connections: Shares,
    calls: Shares,
    budgets: Budgets,
    shutdown: CancellationToken,
    executor: OwnedTasks,
}

impl Connection {
    async fn run<S, B>(self, peer: Handshake, service: S)
    where
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError>,
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let _end_streams = self.executor.kill.clone().drop_guard();
        let Handshake { identity, acceptor, is_open, tcp, held } = peer;
        let handshake =
            timeout(self.limits.handshake_timeout, handshake::tls(tcp, acceptor, self.address));
        let tls = match self.shutdown.run_until_cancelled(handshake).await {
            None => return,
            Some(Err(_)) => {
                warn!(address = %self.address, "connection refused: no TLS handshake in time");
                return;
            }
            Some(Ok(None)) => return,
            Some(Ok(Some(tls))) => tls,
        };
        drop(held);
        let certificates = tls.get_ref().1.peer_certificates();
        if is_open && certificates.is_none() {
            let serving = self.admit(tls, None, service);
            if timeout(self.limits.stranger_time, serving).await.is_err() {
                debug!(address = %self.address, "connection ended: nobody without a certificate stays");
            }
            return;
        }
        match identity.peer(certificates) {
            Ok(principal) => {
                let revoked = identity.revocations().end_of(&principal);
                let serving = self.admit(tls, Some(principal), service);
                if revoked.run_until_cancelled(serving).await.is_none() {
                    warn!(address = %self.address, "connection ended: its certificate was revoked");
                }
            }
            Err(error) => {
                warn!(address = %self.address, %error, "connection refused");
                self.refuse(tls, ErrorReason::IdentityMissing, error.to_string()).await;
            }
        }
    }

    async fn admit<S, B, T>(&self, stream: T, principal: Option<Principal>, service: S)
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError>,
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        // Who has no certificate shares with others at its address.
        let nobody = || self.address.ip().to_string();
        let caller: Arc<str> = principal.as_ref().map_or_else(nobody, ToString::to_string).into();
        let (places, limit) = match &principal {
            Some(_) => (&self.places, self.limits.max_connections),
            None => (&self.strangers, self.limits.max_strangers),
        };
        let Ok(_place) = places.clone().try_acquire_owned() else {
            warn!(address = %self.address, principal = %caller, limit, "connection closed: too many are open");
            return;
        };
        match self.connections.take(&caller) {
            Some(_share) => self.serve(stream, principal.map(Arc::new), caller, service).await,
            None => {
                let limit = self.connections.each();
                warn!(address = %self.address, principal = %caller, limit, "connection refused: the caller has too many");
                let reason = format!("{caller} has {limit} connections here already");
                self.refuse(stream, ErrorReason::TooMany, reason).await;
            }
        }
    }

    async fn serve<S, B, T>(
        &self,
        stream: T,
        principal: Option<Arc<Principal>>,
        name: Arc<str>,
        service: S,
    ) where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError>,
        B: hyper::body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let address = PeerAddress(self.address);
        let is_trusted = principal
            .as_ref()
            .is_some_and(|principal| matches!(principal.role, Role::Janus(_) | Role::Server(_)));
        let budget = (!is_trusted).then(|| self.budgets.of(&name));
        let counting = Counting::new(budget);
        let began = counting.began();
        let stream = Observed::new(stream, counting);
        let mut http2 = self.http2();
        if !is_trusted {
            let calls = u32::try_from(self.limits.max_calls_per_caller).unwrap_or(u32::MAX);
            http2.max_concurrent_streams(calls.min(MAX_CONCURRENT_STREAMS));
        }
        let old = until_old(principal.clone());
        let (who, calls) = (name.clone(), self.calls.clone());
        let with_caller = hyper::service::service_fn(move |mut request: Request<Incoming>| {
            let counted = count(&calls, principal.as_deref(), &name);
            if let Some(principal) = principal.clone() {
                request.extensions_mut().insert(principal);
            }
            request.extensions_mut().insert(address);
            let service = service.clone();
            async move {
                let outgoing = Outgoing::of_task();
                match counted {
                    Ok(share) => {
                        let answered = service.oneshot(request).await;
                        answered.map(|answer| Counted::answer(answer, share, outgoing))
                    }
                    Err(refused) => Ok(Counted::refusal(refused)),
                }
            }
        });
        let connection = http2.serve_connection(TokioIo::new(gathered(stream)), with_caller);
        tokio::pin!(connection);
        let first_frame = async {
            tokio::time::sleep(self.limits.handshake_timeout).await;
            if began.is_set() {
                std::future::pending::<()>().await;
            }
        };
        let ended = tokio::select! {
            biased;
            ended = connection.as_mut() => ended,
            () = self.shutdown.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
            () = old => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
            () = first_frame => {
                warn!(address = %self.address, principal = %who, "connection closed: no HTTP/2 frame in time");
                return;
            }
        };
        match ended {
            Ok(()) => debug!(address = %self.address, principal = %who, "connection closed"),
            Err(error) => {
                debug!(address = %self.address, principal = %who, %error, "connection lost");
            }
        }
    }

    /// Answers every call with why the connection is refused: a gRPC caller shows that, a closed socket it doesn't.
    async fn refuse<T>(&self, stream: T, reason: ErrorReason, message: String)
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let refusing = hyper::service::service_fn(move |_: Request<Incoming>| {
            let refused = status(reason, message.clone());
            std::future::ready(Ok::<_, Infallible>(refused.into_http::<tonic::body::Body>()))
        });
        let connection = self.http2().serve_connection(TokioIo::new(stream), refusing);
        // A caller of ours has seen the same fault and is gone; others get time for one call.
        let _ = timeout(REFUSAL_TIME, connection).await;
    }

    fn http2(&self) -> hyper::server::conn::http2::Builder<OwnedTasks> {
        let mut builder = hyper::server::conn::http2::Builder::new(self.executor.clone());
        let windows = self.limits.windows;
        builder
            .timer(TokioTimer::new())
            .max_frame_size(windows.frame_bytes)
            .initial_stream_window_size(windows.stream_bytes)
            .initial_connection_window_size(windows.connection_bytes)
            .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
            .max_header_list_size(MAX_HEADER_BYTES)
            .max_pending_accept_reset_streams(MAX_RESETS_UNSEEN)
            .max_local_error_reset_streams(MAX_FAULTY_STREAMS)
            .keep_alive_interval(self.limits.keepalive_interval)
            .keep_alive_timeout(self.limits.keepalive_timeout);
        builder
    }
}

/// Until the certificate of a peer is about to expire. Calls are forwarded with it, and those that come later need the next one,
/// which its holder shows when it connects anew. A janus is never spoken for.
async fn until_old(principal: Option<Arc<Principal>>) {
    let is_forwarded = |who: &Arc<Principal>| !matches!(who.role, Role::Janus(_));
    let Some(principal) = principal.filter(is_forwarded) else {
        return std::future::pending().await;
    };
    let expires = principal.expires();
    if expires == 0 {
        // No certificate: a connection in memory.
        return std::future::pending().await;
    }
    let left = expires.saturating_sub(unix_ms() / 1000);
    let left = Duration::from_secs(u64::try_from(left).unwrap_or(0));
    // Of very little, half: who has none newer must not come to nothing but connecting.
    tokio::time::sleep(left.saturating_sub(OLD).max(left / 2)).await;
}

/// One more open call of `caller`.
fn count(
    calls: &Shares,
    caller: Option<&Principal>,
    name: &Arc<str>,
) -> Result<Option<Share>, tonic::Status> {
    if caller.is_some_and(|caller| matches!(caller.role, Role::Janus(_))) {
        return Ok(None);
    }
    let refused =
        || status(ErrorReason::TooMany, format!("{name} has {} open calls here", calls.each()));
    calls.take(name).map(Some).ok_or_else(refused)
}
