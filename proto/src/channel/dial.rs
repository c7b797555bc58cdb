//! The one place where connections are made, so that a whole-system simulation can put a network in memory there.

use std::{pin::Pin, sync::Arc};

use tokio::io::{AsyncRead, AsyncWrite};

use super::{ConnectError, ConnectOptions, Target, connect_tls};
use crate::tls::{Identity, Principal};

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
}

/// Shared by all who connect.
pub type Dialer = Arc<dyn Dial>;

impl Dial for Identity {
    fn dial<'a>(&'a self, target: &'a Target, options: &'a ConnectOptions) -> Dialing<'a> {
        Box::pin(async move {
            let (stream, peer) = connect_tls(target, self, options).await?;
            Ok((Box::new(stream) as Stream, peer))
        })
    }
}
