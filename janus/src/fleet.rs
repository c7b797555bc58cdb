//! The servers of this janus: all upstreams, in the order of `server_urls`, and the order in which calls try them.
//!
//! `server_urls` may change while janus runs: [`Fleet::follow`] keeps the connections as the list says.

mod twins;

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use futures::future::{BoxFuture, join_all};
use janus_proto::{
    channel::{Dialer, Target},
    ids::{MachineKey, ServerId},
};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{
    agreement::Required,
    balance::Directory,
    patience::Wait,
    registry::{Claim, Registry, Remembered},
    selection::{Candidate, Place, Policy, order},
    upstream::{Down, Link, Need, Upstream},
};

/// All servers; cheap to clone.
#[derive(Debug, Clone)]
pub struct Fleet {
    servers: Arc<ArcSwap<Vec<Upstream>>>,
    probe: Duration,
    registry: Registry,
    required: Option<Required>,
}

/// What the order of servers depends on.
#[derive(Debug, Clone)]
pub struct Call {
    /// Longest ago, or last.
    pub policy: Policy,
    /// What the server is needed for.
    pub need: Need,
    /// Whose recency counts.
    pub machine: Option<MachineKey>,
    /// Use counter that the caller asks for, at least.
    pub asked_use: u64,
    /// Server that has the call's run already: it comes first.
    pub prefer: Option<ServerId>,
    /// When it came.
    pub begun: Instant,
}

impl Fleet {
    /// Servers at `targets`; they are looked for once [`Fleet::follow`] runs.
    /// With `required`, servers that contradict it get starts only when no other can take them.
    pub fn new(
        targets: &[Target],
        probe: Duration,
        registry: Registry,
        required: Option<Required>,
    ) -> Self {
        let fleet = Self { servers: Arc::default(), probe, registry, required };
        fleet.replace(targets);
        fleet
    }

    /// Keeps connections to the servers of `targets`, whenever the list changes, until `stop`.
    ///
    /// A server that is no longer on the list gets no new calls; calls in progress there may go on for `drain`.
    pub async fn follow(
        self,
        mut targets: watch::Receiver<Vec<Target>>,
        dialer: Dialer,
        drain: Duration,
        stop: CancellationToken,
    ) {
        let mut tasks = JoinSet::new();
        let mut kept: Vec<(Upstream, CancellationToken)> = Vec::new();
        loop {
            self.replace(&targets.borrow_and_update());
            let servers = self.servers();
            kept.retain(|(upstream, leave)| {
                let stays = servers.iter().any(|other| other.url() == upstream.url());
                if !stays {
                    info!(server = %upstream.name(), url = upstream.url(), "no longer in server_urls");
                    leave.cancel();
                }
                stays
            });
            for upstream in servers.iter() {
                if kept.iter().all(|(other, _)| other.url() != upstream.url()) {
                    let leave = CancellationToken::new();
                    let running = upstream.clone().run(dialer.clone(), stop.clone());
                    tasks.spawn(run_until_left(running, leave.clone(), drain));
                    kept.push((upstream.clone(), leave));
                }
            }
            tokio::select! {
                biased;
                changed = targets.changed() => if changed.is_err() { break },
                () = stop.cancelled() => break,
            }
            while tasks.try_join_next().is_some() {}
        }
        while tasks.join_next().await.is_some() {}
    }

    /// The servers of `targets` in their order; those that were here stay as they are.
    fn replace(&self, targets: &[Target]) {
        let known = self.servers();
        let upstream = |target: &Target| {
            let same = known.iter().find(|upstream| upstream.url() == target.to_string());
            same.cloned().unwrap_or_else(|| Upstream::new(target.clone(), self.probe))
        };
        self.servers.store(Arc::new(targets.iter().map(upstream).collect()));
    }

    /// All servers, in the order of `server_urls`.
    pub fn servers(&self) -> Arc<Vec<Upstream>> {
        self.servers.load_full()
    }

    /// All that is known of servers, with the URL that leads to each.
    pub fn remembered(&self) -> Vec<Remembered> {
        let mut known = self.registry.remembered();
        for upstream in self.servers().iter() {
            let Some(server) = upstream.server() else { continue };
            if let Some(known) = known.iter_mut().find(|known| known.server == server.as_str()) {
                known.url = upstream.url();
            }
        }
        known
    }

    /// Takes over what was known before a restart.
    pub fn recall(&self, known: Vec<Remembered>) {
        for upstream in self.servers().iter() {
            let at = known.iter().find(|known| known.url == upstream.url());
            if let Some(Ok(server)) = at.map(|known| known.server.parse()) {
                upstream.presume(server);
            }
        }
        self.registry.recall(known);
    }

    /// What is known of them.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Waits, at most a probe's time, until each server was looked for once.
    pub async fn first_look(&self) {
        join_all(self.servers().iter().map(Upstream::first_look)).await;
    }

    /// Whether any server can be used.
    pub fn any_ready(&self, need: Need) -> bool {
        self.servers().iter().any(|server| self.stand(server, need).is_ok())
    }

    /// Looks for `server` now: it has just shown that it lives.
    pub fn look_now(&self, server: &ServerId) {
        for upstream in self.servers().iter() {
            if upstream.server().is_none_or(|known| known == *server)
                && upstream.stand(Need::Link).is_err()
            {
                upstream.look_now();
            }
        }
    }

    /// The server of a pinned call, with its connections.
    ///
    /// # Errors
    /// Why it can't be reached.
    pub(crate) async fn pinned(&self, server: &ServerId) -> Result<(Upstream, Link), Down> {
        if self.named(server).is_none() {
            // It may be one that was never reached yet: then its name isn't known either.
            let servers = self.servers();
            let nameless = servers.iter().filter(|upstream| upstream.server().is_none());
            join_all(nameless.map(|upstream| upstream.gate(Need::Link, Wait::Full))).await;
        }
        let upstream = self.named(server).ok_or_else(|| self.unknown(server))?;
        let link = upstream.gate(Need::Link, Wait::Full).await?;
        Ok((upstream, link))
    }

    fn named(&self, server: &ServerId) -> Option<Upstream> {
        let mut named = self
            .distinct()
            .into_iter()
            .filter(|upstream| upstream.server().as_ref() == Some(server));
        named.next()
    }

    fn unknown(&self, server: &ServerId) -> Down {
        let names: Vec<String> = self.servers().iter().map(Upstream::name).collect();
        let reason = format!(
            "no server of this name was reached yet; server_urls gives {}",
            names.join(", ")
        );
        tracing::debug!(%server, reason, "pinned call to an unknown server");
        Down { reason, since_ms: 0 }
    }

    /// Each server once, also when two URLs lead to it: then the first that has a connection.
    pub(crate) fn distinct(&self) -> Vec<Upstream> {
        let servers = self.servers();
        let mut distinct: Vec<Upstream> = Vec::with_capacity(servers.len());
        for upstream in servers.iter() {
            let server = upstream.server();
            match distinct.iter_mut().find(|other| server.is_some() && other.server() == server) {
                None => distinct.push(upstream.clone()),
                Some(other) if other.stand(Need::Link).is_err() => *other = upstream.clone(),
                Some(_) => {}
            }
        }
        distinct
    }

    fn contradiction(&self, server: Option<&ServerId>) -> Option<&'static str> {
        let (required, server) = (self.required?, server?);
        required.contradicted_by(&self.registry.settings_of(server)?)
    }

    fn candidates(&self, machine: Option<&MachineKey>, targets: &[Upstream]) -> Vec<Candidate> {
        let ids: Vec<Option<ServerId>> = targets.iter().map(Upstream::server).collect();
        let known = self.registry.known(machine, &ids);
        let candidates =
            targets.iter().zip(known).enumerate().map(|(position, (upstream, known))| Candidate {
                name: upstream.name(),
                position,
                use_counter: known.use_counter,
                has_chain: known.has_chain,
                last_starts: known.last_starts,
                initial_runs: known.initial_runs,
                is_seeded: known.is_seeded,
                contradicts: self.contradiction(upstream.server().as_ref()),
            });
        candidates.collect()
    }
}

/// Runs to its end, or for `drain` after `leave`.
async fn run_until_left(
    running: impl Future<Output = ()>,
    leave: CancellationToken,
    drain: Duration,
) {
    let left = async {
        leave.cancelled().await;
        sleep(drain).await;
    };
    tokio::select! {
        biased;
        () = running => {}
        () = left => {}
    }
}

impl Directory for Fleet {
    type Call = Call;
    type Target = Upstream;
    type Claim = Option<Claim>;

    fn targets(&self, _: &Call) -> Vec<Upstream> {
        self.distinct()
    }

    fn order(&self, call: &Call, targets: &[Upstream]) -> Vec<Place> {
        let mut places = order(call.policy, &self.candidates(call.machine.as_ref(), targets));
        if call.prefer.is_some() {
            places.sort_by_key(|place| targets[place.candidate].server() != call.prefer);
        }
        places
    }

    fn wait(&self, call: &Call) -> Wait {
        match call.need {
            Need::Starts => Wait::of_start(self.probe, call.begun.elapsed()),
            Need::Reads | Need::Link => Wait::Full,
        }
    }

    fn gate(
        &self,
        call: &Call,
        target: &Upstream,
        wait: Wait,
    ) -> BoxFuture<'static, Result<(), String>> {
        let (need, target, fleet) = (call.need, target.clone(), self.clone());
        Box::pin(async move {
            target.gate(need, wait).await.map_err(|down| down.reason)?;
            fleet.admit(&target, need).map_err(|down| down.reason)
        })
    }

    fn name(&self, target: &Upstream) -> String {
        target.name()
    }

    fn claim(&self, call: &Call, target: &Upstream) -> Option<Claim> {
        let machine = call.machine.as_ref().filter(|_| call.need == Need::Starts)?;
        Some(self.registry.claim(machine, &target.server()?, call.asked_use))
    }
}
