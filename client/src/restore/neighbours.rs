//! Other snapshots of the disk, on other servers: the nearest in time, of which most blocks are likely to be the same.

use std::{collections::BTreeSet, time::Duration};

use janus_proto::{ids::DiskId, pb::Snapshot};

use crate::{
    catalog::{self, Found, Query},
    snapshot::opened::Reach,
};

/// A restore doesn't wait longer for what only may help it.
const PATIENCE: Duration = Duration::from_secs(5);
/// Snapshots that are read beside the wanted one.
const MOST: usize = 6;

/// The snapshots that may help: of each other server the nearest older and the nearest newer one.
pub(super) async fn find(reach: &Reach, wanted: &Snapshot) -> Vec<Found> {
    let Ok(disk) = wanted.disk_id.parse::<DiskId>() else { return Vec::new() };
    let machine = reach.machine.clone().or_else(|| wanted.machine.parse().ok());
    let query = Query { machine, disk: Some(disk), server: None };
    let listing = match tokio::time::timeout(PATIENCE, catalog::list(&reach.ways, &query)).await {
        Ok(Ok(listing)) => listing,
        Ok(Err(error)) => {
            tracing::debug!(%error, "other servers can't be asked");
            return Vec::new();
        }
        Err(_) => return Vec::new(),
    };
    let near = nearest(&listing.snapshots, wanted);
    near.into_iter().map(|snapshot| listing.found(snapshot)).collect()
}

/// Of a list, as [`find`] says.
pub(super) fn nearest(snapshots: &[Snapshot], wanted: &Snapshot) -> Vec<Snapshot> {
    let others = snapshots.iter().filter(|other| {
        other.reachable && other.server_id != wanted.server_id && other.machine == wanted.machine
    });
    let others: Vec<_> = others.collect();
    let servers: BTreeSet<_> = others.iter().map(|other| &other.server_id).collect();
    let mut near = Vec::new();
    for server in servers {
        let of_server = || others.iter().filter(|other| other.server_id == *server);
        let same = of_server().find(|other| other.table_digest == wanted.table_digest);
        if let Some(same) = same {
            near.push(*same);
            continue;
        }
        let at = wanted.committed_ms;
        near.extend(of_server().filter(|o| o.committed_ms <= at).max_by_key(|o| o.committed_ms));
        near.extend(of_server().filter(|o| o.committed_ms > at).min_by_key(|o| o.committed_ms));
    }
    // The likeliest first: the same content, then the nearest in time.
    near.sort_by_key(|other| {
        let differs = other.table_digest != wanted.table_digest;
        (differs, other.committed_ms.abs_diff(wanted.committed_ms))
    });
    near.into_iter().take(MOST).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_each_other_server_the_nearest_on_both_sides() {
        let snapshot = |server: &str, committed_ms: i64, digest: u8| Snapshot {
            server_id: server.into(),
            committed_ms,
            table_digest: vec![digest; 32].into(),
            reachable: server != "away",
            ..Snapshot::default()
        };
        let wanted = snapshot("a", 100, 1);
        let all = [
            snapshot("a", 90, 2),
            snapshot("away", 99, 1),
            snapshot("b", 200, 3),
            snapshot("b", 120, 4),
            snapshot("b", 95, 5),
            snapshot("b", 10, 6),
            snapshot("c", 5, 1),
            snapshot("c", 101, 7),
            wanted.clone(),
        ];
        let near: Vec<_> = nearest(&all, &wanted)
            .into_iter()
            .map(|snapshot| (snapshot.server_id, snapshot.committed_ms))
            .collect();
        assert_eq!(near, [("c".into(), 5), ("b".into(), 95), ("b".into(), 120)]);
    }
}
