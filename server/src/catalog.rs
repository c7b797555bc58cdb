//! The catalog service: machines, disks and snapshots, as this server knows them.

use std::{collections::BTreeMap, sync::Arc};

use janus_proto::{
    error::{ErrorReason, WireError, status},
    ids::{DiskId, MachineKey, SnapshotId},
    pb::{self, catalog_service_server::CatalogService},
    tls::Role,
};
use tonic::{Request, Response, Status};

use crate::{
    caller::Caller,
    chain::Held,
    restore::RestoreError,
    runs::{Machine, Runs},
};

const PAGE: usize = 200;
const MAX_PAGE: usize = 1000;

/// The service; see `catalog.proto`.
pub struct Catalog {
    runs: Arc<Runs>,
    here: pb::ServerAddresses,
}

impl Catalog {
    /// A service over the runs of the server of this name and URLs.
    pub fn new(runs: Arc<Runs>, here: pb::ServerAddresses) -> Self {
        Self { runs, here }
    }

    /// The machine a list is about: named in the message or in the metadata.
    fn machine<T>(
        &self,
        request: &Request<T>,
        named: &str,
    ) -> Result<Option<Arc<Machine>>, Status> {
        let caller = Caller::of(request)?;
        let key = match named {
            "" => caller.machine(request.metadata())?,
            named => named.parse::<MachineKey>()?,
        };
        if !caller.may_list(&key) {
            return Err(status(
                ErrorReason::NotAllowed,
                format!("{} may not read machine {key}", caller.principal),
            ));
        }
        // That nothing is known is no empty list: others would drop what they know of it.
        self.runs.check_machine(&key)?;
        Ok(self.runs.machine(&key))
    }

    fn machine_info(&self, machine: &Machine) -> pb::MachineInfo {
        let snapshots = machine.snapshots();
        let is_complete = |held: &&Held| machine.missing_blocks(held.snapshot().id) == 0;
        let newest = snapshots.iter().find(is_complete);
        let last_committed_ms = newest.map_or(0, |held| machine.time_of(&held.run));
        let here = pb::MachineServer {
            server_id: self.here.server_id.clone(),
            use_counter: machine.use_counter(),
            last_committed_ms,
            snapshot_count: snapshots.len() as u64,
        };
        pb::MachineInfo { machine: machine.key.to_string(), last_committed_ms, servers: vec![here] }
    }
}

/// One page of what comes after `token`, which names the last item of the page before, in the order of the items.
fn page<T>(
    items: impl Iterator<Item = (String, T)>,
    size: u32,
    token: &str,
) -> Result<(Vec<T>, String), WireError> {
    let size = if size == 0 { PAGE } else { (size as usize).min(MAX_PAGE) };
    let mut items = items.peekable();
    if !token.is_empty() && !items.by_ref().any(|(name, _)| name == token) {
        let reason = format!(
            "{:?} is not from this list, or its item is gone: begin again",
            janus_proto::error::shorten(token)
        );
        return Err(WireError::invalid("page_token", reason));
    }
    let mut last = String::new();
    let mut page = Vec::new();
    for (name, item) in items.by_ref().take(size) {
        last = name;
        page.push(item);
    }
    let token = if items.peek().is_some() { last } else { String::new() };
    Ok((page, token))
}

#[tonic::async_trait]
impl CatalogService for Catalog {
    async fn list_machines(
        &self,
        request: Request<pb::ListMachinesRequest>,
    ) -> Result<Response<pb::ListMachinesResponse>, Status> {
        let caller = Caller::of(&request)?;
        if matches!(caller.principal.role, Role::Janus(_)) {
            return Err(status(
                ErrorReason::NotAllowed,
                format!("{} may not list machines", caller.principal),
            ));
        }
        let request = request.into_inner();
        let machines = self.runs.machines();
        let readable = machines
            .iter()
            .filter(|machine| caller.may_list(&machine.key) && machine.faults().machine.is_none());
        let items = readable.map(|machine| (machine.key.to_string(), self.machine_info(machine)));
        let (machines, next_page_token) = page(items, request.page_size, &request.page_token)?;
        Ok(Response::new(pb::ListMachinesResponse {
            machines,
            next_page_token,
            unreachable: Vec::new(),
        }))
    }

    async fn list_disks(
        &self,
        request: Request<pb::ListDisksRequest>,
    ) -> Result<Response<pb::ListDisksResponse>, Status> {
        let machine = self.machine(&request, &request.get_ref().machine)?;
        let request = request.into_inner();
        let mut disks: BTreeMap<DiskId, pb::DiskInfo> = BTreeMap::new();
        let snapshots = machine.as_ref().map(|machine| machine.snapshots()).unwrap_or_default();
        for held in snapshots {
            let snapshot = held.snapshot();
            // Newest first: the first one seen of a disk says how it is now.
            let info = disks.entry(snapshot.disk.clone()).or_insert_with(|| pb::DiskInfo {
                disk_id: snapshot.disk.to_string(),
                size_bytes: snapshot.size_bytes,
                last_committed_ms: 0,
                snapshot_count: 0,
            });
            info.snapshot_count += 1;
            let complete = machine.as_ref().filter(|one| one.missing_blocks(snapshot.id) == 0);
            if let Some(machine) = complete.filter(|_| info.last_committed_ms == 0) {
                info.last_committed_ms = machine.time_of(&held.run);
            }
        }
        let items = disks.into_values().map(|info| (info.disk_id.clone(), info));
        let (disks, next_page_token) = page(items, request.page_size, &request.page_token)?;
        Ok(Response::new(pb::ListDisksResponse { disks, next_page_token, unreachable: Vec::new() }))
    }

    async fn list_snapshots(
        &self,
        request: Request<pb::ListSnapshotsRequest>,
    ) -> Result<Response<pb::ListSnapshotsResponse>, Status> {
        let machine = self.machine(&request, &request.get_ref().machine)?;
        let request = request.into_inner();
        let disk = match request.disk_id.as_str() {
            "" => None,
            disk => Some(disk.parse::<DiskId>()?),
        };
        let snapshots = machine.map(|machine| machine.snapshots()).unwrap_or_default();
        let wanted = snapshots
            .iter()
            .filter(|held| disk.as_ref().is_none_or(|disk| held.snapshot().disk == *disk));
        let items = wanted.map(|held| {
            (held.snapshot().id.to_string(), self.runs.to_wire(held, &self.here.server_id))
        });
        let (snapshots, next_page_token) = page(items, request.page_size, &request.page_token)?;
        Ok(Response::new(pb::ListSnapshotsResponse {
            snapshots,
            next_page_token,
            unreachable: Vec::new(),
            addresses: vec![self.here.clone()],
        }))
    }

    async fn get_snapshot(
        &self,
        request: Request<pb::GetSnapshotRequest>,
    ) -> Result<Response<pb::GetSnapshotResponse>, Status> {
        let caller = Caller::of(&request)?;
        let id: SnapshotId = request.into_inner().snapshot_id.parse()?;
        let held = self.runs.snapshot(id).filter(|held| caller.may_list(&held.run.machine));
        let held = held.ok_or_else(|| RestoreError::UnknownSnapshot {
            id,
            server: self.here.server_id.clone(),
        })?;
        let snapshot = Some(self.runs.to_wire(&held, &self.here.server_id));
        let addresses = Some(self.here.clone());
        Ok(Response::new(pb::GetSnapshotResponse { snapshot, addresses }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers() -> impl Iterator<Item = (String, u32)> {
        (1..=5).map(|n| (n.to_string(), n))
    }

    #[test]
    fn pages_follow_each_other_and_end() {
        let (first, token) = page(numbers(), 2, "").unwrap();
        let (second, next) = page(numbers(), 2, &token).unwrap();
        let (third, end) = page(numbers(), 2, &next).unwrap();
        assert_eq!([first, second, third].concat(), [1, 2, 3, 4, 5]);
        assert_eq!(end, "");
    }

    #[test]
    fn a_foreign_token_is_refused() {
        assert!(page(numbers(), 2, "9").is_err());
    }
}
