//! `janus-server delete`, `pin`, `unpin` and `trash list|restore|purge`: what an administrator decides about single runs.
//!
//! All of it is about whole runs: a snapshot stands for its run with all disks.

use std::{str::FromStr, sync::Arc};

use clap::Subcommand;
use janus_proto::{
    error::WireError,
    ids::{BackupId, MachineKey, SnapshotId},
    show::date,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Admin, AdminError, Answer, Task, purges, table::table};
use crate::{
    chain::{Held, Run, TrashedRun},
    runs::{Wait, now_ms},
};

/// A snapshot or a whole machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The run of a snapshot.
    Snapshot(SnapshotId),
    /// All runs of a machine.
    Machine(MachineKey),
}

impl FromStr for Target {
    type Err = WireError;

    fn from_str(text: &str) -> Result<Self, WireError> {
        match text.contains('/') {
            true => text.parse().map(Self::Machine),
            false => text.parse().map(Self::Snapshot),
        }
    }
}

/// What to do with the trash.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrashAction {
    /// Show what can be brought back, and until when
    List,
    /// Bring the run of a snapshot back, and pin it
    Restore {
        /// One of its snapshots
        #[arg(value_name = "SNAPSHOT")]
        snapshot: SnapshotId,
    },
    /// Free the space of what is in the trash: it can't be brought back then
    Purge {
        /// Only this machine
        #[arg(value_name = "USER/MACHINE")]
        machine: Option<MachineKey>,
        /// Do what another person has asked for, where the settings want two
        #[arg(long, value_name = "NUMBER", conflicts_with_all = ["machine", "cancel"])]
        confirm: Option<u32>,
        /// Take such a request back
        #[arg(long, value_name = "NUMBER", conflicts_with = "machine")]
        cancel: Option<u32>,
    },
}

pub(super) fn delete(admin: &Admin, target: &Target) -> Result<Answer, AdminError> {
    let (machine, backups) = match target {
        Target::Snapshot(snapshot) => {
            let held = held(admin, *snapshot)?;
            (held.run.machine.clone(), vec![held.run.backup])
        }
        Target::Machine(key) => {
            let machines = admin.machines(Some(key))?;
            let snapshots = machines.iter().flat_map(|machine| machine.snapshots());
            let mut backups: Vec<BackupId> = snapshots.map(|held| held.run.backup).collect();
            backups.dedup();
            (key.clone(), backups)
        }
    };
    let snapshots: Vec<String> = admin
        .machines(Some(&machine))?
        .iter()
        .flat_map(|machine| machine.snapshots())
        .filter(|held| backups.contains(&held.run.backup))
        .map(|held| held.snapshot().id.to_string())
        .collect();
    let known = admin.runs().machine(&machine);
    let lacks_room = |backup: &BackupId| admin.retention().lacks_room(known.as_deref()?, *backup);
    let waits = backups.iter().find_map(lacks_room);
    let waits = waits.map(|wait| format!("; its space doesn't come free now: {wait}"));
    admin.retention().delete(&machine, &backups)?;
    let purge = match admin.settings().retention.purge_needs_second_operator {
        true => "asks another person to free the space now",
        false => "frees the space now",
    };
    let text = format!(
        "{machine}: {} runs with {} snapshots are in the trash; `janus-server trash restore SNAPSHOT` brings a run \
         back for {} days, `janus-server trash purge` {purge}{}\n",
        backups.len(),
        snapshots.len(),
        admin.settings().retention.trash_days,
        waits.unwrap_or_default(),
    );
    Ok(Answer::new(
        text,
        json!({ "machine": machine, "runs": backups.len(), "snapshots": snapshots }),
    ))
}

pub(super) fn pin(admin: &Admin, snapshot: SnapshotId) -> Result<Answer, AdminError> {
    let held = held(admin, snapshot)?;
    admin.retention().pin(&held)?;
    let text = format!(
        "{}: the run of {} stays until `janus-server unpin {snapshot}`\n",
        held.run.machine,
        date(held.run.committed_ms)
    );
    Ok(Answer::new(text, pin_json(&held, true)))
}

pub(super) fn unpin(admin: &Admin, snapshot: SnapshotId) -> Result<Answer, AdminError> {
    let held = held(admin, snapshot)?;
    admin.retention().unpin(&held)?;
    let text = format!(
        "{}: the run of {} has no pin, the rules decide\n",
        held.run.machine,
        date(held.run.committed_ms)
    );
    Ok(Answer::new(text, pin_json(&held, false)))
}

fn pin_json(held: &Held, is_pinned: bool) -> Value {
    let (machine, backup) = (&held.run.machine, held.run.backup.to_string());
    json!({ "machine": machine, "backup_id": backup, "pinned": is_pinned })
}

fn held(admin: &Admin, snapshot: SnapshotId) -> Result<Held, AdminError> {
    admin.runs().snapshot(snapshot).ok_or(AdminError::UnknownSnapshot { snapshot })
}

pub(super) fn trash(
    admin: &Admin,
    action: &TrashAction,
    task: &Task<'_>,
) -> Result<Answer, AdminError> {
    match action {
        TrashAction::List => list(admin),
        TrashAction::Restore { snapshot } => restore(admin, *snapshot),
        TrashAction::Purge { confirm: Some(number), .. } => confirm(admin, *number, task),
        TrashAction::Purge { cancel: Some(number), .. } => {
            purges::cancel(admin, *number)?;
            let text = format!("request {number} is taken back\n");
            Ok(Answer::new(text, json!({ "cancelled": number })))
        }
        TrashAction::Purge { machine, .. }
            if admin.settings().retention.purge_needs_second_operator =>
        {
            request(admin, machine.as_ref(), task)
        }
        TrashAction::Purge { machine, .. } => purge(admin, machine.as_ref(), true, task),
    }
}

fn list(admin: &Admin) -> Result<Answer, AdminError> {
    let head = ["MACHINE", "COMMITTED", "DROPPED", "BY", "STAYS UNTIL", "SNAPSHOTS"];
    let mut rows = vec![head.map(String::from).to_vec()];
    let (mut all, mut waits) = (Vec::new(), String::new());
    for machine in admin.machines(None)? {
        for trashed in admin.runs().trashed(&machine.key) {
            let waiting = admin.runs().damage_above(&machine, &trashed);
            for (snapshot, why) in &waiting {
                waits.push_str(&format!("snapshot {snapshot} waits for its purge: {why}\n"));
            }
            rows.push(row(&trashed));
            all.push(trashed_json(&trashed, &waiting));
        }
    }
    let mut text = match all.is_empty() {
        true => "the trash is empty\n".to_owned(),
        false => table(&rows) + &waits,
    };
    let requests = purges::all(admin)?;
    for request in &requests {
        text.push_str(&format!("{}\n", request.describe()));
    }
    let requests: Vec<Value> = requests
        .iter()
        .map(|request| json!({ "request": request.number, "runs": request.runs.len() }))
        .collect();
    Ok(Answer::new(text, json!({ "trash": all, "requests": requests })))
}

fn row(trashed: &TrashedRun) -> Vec<String> {
    let (run, record) = (&trashed.run, &trashed.record);
    let until = match record.purge_not_before_ms {
        _ if record.purging => "being purged".to_owned(),
        i64::MAX => "purged on demand".to_owned(),
        at if at <= now_ms() => "the next purge".to_owned(),
        at => date(at),
    };
    let snapshots: Vec<String> =
        run.snapshots.iter().map(|s| format!("{} {}", s.disk, s.id)).collect();
    vec![
        run.machine.to_string(),
        date(run.committed_ms),
        date(record.trashed_ms),
        record.reason.clone(),
        until,
        snapshots.join(", "),
    ]
}

fn trashed_json(trashed: &TrashedRun, waiting: &[(SnapshotId, Wait)]) -> Value {
    let (run, record) = (&trashed.run, &trashed.record);
    let snapshots: Vec<Value> = run
        .snapshots
        .iter()
        .map(|s| json!({ "snapshot": s.id.to_string(), "disk": s.disk }))
        .collect();
    let waiting: Vec<Value> = waiting
        .iter()
        .map(|(id, why)| json!({ "id": id.to_string(), "why": why.to_string() }))
        .collect();
    json!({
        "machine": run.machine,
        "backup_id": run.backup.to_string(),
        "committed_ms": run.committed_ms,
        "dropped_ms": record.trashed_ms,
        "reason": record.reason,
        "purge_not_before_ms": record.purge_not_before_ms,
        "purging": record.purging,
        "snapshots": snapshots,
        "waiting": waiting,
    })
}

/// The dropped run of a snapshot, and whose it is.
pub(super) fn in_trash(
    admin: &Admin,
    snapshot: SnapshotId,
) -> Result<(MachineKey, Arc<Run>), AdminError> {
    let found = admin.machines(None)?.into_iter().find_map(|machine| {
        let trashed = admin.runs().trashed(&machine.key);
        let holds = |trashed: &&TrashedRun| trashed.run.snapshots.iter().any(|s| s.id == snapshot);
        let run = trashed.iter().find(holds).map(|trashed| trashed.run.clone())?;
        Some((machine.key.clone(), run))
    });
    found.ok_or(AdminError::NotInTrash { snapshot })
}

fn restore(admin: &Admin, snapshot: SnapshotId) -> Result<Answer, AdminError> {
    let (machine, run) = in_trash(admin, snapshot)?;
    let pinned = admin.retention().restore(&machine, run.backup)?;
    let text = format!(
        "{machine}: the run of {} is back, and pinned: `janus-server unpin {pinned}` leaves it to the rules\n",
        date(run.committed_ms)
    );
    let backup = run.backup.to_string();
    Ok(Answer::new(text, json!({ "machine": machine, "backup_id": backup, "pinned": true })))
}

/// Asks another person for the purge of what is in the trash now.
fn request(
    admin: &Admin,
    only: Option<&MachineKey>,
    task: &Task<'_>,
) -> Result<Answer, AdminError> {
    let machines = admin.machines(only)?;
    let trashed = machines.iter().flat_map(|machine| machine.trashed());
    let runs: Vec<_> = trashed.map(|it| (it.run.machine.clone(), it.run.backup)).collect();
    if runs.is_empty() {
        return Ok(Answer::new("the trash is empty\n", json!({ "machines": [] })));
    }
    let request = purges::ask(admin, task.person()?, runs)?;
    let text = format!("nothing is purged yet; {}\n", request.describe());
    let json = json!({ "request": request.number, "runs": request.runs.len() });
    Ok(Answer::new(text, json))
}

/// Purges what another person has asked for.
fn confirm(admin: &Admin, number: u32, task: &Task<'_>) -> Result<Answer, AdminError> {
    let request = purges::confirm(admin, task.person()?, number)?;
    for (machine, backup) in &request.runs {
        // What was brought back and dropped again since wasn't meant.
        let trashed = admin.runs().trashed(machine);
        let is_meant =
            |it: &TrashedRun| it.run.backup == *backup && it.record.trashed_ms <= request.asked_ms;
        if !trashed.iter().any(is_meant) {
            continue;
        }
        let due = admin.runs().make_due(machine, *backup);
        due.map_err(|error| AdminError::Retention(error.into()))?;
    }
    purge(admin, None, false, task)
}

/// Purges what is due, or `all`.
fn purge(
    admin: &Admin,
    only: Option<&MachineKey>,
    all_of_it: bool,
    task: &Task<'_>,
) -> Result<Answer, AdminError> {
    let (mut text, mut all) = (String::new(), Vec::new());
    for machine in admin.machines(only)? {
        task.check()?;
        let report = admin.retention().purge(&machine.key, all_of_it, task.token());
        if report.purged.is_empty() && report.waiting.is_empty() {
            continue;
        }
        text.push_str(&format!("{}: {} runs purged\n", machine.key, report.purged.len()));
        for (snapshot, why) in &report.waiting {
            text.push_str(&format!("  snapshot {snapshot} waits: {why}\n"));
        }
        let waiting = report
            .waiting
            .iter()
            .map(|(id, why)| json!({ "id": id.to_string(), "why": why.to_string() }));
        all.push(json!({
            "machine": machine.key,
            "purged": report.purged.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "waiting": waiting.collect::<Vec<_>>(),
        }));
    }
    if text.is_empty() {
        text.push_str("nothing was there to be purged\n");
    }
    Ok(Answer::new(text, json!({ "machines": all })))
}
