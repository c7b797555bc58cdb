//! The catalog of all servers, merged: each list is asked of every server that can be reached and filled up with what
//! the others have reported. Nothing that this janus has learnt of disappears because a server can't be reached.

mod entries;
mod page;
mod trouble;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::future::join_all;
use http::{HeaderMap, HeaderValue};
use janus_proto::{
    channel::explain,
    clock::unix_ms,
    error::{ErrorReason, WireError, reason, status},
    ids::{MachineKey, ServerId, SnapshotId},
    metadata,
    pb::{
        self,
        catalog_service_client::CatalogServiceClient,
        catalog_service_server::{CatalogService, CatalogServiceServer},
    },
    show::of_named,
    tls::{Principal, Role},
    trace::{TRACEPARENT, TraceContext},
};
use tokio::time::timeout;
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};

use self::{
    entries::{Client, Listed, Query},
    page::{Part, Position, merge, page_size},
    trouble::{Trouble, Troubles},
};
use crate::{
    fleet::Fleet,
    patience::Wait,
    registry::{Registry, Sight},
    router::for_server,
    upstream::{Down, Link, Need, Upstream},
};

/// A server that takes longer counts as not reachable for this list.
const DEADLINE: Duration = Duration::from_secs(5);
/// Entries asked of a server at once: with the largest seals, its answer stays below 2 MiB.
const SERVER_PAGE: u32 = 264;

/// The merged catalog.
#[derive(Debug, Clone)]
pub struct Catalog {
    fleet: Fleet,
    troubles: Troubles,
}

/// Who asks, for the servers to check and for what is answered from memory.
#[derive(Debug, Clone)]
struct Asker {
    /// Trace that the calls to servers belong to.
    trace: Option<TraceContext>,
    principal: Arc<Principal>,
    sight: Sight,
}

impl Asker {
    fn of<T>(request: &Request<T>, registry: &Registry) -> Result<Self, Status> {
        let principal = request.extensions().get::<Arc<Principal>>().cloned();
        let principal = principal
            .ok_or_else(|| status(ErrorReason::IdentityMissing, "caller has no certificate"))?;
        // Servers look for what they may mirror, or be seeded with.
        if let Role::Janus(_) = &principal.role {
            let text = format!("{principal} may not read the catalog");
            return Err(status(ErrorReason::NotAllowed, text));
        }
        let trace = request.extensions().get::<TraceContext>().copied();
        Ok(Self { sight: registry.sight(&principal), principal, trace })
    }

    /// The machine that a list is about: as named in the message or in the metadata.
    fn machine<T>(&self, request: &Request<T>, named: &str) -> Result<MachineKey, Status> {
        let header =
            request.metadata().get(metadata::MACHINE).and_then(|value| value.to_str().ok());
        let named = if named.is_empty() { header.unwrap_or_default() } else { named };
        match (self.principal.machine(), named) {
            (Some(own), "") => Ok(own.clone()),
            (None, "") => Err(WireError::Missing { field: "machine" }.into()),
            (_, named) => {
                let machine: MachineKey = named.parse()?;
                if self.sight.may_name(&machine) {
                    return Ok(machine);
                }
                let message = format!("{} may not read machine {machine}", self.principal);
                Err(status(ErrorReason::NotAllowed, message))
            }
        }
    }

    /// A request in the caller's name.
    fn request(&self, machine: Option<&MachineKey>) -> Request<()> {
        let mut headers = for_server(HeaderMap::new(), &self.principal);
        if let Some(value) =
            machine.and_then(|machine| HeaderValue::from_str(machine.as_str()).ok())
        {
            headers.insert(metadata::MACHINE, value);
        }
        if let Some(value) = self.trace.and_then(|trace| trace.header()) {
            headers.insert(TRACEPARENT, value);
        }
        let mut request = Request::new(());
        *request.metadata_mut() = MetadataMap::from_headers(headers);
        request.set_timeout(DEADLINE);
        request
    }
}

/// A list as it is answered.
struct Merged<E> {
    entries: Vec<E>,
    token: String,
    unreachable: Vec<pb::UnreachableServer>,
}

fn client(link: &Link) -> Client {
    CatalogServiceClient::new(link.control.clone()).max_decoding_message_size(8 << 20)
}

/// The caller's fault, not the server's: the same everywhere.
fn is_final(status: &Status) -> bool {
    matches!(status.code(), Code::PermissionDenied | Code::Unauthenticated | Code::InvalidArgument)
}

impl Catalog {
    /// The service over the servers of `fleet`.
    pub fn service(fleet: Fleet) -> CatalogServiceServer<Self> {
        CatalogServiceServer::new(Self { fleet, troubles: Troubles::default() })
    }

    async fn list<E: Listed>(
        &self,
        asker: &Asker,
        query: Query,
        asked: u32,
        token: &str,
    ) -> Result<Merged<E>, Status> {
        let name = |part: Option<String>| part.unwrap_or_default();
        let (machine, disk) = (query.machine.as_ref(), query.disk.as_ref());
        let list = format!(
            "{} {} {}",
            E::LIST,
            name(machine.map(ToString::to_string)),
            name(disk.map(ToString::to_string))
        );
        let (size, position) = (page_size(asked), Position::<E::Key>::read(list, token)?);
        self.fleet.first_look().await;
        let servers = self.fleet.distinct();
        let parts = join_all(
            servers.iter().map(|upstream| self.part(upstream, asker, &query, size, &position)),
        )
        .await;
        let (mut entries, mut unreachable) = (Vec::new(), Vec::new());
        let (mut has_answered, mut refused) = (false, None);
        for (upstream, part) in servers.iter().zip(parts) {
            let refusal = Trouble::Refuses(upstream.url(), asker.principal.to_string());
            match part {
                Ok((part, down)) => {
                    if down.is_none() {
                        self.troubles.over(&refusal);
                    }
                    has_answered |= down.is_none();
                    entries.extend(part);
                    unreachable.extend(down);
                }
                // Servers may have different policies, for a moment or by mistake.
                Err(status) if status.code() == Code::PermissionDenied => {
                    let (server_id, reason) = (upstream.name(), status.message().to_owned());
                    let since_ms = self.troubles.since(refusal, unix_ms());
                    unreachable.push(pb::UnreachableServer { server_id, reason, since_ms });
                    refused.get_or_insert(status);
                }
                Err(status) => return Err(status),
            }
        }
        if let Some(refused) = refused.filter(|_| !has_answered) {
            return Err(refused);
        }
        for server in self.strangers(&servers) {
            unreachable.push(self.stranger(&server));
            entries.push(self.remembered(&server, &asker.sight, &query, size, &position));
        }
        let (entries, next) = merge(entries, size, position);
        Ok(Merged {
            entries,
            token: next.map(|next| next.token()).unwrap_or_default(),
            unreachable,
        })
    }

    /// One server's part: live, or from memory with the reason.
    async fn part<E: Listed>(
        &self,
        upstream: &Upstream,
        asker: &Asker,
        query: &Query,
        size: usize,
        position: &Position<E::Key>,
    ) -> Result<(Option<Part<E>>, Option<pb::UnreachableServer>), Status> {
        let failure = Trouble::Fails(upstream.url());
        let down = match (upstream.gate(Need::Reads, Wait::Full).await, upstream.server()) {
            (Ok(link), Some(server)) => {
                let live = live_part(&link, server, asker, query, size, position);
                let reason = match timeout(DEADLINE, live).await {
                    Ok(Ok(part)) => {
                        self.troubles.over(&failure);
                        return Ok((Some(part), None));
                    }
                    Ok(Err(status)) if is_final(&status) => {
                        self.troubles.over(&failure);
                        return Err(status);
                    }
                    Ok(Err(status)) => explain(&status),
                    Err(_) => format!("no answer for {} s", DEADLINE.as_secs()),
                };
                Down { reason, since_ms: self.troubles.since(failure, unix_ms()) }
            }
            (Err(down), _) => down,
            (Ok(_), None) => Down { reason: "was lost just now".into(), since_ms: unix_ms() },
        };
        let remembered = |server| self.remembered(&server, &asker.sight, query, size, position);
        let memory = upstream.server().map(remembered);
        let unreachable = pb::UnreachableServer {
            server_id: upstream.name(),
            reason: down.reason,
            since_ms: down.since_ms,
        };
        Ok((memory, Some(unreachable)))
    }

    fn remembered<E: Listed>(
        &self,
        server: &ServerId,
        sight: &Sight,
        query: &Query,
        size: usize,
        position: &Position<E::Key>,
    ) -> Part<E> {
        let mut entries = E::remembered(self.fleet.registry(), server, query);
        entries.retain(|entry| sight.sees_name(entry.machine(query)));
        entries.retain(|entry| position.after.as_ref().is_none_or(|after| entry.key() > *after));
        entries.sort_by_key(E::key);
        let is_complete = entries.len() <= size;
        entries.truncate(size);
        // An empty token: should the server come back, its list is read from the start and what is out already dropped.
        Part {
            server: server.clone(),
            entries: entries.into_iter().map(|e| (e, String::new())).collect(),
            is_complete,
        }
    }

    fn stranger(&self, server: &ServerId) -> pb::UnreachableServer {
        let registry = self.fleet.registry();
        let (reason, since_ms) = match registry.report_age(server) {
            Some(_) => {
                ("reports to this janus, which doesn't reach it at any of its server_urls", 0)
            }
            None => (
                "none of server_urls leads to it and it reports no more; if it is gone for good: janus forget",
                registry.heard_ms(server).unwrap_or(0),
            ),
        };
        pb::UnreachableServer { server_id: server.to_string(), reason: reason.into(), since_ms }
    }

    /// Servers that have reported but that no URL leads to.
    fn strangers(&self, servers: &[Upstream]) -> Vec<ServerId> {
        let names: Vec<Option<ServerId>> = servers.iter().map(Upstream::server).collect();
        let known = self.fleet.registry().servers();
        known.into_iter().filter(|server| !names.contains(&Some(server.clone()))).collect()
    }

    /// Where a server can be reached without us, if it has told.
    fn addresses(&self, server: &str) -> Option<pb::ServerAddresses> {
        let urls = self.fleet.registry().urls_of(&server.parse().ok()?)?;
        Some(pb::ServerAddresses { server_id: server.to_owned(), urls })
    }

    async fn find(&self, asker: &Asker, id: SnapshotId) -> Result<pb::Snapshot, Status> {
        self.fleet.first_look().await;
        let servers = self.fleet.distinct();
        let answers =
            join_all(servers.iter().map(|upstream| ask_snapshot(upstream, asker, id))).await;
        let mut unreachable = Vec::new();
        for (upstream, answer) in servers.iter().zip(answers) {
            match answer {
                Ok(Some(mut snapshot)) => {
                    snapshot.reachable = true;
                    return Ok(snapshot);
                }
                Ok(None) => {}
                Err(reason) => {
                    let name = upstream.name();
                    unreachable.push(format!("{name}: {}", of_named(&name, &reason)));
                }
            }
        }
        let remembered = self.fleet.registry().snapshot(id).map(|(_, snapshot)| snapshot);
        if let Some(snapshot) = remembered.filter(|s| asker.sight.sees_name(&s.machine)) {
            return Ok(pb::Snapshot { reachable: false, ..snapshot });
        }
        let message = match unreachable.is_empty() {
            true => format!("no server has a snapshot {id}"),
            false => format!(
                "no server that can be reached has a snapshot {id}; {}",
                unreachable.join("; ")
            ),
        };
        Err(status(ErrorReason::SnapshotUnknown, message))
    }
}

/// Reads a server's list from its position on until there is enough for the page.
async fn live_part<E: Listed>(
    link: &Link,
    server: ServerId,
    asker: &Asker,
    query: &Query,
    size: usize,
    position: &Position<E::Key>,
) -> Result<Part<E>, Status> {
    let mut token = position.pages.get(&server).cloned().unwrap_or_default();
    let mut part = Part { server, entries: Vec::new(), is_complete: false };
    loop {
        let request = asker.request(query.machine.as_ref());
        let answer = E::ask(client(link), query, request, SERVER_PAGE, token.clone()).await;
        let (entries, next) = match answer {
            Ok(page) => page,
            Err(status) if reason(&status) == Some(ErrorReason::MachineUnknown) => {
                (Vec::new(), String::new())
            }
            // The entry that its token stands for may have been removed: from the start, less what is out already.
            Err(status) if status.code() == Code::InvalidArgument && !token.is_empty() => {
                token = String::new();
                part.entries.clear();
                continue;
            }
            Err(status) => return Err(status),
        };
        let new = entries
            .into_iter()
            .filter(|entry| position.after.as_ref().is_none_or(|after| entry.key() > *after));
        part.entries.extend(new.map(|mut entry| {
            entry.live();
            (entry, token.clone())
        }));
        part.entries.sort_by_key(|(entry, _)| entry.key());
        part.is_complete = next.is_empty();
        if part.is_enough(size) {
            return Ok(part);
        }
        token = next;
    }
}

/// The snapshot, if this server has it; the error is why it could not be asked.
async fn ask_snapshot(
    upstream: &Upstream,
    asker: &Asker,
    id: SnapshotId,
) -> Result<Option<pb::Snapshot>, String> {
    let link = upstream.gate(Need::Reads, Wait::Full).await.map_err(|down| down.reason)?;
    let mut client = client(&link);
    let request = asker
        .request(asker.principal.machine())
        .map(|()| pb::GetSnapshotRequest { snapshot_id: id.to_string() });
    match timeout(DEADLINE, client.get_snapshot(request)).await {
        Ok(Ok(answer)) => Ok(answer.into_inner().snapshot),
        Ok(Err(status)) if matches!(status.code(), Code::NotFound | Code::PermissionDenied) => {
            Ok(None)
        }
        Ok(Err(status)) => Err(explain(&status)),
        Err(_) => Err(format!("no answer for {} s", DEADLINE.as_secs())),
    }
}

#[tonic::async_trait]
impl CatalogService for Catalog {
    async fn list_machines(
        &self,
        request: Request<pb::ListMachinesRequest>,
    ) -> Result<Response<pb::ListMachinesResponse>, Status> {
        let asker = Asker::of(&request, self.fleet.registry())?;
        let query = Query { machine: None, disk: None };
        let asked = request.into_inner();
        let merged = self.list(&asker, query, asked.page_size, &asked.page_token).await?;
        let Merged { entries: machines, token: next_page_token, unreachable } = merged;
        Ok(Response::new(pb::ListMachinesResponse { machines, next_page_token, unreachable }))
    }

    async fn list_disks(
        &self,
        request: Request<pb::ListDisksRequest>,
    ) -> Result<Response<pb::ListDisksResponse>, Status> {
        let asker = Asker::of(&request, self.fleet.registry())?;
        let query = Query {
            machine: Some(asker.machine(&request, &request.get_ref().machine)?),
            disk: None,
        };
        let asked = request.into_inner();
        let merged = self.list(&asker, query, asked.page_size, &asked.page_token).await?;
        let Merged { entries: disks, token: next_page_token, unreachable } = merged;
        Ok(Response::new(pb::ListDisksResponse { disks, next_page_token, unreachable }))
    }

    async fn list_snapshots(
        &self,
        request: Request<pb::ListSnapshotsRequest>,
    ) -> Result<Response<pb::ListSnapshotsResponse>, Status> {
        let asker = Asker::of(&request, self.fleet.registry())?;
        let machine = Some(asker.machine(&request, &request.get_ref().machine)?);
        let asked = request.into_inner();
        let disk = if asked.disk_id.is_empty() { None } else { Some(asked.disk_id.parse()?) };
        let merged =
            self.list(&asker, Query { machine, disk }, asked.page_size, &asked.page_token).await?;
        let Merged { entries: snapshots, token: next_page_token, unreachable } = merged;
        let servers: BTreeSet<&str> =
            snapshots.iter().map(|s: &pb::Snapshot| s.server_id.as_str()).collect();
        let addresses = servers.into_iter().filter_map(|server| self.addresses(server)).collect();
        Ok(Response::new(pb::ListSnapshotsResponse {
            snapshots,
            next_page_token,
            unreachable,
            addresses,
        }))
    }

    async fn get_snapshot(
        &self,
        request: Request<pb::GetSnapshotRequest>,
    ) -> Result<Response<pb::GetSnapshotResponse>, Status> {
        let asker = Asker::of(&request, self.fleet.registry())?;
        let id: SnapshotId = request.get_ref().snapshot_id.parse()?;
        let snapshot = self.find(&asker, id).await?;
        let addresses = self.addresses(&snapshot.server_id);
        Ok(Response::new(pb::GetSnapshotResponse { snapshot: Some(snapshot), addresses }))
    }
}
