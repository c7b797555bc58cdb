//! Who we are and who they are: identities from certificate files, principals from certificates.
//!
//! TLS 1.3 with certificates on both sides, always. A certificate's URI SAN `janus://<group>/<role>/…` is the only
//! source of a peer's role and name, but for certificates of a PKI that [`Pki`] has rules for; its chain and dates are checked
//! against the CA of [`Identity::load`].
//! Sessions are never resumed, so an expired certificate is noticed at the next connection.

mod believed;
mod names;
mod principal;

use std::{
    fmt, fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use bytes::Bytes;

pub use rustls::pki_types;
use rustls::{
    CertificateError, ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::SigningKey,
    version::TLS13,
};
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

pub(crate) use self::principal::validity;
use self::{
    believed::{Believed, Site, verifier},
    names::Names,
    principal::no_role,
};
pub use self::{
    names::{NameRule, PKI_KEYS, Pki, PkiError, RoleName},
    principal::{Limits, Principal, Role, common_name, has_key},
};

use crate::{
    ids::{ServerId, check_name},
    proof::{self, Statement},
    revoked::Revocations,
    show::date,
};

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
        "{path} holds no {what} in PEM form that can be used: {reason}; use the files that `janus-server pki issue` or your PKI wrote"
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
        "certificate {cert} expired on {not_after}; issue a new one with `janus-server pki issue`, or by the PKI that it is of"
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
    /// A certificate of a PKI of the site's own that no rule is for, or several are.
    #[error("certificate {reason}; see pki.names in the settings")]
    NotMapped {
        /// What is wrong with it.
        reason: String,
    },
    /// The rules for such a PKI.
    #[error("setting {0}")]
    Pki(#[from] PkiError),
    /// A certificate was refused: chain, dates or purpose.
    #[error("certificate of {subject} {reason}")]
    Refused {
        /// Principal named by it.
        subject: String,
        /// Why.
        reason: String,
    },
    /// A certificate that was revoked.
    #[error("certificate of {subject} was revoked on {until}; enrol or issue it anew")]
    Revoked {
        /// Principal named by it.
        subject: String,
        /// Until when its certificates are refused.
        until: String,
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

/// Certificates that are valid for no longer, in seconds, aren't renewed by hand.
const RENEWED_BY_PROGRAMS: i64 = 2 * 24 * 60 * 60;

/// Our certificate with its key, and the CA that peers are checked against. Cheap to clone; all clones change together
/// by [`Identity::reload`].
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

struct Inner {
    files: Files,
    principal: Principal,
    keys: RwLock<Keys>,
    revocations: Revocations,
}

struct Files {
    cert: PathBuf,
    key: PathBuf,
    ca: PathBuf,
    pki: Option<Site>,
}

/// What the files hold, ready for use.
#[derive(Clone)]
struct Keys {
    /// Whose certificate it is: that certificate, not the one of the start.
    principal: Arc<Principal>,
    server: Arc<ServerConfig>,
    /// Also for those who have no certificate yet.
    open: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    believed: Believed,
    signing: Arc<dyn SigningKey>,
    /// How the files looked before they were read.
    stamps: Vec<Stamp>,
}

/// What tells that a file was replaced: modification time in nanoseconds, length, inode. `None`: it isn't there.
type Stamp = Option<(i64, i64, u64, u64)>;

impl Files {
    fn stamps(&self) -> Vec<Stamp> {
        let theirs = self.pki.as_ref().map(|pki| &pki.ca);
        let all = [&self.cert, &self.key, &self.ca].into_iter().chain(theirs);
        let stamp = |path: &PathBuf| {
            let file = fs::metadata(path).ok()?;
            Some((file.mtime(), file.mtime_nsec(), file.size(), file.ino()))
        };
        all.map(stamp).collect()
    }

    fn read(&self) -> Result<Keys, TlsError> {
        let Self { cert, key, ca, pki } = self;
        let stamps = self.stamps();
        let chain = certificates("cert", "certificate", cert)?;
        let believed = Believed::read(ca, pki.as_ref())?;
        let open_verifier =
            WebPkiClientVerifier::builder_with_provider(believed.roots.clone(), crypto_provider())
                .allow_unauthenticated()
                .build()
                .map_err(|error| format_error("CA certificate", ca, error))?;
        check_own(&*believed.verifier, &chain, cert, &self.authorities())?;
        let unusable = |reason| TlsError::Unusable { cert: cert.into(), reason };
        let principal = believed.peer(&chain).map_err(|error| unusable(error.to_string()))?;
        if let Some(pki) = pki.as_ref().filter(|pki| pki.names.group != principal.group) {
            let (ours, theirs) = (&principal.group, &pki.names.group);
            let reason = format!("it is of group {ours:?}, and setting pki.group is {theirs:?}");
            return Err(unusable(reason));
        }
        let private = private_key(key)?;
        let mismatch = |error| key_error(&error, cert, key);
        let signing = crypto_provider()
            .key_provider
            .load_private_key(private.clone_key())
            .map_err(|error| unknown_key(&error, key))?;
        let server = server_config(believed.verifier.clone(), chain.clone(), private.clone_key())
            .map_err(mismatch)?
            .into();
        // Who doesn't know the authority yet is shown it.
        let open_chain = chain.iter().chain(&believed.authorities).cloned().collect();
        let open =
            server_config(open_verifier, open_chain, private.clone_key()).map_err(mismatch)?.into();
        let client = client_config(&believed, chain, private.clone_key()).map_err(mismatch)?.into();
        let principal = Arc::new(principal);
        Ok(Keys { principal, server, open, client, believed, signing, stamps })
    }

    /// The files of all authorities, for errors.
    fn authorities(&self) -> PathBuf {
        match &self.pki {
            None => self.ca.clone(),
            Some(pki) if self.ca.as_os_str().is_empty() => pki.ca.clone(),
            Some(pki) => format!("{} or {}", self.ca.display(), pki.ca.display()).into(),
        }
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
        Self::load_with(cert, key, ca, &Pki::default())
    }

    /// The same where certificates of a PKI of the site's own count, too.
    ///
    /// # Errors
    /// As [`Identity::load`], and when the rules for that PKI can't be used.
    pub fn load_with(
        cert: impl AsRef<Path>,
        key: impl AsRef<Path>,
        ca: impl AsRef<Path>,
        pki: &Pki,
    ) -> Result<Self, TlsError> {
        let names = Names::of(pki)?;
        let pki =
            names.map(|names| Site { ca: pki.ca.clone(), names, check_hosts: pki.check_hosts });
        let [cert, key, ca] = [cert.as_ref(), key.as_ref(), ca.as_ref()].map(Path::to_owned);
        let files = Files { cert, key, ca, pki };
        let keys = files.read()?;
        let principal = (*keys.principal).clone();
        let (keys, revocations) = (RwLock::new(keys), Revocations::default());
        Ok(Self(Arc::new(Inner { files, principal, keys, revocations })))
    }

    /// Reads the three files again: connections made from now on use what they hold. Open ones keep what they have. Blocks
    /// on the file system.
    ///
    /// # Errors
    /// As [`Identity::load`], and when the certificate is somebody else's; nothing has changed then.
    pub fn reload(&self) -> Result<(), TlsError> {
        let keys = self.0.files.read()?;
        let (principal, ours) = (&keys.principal, &self.0.principal);
        if (&principal.group, &principal.role) != (&ours.group, &ours.role) {
            let reason = format!(
                "it is that of {principal:?} now, and this is {ours:?}: restart to take it"
            );
            return Err(TlsError::Unusable { cert: self.0.files.cert.clone(), reason });
        }
        *self.0.keys.write().unwrap_or_else(PoisonError::into_inner) = keys;
        Ok(())
    }

    /// The same when one of the files isn't what it was; true when it was done. Blocks on the file system.
    ///
    /// # Errors
    /// As [`Identity::reload`]; it is tried again then.
    pub fn reload_if_changed(&self) -> Result<bool, TlsError> {
        if self.0.files.stamps() == self.keys().stamps {
            return Ok(false);
        }
        self.reload().map(|()| true)
    }

    fn keys(&self) -> Keys {
        // A panic elsewhere can't leave half of them: they are replaced by one assignment.
        self.0.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Settings for the accepting side: TLS 1.3, HTTP/2, a certificate of our CA is required.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.keys().server
    }

    /// The same for a port at which a peer may also have no certificate yet. Ours comes with the authority's.
    pub fn open_config(&self) -> Arc<ServerConfig> {
        self.keys().open
    }

    /// Settings for the connecting side.
    pub fn client_config(&self) -> Arc<ClientConfig> {
        self.keys().client
    }

    /// Unix seconds at which the certificate in use expires: of the newest [`Identity::reload`].
    pub fn expires(&self) -> i64 {
        self.keys().principal.expires()
    }

    /// How long that certificate is valid in all, in seconds, where nobody but a program renews it: it is of a PKI of one's own, or
    /// ends within two days. 0: people do, who want to know earlier.
    pub fn valid_seconds(&self) -> i64 {
        let principal = self.keys().principal;
        let (from, until) = principal.validity();
        let valid = until.saturating_sub(from);
        if principal.is_mapped() || valid <= RENEWED_BY_PROGRAMS { valid } else { 0 }
    }

    /// Who we are, with the certificate of the start.
    pub fn principal(&self) -> &Principal {
        &self.0.principal
    }

    /// The `janus-proof` for one call to `server`, or to any.
    pub fn prove(&self, statement: &Statement, server: Option<&ServerId>) -> Option<String> {
        let keys = self.keys();
        let is_new = !keys.principal.has_key_of(&self.0.principal);
        proof::make(&*keys.signing, &keys.principal, is_new, statement, server)
    }

    /// The authority that our own certificate comes from, of those that we believe. Reads the file. `None`: it can't be told.
    pub fn authority(&self) -> Option<CertificateDer<'static>> {
        let Files { cert, ca, .. } = &self.0.files;
        let own = certificates("cert", "certificate", cert).ok()?;
        let all = certificates("ca", "CA certificate", ca).ok()?;
        let is_ours = |authority: &CertificateDer<'static>| {
            let verifier = verifier(&roots(std::slice::from_ref(authority), ca).ok()?, ca).ok()?;
            verifier.verify_client_cert(&own[0], &own[1..], UnixTime::now()).ok()
        };
        all.into_iter().find(|authority| is_ours(authority).is_some())
    }

    /// What is no longer believed. Empty at first: who keeps revocations puts them in.
    pub fn revocations(&self) -> &Revocations {
        &self.0.revocations
    }

    /// Signs with our key: whose certificate is for it, the TLS `SignatureScheme`, and the signature. Only for texts that begin
    /// with what they are.
    pub(crate) fn sign(&self, message: &[u8]) -> Option<(Arc<Principal>, u16, Vec<u8>)> {
        let keys = self.keys();
        let (scheme, signature) = proof::sign(&*keys.signing, message)?;
        Some((keys.principal, scheme, signature))
    }

    /// Checks a certificate that janus forwarded, with those between it and its authority: chain, dates, purpose and group.
    ///
    /// It proves that a CA of ours issued it, not that the sender holds its key: believe it only from a peer with the janus role.
    ///
    /// # Errors
    /// When any of these checks fails.
    pub fn verify_forwarded(
        &self,
        der: &[u8],
        intermediates: &[Bytes],
    ) -> Result<Principal, TlsError> {
        let now = UnixTime::now().as_secs();
        self.verify_at(der, intermediates, i64::try_from(now).unwrap_or(i64::MAX))
    }

    /// The same at another time (Unix seconds). Revocations count whenever they were made.
    pub(crate) fn verify_at(
        &self,
        der: &[u8],
        intermediates: &[Bytes],
        seconds: i64,
    ) -> Result<Principal, TlsError> {
        let seconds = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        let time = UnixTime::since_unix_epoch(seconds);
        let between = intermediates.iter().map(|der| CertificateDer::from(&**der));
        let chain: Vec<_> = std::iter::once(CertificateDer::from(der)).chain(between).collect();
        let principal = self.keys().believed.who(&chain, time)?;
        self.check_group(&principal)?;
        self.check_not_revoked(&principal)?;
        Ok(principal)
    }

    /// The principal of a peer whose chain the handshake has verified.
    ///
    /// # Errors
    /// When the certificate carries no role or belongs to another group.
    pub fn peer(&self, certificates: Option<&[CertificateDer<'_>]>) -> Result<Principal, TlsError> {
        let chain = certificates.ok_or_else(|| no_role("is missing"))?;
        let principal = self.keys().believed.peer(chain)?;
        self.check_group(&principal)?;
        self.check_not_revoked(&principal)?;
        Ok(principal)
    }

    fn check_not_revoked(&self, principal: &Principal) -> Result<(), TlsError> {
        let Some(until) = self.0.revocations.refuses(principal) else { return Ok(()) };
        Err(TlsError::Revoked {
            subject: principal.to_string(),
            until: date(until.saturating_mul(1000)),
        })
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
    let group = common_name(&cert).ok_or_else(nameless)?;
    check_name("group", &group).map_err(|error| format_error("CA certificate", path, error))?;
    Ok(group)
}

// Chosen here, so that no program depends on which provider a dependency installs as the process default.
pub(crate) fn crypto_provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The signatures that are believed, in certificates and elsewhere.
pub(crate) fn signature_algorithms() -> WebPkiSupportedAlgorithms {
    crypto_provider().signature_verification_algorithms
}

fn server_config(
    verifier: Arc<dyn ClientCertVerifier>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client_config(
    believed: &Believed,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, rustls::Error> {
    let builder =
        ClientConfig::builder_with_provider(crypto_provider()).with_protocol_versions(&[&TLS13])?;
    let builder = match believed.server_verifier() {
        Some(verifier) => builder.dangerous().with_custom_certificate_verifier(verifier),
        None => builder.with_root_certificates(believed.roots.clone()),
    };
    let mut config = builder.with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn roots(
    authorities: &[CertificateDer<'static>],
    path: &Path,
) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for cert in authorities {
        roots.add(cert.clone()).map_err(|error| format_error("CA certificate", path, error))?;
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

fn private_key(path: &Path) -> Result<Zeroizing<PrivateKeyDer<'static>>, TlsError> {
    let what = "private key";
    let text = Zeroizing::new(read("key", what, path)?);
    let key = PrivateKeyDer::from_pem_slice(&text);
    key.map(Zeroizing::new).map_err(|error| format_error(what, path, error))
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
        other => unknown_key(other, key),
    }
}

fn unknown_key(error: &rustls::Error, key: &Path) -> TlsError {
    let kinds = "RSA of 2048 to 4096 bits, ECDSA P-256 and P-384, and Ed25519";
    format_error("private key", key, format!("{error} ({kinds} are known)"))
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
