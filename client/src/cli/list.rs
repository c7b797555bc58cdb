//! `janus-client list`.

use std::fmt::Write;

use clap::ArgMatches;
use janus_proto::{
    ids::BLOCK_BYTES,
    pb::{Snapshot, UnreachableServer},
    show::{amount, date, of_named},
    tls::Role,
};
use serde_json::{Value, json};

use super::{Context, Failure, Outcome, named_machine, server};
use crate::{
    catalog::{self, Listing, Query, consistency_name},
    seal::RunSeal,
    tables::{self, Elsewhere, Mirrored, percent},
};

pub(super) async fn run(matches: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    let server = server(matches)?;
    let machine = named_machine(matches)?.or(context.settings.machine()?);
    let role = context.identity.as_ref().map(|identity| &identity.principal().role);
    if let Some(role @ (Role::Operator(_) | Role::User(_))) = role
        && machine.is_none()
        && context.archive.is_none()
    {
        return Err(Failure::usage(format!("{role} must name a machine: --machine USER/MACHINE")));
    }
    let query = Query { machine, disk: None, server };
    let ways = context.ways().await?;
    let mut listing = catalog::list(&ways, &query).await?;
    let is_all = listing.unreachable.is_empty() && listing.snapshots.iter().all(|s| s.reachable);
    let mirrored = match is_all || query.server.is_some() {
        true => Vec::new(),
        false => tables::list(&ways, &query, &listing).await,
    };
    tables::add_unknown(&mut listing, &mirrored);
    let (json, text) = (listing_json(&listing, &mirrored), listing_text(&listing, &mirrored));
    Ok(Outcome { json, text })
}

fn listing_json(listing: &Listing, mirrored: &[Mirrored]) -> Value {
    let elsewhere = |s: &Snapshot| {
        let Elsewhere { servers, most, at_most_bytes } = elsewhere(s, mirrored)?;
        let servers: Vec<&str> = servers.iter().map(|server| server.as_str()).collect();
        Some(json!({
            "server": servers.first(),
            "content_bytes": most.content_bytes,
            "held_bytes": most.held_bytes,
            "servers": servers,
            "at_most_bytes": at_most_bytes,
        }))
    };
    let snapshot = |s: &Snapshot| {
        json!({
            "snapshot_id": s.snapshot_id,
            "server": s.server_id,
            "machine": s.machine,
            "disk_id": s.disk_id,
            "backup_id": s.backup_id,
            "committed_ms": s.committed_ms,
            "size_bytes": s.size_bytes,
            "table_digest": hex::encode(&s.table_digest),
            "parent_snapshot_id": Some(&s.parent_snapshot_id).filter(|id| !id.is_empty()),
            "image": s.image,
            "image_allocated_bytes": s.image_allocated_bytes,
            "image_length_bytes": s.image_length_bytes,
            "consistency": consistency_name(s.consistency()),
            "skipped_bytes": s.skipped_bytes,
            "reachable": s.reachable,
            "elsewhere": elsewhere(s),
            "damaged_blocks": s.damaged_blocks,
            "missing_blocks": s.missing_blocks,
            "verified_ms": s.verified_ms,
            "proven_ms": s.proven_ms,
            "sealed_by": RunSeal::look(&s.client_seal).map(|seal| seal.key.to_string()),
        })
    };
    let unreachable = |u: &UnreachableServer| json!({ "server": u.server_id, "reason": u.reason, "since_ms": u.since_ms });
    json!({
        "ok": true,
        "snapshots": listing.snapshots.iter().map(snapshot).collect::<Vec<_>>(),
        "unreachable": listing.unreachable.iter().map(unreachable).collect::<Vec<_>>(),
    })
}

fn listing_text(listing: &Listing, mirrored: &[Mirrored]) -> String {
    let mut text = String::new();
    let wide = |name: fn(&Snapshot) -> &str| {
        listing.snapshots.iter().map(|s| name(s).len()).max().unwrap_or(0)
    };
    let (disks, servers) = (wide(|s| &s.disk_id), wide(|s| &s.server_id));
    for s in &listing.snapshots {
        let kind = if s.parent_snapshot_id.is_empty() { "full " } else { "delta" };
        let _ = writeln!(
            text,
            "{}  {}  {:disks$}  {:servers$}  {kind}  {:>10}  {:>10} on disk  {}{}{}{}{}{}{}",
            s.snapshot_id,
            date(s.committed_ms),
            s.disk_id,
            s.server_id,
            amount(s.size_bytes),
            amount(s.image_allocated_bytes),
            consistency_name(s.consistency()),
            sealed(s),
            skipped(s),
            damage(s),
            incomplete(s),
            proven(s),
            availability(s, mirrored),
        );
    }
    if listing.snapshots.is_empty() {
        text.push_str("no snapshots\n");
    }
    for u in &listing.unreachable {
        let since =
            if u.since_ms > 0 { format!(" since {}", date(u.since_ms)) } else { String::new() };
        let _ = writeln!(
            text,
            "server {} can't be reached{since}: {}",
            u.server_id,
            of_named(&u.server_id, &u.reason)
        );
    }
    text
}

/// What other servers have of a snapshot whose own can't be reached.
fn elsewhere<'a>(s: &Snapshot, mirrored: &'a [Mirrored]) -> Option<Elsewhere<'a>> {
    if s.reachable { None } else { tables::elsewhere(mirrored, s) }
}

fn availability(s: &Snapshot, mirrored: &[Mirrored]) -> String {
    match elsewhere(s, mirrored) {
        _ if s.reachable => String::new(),
        None => "  unreachable".to_owned(),
        Some(Elsewhere { servers, most, at_most_bytes }) => {
            let of = |bytes| percent(bytes, most.content_bytes);
            let (least, names) = (of(most.held_bytes), servers.iter().map(|one| one.as_str()));
            let names = names.collect::<Vec<_>>().join(", ");
            match at_most_bytes > most.held_bytes {
                true => {
                    format!("  unreachable, {least} to {} % of it on {names}", of(at_most_bytes))
                }
                false => format!("  unreachable, {least} % of it on {names}"),
            }
        }
    }
}

fn sealed(snapshot: &Snapshot) -> &'static str {
    // Janus keeps no seals of servers that are away: of those it isn't told.
    if snapshot.client_seal.is_empty() { "" } else { "  sealed" }
}

fn skipped(snapshot: &Snapshot) -> String {
    match snapshot.skipped_bytes {
        0 => String::new(),
        bytes => format!("  {} skipped", amount(bytes)),
    }
}

fn incomplete(snapshot: &Snapshot) -> String {
    match snapshot.missing_blocks {
        0 => String::new(),
        blocks => {
            let bytes = amount((blocks * BLOCK_BYTES).min(snapshot.size_bytes));
            format!("  INCOMPLETE: up to {bytes} still come from other servers")
        }
    }
}

fn proven(snapshot: &Snapshot) -> String {
    match snapshot.proven_ms {
        0 => String::new(),
        at => format!("  proven {}", date(at)),
    }
}

fn damage(snapshot: &Snapshot) -> String {
    match snapshot.damaged_blocks {
        0 => String::new(),
        // What a stub lacks is asked of the next backup when no server has it.
        _ if snapshot.missing_blocks > 0 => String::new(),
        blocks => {
            format!("  DAMAGED: {} lost", amount((blocks * BLOCK_BYTES).min(snapshot.size_bytes)))
        }
    }
}
