//! `janus-server archive`: copies of runs in the object stores and folders of the settings.

use std::time::Instant;

use clap::{Args, Subcommand};
use janus_proto::{
    archive::Manifest,
    grants::Which,
    ids::{BackupId, MachineKey, ServerId, check_name},
    show::{amount, date},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Admin, AdminError, Answer, Task, carry::Progress, table::table};
use crate::{
    archive::{Alone, Archive, Event, Wish},
    carry::CarryError,
    config::Archive as Rule,
};

/// What to archive, and where.
#[derive(Debug, Clone, PartialEq, Eq, Args, Serialize, Deserialize)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Arguments {
    #[command(subcommand)]
    action: Option<Action>,
    /// Which archive: a section [archive.NAME] of the settings
    #[arg(required = true, value_parser = name)]
    name: Option<String>,
    /// One machine, or one of its disks; else those of the section
    #[arg(value_name = "USER/MACHINE[/DISK]")]
    target: Option<Which>,
    /// Every backup that is newer than what is there, not only the newest of each disk
    #[arg(long)]
    all_runs: bool,
    /// Send the newest backup anew, as bases that need nothing that is there: after `verify` found damage
    #[arg(long)]
    full: bool,
}

/// What else can be done.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Action {
    /// Show which backups are there
    List(There),
    /// Read all that is there and compare it with its sums and hashes
    Verify(There),
    /// Remove one backup from it, and the objects that no other needs
    Remove {
        /// Which archive: a section [archive.NAME] of the settings
        #[arg(value_parser = name)]
        name: String,
        /// Its machine
        #[arg(value_name = "USER/MACHINE")]
        machine: MachineKey,
        /// The backup, as `list` names its run
        #[arg(value_name = "RUN")]
        run: BackupId,
    },
}

/// What of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Args, Serialize, Deserialize)]
struct There {
    /// Which archive: a section [archive.NAME] of the settings
    #[arg(value_parser = name)]
    name: String,
    /// One machine, or one of its disks
    #[arg(value_name = "USER/MACHINE[/DISK]")]
    target: Option<Which>,
    /// What this server archived; else what any did
    #[arg(long)]
    own: bool,
}

fn name(text: &str) -> Result<String, String> {
    check_name("archive", text).map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

/// The section of that name.
pub(super) fn rule<'a>(admin: &'a Admin, name: &str) -> Result<&'a Rule, AdminError> {
    let known = &admin.settings().archive;
    known.get(name).ok_or_else(|| AdminError::UnknownArchive {
        name: name.to_owned(),
        known: match known.is_empty() {
            true => "there are none".into(),
            false => format!("there are {}", known.keys().cloned().collect::<Vec<_>>().join(", ")),
        },
    })
}

pub(super) fn run(
    admin: &Admin,
    arguments: &Arguments,
    task: &Task<'_>,
) -> Result<Answer, AdminError> {
    match (&arguments.action, &arguments.name) {
        (Some(Action::List(there)), _) => list(admin, there, task),
        (Some(Action::Verify(there)), _) => verify(admin, there, task),
        (Some(Action::Remove { name, machine, run }), _) => {
            remove(admin, name, (machine, *run), task)
        }
        (None, Some(name)) => archive(admin, name, arguments, task),
        // Clap sees to it that one of them is there.
        (None, None) => Err(AdminError::Cancelled),
    }
}

/// An archive that nobody else writes, verifies or removes from.
fn alone(admin: &Admin, name: &str, task: &Task<'_>) -> Result<(Alone, Archive), AdminError> {
    let busy = || AdminError::ArchiveBusy { name: name.to_owned() };
    let rule = rule(admin, name)?;
    let alone = Alone::with(rule).ok_or_else(busy)?;
    Ok((alone, Archive::open(name, rule, &admin.server()?, task.token())?))
}

fn archive(
    admin: &Admin,
    name: &str,
    arguments: &Arguments,
    task: &Task<'_>,
) -> Result<Answer, AdminError> {
    let rule = rule(admin, name)?;
    let (_alone, archive) = alone(admin, name, task)?;
    let began = Instant::now();
    let chosen = match &arguments.target {
        Some(target) => vec![target.clone()],
        None => rule.which().unwrap_or_default(),
    };
    let wish = Wish { all_runs: arguments.all_runs, full: arguments.full };
    let (mut told, mut count) = (Told::default(), 0);
    for machine in admin.runs().machines() {
        for which in chosen.iter().filter(|which| which.takes(&machine.key)) {
            task.check()?;
            count += 1;
            let doing = format!("of {} archived", machine.key);
            let progress = Progress::new(&doing, task);
            let hear =
                |done, all| if all == 0 { !task.is_cancelled() } else { progress.hear(done, all) };
            let mut tell = |event: Event<'_>| told.event(&machine.key, &event);
            let done = archive.archive(admin.runs(), &machine.key, which, wish, &hear, &mut tell);
            match done {
                Ok(()) => {}
                Err(CarryError::Stopped) => return Err(AdminError::Cancelled),
                // The others can be archived all the same.
                Err(error) => told.failed(&machine.key, &error),
            }
        }
    }
    if let (0, Some(Which::Machine(machine, _))) = (count, &arguments.target) {
        return Err(AdminError::UnknownMachine { machine: machine.clone() });
    }
    if let Some(Which::Machine(machine, disk)) = &arguments.target
        && told.runs.is_empty()
        && told.failed == 0
    {
        let machine = machine.clone();
        return Err(match disk.clone() {
            Some(disk) => AdminError::UnknownDisk { machine, disk },
            None => AdminError::UnknownMachine { machine },
        });
    }
    let Told { mut text, runs, failed } = told;
    let (sent, seconds) = (archive.sent_bytes(), began.elapsed().as_secs_f64());
    text.push_str(&format!("{} sent to {} in {seconds:.1} s\n", amount(sent), rule.url));
    let json = json!({
        "archive": name,
        "sent_bytes": sent,
        "seconds": seconds,
        "failed": failed,
        "runs": runs,
    });
    Ok(Answer { is_bad: failed > 0, ..Answer::new(text, json) })
}

fn list(admin: &Admin, there: &There, task: &Task<'_>) -> Result<Answer, AdminError> {
    let own = admin.server()?;
    let archive = Archive::open(&there.name, rule(admin, &there.name)?, &own, task.token())?;
    let head = ["time", "machine", "server", "run", "disk", "size", "images", "stored"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let (mut listed, mut wrong) = (Vec::new(), Vec::new());
    for (server, machine) in machines(&archive, there, &own)? {
        for run in archive.runs(&server, &machine)? {
            let manifest = match run.manifest {
                Ok(manifest) => manifest,
                Err(error) => {
                    wrong.push(error.to_string());
                    continue;
                }
            };
            for entry in manifest.disks.iter().filter(|entry| takes_disk(there, &entry.disk)) {
                rows.push(vec![
                    date(manifest.committed_ms),
                    machine.to_string(),
                    server.to_string(),
                    manifest.run.to_string(),
                    entry.disk.to_string(),
                    amount(entry.size_bytes),
                    entry.links.len().to_string(),
                    amount(entry.stored_bytes()),
                ]);
            }
            listed.push(manifest_json(&manifest));
        }
    }
    let mut text = match listed.is_empty() {
        true => "nothing is there\n".to_owned(),
        false => table(&rows),
    };
    wrong.iter().for_each(|wrong| text.push_str(&format!("DAMAGED: {wrong}\n")));
    let json = json!({ "archive": there.name, "runs": listed, "wrong": wrong });
    Ok(Answer { is_bad: !wrong.is_empty(), ..Answer::new(text, json) })
}

fn remove(
    admin: &Admin,
    name: &str,
    (machine, run): (&MachineKey, BackupId),
    task: &Task<'_>,
) -> Result<Answer, AdminError> {
    let (_alone, archive) = alone(admin, name, task)?;
    if archive.remove(machine, run)? == 0 {
        let (archive, machine) = (name.to_owned(), machine.clone());
        return Err(AdminError::NotArchived { archive, machine, run });
    }
    let text = format!("backup {run} of {machine} removed from archive {name}\n");
    Ok(Answer::new(text, json!({ "archive": name, "machine": machine, "removed": run })))
}

fn verify(admin: &Admin, there: &There, task: &Task<'_>) -> Result<Answer, AdminError> {
    // What is removed meanwhile would count as missing.
    let (_alone, archive) = alone(admin, &there.name, task)?;
    let own = admin.server()?;
    let began = Instant::now();
    let (mut runs, mut images, mut wrong, mut text) = (0, 0, Vec::new(), String::new());
    let only = there.target.as_ref().and_then(Which::alone);
    for (server, machine) in machines(&archive, there, &own)? {
        task.check()?;
        let doing = format!("of {machine} read and compared");
        let progress = Progress::new(&doing, task);
        let verified =
            archive.verify(&server, &machine, only, &|done, all| progress.hear(done, all))?;
        (runs, images) = (runs + verified.runs, images + verified.images);
        for error in verified.wrong {
            text.push_str(&format!("DAMAGED: {machine} of {server}: {error}\n"));
            wrong.push(error.to_string());
        }
    }
    if !wrong.is_empty() {
        let name = &there.name;
        text.push_str(&format!(
            "`janus-server archive {name} --full USER/MACHINE[/DISK]` sends the newest backup of a disk anew; `janus-server archive remove {name} USER/MACHINE RUN` removes an older one that is damaged\n"
        ));
    }
    let (read, seconds) = (archive.received_bytes(), began.elapsed().as_secs_f64());
    text.push_str(&format!(
        "{runs} backups with {images} images read, {} in {seconds:.1} s: {}\n",
        amount(read),
        if wrong.is_empty() {
            "all is as it was written".into()
        } else {
            format!("{} things are wrong", wrong.len())
        },
    ));
    let json = json!({
        "archive": there.name,
        "runs": runs,
        "images": images,
        "read_bytes": read,
        "seconds": seconds,
        "wrong": wrong,
    });
    Ok(Answer { is_bad: !wrong.is_empty(), ..Answer::new(text, json) })
}

/// The machines that are meant of those in an archive.
fn machines(
    archive: &Archive,
    there: &There,
    own: &ServerId,
) -> Result<Vec<(ServerId, MachineKey)>, AdminError> {
    let all = archive.machines(there.own.then_some(own), None)?;
    let is_meant =
        |machine: &MachineKey| there.target.as_ref().is_none_or(|which| which.takes(machine));
    Ok(all.into_iter().filter(|(_, machine)| is_meant(machine)).collect())
}

fn takes_disk(there: &There, disk: &janus_proto::ids::DiskId) -> bool {
    there.target.as_ref().is_none_or(|which| which.takes_disk(disk))
}

fn manifest_json(manifest: &Manifest) -> Value {
    let disk = |entry: &janus_proto::archive::DiskEntry| {
        json!({
            "disk_id": entry.disk,
            "snapshot_id": entry.snapshot(),
            "size_bytes": entry.size_bytes,
            "images": entry.links.len(),
            "stored_bytes": entry.stored_bytes(),
            "table_digest": entry.table_digest,
        })
    };
    json!({
        "server": manifest.server,
        "machine": manifest.machine,
        "backup_id": manifest.run,
        "committed_ms": manifest.committed_ms,
        "disks": manifest.disks.iter().map(disk).collect::<Vec<_>>(),
    })
}

/// What is said of all machines.
#[derive(Default)]
struct Told {
    text: String,
    runs: Vec<Value>,
    failed: usize,
}

impl Told {
    fn event(&mut self, machine: &MachineKey, event: &Event<'_>) {
        match event {
            Event::Here(manifest) => {
                let when = date(manifest.committed_ms);
                self.text.push_str(&format!("{machine}: the backup of {when} is there already\n"));
                self.runs.push(json!({
                    "machine": machine,
                    "backup_id": manifest.run,
                    "committed_ms": manifest.committed_ms,
                    "was_there": true,
                }));
            }
            Event::Archived(manifest, sent) => {
                let when = date(manifest.committed_ms);
                let disk = |sent: &crate::archive::Sent| {
                    let kind = if sent.is_base { "full" } else { "delta" };
                    format!("{} {kind}, {}", sent.disk, amount(sent.differing_bytes))
                };
                let disks: Vec<_> = sent.iter().map(disk).collect();
                self.text
                    .push_str(&format!("{machine}: the backup of {when}: {}\n", disks.join("; ")));
                let disk = |sent: &crate::archive::Sent| {
                    json!({
                        "disk_id": sent.disk,
                        "kind": if sent.is_base { "full" } else { "delta" },
                        "differing_bytes": sent.differing_bytes,
                        "kept_bytes": sent.kept_bytes,
                    })
                };
                self.runs.push(json!({
                    "machine": machine,
                    "backup_id": manifest.run,
                    "committed_ms": manifest.committed_ms,
                    "was_there": false,
                    "disks": sent.iter().map(disk).collect::<Vec<_>>(),
                }));
            }
            Event::Failed(run, error) => {
                let when = date(run.committed_ms);
                let again = if error.may_go_on() { "; the same command goes on" } else { "" };
                self.text.push_str(&format!(
                    "{machine}: FAILED: the backup of {when}: {error}{again}\n"
                ));
                self.runs.push(json!({ "machine": machine, "backup_id": run.backup, "error": error.to_string() }));
                self.failed += 1;
            }
            Event::Damaged(error) => {
                self.text.push_str(&format!("{machine}: DAMAGED: {error}\n"));
                self.failed += 1;
            }
            Event::Removed(count) => {
                self.text.push_str(&format!("{machine}: {count} older backups removed there\n"));
            }
        }
    }

    fn failed(&mut self, machine: &MachineKey, error: &CarryError) {
        let again = if error.may_go_on() { "; the same command goes on" } else { "" };
        self.text.push_str(&format!("{machine}: FAILED: {error}{again}\n"));
        self.runs.push(json!({ "machine": machine, "error": error.to_string() }));
        self.failed += 1;
    }
}
