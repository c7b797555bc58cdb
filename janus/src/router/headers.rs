//! Metadata of calls: what is believed, what is dropped, what is added.

use std::sync::Arc;

use base64::{Engine, prelude::BASE64_STANDARD};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use janus_proto::{
    error::{ErrorReason, status},
    ids::{BackupId, MachineKey, ServerId},
    metadata,
    tls::Principal,
};
use tokio::time::Instant;
use tonic::Status;

use crate::{balance::Skipped, registry::Registry};

/// Longest value of `janus-skipped` and `janus-warning`, so that many of them stay below the header limit.
const MAX_TEXT_BYTES: usize = 300;
/// Headers of one connection, which mean nothing on the next.
const HOP_BY_HOP: [HeaderName; 6] = [
    header::CONNECTION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::HOST,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// What a call says of itself.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub principal: Arc<Principal>,
    pub machine: Option<MachineKey>,
    pub pin: Option<ServerId>,
    pub run: Option<BackupId>,
    pub asked_use: u64,
    /// When its call came.
    pub begun: Instant,
}

impl Caller {
    /// Reads and checks the metadata.
    pub fn read(principal: Arc<Principal>, headers: &HeaderMap) -> Result<Self, Status> {
        let named: Option<MachineKey> = value(headers, metadata::MACHINE)?;
        let machine = named.or_else(|| principal.machine().cloned());
        let pin = value(headers, metadata::SERVER)?;
        let run = value(headers, metadata::RUN)?;
        let asked_use = number(headers, metadata::USE)?.unwrap_or(0);
        Ok(Self { principal, machine, pin, run, asked_use, begun: Instant::now() })
    }

    /// That the machine is the caller's, or one that groups give, as far as servers have reported: what the server that gets
    /// the call decides doesn't undo a turn that was taken from another machine.
    ///
    /// # Errors
    /// `NOT_ALLOWED`.
    pub fn check_machine(&self, registry: &Registry, is_write: bool) -> Result<(), Status> {
        let Some(machine) = &self.machine else { return Ok(()) };
        if self.principal.machine() == Some(machine) {
            return Ok(());
        }
        let sight = registry.sight(&self.principal);
        let is_given = if is_write { sight.may_write(machine) } else { sight.may_name(machine) };
        if is_given {
            return Ok(());
        }
        let message = match self.principal.machine() {
            Some(own) => {
                format!(
                    "this certificate belongs to machine {own}, not to {machine} (janus-machine)"
                )
            }
            None => format!("{} may not act for machine {machine}", self.principal),
        };
        Err(status(ErrorReason::NotAllowed, message))
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<Option<&'a str>, Status> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    value.to_str().map(Some).map_err(|_| invalid(name, "is not ASCII"))
}

fn value<T: std::str::FromStr<Err: std::fmt::Display>>(
    headers: &HeaderMap,
    name: &'static str,
) -> Result<Option<T>, Status> {
    let Some(text) = text(headers, name)? else { return Ok(None) };
    text.parse().map(Some).map_err(|error| invalid(name, error))
}

/// A number in a header.
pub(crate) fn number(headers: &HeaderMap, name: &'static str) -> Result<Option<u64>, Status> {
    value::<u64>(headers, name)
}

fn invalid(name: &'static str, reason: impl std::fmt::Display) -> Status {
    status(ErrorReason::InvalidField, format!("metadata {name}: {reason}"))
}

/// Headers as the server gets them: the caller's, less those of the connection, with the caller's certificate.
pub(crate) fn for_server(mut headers: HeaderMap, principal: &Principal) -> HeaderMap {
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
    // Whoever sends `janus-principal` to us could otherwise speak as somebody else.
    headers.remove(metadata::PRINCIPAL);
    if let Ok(value) = HeaderValue::from_str(&BASE64_STANDARD.encode(&principal.der)) {
        headers.insert(metadata::PRINCIPAL, value);
    }
    headers.remove(metadata::INTERMEDIATES);
    let between = metadata::certificates_to_text(&principal.intermediates);
    if let Some(value) = HeaderValue::from_str(&between).ok().filter(|value| !value.is_empty()) {
        headers.insert(metadata::INTERMEDIATES, value);
    }
    headers
}

/// Completes an answer: who gave it, unless it says so itself.
pub(crate) fn name_answer(headers: &mut HeaderMap, server: &str) {
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
    if let Ok(value) = HeaderValue::from_str(server) {
        headers.entry(metadata::SERVER).or_insert(value);
    }
}

/// Adds the servers that were passed over.
pub(crate) fn add_skipped(headers: &mut HeaderMap, skipped: &[Skipped]) {
    add_texts(headers, metadata::SKIPPED, skipped.iter().map(ToString::to_string));
}

/// Adds what an administrator should look at.
pub(crate) fn add_warnings(headers: &mut HeaderMap, warnings: Vec<String>) {
    add_texts(headers, metadata::WARNING, warnings.into_iter());
}

fn add_texts(headers: &mut HeaderMap, name: &'static str, texts: impl Iterator<Item = String>) {
    let plain = |c: char| if c.is_ascii_graphic() || c == ' ' { c } else { '?' };
    for text in texts {
        let text: String = text.chars().map(plain).take(MAX_TEXT_BYTES).collect();
        if let Ok(value) = HeaderValue::from_str(&text) {
            headers.append(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use janus_proto::{
        pb::{Grant, Grants, report_request::Event},
        tls::Role,
    };

    use super::*;

    fn principal(role: Role) -> Arc<Principal> {
        let certificate = Bytes::from_static(b"certificate");
        Arc::new(Principal::new("home", role, Default::default(), certificate))
    }

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|&(name, text)| (HeaderName::from_static(name), HeaderValue::from_static(text)))
            .collect()
    }

    #[test]
    fn a_client_speaks_for_its_own_machine_only() {
        let client = principal(Role::Client("alice/web".parse().unwrap()));
        let own = Caller::read(client.clone(), &HeaderMap::new()).unwrap();
        assert_eq!(own.machine, Some("alice/web".parse().unwrap()));
        let registry = Registry::new();
        let read = |principal: &Arc<Principal>| {
            Caller::read(principal.clone(), &headers(&[(metadata::MACHINE, "alice/db")])).unwrap()
        };
        let operator = principal(Role::Operator("root".into()));
        let named = read(&operator);
        assert_eq!(named.machine, Some("alice/db".parse().unwrap()));
        let (may, other) = (|caller: &Caller| caller.check_machine(&registry, true), read(&client));
        // Nobody has told yet what groups may do.
        may(&other).unwrap();
        let hello = Default::default();
        let report = registry.open_report(&"a".parse().unwrap(), &hello).unwrap();
        let refused = may(&other).unwrap_err();
        assert_eq!(janus_proto::error::reason(&refused), Some(ErrorReason::NotAllowed));
        may(&named).unwrap();
        let grant = Grant {
            members: vec!["alice/web".into(), "alice".into()],
            backup: vec!["alice/db".into()],
            ..Default::default()
        };
        let grants = Grants { grants: vec![grant], ..Default::default() };
        report.take(1, Some(Event::Grants(grants))).unwrap();
        may(&other).unwrap();
        may(&read(&principal(Role::User("Alice".into())))).unwrap();
        may(&read(&principal(Role::User("bob".into())))).unwrap_err();
        may(&read(&principal(Role::Restore("alice/web".parse().unwrap())))).unwrap_err();
    }

    #[test]
    fn malformed_metadata_is_refused_by_name() {
        let operator = principal(Role::Operator("root".into()));
        for name in [metadata::MACHINE, metadata::SERVER, metadata::RUN, metadata::USE] {
            let refused =
                Caller::read(operator.clone(), &headers(&[(name, "../x y")])).unwrap_err();
            assert_eq!(
                janus_proto::error::reason(&refused),
                Some(ErrorReason::InvalidField),
                "{name}"
            );
            assert!(refused.message().contains(name), "{}", refused.message());
        }
    }

    #[test]
    fn a_foreign_principal_is_replaced_and_te_stays() {
        let client = principal(Role::Client("alice/web".parse().unwrap()));
        let mut sent =
            headers(&[("te", "trailers"), ("connection", "close"), ("grpc-timeout", "5S")]);
        sent.append(metadata::PRINCIPAL, HeaderValue::from_static("Zm9yZ2Vk"));
        sent.append(metadata::PRINCIPAL, HeaderValue::from_static("dHdpY2U="));
        sent.append(metadata::INTERMEDIATES, HeaderValue::from_static("Zm9yZ2Vk"));
        let out = for_server(sent.clone(), &client);
        assert!(out.get(metadata::INTERMEDIATES).is_none());
        let between = vec![Bytes::from_static(b"one"), Bytes::from_static(b"two")];
        let mut of_a_pki = (*client).clone();
        of_a_pki.intermediates.clone_from(&between);
        let with_them = for_server(sent, &of_a_pki);
        let values: Vec<_> = with_them.get_all(metadata::INTERMEDIATES).iter().collect();
        let read = |value: &HeaderValue| metadata::certificates_of_text(value.as_bytes()).unwrap();
        assert_eq!(values.iter().map(|value| read(value)).collect::<Vec<_>>(), [between]);
        let principals: Vec<_> = out.get_all(metadata::PRINCIPAL).iter().collect();
        assert_eq!(principals, [BASE64_STANDARD.encode("certificate").as_str()]);
        assert!(out.get("connection").is_none());
        assert_eq!(
            (out["te"].as_bytes(), out["grpc-timeout"].as_bytes()),
            (&b"trailers"[..], &b"5S"[..])
        );
    }

    #[test]
    fn reasons_become_plain_headers() {
        let mut out = HeaderMap::new();
        let reason = format!("line\nbreak ü {}", "x".repeat(1000));
        add_skipped(&mut out, &[Skipped { server: "a".into(), reason }]);
        let text = out[metadata::SKIPPED].to_str().unwrap();
        assert!(text.starts_with("a: line?break ? xxx") && text.len() == MAX_TEXT_BYTES);
    }
}
