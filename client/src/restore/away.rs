//! A snapshot whose server is away from the start: its table comes from a server that mirrors it, its blocks from those that have
//! the same ones at the same place.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use janus_proto::{
    ids::{BlockHash, DiskId},
    pb::Snapshot,
};

use super::{RestoreError, check_digests, damaged, neighbours};
use crate::{
    catalog::{self, Found, Query},
    link::LinkError,
    snapshot::{Opened, SelectError, opened::Reach, select::check_size},
    tables::{self, Mirrored, Share},
};

/// Snapshots that are read, of all servers.
const MOST: usize = 48;
/// Catalogs and tables are listed within this.
const PATIENCE: Duration = Duration::from_secs(60);

/// What stands for the snapshot.
#[derive(Debug)]
pub(super) struct Away {
    /// Its table, on a server that mirrors it.
    pub(super) table: Opened,
    pub(super) digests: Vec<BlockHash>,
    /// Snapshots that have parts of it.
    pub(super) neighbours: Vec<Found>,
    /// What others have of it, by what they say: held and all bytes.
    pub(super) share: Option<Share>,
}

/// Finds who can stand for the server of `wanted`.
pub(super) async fn find(reach: &Reach, wanted: &Snapshot) -> Result<Away, RestoreError> {
    let machine = reach.machine.clone().or_else(|| wanted.machine.parse().ok());
    let disk = wanted.disk_id.parse::<DiskId>().ok();
    let query = Query { machine, disk, server: None };
    let listing = async {
        let listing = catalog::list(&reach.ways, &query).await?;
        let mirrored = tables::list(&reach.ways, &query, &listing).await;
        Ok::<_, LinkError>((listing, mirrored))
    };
    let listed = tokio::time::timeout(PATIENCE, listing).await;
    let (listing, mut mirrored) = listed.map_err(|_| nobody(wanted))??;
    mirrored.retain(|one| {
        one.snapshot.snapshot_id == wanted.snapshot_id
            && one.snapshot.table_digest == wanted.table_digest
            && one.snapshot.size_bytes == wanted.size_bytes
    });
    // Who can deliver most knows its own table best.
    mirrored.sort_by_key(|one| {
        std::cmp::Reverse(one.share.as_ref().map_or(0, |share| share.held_bytes))
    });
    let share = tables::together(&mirrored);
    let told: BTreeSet<&str> = mirrored
        .iter()
        .filter_map(|one| one.share.as_ref())
        .flat_map(|share| share.snapshot_ids.iter().map(String::as_str))
        .collect();
    let counted: BTreeSet<&str> =
        mirrored.iter().filter(|one| one.share.is_some()).map(|one| one.server.as_str()).collect();
    // Who doesn't say what it has may have something all the same.
    let near = neighbours::nearest(&listing.snapshots, wanted);
    let near = near.iter().filter(|one| !counted.contains(one.server_id.as_str()));
    let named = listing
        .snapshots
        .iter()
        .filter(|one| one.reachable && told.contains(one.snapshot_id.as_str()));
    let neighbours = named.chain(near).take(MOST).map(|one| listing.found(one.clone())).collect();
    let mut failed = None;
    for one in &mirrored {
        match open(reach, wanted, one, &listing).await {
            Ok((table, digests)) => return Ok(Away { table, digests, neighbours, share }),
            Err(error) => {
                tracing::warn!(server = %one.server, %error, "its table of the snapshot is of no use");
                failed = Some(error);
            }
        }
    }
    Err(failed.unwrap_or_else(|| nobody(wanted)))
}

/// The seal of a snapshot, as a server that mirrors its table tells it. Nobody need tell the truth: what it proves is looked at.
pub(super) async fn client_seal(reach: &Reach, wanted: &Snapshot) -> Result<Bytes, RestoreError> {
    let machine = reach.machine.clone().or_else(|| wanted.machine.parse().ok());
    let disk = wanted.disk_id.parse::<DiskId>().ok();
    let query = Query { machine, disk, server: None };
    let listing = async {
        let listing = catalog::list(&reach.ways, &query).await?;
        Ok::<_, LinkError>(tables::list(&reach.ways, &query, &listing).await)
    };
    let listed = tokio::time::timeout(PATIENCE, listing).await;
    let mirrored = listed.map_err(|_| nobody(wanted))??;
    let known = mirrored.into_iter().map(|one| one.snapshot).filter(|one| {
        one.snapshot_id == wanted.snapshot_id && one.table_digest == wanted.table_digest
    });
    let seals: Vec<Bytes> = known.map(|one| one.client_seal).collect();
    let sealed = seals.iter().find(|seal| !seal.is_empty()).or(seals.first());
    sealed.cloned().ok_or_else(|| nobody(wanted))
}

/// Opens a mirrored table; it is believed when it gives the snapshot's digest.
async fn open(
    reach: &Reach,
    wanted: &Snapshot,
    mirrored: &Mirrored,
    listing: &catalog::Listing,
) -> Result<(Opened, Vec<BlockHash>), RestoreError> {
    let there = Snapshot { server_id: mirrored.server.to_string(), ..wanted.clone() };
    check_size(wanted).map_err(|error| damaged(&there, error))?;
    let table = Opened::table(reach.clone(), listing.found(there.clone()))?;
    let digests = table.segment_digests().await?;
    match check_digests(&there, &digests) {
        Ok(()) => Ok((table, digests)),
        Err(error) => {
            table.close().await;
            Err(damaged(&there, error))
        }
    }
}

fn nobody(wanted: &Snapshot) -> RestoreError {
    SelectError::Away {
        snapshot: wanted.snapshot_id.clone(),
        disk: wanted.disk_id.clone(),
        server: wanted.server_id.clone(),
        hint: ", and no other server has its table",
    }
    .into()
}
