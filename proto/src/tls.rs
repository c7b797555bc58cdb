//! Who we are and who they are: identities from certificate files, principals from certificates.
//!
//! TLS 1.3 with certificates on both sides, always. A certificate's URI SAN `janus://<group>/<role>/…` is the only
//! source of a peer's role and name; its chain and dates are checked against the CA of [`Identity::load`].
//! Sessions are never resumed, so an expired certificate is noticed at the next connection.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use bytes::Bytes;
use rustls::{
    CertificateError, ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    version::TLS13,
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::ids::{MachineKey, ServerId, check_name};

/// Largest certificate accepted from a header or a handshake, in bytes; ours have about 700.
const MAX_CERTIFICATE_BYTES: usize = 8192;

/// Why an identity can't be loaded or a certificate isn't believed. Each text is one line with the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// A setting that must name a file is empty.
    #[error(
        "setting `{setting}` is empty: it names the {what} file (`janus-server pki issue` makes one)"
    )]
    NotSet {
        /// Name of the setting.
        setting: &'static str,
        /// What the file holds.
        what: &'static str,
    },
    /// A file can't be read.
    #[error("can't read {what} file {path}: {reason}; check the path and its permissions")]
    Read {
        /// What the file holds.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// A file holds something else.
    #[error(
        "{path} holds no {what} in PEM form: {reason}; use the files that `janus-server pki issue` wrote"
    )]
    Format {
        /// What the file should hold.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The private key belongs to another certificate.
    #[error(
        "key {key} doesn't belong to certificate {cert}; use cert.pem and key.pem of the same folder"
    )]
    KeyMismatch {
        /// Certificate file.
        cert: PathBuf,
        /// Key file.
        key: PathBuf,
    },
    /// Our certificate has expired.
    #[error(
        "certificate {cert} expired on {not_after}; issue a new one with `janus-server pki issue`"
    )]
    Expired {
        /// Certificate file.
        cert: PathBuf,
        /// End of its validity.
        not_after: String,
    },
    /// Our certificate was not issued by our CA.
    #[error(
        "certificate {cert} was not issued by the CA in {ca}; use the ca.pem that was written beside it"
    )]
    OtherCa {
        /// Certificate file.
        cert: PathBuf,
        /// CA file.
        ca: PathBuf,
    },
    /// Our certificate can't be used for another reason.
    #[error("certificate {cert} can't be used: {reason}")]
    Unusable {
        /// Certificate file.
        cert: PathBuf,
        /// Why.
        reason: String,
    },
    /// A certificate carries no usable role.
    #[error("certificate {reason}; issue one with `janus-server pki issue`")]
    NoRole {
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate was refused: chain, dates or purpose.
    #[error("certificate of {subject} {reason}")]
    Refused {
        /// Principal named by it.
        subject: String,
        /// Why.
        reason: String,
    },
    /// A certificate of another group.
    #[error("certificate of {subject} belongs to group {theirs:?}, this is group {ours:?}")]
    OtherGroup {
        /// Principal named by it.
        subject: String,
        /// Our group.
        ours: String,
        /// Its group.
        theirs: String,
    },
}

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
            Self::Operator(name) => write!(f, "operator {name}"),
        }
    }
}

impl Role {
    /// The only machine that a client, or who restores one, may see.
    pub fn machine(&self) -> Option<&MachineKey> {
        match self {
            Self::Client(key) | Self::Restore(key) => Some(key),
            Self::Server(_) | Self::Janus(_) | Self::Operator(_) => None,
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
    /// The certificate itself (DER), to forward.
    pub der: Bytes,
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
    /// Reads group, role and name of a certificate. Checks neither its chain nor its dates.
    ///
    /// # Errors
    /// When it is no certificate, or has not exactly one URI SAN of the form `janus://<group>/<role>/…`.
    pub fn from_der(der: impl Into<Bytes>) -> Result<Self, TlsError> {
        let der = der.into();
        let uri = janus_uri(&der)?;
        let (group, role) =
            parse_uri(&uri).ok_or_else(|| no_role(format!("names no principal: {uri:?}")))?;
        Ok(Self { group: group.into(), role, der })
    }

    /// Unix seconds at which the certificate expires.
    pub fn expires(&self) -> i64 {
        // It was parsed when the principal was made, so it parses.
        X509Certificate::from_der(&self.der)
            .map_or(0, |(_, certificate)| certificate.validity().not_after.timestamp())
    }

    /// The only machine that it may see.
    pub fn machine(&self) -> Option<&MachineKey> {
        self.role.machine()
    }
}

fn no_role(reason: impl Into<String>) -> TlsError {
    TlsError::NoRole { reason: reason.into() }
}

/// The one URI SAN with scheme `janus`.
fn janus_uri(der: &[u8]) -> Result<String, TlsError> {
    if der.len() > MAX_CERTIFICATE_BYTES {
        return Err(no_role("is too large"));
    }
    let (rest, cert) =
        X509Certificate::from_der(der).map_err(|_| no_role("is not a valid X.509 certificate"))?;
    if !rest.is_empty() {
        return Err(no_role("has bytes after its end"));
    }
    let names =
        cert.subject_alternative_name().map_err(|_| no_role("has an invalid list of names"))?;
    let names = names.map(|names| names.value.general_names.as_slice()).unwrap_or_default();
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) if uri.starts_with("janus://") => Some(uri.to_string()),
        _ => None,
    });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => Ok(uri),
        (Some(_), Some(_)) => Err(no_role("names more than one janus:// principal")),
        (None, _) => Err(no_role("names no janus:// principal")),
    }
}

fn parse_uri(uri: &str) -> Option<(&str, Role)> {
    let parts: Vec<&str> = uri.strip_prefix("janus://")?.split('/').collect();
    let role = match parts.as_slice() {
        [_, "client", user, machine] => Role::Client(MachineKey::new(user, machine).ok()?),
        [_, "restore", user, machine] => Role::Restore(MachineKey::new(user, machine).ok()?),
        [_, "server", name] => Role::Server(name.parse().ok()?),
        [_, "janus", name] => Role::Janus(name.parse().ok()?),
        [_, "operator", name] => {
            check_name("operator", name).ok()?;
            Role::Operator((*name).to_string())
        }
        _ => return None,
    };
    check_name("group", parts[0]).ok()?;
    Some((parts[0], role))
}

/// Our certificate with its key, and the CA that peers are checked against. Cheap to clone; all clones change together
/// by [`Identity::reload`].
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

struct Inner {
    files: Files,
    principal: Principal,
    keys: RwLock<Keys>,
}

struct Files {
    cert: PathBuf,
    key: PathBuf,
    ca: PathBuf,
}

/// What the files hold, ready for use.
#[derive(Clone)]
struct Keys {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
    /// Unix seconds.
    expires: i64,
}

impl Files {
    fn read(&self) -> Result<(Principal, Keys), TlsError> {
        let Self { cert, key, ca } = self;
        let chain = certificates("cert", "certificate", cert)?;
        let roots = roots(ca)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
            .build()
            .map_err(|error| format_error("CA certificate", ca, error))?;
        check_own(&*verifier, &chain, cert, ca)?;
        let principal = Principal::from_der(chain[0].to_vec())
            .map_err(|error| TlsError::Unusable { cert: cert.into(), reason: error.to_string() })?;
        let private = private_key(key)?;
        let mismatch = |error| key_error(&error, cert, key);
        let server = server_config(verifier.clone(), chain.clone(), private.clone_key())
            .map_err(mismatch)?
            .into();
        let client = client_config(roots, chain, private).map_err(mismatch)?.into();
        let expires = principal.expires();
        Ok((principal, Keys { server, client, verifier, expires }))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({:?})", self.0.principal)
    }
}

impl Identity {
    /// Reads and checks our certificate, its key and the CA, all PEM files. Blocks on the file system: meant for the start.
    ///
    /// # Errors
    /// When a file can't be read, the three don't belong together, or the certificate isn't valid now.
    pub fn load(
        cert: impl AsRef<Path>,
        key: impl AsRef<Path>,
        ca: impl AsRef<Path>,
    ) -> Result<Self, TlsError> {
        let files =
            Files { cert: cert.as_ref().into(), key: key.as_ref().into(), ca: ca.as_ref().into() };
        let (principal, keys) = files.read()?;
        Ok(Self(Arc::new(Inner { files, principal, keys: RwLock::new(keys) })))
    }

    /// Reads the three files again: connections made from now on use what they hold. Open ones keep what they have. Blocks
    /// on the file system.
    ///
    /// # Errors
    /// As [`Identity::load`], and when the certificate is somebody else's; nothing has changed then.
    pub fn reload(&self) -> Result<(), TlsError> {
        let (principal, keys) = self.0.files.read()?;
        let ours = &self.0.principal;
        if (&principal.group, &principal.role) != (&ours.group, &ours.role) {
            let reason = format!(
                "it is that of {principal:?} now, and this is {ours:?}: restart to take it"
            );
            return Err(TlsError::Unusable { cert: self.0.files.cert.clone(), reason });
        }
        *self.0.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
        Ok(())
    }

    fn keys(&self) -> Keys {
        // A panic elsewhere can't leave half of them: they are replaced by one assignment.
        self.0.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Settings for the accepting side: TLS 1.3, HTTP/2, a certificate of our CA is required.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.keys().server
    }

    /// Settings for the connecting side.
    pub fn client_config(&self) -> Arc<ClientConfig> {
        self.keys().client
    }

    /// Unix seconds at which the certificate in use expires: of the newest [`Identity::reload`].
    pub fn expires(&self) -> i64 {
        self.keys().expires
    }

    /// Who we are.
    pub fn principal(&self) -> &Principal {
        &self.0.principal
    }

    /// Checks a certificate that janus forwarded: chain, dates, purpose and group.
    ///
    /// It proves that our CA issued it, not that the sender holds its key: believe it only from a peer with the janus role.
    ///
    /// # Errors
    /// When any of these checks fails.
    pub fn verify_forwarded(&self, der: &[u8]) -> Result<Principal, TlsError> {
        let principal = Principal::from_der(der.to_vec())?;
        self.keys()
            .verifier
            .verify_client_cert(&CertificateDer::from(der), &[], UnixTime::now())
            .map_err(|error| TlsError::Refused {
            subject: principal.to_string(),
            reason: describe(&error),
        })?;
        self.check_group(&principal)?;
        Ok(principal)
    }

    /// The principal of a peer whose chain the handshake has verified.
    ///
    /// # Errors
    /// When the certificate carries no role or belongs to another group.
    pub fn peer(&self, certificates: Option<&[CertificateDer<'_>]>) -> Result<Principal, TlsError> {
        let own = certificates.and_then(<[_]>::first).ok_or_else(|| no_role("is missing"))?;
        let principal = Principal::from_der(own.to_vec())?;
        self.check_group(&principal)?;
        Ok(principal)
    }

    fn check_group(&self, principal: &Principal) -> Result<(), TlsError> {
        let ours = &self.0.principal.group;
        if principal.group == *ours {
            return Ok(());
        }
        let (ours, theirs) = (ours.to_string(), principal.group.to_string());
        Err(TlsError::OtherGroup { subject: principal.to_string(), ours, theirs })
    }
}

/// The group that a CA certificate (PEM file) stands for: the common name of its subject.
///
/// # Errors
/// When the file can't be read or names no group.
pub fn ca_group(path: &Path) -> Result<String, TlsError> {
    let cert = certificates("ca", "CA certificate", path)?.swap_remove(0);
    let nameless = || format_error("CA certificate", path, "its subject names no group");
    let (_, parsed) = X509Certificate::from_der(&cert).map_err(|_| nameless())?;
    let name = parsed.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    let group = name.ok_or_else(nameless)?;
    check_name("group", group).map_err(|error| format_error("CA certificate", path, error))?;
    Ok(group.to_string())
}

// Chosen here, so that no program depends on which provider a dependency installs as the process default.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn server_config(
    verifier: Arc<dyn ClientCertVerifier>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client_config(
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn roots(path: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for cert in certificates("ca", "CA certificate", path)? {
        roots.add(cert).map_err(|error| format_error("CA certificate", path, error))?;
    }
    Ok(Arc::new(roots))
}

/// At least one certificate.
fn certificates(
    setting: &'static str,
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(setting, what, path)?;
    let found: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(format_error(what, path, "no CERTIFICATE section")),
        Err(error) => Err(format_error(what, path, error)),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let what = "private key";
    PrivateKeyDer::from_pem_slice(&read("key", what, path)?)
        .map_err(|error| format_error(what, path, error))
}

fn read(setting: &'static str, what: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    if path.as_os_str().is_empty() {
        return Err(TlsError::NotSet { setting, what });
    }
    fs::read(path).map_err(|error| TlsError::Read {
        what,
        path: path.into(),
        reason: io_reason(&error),
    })
}

fn io_reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "no such file".into(),
        io::ErrorKind::PermissionDenied => "permission denied".into(),
        _ => error.to_string(),
    }
}

fn format_error(what: &'static str, path: &Path, reason: impl fmt::Display) -> TlsError {
    TlsError::Format { what, path: path.into(), reason: reason.to_string() }
}

fn key_error(error: &rustls::Error, cert: &Path, key: &Path) -> TlsError {
    match error {
        rustls::Error::InconsistentKeys(_) => {
            TlsError::KeyMismatch { cert: cert.into(), key: key.into() }
        }
        other => format_error("private key", key, other),
    }
}

/// Finds at the start what every peer would refuse.
fn check_own(
    verifier: &dyn ClientCertVerifier,
    chain: &[CertificateDer<'static>],
    cert: &Path,
    ca: &Path,
) -> Result<(), TlsError> {
    use rustls::{CertificateError as C, Error::InvalidCertificate as Invalid};
    let error = match verifier.verify_client_cert(&chain[0], &chain[1..], UnixTime::now()) {
        Ok(_) => return Ok(()),
        Err(error) => error,
    };
    Err(match &error {
        Invalid(C::Expired | C::ExpiredContext { .. }) => {
            TlsError::Expired { cert: cert.into(), not_after: not_after(&chain[0]) }
        }
        Invalid(C::UnknownIssuer | C::BadSignature) => {
            TlsError::OtherCa { cert: cert.into(), ca: ca.into() }
        }
        other => TlsError::Unusable { cert: cert.into(), reason: describe(other) },
    })
}

fn not_after(der: &[u8]) -> String {
    X509Certificate::from_der(der).map_or_else(
        |_| "an unknown date".into(),
        |(_, cert)| cert.validity().not_after.to_string(),
    )
}

/// What is wrong with a peer's certificate, as the end of a sentence that names it.
pub(crate) fn describe(error: &rustls::Error) -> String {
    use CertificateError as C;
    let rustls::Error::InvalidCertificate(problem) = error else { return error.to_string() };
    match problem {
        C::Expired | C::ExpiredContext { .. } => "has expired".into(),
        C::NotValidYet | C::NotValidYetContext { .. } => {
            "is not valid yet (compare the clocks)".into()
        }
        C::UnknownIssuer | C::BadSignature => "was issued by another CA".into(),
        C::InvalidPurpose | C::InvalidPurposeContext { .. } => {
            "was not issued for this purpose".into()
        }
        C::NotValidForNameContext { presented, .. } => {
            format!("is for other names: {}", presented.join(", "))
        }
        other => format!("was refused: {other}"),
    }
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
            "janus:///server/a",
            "janus://g/root/a",
            "janus://g/server/..",
            "https://g/server/a",
        ] {
            assert!(parse_uri(bad).is_none(), "{bad}");
        }
    }
}
