//! Who this janus is, and what it knows of its servers.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use janus_proto::{
    clock::unix_ms,
    ids::ServerId,
    pb::{
        Fetching, GetRouterStatusRequest, GetRouterStatusResponse, GetServerInfoRequest,
        GetServerInfoResponse, MachineStatus, MachineUse, ServerStatus, WakeServersRequest,
        WakeServersResponse,
        server_info_service_server::{ServerInfoService, ServerInfoServiceServer},
    },
    tls::{Identity, Principal},
};
use tonic::{Request, Response, Status};

use crate::{
    fleet::Fleet,
    registry::Sight,
    upstream::{Need, Upstream},
    wake::Waker,
};

/// Answers for this janus.
#[derive(Debug, Clone)]
pub struct Info {
    id: ServerId,
    fleet: Fleet,
    identity: Identity,
    waker: Arc<Waker>,
}

impl Info {
    /// Of the janus named `id`, with this certificate, before these servers.
    pub fn new(id: ServerId, fleet: Fleet, identity: Identity, waker: Waker) -> Self {
        Self { id, fleet, identity, waker: Arc::new(waker) }
    }

    /// The service.
    pub fn service(self) -> ServerInfoServiceServer<Self> {
        ServerInfoServiceServer::new(self)
    }

    /// Name of this janus.
    pub fn id(&self) -> &ServerId {
        &self.id
    }

    /// The servers.
    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// How all stands now, with the machines that somebody may see.
    pub fn status(&self, sight: &Sight) -> GetRouterStatusResponse {
        let mut servers: Vec<ServerStatus> =
            self.fleet.servers().iter().map(|server| self.line(server, sight)).collect();
        // While a server of server_urls was never reached, its name isn't known, so it may be the one that reports.
        let all_named = servers.iter().all(|line| !line.server_id.is_empty());
        for server in self.fleet.registry().servers().iter().filter(|_| all_named) {
            if servers.iter().all(|line| line.server_id != server.as_str()) {
                servers.push(self.stranger(server, sight));
            }
        }
        GetRouterStatusResponse {
            janus_id: self.id.to_string(),
            version: env!("CARGO_PKG_VERSION").into(),
            servers,
            machines: self.machines(sight),
            warnings: self.fleet.warnings(),
            certificate_expires_ms: self.identity.expires().saturating_mul(1000),
            certificate_valid_ms: self.identity.valid_seconds().saturating_mul(1000),
        }
    }

    fn report_age_ms(&self, server: Option<&ServerId>) -> i64 {
        let age = server.and_then(|server| self.fleet.registry().report_age(server));
        age.map_or(-1, millis)
    }

    fn last_report_ms(&self, server: Option<&ServerId>) -> i64 {
        server.and_then(|server| self.fleet.registry().heard_ms(server)).unwrap_or(0)
    }

    /// When a backup on a server was last proven.
    fn proven_ms(&self, server: &ServerId, sight: &Sight) -> i64 {
        let proofs = self.fleet.registry().proofs(server, sight);
        proofs.iter().map(|(_, proof)| proof.proven_ms).max().unwrap_or(0)
    }

    fn line(&self, upstream: &Upstream, sight: &Sight) -> ServerStatus {
        let server = upstream.server();
        let down = self.fleet.stand(upstream, Need::Starts).err();
        let counters = upstream.counters();
        let vitals = server.as_ref().and_then(|id| self.fleet.registry().vitals_of(id));
        let vitals = vitals.unwrap_or_default();
        let seen_ms = upstream.certificate_expires().map(|seconds| seconds.saturating_mul(1000));
        ServerStatus {
            report_age_ms: self.report_age_ms(server.as_ref()),
            last_report_ms: self.last_report_ms(server.as_ref()),
            settings: server.as_ref().and_then(|id| self.fleet.registry().settings_of(id)),
            damaged: server
                .as_ref()
                .map(|id| self.fleet.registry().damaged(id, sight))
                .unwrap_or_default(),
            incomplete_snapshots: server
                .as_ref()
                .map_or(0, |id| self.fleet.registry().incomplete(id, sight)),
            proven_ms: server.as_ref().map_or(0, |id| self.proven_ms(id, sight)),
            warnings: if sight.is_all() { vitals.warnings } else { Vec::new() },
            fetching: seen(vitals.fetching, sight),
            revocations_digest: vitals.revocations_digest,
            server_id: server.map(String::from).unwrap_or_default(),
            url: upstream.url(),
            ready: down.is_none(),
            since_ms: down.as_ref().map_or_else(|| upstream.changed_ms(), |down| down.since_ms),
            reason: down.map(|down| down.reason).unwrap_or_default(),
            starts: counters.starts.load(Ordering::Relaxed),
            bytes_sent: counters.bytes_sent.load(Ordering::Relaxed),
            bytes_received: counters.bytes_received.load(Ordering::Relaxed),
            free_bytes: vitals.free_bytes,
            total_bytes: vitals.total_bytes,
            // A server that has read a new certificate reports it; connections from before still show the old one.
            certificate_expires_ms: match vitals.certificate_expires_ms {
                0 => seen_ms.unwrap_or(0),
                told => told,
            },
            certificate_valid_ms: vitals.certificate_valid_ms,
        }
    }

    /// The backups of each machine, or of one, and how it has used the servers.
    fn machines(&self, sight: &Sight) -> Vec<MachineStatus> {
        let foreign = |name: &str| !sight.sees_name(name);
        let mut machines: BTreeMap<String, MachineStatus> = BTreeMap::new();
        for ((name, server), last_backup_ms) in self.fleet.registry().last_backups() {
            if foreign(&name) {
                continue;
            }
            let machine = machines.entry(name.clone()).or_insert_with(|| MachineStatus {
                machine: name,
                last_backup_ms: i64::MIN,
                ..Default::default()
            });
            if last_backup_ms > machine.last_backup_ms {
                machine.last_backup_ms = last_backup_ms;
                machine.server_id = server.to_string();
            }
            machine.uses.push(MachineUse {
                server_id: server.into(),
                last_backup_ms,
                ..Default::default()
            });
        }
        for (name, first_use_ms) in self.fleet.registry().unfinished() {
            let machine = name.to_string();
            if !foreign(&machine) && !machines.contains_key(&machine) {
                let status =
                    MachineStatus { first_use_ms, machine: machine.clone(), ..Default::default() };
                machines.insert(machine, status);
            }
        }
        for server in self.fleet.registry().servers() {
            for (name, use_counter) in self.fleet.registry().uses(&server) {
                let Some(machine) = machines.get_mut(name.as_str()) else { continue };
                match machine.uses.iter_mut().find(|at| at.server_id == server.as_str()) {
                    Some(at) => at.use_counter = use_counter,
                    None => machine.uses.push(MachineUse {
                        server_id: server.to_string(),
                        use_counter,
                        ..Default::default()
                    }),
                }
            }
            for (name, alarm) in self.fleet.registry().alarms(&server, sight) {
                let machine = machines.get_mut(name.as_str());
                let mut uses = machine.into_iter().flat_map(|machine| &mut machine.uses);
                if let Some(at) = uses.find(|at| at.server_id == server.as_str()) {
                    at.alarm = alarm;
                }
            }
            for (name, proof) in self.fleet.registry().proofs(&server, sight) {
                let machine = machines.get_mut(name.as_str());
                let mut uses = machine.into_iter().flat_map(|machine| &mut machine.uses);
                if let Some(at) = uses.find(|at| at.server_id == server.as_str()) {
                    at.proof = Some(proof);
                }
            }
        }
        machines
            .into_values()
            .map(|mut machine| {
                machine.uses.sort_by(|one, other| one.server_id.cmp(&other.server_id));
                machine
            })
            .collect()
    }

    /// A server that reports here, or did, but that no call can be sent to.
    fn stranger(&self, server: &ServerId, sight: &Sight) -> ServerStatus {
        let vitals = self.fleet.registry().vitals_of(server).unwrap_or_default();
        let report_age_ms = self.report_age_ms(Some(server));
        let reason = match report_age_ms {
            0.. => "reports to this janus but is not in its server_urls".into(),
            _ => format!(
                "is not in server_urls and reports no more; if it is gone for good: janus forget {server}"
            ),
        };
        ServerStatus {
            server_id: server.to_string(),
            reason,
            report_age_ms,
            last_report_ms: self.last_report_ms(Some(server)),
            settings: self.fleet.registry().settings_of(server),
            damaged: self.fleet.registry().damaged(server, sight),
            incomplete_snapshots: self.fleet.registry().incomplete(server, sight),
            proven_ms: self.proven_ms(server, sight),
            warnings: if sight.is_all() { vitals.warnings } else { Vec::new() },
            fetching: seen(vitals.fetching, sight),
            revocations_digest: vitals.revocations_digest,
            free_bytes: vitals.free_bytes,
            total_bytes: vitals.total_bytes,
            certificate_expires_ms: vitals.certificate_expires_ms,
            certificate_valid_ms: vitals.certificate_valid_ms,
            ..Default::default()
        }
    }
}

/// What others may see of it.
fn seen(mut fetching: Vec<Fetching>, sight: &Sight) -> Vec<Fetching> {
    if !sight.is_all() {
        fetching.iter_mut().for_each(|one| one.failure.clear());
    }
    fetching
}

fn millis(age: Duration) -> i64 {
    i64::try_from(age.as_millis()).unwrap_or(i64::MAX)
}

#[tonic::async_trait]
impl ServerInfoService for Info {
    async fn get_server_info(
        &self,
        _: Request<GetServerInfoRequest>,
    ) -> Result<Response<GetServerInfoResponse>, Status> {
        Ok(Response::new(GetServerInfoResponse {
            server_id: self.id.to_string(),
            role: "janus".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            now_ms: unix_ms(),
            revocations: self.identity.revocations().of_peers(),
            ..Default::default()
        }))
    }

    async fn get_router_status(
        &self,
        request: Request<GetRouterStatusRequest>,
    ) -> Result<Response<GetRouterStatusResponse>, Status> {
        self.fleet.first_look().await;
        let principal = request.extensions().get::<Arc<Principal>>();
        // Who hasn't said who he is sees no machine.
        let sight = principal.map(|caller| self.fleet.registry().sight(caller));
        Ok(Response::new(self.status(&sight.unwrap_or_default())))
    }

    async fn wake_servers(
        &self,
        _: Request<WakeServersRequest>,
    ) -> Result<Response<WakeServersResponse>, Status> {
        self.fleet.first_look().await;
        let servers = self.fleet.distinct();
        let reachable = servers.iter().filter(|one| self.fleet.stand(one, Need::Link).is_ok());
        let reachable_servers = u32::try_from(reachable.count()).unwrap_or(u32::MAX);
        let woken_hosts = match reachable_servers {
            0 => {
                servers.iter().for_each(Upstream::look_now);
                self.waker.wake().await
            }
            _ => 0,
        };
        Ok(Response::new(WakeServersResponse { reachable_servers, woken_hosts }))
    }
}
