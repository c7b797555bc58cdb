//! The beginning of a connection: TLS with whoever speaks it, and an answer for those who don't.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tracing::{debug, warn};

use super::REFUSAL_TIME;
use crate::tls::describe;

/// First byte of a TLS connection: a handshake record.
const TLS_HANDSHAKE: u8 = 0x16;

/// TLS, or `None` when the peer was refused (and told, and logged).
pub(super) async fn tls(
    mut tcp: TcpStream,
    acceptor: TlsAcceptor,
    address: SocketAddr,
) -> Option<TlsStream<TcpStream>> {
    if let Err(error) = tcp.set_nodelay(true) {
        debug!(%address, %error, "connection lost");
        return None;
    }
    let mut first = [0];
    match tcp.peek(&mut first).await {
        Ok(1) if first[0] == TLS_HANDSHAKE => {}
        Ok(1) => {
            warn!(%address, "connection refused: no TLS (plain HTTP?)");
            answer_plain(&mut tcp).await;
            return None;
        }
        // A port scan or a TCP health check.
        _ => {
            debug!(%address, "connection closed without a word");
            return None;
        }
    }
    match acceptor.accept(tcp).into_fallible().await {
        Ok(tls) => Some(tls),
        Err((error, tcp)) => {
            warn!(%address, reason = problem(&error), "connection refused in the TLS handshake");
            linger(tcp).await;
            None
        }
    }
}

/// Tells a plain-HTTP caller what this port is.
async fn answer_plain(tcp: &mut TcpStream) {
    let text =
        "This port speaks HTTP/2 over TLS with client certificates only: use an https:// URL.\n";
    let answer = format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
        text.len()
    );
    if tcp.write_all(answer.as_bytes()).await.is_ok() {
        linger(tcp).await;
    }
}

/// Closes after the peer has: closing with unread bytes resets the connection, and the answer or alert is lost.
async fn linger(mut tcp: impl AsyncRead + AsyncWrite + Unpin) {
    let until_closed = async {
        tcp.shutdown().await?;
        tokio::io::copy(&mut (&mut tcp).take(64 << 10), &mut tokio::io::sink()).await
    };
    let _ = timeout(REFUSAL_TIME, until_closed).await;
}

fn problem(error: &io::Error) -> String {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::NoCertificatesPresented) => "the peer has no certificate".into(),
        Some(error @ rustls::Error::InvalidCertificate(_)) => {
            format!("the peer's certificate {}", describe(error))
        }
        Some(rustls::Error::AlertReceived(alert)) => {
            format!("the peer refused our certificate ({alert:?})")
        }
        Some(other) => other.to_string(),
        None => error.to_string(),
    }
}
