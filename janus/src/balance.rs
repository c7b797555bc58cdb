//! Trying servers in the order of the selection, as a tower [`Layer`] and [`Service`]: usable alone, in front of any
//! service that makes one attempt at one server.
//!
//! For each call the [`Directory`] gives the order, [`Directory::gate`] finds out whether a server can be used (which
//! may take a probe), and the inner service makes the [`Attempt`]. All gates run at the same time, so any number of
//! silent servers costs one probe deadline. When a server has failed, what the gates of the others said is old: they are
//! asked again, all at once. [`Directory::wait`] says how long each may take; who was passed over in haste is asked once
//! more, at leisure, before the call is given up. The order is asked for again before each attempt, without an await in
//! between, so that calls at the same time see each other's [`Directory::claim`] and don't all take the same server.
//!
//! ```
//! use futures::future::{BoxFuture, FutureExt, ready};
//! use janus::{balance::{Attempt, BalanceLayer, Directory, Outcome}, patience::Wait, selection::Place};
//! use tower::{Layer, ServiceExt, service_fn};
//!
//! #[derive(Clone)]
//! struct Two;
//! impl Directory for Two {
//!     type Call = &'static str;
//!     type Target = u16;
//!     type Claim = ();
//!     fn targets(&self, _: &Self::Call) -> Vec<u16> { vec![1, 2] }
//!     fn order(&self, _: &Self::Call, targets: &[u16]) -> Vec<Place> {
//!         (0..targets.len()).map(|candidate| Place { candidate, turn: candidate, hold: None }).collect()
//!     }
//!     fn wait(&self, _: &Self::Call) -> Wait { Wait::Full }
//!     fn gate(&self, _: &Self::Call, target: &u16, _: Wait) -> BoxFuture<'static, Result<(), String>> {
//!         ready(if *target == 1 { Err("connection refused".into()) } else { Ok(()) }).boxed()
//!     }
//!     fn name(&self, target: &u16) -> String { target.to_string() }
//!     fn claim(&self, _: &Self::Call, _: &u16) {}
//! }
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let one_attempt = service_fn(|attempt: Attempt<Two, ()>| async move {
//!     Ok::<_, std::convert::Infallible>(Outcome::<(), u16>::Done(attempt.target))
//! });
//! let balanced = BalanceLayer::new(Two).layer(one_attempt).oneshot(("machine", ())).await.unwrap();
//! assert_eq!(balanced.response, Some(2));
//! assert_eq!(balanced.skipped[0].to_string(), "1: connection refused");
//! # });
//! ```

use std::{
    fmt,
    pin::pin,
    task::{Context, Poll},
};

use futures::{
    future::BoxFuture,
    stream::{FuturesUnordered, StreamExt},
};
use janus_proto::show::of_named;
use tower::{Layer, Service, ServiceExt};

use crate::{patience::Wait, selection::Place};

/// Where candidates come from, and what is known of them.
pub trait Directory: Clone + Send + Sync + 'static {
    /// What the order depends on: the machine, the policy.
    type Call: Clone + Send + Sync + 'static;
    /// A server.
    type Target: Clone + Send + Sync + 'static;
    /// Held while an attempt is under way.
    type Claim: Send + 'static;

    /// All candidates of a call; the same list for the whole call.
    fn targets(&self, call: &Self::Call) -> Vec<Self::Target>;
    /// The order in which to try them, as things stand now.
    fn order(&self, call: &Self::Call, targets: &[Self::Target]) -> Vec<Place>;
    /// How long the call may wait for a server that it asks now.
    fn wait(&self, call: &Self::Call) -> Wait;
    /// Whether a server can be used now; waits as long as `wait` says. `Err` says why not, for people.
    fn gate(
        &self,
        call: &Self::Call,
        target: &Self::Target,
        wait: Wait,
    ) -> BoxFuture<'static, Result<(), String>>;
    /// Name of a server in messages.
    fn name(&self, target: &Self::Target) -> String;
    /// An attempt begins.
    fn claim(&self, call: &Self::Call, target: &Self::Target) -> Self::Claim;
}

/// One attempt at one server.
#[derive(Debug)]
pub struct Attempt<D: Directory, R> {
    /// What the order was asked for.
    pub call: D::Call,
    /// The server.
    pub target: D::Target,
    /// The request; it comes back when the next server is to be tried.
    pub request: R,
    /// The claim, to be accepted or dropped.
    pub claim: D::Claim,
    /// How long to wait for a sign of life.
    pub wait: Wait,
    /// Servers passed over so far.
    pub skipped: Vec<Skipped>,
}

/// How an attempt ended.
#[derive(Debug)]
pub enum Outcome<R, T> {
    /// This is the answer, good or bad.
    Done(T),
    /// Try the next server.
    Next {
        /// Why, for people.
        reason: String,
        /// The request, unharmed.
        request: R,
        /// The server's own refusal, to be passed on when no other server takes the call.
        refusal: Option<T>,
    },
}

/// A server that was passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Its name.
    pub server: String,
    /// Why.
    pub reason: String,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.server, of_named(&self.server, &self.reason))
    }
}

/// What came of a call.
#[derive(Debug, PartialEq, Eq)]
pub struct Balanced<T> {
    /// The answer; `None` when no server could be used.
    pub response: Option<T>,
    /// With an answer: servers whose turn came before the one that gave it. Without: all servers.
    pub skipped: Vec<Skipped>,
}

/// Makes [`Balance`] services.
#[derive(Debug, Clone)]
pub struct BalanceLayer<D>(D);

impl<D> BalanceLayer<D> {
    /// A layer over `directory`.
    pub fn new(directory: D) -> Self {
        Self(directory)
    }
}

impl<D: Clone, S> Layer<S> for BalanceLayer<D> {
    type Service = Balance<D, S>;

    fn layer(&self, inner: S) -> Self::Service {
        Balance { directory: self.0.clone(), inner }
    }
}

/// Tries servers in order until one gives the answer.
#[derive(Debug, Clone)]
pub struct Balance<D, S> {
    directory: D,
    inner: S,
}

impl<D, S, R, T> Service<(D::Call, R)> for Balance<D, S>
where
    D: Directory,
    S: Service<Attempt<D, R>, Response = Outcome<R, T>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    R: Send + 'static,
    T: Send + 'static,
{
    type Response = Balanced<T>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    // The inner service is waited for before each attempt, as there may be several.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, (call, request): (D::Call, R)) -> Self::Future {
        let walk = Walk::new(self.directory.clone(), call);
        Box::pin(walk.run(self.inner.clone(), request))
    }
}

type Gates = FuturesUnordered<BoxFuture<'static, (usize, Wait, Result<(), String>)>>;

#[derive(Debug, Clone)]
enum Stand {
    /// Its gate is being asked.
    Unknown,
    /// It can be used, as was known after so many failures of others.
    Open(u32),
    /// No, and why.
    Out(String, Wait),
}

/// One call on its way through the servers.
struct Walk<D: Directory> {
    directory: D,
    call: D::Call,
    targets: Vec<D::Target>,
    stands: Vec<Stand>,
    gates: Gates,
    /// Servers that were found out so far.
    failures: u32,
    /// Those that were passed over in haste are asked again, and nobody is in haste any more.
    is_last_round: bool,
}

impl<D: Directory> Walk<D> {
    fn new(directory: D, call: D::Call) -> Self {
        let targets = directory.targets(&call);
        let stands = vec![Stand::Unknown; targets.len()];
        let gates = FuturesUnordered::new();
        let mut walk =
            Self { directory, call, targets, stands, gates, failures: 0, is_last_round: false };
        (0..walk.targets.len()).for_each(|candidate| walk.ask(candidate));
        walk
    }

    async fn run<S, R, T>(mut self, mut inner: S, mut request: R) -> Result<Balanced<T>, S::Error>
    where
        S: Service<Attempt<D, R>, Response = Outcome<R, T>>,
    {
        let mut first_refusal = None;
        loop {
            inner.ready().await?;
            let places = self.directory.order(&self.call, &self.targets);
            let Some(place) = self.first_not_out(&places) else {
                if self.begin_last_round() {
                    continue;
                }
                return Ok(Balanced {
                    response: first_refusal,
                    skipped: self.skipped(&places, None),
                });
            };
            match self.stands[place.candidate] {
                Stand::Open(failures) if failures == self.failures => {}
                Stand::Open(_) => {
                    self.ask_all_again();
                    continue;
                }
                Stand::Unknown | Stand::Out(..) => {
                    self.wait_for(place.candidate).await;
                    continue;
                }
            }
            // From the order to the claim there is no await: whoever comes next sees this claim.
            let skipped = self.skipped(&places, Some(place));
            let target = self.targets[place.candidate].clone();
            let claim = self.directory.claim(&self.call, &target);
            let (call, wait) = (self.call.clone(), self.wait());
            let attempt = Attempt { call, target, request, claim, wait, skipped: skipped.clone() };
            let attempted = inner.call(attempt);
            match self.gating(attempted).await? {
                Outcome::Done(response) => {
                    return Ok(Balanced { response: Some(response), skipped });
                }
                Outcome::Next { reason, request: back, refusal } => {
                    self.fail(place.candidate, reason, wait);
                    request = back;
                    first_refusal = first_refusal.or(refusal);
                }
            }
        }
    }

    fn wait(&self) -> Wait {
        if self.is_last_round { Wait::Full } else { self.directory.wait(&self.call) }
    }

    fn ask(&mut self, candidate: usize) {
        self.stands[candidate] = Stand::Unknown;
        let wait = self.wait();
        let gate = self.directory.gate(&self.call, &self.targets[candidate], wait);
        self.gates.push(Box::pin(async move { (candidate, wait, gate.await) }));
    }

    /// Asks those whose gates were open before the last failure.
    fn ask_all_again(&mut self) {
        for candidate in 0..self.stands.len() {
            if matches!(self.stands[candidate], Stand::Open(at) if at < self.failures) {
                self.ask(candidate);
            }
        }
    }

    /// Asks those that were passed over in haste; `false`: there are none, or they were asked so already.
    fn begin_last_round(&mut self) -> bool {
        let in_haste = |stand: &Stand| matches!(stand, Stand::Out(_, Wait::AtMost(_)));
        if self.is_last_round || !self.stands.iter().any(in_haste) {
            return false;
        }
        self.is_last_round = true;
        for candidate in 0..self.stands.len() {
            if in_haste(&self.stands[candidate]) {
                self.ask(candidate);
            }
        }
        true
    }

    fn fail(&mut self, candidate: usize, reason: String, wait: Wait) {
        self.stands[candidate] = Stand::Out(reason, wait);
        self.failures += 1;
    }

    fn note(&mut self, (candidate, wait, answer): (usize, Wait, Result<(), String>)) {
        match answer {
            Ok(()) => self.stands[candidate] = Stand::Open(self.failures),
            Err(reason) => self.fail(candidate, reason, wait),
        }
    }

    /// Waits for an attempt while the gates go on.
    async fn gating<F: Future>(&mut self, attempt: F) -> F::Output {
        let mut attempt = pin!(attempt);
        loop {
            tokio::select! {
                biased;
                outcome = &mut attempt => return outcome,
                Some(answer) = self.gates.next() => self.note(answer),
            }
        }
    }

    fn first_not_out(&self, places: &[Place]) -> Option<Place> {
        places.iter().copied().find(|place| !matches!(self.stands[place.candidate], Stand::Out(..)))
    }

    async fn wait_for(&mut self, candidate: usize) {
        while matches!(self.stands[candidate], Stand::Unknown) {
            match self.gates.next().await {
                Some(answer) => self.note(answer),
                None => self.fail(candidate, "has no gate".into(), Wait::Full),
            }
        }
    }

    /// Servers whose turn came before `taken`, or all.
    fn skipped(&self, places: &[Place], taken: Option<Place>) -> Vec<Skipped> {
        let mut before: Vec<&Place> = places
            .iter()
            .filter(|place| taken.is_none_or(|taken| place.turn < taken.turn))
            .collect();
        before.sort_by_key(|place| place.turn);
        let why = |place: &Place| match (&self.stands[place.candidate], place.hold) {
            (Stand::Out(reason, _), _) => Some(reason.clone()),
            (_, Some(hold)) => Some(hold.to_string()),
            _ => None,
        };
        let named = before.into_iter().filter_map(|place| {
            Some(Skipped {
                server: self.directory.name(&self.targets[place.candidate]),
                reason: why(place)?,
            })
        });
        named.collect()
    }
}

#[cfg(test)]
mod tests;
