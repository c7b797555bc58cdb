//! `janus-client backup`.

use std::{fmt::Write, path::PathBuf, sync::Arc, time::Duration};

use clap::ArgMatches;
use janus_proto::{
    ids::{MachineKey, ServerId},
    pb::Encoding,
    show::{amount, date},
};
use serde_json::{Value, json};

use super::{
    Context, Failure, Outcome,
    opening::{Stillness, lock, open_all},
    server, to_folder, whose,
};
use crate::{
    backup::{Backup, BackupReport, Disk, DiskReport},
    config::Encryption,
    enroll,
    hooks::Hook,
    nbd::bitmap::Announced,
    packing::{self, Packing, Wish},
    progress::{self, Doing, Progress},
    reading::{Heard, Reading},
    revoked,
    seal::KeyId,
    state::MachineState,
    transfer::{Gate, stream::ScanSettings},
    ways::Ways,
};

/// Longest time that the renewal of a certificate may take.
const RENEWAL: Duration = Duration::from_secs(20);

pub(super) async fn run(matches: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    let (folder, wanted) = (matches.get_one::<PathBuf>("to-folder"), server(matches)?);
    let settings = &context.settings;
    let machine = whose(settings, &context.identity()?.principal().role)?;
    let machine = machine.ok_or_else(|| {
        let role = context.identity.as_ref().map(|identity| identity.principal().to_string());
        Failure::usage(format!(
            "setting cert: the certificate says {}; a backup needs one of `janus-server pki issue client`, or setting for_machine and a right to back it up",
            role.unwrap_or_default()
        ))
    })?;
    let machine = &machine;
    if folder.is_none() {
        settings.checked_urls()?;
        renew(context).await?;
    }
    let specs = settings.disk_specs()?;
    // Before any hook: what another backup has frozen is not ours to thaw.
    let state = lock(settings).await?;
    // Nor may anything be frozen while a server boots.
    let to = match folder {
        Some(folder) => Destination::Folder(folder.clone()),
        None => Destination::Server(wanted, context.ways_awake().await?),
    };
    let bitmaps = match settings.pre_backup.is_empty() {
        true => None,
        false => {
            let folder = settings.cache_path.clone();
            let announcing = tokio::task::spawn_blocking(move || Announced::new(&specs, &folder));
            Some(announcing.await.map_err(Failure::failed)??)
        }
    };
    let taken_ms = jiff::Timestamp::now().as_millisecond();
    let told: Vec<_> = bitmaps.iter().flat_map(Announced::variables).collect();
    let mut told: Vec<_> = told.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let limit = Duration::from_secs(settings.hook_seconds);
    let pre = Hook { setting: "pre_backup", words: &settings.pre_backup, limit };
    let post = Hook { setting: "post_backup", words: &settings.post_backup, limit };
    let made = match context.stop.run_until_cancelled(pre.run(&told)).await {
        None => Err(Failure::interrupted()),
        Some(Err(error)) => Err(Failure::failed(error)),
        Some(Ok(())) => {
            between_hooks(machine, to, (state, taken_ms), bitmaps.as_ref(), context).await
        }
    };
    let (result, message) = match &made {
        Ok(_) => ("ok", ""),
        Err(failure) => ("failed", failure.message.as_str()),
    };
    told.extend([("JANUS_RESULT", result), ("JANUS_ERROR", message)]);
    let ended = post.run(&told).await;
    match (made, ended) {
        (Ok(_), Err(error)) => Err(Failure::failed(format!("the backup was made, but {error}"))),
        (made, Ok(())) => made,
        (made, Err(error)) => {
            tracing::error!(%error, "after the failed backup");
            made
        }
    }
}

/// Where a backup goes.
enum Destination {
    /// To this server, by these ways; `None`: where janus sends it.
    Server(Option<ServerId>, Ways),
    /// Into a folder.
    Folder(PathBuf),
}

/// Renews the certificate where that is due. One that can't be renewed yet is no reason not to back up.
async fn renew(context: &Context) -> Result<(), Failure> {
    let (identity, settings) = (context.identity()?, &context.settings);
    let files = settings.identity_files();
    let renewing = enroll::renew_if_due(identity, &files, settings.proxies()?);
    match tokio::time::timeout(RENEWAL, renewing).await {
        Ok(Ok(None)) => {}
        Ok(Ok(Some(expires))) => {
            // Files that were written just now; what can't be read is told at the next start.
            let reading = identity.clone();
            let read = tokio::task::spawn_blocking(move || reading.reload()).await;
            read.map_err(Failure::failed)??;
            tracing::info!(until = date(expires.saturating_mul(1000)), "certificate renewed");
        }
        Ok(Err(error)) => {
            let until = date(identity.expires().saturating_mul(1000));
            tracing::warn!(%error, until, "the certificate can't be renewed now");
        }
        Err(_) => tracing::warn!("the certificate can't be renewed now: no answer in time"),
    }
    Ok(())
}

/// Makes the snapshots that are needed, and removes them whatever comes of the backup.
async fn between_hooks(
    machine: &MachineKey,
    to: Destination,
    state: (MachineState, i64),
    bitmaps: Option<&Announced>,
    context: &Context,
) -> Result<Outcome, Failure> {
    let (specs, wish) = (context.settings.disk_specs()?, context.settings.snapshots()?);
    let stop = context.stop.clone();
    let making = move || match wish {
        None => Ok(Stillness::default()),
        Some(wish) => Stillness::make(&specs, &wish, &stop),
    };
    // Not to be abandoned, whoever wants to go: it leaves nothing behind.
    let mut still = tokio::task::spawn_blocking(making).await.map_err(Failure::failed)??;
    still.bitmap = bitmaps.map(|announced| announced.new.clone());
    let still = Arc::new(still);
    let mut made = match to {
        Destination::Server(server, ways) => {
            read(machine, (server, ways), state, still.clone(), context).await
        }
        Destination::Folder(folder) => {
            // Its lock is kept until the end.
            let (_state, taken_ms) = state;
            let machine = machine.clone();
            to_folder::write(folder, machine, taken_ms, still.clone(), context).await
        }
    };
    let has_failed = made.is_err();
    let ending = tokio::task::spawn_blocking(move || {
        let overflowed = if has_failed { still.snapshots.overflowed() } else { None };
        // A thread whose read hangs may still have it; whoever is last removes the snapshots.
        if let Some(still) = Arc::into_inner(still) {
            still.snapshots.remove();
        }
        overflowed
    });
    let overflowed = ending.await.map_err(Failure::failed)?;
    if let (Err(failure), Some(why)) = (&mut made, overflowed) {
        failure.message = format!("{}; {why}", failure.message);
    }
    made
}

/// Opens the disks and backs them up.
async fn read(
    machine: &MachineKey,
    (server, ways): (Option<ServerId>, Ways),
    state: (MachineState, i64),
    still: Arc<Stillness>,
    context: &Context,
) -> Result<Outcome, Failure> {
    let settings = &context.settings;
    let packing = match settings.encryption {
        Encryption::None => settings.encoding()?,
        // Nothing makes it any shorter.
        Encryption::Client => Wish::Only(Encoding::None),
    };
    let packing = Arc::new(Packing::new(packing));
    let disks = open_all(settings, Some(machine), still, &context.stop).await?;
    let sealed_by = sealed_by(&disks);
    let progress = Progress::new(disks.iter().map(|disk| disk.source.size_bytes()).sum());
    let display = progress::show(Doing::Backup, &progress, context.events);
    let own = context.identity()?.principal().machine();
    let gate = Gate {
        ways: ways.clone(),
        failover_after: settings.failover_after(),
        failover_wait: Duration::from_secs(settings.failover_wait_seconds),
        direct: settings.direct,
        machine: settings.machine()?.filter(|machine| own != Some(machine)),
    };
    let scan = ScanSettings { threads: settings.threads(), packing };
    let stop = context.stop.clone();
    let (state, taken_ms) = state;
    let (urls, dialer) = (ways.urls().to_vec(), ways.dialer().clone());
    let (identity, folder) = (context.identity()?.clone(), settings.cache_path.clone());
    let learning = tokio::spawn(revoked::learn(urls, dialer, identity, folder));
    let mut backup = Backup { gate, server, disks, state, taken_ms, scan, progress, stop };
    let made = backup.run().await;
    // A URL that leads nowhere just now costs the backup no time.
    learning.abort();
    let _ = learning.await;
    // Also of a failed one: which URL worked counts for the next.
    let remembering = tokio::task::spawn_blocking(move || ways.memory().write());
    remembering.await.map_err(Failure::failed)?;
    let report = made?;
    drop(display);
    let made = Outcome { json: report_json(&report), text: report_text(&report) };
    Ok(say_sealed(made, sealed_by))
}

/// The key that a run's disks are sealed with.
pub(super) fn sealed_by(disks: &[Disk]) -> Option<KeyId> {
    disks.iter().find_map(|disk| Some(disk.seal.as_ref()?.sealer().key()))
}

/// Adds to a report whether the run is sealed.
pub(super) fn say_sealed(mut outcome: Outcome, sealed_by: Option<KeyId>) -> Outcome {
    if let Some(key) = sealed_by {
        let _ = writeln!(outcome.text, "  sealed with key {key}");
    }
    outcome.json["sealed_by"] = json!(sealed_by.map(|key| key.to_string()));
    outcome
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
        "taken_ms": report.taken_ms,
        "seconds": report.seconds,
        "packing": packing_json(&report.packing),
        "disks": report.disks.iter().map(disk).collect::<Vec<_>>(),
    })
}

fn packing_json(summary: &packing::Summary) -> Value {
    let total = summary.total();
    let setting = match summary.wish {
        Wish::Auto => "auto",
        Wish::Only(encoding) => packing::name(encoding),
    };
    let by = |(encoding, sent): &(Encoding, packing::Sent)| {
        let counts = json!({ "raw_bytes": sent.raw_bytes, "wire_bytes": sent.wire_bytes });
        (packing::name(*encoding).to_owned(), counts)
    };
    json!({
        "setting": setting,
        "mostly": packing::name(summary.mostly()),
        "by": summary.by.iter().map(by).collect::<serde_json::Map<_, _>>(),
        "saved_bytes": total.raw_bytes - total.wire_bytes,
    })
}

fn packing_text(text: &mut String, summary: &packing::Summary) {
    let total = summary.total();
    let saved = total.raw_bytes - total.wire_bytes;
    if saved == 0 {
        return;
    }
    let _ = writeln!(
        text,
        "  packed mostly with {}: {} travelled as {}, {} % less",
        packing::name(summary.mostly()),
        amount(total.raw_bytes),
        amount(total.wire_bytes),
        saved * 100 / total.raw_bytes.max(1),
    );
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
    packing_text(&mut text, &report.packing);
    text
}
