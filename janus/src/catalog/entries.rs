//! The things that are listed: how they are ordered, joined, asked for and remembered.

use std::{cmp::Reverse, collections::BTreeMap};

use futures::future::BoxFuture;
use janus_proto::{
    ids::{DiskId, MachineKey, ServerId},
    pb::{
        DiskInfo, ListDisksRequest, ListMachinesRequest, ListSnapshotsRequest, MachineInfo,
        MachineServer, Snapshot, catalog_service_client::CatalogServiceClient,
    },
};
use tonic::{Request, Status};

use super::page::Entry;
use crate::{registry::Registry, upstream::Wire};

pub(super) type Client = CatalogServiceClient<Wire>;

/// What is asked of the catalog.
#[derive(Debug, Clone)]
pub(super) struct Query {
    pub machine: Option<MachineKey>,
    pub disk: Option<DiskId>,
}

impl Query {
    fn machine(&self) -> String {
        self.machine.as_ref().map(ToString::to_string).unwrap_or_default()
    }
}

/// A page of a server's own list, and the token of the next.
pub(super) type ServerPage<E> = Result<(Vec<E>, String), Status>;

/// When a snapshot became a success; 0: it lacks blocks, and is none.
fn completed_ms(snapshot: &Snapshot) -> i64 {
    if snapshot.missing_blocks == 0 { snapshot.committed_ms } else { 0 }
}

/// An entry that servers list and janus remembers.
pub(super) trait Listed: Entry {
    /// Name of the list, for its tokens.
    const LIST: &'static str;
    /// Asks a server. `request` carries the metadata.
    fn ask(
        client: Client,
        query: &Query,
        request: Request<()>,
        size: u32,
        token: String,
    ) -> BoxFuture<'static, ServerPage<Self>>;
    /// What the server has reported, in no order.
    fn remembered(registry: &Registry, server: &ServerId, query: &Query) -> Vec<Self>;
    /// Whose it is.
    fn machine<'a>(&'a self, query: &'a Query) -> &'a str {
        query.machine.as_ref().map_or("", MachineKey::as_str)
    }
    /// Marks what a live server has said.
    fn live(&mut self) {}
}

impl Entry for Snapshot {
    type Key = (Reverse<i64>, Reverse<String>);

    fn key(&self) -> Self::Key {
        (Reverse(self.committed_ms), Reverse(self.snapshot_id.clone()))
    }

    // The disks of a run are committed at the same time.
    fn ties(&self, other: &Self) -> bool {
        self.committed_ms == other.committed_ms
    }

    fn join(&mut self, other: Self) {
        if other.reachable {
            *self = other;
        }
    }
}

impl Listed for Snapshot {
    const LIST: &'static str = "snapshots";

    fn ask(
        mut client: Client,
        query: &Query,
        request: Request<()>,
        page_size: u32,
        page_token: String,
    ) -> BoxFuture<'static, ServerPage<Self>> {
        let disk_id = query.disk.as_ref().map(ToString::to_string).unwrap_or_default();
        let message =
            ListSnapshotsRequest { machine: query.machine(), disk_id, page_size, page_token };
        Box::pin(async move {
            let page = client.list_snapshots(request.map(|()| message)).await?.into_inner();
            Ok((page.snapshots, page.next_page_token))
        })
    }

    fn remembered(registry: &Registry, server: &ServerId, query: &Query) -> Vec<Self> {
        let mut snapshots = registry.snapshots(server, query.machine.as_ref(), query.disk.as_ref());
        for snapshot in &mut snapshots {
            snapshot.reachable = false;
        }
        snapshots
    }

    fn live(&mut self) {
        self.reachable = true;
    }
}

impl Entry for DiskInfo {
    type Key = String;

    fn key(&self) -> String {
        self.disk_id.clone()
    }

    fn join(&mut self, other: Self) {
        self.snapshot_count += other.snapshot_count;
        if other.last_committed_ms > self.last_committed_ms {
            self.last_committed_ms = other.last_committed_ms;
            self.size_bytes = other.size_bytes;
        }
    }
}

impl Listed for DiskInfo {
    const LIST: &'static str = "disks";

    fn ask(
        mut client: Client,
        query: &Query,
        request: Request<()>,
        page_size: u32,
        page_token: String,
    ) -> BoxFuture<'static, ServerPage<Self>> {
        let message = ListDisksRequest { machine: query.machine(), page_size, page_token };
        Box::pin(async move {
            let page = client.list_disks(request.map(|()| message)).await?.into_inner();
            Ok((page.disks, page.next_page_token))
        })
    }

    fn remembered(registry: &Registry, server: &ServerId, query: &Query) -> Vec<Self> {
        let mut disks: BTreeMap<String, DiskInfo> = BTreeMap::new();
        for snapshot in registry.snapshots(server, query.machine.as_ref(), None) {
            let one = DiskInfo {
                disk_id: snapshot.disk_id.clone(),
                size_bytes: snapshot.size_bytes,
                last_committed_ms: completed_ms(&snapshot),
                snapshot_count: 1,
            };
            match disks.get_mut(&snapshot.disk_id) {
                Some(disk) => disk.join(one),
                None => drop(disks.insert(snapshot.disk_id, one)),
            }
        }
        disks.into_values().collect()
    }
}

impl Entry for MachineInfo {
    type Key = String;

    fn key(&self) -> String {
        self.machine.clone()
    }

    fn join(&mut self, other: Self) {
        self.last_committed_ms = self.last_committed_ms.max(other.last_committed_ms);
        self.servers.extend(other.servers);
        self.servers.sort_by(|a, b| a.server_id.cmp(&b.server_id));
    }
}

impl Listed for MachineInfo {
    const LIST: &'static str = "machines";

    fn ask(
        mut client: Client,
        _: &Query,
        request: Request<()>,
        page_size: u32,
        page_token: String,
    ) -> BoxFuture<'static, ServerPage<Self>> {
        let message = ListMachinesRequest { page_size, page_token };
        Box::pin(async move {
            let page = client.list_machines(request.map(|()| message)).await?.into_inner();
            Ok((page.machines, page.next_page_token))
        })
    }

    fn machine<'a>(&'a self, _: &'a Query) -> &'a str {
        &self.machine
    }

    fn remembered(registry: &Registry, server: &ServerId, query: &Query) -> Vec<Self> {
        let mut machines: BTreeMap<String, MachineServer> = BTreeMap::new();
        for (machine, use_counter) in registry.uses(server) {
            let here =
                MachineServer { server_id: server.to_string(), use_counter, ..Default::default() };
            machines.insert(machine.to_string(), here);
        }
        for snapshot in registry.snapshots(server, query.machine.as_ref(), None) {
            let last_committed_ms = completed_ms(&snapshot);
            let here = machines.entry(snapshot.machine).or_default();
            here.server_id = server.to_string();
            here.last_committed_ms = here.last_committed_ms.max(last_committed_ms);
            here.snapshot_count += 1;
        }
        machines
            .into_iter()
            .map(|(machine, here)| MachineInfo {
                machine,
                last_committed_ms: here.last_committed_ms,
                servers: vec![here],
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use janus_proto::pb;

    use super::*;

    #[tokio::test]
    async fn a_snapshot_that_lacks_blocks_is_no_last_success() {
        let (registry, server) = (Registry::new(), "a".parse::<ServerId>().unwrap());
        let hello = pb::ReportHello { start_epoch: 1, stream: 1, ..Default::default() };
        let slot = registry.open_report(&server, &hello).unwrap();
        let snapshot = |disk: &str, committed_ms, missing_blocks| Snapshot {
            snapshot_id: janus_proto::ids::SnapshotId::new().to_string(),
            machine: "u/m".into(),
            disk_id: disk.into(),
            committed_ms,
            missing_blocks,
            ..Default::default()
        };
        let snapshots = vec![snapshot("x", 5, 0), snapshot("x", 9, 1), snapshot("y", 7, 3)];
        let change = pb::StateChange { snapshots, ..Default::default() };
        use pb::report_request::Event;
        slot.take(2, Some(Event::Full(change))).unwrap();
        slot.take(3, Some(Event::FullEnd(pb::FullEnd {}))).unwrap();
        let query = Query { machine: Some("u/m".parse().unwrap()), disk: None };
        let disks = DiskInfo::remembered(&registry, &server, &query);
        let last = disks.iter().map(|disk| (disk.disk_id.as_str(), disk.last_committed_ms));
        assert_eq!(last.collect::<Vec<_>>(), [("x", 5), ("y", 0)]);
        let machines = MachineInfo::remembered(&registry, &server, &query);
        assert_eq!((machines.len(), machines[0].last_committed_ms), (1, 5));
        assert_eq!(machines[0].servers[0].snapshot_count, 3);
    }
}
