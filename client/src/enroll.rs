//! Enrolment: this machine makes its key, and gets its certificate for a token; later it renews it by itself.
//!
//! The key never leaves the machine. Beside the certificate stands `enrolled.json`, which says where it was made: without
//! that file nothing is renewed. A certificate is replaced by a rename, and its key stays the same, so that a crash leaves
//! a pair that fits.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use janus_proto::{
    channel::{self, ConnectError, ConnectOptions, Expect, Pinned, Proxied, Proxies, explain},
    clock::unix_ms,
    enroll::Token,
    error,
    ids::MachineKey,
    pb::{self, enrollment_service_client::EnrollmentServiceClient},
    storage::Disk,
    tls::{Identity, Principal, Role, TlsError, pki_types},
};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use serde::{Deserialize, Serialize};
use tonic::{Request, Status};
use zeroize::Zeroizing;

use crate::files::{new_private, private_folder};

const QUICK: Duration = Duration::from_secs(20);
/// A certificate is renewed when less than this share of its validity is left.
const LAST_SHARE: i64 = 3;
const ENROLLED: &str = "enrolled.json";
/// Largest answer that is believed, in bytes of PEM.
const MAX_PEM_BYTES: usize = 256 << 10;

/// Why there is no new certificate.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// Nobody answers there, or not the one that has made the token.
    #[error("{0}. A token is good at the server that made it, whose authority it names")]
    Token(ConnectError),
    /// Nobody answers there.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The server says no.
    #[error("{}", told(.0))]
    Refused(Box<Status>),
    /// What came is no certificate for the key that it was asked for.
    #[error("the server's answer is of no use: {0}")]
    Answer(String),
    /// A file is there already.
    #[error(
        "{path} is there already: this machine has a certificate; --force replaces it, and --out names another folder"
    )]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// A file can't be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The key can't be made or read.
    #[error("can't use the key: {0}")]
    Key(#[from] rcgen::Error),
    /// The files don't fit.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

fn told(status: &Status) -> String {
    match error::reason(status) {
        Some(_) => status.message().to_owned(),
        None => explain(status),
    }
}

/// The files of an identity.
#[derive(Debug, Clone)]
pub struct Files {
    /// Certificate.
    pub cert: PathBuf,
    /// Private key.
    pub key: PathBuf,
    /// Authorities.
    pub ca: PathBuf,
}

impl Files {
    /// Their usual names in a folder.
    pub fn within(folder: &Path) -> Self {
        let [cert, key, ca] = ["cert.pem", "key.pem", "ca.pem"].map(|name| folder.join(name));
        Self { cert, key, ca }
    }

    fn enrolled(&self) -> PathBuf {
        self.cert.with_file_name(ENROLLED)
    }
}

/// Where a certificate was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Enrolled {
    url: String,
}

/// What an enrolment has brought.
#[derive(Debug)]
pub struct Done {
    /// Who this machine is now.
    pub machine: MachineKey,
    /// Where it finds janus and servers.
    pub urls: Vec<String>,
    /// Unix seconds.
    pub expires: i64,
}

/// Gets a certificate for a token and writes it, with its key and the authorities.
///
/// The key is written before it is sent: when the answer is lost the same command gets it again.
///
/// # Errors
/// When the server can't be reached or refuses, or files are there already and `replace` is false.
pub async fn enroll(
    url: &str,
    token: &Token,
    files: &Files,
    proxies: Proxies,
    replace: bool,
) -> Result<Done, EnrollError> {
    if !replace && files.cert.exists() {
        return Err(EnrollError::Exists { path: files.cert.clone() });
    }
    // A key without a certificate is that of an enrolment whose answer was lost.
    let pending = files.key.with_extension("new");
    let kept = fs::read_to_string(&pending).map(|text| KeyPair::from_pem(&Zeroizing::new(text)));
    let key = match kept {
        Ok(Ok(key)) => key,
        kept => {
            // A key that was never whole was never sent.
            if kept.is_ok() {
                fs::remove_file(&pending).map_err(of(&pending))?;
            }
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
            write_key(&pending, &key)?;
            key
        }
    };
    let dialer = Arc::new(Pinned::new(token.authority, proxies));
    let options = ConnectOptions::expecting(Expect::Server);
    let connection =
        channel::connect_through(url, dialer, options).await.map_err(EnrollError::Token)?;
    let message = pb::EnrollRequest {
        token: token.secret.to_wire(),
        signing_request: signing_request(&key)?.into(),
    };
    let mut request = Request::new(message);
    request.set_timeout(QUICK);
    let answer = EnrollmentServiceClient::new(connection.channel).enroll(request).await;
    let answer = answer.map_err(|status| EnrollError::Refused(Box::new(status)))?.into_inner();
    let certified = answer.certified.unwrap_or_default();
    let principal = check(&certified, &key)?;
    let Role::Client(machine) = principal.role.clone() else {
        return Err(EnrollError::Answer(format!("the certificate is that of {principal}")));
    };
    let enrolled = Enrolled { url: url.to_owned() };
    let enrolled = serde_json::to_vec_pretty(&enrolled).unwrap_or_default();
    put(&files.ca, certified.authorities.as_bytes())?;
    put(&files.enrolled(), &enrolled)?;
    // The token is good for this key alone: it stays where the next try finds it until its certificate stands.
    let copy = files.key.with_extension("copy");
    let _ = fs::remove_file(&copy);
    write_key(&copy, &key)?;
    fs::rename(&copy, &files.key).map_err(of(&files.key))?;
    put(&files.cert, certified.certificate.as_bytes())?;
    fs::remove_file(&pending).map_err(of(&pending))?;
    Identity::load(&files.cert, &files.key, &files.ca)?;
    Ok(Done { machine, urls: answer.urls, expires: principal.expires() })
}

/// Renews the certificate where it was made by enrolment and less than a third of its validity is left. Answers when the new one
/// expires (Unix seconds); `None`: nothing is due.
///
/// # Errors
/// When it is due and can't be renewed now. The old one stays.
pub async fn renew_if_due(
    identity: &Identity,
    files: &Files,
    proxies: Proxies,
) -> Result<Option<i64>, EnrollError> {
    let (from, until) = identity.principal().validity();
    let left = until.saturating_sub(unix_ms() / 1000);
    let path = files.enrolled();
    let is_due = left < until.saturating_sub(from) / LAST_SHARE;
    // One of another PKI that stands beside it now is renewed by that.
    if !is_due || identity.principal().is_mapped() || !path.exists() {
        return Ok(None);
    }
    let text = fs::read(&path).map_err(of(&path))?;
    let enrolled: Enrolled =
        serde_json::from_slice(&text).map_err(|error| of(&path)(io::Error::other(error)))?;
    let key = Zeroizing::new(fs::read_to_string(&files.key).map_err(of(&files.key))?);
    let key = KeyPair::from_pem(&key)?;
    let dialer = Arc::new(Proxied { identity: identity.clone(), proxies });
    let options = ConnectOptions::expecting(Expect::Server);
    let connection = channel::connect_through(&enrolled.url, dialer, options).await?;
    let message = pb::RenewRequest { signing_request: signing_request(&key)?.into() };
    let mut request = Request::new(message);
    request.set_timeout(QUICK);
    let answer = EnrollmentServiceClient::new(connection.channel).renew(request).await;
    let answer = answer.map_err(|status| EnrollError::Refused(Box::new(status)))?.into_inner();
    let certified = answer.certified.unwrap_or_default();
    let principal = check(&certified, &key)?;
    if principal.role != identity.principal().role {
        return Err(EnrollError::Answer(format!("the certificate is that of {principal}")));
    }
    put(&files.ca, certified.authorities.as_bytes())?;
    put(&files.cert, certified.certificate.as_bytes())?;
    Ok(Some(principal.expires()))
}

fn signing_request(key: &KeyPair) -> Result<Vec<u8>, EnrollError> {
    Ok(CertificateParams::default().serialize_request(key)?.der().to_vec())
}

/// That an answer holds a certificate for our key, before anything of it is written.
fn check(certified: &pb::Certified, key: &KeyPair) -> Result<Principal, EnrollError> {
    use pki_types::{CertificateDer, pem::PemObject};
    let pb::Certified { certificate, authorities } = certified;
    let wrong = |reason: String| EnrollError::Answer(reason);
    if certificate.len().max(authorities.len()) > MAX_PEM_BYTES {
        return Err(wrong("it is too long".into()));
    }
    let parse = |text: &str| {
        CertificateDer::from_pem_slice(text.as_bytes()).map_err(|error| wrong(error.to_string()))
    };
    parse(authorities)?;
    let principal = Principal::from_der(parse(certificate)?.to_vec())?;
    match principal.has_key(key.public_key_raw()) {
        true => Ok(principal),
        false => Err(wrong("the certificate is for another key".into())),
    }
}

fn of(path: &Path) -> impl Fn(io::Error) -> EnrollError {
    move |source| EnrollError::File { path: path.to_owned(), source }
}

fn write_key(path: &Path, key: &KeyPair) -> Result<(), EnrollError> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        private_folder(folder).map_err(of(folder))?;
    }
    let text = Zeroizing::new(key.serialize_pem());
    new_private(path, &[text.as_bytes()]).map_err(of(path))
}

/// Replaces a file by one that is whole and synced.
fn put(path: &Path, bytes: &[u8]) -> Result<(), EnrollError> {
    Disk::default().replace(path, bytes).map_err(of(path))
}
