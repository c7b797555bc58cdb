//! Principals: who a certificate is for, and what it keeps its holder to.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::TlsError;
use crate::ids::{MachineKey, ServerId, check_name};

/// Our certificates begin less than this before they are issued, in seconds.
const ISSUED_WITHIN: i64 = 2 * 60 * 60;
/// Largest certificate accepted from a header or a handshake, in bytes; ours have about 700.
const MAX_CERTIFICATE_BYTES: usize = 8192;

/// What a principal is allowed to be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Role {
    /// A machine that backs itself up.
    Client(MachineKey),
    /// Who brings a machine back: it reads what that machine has, and writes nothing.
    Restore(MachineKey),
    /// A backup server.
    Server(ServerId),
    /// A router.
    Janus(ServerId),
    /// A person who owns machines, and may do more where a server's policy says so.
    User(String),
    /// A person who administers.
    Operator(String),
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(key) => write!(f, "client {key}"),
            Self::Restore(key) => write!(f, "restore of {key}"),
            Self::Server(id) => write!(f, "server {id}"),
            Self::Janus(id) => write!(f, "janus {id}"),
            Self::User(name) => write!(f, "user {name}"),
            Self::Operator(name) => write!(f, "operator {name}"),
        }
    }
}

impl Role {
    /// Role and name as they stand in the URI of a certificate of `group`.
    pub fn uri(&self, group: &str) -> String {
        match self {
            Self::Client(key) => format!("janus://{group}/client/{key}"),
            Self::Restore(key) => format!("janus://{group}/restore/{key}"),
            Self::Server(id) => format!("janus://{group}/server/{id}"),
            Self::Janus(id) => format!("janus://{group}/janus/{id}"),
            Self::User(name) => format!("janus://{group}/user/{name}"),
            Self::Operator(name) => format!("janus://{group}/operator/{name}"),
        }
    }

    /// The only machine that a client, or who restores one, may see.
    pub fn machine(&self) -> Option<&MachineKey> {
        match self {
            Self::Client(key) | Self::Restore(key) => Some(key),
            Self::Server(_) | Self::Janus(_) | Self::User(_) | Self::Operator(_) => None,
        }
    }
}

/// Who calls, as a certificate says.
#[derive(Clone, PartialEq, Eq)]
pub struct Principal {
    /// Group of certificates; principals of different groups don't talk to each other.
    pub group: Arc<str>,
    /// Role and name.
    pub role: Role,
    /// What the certificate keeps its holder to.
    pub limits: Limits,
    /// The certificate itself (DER), to forward.
    pub der: Bytes,
    /// Certificates between it and the authority, as they were shown (DER), to forward. Most have none.
    pub intermediates: Vec<Bytes>,
    /// A rule of `[pki]` says who it is, not the certificate itself.
    is_mapped: bool,
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.role.fmt(f)
    }
}

impl fmt::Debug for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.role, self.group)
    }
}

impl Principal {
    /// Whoever showed this certificate of our own kind.
    pub fn new(group: impl Into<Arc<str>>, role: Role, limits: Limits, der: Bytes) -> Self {
        let (intermediates, is_mapped) = (Vec::new(), false);
        Self { group: group.into(), role, limits, der, intermediates, is_mapped }
    }

    pub(super) fn mapped(group: Arc<str>, role: Role, limits: Limits, der: Bytes) -> Self {
        Self { is_mapped: true, ..Self::new(group, role, limits, der) }
    }

    /// True when a rule of `[pki]` says who it is: its certificate is of a PKI that isn't ours.
    pub fn is_mapped(&self) -> bool {
        self.is_mapped
    }

    /// True when both certificates are for one key.
    pub(super) fn has_key_of(&self, other: &Self) -> bool {
        let key = |der| {
            let (_, certificate) = X509Certificate::from_der(der).ok()?;
            Some(certificate.public_key().subject_public_key.data.to_vec())
        };
        key(&self.der).is_some_and(|own| key(&other.der) == Some(own))
    }

    pub(super) fn through(self, intermediates: Vec<Bytes>) -> Self {
        Self { intermediates, ..self }
    }

    /// Reads group, role and name of a certificate of our own kind. Checks neither its chain nor its dates.
    ///
    /// # Errors
    /// When it is no certificate, or has not exactly one URI SAN of the form `janus://<group>/<role>/…`.
    pub fn from_der(der: impl Into<Bytes>) -> Result<Self, TlsError> {
        let der = der.into();
        let (uri, limits) = uris(&der)?;
        let (group, role) =
            parse_uri(&uri).ok_or_else(|| no_role(format!("names no principal: {uri:?}")))?;
        Ok(Self::new(group, role, limits, der))
    }

    /// The URI that names it, whatever names its certificate has.
    pub fn uri(&self) -> String {
        self.role.uri(&self.group)
    }

    /// Unix seconds at which the certificate expires.
    pub fn expires(&self) -> i64 {
        self.validity().1
    }

    /// First and last moment of the certificate's validity, Unix seconds.
    pub fn validity(&self) -> (i64, i64) {
        validity(&self.der)
    }

    /// Unix seconds at which the certificate was issued, or, of one that was renewed, the first of them: see
    /// [`revoked`](crate::revoked).
    pub fn issued(&self) -> i64 {
        if let Some(enrolled) = self.limits.enrolled {
            return enrolled;
        }
        let Ok((_, certificate)) = X509Certificate::from_der(&self.der) else { return i64::MIN };
        let begins = certificate.validity().not_before.timestamp();
        if self.is_mapped {
            return begins;
        }
        let serial = uuid::Uuid::from_slice(certificate.raw_serial()).ok();
        let seconds = serial.and_then(|serial| serial.get_timestamp()).map(|time| time.to_unix().0);
        let said = seconds.and_then(|seconds| i64::try_from(seconds).ok());
        // Other authorities' serials are random: one that looks like ours by chance says another time.
        let is_near = |said: &i64| (0..=ISSUED_WITHIN).contains(&said.saturating_sub(begins));
        said.filter(is_near).unwrap_or(begins)
    }

    /// True when the certificate is for this key: the bits of its SubjectPublicKeyInfo.
    pub fn has_key(&self, key: &[u8]) -> bool {
        has_key(&self.der, key)
    }

    /// The only machine that it may see.
    pub fn machine(&self) -> Option<&MachineKey> {
        self.role.machine()
    }
}

pub(super) fn no_role(reason: impl Into<String>) -> TlsError {
    TlsError::NoRole { reason: reason.into() }
}

/// A certificate that is nothing else, and no larger than others are forwarded.
pub(super) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, TlsError> {
    if der.len() > MAX_CERTIFICATE_BYTES {
        return Err(no_role("is too large"));
    }
    let (rest, certificate) =
        X509Certificate::from_der(der).map_err(|_| no_role("is not a valid X.509 certificate"))?;
    match rest.is_empty() {
        true => Ok(certificate),
        false => Err(no_role("has bytes after its end")),
    }
}

/// The one URI SAN with scheme `janus`, and what those with scheme `janus-limit` say.
fn uris(der: &[u8]) -> Result<(String, Limits), TlsError> {
    let cert = parse(der)?;
    let names =
        cert.subject_alternative_name().map_err(|_| no_role("has an invalid list of names"))?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let mut limits = Limits::default();
    for limit in uris.clone().filter_map(|uri| uri.strip_prefix(LIMIT_SCHEME)) {
        limits.add(limit)?;
    }
    for enrolled in uris.clone().filter_map(|uri| uri.strip_prefix(ENROLLED_SCHEME)) {
        let seconds = enrolled.parse().map_err(|_| no_role("doesn't say when it was enrolled"))?;
        limits.enrolled = Some(limits.enrolled.map_or(seconds, |known: i64| known.min(seconds)));
    }
    let mut named = uris.filter(|uri| uri.starts_with("janus://"));
    match (named.next(), named.next()) {
        (Some(uri), None) => Ok((uri.to_string(), limits)),
        (Some(_), Some(_)) => Err(no_role("names more than one janus:// principal")),
        (None, _) => Err(no_role("names no janus:// principal")),
    }
}

/// Scheme of the URI SANs that keep the holder of a certificate to less than its role allows.
const LIMIT_SCHEME: &str = "janus-limit:";
/// Scheme of the URI SAN that says when the holder enrolled.
const ENROLLED_SCHEME: &str = "janus-enrolled:";

/// What a certificate keeps its holder to, by URI SANs `janus-limit:…`, one for each.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Limits {
    /// `janus-limit:proof`: calls that act for it through a janus carry a [`proof`](crate::proof).
    pub proof: bool,
    /// `janus-enrolled:SECONDS` (Unix time): when its holder enrolled. Renewed certificates keep that, others have none.
    pub enrolled: Option<i64>,
    /// `janus-limit:user=NAME`: a janus speaks for these users only. Empty: for all.
    pub users: Vec<String>,
}

impl Limits {
    /// A limit that isn't known can't be kept, so its certificate isn't believed.
    fn add(&mut self, limit: &str) -> Result<(), TlsError> {
        match limit.split_once('=') {
            None if limit == "proof" => self.proof = true,
            Some(("user", name)) => {
                check_name("user", name).map_err(|error| no_role(error.to_string()))?;
                self.users.push(name.to_string());
            }
            _ => return Err(no_role(format!("has a limit of a newer version: {limit:?}"))),
        }
        Ok(())
    }

    /// The URIs that say this.
    pub fn uris(&self) -> Vec<String> {
        let proof = self.proof.then(|| format!("{LIMIT_SCHEME}proof"));
        let users = self.users.iter().map(|user| format!("{LIMIT_SCHEME}user={user}"));
        let enrolled = self.enrolled.map(|seconds| format!("{ENROLLED_SCHEME}{seconds}"));
        proof.into_iter().chain(enrolled).chain(users).collect()
    }
}

fn parse_uri(uri: &str) -> Option<(&str, Role)> {
    let parts: Vec<&str> = uri.strip_prefix("janus://")?.split('/').collect();
    let role = match parts.as_slice() {
        [_, "client", user, machine] => Role::Client(MachineKey::new(user, machine).ok()?),
        [_, "restore", user, machine] => Role::Restore(MachineKey::new(user, machine).ok()?),
        [_, "server", name] => Role::Server(name.parse().ok()?),
        [_, "janus", name] => Role::Janus(name.parse().ok()?),
        [_, "user", name] => {
            check_name("user", name).ok()?;
            Role::User((*name).to_string())
        }
        [_, "operator", name] => {
            check_name("operator", name).ok()?;
            Role::Operator((*name).to_string())
        }
        _ => return None,
    };
    check_name("group", parts[0]).ok()?;
    Some((parts[0], role))
}

/// First and last moment of a certificate's validity, Unix seconds; 0 and 0 of what is none.
pub(crate) fn validity(der: &[u8]) -> (i64, i64) {
    X509Certificate::from_der(der).map_or((0, 0), |(_, certificate)| {
        let validity = certificate.validity();
        (validity.not_before.timestamp(), validity.not_after.timestamp())
    })
}

/// True when a certificate is for this key: the bits of its SubjectPublicKeyInfo.
pub fn has_key(der: &[u8], key: &[u8]) -> bool {
    X509Certificate::from_der(der)
        .is_ok_and(|(_, certificate)| *certificate.public_key().subject_public_key.data == *key)
}

/// The common name of a certificate's subject.
pub fn common_name(der: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let name = certificate.subject().iter_common_name().next()?.as_str().ok()?;
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_names_one_principal() {
        let (group, role) = parse_uri("janus://home/client/alice/web1").unwrap();
        assert_eq!((group, role.to_string().as_str()), ("home", "client alice/web1"));
        assert_eq!(parse_uri("janus://g/server/a").unwrap().1, Role::Server("a".parse().unwrap()));
        for bad in [
            "janus://g/server",
            "janus://g/server/a/b",
            "janus://g/client/a",
            "janus://g/user/a/b",
            "janus:///server/a",
            "janus://g/root/a",
            "janus://g/server/..",
            "https://g/server/a",
        ] {
            assert!(parse_uri(bad).is_none(), "{bad}");
        }
    }
}
