//! The CA of a group, opened: it signs certificates for keys that it needn't see.

use std::{fs, net::IpAddr, path::Path, time::Duration};

use janus_proto::tls::{
    Limits, Role, ca_group, common_name, has_key,
    pki_types::{CertificateDer, pem::PemObject},
};
use pem::{EncodeConfig, LineEnding, Pem};
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use time::OffsetDateTime;

use zeroize::Zeroizing;

use super::PkiError;

/// Certificates start this long before now, so that hosts whose clocks are a little late accept them at once.
const CLOCK_SLACK: Duration = Duration::from_secs(60 * 60);

/// What a certificate is to say.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Who it is for.
    pub role: Role,
    /// What it keeps its holder to.
    pub limits: Limits,
    /// DNS names and addresses of a server or janus.
    pub hosts: Vec<String>,
    /// From now on.
    pub valid: Duration,
}

impl Wanted {
    /// A certificate of a role, with the limits that it has by default: who opens snapshots through a janus and has no part in
    /// routing proves each time that it is he who wants it.
    pub fn new(role: Role, hosts: Vec<String>, valid: Duration) -> Self {
        let proof = matches!(role, Role::Operator(_) | Role::User(_) | Role::Restore(_));
        Self { role, limits: Limits { proof, ..Limits::default() }, hosts, valid }
    }
}

/// A CA with its key.
pub struct Authority {
    group: String,
    bundle: String,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Opens the CA in `folder`, as `pki init` wrote it. Of several certificates in its `ca.pem` the one that fits `ca.key` signs.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn open(folder: &Path) -> Result<Self, PkiError> {
        // The group is said better by its own error.
        ca_group(&folder.join("ca.pem"))?;
        let key = Zeroizing::new(read(&folder.join("ca.key"))?);
        Self::of(&read(&folder.join("ca.pem"))?, &key)
    }

    /// Of a bundle and a key, both PEM.
    pub(super) fn of(bundle: &str, key: &str) -> Result<Self, PkiError> {
        let key = KeyPair::from_pem(key)?;
        let public = key.public_key_raw();
        let certificate = certificates(bundle)?.into_iter().find(|der| has_key(der, public));
        let certificate = certificate.ok_or_else(|| PkiError::Bundle {
            reason: "none of its certificates fits ca.key".into(),
        })?;
        let group = common_name(&certificate)
            .ok_or_else(|| PkiError::Bundle { reason: "its subject names no group".into() })?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        Ok(Self { group, bundle: bundle.to_owned(), certificate, issuer })
    }

    /// Certificates that hosts of the group believe, PEM.
    pub fn bundle(&self) -> &str {
        &self.bundle
    }

    /// Its own certificate, PEM.
    pub fn certificate_pem(&self) -> String {
        let lines = EncodeConfig::new().set_line_ending(LineEnding::LF);
        pem::encode_config(&Pem::new("CERTIFICATE", self.certificate.to_vec()), lines)
    }

    /// Certifies a key; answers the certificate, PEM.
    ///
    /// # Errors
    /// When a server or janus has no host, or a host is not a name.
    pub fn certify(&self, wanted: &Wanted, key: &impl PublicKeyData) -> Result<String, PkiError> {
        Ok(leaf(&self.group, wanted)?.signed_by(key, &self.issuer)?.pem())
    }
}

fn leaf(group: &str, wanted: &Wanted) -> Result<CertificateParams, PkiError> {
    let Wanted { role, limits, hosts, valid } = wanted;
    let (name, serves) = match role {
        Role::Server(id) | Role::Janus(id) => (id.as_str(), true),
        Role::Client(key) | Role::Restore(key) => (key.machine(), false),
        Role::User(name) | Role::Operator(name) => (name.as_str(), false),
    };
    let mut params = params(name, *valid)?;
    params.subject_alt_names = host_names(serves, hosts)?;
    for uri in std::iter::once(role.uri(group)).chain(limits.uris()) {
        params.subject_alt_names.push(SanType::URI(uri.try_into()?));
    }
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Servers and janus also call each other.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if serves {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    Ok(params)
}

fn host_names(serves: bool, hosts: &[String]) -> Result<Vec<SanType>, PkiError> {
    if serves == hosts.is_empty() {
        let (role, reason) = match serves {
            true => ("server|janus", "needs --host for each name or address it is called by"),
            false => ("client|restore|operator", "takes no --host: nobody connects to it"),
        };
        return Err(PkiError::Flags { role, reason });
    }
    hosts.iter().map(|host| host_name(host)).collect()
}

fn host_name(host: &str) -> Result<SanType, PkiError> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let invalid = || PkiError::Host { host: host.to_string() };
    let fits = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if host.is_empty() || !host.chars().all(fits) || host.starts_with(['.', '-']) {
        return Err(invalid());
    }
    Ok(SanType::DnsName(host.to_string().try_into().map_err(|_| invalid())?))
}

/// What all certificates have.
pub(super) fn params(name: &str, valid: Duration) -> Result<CertificateParams, PkiError> {
    let mut params = CertificateParams::default();
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SLACK;
    params.not_after = time::Duration::try_from(valid)
        .ok()
        .and_then(|valid| now.checked_add(valid))
        .ok_or(PkiError::Validity)?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Janus Backup");
    params.distinguished_name.push(DnType::CommonName, name);
    // It begins with the time, which revocation goes by: see `janus_proto::revoked`.
    params.serial_number = Some(SerialNumber::from_slice(&uuid::Uuid::now_v7().as_bytes()[..]));
    Ok(params)
}

pub(super) fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::Read { path: path.into(), source })
}

/// All certificates of a file, PEM.
pub(super) fn certificates(bundle: &str) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bundle.as_bytes()).collect();
    all.map_err(|error| PkiError::Bundle { reason: error.to_string() })
}
