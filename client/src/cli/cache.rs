//! `janus-client cache show|verify|rebuild|forget`.

use std::{fmt::Write, path::Path};

use clap::ArgMatches;
use janus_proto::{
    ids::{DiskId, SEGMENT_BYTES, ServerId},
    show::{amount, of_named},
};
use serde_json::{Value, json};

use super::{Context, Failure, Outcome, opening};
use crate::{
    cache::{self, CacheError, DiskCache, FreshReason, Summary},
    catalog::{self, Listing, Query},
    config::Settings,
    frozen::Snapshots,
    relearn::{self, Learnt},
    source::Source,
    state::MachineState,
    ways::Ways,
};

/// What can be done, as the command line names it.
pub(super) const ACTIONS: [&str; 4] = ["show", "verify", "rebuild", "forget"];

/// Whether servers have to be asked.
pub fn needs_server(matches: &ArgMatches) -> bool {
    action(matches) == "rebuild"
}

fn action(matches: &ArgMatches) -> &str {
    matches.get_one::<String>("action").map_or("show", String::as_str)
}

fn wanted(matches: &ArgMatches) -> Result<Option<DiskId>, Failure> {
    Ok(matches.get_one::<String>("disk").map(|disk| disk.parse()).transpose()?)
}

/// What needs neither a server nor a certificate. Blocks.
///
/// # Errors
/// When the folder can't be used, a cache is in use, or a disk has none.
pub fn cache_here(settings: &Settings, matches: &ArgMatches) -> Result<Outcome, Failure> {
    let (folder, disk) = (settings.cache_path.as_path(), wanted(matches)?);
    let mut found = cache::summaries(folder)?;
    if let Some(disk) = &disk {
        found.retain(|summary| summary.disk_id == *disk);
        if found.is_empty() {
            let message = format!("{} holds no hash cache of disk {disk}", folder.display());
            return Err(Failure::usage(message));
        }
    }
    match action(matches) {
        "verify" => verify(folder, &found),
        "forget" => {
            let server = matches.get_one::<String>("server");
            let server = server.map(|name| name.parse()).transpose()?;
            forget(folder, disk.as_ref(), server.as_ref(), &found)
        }
        _ => Ok(show(folder, &found)),
    }
}

fn show(folder: &Path, found: &[Summary]) -> Outcome {
    let mut text = String::new();
    for summary in found {
        show_one(&mut text, summary);
    }
    if found.is_empty() {
        let _ = writeln!(text, "{}: no hash caches", folder.display());
    }
    Outcome { json: json!({ "ok": true, "cache_path": folder, "disks": found }), text }
}

fn show_one(text: &mut String, summary: &Summary) {
    let Summary { disk_id, size_bytes, generation, layers, .. } = summary;
    let takes = amount(summary.allocated_bytes);
    match &summary.problem {
        Some(problem) => {
            let _ = writeln!(text, "{disk_id}: {problem}; takes {takes}");
        }
        None => {
            let (size, hashes) = (amount(*size_bytes), amount(summary.hash_bytes));
            let _ = writeln!(
                text,
                "{disk_id}: a disk of {size}, {hashes} of hashes, {layers} layers, generation {generation}; takes {takes}"
            );
            let journal = if summary.has_cursor { "can be asked" } else { "everything is read" };
            let _ = writeln!(text, "  change journals: {journal}");
        }
    }
    if summary.was_damaged {
        let _ = writeln!(
            text,
            "  a damaged one was moved aside (quarantine-*): the next backup removes it, or `cache forget {disk_id}`"
        );
    }
    for known in &summary.servers {
        let changed = known.changed_blocks.map_or("?".into(), |blocks| {
            amount(blocks.saturating_mul(janus_proto::ids::BLOCK_BYTES))
        });
        let (server, snapshot) = (&known.server, known.head.snapshot_id);
        let _ = writeln!(text, "  {server}: snapshot {snapshot}, changed since: {changed}");
    }
}

/// Reads all values; a damaged cache is moved aside as a backup would.
fn verify(folder: &Path, found: &[Summary]) -> Result<Outcome, Failure> {
    let (mut text, mut disks, mut bad) = (String::new(), Vec::new(), Vec::new());
    for summary in found {
        let disk = &summary.disk_id;
        let cache = DiskCache::open(folder, disk, summary.size_bytes.max(SEGMENT_BYTES))?;
        let checked = match cache.fresh_reason() {
            Some(FreshReason::New) => Ok(None),
            Some(reason) => Err(reason.to_string()),
            None => prove(&cache)?.map(Some),
        };
        let proven_by = *checked.as_ref().unwrap_or(&None);
        if let Some(proven) = proven_by {
            let hashes = amount(summary.hash_bytes);
            let servers = match proven {
                0 => String::new(),
                _ => format!(", and are those of the newest snapshot on {proven} servers"),
            };
            let _ = writeln!(text, "{disk}: {hashes} of hashes are as they were written{servers}");
        }
        let damage = checked.err();
        disks.push(
            json!({ "disk_id": disk, "damage": damage, "proven_by": proven_by.unwrap_or(0) }),
        );
        bad.extend(damage.map(|damage| format!("{disk}: {damage}")));
    }
    if bad.is_empty() {
        return Ok(Outcome { json: json!({ "ok": true, "disks": disks }), text });
    }
    let way_out = "moved aside; the next backup compares with the server instead, or `janus-client cache rebuild` does now";
    Err(Failure::failed(format!("{}: {way_out}", bad.join("; "))))
}

/// By how many servers a cache is proven; a damaged one begins anew, and the damage is told.
fn prove(cache: &DiskCache) -> Result<Result<usize, String>, CacheError> {
    match cache.verify() {
        Ok(proven) => Ok(Ok(proven)),
        Err(error @ CacheError::Damaged { .. }) => {
            cache.reset(&error)?;
            Ok(Err(error.to_string()))
        }
        Err(other) => Err(other),
    }
}

fn forget(
    folder: &Path,
    disk: Option<&DiskId>,
    server: Option<&ServerId>,
    found: &[Summary],
) -> Result<Outcome, Failure> {
    // A run under way would bring back what is forgotten.
    let _lock = MachineState::lock(folder)?;
    let forgotten: Vec<&DiskId> = match (disk, server) {
        (None, None) => {
            return Err(Failure::usage("name what to forget: DISK, --server NAME, or both"));
        }
        (Some(disk), None) => {
            DiskCache::remove(folder, disk)?;
            vec![disk]
        }
        (_, Some(server)) => {
            let has = |summary: &&Summary| summary.servers.iter().any(|one| one.server == *server);
            let mut forgotten = Vec::new();
            for summary in found.iter().filter(has) {
                let cache = DiskCache::open(folder, &summary.disk_id, summary.size_bytes)?;
                cache.forget(server)?;
                forgotten.push(&summary.disk_id);
            }
            forgotten
        }
    };
    let what = server.map_or("everything".into(), |server| format!("what {server} has"));
    let mut text = String::new();
    for disk in &forgotten {
        let _ = writeln!(text, "{disk}: forgot {what}; the next backup compares first");
    }
    if forgotten.is_empty() {
        let _ = writeln!(text, "nothing was known of it");
    }
    Ok(Outcome { json: json!({ "ok": true, "forgotten": forgotten, "server": server }), text })
}

/// Fills the caches of the settings' disks by what the servers have. What is known and not damaged stays, where its server can't
/// be asked.
pub(super) async fn rebuild(matches: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    let (settings, wanted) = (&context.settings, wanted(matches)?);
    let _lock = opening::lock(settings).await?;
    let disks = disks(settings, wanted).await?;
    let ways = context.ways().await?;
    let query = Query { machine: settings.machine()?, ..Query::default() };
    let listing = catalog::list(&ways, &query).await?;
    let (mut text, mut answers, mut is_bad) = (String::new(), Vec::new(), false);
    for (disk, size) in disks {
        let learnt = learn(settings, &ways, &listing, &disk, size).await?;
        if learnt.is_empty() {
            let _ = writeln!(text, "{disk}: no server that answers has a snapshot of it");
        }
        for one in &learnt {
            is_bad |= one.outcome.is_err();
            let _ = writeln!(text, "{disk}: {}", said(one));
        }
        answers.push(json!({ "disk_id": disk, "servers": learnt_json(&learnt) }));
    }
    for away in &listing.unreachable {
        is_bad = true;
        let _ = writeln!(text, "{}: {}", away.server_id, of_named(&away.server_id, &away.reason));
    }
    if is_bad {
        text.push_str(
            "what could not be learnt is as it was, or compared by the next backup there\n",
        );
    }
    let exit_code = u8::from(is_bad);
    let json =
        json!({ "ok": !is_bad, "complete": !is_bad, "exit_code": exit_code, "disks": answers });
    Ok(Outcome { json, text })
}

/// Fills the cache of one disk.
pub(super) async fn learn(
    settings: &Settings,
    ways: &Ways,
    listing: &Listing,
    disk: &DiskId,
    size: u64,
) -> Result<Vec<Learnt>, Failure> {
    let (folder, id) = (settings.cache_path.clone(), disk.clone());
    let opening = tokio::task::spawn_blocking(move || {
        let cache = DiskCache::open(&folder, &id, size)?;
        prove(&cache)?.ok();
        Ok::<_, CacheError>(cache)
    });
    let cache = opening.await.map_err(Failure::failed)??;
    let machine = settings.machine()?;
    Ok(relearn::learn(ways, &cache, (machine.as_ref(), disk), listing).await)
}

pub(super) fn learnt_json(learnt: &[Learnt]) -> Value {
    let row = |one: &Learnt| json!({ "server": one.server, "snapshot_id": one.snapshot, "error": one.outcome.as_ref().err() });
    learnt.iter().map(row).collect()
}

pub(super) fn said(learnt: &Learnt) -> String {
    match &learnt.outcome {
        Ok(_) => format!("knows snapshot {} on {}", learnt.snapshot, learnt.server),
        Err(reason) => format!("learnt nothing of {}: {reason}", learnt.server),
    }
}

/// The settings' disks with their sizes now.
pub(super) async fn disks(
    settings: &Settings,
    wanted: Option<DiskId>,
) -> Result<Vec<(DiskId, u64)>, Failure> {
    let specs = settings.disk_specs()?;
    // Nothing is read of them.
    let opening = tokio::task::spawn_blocking(move || {
        Source::open_all(&specs, &Snapshots::default(), |_| true)
    });
    let sources = opening.await.map_err(Failure::failed)??;
    let all = sources.iter().map(|source| (source.disk_id().clone(), source.size_bytes()));
    let found: Vec<_> =
        all.filter(|(disk, _)| wanted.as_ref().is_none_or(|wanted| wanted == disk)).collect();
    match (found.is_empty(), wanted) {
        (true, Some(disk)) => {
            Err(Failure::usage(format!("the settings name no disk with the id {disk}")))
        }
        _ => Ok(found),
    }
}
