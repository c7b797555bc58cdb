//! `janus-client sources`.

use std::fmt::Write;

use janus_proto::show::amount;
use serde_json::{Value, json};

use super::{Failure, Outcome};
use crate::{
    config::Settings,
    sources::{self, DiskFound, Mount, Stillness, VolumeFound},
};

/// Lists what could be backed up. Needs neither a server nor a certificate.
///
/// # Errors
/// When the settings name a disk that can't be understood.
pub fn sources(settings: &Settings) -> Result<Outcome, Failure> {
    let specs = if settings.disks.is_empty() { Vec::new() } else { settings.disk_specs()? };
    let disks = sources::find(&specs);
    let json = json!({ "ok": true, "disks": disks.iter().map(disk_json).collect::<Vec<_>>() });
    Ok(Outcome { json, text: text(&disks) })
}

fn mount_json(mount: Option<&Mount>) -> Value {
    mount.map_or(Value::Null, |m| json!({ "path": m.path, "writable": m.is_writable }))
}

fn disk_json(disk: &DiskFound) -> Value {
    let layout = disk.layout.as_ref();
    let volumes = layout.map(|(_, volumes)| volumes.iter().map(volume_json).collect::<Vec<_>>());
    json!({
        "path": disk.path.to_string_lossy(),
        "disk_id": disk.disk_id,
        "configured": disk.is_configured,
        "size_bytes": disk.size_bytes,
        "mount": mount_json(disk.mount.as_ref()),
        "frozen": disk.stillness,
        "table": layout.ok().map(|(table, _)| table),
        "error": layout.err(),
        "journal": disk.journal,
        "setting": disk.setting(),
        "volumes": volumes.unwrap_or_default(),
    })
}

fn volume_json(found: &VolumeFound) -> Value {
    let volume = &found.volume;
    json!({
        "number": volume.number,
        "start": volume.start,
        "size_bytes": volume.len,
        "type": volume.type_name,
        "guid": volume.guid,
        "label": volume.label,
        "file_system": volume.file_system,
        "fs_uuid": volume.fs_uuid,
        "fs_label": volume.fs_label,
        "mount": mount_json(found.mount.as_ref()),
        "journal": found.journal,
    })
}

/// At most 100 columns, unless names are long.
fn text(disks: &[DiskFound]) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{:<24}{:>10}  {:<26}{:<22}STILL BY",
        "DISK, VOLUME", "SIZE", "HOLDS", "MOUNTED"
    );
    for disk in disks {
        disk_text(&mut text, disk);
    }
    if disks.is_empty() {
        text.push_str("no disks\n");
    }
    text
}

fn disk_text(text: &mut String, disk: &DiskFound) {
    let (table, volumes) = match &disk.layout {
        Ok((table, volumes)) => (table.to_string(), volumes.as_slice()),
        Err(_) => ("?".into(), [].as_slice()),
    };
    let (path, size) = (disk.path.to_string_lossy(), amount(disk.size_bytes));
    let stillness = disk.stillness.map_or("?", Stillness::as_str);
    let mount = if volumes.is_empty() { mounted(disk.mount.as_ref()) } else { String::new() };
    let journal = disk.journal.map(|journal| format!(", {journal}")).unwrap_or_default();
    let _ = writeln!(text, "{path:<23} {size:>10}  {table:<26}{mount:<22}{stillness}{journal}");
    if let Err(error) = &disk.layout {
        let _ = writeln!(text, "  {error}");
    }
    for found in volumes {
        let volume = &found.volume;
        let kind =
            volume.file_system.map_or_else(|| volume.type_name.clone(), |kind| kind.to_string());
        let label = if volume.fs_label.is_empty() { &volume.label } else { &volume.fs_label };
        let holds = [kind.as_str(), label.as_str()].join(" ");
        let name = if volume.number == 0 { "all".into() } else { volume.number.to_string() };
        let (size, mount) = (amount(volume.len), mounted(found.mount.as_ref()));
        let journal = found.journal.map(|journal| journal.to_string()).unwrap_or_default();
        let line = format!("  {name:<22}{size:>10}  {holds:<26}{mount:<22}{journal}");
        let _ = writeln!(text, "{}", line.trim_end());
    }
    let _ =
        writeln!(text, "  {}{}", disk.setting(), if disk.is_configured { "  (set)" } else { "" });
}

fn mounted(mount: Option<&Mount>) -> String {
    match mount {
        None => String::new(),
        Some(Mount { path, is_writable: true }) => path.clone(),
        Some(Mount { path, is_writable: false }) => format!("{path} (ro)"),
    }
}
