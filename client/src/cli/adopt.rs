//! `janus-client adopt`: a machine that was restored, or set up anew, goes on with the chains it had.
//!
//! Nothing on a server changes. What decides is a disk's id: one that has a chain goes on with it, and its hashes are fetched, so
//! that the next backups are deltas. A new disk has a new serial number; the line of the settings that gives it the old
//! name is said, not written.

use std::fmt::Write as _;

use clap::ArgMatches;
use janus_proto::{
    ids::DiskId,
    pb::Snapshot,
    show::{amount, of_named},
};
use serde_json::json;

use super::{Context, Failure, Outcome, cache, opening};
use crate::catalog::{self, Listing, Query};

pub(super) async fn run(_: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    let settings = &context.settings;
    let _lock = opening::lock(settings).await?;
    let disks = cache::disks(settings, None).await?;
    let ways = context.ways_awake().await?;
    let query = Query { machine: settings.machine()?, ..Query::default() };
    let listing = catalog::list(&ways, &query).await?;
    let chains = chains(&listing);
    let (mut text, mut rows, mut exit_code) = (String::new(), Vec::new(), 0);
    let left: Vec<_> =
        chains.iter().filter(|chain| !disks.iter().any(|d| chain.is_of(d))).collect();
    for disk in &disks {
        let (id, size) = disk;
        let Some(chain) = chains.iter().find(|chain| chain.is_of(disk)) else {
            let old: Vec<&str> = left
                .iter()
                .filter(|chain| chain.size_bytes == *size)
                .map(|chain| chain.disk)
                .collect();
            let _ = writeln!(text, "{}", without_chain(id, *size, &old));
            exit_code = exit_code.max(u8::from(!left.is_empty()));
            rows.push(json!({ "disk_id": id, "size_bytes": size, "snapshots": 0, "maybe": old }));
            continue;
        };
        let _ = writeln!(text, "{id}: goes on with {}", chain.said());
        let learnt = cache::learn(settings, &ways, &listing, id, *size).await?;
        for one in &learnt {
            exit_code = exit_code.max(u8::from(one.outcome.is_err()));
            let _ = writeln!(text, "{id}: {}", cache::said(one));
        }
        rows.push(json!({ "disk_id": id, "size_bytes": size, "snapshots": chain.snapshots, "servers": cache::learnt_json(&learnt) }));
    }
    for chain in &left {
        let _ = writeln!(text, "{}: {}, and no disk of the settings", chain.disk, chain.said());
    }
    for away in &listing.unreachable {
        exit_code = 1;
        let _ = writeln!(text, "{}: {}", away.server_id, of_named(&away.server_id, &away.reason));
    }
    let left: Vec<_> = left.iter().map(|chain| chain.disk).collect();
    let json = json!({ "ok": exit_code == 0, "exit_code": exit_code, "disks": rows, "left": left });
    Ok(Outcome { json, text })
}

fn without_chain(id: &DiskId, size: u64, old: &[&str]) -> String {
    let size = amount(size);
    match old {
        [] => format!("{id} ({size}): has no backup yet; the first one will be full"),
        [one] => format!(
            "{id} ({size}): has no backup, but {one} is of the same size: if this disk takes its place, write \"{one}=/dev/…\" in `disks` of the settings, and run this again"
        ),
        several => format!(
            "{id} ({size}): has no backup, but {} are of the same size: if this disk takes the place of one, write \"NAME=/dev/…\" with its name in `disks` of the settings, and run this again",
            several.join(", ")
        ),
    }
}

/// What the servers have of one disk.
struct Chain<'a> {
    disk: &'a str,
    /// Of its newest snapshot.
    size_bytes: u64,
    snapshots: usize,
    servers: Vec<&'a str>,
}

impl Chain<'_> {
    fn is_of(&self, (disk, _): &(DiskId, u64)) -> bool {
        self.disk == disk.as_str()
    }

    fn said(&self) -> String {
        let plural = if self.snapshots == 1 { "" } else { "s" };
        let servers = self.servers.join(", ");
        format!("{} snapshot{plural} of {} on {servers}", self.snapshots, amount(self.size_bytes))
    }
}

/// The chains of a listing, by their disks.
fn chains(listing: &Listing) -> Vec<Chain<'_>> {
    let mut chains: Vec<Chain<'_>> = Vec::new();
    // Newest first.
    for Snapshot { disk_id, size_bytes, server_id, .. } in &listing.snapshots {
        let at = chains.iter().position(|chain| chain.disk == disk_id).unwrap_or_else(|| {
            let size_bytes = *size_bytes;
            chains.push(Chain { disk: disk_id, size_bytes, snapshots: 0, servers: Vec::new() });
            chains.len() - 1
        });
        chains[at].snapshots += 1;
        if !chains[at].servers.contains(&server_id.as_str()) {
            chains[at].servers.push(server_id);
        }
    }
    chains.sort_unstable_by_key(|chain| chain.disk);
    chains
}
