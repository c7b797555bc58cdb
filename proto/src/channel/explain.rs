//! What went wrong with a connection, in one line with the way out.

use std::{error::Error, io, time::Duration};

use rustls::CertificateError;
use tonic::{Code, Status};

use super::Target;
use crate::tls::describe;

/// Why there is no connection. Each text is one line that names the peer and the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The URL is wrong.
    #[error("URL {url:?}: {reason}")]
    Url {
        /// As given.
        url: String,
        /// What is wrong, and how it should be.
        reason: String,
    },
    /// The host name has no address.
    #[error("{target}: host {host:?} not found ({reason}); check the name in the URL")]
    NameNotFound {
        /// The peer's URL.
        target: String,
        /// Host of the URL.
        host: String,
        /// The resolver's reason.
        reason: String,
    },
    /// Nobody listens there.
    #[error(
        "{target}: connection refused; nothing listens there: check that it runs, and host and port of the URL"
    )]
    Refused {
        /// The peer's URL.
        target: String,
    },
    /// TCP can't reach it.
    #[error("{target}: can't connect: {reason}; check network and firewall")]
    Unreachable {
        /// The peer's URL.
        target: String,
        /// The system's reason.
        reason: String,
    },
    /// A step took too long.
    #[error(
        "{target}: timed out after {after:?}: {what}; check that it runs and that no firewall is in between"
    )]
    TimedOut {
        /// The peer's URL.
        target: String,
        /// What was waited for.
        what: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// It answered with something that isn't TLS.
    #[error("{target}: the peer speaks no TLS; check the port, this may be another program's")]
    NoTls {
        /// The peer's URL.
        target: String,
    },
    /// Its certificate isn't for the name we called it by.
    #[error(
        "{target}: its certificate is not for host {host:?} but for: {names}; use one of these in the URL, issue it with --host {host}, or see pki.check_hosts of the settings"
    )]
    WrongName {
        /// The peer's URL.
        target: String,
        /// Host of the URL.
        host: String,
        /// Names in the certificate.
        names: String,
    },
    /// Its certificate was refused by us.
    #[error("{target}: its certificate {reason}; {way_out}")]
    PeerCertificate {
        /// The peer's URL.
        target: String,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        way_out: &'static str,
    },
    /// It refused our certificate.
    #[error(
        "{target}: the peer refused us: {reason}; check `cert`, `key` and `ca` of the settings, and issue a new certificate with `janus-server pki issue` where needed"
    )]
    OurCertificate {
        /// The peer's URL.
        target: String,
        /// Its reason.
        reason: String,
    },
    /// It has another role or belongs to another group.
    #[error("{target}: wrong peer: {reason}; check the URL")]
    WrongPeer {
        /// The peer's URL.
        target: String,
        /// Who it is.
        reason: String,
    },
    /// The proxy on the way doesn't lead there.
    #[error(
        "{target}: proxy {proxy} {reason}; check `proxy` of the settings and https_proxy of the environment"
    )]
    Proxy {
        /// The peer's URL.
        target: String,
        /// Host and port of the proxy.
        proxy: String,
        /// What it did.
        reason: String,
    },
    /// The connection ended while it was set up.
    #[error("{target}: connection lost: {reason}; it may be restarting or full, its log says more")]
    Closed {
        /// The peer's URL.
        target: String,
        /// How it ended.
        reason: String,
    },
}

impl ConnectError {
    /// Why a host is not reached by TCP, without its name.
    pub(super) fn reason(&self) -> String {
        match self {
            Self::NameNotFound { reason, .. } => format!("host not found ({reason})"),
            Self::Refused { .. } => "connection refused".into(),
            Self::Unreachable { reason, .. } => reason.clone(),
            Self::TimedOut { after, .. } => format!("no answer within {after:?}"),
            other => other.to_string(),
        }
    }

    /// The connect error among the causes of `error`, if there is one.
    pub fn in_chain(error: &(dyn Error + 'static)) -> Option<Self> {
        causes(error).find_map(|cause| cause.downcast_ref::<Self>().cloned())
    }
}

impl From<ConnectError> for Status {
    fn from(error: ConnectError) -> Self {
        let mut status = Status::unavailable(error.to_string());
        status.set_source(std::sync::Arc::new(error));
        status
    }
}

/// One line on why a call failed: what the peer said, or what happened to the connection.
pub fn explain(status: &Status) -> String {
    if let Some(cause) = status.source() {
        return explain_error(cause);
    }
    match status.message() {
        "" => format!("the call ended with {:?} and no message", status.code()),
        message if status.code() == Code::Unknown => {
            format!("unexpected answer: {}", one_line(message))
        }
        message => one_line(message),
    }
}

/// One line on an error of a connection: looks through all its causes.
pub fn explain_error(error: &(dyn Error + 'static)) -> String {
    if let Some(known) = ConnectError::in_chain(error) {
        return known.to_string();
    }
    // HTTP/2 keeps only the text of what TLS said, so the alert is looked for in the text.
    if let Some(reason) = causes(error).find_map(|cause| alert_in(&cause.to_string())) {
        return format!(
            "the peer refused us: {reason}; check `cert`, `key` and `ca` of the settings"
        );
    }
    let root = causes(error).last().map_or_else(|| error.to_string(), ToString::to_string);
    // What rustls says ends in a link to its own documentation.
    if root.contains("close_notify") {
        return "connection lost: the peer ended without closing it".into();
    }
    format!("connection lost: {}", one_line(&root))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// `error` and its causes, also those that hide inside an `io::Error`.
fn causes<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    std::iter::successors(Some(error), |cause| {
        let cause: &'e (dyn Error + 'static) = *cause;
        // `io::Error::source` skips the error it wraps.
        let wrapped = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        wrapped.map(|inner| inner as &(dyn Error + 'static)).or_else(|| cause.source())
    })
    .take(32)
}

/// Errors of the TLS handshake and of the first read after it.
pub(super) fn tls_error(target: &Target, error: &io::Error) -> ConnectError {
    let Some(tls) = causes(error).find_map(|cause| cause.downcast_ref::<rustls::Error>()) else {
        return target.closed(match error.kind() {
            io::ErrorKind::UnexpectedEof => "it closed the connection in the TLS handshake".into(),
            _ => one_line(&error.to_string()),
        });
    };
    let named = target.to_string();
    match tls {
        rustls::Error::InvalidMessage(_) => ConnectError::NoTls { target: named },
        rustls::Error::InvalidCertificate(problem) => certificate_error(target, tls, problem),
        rustls::Error::AlertReceived(alert) => match alert_reason(&format!("{alert:?}")) {
            Some(reason) => ConnectError::OurCertificate { target: named, reason },
            None => target.closed(format!("the peer ended the TLS handshake with {alert:?}")),
        },
        other => target.closed(one_line(&other.to_string())),
    }
}

fn certificate_error(
    target: &Target,
    error: &rustls::Error,
    problem: &CertificateError,
) -> ConnectError {
    use CertificateError as C;
    let way_out = match problem {
        C::NotValidForNameContext { presented, .. } => {
            let names =
                presented.iter().map(|name| plain_name(name)).collect::<Vec<_>>().join(", ");
            let (target, host) = (target.to_string(), target.host().to_string());
            return ConnectError::WrongName { target, host, names };
        }
        C::UnknownIssuer | C::BadSignature => {
            "check that `ca` of the settings is the ca.pem of this peer's group, or that pki.ca holds its authority"
        }
        _ => "issue a new one with `janus-server pki issue` on the host of the CA, or by its PKI",
    };
    ConnectError::PeerCertificate { target: target.to_string(), reason: describe(error), way_out }
}

/// `DnsName("a")` and `IpAddress(127.0.0.1)`, as webpki prints them, without the wrapping.
fn plain_name(name: &str) -> String {
    let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(name);
    inner.trim_matches('"').to_string()
}

fn alert_in(text: &str) -> Option<String> {
    let (_, alert) = text.split_once("received fatal alert: ")?;
    let end = alert.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(alert.len());
    alert_reason(&alert[..end])
}

/// What an alert says about our certificate; `None` for alerts about something else.
fn alert_reason(alert: &str) -> Option<String> {
    Some(match alert {
        "CertificateRequired" => "it asks for a client certificate and got none".into(),
        "CertificateExpired" => "our certificate has expired".into(),
        "UnknownCA" | "DecryptError" => {
            "our certificate was issued by a CA that it doesn't know".into()
        }
        "BadCertificate"
        | "UnsupportedCertificate"
        | "CertificateRevoked"
        | "CertificateUnknown"
        | "AccessDenied" => {
            format!("it did not accept our certificate ({alert})")
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alert_is_found_in_what_http2_leaves_of_it() {
        let tls = rustls::Error::AlertReceived(rustls::AlertDescription::CertificateExpired);
        let flattened = io::Error::other(format!("connection error: {tls}"));
        assert!(explain_error(&flattened).contains("our certificate has expired"));
    }

    #[test]
    fn a_connect_error_survives_as_the_source_of_a_status() {
        let error = ConnectError::Refused { target: "https://a:1".into() };
        assert_eq!(explain(&Status::from(error.clone())), error.to_string());
    }
}
