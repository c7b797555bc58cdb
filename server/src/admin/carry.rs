//! `janus-server export` and `import`: runs that are carried by hand. Paths are those of the server's machine.

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
    time::{Duration, Instant, UNIX_EPOCH},
};

use clap::{Args, ValueEnum};
use janus_proto::{
    archive::Place,
    carried::Manifest,
    ids::{BackupId, DiskId, MachineKey, ServerId},
    pb::Consistency,
    show::{amount, date},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Admin, AdminError, Answer, Task, trash::Target};
use crate::{
    archive::{self, Archive},
    carry::{self, CarryError, Imported, NewDisk, NewRun},
    chain::Run,
    config::Archive as Rule,
    runs::now_ms,
};

/// How often it is told how far it is.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// What to export, and where to.
#[derive(Debug, Clone, PartialEq, Eq, Args, Serialize, Deserialize)]
pub struct ExportArguments {
    /// The run of a snapshot, or a machine's newest one
    #[arg(value_name = "SNAPSHOT|USER/MACHINE")]
    target: Target,
    /// An empty folder, or one that is not there yet
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    to: PathBuf,
}

/// What to import.
#[derive(Debug, Clone, PartialEq, Eq, Args, Serialize, Deserialize)]
pub struct ImportArguments {
    /// A folder that `janus-server export` or `janus-client backup --to-folder` wrote
    #[arg(value_name = "DIR", value_parser = absolute, required_unless_present_any = ["vhdx", "raw", "from_archive"],
        conflicts_with_all = ["vhdx", "raw", "from_archive", "disk", "consistency", "sector_bytes"])]
    folder: Option<PathBuf>,
    /// A VHD or VHDX of another program; its parents lie beside it
    #[arg(long, value_name = "FILE", value_parser = absolute, requires_all = ["machine", "disk"],
        conflicts_with_all = ["raw", "sector_bytes"])]
    vhdx: Option<PathBuf>,
    /// A disk as plain bytes
    #[arg(long, value_name = "FILE", value_parser = absolute, requires_all = ["machine", "disk"])]
    raw: Option<PathBuf>,
    /// The newest run of a machine in an archive: a section [archive.NAME] of the settings, or a URL as s3://BUCKET/PREFIX
    #[arg(long, value_name = "NAME|URL", requires = "machine",
        conflicts_with_all = ["vhdx", "raw", "consistency", "sector_bytes"])]
    from_archive: Option<String>,
    /// Not the newest run of the archive but this one, as `archive list` shows it
    #[arg(long, value_name = "ID", requires = "from_archive")]
    run: Option<BackupId>,
    /// Only what this server archived
    #[arg(long, value_name = "SERVER", requires = "from_archive")]
    of: Option<ServerId>,
    /// Whose backup it becomes; a folder says it itself
    #[arg(long, value_name = "USER/MACHINE")]
    machine: Option<MachineKey>,
    /// Which of the machine's disks an image becomes
    #[arg(long)]
    disk: Option<DiskId>,
    /// How the disk was held still when the image was made
    #[arg(long, value_enum, default_value_t = Stillness::Crash)]
    consistency: Stillness,
    /// Logical sectors of a raw disk: 512 or 4096
    #[arg(long, value_name = "BYTES", default_value_t = 512, value_parser = sector_bytes)]
    sector_bytes: u32,
}

/// How a source was held still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Stillness {
    /// Its file systems were quiet: shut down, unmounted, or frozen
    Frozen,
    /// One point in time, as after a power cut
    Crash,
    /// Copied while it was written to
    Smeared,
}

impl Stillness {
    fn consistency(self) -> Consistency {
        match self {
            Self::Frozen => Consistency::Frozen,
            Self::Crash => Consistency::Crash,
            Self::Smeared => Consistency::Smeared,
        }
    }
}

/// The server that does the command may have another working folder.
fn absolute(text: &str) -> Result<PathBuf, String> {
    std::path::absolute(text).map_err(|error| error.to_string())
}

fn sector_bytes(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("sectors have 512 or 4096 bytes".into()),
    }
}

pub(super) fn export(
    admin: &Admin,
    arguments: &ExportArguments,
    task: &Task<'_>,
) -> Result<Answer, AdminError> {
    let held = match &arguments.target {
        Target::Snapshot(snapshot) => admin.runs().snapshot(*snapshot),
        Target::Machine(key) => {
            let machines = admin.machines(Some(key))?;
            machines.first().and_then(|machine| machine.snapshots().into_iter().next())
        }
    };
    let held = held.ok_or_else(|| match &arguments.target {
        Target::Snapshot(snapshot) => AdminError::UnknownSnapshot { snapshot: *snapshot },
        Target::Machine(machine) => AdminError::UnknownMachine { machine: machine.clone() },
    })?;
    let run = &held.run;
    let began = Instant::now();
    let progress = Progress::new("exported", task);
    let manifest =
        carry::export(admin.runs(), run, &arguments.to, &|done, all| progress.hear(done, all))?;
    let folder = arguments.to.display();
    let bytes: u64 = manifest.disks.iter().map(|disk| disk.image_bytes + disk.table_bytes).sum();
    let text = format!(
        "{}: the run of {}, {}, is in {folder} ({} in {:.1} s); on the other server: `janus-server import DIR`\n",
        run.machine,
        date(run.committed_ms),
        disks(manifest.disks.len()),
        amount(bytes),
        began.elapsed().as_secs_f64(),
    );
    let disks: Vec<Value> = manifest
        .disks
        .iter()
        .map(|disk| {
            json!({
                "disk_id": disk.disk,
                "size_bytes": disk.size_bytes,
                "image": disk.image,
                "image_bytes": disk.image_bytes,
                "table_digest": disk.table_digest,
            })
        })
        .collect();
    Ok(Answer::new(
        text,
        json!({
            "machine": run.machine,
            "backup_id": manifest.run,
            "committed_ms": manifest.committed_ms,
            "folder": arguments.to,
            "bytes": bytes,
            "disks": disks,
        }),
    ))
}

pub(super) fn import(
    admin: &Admin,
    arguments: &ImportArguments,
    task: &Task<'_>,
) -> Result<Answer, AdminError> {
    let archive = arguments.from_archive.as_ref();
    let archive = archive.map(|from| open_archive(admin, from, task)).transpose()?;
    let new =
        match (&arguments.folder, arguments.vhdx.as_ref().or(arguments.raw.as_ref()), &archive) {
            (Some(folder), ..) => carried(admin, folder, arguments.machine.as_ref())?,
            (None, Some(path), _) => image(admin, path, arguments)?,
            (None, None, Some(archive)) => archived(archive, arguments)?,
            // Clap sees to it that one of them is there.
            (None, None, None) => return Err(AdminError::Cancelled),
        };
    let began = Instant::now();
    let progress = Progress::new("compared and taken in", task);
    let imported = carry::import(admin.runs(), &new, &|done, all| progress.hear(done, all))?;
    let run = &imported.run;
    let what = what_came(&imported, &format!(" in {:.1} s", began.elapsed().as_secs_f64()));
    let (when, count) = (date(run.committed_ms), disks(run.snapshots.len()));
    let mut text = format!("{}: the run of {when}, {count}, {what}\n", run.machine);
    for snapshot in &run.snapshots {
        text.push_str(&format!(
            "  {}  {}  {}\n",
            snapshot.id,
            snapshot.disk,
            kind(snapshot.parent)
        ));
    }
    Ok(Answer::new(
        text,
        json!({
            "machine": run.machine,
            "backup_id": run.backup,
            "committed_ms": run.committed_ms,
            "was_here": imported.was_here,
            "went_on": imported.went_on,
            "written_bytes": imported.written_bytes,
            "disks": listed(run),
        }),
    ))
}

/// What came of an import, and what it `took`, in words.
pub(super) fn what_came(imported: &Imported, took: &str) -> String {
    let after = if imported.went_on { ", after what was here of it" } else { "" };
    match imported.was_here {
        true => "is here already".into(),
        false => {
            let promised = match imported.promised_bytes {
                0 => String::new(),
                bytes => format!(", {} to come (`janus-server seed status`)", amount(bytes)),
            };
            let written = amount(imported.written_bytes);
            format!("is here: {written} of data written{took}{after}{promised}")
        }
    }
}

fn kind(parent: Option<janus_proto::ids::SnapshotId>) -> &'static str {
    if parent.is_none() { "full" } else { "delta" }
}

fn listed(run: &Run) -> Vec<Value> {
    let disk = |snapshot: &crate::chain::Snapshot| {
        json!({
            "disk_id": snapshot.disk,
            "snapshot_id": snapshot.id,
            "kind": kind(snapshot.parent),
            "size_bytes": snapshot.size_bytes,
            "image": snapshot.image,
            "table_digest": snapshot.table_digest,
        })
    };
    run.snapshots.iter().map(disk).collect()
}

fn disks(count: usize) -> String {
    if count == 1 { "1 disk".into() } else { format!("{count} disks") }
}

/// Opens what is in a folder, for the machine that it names if no other is named.
fn carried(
    admin: &Admin,
    folder: &Path,
    machine: Option<&MachineKey>,
) -> Result<NewRun, CarryError> {
    let storage = admin.runs().store().storage();
    let new = NewRun::carried(storage, folder, &Manifest::read(storage, folder)?)?;
    Ok(NewRun { machine: machine.cloned().unwrap_or(new.machine), ..new })
}

/// The archive of that name, or at that URL with all else from the environment.
fn open_archive(admin: &Admin, from: &str, task: &Task<'_>) -> Result<Archive, AdminError> {
    let own = admin.server()?;
    if from.contains("://") {
        return Ok(Archive::at(&Place::new(from), &Rule::default(), &own, task.token())?);
    }
    Ok(Archive::open(from, super::archive::rule(admin, from)?, &own, task.token())?)
}

/// Opens a run of an archive.
fn archived(archive: &Archive, arguments: &ImportArguments) -> Result<NewRun, AdminError> {
    // Clap sees to it that it is there.
    let machine = arguments.machine.as_ref().ok_or(AdminError::Cancelled)?;
    let manifest = archive::choose(archive, arguments.of.as_ref(), machine, arguments.run)?;
    Ok(archive::open_run(archive, &manifest, arguments.disk.as_ref())?)
}

/// Opens an image of another program, or a raw one.
fn image(admin: &Admin, path: &Path, arguments: &ImportArguments) -> Result<NewRun, AdminError> {
    let storage = admin.runs().store().storage();
    let (content, size_bytes, logical_sector_bytes) = match arguments.raw {
        Some(_) => {
            let (content, size_bytes) = carry::raw(storage, path)?;
            (content, size_bytes, arguments.sector_bytes)
        }
        None => carry::foreign(storage, path)?,
    };
    // Clap sees to it that both are there.
    let (Some(machine), Some(disk)) = (&arguments.machine, &arguments.disk) else {
        return Err(AdminError::Cancelled);
    };
    let failed = |source| CarryError::Io { path: path.to_owned(), source };
    let modified = storage.metadata(path).map_err(failed)?.map(|there| there.modified);
    let modified = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let modified_ms = modified.and_then(|since| i64::try_from(since.as_millis()).ok());
    let consistency = arguments.consistency.consistency().into();
    let disk = NewDisk {
        disk: disk.clone(),
        size_bytes,
        logical_sector_bytes,
        consistency,
        skipped_bytes: 0,
        data_bytes: content.occupied_bytes(),
        content,
    };
    let taken_ms = modified_ms.unwrap_or_else(now_ms);
    Ok(NewRun {
        machine: machine.clone(),
        run: None,
        taken_ms,
        seal: Vec::new(),
        from: None,
        stubs: false,
        disks: vec![disk],
    })
}

/// Tells once a second how far it is.
pub(super) struct Progress<'a, 'b> {
    doing: &'a str,
    task: &'a Task<'b>,
    began: Instant,
    told: RefCell<Instant>,
}

impl<'a, 'b> Progress<'a, 'b> {
    pub(super) fn new(doing: &'a str, task: &'a Task<'b>) -> Self {
        Self { doing, task, began: Instant::now(), told: RefCell::new(Instant::now()) }
    }

    /// True while somebody waits for it.
    pub(super) fn hear(&self, done: u64, all: u64) -> bool {
        let mut told = self.told.borrow_mut();
        if told.elapsed() >= TELL_EVERY {
            *told = Instant::now();
            let seconds = self.began.elapsed().as_secs_f64().max(0.001);
            let speed = done as f64 / seconds;
            let left = (all.saturating_sub(done) as f64 / speed.max(1.0)) as u64;
            self.task.tell(format!(
                "{} of {} {}, {}/s, {} left",
                amount(done),
                amount(all),
                self.doing,
                amount(speed as u64),
                duration(left)
            ));
        }
        !self.task.is_cancelled()
    }
}

/// Seconds as people read them.
fn duration(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_reads_as_people_say_it() {
        assert_eq!(
            [0, 119, 120, 7199, 36_000].map(duration),
            ["0 s", "119 s", "2 min", "119 min", "10 h 0 min"]
        );
    }
}
