//! `janus-client backup`.

use std::{fmt::Write, sync::Arc, time::Duration};

use clap::ArgMatches;
use janus_proto::{ids::ServerId, show::amount, tls::Role};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{Context, Failure, Outcome, address};
use crate::{
    backup::{Backup, BackupReport, Disk, DiskReport},
    cache::DiskCache,
    config::Settings,
    hooks::Hook,
    progress::{self, Progress},
    reading::{Heard, Policy, Reading},
    source::Source,
    state::MachineState,
    survey::Choice,
    transfer::{Gate, stream::ScanSettings},
};

pub(super) async fn run(matches: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    let server = address(matches)?.server;
    let settings = &context.settings;
    let role = &context.identity.principal().role;
    if !matches!(role, Role::Client(_)) {
        return Err(Failure::usage(format!(
            "setting cert: the certificate says {role}; a backup needs one of `janus-server pki issue client`"
        )));
    }
    settings.checked_urls()?;
    settings.disk_specs()?;
    // Before any hook: what another backup has frozen is not ours to thaw.
    let state = lock(settings).await?;
    let limit = Duration::from_secs(settings.hook_seconds);
    let pre = Hook { setting: "pre_backup", words: &settings.pre_backup, limit };
    let post = Hook { setting: "post_backup", words: &settings.post_backup, limit };
    let made = match context.stop.run_until_cancelled(pre.run(&[])).await {
        None => Err(Failure::interrupted()),
        Some(Err(error)) => Err(Failure::failed(error)),
        Some(Ok(())) => between_hooks(server, state, context).await,
    };
    let (result, message) = match &made {
        Ok(_) => ("ok", ""),
        Err(failure) => ("failed", failure.message.as_str()),
    };
    let ended = post.run(&[("JANUS_RESULT", result), ("JANUS_ERROR", message)]).await;
    match (made, ended) {
        (Ok(_), Err(error)) => Err(Failure::failed(format!("the backup was made, but {error}"))),
        (made, Ok(())) => made,
        (made, Err(error)) => {
            tracing::error!(%error, "after the failed backup");
            made
        }
    }
}

/// Opens the disks and backs them up.
async fn between_hooks(
    server: Option<ServerId>,
    state: MachineState,
    context: &Context,
) -> Result<Outcome, Failure> {
    let settings = &context.settings;
    let urls = settings.checked_urls()?.to_vec();
    let encoding = settings.encoding()?;
    let disks = open_all(settings, &context.stop).await?;
    let progress = Progress::new(disks.iter().map(|disk| disk.source.size_bytes()).sum());
    let display = progress::show("backup", &progress);
    let gate = Gate {
        urls,
        identity: context.identity.clone(),
        failover_after: settings.failover_after(),
        direct: settings.direct,
    };
    let scan = ScanSettings { threads: settings.threads() };
    let stop = context.stop.clone();
    let mut backup = Backup { gate, server, disks, state, encoding, scan, progress, stop };
    let report = backup.run().await?;
    drop(display);
    Ok(Outcome { json: report_json(&report), text: report_text(&report) })
}

/// Keeps other backups of this machine away.
pub(super) async fn lock(settings: &Settings) -> Result<MachineState, Failure> {
    let folder = settings.cache_path.clone();
    let state = tokio::task::spawn_blocking(move || MachineState::lock(&folder));
    Ok(state.await.map_err(Failure::failed)??)
}

/// Opens the disks of the settings, and plans what to read of them.
pub(super) async fn open_all(
    settings: &Settings,
    stop: &CancellationToken,
) -> Result<Vec<Disk>, Failure> {
    let specs = settings.disk_specs()?;
    let (allow_live, folder) = (settings.allow_live, settings.cache_path.clone());
    let (policy, choice) = (settings.policy()?, settings.choice()?);
    let opening =
        tokio::task::spawn_blocking(move || open(&specs, allow_live, &choice, policy, &folder));
    // A disk that hangs must not keep a user who wants to go.
    let opened = stop.run_until_cancelled(opening).await.ok_or_else(Failure::interrupted)?;
    opened.map_err(Failure::failed)?
}

fn open(
    specs: &[crate::config::DiskSpec],
    allow_live: bool,
    choice: &Choice,
    policy: Policy,
    folder: &std::path::Path,
) -> Result<Vec<Disk>, Failure> {
    let sources = Source::open_all(specs, allow_live)?;
    let mut disks = Vec::with_capacity(sources.len());
    for source in sources {
        let cache = DiskCache::open(folder, source.disk_id(), source.size_bytes())?;
        if let Some(reason) = cache.fresh_reason() {
            tracing::debug!(disk = %source.disk_id(), ?reason, "the hash cache starts empty");
        }
        let reading = choice.plan(&source, &cache, policy)?;
        disks.push(Disk { source: Arc::new(source), cache, reading: Arc::new(reading) });
    }
    Ok(disks)
}

fn kind(disk: &DiskReport) -> &'static str {
    if disk.snapshot.parent_snapshot_id.is_empty() { "full" } else { "delta" }
}

fn report_json(report: &BackupReport) -> Value {
    let skipped: Vec<_> = report
        .skipped
        .iter()
        .map(|(server, reason)| json!({ "server": server, "reason": reason }))
        .collect();
    let disk = |disk: &DiskReport| {
        let snapshot = &disk.snapshot;
        json!({
            "disk_id": snapshot.disk_id,
            "size_bytes": snapshot.size_bytes,
            "snapshot_id": snapshot.snapshot_id,
            "kind": kind(disk),
            "read_bytes": disk.figures.read_bytes,
            "changed_blocks": disk.changed_blocks,
            "sent_bytes": disk.figures.sent_bytes,
            "wire_bytes": disk.figures.wire_bytes,
            "compare": disk.compare.as_str(),
            "reading": reading_json(&disk.reading),
            "image": snapshot.image,
            "image_allocated_bytes": snapshot.image_allocated_bytes,
            "image_length_bytes": snapshot.image_length_bytes,
            "table_digest": hex::encode(&snapshot.table_digest),
        })
    };
    json!({
        "ok": true,
        "backup_id": report.backup_id.to_string(),
        "server": report.server,
        "use_counter": report.use_counter,
        "skipped": skipped,
        "resumed": report.resumed,
        "seconds": report.seconds,
        "disks": report.disks.iter().map(disk).collect::<Vec<_>>(),
    })
}

pub(super) fn reading_json(reading: &Reading) -> Value {
    let journal = |heard: &Heard| {
        json!({
            "name": heard.name,
            "kind": heard.kind,
            "unread_bytes": heard.unread.as_ref().ok(),
            "full_compare": heard.unread.as_ref().err().map(ToString::to_string),
        })
    };
    json!({
        "full_compare": reading.distrust.as_ref().map(ToString::to_string),
        "zero_bytes": reading.zero_bytes(),
        "journals": reading.heard.iter().map(journal).collect::<Vec<_>>(),
    })
}

pub(super) fn reading_text(text: &mut String, reading: &Reading) {
    if reading.zero_bytes() > 0 {
        let _ = writeln!(text, "    {} skipped: they count as zeros", amount(reading.zero_bytes()));
    }
    for Heard { name, kind, unread } in &reading.heard {
        let _ = match unread {
            Ok(bytes) => {
                writeln!(text, "    {name}: {} unchanged or free by the {kind}", amount(*bytes))
            }
            Err(reason) => writeln!(text, "    {name}: {kind}: full compare: {reason}"),
        };
    }
}

fn report_text(report: &BackupReport) -> String {
    let mut text = String::new();
    for (server, reason) in &report.skipped {
        let _ = writeln!(text, "skipped {server}: {reason}");
    }
    let resumed = if report.resumed { ", going on with an interrupted run" } else { "" };
    let _ = writeln!(
        text,
        "backup {} on {} in {:.1} s{resumed}",
        report.backup_id, report.server, report.seconds
    );
    for disk in &report.disks {
        let (snapshot, figures) = (&disk.snapshot, &disk.figures);
        let _ = writeln!(
            text,
            "  {}: {} of {}, {} read, {} sent, image {} ({} on disk)",
            snapshot.disk_id,
            kind(disk),
            amount(snapshot.size_bytes),
            amount(figures.read_bytes),
            amount(figures.sent_bytes),
            snapshot.image,
            amount(snapshot.image_allocated_bytes),
        );
        reading_text(&mut text, &disk.reading);
    }
    text
}
