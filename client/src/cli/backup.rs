//! `janus-client backup`.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::ArgMatches;
use janus_proto::{
    ids::{DiskId, ServerId},
    show::amount,
    tls::Role,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{Context, Failure, Outcome, address};
use crate::{
    backup::{Backup, BackupReport, Disk, DiskReport},
    cache::DiskCache,
    config::DiskSpec,
    dry_run::{DryRunError, Forecast, forecast},
    frozen::{self, SnapshotError, Snapshots, Wish},
    hooks::Hook,
    nbd::bitmap::Announced,
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
    let specs = settings.disk_specs()?;
    let folder = settings.cache_path.clone();
    // Before any hook: what another backup has frozen is not ours to thaw.
    let state = tokio::task::spawn_blocking(move || MachineState::lock(&folder));
    let state = state.await.map_err(Failure::failed)??;
    if matches.get_flag("dry-run") {
        return between_hooks(true, server, state, None, context).await;
    }
    let folder = settings.cache_path.clone();
    let bitmaps = match settings.pre_backup.is_empty() {
        true => None,
        false => {
            let announcing = tokio::task::spawn_blocking(move || Announced::new(&specs, &folder));
            Some(announcing.await.map_err(Failure::failed)??)
        }
    };
    let told = bitmaps.as_ref().map(Announced::variables).into_iter().flatten();
    let told: Vec<_> = told.collect();
    let mut told: Vec<_> = told.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let limit = Duration::from_secs(settings.hook_seconds);
    let pre = Hook { setting: "pre_backup", words: &settings.pre_backup, limit };
    let post = Hook { setting: "post_backup", words: &settings.post_backup, limit };
    let made = match context.stop.run_until_cancelled(pre.run(&told)).await {
        None => Err(Failure::interrupted()),
        Some(Err(error)) => Err(Failure::failed(error)),
        Some(Ok(())) => between_hooks(false, server, state, bitmaps.as_ref(), context).await,
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

/// Makes the snapshots that are needed, and removes them whatever comes of the backup; a dry run makes none.
async fn between_hooks(
    dry: bool,
    server: Option<ServerId>,
    state: MachineState,
    bitmaps: Option<&Announced>,
    context: &Context,
) -> Result<Outcome, Failure> {
    let (specs, wish) = (context.settings.disk_specs()?, context.settings.snapshots()?);
    let stop = context.stop.clone();
    let making = move || match wish {
        None => Ok(Stillness::default()),
        Some(_) if dry => Stillness::of_dry_run(&specs),
        Some(wish) => Stillness::make(&specs, &wish, &stop),
    };
    // Not to be abandoned, whoever wants to go: it leaves nothing behind.
    let mut still = tokio::task::spawn_blocking(making).await.map_err(Failure::failed)??;
    still.bitmap = bitmaps.map(|announced| announced.new.clone());
    let still = Arc::new(still);
    let mut made = read(dry, server, state, still.clone(), context).await;
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

/// How disks that are mounted writable are held still.
#[derive(Default)]
struct Stillness {
    snapshots: Snapshots,
    /// A backup would make snapshots of these; nothing is kept of what a dry run reads.
    possible: Vec<PathBuf>,
    /// The dirty bitmap that a hook was asked to begin in each NBD export.
    bitmap: Option<String>,
}

impl Stillness {
    fn make(
        specs: &[DiskSpec],
        wish: &Wish,
        stop: &CancellationToken,
    ) -> Result<Self, SnapshotError> {
        let paths = specs.iter().map(|spec| spec.path.as_path());
        let snapshots = Snapshots::make(paths, wish, stop)?;
        Ok(Self { snapshots, ..Self::default() })
    }

    fn of_dry_run(specs: &[DiskSpec]) -> Result<Self, SnapshotError> {
        let mut possible = Vec::new();
        for spec in specs {
            if frozen::is_possible(&spec.path)? {
                possible.push(spec.path.clone());
            }
        }
        Ok(Self { snapshots: Snapshots::default(), possible, bitmap: None })
    }
}

/// Opens the disks and backs them up, or only says what that would do.
async fn read(
    dry: bool,
    server: Option<ServerId>,
    state: MachineState,
    still: Arc<Stillness>,
    context: &Context,
) -> Result<Outcome, Failure> {
    let settings = &context.settings;
    let urls = settings.checked_urls()?.to_vec();
    let encoding = settings.encoding()?;
    let specs = settings.disk_specs()?;
    let (allow_live, folder) = (settings.allow_live, settings.cache_path.clone());
    let (policy, choice) = (settings.policy()?, settings.choice()?);
    let opening = tokio::task::spawn_blocking({
        let still = still.clone();
        move || open(&specs, &still, allow_live, &choice, policy, &folder)
    });
    // A disk that hangs must not keep a user who wants to go.
    let opened =
        context.stop.run_until_cancelled(opening).await.ok_or_else(Failure::interrupted)?;
    let disks = opened.map_err(Failure::failed)??;
    if dry {
        return dry_run(disks, &still.possible, settings.threads(), context).await;
    }
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

/// Reads all disks, and sends nothing.
async fn dry_run(
    disks: Vec<Disk>,
    live: &[PathBuf],
    threads: usize,
    context: &Context,
) -> Result<Outcome, Failure> {
    let stop = context.stop.clone();
    let reading = tokio::task::spawn_blocking(move || {
        let forecast =
            |disk: &Disk| Ok((disk.source.disk_id().clone(), forecast(disk, threads, &stop)?));
        disks.iter().map(forecast).collect::<Result<Vec<_>, DryRunError>>()
    });
    let forecasts = reading.await.map_err(Failure::failed)??;
    let mut text = "dry run: nothing was sent\n".to_owned();
    for path in live {
        let path = path.display();
        let _ = writeln!(text, "  {path}: read as it changes; a backup makes a snapshot of it");
    }
    for (disk, forecast) in &forecasts {
        let (read, changed) = (amount(forecast.read_bytes), amount(forecast.changed_bytes));
        let _ = writeln!(text, "  {disk}: {read} read, {changed} changed");
        reading_text(&mut text, &forecast.reading);
        if let Some(reason) = &forecast.reading.distrust
            && forecast.reading.heard.is_empty()
        {
            let _ = writeln!(text, "    full compare: {reason}");
        }
        if let Some(bytes) = forecast.first_bytes {
            let _ = writeln!(text, "    first backup: {} to send", amount(bytes));
        }
        for (server, bytes) in &forecast.servers {
            let _ = writeln!(text, "    to {server}: up to {}", amount(*bytes));
        }
    }
    let json = |(disk, forecast): &(DiskId, Forecast)| {
        let servers = forecast.servers.iter();
        let servers = servers.map(|(server, bytes)| json!({ "server": server, "bytes": bytes }));
        json!({
            "disk_id": disk,
            "read_bytes": forecast.read_bytes,
            "changed_bytes": forecast.changed_bytes,
            "first_bytes": forecast.first_bytes,
            "servers": servers.collect::<Vec<_>>(),
            "reading": reading_json(&forecast.reading),
        })
    };
    let json = json!({ "ok": true, "dry_run": true, "disks": forecasts.iter().map(json).collect::<Vec<_>>() });
    Ok(Outcome { json, text })
}

fn open(
    specs: &[DiskSpec],
    still: &Stillness,
    allow_live: bool,
    choice: &Choice,
    policy: Policy,
    folder: &Path,
) -> Result<Vec<Disk>, Failure> {
    let may_live = |spec: &DiskSpec| allow_live || still.possible.contains(&spec.path);
    let sources = Source::open_all(specs, &still.snapshots, may_live)?;
    let mut disks = Vec::with_capacity(sources.len());
    for mut source in sources {
        if let Some(bitmap) = &still.bitmap {
            source.bitmap_begun(bitmap);
        }
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

fn reading_json(reading: &Reading) -> Value {
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

fn reading_text(text: &mut String, reading: &Reading) {
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
