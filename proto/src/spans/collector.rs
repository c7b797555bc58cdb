//! The connection to a collector: HTTP/2, with TLS where its URL says https.
//!
//! Its certificate is checked against the authorities that this system trusts, which `SSL_CERT_FILE` may name: a collector
//! is not of our group.

use std::{error::Error, io, sync::Arc, time::Duration};

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::trust::trusting;

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Connects with the first call, and again after each loss. Needs a tokio runtime.
pub(super) fn channel(endpoint: &str, deadline: Duration) -> Result<Channel, String> {
    let failed = |error: &dyn Error| error.to_string();
    let to = Endpoint::from_shared(endpoint.to_owned()).map_err(|error| failed(&error))?;
    let tls = match endpoint.starts_with("https:") {
        true => Some(TlsConnector::from(Arc::new(tls()?))),
        false => None,
    };
    let connector = service_fn(move |uri: Uri| {
        let tls = tls.clone();
        async move { connect(&uri, tls).await.map(TokioIo::new) }
    });
    Ok(to.connect_timeout(deadline).timeout(deadline).connect_with_connector_lazy(connector))
}

async fn connect(uri: &Uri, tls: Option<TlsConnector>) -> io::Result<Box<dyn Stream>> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let port = uri.port_u16().unwrap_or(if tls.is_some() { 443 } else { 80 });
    let tcp = TcpStream::connect((host, port)).await?;
    tcp.set_nodelay(true)?;
    let Some(tls) = tls else { return Ok(Box::new(tcp)) };
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    Ok(Box::new(tls.connect(name, tcp).await?))
}

fn tls() -> Result<ClientConfig, String> {
    let mut config = trusting(None)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}
