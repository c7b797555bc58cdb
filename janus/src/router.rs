//! Every call: answered here, or forwarded untouched to the server it belongs to.
//!
//! Decided by `:path` and metadata alone; messages are never decoded on their way through. Starts go to the server the
//! machine used longest ago, pinned calls to theirs and nowhere else, the rest to the server used last. Only requests
//! that are kept here whole (starts and other single messages) move to another server when one fails; everything else
//! ends with UNAVAILABLE, and the client resumes.

mod body;
mod classify;
mod forward;
mod headers;

use std::{
    convert::Infallible,
    error::Error,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use janus_proto::{
    error::{ErrorReason, status},
    ids::ServerId,
    metadata,
    places::Places,
    punctual::Punctual,
    tls::{Principal, Role},
    trace::{self, TRACEPARENT, TraceContext},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, body::Body};
use tower::{Service, ServiceExt};
use tracing::Instrument;

pub(crate) use self::headers::for_server;
use self::{
    body::{Budget, UntilDrain},
    classify::{Route, Routes},
    headers::Caller,
};
use crate::{
    fleet::Fleet,
    selection::InitialBackups,
    traffic::{Class, Latencies},
};

/// How starts are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartRule {
    /// Whether servers get first full backups by themselves.
    pub initial_backups: InitialBackups,
    /// First backups that one server takes at once before others are preferred.
    pub max_initial_runs: u32,
}

/// How many bulk streams pass through at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BulkLimit {
    /// In all.
    pub streams: usize,
    /// Of one caller.
    pub of_one_caller: usize,
    /// A message of a request must come within this time.
    pub stall: Duration,
}

/// The service behind the listener; cheap to clone.
#[derive(Clone)]
pub struct Router(Arc<Inner>);

struct Inner {
    id: ServerId,
    fleet: Fleet,
    rule: StartRule,
    routes: Routes,
    local: tonic::service::Routes,
    budget: Budget,
    places: Places,
    stall: Duration,
    drain: CancellationToken,
    latencies: Latencies,
}

impl Router {
    /// A router named `id` before the servers of `fleet`. `local` answers what isn't forwarded; its streams end with
    /// `drain`.
    pub fn new(
        id: ServerId,
        fleet: Fleet,
        rule: StartRule,
        bulk: BulkLimit,
        local: tonic::service::Routes,
        drain: CancellationToken,
        latencies: Latencies,
    ) -> Self {
        let routes = Routes::new(janus_proto::pb::DESCRIPTORS);
        Self(Arc::new(Inner {
            id,
            fleet,
            rule,
            routes,
            local: local.prepare(),
            budget: Budget::new(),
            places: Places::new("janus", bulk.streams, bulk.of_one_caller),
            stall: bulk.stall,
            drain,
            latencies,
        }))
    }

    /// The request; callers other than servers must send their messages in time. Servers' reports are silent for as long as their
    /// settings say.
    fn punctual<B>(&self, request: Request<B>) -> Request<Body>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let caller = request.extensions().get::<Arc<Principal>>();
        let is_server = caller.is_some_and(|caller| matches!(caller.role, Role::Server(_)));
        request.map(Body::new).map(|body| match is_server {
            true => body,
            false => Body::new(Punctual::new(body, self.0.stall)),
        })
    }

    /// Answers one call, in a span that carries the caller's trace; what is sent on belongs to the same trace.
    async fn answer(&self, mut request: Request<Body>) -> Response<Body> {
        let trace = TraceContext::of(request.headers().get(TRACEPARENT));
        let method = janus_proto::error::shorten(request.uri().path());
        let span = tracing::info_span!("call", trace_id = trace.trace_id(), method);
        let next = trace.begin(&span);
        if let Some(header) = next.header() {
            request.headers_mut().insert(TRACEPARENT, header);
        }
        request.extensions_mut().insert(next);
        let response = self.answer_in_span(request).instrument(span.clone()).await;
        trace::until_end(response, &span)
    }

    async fn answer_in_span(&self, request: Request<Body>) -> Response<Body> {
        let mut response = match self.route(request).await {
            Ok(response) => response,
            Err(status) => status.into_http(),
        };
        headers::name_answer(response.headers_mut(), self.0.id.as_str());
        trace::note("server", answered_by(&response, self.0.id.as_str()));
        response
    }

    async fn route(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let route = self.0.routes.of(request.uri().path());
        match route {
            Route::Local => return Ok(self.locally(request).await),
            Route::Unknown => {
                let path = janus_proto::error::shorten(request.uri().path());
                return Err(Status::unimplemented(format!("janus doesn't know {path}")));
            }
            Route::Merged | Route::Start | Route::Unary { .. } | Route::Stream => {}
        }
        let principal = request.extensions().get::<Arc<Principal>>().cloned();
        let principal = principal
            .ok_or_else(|| status(ErrorReason::IdentityMissing, "caller has no certificate"))?;
        let caller = Caller::read(principal, request.headers())?;
        caller.check_machine(self.0.fleet.registry(), route == Route::Start)?;
        if let Some(machine) = &caller.machine {
            trace::note("machine", machine);
        }
        if let Some(run) = caller.run {
            trace::note("backup_id", run);
        }
        if route == Route::Merged && caller.pin.as_ref().is_none_or(|pin| *pin == self.0.id) {
            let mut stopwatch = self.0.latencies.begin(Class::Catalog, caller.begun);
            let response = self.locally(request).await;
            stopwatch.end();
            return Ok(response);
        }
        self.forward(route, caller, request).await
    }

    async fn locally(&self, request: Request<Body>) -> Response<Body> {
        let answer = self.0.local.clone().oneshot(request).await;
        let Ok(response) = answer.map_err(|never: Infallible| match never {});
        let drain = self.0.drain.clone().cancelled_owned();
        response.map(|body| Body::new(UntilDrain { body, drain: Box::pin(drain), is_over: false }))
    }
}

impl<B> Service<Request<B>> for Router
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let router = self.clone();
        Box::pin(async move { Ok(router.answer(router.punctual(request)).await) })
    }
}

/// What HTTP/2 says of an error, if it is one of HTTP/2.
pub(crate) fn h2_cause(error: &hyper::Error) -> Option<&h2::Error> {
    error.source()?.downcast_ref::<h2::Error>()
}

/// The status of a call that lost its server.
pub(crate) fn broken(server: &str, error: &hyper::Error) -> Status {
    let reset =
        h2_cause(error).filter(|h2| h2.is_reset() && h2.is_remote()).and_then(h2::Error::reason);
    let code = match reset {
        None | Some(h2::Reason::REFUSED_STREAM) => {
            let reason = janus_proto::channel::explain_error(error);
            return status(
                ErrorReason::ServerUnreachable,
                format!("server {server} was lost: {reason}"),
            );
        }
        Some(h2::Reason::CANCEL) => Code::Cancelled,
        Some(h2::Reason::ENHANCE_YOUR_CALM) => Code::ResourceExhausted,
        Some(_) => Code::Internal,
    };
    let reason = reset.as_ref().map(h2::Reason::description).unwrap_or_default();
    Status::new(code, format!("server {server} reset the stream: {reason}"))
}

/// The server that answered, as its answer says.
pub(crate) fn answered_by<'a>(response: &'a Response<Body>, otherwise: &'a str) -> &'a str {
    response
        .headers()
        .get(metadata::SERVER)
        .and_then(|value| value.to_str().ok())
        .unwrap_or(otherwise)
}
