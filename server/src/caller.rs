//! Who calls, and for which machine: decided once for each request, before any service sees it.

mod ending;

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use http::{HeaderValue, Request, Response};
use hyper::body::Incoming;
use janus_proto::{
    error::{ErrorReason, shorten, status},
    ids::{MachineKey, ServerId},
    metadata,
    proof::{self, ProofError, Statement},
    tls::{Identity, Principal, Role},
    trace::{self, TRACEPARENT, TraceContext},
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, metadata::MetadataMap};
use tower::Service;
use tracing::Instrument;

use self::ending::{ending, revoked};
use crate::{audit::Who, rights};

/// The caller of a request: the peer, or whom a janus speaks for.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Who it is.
    pub principal: Arc<Principal>,
    /// Of a caller whom a janus speaks for: TLS proves only that of the janus.
    forwarded: Option<Forwarded>,
}

/// What shows that a forwarded caller wants what the janus asks in its name.
#[derive(Debug, Clone)]
struct Forwarded {
    janus: Arc<Principal>,
    /// Proofs for other servers are none.
    here: ServerId,
    is_proof_needed: bool,
    proof: Option<HeaderValue>,
    /// Believes the certificate that may come with a proof.
    identity: Identity,
}

/// Whose calls through a janus need a [`proof`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequireProof {
    /// Those of certificates that ask for it, as the ones of enrolled machines do, and those of servers.
    #[default]
    AsIssued,
    /// Everybody's.
    Always,
    /// Nobody's: whoever holds the key of a janus then acts for everybody whose certificate it has seen.
    Never,
}

impl RequireProof {
    fn needs(self, caller: &Principal) -> bool {
        match self {
            Self::AsIssued => caller.limits.proof || matches!(caller.role, Role::Server(_)),
            Self::Always => true,
            Self::Never => false,
        }
    }
}

impl Caller {
    /// A caller without a janus in between.
    pub fn at_peer(principal: Principal) -> Self {
        Self { principal: Arc::new(principal), forwarded: None }
    }

    /// Who a request is recorded for.
    pub fn who<T>(request: &tonic::Request<T>) -> Who {
        let Some(caller) = request.extensions().get::<Self>() else { return Who::default() };
        let through = caller.forwarded.as_ref().map(|forwarded| Who::named(&forwarded.janus).name);
        Who { through: through.unwrap_or_default(), ..Who::named(&caller.principal) }
    }

    /// The caller that the gate put into a request.
    ///
    /// # Errors
    /// `IDENTITY_MISSING` when there is none.
    pub fn of<T>(request: &tonic::Request<T>) -> Result<Self, Status> {
        let missing = || status(ErrorReason::IdentityMissing, "no certificate came with this call");
        request.extensions().get::<Self>().cloned().ok_or_else(missing)
    }

    /// The machine that this call is about: a client's own; operators name it in `janus-machine`.
    ///
    /// # Errors
    /// `NOT_ALLOWED` for another machine, or for a role without machines; `INVALID_FIELD` when it isn't named.
    pub fn machine(&self, metadata: &MetadataMap) -> Result<MachineKey, Status> {
        let named = named_machine(metadata)?;
        match (&self.principal.role, named) {
            (Role::Client(own) | Role::Restore(own), None) => Ok(own.clone()),
            (Role::Client(own) | Role::Restore(own), Some(named)) if *own == named => Ok(named),
            (Role::Operator(_), Some(named)) => Ok(named),
            (Role::Operator(_), None) => Err(status(
                ErrorReason::InvalidField,
                "janus-machine is missing: an operator names the machine <user>/<machine>",
            )),
            (role, _) => {
                Err(status(ErrorReason::NotAllowed, format!("{role} may not act for this machine")))
            }
        }
    }

    /// The machine of a call that writes: only the client itself.
    ///
    /// # Errors
    /// `NOT_ALLOWED` for every other role or machine.
    pub fn own_machine(&self, metadata: &MetadataMap) -> Result<MachineKey, Status> {
        match &self.principal.role {
            Role::Client(_) => self.machine(metadata),
            role => Err(status(
                ErrorReason::NotAllowed,
                format!("{role} may not write backups: use a client certificate"),
            )),
        }
    }

    /// True when the caller may read this machine's snapshots. Another server of the group may, to mirror its tables: it has
    /// such data itself.
    pub fn may_read(&self, machine: &MachineKey) -> bool {
        match &self.principal.role {
            Role::Client(own) | Role::Restore(own) => own == machine,
            Role::Operator(_) | Role::Server(_) => true,
            Role::Janus(_) => false,
        }
    }

    /// That the caller itself wants this, and not just the janus between us.
    ///
    /// # Errors
    /// `PROOF_REFUSED`.
    pub fn has_proven(&self, statement: &Statement) -> Result<(), Status> {
        let Some(Forwarded { here, is_proof_needed: true, proof, identity, .. }) = &self.forwarded
        else {
            return Ok(());
        };
        let checked = match proof {
            None => Err(ProofError::Missing),
            Some(proof) => {
                proof::check(proof.as_bytes(), statement, &self.principal, here, identity)
            }
        };
        checked.map_err(|error| {
            tracing::warn!(principal = %self.principal, %error, "call through janus refused");
            status(ErrorReason::ProofRefused, format!("{}: {error}", self.principal))
        })
    }
}

fn named_machine(metadata: &MetadataMap) -> Result<Option<MachineKey>, Status> {
    let Some(value) = metadata.get(metadata::MACHINE) else { return Ok(None) };
    let invalid = |_| status(ErrorReason::InvalidField, "janus-machine is not text");
    Ok(Some(value.to_str().map_err(invalid)?.parse()?))
}

/// Finds out the caller, refuses calls for other servers, and signs every answer with this server's name.
#[derive(Clone)]
pub struct Gate<S> {
    inner: S,
    identity: Identity,
    server: ServerId,
    require_proof: RequireProof,
    name: HeaderValue,
}

impl<S> Gate<S> {
    /// A gate before `inner`.
    ///
    /// # Errors
    /// When the name can't stand in a header, which valid names can.
    pub fn new(
        inner: S,
        identity: Identity,
        server: ServerId,
        require_proof: RequireProof,
    ) -> Result<Self, http::Error> {
        let name = HeaderValue::from_str(server.as_str())?;
        Ok(Self { inner, identity, server, require_proof, name })
    }

    /// What ends the call: the revocation of a caller that a janus speaks for.
    fn admit(&self, request: &mut Request<Incoming>) -> Result<Option<CancellationToken>, Status> {
        let peer = request.extensions().get::<Arc<Principal>>().cloned();
        let peer = peer.ok_or_else(|| {
            status(ErrorReason::IdentityMissing, "no certificate came with this call")
        })?;
        let forwarded = request.headers_mut().remove(metadata::PRINCIPAL);
        let between = request.headers_mut().remove(metadata::INTERMEDIATES);
        let proof = request.headers_mut().remove(metadata::PROOF);
        let caller = match (&peer.role, forwarded) {
            (Role::Janus(_), Some(value)) => self.forwarded(&peer, (&value, between), proof)?,
            _ => Caller { principal: peer, forwarded: None },
        };
        let path = request.uri().path();
        if !rights::may_call(&caller.principal.role, path) {
            let what = match path.contains("BackupService/") {
                true => "write backups: use a client certificate".to_owned(),
                false => format!("call {}", shorten(path)),
            };
            let text = format!("{} may not {what}", caller.principal);
            return Err(status(ErrorReason::NotAllowed, text));
        }
        let is_forwarded = caller.forwarded.is_some();
        let end = is_forwarded.then(|| self.identity.revocations().end_of(&caller.principal));
        request.extensions_mut().insert(caller);
        match request.headers().get(metadata::SERVER) {
            Some(wanted) if wanted.as_bytes() != self.server.as_str().as_bytes() => {
                let wanted = String::from_utf8_lossy(wanted.as_bytes()).into_owned();
                let text = format!("this call is for server {wanted:?}, this is {}", self.server);
                Err(status(ErrorReason::WrongServer, text))
            }
            _ => Ok(end),
        }
    }

    /// What a collector of spans is told of a call.
    fn note<B>(&self, request: &Request<B>) {
        trace::note("server", &self.server);
        let text =
            |name| request.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let caller = request.extensions().get::<Caller>();
        let own = caller.and_then(|caller| caller.principal.machine()).map(ToString::to_string);
        if let Some(machine) = own.as_deref().or_else(|| text(metadata::MACHINE)) {
            trace::note("machine", machine);
        }
        if let Some(run) = text(metadata::RUN) {
            trace::note("backup_id", run);
        }
    }

    /// The caller that `janus` speaks for.
    fn forwarded(
        &self,
        janus: &Arc<Principal>,
        certificates: (&HeaderValue, Option<HeaderValue>),
        proof: Option<HeaderValue>,
    ) -> Result<Caller, Status> {
        let principal = self.forwarded_principal(certificates)?;
        let users = &janus.limits.users;
        let is_one_of_them = |user: &str| users.iter().any(|allowed| allowed.as_str() == user);
        if !users.is_empty() && !principal.machine().is_some_and(|m| is_one_of_them(m.user())) {
            let text = format!(
                "{janus} speaks for machines of {} only, not for {principal}",
                users.join(", ")
            );
            return Err(status(ErrorReason::NotAllowed, text));
        }
        let is_proof_needed = self.require_proof.needs(&principal);
        let (janus, here) = (janus.clone(), self.server.clone());
        let identity = self.identity.clone();
        let forwarded = Some(Forwarded { janus, here, is_proof_needed, proof, identity });
        Ok(Caller { principal: Arc::new(principal), forwarded })
    }

    fn forwarded_principal(
        &self,
        (value, between): (&HeaderValue, Option<HeaderValue>),
    ) -> Result<Principal, Status> {
        let refused = |why: String| {
            status(ErrorReason::IdentityMissing, format!("certificate forwarded by janus: {why}"))
        };
        let der = STANDARD.decode(value.as_bytes()).map_err(|e| refused(e.to_string()))?;
        let between = between
            .map_or(Some(Vec::new()), |value| metadata::certificates_of_text(value.as_bytes()));
        let between = between.ok_or_else(|| refused("janus-intermediates isn't a list".into()))?;
        self.identity.verify_forwarded(&der, &between).map_err(|e| refused(e.to_string()))
    }
}

impl<S> Service<Request<Incoming>> for Gate<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Incoming>) -> Self::Future {
        let trace = TraceContext::of(request.headers().get(TRACEPARENT));
        let method = janus_proto::error::shorten(request.uri().path());
        let span = tracing::info_span!("call", trace_id = trace.trace_id(), method);
        let _ = trace.begin(&span);
        let admitted = self.admit(&mut request);
        let name = self.name.clone();
        span.in_scope(|| self.note(&request));
        // The clone takes our place for the next call; the one that was polled ready serves this one.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let answer = async move {
            let mut response = match admitted {
                Ok(None) => inner.call(request.map(Body::new)).await?,
                Ok(Some(end)) => {
                    let answering = inner.call(request.map(Body::new));
                    match end.run_until_cancelled(answering).await {
                        Some(answer) => ending(answer?, end),
                        None => revoked().into_http(),
                    }
                }
                Err(refused) => refused.into_http(),
            };
            response.headers_mut().insert(metadata::SERVER, name);
            Ok(response)
        };
        Box::pin(async move {
            let response = answer.instrument(span.clone()).await?;
            Ok(trace::until_end(response, &span))
        })
    }
}
