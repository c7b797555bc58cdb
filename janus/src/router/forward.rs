//! Forwarding: the pinned way to one server, the balanced way through several.

use std::{convert::Infallible, sync::Arc, sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, Version};
use http_body_util::Full;
use janus_proto::{
    error::{ErrorReason, reason, status},
    ids::ServerId,
    metadata,
    places::Place,
};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, sleep},
};
use tonic::{Code, Status, body::Body};
use tower::{Layer, ServiceExt, service_fn};
use tracing::{debug, info};

use super::{
    Router,
    body::{Download, Upload},
    broken,
    classify::Route,
    headers::{self, Caller},
};
use crate::{
    balance::{Attempt, BalanceLayer, Balanced, Outcome, Skipped},
    fleet::{Call, Fleet},
    patience::Wait,
    registry::{Claim, Meter, RunCall},
    selection::Policy,
    traffic::{Class, Stopwatch},
    upstream::{Link, Need, SendError, Upstream},
};

/// A start that a live server doesn't answer for this long is sent to the next one. It may happen there twice then,
/// which is legal: the first server's run ends with its lease.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// Pause between two looks at whether a server that works on a call still lives.
const LIFE_PAUSE: Duration = Duration::from_secs(1);
/// A server that works on a start is looked at more often for so long.
const LONG_START: Duration = Duration::from_secs(2);

/// A request on its way, in a form that can be sent again where that is allowed.
struct Outgoing {
    uri: Uri,
    headers: HeaderMap,
    payload: Payload,
    place: Option<Place>,
}

enum Payload {
    /// The whole body, with its share of the budget.
    Kept(Bytes, Arc<OwnedSemaphorePermit>),
    Stream(Body),
}

impl Outgoing {
    fn request(self, upstream: &Upstream, meter: Option<Arc<Meter>>) -> Request<Body> {
        let body = match self.payload {
            Payload::Kept(bytes, _) => Body::new(Full::new(bytes)),
            Payload::Stream(body) => body,
        };
        let counters = upstream.counters().clone();
        let body = Body::new(Upload { body, counters, meter, _place: self.place });
        let mut request = Request::new(body);
        *request.method_mut() = Method::POST;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = self.uri;
        *request.headers_mut() = self.headers;
        request
    }

    /// The same once more, if it was kept.
    fn again(&self) -> Option<Self> {
        let Payload::Kept(bytes, permit) = &self.payload else { return None };
        let payload = Payload::Kept(bytes.clone(), permit.clone());
        let (uri, headers, place) = (self.uri.clone(), self.headers.clone(), self.place.clone());
        Some(Self { uri, headers, payload, place })
    }

    fn unsent(request: Request<Body>, place: Option<Place>) -> Self {
        let (parts, body) = request.into_parts();
        Self { uri: parts.uri, headers: parts.headers, payload: Payload::Stream(body), place }
    }
}

impl Router {
    pub(super) async fn forward(
        &self,
        route: Route,
        caller: Caller,
        request: Request<Body>,
    ) -> Result<Response<Body>, Status> {
        if route == Route::Start && caller.machine.is_none() {
            let message = format!(
                "a start by {} must name its machine in metadata janus-machine",
                caller.principal
            );
            return Err(status(ErrorReason::InvalidField, message));
        }
        let place = is_bulk(route).then(|| self.0.places.take(&caller.principal)).transpose()?;
        let (parts, body) = request.into_parts();
        let headers = headers::for_server(parts.headers, &caller.principal);
        let payload = match route {
            Route::Stream => Payload::Stream(body),
            _ => {
                let (bytes, permit) = self.0.budget.keep(body).await?;
                Payload::Kept(bytes, Arc::new(permit))
            }
        };
        let out = Outgoing { uri: parts.uri, headers, payload, place };
        let known = caller.run.and_then(|run| self.0.fleet.registry().server_of_run(run));
        let owner = caller.pin.clone().or(known.clone().filter(|_| route != Route::Start));
        match owner {
            Some(server) => self.to_owner(route, caller, out, server).await,
            None => self.balanced(route, caller, out, known).await,
        }
    }

    /// A pinned call: this server or UNAVAILABLE, soon where the server has died; an upload waits for its own time-outs, since
    /// on a slow line its blocks may be all that travels.
    async fn to_owner(
        &self,
        route: Route,
        caller: Caller,
        mut out: Outgoing,
        server: ServerId,
    ) -> Result<Response<Body>, Status> {
        let fleet = &self.0.fleet;
        let unreachable = |reason: &str| {
            let message =
                format!("server {server} can't be reached by janus {}: {reason}", self.0.id);
            status(ErrorReason::ServerUnreachable, message)
        };
        let (upstream, link) =
            fleet.pinned(&server).await.map_err(|down| unreachable(&down.reason))?;
        if route == Route::Start
            && let Some(reason) = fleet.barred(&server)
        {
            let message = format!("server {server} can't take this backup: {reason}");
            return Err(status(ErrorReason::NoServerReady, message));
        }
        let machine = caller.machine.as_ref().filter(|_| route == Route::Start);
        let claim =
            machine.map(|machine| fleet.registry().claim(machine, &server, caller.asked_use));
        set_use(&mut out.headers, claim.as_ref());
        let run = self.run_call(&caller, &server);
        let meter = run.as_ref().map(|run| run.meter().clone());
        let asked = out.headers.get(metadata::USE).cloned();
        let (place, is_stream) = (out.place.clone(), matches!(out.payload, Payload::Stream(_)));
        let sent = wire(&link, route).send(out.request(&upstream, meter));
        let answer = match is_stream {
            true => Ok(sent.await),
            false => while_alive(&upstream, &link, sent).await,
        };
        let failed = match answer {
            Ok(Ok(response)) => {
                let stopwatch = self.stopwatch(route, true, &caller);
                let mut response = returning(response, &upstream, run, place, stopwatch);
                self.note_end(&response, route, true, &caller);
                self.note_start(&caller, &mut response, &upstream, claim, asked);
                return Ok(response);
            }
            Ok(Err(SendError::Unsent(_, error))) => {
                unreachable(&janus_proto::channel::explain_error(&error))
            }
            Ok(Err(SendError::Lost(error))) => broken(&upstream.name(), &error),
            Err(silence) => unreachable(&silence),
        };
        upstream.counters().errors.note_status(&failed);
        Err(failed)
    }

    /// An unpinned call: the servers in order, until one takes it.
    async fn balanced(
        &self,
        route: Route,
        caller: Caller,
        out: Outgoing,
        prefer: Option<ServerId>,
    ) -> Result<Response<Body>, Status> {
        self.0.fleet.first_look().await;
        let is_start = route == Route::Start;
        let rule = self.0.rule;
        let policy = match is_start {
            true => Policy::LeastRecent {
                initial_backups: rule.initial_backups,
                max_initial_runs: rule.max_initial_runs,
            },
            false => Policy::MostRecent,
        };
        let need = if is_start { Need::Starts } else { Need::Reads };
        let call = Call {
            policy,
            need,
            machine: caller.machine.clone(),
            asked_use: caller.asked_use,
            prefer,
            begun: caller.begun,
        };
        let (router, caller) = (self.clone(), Arc::new(caller));
        let one_attempt = service_fn(move |attempt: Attempt<Fleet, Outgoing>| {
            let (router, caller) = (router.clone(), caller.clone());
            Box::pin(
                async move { Ok::<_, Infallible>(router.attempt(route, &caller, attempt).await) },
            ) as BoxFuture<'static, _>
        });
        let service = BalanceLayer::new(self.0.fleet.clone()).layer(one_attempt);
        let Ok(balanced) = service.oneshot((call, out)).await;
        let Balanced { response, skipped }: Balanced<Response<Body>> = balanced;
        let mut response = response.ok_or_else(|| none_ready(is_start, &skipped))?;
        if is_start {
            headers::add_skipped(response.headers_mut(), &skipped);
            headers::add_warnings(response.headers_mut(), self.0.fleet.warnings());
            note_skipped(&response, &skipped);
        }
        Ok(response)
    }

    async fn attempt(
        &self,
        route: Route,
        caller: &Caller,
        attempt: Attempt<Fleet, Outgoing>,
    ) -> Outcome<Outgoing, Response<Body>> {
        let Attempt { call, target: upstream, mut request, claim, wait, .. } = attempt;
        let is_start = route == Route::Start;
        set_use(&mut request.headers, claim.as_ref());
        let (Ok(link), Some(server)) = (upstream.stand(call.need), upstream.server()) else {
            return Outcome::Next { reason: "was lost just now".into(), request, refusal: None };
        };
        let kept = request.again();
        let asked = request.headers.get(metadata::USE).cloned();
        let place = request.place.clone();
        let sent = wire(&link, route).send(request.request(&upstream, None));
        let answer = match (kept.is_some(), is_start) {
            (true, true) => start_while_alive(&upstream, &link, wait, sent).await,
            (true, false) => while_alive(&upstream, &link, sent).await,
            (false, _) => Ok(sent.await),
        };
        let run = self.run_call(caller, &server);
        match (answer, kept) {
            (Ok(Ok(response)), kept) => {
                let stopwatch = self.stopwatch(route, false, caller);
                let mut response = returning(response, &upstream, run, place, stopwatch);
                if let (Some(request), Some(reason)) = (kept, refusal(is_start, &response)) {
                    let worth_showing = grpc_code(&response) != Some(Code::Unavailable);
                    return Outcome::Next {
                        reason,
                        request,
                        refusal: worth_showing.then_some(response),
                    };
                }
                self.note_end(&response, route, false, caller);
                self.note_start(caller, &mut response, &upstream, claim, asked);
                Outcome::Done(response)
            }
            (Ok(Err(error)), Some(request)) => {
                upstream.counters().errors.note_status(&broken(&upstream.name(), error.cause()));
                let reason = janus_proto::channel::explain_error(error.cause());
                debug!(server = %upstream.name(), reason, unprocessed = error.is_unprocessed(), "attempt failed");
                Outcome::Next { reason, request, refusal: None }
            }
            (Ok(Err(SendError::Unsent(request, error))), None) => {
                let reason = janus_proto::channel::explain_error(&error);
                Outcome::Next { reason, request: Outgoing::unsent(*request, place), refusal: None }
            }
            (Ok(Err(SendError::Lost(error))), None) => {
                let status = broken(&upstream.name(), &error);
                upstream.counters().errors.note_status(&status);
                Outcome::Done(status.into_http())
            }
            (Err(reason), request) => {
                let status = status(ErrorReason::ServerUnreachable, reason.as_str());
                upstream.counters().errors.note_status(&status);
                match request {
                    Some(request) => Outcome::Next { reason, request, refusal: None },
                    None => Outcome::Done(status.into_http()),
                }
            }
        }
    }

    fn stopwatch(&self, route: Route, is_pinned: bool, caller: &Caller) -> Stopwatch {
        let class = match (route, is_pinned) {
            (Route::Start, _) => Class::Start,
            (Route::Stream, _) => Class::Upload,
            (Route::Unary { bulk: true }, _) => Class::Download,
            (_, true) => Class::Pinned,
            (_, false) => Class::Read,
        };
        self.0.latencies.begin(class, caller.begun)
    }

    /// An answer that is a status alone is over with its headers: nobody reads its body.
    fn note_end(&self, response: &Response<Body>, route: Route, is_pinned: bool, caller: &Caller) {
        if grpc_code(response).is_some() {
            self.stopwatch(route, is_pinned, caller).end();
        }
    }

    fn run_call(&self, caller: &Caller, server: &ServerId) -> Option<RunCall> {
        Some(self.0.fleet.registry().run_call(caller.run?, server, caller.machine.as_ref()))
    }

    /// A start that the server has accepted counts as a use, whatever happens after.
    fn note_start(
        &self,
        caller: &Caller,
        response: &mut Response<Body>,
        upstream: &Upstream,
        claim: Option<Claim>,
        asked: Option<HeaderValue>,
    ) {
        let Some(claim) = claim.filter(|_| grpc_code(response).is_none_or(|code| code == Code::Ok))
        else {
            return;
        };
        if let Some(asked) = asked {
            response.headers_mut().entry(metadata::USE).or_insert(asked);
        }
        if let Ok(Some(counter)) = headers::number(response.headers(), metadata::USE) {
            claim.accept(counter);
        }
        info!(server = %upstream.name(), machine = %caller.machine.as_ref().map_or("?", |key| key.as_str()), "run started");
        upstream.counters().starts.fetch_add(1, Ordering::Relaxed);
    }
}

fn wire(link: &Link, route: Route) -> &crate::upstream::Wire {
    if is_bulk(route) { &link.bulk } else { &link.control }
}

/// Whether as much may travel as somebody likes.
fn is_bulk(route: Route) -> bool {
    matches!(route, Route::Stream | Route::Unary { bulk: true })
}

fn set_use(headers: &mut HeaderMap, claim: Option<&Claim>) {
    if let Some(claim) = claim {
        headers.insert(metadata::USE, HeaderValue::from(claim.counter()));
    }
}

/// Waits for `answer` as long as the server shows life.
async fn while_alive<T>(
    upstream: &Upstream,
    link: &Link,
    answer: impl Future<Output = T>,
) -> Result<T, String> {
    let death = async {
        loop {
            sleep(LIFE_PAUSE).await;
            if let Err(reason) = upstream.probe(link, Wait::Full).await {
                return reason;
            }
        }
    };
    tokio::select! {
        biased;
        answer = answer => Ok(answer),
        reason = death => Err(reason),
    }
}

/// The same for a start, which is probed at once and often: the server may have been frozen since its last byte, and the
/// caller is to have an answer soon.
async fn start_while_alive<T>(
    upstream: &Upstream,
    link: &Link,
    wait: Wait,
    answer: impl Future<Output = T>,
) -> Result<T, String> {
    let begun = Instant::now();
    let death = async {
        loop {
            if let Err(reason) = upstream.probe(link, wait).await {
                return reason;
            }
            // Nobody can be in time any more for a start that a live server works on for so long.
            let is_long = begun.elapsed() > LONG_START;
            sleep(if is_long { LIFE_PAUSE } else { wait.pause() }).await;
        }
    };
    tokio::select! {
        biased;
        answer = answer => Ok(answer),
        reason = death => Err(reason),
        () = sleep(START_DEADLINE) => {
            Err(format!("did not answer the start for {} s", START_DEADLINE.as_secs()))
        }
    }
}

fn returning(
    response: Response<hyper::body::Incoming>,
    upstream: &Upstream,
    run: Option<RunCall>,
    place: Option<Place>,
    stopwatch: Stopwatch,
) -> Response<Body> {
    let server = upstream.name();
    let counters = upstream.counters().clone();
    counters.errors.note(response.headers());
    let mut response = response.map(|body| {
        let (server, is_over, _place) = (server.clone(), false, place);
        Body::new(Download { body, counters, server, is_over, stopwatch, run, _place })
    });
    headers::name_answer(response.headers_mut(), &server);
    response
}

/// Code of an answer that consists of a status alone.
fn grpc_code(response: &Response<Body>) -> Option<Code> {
    let text = response.headers().get("grpc-status")?;
    Some(Code::from_bytes(text.as_bytes()))
}

/// Why the next server should be asked instead, when the answer is a refusal that concerns this server alone.
fn refusal(is_start: bool, response: &Response<Body>) -> Option<String> {
    let code = grpc_code(response).filter(|code| *code != Code::Ok)?;
    let refused = Status::from_header_map(response.headers())?;
    use ErrorReason as R;
    let moves_on = match reason(&refused) {
        Some(R::Draining | R::WrongServer | R::ServerUnreachable) => true,
        Some(R::StoreFull | R::QuotaExceeded | R::TooMany | R::StoreFailed) => is_start,
        _ => code == Code::Unavailable,
    };
    moves_on.then(|| match refused.message() {
        "" => format!("refused with {code:?}"),
        message => message.to_string(),
    })
}

fn none_ready(is_start: bool, skipped: &[Skipped]) -> Status {
    let each: Vec<String> = skipped.iter().map(ToString::to_string).collect();
    let what = if is_start { "take this backup" } else { "answer this call" };
    let message = match each.is_empty() {
        true => format!("no server can {what}: server_urls of this janus is empty"),
        false => format!("no server can {what}: {}", each.join("; ")),
    };
    // Metadata is at most 64 KiB, and the message travels in it twice.
    let message: String = message.chars().take(4000).collect();
    status(ErrorReason::NoServerReady, message)
}

fn note_skipped(response: &Response<Body>, skipped: &[Skipped]) {
    if !skipped.is_empty() {
        let server = super::answered_by(response, "?");
        let skipped: Vec<String> = skipped.iter().map(ToString::to_string).collect();
        info!(
            server,
            skipped = skipped.join("; "),
            "start went to another server than the one whose turn it was"
        );
    }
}
