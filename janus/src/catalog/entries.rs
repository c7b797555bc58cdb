//! The things that are listed: how they are ordered, joined, asked for and remembered.

use std::{cmp::Reverse, collections::BTreeMap};

use futures::future::BoxFuture;
use janus_proto::{
    ids::{DiskId, MachineKey, ServerId},
    pb::{
        self, DiskInfo, ListDisksRequest, ListMachinesRequest, ListSnapshotsRequest, MachineInfo,
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
                last_committed_ms: snapshot.committed_ms,
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
        for pb::Snapshot { machine, committed_ms, .. } in
            registry.snapshots(server, query.machine.as_ref(), None)
        {
            let here = machines.entry(machine).or_default();
            here.server_id = server.to_string();
            here.last_committed_ms = here.last_committed_ms.max(committed_ms);
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
