//! What one caller may have of this server at once, behind a janus or not, and for how long a request may take to come.
//!
//! Streams of blocks and hashes have a thread each, of the 512 that the runtime has for work that blocks: no caller, and not all of
//! them together, may take those that commits and starts need.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::{Frame, SizeHint};
use janus_proto::{
    error::{ErrorReason, status},
    places::{Place, Places},
    punctual::Punctual,
    shares::{Share, Shares},
    tls::{Principal, Role},
};
use tonic::{Status, body::Body};
use tower::Service;

use crate::caller::Caller;

/// Calls that have a thread for as long as they last.
const BULK: [&str; 4] = [
    "/janus.v1.BackupService/WriteBlocks",
    "/janus.v1.RestoreService/ReadBlocks",
    "/janus.v1.RestoreService/ReadHashes",
    "/janus.v1.TableService/ReadTable",
];
/// Open calls of one caller through all its connections and every janus.
const CALLS: usize = 128;

/// The limits.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Bulk streams in all.
    pub streams: usize,
    /// Bulk streams of one caller.
    pub streams_of_one_caller: usize,
    /// A message of a request must come within this time.
    pub stall: Duration,
}

/// Services, bounded. Stands behind the gate, which says who calls.
#[derive(Clone)]
pub struct Bounds<S> {
    inner: S,
    limits: Arc<Limits>,
}

struct Limits {
    places: Places,
    calls: Shares,
    stall: Duration,
}

/// What a call holds until its answer is over.
struct Held {
    _place: Option<Place>,
    _call: Share,
}

impl<S> Bounds<S> {
    /// Bounds before `inner`.
    pub fn new(inner: S, plan: Plan) -> Self {
        let places = Places::new("server", plan.streams, plan.streams_of_one_caller);
        let limits = Limits { places, calls: Shares::new(CALLS), stall: plan.stall };
        Self { inner, limits: Arc::new(limits) }
    }
}

impl Limits {
    fn take(&self, caller: &Principal, path: &str) -> Result<Held, Status> {
        let name = caller.to_string().into();
        let too_many = || {
            let text = format!("{caller} has {} open calls here", self.calls.each());
            status(ErrorReason::TooMany, text)
        };
        let call = self.calls.take(&name).ok_or_else(too_many)?;
        let place = BULK.contains(&path).then(|| self.places.take(caller)).transpose()?;
        Ok(Held { _place: place, _call: call })
    }
}

impl<S> Service<Request<Body>> for Bounds<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // Without a caller the services refuse it themselves.
        let caller = request.extensions().get::<Caller>().map(|caller| caller.principal.clone());
        let Some(caller) = caller.filter(|caller| !matches!(caller.role, Role::Janus(_))) else {
            return Box::pin(self.inner.call(request));
        };
        let held = match self.limits.take(&caller, request.uri().path()) {
            Ok(held) => held,
            Err(refused) => return Box::pin(std::future::ready(Ok(refused.into_http()))),
        };
        let stall = self.limits.stall;
        let answer = self.inner.call(request.map(|body| Body::new(Punctual::new(body, stall))));
        Box::pin(
            async move { Ok(answer.await?.map(|body| Body::new(Holding { body, _held: held }))) },
        )
    }
}

/// An answer's body with what its call holds.
struct Holding {
    body: Body,
    _held: Held,
}

impl hyper::body::Body for Holding {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}
