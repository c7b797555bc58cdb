//! What is known of all servers, to be kept across a restart of this janus: nothing that the servers would not tell again,
//! but a server that is down then can't.

use std::collections::BTreeMap;

use janus_proto::{
    ids::{MachineKey, ServerId},
    pb,
};

use super::{Chain, Registry, ServerState};

/// What is known of one server.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Remembered {
    /// Its name.
    #[prost(string, tag = "1")]
    pub server: String,
    /// The one of `server_urls` that led to it; empty: none did.
    #[prost(string, tag = "2")]
    pub url: String,
    /// Generation of its store.
    #[prost(string, tag = "3")]
    pub generation: String,
    /// Its start epoch.
    #[prost(uint64, tag = "4")]
    pub epoch: u64,
    /// Where it can be reached without janus.
    #[prost(string, repeated, tag = "5")]
    pub urls: Vec<String>,
    /// Its machines and snapshots.
    #[prost(message, optional, tag = "6")]
    pub state: Option<pb::StateChange>,
    /// Unix milliseconds of its last message.
    #[prost(int64, tag = "7")]
    pub heard_ms: i64,
    /// Machines of which it has nothing but starts, with the Unix milliseconds since when the first is known.
    #[prost(btree_map = "string, int64", tag = "8")]
    pub unfinished: BTreeMap<String, i64>,
}

impl Registry {
    /// Raised by whatever changes what is [`Registry::remembered`].
    pub fn revision(&self) -> u64 {
        self.lock().revision
    }

    /// All that is known; `url` is left empty.
    pub fn remembered(&self) -> Vec<Remembered> {
        let inner = self.lock();
        let of = |(server, state): (&ServerId, &ServerState)| Remembered {
            server: server.to_string(),
            url: String::new(),
            generation: state.version.generation.clone(),
            epoch: state.version.epoch,
            urls: state.urls.clone(),
            state: Some(state.as_change()),
            heard_ms: state.heard_ms,
            unfinished: state.unfinished(),
        };
        inner.servers.iter().map(of).collect()
    }

    /// Takes over what was known before a restart, but of servers that have told something since.
    pub fn recall(&self, known: Vec<Remembered>) {
        let mut inner = self.lock();
        for remembered in known {
            let Ok(server) = remembered.server.parse::<ServerId>() else { continue };
            if inner.servers.len() >= super::MAX_SERVERS || inner.servers.contains_key(&server) {
                continue;
            }
            let mut state = ServerState { heard_ms: remembered.heard_ms, ..Default::default() };
            state.version.generation = remembered.generation;
            state.version.epoch = remembered.epoch;
            state.urls = remembered.urls;
            if let Some(change) = remembered.state {
                state.take_machines(&change.machines);
                state.told.apply(change);
            }
            for (machine, since_ms) in remembered.unfinished {
                let Ok(machine) = machine.parse::<MachineKey>() else { continue };
                if let Some(used) = state.uses.get_mut(&machine) {
                    used.first_ms = since_ms.min(used.first_ms);
                }
            }
            inner.servers.insert(server, state);
        }
    }
}

impl ServerState {
    fn unfinished(&self) -> BTreeMap<String, i64> {
        let unfinished = self.uses.iter().filter(|(_, used)| used.is_unfinished);
        unfinished.map(|(machine, used)| (machine.to_string(), used.first_ms)).collect()
    }

    fn as_change(&self) -> pb::StateChange {
        let machines = self.uses.iter().map(|(machine, used)| pb::MachineReport {
            machine: machine.to_string(),
            use_counter: used.counter,
            has_chain: used.chain == Chain::Present,
            proof: self.told.proofs.get(machine).cloned(),
            alarm: self.told.alarms.get(machine).cloned().unwrap_or_default(),
            never_committed: used.is_unfinished,
        });
        pb::StateChange {
            machines: machines.collect(),
            snapshots: self.told.snapshots.values().cloned().collect(),
            removed_snapshots: Vec::new(),
        }
    }
}
