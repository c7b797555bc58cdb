//! One HTTP/2 connection to a server, and the time of its last received byte.
//!
//! HTTP/2's own pings are off: hyper gives a connection up when a ping's answer is late even while data arrives,
//! which cuts uploads on thin lines. The owner of the connection watches [`Pulse`] instead.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use http::{Request, Response, Uri, uri::Authority};
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::TokioIo;
use janus_proto::channel::{self, Observed, Observer, Stream};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;

/// Receive window of a whole connection: as large as there is. Streams are bounded by `max_bulk_streams` and their own
/// windows; a smaller one here would let a few slow readers hold up all other streams of the server.
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;

/// When something was last received.
#[derive(Debug)]
pub(crate) struct Pulse {
    base: Instant,
    last_ms: AtomicU64,
}

impl Pulse {
    fn new() -> Self {
        Self { base: Instant::now(), last_ms: AtomicU64::new(0) }
    }

    fn now_ms(&self) -> u64 {
        self.base.elapsed().as_millis() as u64
    }

    fn beat(&self) {
        self.last_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// Time since the last byte.
    pub fn silence(&self) -> Duration {
        Duration::from_millis(self.now_ms().saturating_sub(self.last_ms.load(Ordering::Relaxed)))
    }
}

/// Notes each read that brings bytes.
struct Heartbeat(Arc<Pulse>);

impl Observer for Heartbeat {
    fn heard(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.0.beat();
        }
    }
}

/// A request that got no answer.
#[derive(Debug)]
pub(crate) enum SendError {
    /// It never left: here it is again.
    Unsent(Box<Request<Body>>, hyper::Error),
    /// The connection or the stream broke after it had left.
    Lost(hyper::Error),
}

impl SendError {
    pub fn cause(&self) -> &hyper::Error {
        match self {
            Self::Unsent(_, error) | Self::Lost(error) => error,
        }
    }

    /// The server has proved that it did not begin with the request.
    pub fn is_unprocessed(&self) -> bool {
        let reset = crate::router::h2_cause(self.cause());
        matches!(self, Self::Unsent(..))
            || reset.is_some_and(|h2| h2.reason() == Some(h2::Reason::REFUSED_STREAM))
    }
}

/// The sending end of a connection; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Wire {
    sender: http2::SendRequest<Body>,
    authority: Authority,
    pulse: Arc<Pulse>,
}

/// Runs hyper's tasks for as long as the connection may live. After GOAWAY its streams go on, so they outlive the
/// driver; a connection that is given up has to be killed with its streams, or their callers would wait for ever.
#[derive(Debug, Clone)]
struct Tasks(CancellationToken);

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, task: F) {
        let kill = self.0.clone();
        tokio::spawn(async move { drop(kill.run_until_cancelled(task).await) });
    }
}

/// Drives the connection; ends when no new stream can be opened on it.
pub(super) type Driver = BoxFuture<'static, Result<(), hyper::Error>>;

impl Wire {
    /// HTTP/2 over a fresh connection.
    pub(super) async fn open(
        stream: Stream,
        authority: Authority,
        kill: CancellationToken,
    ) -> Result<(Self, Driver), hyper::Error> {
        let pulse = Arc::new(Pulse::new());
        let io = channel::gathered(Observed::new(stream, Heartbeat(pulse.clone())));
        let mut builder = channel::client_builder(Tasks(kill));
        builder.keep_alive_interval(None).initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        let (sender, connection) = builder.handshake(TokioIo::new(io)).await?;
        Ok((Self { sender, authority, pulse }, Box::pin(connection)))
    }

    pub fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// Sends a request, whatever its authority was before.
    pub async fn send(&self, mut request: Request<Body>) -> Result<Response<Incoming>, SendError> {
        *request.uri_mut() = self.address(request.uri());
        let mut sender = self.sender.clone();
        sender.try_send_request(request).await.map_err(|mut error| match error.take_message() {
            Some(request) => SendError::Unsent(Box::new(request), error.into_error()),
            None => SendError::Lost(error.into_error()),
        })
    }

    fn address(&self, uri: &Uri) -> Uri {
        let mut parts = uri.clone().into_parts();
        parts.scheme = Some(http::uri::Scheme::HTTPS);
        parts.authority = Some(self.authority.clone());
        parts.path_and_query.get_or_insert_with(|| http::uri::PathAndQuery::from_static("/"));
        // All three parts are there and valid by their types; the old one would only be refused by the server.
        Uri::from_parts(parts).unwrap_or_else(|_| uri.clone())
    }
}

/// For the generated clients.
impl tower::Service<Request<Body>> for Wire {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let wire = self.clone();
        Box::pin(async move {
            wire.send(request).await.map_err(|error| match error {
                SendError::Unsent(_, error) | SendError::Lost(error) => error,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, io, pin::Pin, sync::Mutex};

    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

    use super::*;

    /// Takes all slices at once, and nothing in pieces; notes how many there were.
    struct Vectored(Arc<Mutex<Vec<usize>>>);

    impl AsyncWrite for Vectored {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &[u8],
        ) -> Poll<io::Result<usize>> {
            panic!("written in pieces")
        }

        fn poll_write_vectored(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            slices: &[io::IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            self.0.lock().unwrap().push(slices.len());
            Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()))
        }

        fn is_write_vectored(&self) -> bool {
            true
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncRead for Vectored {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    #[tokio::test]
    async fn vectored_writes_go_through() {
        let (written, pulse) = (Arc::default(), Arc::new(Pulse::new()));
        let stream: Stream = Box::new(Vectored(Arc::clone(&written)));
        let mut io = TokioIo::new(Observed::new(stream, Heartbeat(pulse)));
        assert!(hyper::rt::Write::is_write_vectored(&io));
        let slices = [io::IoSlice::new(b"head"), io::IoSlice::new(b"data")];
        let writing =
            poll_fn(|cx| hyper::rt::Write::poll_write_vectored(Pin::new(&mut io), cx, &slices));
        assert_eq!(writing.await.unwrap(), 8);
        assert_eq!(*written.lock().unwrap(), [2]);
    }
}
