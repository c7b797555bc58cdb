//! Enrolment: a machine gets its certificate for a token that an administrator has made, and renews it by itself.
//!
//! The server that holds the authority's key does this on a port of its own, since who enrols has no certificate yet and
//! TLS elsewhere asks for one. A token is for one machine and one key: it is written down which key has got the
//! certificate before that is answered, so an answer that was lost can be asked for again, and nothing else can.

pub mod tokens;

use std::{path::PathBuf, sync::Arc, time::Duration};

use http::Request;
use hyper::body::Incoming;
use janus_proto::{
    clock::unix_ms,
    enroll::{NoToken, Secret},
    error::{ErrorReason, WireError, status},
    listener::{Door, Limits},
    pb::{self, enrollment_service_server::EnrollmentServiceServer},
    tls::{Identity, Principal, Role},
};
use rcgen::{CertificateSigningRequestParams, PublicKeyData};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status, body::Body, service::Routes};
use tower::ServiceBuilder;

use self::tokens::{TokenRefused, Tokens};
use crate::{
    audit::{Action, Event, Who},
    blocking,
    chain::store::StoreError,
    pki::{Authority, PkiError, Wanted},
    runs::Runs,
};

/// Largest signing request that is looked at, in bytes; those of P-256 have 250.
const MAX_REQUEST_BYTES: usize = 8192;
/// Open connections of machines that renew, and as many of those that enrol; they come one by one.
const MAX_CONNECTIONS: usize = 64;
const MAX_EACH: usize = 4;

/// Why no certificate was made.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// The token.
    #[error(transparent)]
    Token(#[from] TokenRefused),
    /// Not a token at all.
    #[error(transparent)]
    NoToken(#[from] NoToken),
    /// The signing request.
    #[error("signing_request: {0}")]
    Request(String),
    /// A server, janus or operator wants to renew here.
    #[error("{0} can't renew its certificate here: `janus-server pki issue` makes a new one")]
    NoMachine(String),
    /// It was made by hand.
    #[error(
        "the certificate of {0} wasn't made by enrolment, so it isn't renewed: `janus-server enroll token` lets the machine enrol"
    )]
    NotEnrolled(String),
    /// It is new.
    #[error("the certificate of {0} has more than half of its validity left: it isn't renewed yet")]
    NotDue(String),
    /// The certificate is of another PKI, which renews it.
    #[error(
        "the certificate of {0} is of a PKI of your own: that renews it, or `janus-client enroll` with a token makes one of ours"
    )]
    Mapped(String),
    /// The authority.
    #[error(transparent)]
    Authority(#[from] PkiError),
    /// The list of tokens.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<EnrollError> for Status {
    fn from(error: EnrollError) -> Self {
        let reason = match &error {
            EnrollError::Token(_) | EnrollError::NoToken(_) => ErrorReason::TokenRefused,
            EnrollError::Request(_) => ErrorReason::InvalidField,
            EnrollError::NoMachine(_)
            | EnrollError::NotEnrolled(_)
            | EnrollError::NotDue(_)
            | EnrollError::Mapped(_) => ErrorReason::NotAllowed,
            EnrollError::Authority(_) | EnrollError::Store(_) => {
                tracing::error!(%error, "no certificate could be made");
                let text = "the server can't make certificates now; its log says why";
                return status(ErrorReason::StoreFailed, text);
            }
        };
        tracing::warn!(%error, "enrolment refused");
        status(reason, error.to_string())
    }
}

/// Makes certificates for machines.
#[derive(Clone)]
pub struct Enrollment(Arc<Inner>);

struct Inner {
    runs: Arc<Runs>,
    tokens: Arc<Tokens>,
    /// Folder of the authority. Read for each certificate, so that a new authority counts at once.
    authority: PathBuf,
    /// Of new certificates.
    valid: Duration,
    /// Where machines find janus and servers.
    urls: Vec<String>,
}

impl Enrollment {
    /// Makes certificates by the authority in this folder.
    pub fn new(
        runs: Arc<Runs>,
        tokens: Arc<Tokens>,
        authority: PathBuf,
        valid: Duration,
        urls: Vec<String>,
    ) -> Self {
        Self(Arc::new(Inner { runs, tokens, authority, valid, urls }))
    }

    /// Serves until `shutdown`.
    pub async fn serve(
        self,
        listener: TcpListener,
        identity: Identity,
        shutdown: CancellationToken,
    ) {
        let routes = Routes::new(EnrollmentServiceServer::new(self)).prepare();
        let service = ServiceBuilder::new()
            .map_request(|request: Request<Incoming>| request.map(Body::new))
            .service(routes);
        let limits = Limits {
            max_connections: MAX_CONNECTIONS,
            max_strangers: MAX_CONNECTIONS,
            max_connections_per_caller: MAX_EACH,
            max_calls_per_caller: MAX_EACH,
            ..Limits::default()
        };
        Door::Open(listener, identity).serve(service, limits, shutdown).await;
    }
}

impl Inner {
    fn enroll(&self, token: &str, request: &[u8]) -> Result<pb::Certified, EnrollError> {
        let secret = Secret::from_wire(token)?;
        let request = signing_request(request)?;
        let key = blake3::hash(request.public_key.der_bytes());
        let authority = Authority::open(&self.authority)?;
        let mut named = None;
        let certificate = self.tokens.take(&secret, key, |role| {
            named = role.machine().cloned();
            let mut wanted = Wanted::new(role, Vec::new(), self.valid);
            wanted.limits.proof = true;
            wanted.limits.enrolled = Some(unix_ms() / 1000);
            authority.certify(&wanted, &request.public_key)
        })?;
        if let Some(machine) = named {
            let who = Who::named(format!("token {}", secret.id));
            self.runs.note(&who, Event::new(Action::Enroll).of_machine(&machine));
        }
        Ok(pb::Certified { certificate, authorities: authority.bundle().to_owned() })
    }

    fn renew(&self, principal: &Principal, request: &[u8]) -> Result<pb::Certified, EnrollError> {
        let Role::Client(machine) = &principal.role else {
            return Err(EnrollError::NoMachine(principal.to_string()));
        };
        // What it keeps its holder to, and when it ends, is for that PKI to say.
        if principal.is_mapped() {
            return Err(EnrollError::Mapped(principal.to_string()));
        }
        // What it says stays: a revocation is for all that came of one enrolment, however often it was renewed since.
        if principal.limits.enrolled.is_none() {
            return Err(EnrollError::NotEnrolled(principal.to_string()));
        }
        let (from, until) = principal.validity();
        if until.saturating_sub(unix_ms() / 1000) > until.saturating_sub(from) / 2 {
            return Err(EnrollError::NotDue(principal.to_string()));
        }
        let request = signing_request(request)?;
        let authority = Authority::open(&self.authority)?;
        let limits = principal.limits.clone();
        let wanted =
            Wanted { role: principal.role.clone(), limits, hosts: Vec::new(), valid: self.valid };
        let certificate = authority.certify(&wanted, &request.public_key)?;
        self.runs.note(&Who::named(principal), Event::new(Action::Renew).of_machine(machine));
        Ok(pb::Certified { certificate, authorities: authority.bundle().to_owned() })
    }
}

/// Reads a request, whose signature proves that its sender has the key.
fn signing_request(der: &[u8]) -> Result<CertificateSigningRequestParams, EnrollError> {
    if der.len() > MAX_REQUEST_BYTES {
        return Err(EnrollError::Request(format!("longer than {MAX_REQUEST_BYTES} bytes")));
    }
    CertificateSigningRequestParams::from_der(&der.into())
        .map_err(|error| EnrollError::Request(error.to_string()))
}

#[tonic::async_trait]
impl pb::enrollment_service_server::EnrollmentService for Enrollment {
    async fn enroll(
        &self,
        request: tonic::Request<pb::EnrollRequest>,
    ) -> Result<Response<pb::EnrollResponse>, Status> {
        let pb::EnrollRequest { token, signing_request } = request.into_inner();
        let inner = self.0.clone();
        let certified = blocking(move || inner.enroll(&token, &signing_request)).await??;
        let urls = self.0.urls.clone();
        Ok(Response::new(pb::EnrollResponse { certified: Some(certified), urls }))
    }

    async fn renew(
        &self,
        request: tonic::Request<pb::RenewRequest>,
    ) -> Result<Response<pb::RenewResponse>, Status> {
        let principal = request.extensions().get::<Arc<Principal>>().cloned();
        let principal = principal.ok_or_else(|| {
            status(ErrorReason::IdentityMissing, "no certificate came with this call")
        })?;
        let der = request.into_inner().signing_request;
        if der.is_empty() {
            return Err(WireError::Missing { field: "signing_request" }.into());
        }
        let (inner, caller) = (self.0.clone(), principal.clone());
        let certified = blocking(move || inner.renew(&caller, &der)).await??;
        tracing::info!(%principal, "certificate renewed");
        Ok(Response::new(pb::RenewResponse { certified: Some(certified) }))
    }
}
