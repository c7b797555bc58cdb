//! One connection: name, TCP, TLS, role of the peer, first bytes.

use std::{fmt, io, net::SocketAddr, sync::Arc, time::Duration};

use rustls::{
    ClientConfig,
    pki_types::{CertificateDer, ServerName},
};
use tokio::{
    io::AsyncBufReadExt,
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::TlsConnector;

use super::{
    ConnectError, ConnectOptions,
    explain::tls_error,
    race::{HEAD_START, race},
};
use crate::tls::{Identity, Principal, TlsError};

/// The connecting end of a TLS connection.
pub type TlsStream = tokio_rustls::client::TlsStream<TcpStream>;

/// Where to connect to: `https://host:port`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    host: String,
    port: u16,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let brackets = self.host.contains(':');
        let (open, close) = if brackets { ("[", "]") } else { ("", "") };
        write!(f, "https://{open}{}{close}:{}", self.host, self.port)
    }
}

impl std::str::FromStr for Target {
    type Err = ConnectError;

    fn from_str(url: &str) -> Result<Self, ConnectError> {
        Self::parse(url)
    }
}

impl Target {
    /// Reads a URL.
    ///
    /// # Errors
    /// When it is not `https`, has no host or port, or has a path.
    pub fn parse(url: &str) -> Result<Self, ConnectError> {
        let wrong = |reason: String| ConnectError::Url { url: url.to_string(), reason };
        let Some((scheme, rest)) = url.trim().split_once("://") else {
            return Err(wrong(format!("no scheme; write https://{}", url.trim())));
        };
        if scheme != "https" {
            let reason =
                format!("{scheme}:// is not offered, everything is TLS; write https://{rest}");
            return Err(wrong(reason));
        }
        let uri: http::Uri =
            url.trim().parse().map_err(|error| wrong(format!("not a URL ({error})")))?;
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() || rest.contains('@') {
            return Err(wrong("no plain host; write https://HOST:PORT".into()));
        }
        if uri.path() != "/" || uri.query().is_some() {
            return Err(wrong("has a path; write https://HOST:PORT".into()));
        }
        let port = uri.port_u16().ok_or_else(|| {
            wrong("no port; add it, such as :7420 for a janus or :7421 for a server".into())
        })?;
        Ok(Self { host: host.to_string(), port })
    }

    /// A host and port that need not be of our own kind.
    pub(super) fn at(host: &str, port: u16) -> Self {
        let host = host.trim_start_matches('[').trim_end_matches(']').to_string();
        Self { host, port }
    }

    /// Host name or address, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `host:port`, for the `:authority` of forwarded requests.
    pub fn authority(&self) -> String {
        self.to_string().split_off("https://".len())
    }

    pub(super) fn closed(&self, reason: String) -> ConnectError {
        ConnectError::Closed { target: self.to_string(), reason }
    }

    fn timed_out(&self, what: &'static str, after: Duration) -> ConnectError {
        ConnectError::TimedOut { target: self.to_string(), what, after }
    }
}

/// Connects to `target` and returns when the peer has proved its role and has sent its first HTTP/2 bytes (they stay
/// unread in the stream).
///
/// # Errors
/// When one of the steps fails or takes longer than the options allow.
pub async fn connect_tls(
    target: &Target,
    identity: &Identity,
    options: &ConnectOptions,
) -> Result<(TlsStream, Principal), ConnectError> {
    let tcp = connect_tcp(target, options.connect_timeout).await?;
    greet_within(target, identity, options, tcp).await
}

/// The part of [`connect_tls`] after TCP.
pub(super) async fn greet_within(
    target: &Target,
    identity: &Identity,
    options: &ConnectOptions,
    tcp: TcpStream,
) -> Result<(TlsStream, Principal), ConnectError> {
    let named = |shown: Option<&[CertificateDer<'_>]>| identity.peer(shown);
    secure(target, identity.client_config(), named, options, tcp).await
}

/// TLS, the role of the peer, by whatever `named` makes of its certificates, and its first bytes.
pub(super) async fn secure(
    target: &Target,
    config: Arc<ClientConfig>,
    named: impl Fn(Option<&[CertificateDer<'_>]>) -> Result<Principal, TlsError>,
    options: &ConnectOptions,
    tcp: TcpStream,
) -> Result<(TlsStream, Principal), ConnectError> {
    let limit = options.connect_timeout;
    let late = |_| target.timed_out("it accepted the connection and then said nothing", limit);
    timeout(limit, greet(target, config, named, options, tcp)).await.map_err(late)?
}

/// Tries every address of the host, IPv6 and IPv4 by turns, each with a head start over the next one.
pub(super) async fn connect_tcp(
    target: &Target,
    limit: Duration,
) -> Result<TcpStream, ConnectError> {
    let end = Instant::now() + limit;
    let addresses = by_turns(look_up(target, end, limit).await?);
    let tries = addresses.into_iter().map(TcpStream::connect);
    let Ok(mut raced) = timeout_at(end, race(tries, HEAD_START)).await else {
        return Err(target.timed_out("no answer to the TCP connect", limit));
    };
    match (raced.won, raced.failed.pop()) {
        (Some((_, stream)), _) => {
            // Without it, small frames wait for acknowledgements: measured at half of the throughput.
            stream.set_nodelay(true).map_err(|error| target.closed(error.to_string()))?;
            Ok(stream)
        }
        (None, Some((_, error))) => Err(tcp_error(target, &error)),
        (None, None) => Err(ConnectError::NameNotFound {
            target: target.to_string(),
            host: target.host.clone(),
            reason: "the name has no address".into(),
        }),
    }
}

/// IPv6 and IPv4 by turns, beginning with the one that the system prefers: where one of them leads nowhere, it costs one
/// head start, however many addresses there are.
fn by_turns(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, other): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == first_is_v6);
    let (mut first, mut other) = (first.into_iter(), other.into_iter());
    let mut ordered = Vec::new();
    loop {
        let pair = [first.next(), other.next()];
        if pair == [None, None] {
            return ordered;
        }
        ordered.extend(pair.into_iter().flatten());
    }
}

async fn look_up(
    target: &Target,
    end: Instant,
    limit: Duration,
) -> Result<Vec<SocketAddr>, ConnectError> {
    match timeout_at(end, tokio::net::lookup_host((target.host.as_str(), target.port))).await {
        Ok(Ok(addresses)) => Ok(addresses.collect()),
        Ok(Err(error)) => Err(ConnectError::NameNotFound {
            target: target.to_string(),
            host: target.host.clone(),
            reason: error.to_string(),
        }),
        Err(_) => Err(target.timed_out("the name service did not answer", limit)),
    }
}

fn tcp_error(target: &Target, error: &io::Error) -> ConnectError {
    let target = target.to_string();
    match error.kind() {
        io::ErrorKind::ConnectionRefused => ConnectError::Refused { target },
        _ => ConnectError::Unreachable { target, reason: error.to_string() },
    }
}

async fn greet(
    target: &Target,
    config: Arc<ClientConfig>,
    named: impl Fn(Option<&[CertificateDer<'_>]>) -> Result<Principal, TlsError>,
    options: &ConnectOptions,
    tcp: TcpStream,
) -> Result<(TlsStream, Principal), ConnectError> {
    let name = ServerName::try_from(target.host.clone()).map_err(|_| ConnectError::Url {
        url: target.to_string(),
        reason: "the host is neither a DNS name nor an address".into(),
    })?;
    let connector = TlsConnector::from(config);
    let mut stream =
        connector.connect(name, tcp).await.map_err(|error| tls_error(target, &error))?;
    let peer = named(stream.get_ref().1.peer_certificates());
    let peer = check_peer(target, options, peer)?;
    match stream.fill_buf().await {
        Ok([]) => Err(target.closed("it closed the connection after the TLS handshake".into())),
        Ok(_) => Ok((stream, peer)),
        Err(error) => Err(tls_error(target, &error)),
    }
}

fn check_peer(
    target: &Target,
    options: &ConnectOptions,
    peer: Result<Principal, TlsError>,
) -> Result<Principal, ConnectError> {
    let wrong = |reason: String| ConnectError::WrongPeer { target: target.to_string(), reason };
    let peer = peer.map_err(|error| wrong(error.to_string()))?;
    if options.expect.admits(&peer.role) {
        return Ok(peer);
    }
    Err(wrong(format!("it is {peer}, not {}", options.expect.as_str())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families_take_turns() {
        let parse = |list: &str| -> Vec<SocketAddr> {
            list.split(' ').map(|host| format!("{host}:1").parse().unwrap()).collect()
        };
        let ordered = by_turns(parse("[::1] [::2] [::3] 10.0.0.1"));
        assert_eq!(ordered, parse("[::1] 10.0.0.1 [::2] [::3]"));
        assert_eq!(by_turns(parse("10.0.0.1 [::1]")), parse("10.0.0.1 [::1]"));
    }

    #[test]
    fn a_target_is_https_with_host_and_port() {
        for good in ["https://a:7421", "https://127.0.0.1:1", "https://[::1]:7421"] {
            assert_eq!(Target::parse(good).unwrap().to_string(), good);
        }
        assert_eq!(Target::parse("https://[::1]:7421").unwrap().authority(), "[::1]:7421");
        for (bad, says) in [
            ("http://a:7421", "write https://a:7421"),
            ("a:7421", "write https://a:7421"),
            ("https://a", "no port"),
            ("https://a:7421/x", "has a path"),
            ("https://u@a:7421", "no plain host"),
            ("https://", "not a URL"),
        ] {
            let error = Target::parse(bad).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains(bad), "{bad}: {error}");
        }
    }
}
