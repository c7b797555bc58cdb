//! Which snapshots there are, over all servers that answer.

use std::{collections::HashMap, time::SystemTime};

use janus_proto::{
    ids::{DiskId, MachineKey, ServerId, SnapshotId},
    pb::{
        self, ErrorReason, GetSnapshotRequest, ListSnapshotsRequest, ServerAddresses, Snapshot,
        UnreachableServer,
    },
};

use crate::{
    link::{Address, Link, LinkError, QUICK, Remedy},
    snapshot::order::newest_first,
    ways::Ways,
};

const LISTING: &str = "listing snapshots";
/// Pages read before an endless list is no longer believed.
const MAX_PAGES: usize = 100_000;

/// What the servers told.
#[derive(Debug, Default)]
pub struct Listing {
    /// Newest first.
    pub snapshots: Vec<Snapshot>,
    /// Known servers that did not answer.
    pub unreachable: Vec<UnreachableServer>,
    /// Where the servers of these snapshots can be reached without janus, as far as they have told.
    pub addresses: Vec<ServerAddresses>,
}

impl Listing {
    /// A snapshot of the list, with what is known of its server.
    pub fn found(&self, snapshot: Snapshot) -> Found {
        let own = self.addresses.iter().find(|own| own.server_id == snapshot.server_id);
        let server_urls = own.map(|own| own.urls.clone()).unwrap_or_default();
        Found { at: 0, snapshot, server_urls }
    }
}

/// What is asked for.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// Whose snapshots; `None`: our own.
    pub machine: Option<MachineKey>,
    /// Of this disk, or of all.
    pub disk: Option<DiskId>,
    /// On this server, or on all.
    pub server: Option<ServerId>,
}

/// All snapshots that fit, as told by the first URL that answers. Where it can't reach all servers the others are asked
/// too: another janus may reach them.
///
/// # Errors
/// When no URL leads to an answer.
pub async fn list(ways: &Ways, query: &Query) -> Result<Listing, LinkError> {
    let ask = async |link: Link| list_through(&link, query).await;
    let answers = ask_each(ways, ask, |listing: &Listing| listing.unreachable.is_empty()).await?;
    Ok(merge(answers.into_iter().map(|(_, listing)| listing).collect()))
}

/// A snapshot.
#[derive(Debug, Clone)]
pub struct Found {
    /// Place in the URLs of who reaches it, as far as is known.
    pub at: usize,
    /// What it is.
    pub snapshot: Snapshot,
    /// Where its server can be reached without janus.
    pub server_urls: Vec<String>,
}

/// One snapshot by its id, through the URL that reaches it best; `None` when no server that answers has it.
///
/// # Errors
/// When no URL leads to an answer.
pub async fn find(ways: &Ways, id: SnapshotId, query: &Query) -> Result<Option<Found>, LinkError> {
    let ask = async |link: Link| find_through(&link, id, query).await;
    let is_enough = |found: &Option<(Snapshot, ServerAddresses)>| {
        found.as_ref().is_some_and(|(snapshot, _)| snapshot.reachable)
    };
    let answers = ask_each(ways, ask, is_enough).await?;
    let found = answers.into_iter().filter_map(|(at, found)| {
        let (snapshot, addresses) = found?;
        Some(Found { at, snapshot, server_urls: addresses.urls })
    });
    Ok(found.max_by_key(|found| found.snapshot.reachable))
}

/// Asks through each URL in turn until an answer is enough.
async fn ask_each<T>(
    ways: &Ways,
    ask: impl AsyncFn(Link) -> Result<T, LinkError>,
    is_enough: impl Fn(&T) -> bool,
) -> Result<Vec<(usize, T)>, LinkError> {
    let (mut tries, mut answers, mut failed) = (ways.tries(), Vec::new(), None);
    while let Some((at, link)) = tries.next().await {
        match ask(link).await {
            Ok(answer) => {
                let done = is_enough(&answer);
                answers.push((at, answer));
                if done {
                    break;
                }
            }
            Err(error) if error.remedy() == Remedy::Reconnect => {
                failed.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
    }
    match answers.is_empty() {
        true => Err(failed.unwrap_or_else(|| tries.unreachable())),
        false => Ok(answers),
    }
}

/// One list of several: what any of them reaches can be reached.
fn merge(mut listings: Vec<Listing>) -> Listing {
    if listings.len() < 2 {
        return listings.pop().unwrap_or_default();
    }
    let mut merged = Listing::default();
    let mut places: HashMap<String, usize> = HashMap::new();
    for listing in &mut listings {
        for snapshot in std::mem::take(&mut listing.snapshots) {
            match places.get(&snapshot.snapshot_id) {
                Some(at) => merged.snapshots[*at].reachable |= snapshot.reachable,
                None => {
                    places.insert(snapshot.snapshot_id.clone(), merged.snapshots.len());
                    merged.snapshots.push(snapshot);
                }
            }
        }
        for server in std::mem::take(&mut listing.addresses) {
            if !merged.addresses.iter().any(|known| known.server_id == server.server_id) {
                merged.addresses.push(server);
            }
        }
    }
    for server in listings.into_iter().flat_map(|listing| listing.unreachable) {
        let is_reached =
            |snapshot: &Snapshot| snapshot.reachable && snapshot.server_id == server.server_id;
        let is_known = merged.unreachable.iter().any(|known| known.server_id == server.server_id);
        if !is_known && !merged.snapshots.iter().any(is_reached) {
            merged.unreachable.push(server);
        }
    }
    newest_first(&mut merged.snapshots, SystemTime::now());
    merged
}

async fn list_through(link: &Link, query: &Query) -> Result<Listing, LinkError> {
    let Query { machine, disk, server } = query;
    let address = Address { server: server.clone(), run: None, machine: machine.clone() };
    let mut listing = Listing::default();
    let mut page_token = String::new();
    for _ in 0..MAX_PAGES {
        let message = ListSnapshotsRequest {
            machine: machine.as_ref().map(ToString::to_string).unwrap_or_default(),
            disk_id: disk.as_ref().map(ToString::to_string).unwrap_or_default(),
            page_size: 1000,
            page_token,
        };
        let request = address.request(message, Some(QUICK));
        let page = link
            .catalog()
            .list_snapshots(request)
            .await
            .map_err(LinkError::call(LISTING))?
            .into_inner();
        listing.snapshots.extend(page.snapshots);
        for server in page.addresses {
            if !listing.addresses.iter().any(|known| known.server_id == server.server_id) {
                listing.addresses.push(server);
            }
        }
        for server in page.unreachable {
            if !listing.unreachable.iter().any(|known| known.server_id == server.server_id) {
                listing.unreachable.push(server);
            }
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    // A janus that was asked for one server may answer for all.
    listing.snapshots.retain(|snapshot| {
        server.as_ref().is_none_or(|server| snapshot.server_id == server.as_str())
    });
    newest_first(&mut listing.snapshots, SystemTime::now());
    Ok(listing)
}

async fn find_through(
    link: &Link,
    id: SnapshotId,
    query: &Query,
) -> Result<Option<(Snapshot, ServerAddresses)>, LinkError> {
    let Query { machine, server, .. } = query.clone();
    let address = Address { server, run: None, machine };
    let request = address.request(GetSnapshotRequest { snapshot_id: id.to_string() }, Some(QUICK));
    match link
        .catalog()
        .get_snapshot(request)
        .await
        .map_err(LinkError::call("looking the snapshot up"))
    {
        Ok(answer) => {
            let answer = answer.into_inner();
            Ok(answer.snapshot.map(|snapshot| (snapshot, answer.addresses.unwrap_or_default())))
        }
        Err(error) if error.reason() == Some(ErrorReason::SnapshotUnknown) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Text of a consistency, as it is printed.
pub fn consistency_name(consistency: pb::Consistency) -> &'static str {
    match consistency {
        pb::Consistency::Unspecified => "unknown",
        pb::Consistency::Frozen => "frozen",
        pb::Consistency::Crash => "crash",
        pb::Consistency::Smeared => "smeared",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(snapshots: &[(&str, &str, i64, bool)], unreachable: &[&str]) -> Listing {
        let snapshot =
            |&(id, server, committed_ms, reachable): &(&str, &str, i64, bool)| Snapshot {
                snapshot_id: id.into(),
                server_id: server.into(),
                committed_ms,
                reachable,
                ..Default::default()
            };
        let away =
            |name: &&str| UnreachableServer { server_id: (*name).into(), ..Default::default() };
        Listing {
            snapshots: snapshots.iter().map(snapshot).collect(),
            unreachable: unreachable.iter().map(away).collect(),
            addresses: Vec::new(),
        }
    }

    #[test]
    fn what_one_of_two_janus_reaches_is_reachable() {
        let north = listing(
            &[("3", "c", 3, false), ("2", "b", 2, false), ("1", "a", 1, true)],
            &["b", "c"],
        );
        let south = listing(&[("2", "b", 2, true), ("1", "a", 1, false)], &["a", "https://c:7421"]);
        let merged = merge(vec![north, south]);
        let seen: Vec<_> =
            merged.snapshots.iter().map(|s| (s.snapshot_id.as_str(), s.reachable)).collect();
        assert_eq!(seen, [("3", false), ("2", true), ("1", true)]);
        let away: Vec<_> = merged.unreachable.iter().map(|s| s.server_id.as_str()).collect();
        assert_eq!(away, ["c", "https://c:7421"]);
    }
}
