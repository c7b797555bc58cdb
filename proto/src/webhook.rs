//! Messages to a webhook: a POST of JSON by HTTP/1.1, one attempt each. Deadlines are the caller's.

use std::path::Path;

use bytes::Bytes;
use http::{Method, Request, Uri, header};
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;

use crate::trust;

/// Why a message wasn't taken.
#[derive(Debug, thiserror::Error)]
pub enum DeliverError {
    /// It can't be set up like this.
    #[error("{0}")]
    Setup(String),
    /// No answer.
    #[error("{0}")]
    Lost(String),
    /// The receiver doesn't want it.
    #[error("answered {0}")]
    Refused(String),
}

/// A receiver of messages.
#[derive(Clone)]
pub struct Webhook {
    url: Uri,
    /// Keeps connections.
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl Webhook {
    /// At this URL. `https` is checked against the authorities in the file `ca`, or else those that this system trusts.
    ///
    /// # Errors
    /// When the URL is none, or there is nobody to trust.
    pub fn new(url: &str, ca: Option<&Path>) -> Result<Self, DeliverError> {
        let wrong = |why: &str| DeliverError::Setup(format!("{:?} {why}", without_secrets(url)));
        let uri: Uri = url.parse().map_err(|_| wrong("is not a URL"))?;
        let is_http = matches!(uri.scheme_str(), Some("http" | "https"));
        if !is_http || uri.host().is_none_or(str::is_empty) {
            return Err(wrong("is not a URL: write https://HOST/PATH"));
        }
        let tls = match uri.scheme_str() {
            Some("https") => trust::trusting(ca),
            _ => trust::nobody(),
        };
        let tls = tls.map_err(DeliverError::Setup)?;
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .build();
        let client = Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self { url: uri, client })
    }

    /// One attempt to deliver; `agent` is the program's name.
    ///
    /// # Errors
    /// When the receiver hasn't taken it for certain.
    pub async fn post(&self, agent: &str, message: &Value) -> Result<(), DeliverError> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(&self.url)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, format!("{agent}/{}", env!("CARGO_PKG_VERSION")))
            .body(Full::new(Bytes::from(message.to_string())))
            .map_err(|error| DeliverError::Setup(error.to_string()))?;
        let answer = self
            .client
            .request(request)
            .await
            .map_err(|error| DeliverError::Lost(crate::channel::explain_error(&error)))?;
        match answer.status() {
            status if status.is_success() => Ok(()),
            status => Err(DeliverError::Refused(status.to_string())),
        }
    }
}

// Who has its URL can write to it.
impl std::fmt::Debug for Webhook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Webhook({})", without_secrets(&self.url.to_string()))
    }
}

/// The beginning of a URL up to its host: names, passwords, paths and queries may be secrets.
fn without_secrets(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let authority = &rest[..end];
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let more = if end < rest.len() { "/…" } else { "" };
    match scheme {
        "" => format!("{host}{more}"),
        scheme => format!("{scheme}://{host}{more}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_host_alone() {
        for (url, said) in [
            ("https://user:secret@h.example/secret?secret", "https://h.example/…"),
            ("https://h.example:8443", "https://h.example:8443"),
            ("user:secret@h.example/secret", "h.example/…"),
            ("", ""),
        ] {
            assert_eq!(without_secrets(url), said);
        }
        let wrong = Webhook::new("ftp://user:secret@h.example/secret", None).unwrap_err();
        assert!(!wrong.to_string().contains("secret"), "{wrong}");
    }

    #[test]
    fn only_urls_are_webhooks() {
        for wrong in ["", "example.org", "ftp://example.org/", "https://"] {
            assert!(Webhook::new(wrong, None).is_err(), "{wrong}");
        }
        assert!(Webhook::new("http://127.0.0.1:1/x", None).is_ok());
    }
}
