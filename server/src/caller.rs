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
use tonic::{Status, body::Body, metadata::MetadataMap};
use tower::Service;
use tracing::Instrument;

use self::ending::{Ends, ending};
use crate::{
    audit::Who,
    policy::{Grants, Policy, Right},
    rights,
};

/// The caller of a request: the peer, or whom a janus speaks for.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Who it is.
    pub principal: Arc<Principal>,
    /// What it may do beyond its own machine.
    grants: Arc<Grants>,
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
        Self { principal: Arc::new(principal), grants: Arc::default(), forwarded: None }
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

    /// The machine that this call is about: a client's own, or the one that `janus-machine` names.
    ///
    /// # Errors
    /// `NOT_ALLOWED` for a machine that isn't the caller's; `INVALID_FIELD` when it isn't named.
    pub fn machine(&self, metadata: &MetadataMap) -> Result<MachineKey, Status> {
        let named = match (self.principal.machine(), named_machine(metadata)?) {
            (_, Some(named)) => named,
            (Some(own), None) => return Ok(own.clone()),
            (None, None) => {
                let text = "janus-machine is missing: users and operators name the machine <user>/<machine>";
                return Err(status(ErrorReason::InvalidField, text));
            }
        };
        let is_server = matches!(self.principal.role, Role::Server(_));
        match self.may_list(&named) && !is_server {
            true => Ok(named),
            false => Err(self.refused("act for this machine")),
        }
    }

    /// The machine of a call that writes: the client itself, or one that the caller may make backups of.
    ///
    /// # Errors
    /// `NOT_ALLOWED` for all others.
    pub fn machine_to_write(&self, metadata: &MetadataMap) -> Result<MachineKey, Status> {
        let own = match &self.principal.role {
            Role::Client(own) => Some(own),
            _ => None,
        };
        match (own, named_machine(metadata)?) {
            (Some(own), None) => Ok(own.clone()),
            (Some(own), Some(named)) if *own == named => Ok(named),
            (_, Some(named)) if self.grants.allow(Right::Backup, &named) => Ok(named),
            (Some(_), Some(named)) => Err(self.refused(&format!("write backups of {named}"))),
            (None, _) => Err(self.refused(rights::WRITING)),
        }
    }

    /// The machine that a call names and that isn't the caller's own.
    pub fn other<'a>(&self, machine: &'a MachineKey) -> Option<&'a MachineKey> {
        (self.principal.machine() != Some(machine)).then_some(machine)
    }

    /// True when the caller may list this machine's snapshots and read hashes. Another server of the group may, to mirror its
    /// tables: it has such data itself.
    pub fn may_list(&self, machine: &MachineKey) -> bool {
        self.may_read(machine) || self.grants.allow(Right::Backup, machine)
    }

    /// True when the caller may read what this machine's snapshots hold.
    pub fn may_read(&self, machine: &MachineKey) -> bool {
        let is_own = match &self.principal.role {
            Role::Client(own) | Role::Restore(own) => own == machine,
            Role::User(name) => machine.user() == name,
            Role::Operator(_) | Role::Server(_) => true,
            Role::Janus(_) => false,
        };
        is_own || self.grants.allow(Right::Restore, machine)
    }

    fn refused(&self, what: &str) -> Status {
        status(ErrorReason::NotAllowed, format!("{} may not {what}", self.principal))
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
    policy: Arc<Policy>,
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
        policy: Arc<Policy>,
    ) -> Result<Self, http::Error> {
        let name = HeaderValue::from_str(server.as_str())?;
        Ok(Self { inner, identity, server, require_proof, policy, name })
    }

    /// What ends the call before its time.
    fn admit(&self, request: &mut Request<Incoming>) -> Result<Ends, Status> {
        let peer = request.extensions().get::<Arc<Principal>>().cloned();
        let peer = peer.ok_or_else(|| {
            status(ErrorReason::IdentityMissing, "no certificate came with this call")
        })?;
        let forwarded = request.headers_mut().remove(metadata::PRINCIPAL);
        let between = request.headers_mut().remove(metadata::INTERMEDIATES);
        let proof = request.headers_mut().remove(metadata::PROOF);
        let caller = match (&peer.role, forwarded) {
            (Role::Janus(_), Some(value)) => self.forwarded(&peer, (&value, between), proof)?,
            _ => Caller { grants: self.policy.of(&peer.role), principal: peer, forwarded: None },
        };
        let path = request.uri().path();
        if !rights::may_call(&caller.principal.role, &caller.grants, path) {
            return Err(match path.contains(rights::WRITES) {
                true => caller.refused(rights::WRITING),
                false => caller.refused(&format!("call {}", shorten(path))),
            });
        }
        // A connection of its own ends by itself.
        let is_forwarded = caller.forwarded.is_some();
        let own = caller.principal.machine().map(MachineKey::as_str);
        let named = request.headers().get(metadata::MACHINE).map(HeaderValue::as_bytes);
        let is_other = named.is_some_and(|named| own.map(str::as_bytes) != Some(named));
        // A machine's own backups build on no group.
        let is_own = own.is_some() && !is_other && path.contains(rights::WRITES);
        let ends = Ends {
            revoked: is_forwarded.then(|| self.identity.revocations().end_of(&caller.principal)),
            lessened: (!is_own && !caller.grants.are_none()).then(|| caller.grants.lessened()),
        };
        request.extensions_mut().insert(caller);
        match request.headers().get(metadata::SERVER) {
            Some(wanted) if wanted.as_bytes() != self.server.as_str().as_bytes() => {
                let wanted = String::from_utf8_lossy(wanted.as_bytes()).into_owned();
                let text = format!("this call is for server {wanted:?}, this is {}", self.server);
                Err(status(ErrorReason::WrongServer, text))
            }
            _ => Ok(ends),
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
        let user = match &principal.role {
            Role::User(name) => Some(name.as_str()),
            role => role.machine().map(MachineKey::user),
        };
        if !users.is_empty() && !user.is_some_and(is_one_of_them) {
            let text = format!(
                "{janus} speaks for machines of {} only, not for {principal}",
                users.join(", ")
            );
            return Err(status(ErrorReason::NotAllowed, text));
        }
        let is_proof_needed = self.require_proof.needs(&principal);
        // Who speaks for some users only is not to reach others' machines by what these may do.
        let grants = match users.is_empty() {
            true => self.policy.of(&principal.role),
            false => Arc::default(),
        };
        let (janus, here) = (janus.clone(), self.server.clone());
        let identity = self.identity.clone();
        let forwarded = Some(Forwarded { janus, here, is_proof_needed, proof, identity });
        Ok(Caller { principal: Arc::new(principal), grants, forwarded })
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
                Ok(ends) if ends.are_never() => inner.call(request.map(Body::new)).await?,
                Ok(ends) => {
                    let answering = inner.call(request.map(Body::new));
                    tokio::select! {
                        biased;
                        why = ends.clone().reached() => why.into_http(),
                        answer = answering => ending(answer?, ends),
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
