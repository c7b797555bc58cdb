//! A hash cache filled from the servers: what each has as a disk's newest snapshot, by its hashes.
//!
//! A backup does the same by itself for its own server. Done before, for all servers that can be reached, it costs the
//! backups no time.

use janus_proto::{
    error::WireError,
    ids::{BlockHash, DiskId, MachineKey, ServerId},
    pb::{
        CloseSnapshotRequest, GetServerInfoRequest, OpenSnapshotRequest, Snapshot,
        read_hashes_request::Of,
    },
};

use crate::{
    cache::{DiskCache, Head},
    catalog::Listing,
    link::{Address, Link, LinkError, QUICK, Remedy},
    reconcile::{HashReader, ReconcileError},
    ways::Ways,
};

/// What came of one server.
#[derive(Debug)]
pub struct Learnt {
    /// The server.
    pub server: String,
    /// Its newest snapshot of the disk.
    pub snapshot: String,
    /// Segments that differed from what the cache had by then, or why nothing was learnt.
    pub outcome: Result<usize, String>,
}

/// Fills the cache with what every server of the listing has as newest snapshot of the disk.
pub async fn learn(
    ways: &Ways,
    cache: &DiskCache,
    (machine, disk): (Option<&MachineKey>, &DiskId),
    listing: &Listing,
) -> Vec<Learnt> {
    let mut learnt: Vec<Learnt> = Vec::new();
    // Newest first.
    for snapshot in listing.snapshots.iter().filter(|snapshot| snapshot.disk_id == disk.as_str()) {
        if learnt.iter().any(|one| one.server == snapshot.server_id) {
            continue;
        }
        let outcome = match (snapshot.reachable, snapshot.size_bytes == cache.size_bytes()) {
            (false, _) => Err("the server can't be reached now".into()),
            (_, false) => Err(format!(
                "its newest snapshot is of a disk of {} bytes, now it has {}",
                snapshot.size_bytes,
                cache.size_bytes()
            )),
            (true, true) => {
                learn_one(ways, cache, machine, snapshot).await.map_err(|e| e.to_string())
            }
        };
        let (server, snapshot) = (snapshot.server_id.clone(), snapshot.snapshot_id.clone());
        learnt.push(Learnt { server, snapshot, outcome });
    }
    learnt
}

/// By the first URL that leads to the snapshot's server: not every janus need reach it.
async fn learn_one(
    ways: &Ways,
    cache: &DiskCache,
    machine: Option<&MachineKey>,
    snapshot: &Snapshot,
) -> Result<usize, ReconcileError> {
    let (mut tries, mut failed) = (ways.tries(), None);
    while let Some((_, link)) = tries.next().await {
        match learn_through(&link, cache, machine, snapshot).await {
            Err(ReconcileError::Link(error)) if error.remedy() == Remedy::Reconnect => {
                failed.get_or_insert(error);
            }
            other => return other,
        }
    }
    Err(failed.unwrap_or_else(|| tries.unreachable()).into())
}

async fn learn_through(
    link: &Link,
    cache: &DiskCache,
    machine: Option<&MachineKey>,
    snapshot: &Snapshot,
) -> Result<usize, ReconcileError> {
    let invalid = LinkError::answer("listing snapshots");
    let server: ServerId = snapshot.server_id.parse().map_err(invalid)?;
    let address = Address { server: Some(server.clone()), run: None, machine: machine.cloned() };
    let asked = address.request(GetServerInfoRequest {}, Some(QUICK));
    let info = link
        .info()
        .get_server_info(asked)
        .await
        .map_err(LinkError::call("asking the server for its store"))?
        .into_inner();
    let head = || {
        Ok::<_, WireError>(Head {
            snapshot_id: snapshot.snapshot_id.parse()?,
            table_digest: BlockHash::from_wire("table_digest", &snapshot.table_digest)?,
            store_generation: info.store_generation.parse()?,
        })
    };
    let head = head().map_err(LinkError::answer("asking the server for its store"))?;
    let message =
        OpenSnapshotRequest { snapshot_id: snapshot.snapshot_id.clone(), ..Default::default() };
    let handle = link.open_snapshot(&address, message).await?.handle;
    let reader = HashReader {
        link: link.clone(),
        address: address.clone(),
        of: Of::Handle(handle.clone()),
        size_bytes: snapshot.size_bytes,
    };
    let adopted = reader.adopt_into(cache, &server, Some(head)).await;
    // The handle expires by itself where this fails.
    let close = address.request(CloseSnapshotRequest { handle, ..Default::default() }, Some(QUICK));
    let _ = link.restore().close_snapshot(close).await;
    adopted
}
