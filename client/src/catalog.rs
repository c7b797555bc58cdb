//! Which snapshots there are, over all servers that answer.

use janus_proto::{
    ids::{DiskId, MachineKey, ServerId, SnapshotId},
    pb::{
        self, ErrorReason, GetSnapshotRequest, ListSnapshotsRequest, ServerAddresses, Snapshot,
        UnreachableServer,
    },
};

use crate::link::{Address, Link, LinkError, QUICK};

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

/// All snapshots of a machine (`None`: our own), of one disk or of all.
///
/// # Errors
/// When the call fails.
pub async fn list(
    link: &Link,
    machine: Option<&MachineKey>,
    disk: Option<&DiskId>,
    server: Option<&ServerId>,
) -> Result<Listing, LinkError> {
    let address = Address { server: server.cloned(), run: None, machine: machine.cloned() };
    let mut listing = Listing::default();
    let mut page_token = String::new();
    for _ in 0..MAX_PAGES {
        let message = ListSnapshotsRequest {
            machine: machine.map(ToString::to_string).unwrap_or_default(),
            disk_id: disk.map(ToString::to_string).unwrap_or_default(),
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
    listing
        .snapshots
        .retain(|snapshot| server.is_none_or(|server| snapshot.server_id == server.as_str()));
    listing.snapshots.sort_by_key(|snapshot| std::cmp::Reverse(snapshot.committed_ms));
    Ok(listing)
}

/// One snapshot by its id, and where its server can be reached without janus; `None` when no server that answers has it.
///
/// # Errors
/// When the call fails.
pub async fn find(
    link: &Link,
    id: SnapshotId,
    machine: Option<&MachineKey>,
    server: Option<&ServerId>,
) -> Result<Option<(Snapshot, ServerAddresses)>, LinkError> {
    let address = Address { server: server.cloned(), run: None, machine: machine.cloned() };
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
