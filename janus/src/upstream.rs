//! One server, as this janus reaches it: a task that keeps two connections to it and knows whether it is ready.
//!
//! Ready means: health Watch says SERVING on a live connection. A lost connection is not ready at once; a new one
//! counts from its first SERVING. A server that doesn't answer a probe is *suspect* until any byte comes from it, while
//! its connections and the streams on them go on: a slow line is not a dead server.
//!
//! The control connection carries health and unary calls, the bulk connection streams, so that a stalled upload can't
//! keep health from getting through.

mod health;
mod task;
mod wire;

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use janus_proto::{
    channel::{Dialer, Target},
    clock::unix_ms,
    ids::ServerId,
};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;

use self::health::Serving;
pub(crate) use self::{
    health::{BACKUP_SERVICE, RESTORE_SERVICE},
    wire::{SendError, Wire},
};
use crate::{patience::Wait, traffic::Errors};

/// Knowledge older than this is stale: a probe comes before a start.
pub(crate) const STALE: Duration = Duration::from_secs(5);
/// The same for starts. One that is sent to a server behind a cut line arrives there all the same once the line is whole:
/// then it counts as a use, and holds the machine's lease for a while.
const STALE_FOR_STARTS: Duration = Duration::from_millis(200);

/// What a server is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Need {
    /// Starts of runs.
    Starts,
    /// Everything that it may be asked without a pin.
    Reads,
    /// A pinned call: any live connection will do.
    Link,
}

/// Live connections.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    pub control: Wire,
    pub bulk: Wire,
}

impl Link {
    /// Time since the last byte on either connection.
    pub fn silence(&self) -> Duration {
        self.control.pulse().silence().min(self.bulk.pulse().silence())
    }
}

/// Why a server can't be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Down {
    /// For people.
    pub reason: String,
    /// Unix milliseconds; 0: since this janus started.
    pub since_ms: i64,
}

#[derive(Debug, Clone)]
struct State {
    server: Option<ServerId>,
    link: Option<Link>,
    starts: Serving,
    reads: Serving,
    /// Why there is no link.
    reason: String,
    since_ms: i64,
    /// Looks that are over, well or badly.
    looks: u64,
}

/// What has passed through this janus.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub starts: AtomicU64,
    pub bytes_sent: AtomicU64,
    pub bytes_received: AtomicU64,
    /// Calls that ended with an error, by its reason or code.
    pub errors: Errors,
}

struct Inner {
    target: Target,
    probe: Duration,
    state: watch::Sender<State>,
    /// Wakes in the order of waiting, which a watch doesn't promise: simulations need it to replay.
    changed: Notify,
    look: Notify,
    counters: Arc<Counters>,
    /// Milliseconds after `begun` when it didn't answer a probe; 0: it did.
    suspect: AtomicU64,
    suspect_since_ms: AtomicI64,
    /// Milliseconds after `begun` when the present attempt to connect began; 0: there is none.
    looking_since: AtomicU64,
    /// Smoothed round trip in microseconds.
    round_trip: AtomicU64,
    /// Unix seconds at which the certificate that it showed last expires; 0: none was seen.
    certificate_expires: AtomicI64,
    begun: Instant,
}

/// One server; cheap to clone.
#[derive(Clone)]
pub struct Upstream(Arc<Inner>);

impl std::fmt::Debug for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Upstream({})", self.name())
    }
}

impl Upstream {
    /// A server that isn't looked for yet: see [`Upstream::run`].
    pub fn new(target: Target, probe: Duration) -> Self {
        let state = State {
            server: None,
            link: None,
            starts: Serving::No("not asked yet".into()),
            reads: Serving::No("not asked yet".into()),
            reason: "not reached yet".into(),
            since_ms: 0,
            looks: 0,
        };
        Self(Arc::new(Inner {
            target,
            probe,
            state: watch::Sender::new(state),
            changed: Notify::new(),
            look: Notify::new(),
            counters: Arc::default(),
            suspect: AtomicU64::new(0),
            suspect_since_ms: AtomicI64::new(0),
            looking_since: AtomicU64::new(0),
            round_trip: AtomicU64::new(0),
            certificate_expires: AtomicI64::new(0),
            begun: Instant::now(),
        }))
    }

    /// Keeps the connections until `stop`. To be called once.
    pub async fn run(self, dialer: Dialer, stop: CancellationToken) {
        // The connections end after the task that watches them, or it would take our own end for a loss.
        let kill = CancellationToken::new();
        let _kill_on_drop = kill.clone().drop_guard();
        stop.run_until_cancelled(task::run(self, dialer, kill)).await;
    }

    /// Name in its certificate, once it was reached.
    pub fn server(&self) -> Option<ServerId> {
        self.0.state.borrow().server.clone()
    }

    /// The name of the server that was here before this janus' start: it counts until a connection shows another.
    pub(crate) fn presume(&self, server: ServerId) {
        self.change(|state| state.server = state.server.take().or(Some(server)));
    }

    /// Name, or URL while the name isn't known.
    pub fn name(&self) -> String {
        self.server().map_or_else(|| self.url(), |server| server.to_string())
    }

    /// Its URL in the settings.
    pub fn url(&self) -> String {
        self.0.target.to_string()
    }

    /// Unix milliseconds of the last change of its readiness.
    pub(crate) fn changed_ms(&self) -> i64 {
        self.0.state.borrow().since_ms
    }

    /// Smoothed round trip; `None` before the first.
    pub(crate) fn round_trip(&self) -> Option<Duration> {
        let micros = self.0.round_trip.load(Ordering::Relaxed);
        (micros > 0).then(|| Duration::from_micros(micros))
    }

    /// Unix seconds at which the certificate that it showed last expires.
    pub(crate) fn certificate_expires(&self) -> Option<i64> {
        Some(self.0.certificate_expires.load(Ordering::Relaxed)).filter(|seconds| *seconds != 0)
    }

    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.0.counters
    }

    /// Its connections, if it can be used for `need` as far as is known.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn stand(&self, need: Need) -> Result<Link, Down> {
        let state = self.0.state.borrow();
        let down = |reason: &str| Down { reason: reason.to_string(), since_ms: state.since_ms };
        let Some(link) = state.link.clone() else {
            return Err(match self.unanswered() {
                Some(time) => down(&format!("no answer for {} ms", time.as_millis())),
                None => down(&state.reason),
            });
        };
        if need == Need::Link {
            return Ok(link);
        }
        if self.is_suspect(&link) {
            let since_ms = self.0.suspect_since_ms.load(Ordering::Relaxed);
            return Err(Down { reason: "does not answer".into(), since_ms });
        }
        match if need == Need::Starts { &state.starts } else { &state.reads } {
            Serving::Yes => Ok(link),
            Serving::No(reason) => Err(down(reason)),
        }
    }

    /// Whether it can be used for `need` now. Probes when the last byte is old, looks again when there is no connection;
    /// takes no longer than `wait` allows.
    ///
    /// # Errors
    /// Why not.
    pub(crate) async fn gate(&self, need: Need, wait: Wait) -> Result<Link, Down> {
        let fresh = if need == Need::Starts { STALE_FOR_STARTS } else { STALE };
        let linked = self.0.state.borrow().link.clone();
        match linked {
            None => self.look_again(wait).await,
            Some(_) if need == Need::Link => {}
            Some(link) if link.silence() < fresh && !self.is_suspect(&link) => {}
            Some(link) => {
                if let Err(reason) = self.probe(&link, wait).await {
                    // In haste it is not suspect, but this call had no sign of life from it.
                    self.stand(need)?;
                    return Err(Down { reason, since_ms: self.changed_ms() });
                }
            }
        }
        self.stand(need)
    }

    /// Asks for a sign of life. Without one for the whole deadline of a probe the server is suspect.
    ///
    /// # Errors
    /// How long it was silent.
    pub(crate) async fn probe(&self, link: &Link, wait: Wait) -> Result<(), String> {
        let (limit, begun) = (self.limit(wait), Instant::now());
        if health::shows_life(&link.control, limit).await || link.silence() < limit {
            self.note_round_trip(begun.elapsed());
            return Ok(());
        }
        if limit == self.probe_limit() {
            self.suspect();
        }
        Err(format!("no answer for {} ms", limit.as_millis()))
    }

    /// Deadline of a probe: as set, but never below four round trips.
    pub(crate) fn probe_limit(&self) -> Duration {
        self.0.probe.max(self.least_limit())
    }

    /// Four round trips: no answer within less says nothing.
    fn least_limit(&self) -> Duration {
        4 * Duration::from_micros(self.0.round_trip.load(Ordering::Relaxed))
    }

    fn limit(&self, wait: Wait) -> Duration {
        match wait {
            Wait::Full => self.probe_limit(),
            Wait::AtMost(limit) => limit.max(self.least_limit()).min(self.probe_limit()),
        }
    }

    /// Looks for the server now instead of at the end of the pause.
    pub(crate) fn look_now(&self) {
        self.0.look.notify_one();
    }

    /// How long the present attempt to connect has lasted, when that is longer than a probe may take.
    fn unanswered(&self) -> Option<Duration> {
        let since = self.0.looking_since.load(Ordering::Relaxed);
        let lasted = self.0.begun.elapsed().saturating_sub(Duration::from_millis(since));
        (since > 0 && lasted >= self.probe_limit()).then_some(lasted)
    }

    fn note_look(&self, is_looking: bool) {
        let since = if is_looking { (self.0.begun.elapsed().as_millis() as u64).max(1) } else { 0 };
        self.0.looking_since.store(since, Ordering::Relaxed);
    }

    /// Looks now and waits for what comes of it. A look that is under way has had a part of the time already.
    async fn look_again(&self, wait: Wait) {
        let looks = self.0.state.borrow().looks;
        self.look_now();
        let since = match self.0.looking_since.load(Ordering::Relaxed) {
            0 => Instant::now(),
            since => self.0.begun + Duration::from_millis(since),
        };
        let until = (since + self.probe_limit()).min(Instant::now() + self.limit(wait));
        let over = |state: &State| state.link.is_some() || state.looks > looks;
        let _ = timeout_at(until, self.wait_for(over)).await;
    }

    /// Waits until the first look is over, at most a probe's time: before that nothing is known.
    pub(crate) async fn first_look(&self) {
        let until = Instant::now() + self.0.probe;
        let _ = timeout_at(until, self.wait_for(|state| state.looks > 0)).await;
    }

    async fn wait_for(&self, is_met: impl Fn(&State) -> bool) {
        loop {
            let mut changed = pin!(self.0.changed.notified());
            changed.as_mut().enable();
            if is_met(&self.0.state.borrow()) {
                return;
            }
            changed.await;
        }
    }

    fn suspect(&self) {
        let now = (self.0.begun.elapsed().as_millis() as u64).max(1);
        if self.0.suspect.swap(now, Ordering::Relaxed) == 0 {
            self.0.suspect_since_ms.store(unix_ms(), Ordering::Relaxed);
            tracing::warn!(server = %self.name(), "does not answer: no starts go there until it does");
        }
    }

    /// Any byte since the missed probe clears the suspicion.
    fn is_suspect(&self, link: &Link) -> bool {
        let at = self.0.suspect.load(Ordering::Relaxed);
        if at == 0 {
            return false;
        }
        let now = self.0.begun.elapsed().as_millis() as u64;
        let silent_since = now.saturating_sub(link.silence().as_millis() as u64);
        if silent_since <= at {
            return true;
        }
        self.0.suspect.store(0, Ordering::Relaxed);
        tracing::info!(server = %self.name(), "answers again");
        false
    }

    fn note_round_trip(&self, sample: Duration) {
        let (old, new) = (self.0.round_trip.load(Ordering::Relaxed), sample.as_micros() as u64);
        // Down faster than up: a packet that was held makes one sample long, and the deadlines that follow from it with it.
        let smoothed = match old {
            0 => new,
            old if new < old => (old + new) / 2,
            old => (old * 7 + new) / 8,
        };
        self.0.round_trip.store(smoothed, Ordering::Relaxed);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        self.0.state.send_modify(change);
        self.0.changed.notify_waiters();
    }
}
