//! The one place where connections are made, so that a whole-system simulation can put a network in memory there.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::metadata::MetadataValue;

use super::{ConnectError, ConnectOptions, Observed, Observer, Target, connect_tls};
use crate::{
    ids::ServerId,
    metadata,
    proof::Statement,
    tls::{Identity, Principal},
};

/// What HTTP/2 needs of a connection.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// A connection, however it was made.
pub type Stream = Box<dyn ByteStream>;

/// A connection on its way.
pub type Dialing<'a> =
    Pin<Box<dyn Future<Output = Result<(Stream, Principal), ConnectError>> + Send + 'a>>;

/// Makes connections. [`Identity`] makes those of the programs: TLS over TCP, as [`connect_tls`] says.
pub trait Dial: Send + Sync {
    /// Connects, and returns when the peer has proved its role and has sent its first bytes.
    fn dial<'a>(&'a self, target: &'a Target, options: &'a ConnectOptions) -> Dialing<'a>;

    /// The [`janus-proof`](crate::proof) for one call to `server`, or to any; `None`: of who has no key.
    fn prove(&self, statement: &Statement, server: Option<&ServerId>) -> Option<String>;
}

/// Shared by all who connect.
pub type Dialer = Arc<dyn Dial>;

impl Dial for Identity {
    fn dial<'a>(&'a self, target: &'a Target, options: &'a ConnectOptions) -> Dialing<'a> {
        Box::pin(async move {
            let (stream, peer) = connect_tls(target, self, options).await?;
            Ok((until_revoked(stream, self, &peer), peer))
        })
    }

    fn prove(&self, statement: &Statement, server: Option<&ServerId>) -> Option<String> {
        Self::prove(self, statement, server)
    }
}

/// Adds the [`janus-proof`](crate::proof) that `dialer` can give to a request.
pub fn add_proof<T>(
    request: &mut tonic::Request<T>,
    dialer: &dyn Dial,
    statement: &Statement,
    server: Option<&ServerId>,
) {
    let proof = dialer.prove(statement, server);
    // It is ASCII.
    if let Some(value) = proof.and_then(|proof| MetadataValue::try_from(proof).ok()) {
        request.metadata_mut().insert(metadata::PROOF, value);
    }
}

/// The same connection, which breaks when the certificate of its other end is revoked.
pub(super) fn until_revoked(
    stream: impl ByteStream + 'static,
    identity: &Identity,
    peer: &Principal,
) -> Stream {
    let end = identity.revocations().end_of(peer).cancelled_owned();
    Box::new(Observed::new(stream, UntilRevoked(Box::pin(end))))
}

struct UntilRevoked(Pin<Box<WaitForCancellationFutureOwned>>);

impl Observer for UntilRevoked {
    fn before(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.0.as_mut().poll(cx) {
            Poll::Pending => Poll::Ready(Ok(())),
            Poll::Ready(()) => Poll::Ready(Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the peer was revoked",
            ))),
        }
    }
}
