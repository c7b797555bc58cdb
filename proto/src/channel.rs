//! The connecting end, the same in every program: TLS 1.3 with our certificate, HTTP/2 settings that were measured
//! to matter, and errors that say in one line what went wrong and what to do about it.
//!
//! A connection counts as made when the peer's first HTTP/2 bytes have arrived. Only then has it accepted our
//! certificate (TLS 1.3 tells a refusal after the handshake), and only that proves that a live process answers.
//! Names are looked up again on each connect.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use hyper_util::rt::{TokioIo, TokioTimer};
use tonic::transport::{Channel, Endpoint};

mod connect;
mod dial;
mod explain;
mod gathered;
mod observed;
mod pinned;
mod proxy;
mod race;

pub use connect::{Target, TlsStream, connect_tls};
pub use dial::{Dial, Dialer, Dialing, Stream, add_proof};
pub use explain::{ConnectError, explain, explain_error};
pub use gathered::{Gathered, Gathering, gathered};
pub use observed::{Observed, Observer};
pub use pinned::Pinned;
pub use proxy::{NoProxy, Proxied, Proxies};
pub use race::{HEAD_START, Raced, race};

use crate::tls::{Identity, Principal, Role};

/// Largest HTTP/2 frame either end accepts. The default of 16 KiB costs half of the throughput.
pub const MAX_FRAME_BYTES: u32 = 1 << 20;
/// Receive window of one stream: throughput on a long line is this divided by the round trip.
pub const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// Receive window of a connection: four streams, so that one that stalls doesn't block the others.
pub const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// Streams a peer may open on one connection.
pub const MAX_CONCURRENT_STREAMS: u32 = 1024;
/// Largest header list; a forwarded certificate needs about 1 KiB.
pub const MAX_HEADER_BYTES: u32 = 64 << 10;
/// A connecting end pings this often, also while no call is open.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// A connecting end gives a connection up when a ping stays unanswered this long.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Which role the peer must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// A backup server.
    Server,
    /// A backup server or a router.
    ServerOrJanus,
    /// A router.
    Janus,
}

impl Expect {
    fn admits(self, role: &Role) -> bool {
        match role {
            Role::Server(_) => self != Self::Janus,
            Role::Janus(_) => self != Self::Server,
            Role::Client(_) | Role::Restore(_) | Role::User(_) | Role::Operator(_) => false,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Server => "a server",
            Self::ServerOrJanus => "a server or a janus",
            Self::Janus => "a janus",
        }
    }
}

/// How to connect.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// Deadline for finding the name and connecting TCP, and again for TLS and the peer's first bytes.
    pub connect_timeout: Duration,
    /// Role the peer must have.
    pub expect: Expect,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self { connect_timeout: Duration::from_secs(2), expect: Expect::ServerOrJanus }
    }
}

impl ConnectOptions {
    /// Default deadlines and this role.
    pub fn expecting(expect: Expect) -> Self {
        Self { expect, ..Self::default() }
    }
}

/// A channel whose first connection stands.
#[derive(Debug, Clone)]
pub struct Connection {
    /// For the generated clients; reconnects by itself.
    pub channel: Channel,
    /// Who answered at first.
    pub peer: Principal,
}

/// Connects to `url` and returns a channel that reconnects by itself.
///
/// # Errors
/// When the URL is wrong or no connection to a peer of the right role comes about now.
pub async fn connect(
    url: &str,
    identity: &Identity,
    options: ConnectOptions,
) -> Result<Connection, ConnectError> {
    connect_through(url, Arc::new(identity.clone()), options).await
}

/// The same with connections made by `dialer`.
///
/// # Errors
/// As [`connect`].
pub async fn connect_through(
    url: &str,
    dialer: Dialer,
    options: ConnectOptions,
) -> Result<Connection, ConnectError> {
    let target = Target::parse(url)?;
    let peer = Arc::new(OnceLock::new());
    let connector = connector(target.clone(), dialer, options, peer.clone());
    let channel = endpoint(&target)?.connect_with_connector(connector).await.map_err(|error| {
        ConnectError::in_chain(&error).unwrap_or_else(|| target.closed(explain_error(&error)))
    })?;
    let peer = peer.get().cloned().ok_or_else(|| target.closed("no certificate seen".into()))?;
    Ok(Connection { channel, peer })
}

/// A channel that connects at its first call and again whenever a connection is lost. Needs a tokio runtime around it.
///
/// # Errors
/// When the URL is wrong. Everything else is told by the calls: see [`explain`].
pub fn lazy(
    url: &str,
    identity: &Identity,
    options: ConnectOptions,
) -> Result<Channel, ConnectError> {
    let target = Target::parse(url)?;
    let connector = connector(target.clone(), Arc::new(identity.clone()), options, Arc::default());
    Ok(endpoint(&target)?.connect_with_connector_lazy(connector))
}

/// A hyper client builder with the settings of [`lazy`], for callers that forward requests themselves.
pub fn client_builder<E>(executor: E) -> hyper::client::conn::http2::Builder<E>
where
    E: Clone,
{
    let mut builder = hyper::client::conn::http2::Builder::new(executor);
    builder
        .timer(TokioTimer::new())
        .max_frame_size(MAX_FRAME_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_header_list_size(MAX_HEADER_BYTES)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    builder
}

fn endpoint(target: &Target) -> Result<Endpoint, ConnectError> {
    let endpoint = Endpoint::from_shared(target.to_string()).map_err(|error| {
        ConnectError::Url { url: target.to_string(), reason: explain_error(&error) }
    })?;
    Ok(endpoint
        .max_frame_size(MAX_FRAME_BYTES)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

type Connecting =
    std::pin::Pin<Box<dyn Future<Output = Result<TokioIo<Gathered<Stream>>, ConnectError>> + Send>>;

fn connector(
    target: Target,
    dialer: Dialer,
    options: ConnectOptions,
    first_peer: Arc<OnceLock<Principal>>,
) -> impl tower::Service<
    http::Uri,
    Response = TokioIo<Gathered<Stream>>,
    Error = ConnectError,
    Future = Connecting,
> + Send
+ 'static {
    tower::service_fn(move |_: http::Uri| -> Connecting {
        let (target, dialer, options) = (target.clone(), dialer.clone(), options.clone());
        let first_peer = first_peer.clone();
        Box::pin(async move {
            let (stream, peer) = dialer.dial(&target, &options).await?;
            let _ = first_peer.set(peer); // Later connections don't change who answered at first.
            Ok(TokioIo::new(gathered(stream)))
        })
    })
}
