//! `janus-client backup --to-folder DIR`.

use std::{fmt::Write, path::PathBuf, sync::Arc};

use janus_proto::{ids::MachineKey, show::amount};
use serde_json::json;

use super::{
    Context, Failure, Outcome,
    backup::{reading_json, reading_text, say_sealed, sealed_by},
    opening::{Stillness, open_all},
};
use crate::{
    progress::{self, Doing, Progress},
    to_folder::{FolderDisk, FolderJob, FolderReport},
};

/// Opens the disks and writes them to the folder. Needs no server.
pub(super) async fn write(
    folder: PathBuf,
    machine: MachineKey,
    taken_ms: i64,
    still: Arc<Stillness>,
    context: &Context,
) -> Result<Outcome, Failure> {
    let settings = &context.settings;
    let disks = open_all(settings, Some(&machine), still, &context.stop).await?;
    let sealed_by = sealed_by(&disks);
    let progress = Progress::new(disks.iter().map(|disk| disk.source.size_bytes()).sum());
    let display = progress::show(Doing::Backup, &progress, context.events);
    let (threads, stop) = (settings.threads(), context.stop.clone());
    let job = FolderJob { machine, taken_ms, threads, progress, stop };
    let to = folder.clone();
    let writing = tokio::task::spawn_blocking(move || job.write(&disks, &to));
    let report = writing.await.map_err(Failure::failed)??;
    drop(display);
    let folder = folder.display().to_string();
    let (json, text) = (report_json(&report, &folder), report_text(&report, &folder));
    Ok(say_sealed(Outcome { json, text }, sealed_by))
}

fn report_json(report: &FolderReport, folder: &str) -> serde_json::Value {
    let disk = |disk: &FolderDisk| {
        let entry = &disk.entry;
        json!({
            "disk_id": entry.disk,
            "size_bytes": entry.size_bytes,
            "read_bytes": disk.read_bytes,
            "data_bytes": entry.data_bytes,
            "reading": reading_json(&disk.reading),
            "image": entry.image,
            "image_length_bytes": entry.image_bytes,
            "table_digest": entry.table_digest,
        })
    };
    json!({
        "ok": true,
        "backup_id": report.backup_id,
        "folder": folder,
        "seconds": report.seconds,
        "disks": report.disks.iter().map(disk).collect::<Vec<_>>(),
    })
}

fn report_text(report: &FolderReport, folder: &str) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "backup {} in {folder} in {:.1} s; on the server: janus-server import DIR",
        report.backup_id, report.seconds
    );
    for disk in &report.disks {
        let entry = &disk.entry;
        let _ = writeln!(
            text,
            "  {}: {}, {} read, image {} ({})",
            entry.disk,
            amount(entry.size_bytes),
            amount(disk.read_bytes),
            entry.image,
            amount(entry.image_bytes),
        );
        reading_text(&mut text, &disk.reading);
    }
    text
}
