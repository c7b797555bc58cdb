//! `janus-client backup --dry-run`.

use std::{fmt::Write, sync::Arc};

use janus_proto::{
    ids::{DiskId, MachineKey},
    show::amount,
    tls::Identity,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    Failure, Outcome,
    backup::{reading_json, reading_text},
    opening::{Stillness, lock, open_all},
    whose,
};
use crate::{
    backup::Disk,
    config::{Encryption, Settings},
    dry_run::{DryRunError, Forecast, Lacking, Part, forecast},
};

/// Reads all disks, and sends nothing. Needs no server, and a certificate only where backups are sealed.
///
/// # Errors
/// As a backup that fails before it sends anything.
pub async fn dry_run(settings: &Settings, stop: &CancellationToken) -> Result<Outcome, Failure> {
    let _state = lock(settings).await?;
    let (specs, wish) = (settings.disk_specs()?, settings.snapshots()?);
    let looking = move || match wish {
        None => Ok(Stillness::default()),
        Some(_) => Stillness::of_dry_run(&specs),
    };
    let still = tokio::task::spawn_blocking(looking).await.map_err(Failure::failed)??;
    let still = Arc::new(still);
    let machine = machine(settings).await?;
    let disks = open_all(settings, machine.as_ref(), still.clone(), stop).await?;
    let (threads, stop) = (settings.threads(), stop.clone());
    let reading = tokio::task::spawn_blocking(move || {
        let forecast =
            |disk: &Disk| Ok((disk.source.disk_id().clone(), forecast(disk, threads, &stop)?));
        disks.iter().map(forecast).collect::<Result<Vec<_>, DryRunError>>()
    });
    let forecasts = reading.await.map_err(Failure::failed)??;
    let mut text = "dry run: nothing was sent\n".to_owned();
    for path in &still.possible {
        let path = path.display();
        let _ = writeln!(text, "  {path}: read as it changes; a backup makes a snapshot of it");
    }
    forecasts.iter().for_each(|(disk, forecast)| disk_text(&mut text, disk, forecast));
    let disks: Vec<_> = forecasts.iter().map(|(disk, one)| disk_json(disk, one)).collect();
    Ok(Outcome { json: json!({ "ok": true, "dry_run": true, "disks": disks }), text })
}

/// Whose disks they are, where that has to be known: what is sealed depends on it.
async fn machine(settings: &Settings) -> Result<Option<MachineKey>, Failure> {
    if settings.encryption == Encryption::None {
        return Ok(None);
    }
    let Settings { cert, key, ca, pki, .. } = settings.clone();
    let loading = tokio::task::spawn_blocking(move || Identity::load_with(cert, key, ca, &pki));
    let identity = loading.await.map_err(Failure::failed)??;
    whose(settings, &identity.principal().role)
}

fn disk_json(disk: &DiskId, forecast: &Forecast) -> Value {
    let servers = forecast.servers.iter();
    let servers = servers.map(|(server, lacking)| {
        let Lacking { bytes, unread_bytes } = lacking;
        json!({ "server": server, "bytes": bytes, "unread_bytes": unread_bytes })
    });
    json!({
        "disk_id": disk,
        "read_bytes": forecast.read_bytes,
        "changed_bytes": forecast.changed_bytes,
        "first_bytes": forecast.first_bytes,
        "servers": servers.collect::<Vec<_>>(),
        "reading": reading_json(&forecast.reading),
        "volumes": forecast.parts.iter().map(part_json).collect::<Vec<_>>(),
    })
}

fn part_json(part: &Part) -> Value {
    json!({
        "number": part.volume.as_ref().map(|volume| volume.number),
        "name": name(part),
        "file_system": part.volume.as_ref().and_then(|volume| volume.file_system),
        "size_bytes": part.size_bytes,
        "read_bytes": part.read_bytes,
        "changed_bytes": part.changed_bytes,
        "why": part.why,
    })
}

/// As the volume calls itself.
fn name(part: &Part) -> &str {
    match &part.volume {
        None => "table and gaps",
        Some(volume) if volume.fs_label.is_empty() => &volume.label,
        Some(volume) => &volume.fs_label,
    }
}

fn disk_text(text: &mut String, disk: &DiskId, forecast: &Forecast) {
    let (read, changed) = (amount(forecast.read_bytes), amount(forecast.changed_bytes));
    let _ = writeln!(text, "  {disk}: {read} read, {changed} changed");
    if forecast.parts.is_empty() {
        reading_text(text, &forecast.reading);
        if let Some(reason) = &forecast.reading.distrust
            && forecast.reading.heard.is_empty()
        {
            let _ = writeln!(text, "    full compare: {reason}");
        }
    } else {
        let _ = writeln!(
            text,
            "    {:<24}{:>10}{:>11}{:>11}  WHY",
            "VOLUME", "SIZE", "READ", "CHANGED"
        );
    }
    forecast.parts.iter().for_each(|part| part_text(text, part));
    if let Some(bytes) = forecast.first_bytes {
        let _ = writeln!(text, "    first backup: {} to send", amount(bytes));
    }
    for (server, lacking) in &forecast.servers {
        let _ = write!(text, "    to {server}: up to {}", amount(lacking.bytes));
        if lacking.unread_bytes > 0 {
            let more = amount(lacking.unread_bytes);
            let _ = write!(text, ", up to {more} of it read again, since this server lacks it");
        }
        text.push('\n');
    }
}

fn part_text(text: &mut String, part: &Part) {
    let volume = part.volume.as_ref();
    let number = match volume.map(|volume| volume.number) {
        None => String::new(),
        Some(0) => "all".into(),
        Some(number) => number.to_string(),
    };
    let kind = volume.and_then(|one| one.file_system).map(|kind| kind.to_string());
    let words = [number, kind.unwrap_or_default(), name(part).to_owned()];
    let words: Vec<_> = words.into_iter().filter(|word| !word.is_empty()).collect();
    let sizes = [part.size_bytes, part.read_bytes, part.changed_bytes].map(amount);
    let [size, read, changed] = sizes;
    let (words, why) = (words.join(" "), part.why.join("; "));
    let _ = writeln!(text, "    {words:<23} {size:>10} {read:>10} {changed:>10}  {why}");
}
