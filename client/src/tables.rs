//! Snapshots on servers that are away, as other servers know them: those that mirror their tables say how much of each they can
//! deliver.

use std::{collections::BTreeSet, time::SystemTime};

use janus_proto::{
    ids::{MachineKey, ServerId},
    pb::{ListTablesRequest, MirroredTable, Snapshot, TableShare},
};
use tonic::Code;

use crate::{
    catalog::{Listing, Query},
    link::{Address, Link, LinkError, QUICK},
    snapshot::order::newest_first,
    ways::Ways,
};

/// Pages read before an endless list is no longer believed.
const MAX_PAGES: usize = 10_000;

/// A snapshot whose table another server has.
#[derive(Debug, Clone)]
pub struct Mirrored {
    /// Who has the table.
    pub server: ServerId,
    /// The snapshot, on its own server.
    pub snapshot: Snapshot,
    /// What `server` can deliver of it; `None` while it doesn't know.
    pub share: Option<TableShare>,
}

/// Asks the servers of a listing that answer for tables of those that don't. Who can't tell is left out: this only helps.
pub async fn list(ways: &Ways, query: &Query, listing: &Listing) -> Vec<Mirrored> {
    let there = listing.snapshots.iter().filter(|snapshot| snapshot.reachable);
    let there: BTreeSet<&str> = there.map(|snapshot| snapshot.server_id.as_str()).collect();
    let mut waiting: Vec<ServerId> = there.iter().filter_map(|name| name.parse().ok()).collect();
    let (mut tries, mut found) = (ways.tries(), Vec::new());
    while !waiting.is_empty() {
        let Some((_, link)) = tries.next().await else { break };
        let mut left = Vec::new();
        for server in waiting {
            match list_of(&link, &server, query.machine.as_ref()).await {
                Ok(tables) => found.extend(tables),
                Err(error) => {
                    tracing::debug!(%server, %error, "its mirrored tables can't be listed");
                    left.push(server);
                }
            }
        }
        waiting = left;
    }
    let is_wanted = |mirrored: &Mirrored| {
        let disk = query.disk.as_ref();
        disk.is_none_or(|disk| disk.as_str() == mirrored.snapshot.disk_id)
            && !there.contains(mirrored.snapshot.server_id.as_str())
    };
    found.retain(is_wanted);
    found
}

async fn list_of(
    link: &Link,
    server: &ServerId,
    machine: Option<&MachineKey>,
) -> Result<Vec<Mirrored>, LinkError> {
    let address = Address { server: Some(server.clone()), run: None, machine: machine.cloned() };
    let (mut found, mut page_token) = (Vec::new(), String::new());
    for _ in 0..MAX_PAGES {
        let machine = machine.map(ToString::to_string).unwrap_or_default();
        let message = ListTablesRequest { machine, page_size: 0, page_token };
        let request = address.request(message, Some(QUICK));
        let page = match link.tables().list_tables(request).await {
            Ok(page) => page.into_inner(),
            // It is older, and keeps none.
            Err(status) if status.code() == Code::Unimplemented => return Ok(found),
            Err(status) => return Err(LinkError::call("listing mirrored tables")(status)),
        };
        let mirrored = |MirroredTable { snapshot, share }| {
            let snapshot = Snapshot { reachable: false, ..snapshot? };
            Some(Mirrored { server: server.clone(), snapshot, share })
        };
        found.extend(page.tables.into_iter().filter_map(mirrored));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    Ok(found)
}

/// Adds to a listing what janus doesn't know: snapshots of servers that it has never seen, which others have told of.
pub fn add_unknown(listing: &mut Listing, mirrored: &[Mirrored]) {
    for one in mirrored {
        let id = &one.snapshot.snapshot_id;
        if listing.snapshots.iter().all(|known| known.snapshot_id != *id) {
            listing.snapshots.push(one.snapshot.clone());
        }
    }
    newest_first(&mut listing.snapshots, SystemTime::now());
}

/// What others have of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// At most so much.
    pub held_bytes: u64,
    /// Of so much that isn't zeros.
    pub content_bytes: u64,
}

/// At most what all have together; `None` when not all of them say.
pub fn together<'a>(mirrored: impl IntoIterator<Item = &'a Mirrored>) -> Option<Share> {
    let shares: Vec<_> =
        mirrored.into_iter().map(|one| one.share.as_ref()).collect::<Option<_>>()?;
    let content_bytes = shares.first()?.content_bytes;
    let held: u64 = shares.iter().map(|share| share.held_bytes).sum();
    Some(Share { held_bytes: held.min(content_bytes), content_bytes })
}

/// What other servers have of a snapshot together.
#[derive(Debug, PartialEq)]
pub struct Elsewhere<'a> {
    /// Who has something of it, whoever has most first.
    pub servers: Vec<&'a ServerId>,
    /// What that one has.
    pub most: &'a TableShare,
    /// What all of them have is no more than this: how much of it is the same blocks isn't known.
    pub at_most_bytes: u64,
}

/// What other servers have of a snapshot; `None` when nobody knows.
pub fn elsewhere<'a>(mirrored: &'a [Mirrored], snapshot: &Snapshot) -> Option<Elsewhere<'a>> {
    let is_of = |one: &&Mirrored| one.snapshot.snapshot_id == snapshot.snapshot_id;
    let of: Vec<_> = mirrored.iter().filter(is_of).collect();
    let mut shares: Vec<_> =
        of.iter().filter_map(|one| Some((&one.server, one.share.as_ref()?))).collect();
    shares.sort_by_key(|(_, share)| std::cmp::Reverse(share.held_bytes));
    let (_, most) = *shares.first()?;
    let is_all = most.held_bytes >= most.content_bytes;
    // Who doesn't say may have the rest.
    let at_most_bytes = together(of).map_or(most.content_bytes, |share| share.held_bytes);
    let others = shares.iter().skip(1).filter(|(_, share)| !is_all && share.held_bytes > 0);
    let servers = shares.iter().take(1).chain(others).map(|(server, _)| *server).collect();
    Some(Elsewhere { servers, most, at_most_bytes })
}

/// A share in percent, never rounded up to all.
pub fn percent(held_bytes: u64, content_bytes: u64) -> f64 {
    match held_bytes < content_bytes {
        true => (held_bytes as f64 * 1000.0 / content_bytes as f64).floor() / 10.0,
        false => 100.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_all_of_it_is_a_hundred_percent() {
        assert_eq!(percent(0, 0), 100.0);
        assert_eq!(percent(7, 7), 100.0);
        assert_eq!(percent(999_999, 1_000_000), 99.9);
        assert_eq!(percent(0, 5), 0.0);
    }

    #[test]
    fn what_janus_does_not_know_is_added_in_its_place() {
        let snapshot = |id: &str, committed_ms| Snapshot {
            snapshot_id: id.into(),
            committed_ms,
            ..Snapshot::default()
        };
        let mirrored = |id: &str, committed_ms, held_bytes| Mirrored {
            server: "b".parse().unwrap(),
            snapshot: snapshot(id, committed_ms),
            share: Some(TableShare { content_bytes: 9, held_bytes, snapshot_ids: Vec::new() }),
        };
        let known = vec![snapshot("3", 3), snapshot("1", 1)];
        let mut listing = Listing { snapshots: known, ..Listing::default() };
        let tables = [mirrored("2", 2, 5), mirrored("3", 3, 4), mirrored("2", 2, 7)];
        add_unknown(&mut listing, &tables);
        let ids: Vec<_> = listing.snapshots.iter().map(|one| one.snapshot_id.as_str()).collect();
        assert_eq!(ids, ["3", "2", "1"]);
    }

    #[test]
    fn what_all_have_together_is_bounded() {
        let snapshot = Snapshot { snapshot_id: "1".into(), ..Snapshot::default() };
        let told = |held: &[(&str, Option<u64>)]| {
            let one = |(server, held): &(&str, Option<u64>)| Mirrored {
                server: server.parse().unwrap(),
                snapshot: snapshot.clone(),
                share: held.map(|held_bytes| TableShare {
                    content_bytes: 100,
                    held_bytes,
                    snapshot_ids: Vec::new(),
                }),
            };
            let mirrored: Vec<_> = held.iter().map(one).collect();
            elsewhere(&mirrored, &snapshot).map(|it| {
                let servers: Vec<_> = it.servers.iter().map(|server| server.as_str()).collect();
                (servers.join(" "), it.most.held_bytes, it.at_most_bytes)
            })
        };
        assert_eq!(told(&[]), None);
        assert_eq!(told(&[("b", None)]), None);
        assert_eq!(told(&[("b", Some(30))]), Some(("b".into(), 30, 30)));
        assert_eq!(told(&[("b", Some(30)), ("c", Some(60))]), Some(("c b".into(), 60, 90)));
        assert_eq!(told(&[("b", Some(80)), ("c", Some(60))]), Some(("b c".into(), 80, 100)));
        assert_eq!(told(&[("b", Some(30)), ("c", Some(0))]), Some(("b".into(), 30, 30)));
        assert_eq!(told(&[("b", Some(30)), ("c", None)]), Some(("b".into(), 30, 100)));
        assert_eq!(told(&[("b", Some(100)), ("c", Some(60))]), Some(("b".into(), 100, 100)));
    }

    #[test]
    fn what_all_have_together_is_known_when_all_say() {
        let one = |held: Option<u64>| Mirrored {
            server: "b".parse().unwrap(),
            snapshot: Snapshot::default(),
            share: held.map(|held_bytes| TableShare {
                content_bytes: 100,
                held_bytes,
                snapshot_ids: Vec::new(),
            }),
        };
        let held = |held: &[Option<u64>]| {
            let all: Vec<_> = held.iter().map(|held| one(*held)).collect();
            together(&all).map(|share| share.held_bytes)
        };
        assert_eq!(held(&[Some(30)]), Some(30));
        assert_eq!(held(&[Some(30), Some(60)]), Some(90));
        assert_eq!(held(&[Some(80), Some(60)]), Some(100));
        assert_eq!(held(&[Some(30), None]), None);
        assert_eq!(held(&[]), None);
    }
}
