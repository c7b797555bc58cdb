//! The servers of this janus: all upstreams, in the order of `server_urls`, and the order in which calls try them.

use std::{sync::Arc, time::Duration};

use futures::future::{BoxFuture, join_all};
use janus_proto::{
    channel::Target,
    ids::{MachineKey, ServerId},
};

use crate::{
    agreement::Required,
    balance::Directory,
    registry::{Claim, Registry},
    selection::{Candidate, Place, Policy, order},
    upstream::{Down, Link, Need, Upstream},
};

/// All servers; cheap to clone.
#[derive(Debug, Clone)]
pub struct Fleet {
    servers: Arc<[Upstream]>,
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
}

impl Fleet {
    /// Servers at `targets`; each still needs its [`Upstream::run`].
    /// With `required`, servers that contradict it get starts only when no other can take them.
    pub fn new(
        targets: Vec<Target>,
        probe: Duration,
        registry: Registry,
        required: Option<Required>,
    ) -> Self {
        let servers = targets.into_iter().map(|target| Upstream::new(target, probe)).collect();
        Self { servers, registry, required }
    }

    /// All servers, in the order of `server_urls`.
    pub fn servers(&self) -> &[Upstream] {
        &self.servers
    }

    /// What is known of them.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Waits, at most a probe's time, until each server was looked for once.
    pub async fn first_look(&self) {
        join_all(self.servers.iter().map(Upstream::first_look)).await;
    }

    /// Whether any server can be used.
    pub fn any_ready(&self, need: Need) -> bool {
        self.servers.iter().any(|server| server.stand(need).is_ok())
    }

    /// Looks for `server` now: it has just shown that it lives.
    pub fn look_now(&self, server: &ServerId) {
        for upstream in self.servers.iter() {
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
            let nameless = self.servers.iter().filter(|upstream| upstream.server().is_none());
            join_all(nameless.map(|upstream| upstream.gate(Need::Link))).await;
        }
        let upstream = self.named(server).ok_or_else(|| self.unknown(server))?;
        let link = upstream.gate(Need::Link).await?;
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
        let names: Vec<String> = self.servers.iter().map(Upstream::name).collect();
        let reason = format!(
            "no server of this name was reached yet; server_urls gives {}",
            names.join(", ")
        );
        tracing::debug!(%server, reason, "pinned call to an unknown server");
        Down { reason, since_ms: 0 }
    }

    /// Each server once, also when two URLs lead to it: then the first that has a connection.
    pub(crate) fn distinct(&self) -> Vec<Upstream> {
        let mut distinct: Vec<Upstream> = Vec::with_capacity(self.servers.len());
        for upstream in self.servers.iter() {
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
                contradicts: self.contradiction(upstream.server().as_ref()),
            });
        candidates.collect()
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

    fn gate(&self, call: &Call, target: &Upstream) -> BoxFuture<'static, Result<(), String>> {
        let (need, target) = (call.need, target.clone());
        Box::pin(async move { target.gate(need).await.map(drop).map_err(|down| down.reason) })
    }

    fn name(&self, target: &Upstream) -> String {
        target.name()
    }

    fn claim(&self, call: &Call, target: &Upstream) -> Option<Claim> {
        let machine = call.machine.as_ref().filter(|_| call.need == Need::Starts)?;
        Some(self.registry.claim(machine, &target.server()?, call.asked_use))
    }
}
